"A Learner in any order of fit, fold, unfold, save, load, export, predict, validate: predictions are always the unfolded model's, and after `unfold_bn` everything is bit-identical"
import copy, os, tempfile
from pathlib import Path
import pytest, torch
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from fastai.vision.all import CrossEntropyLossFlat, Datasets, Learner, accuracy, load_learner
from fastai_bnfold.all import *
from fastai_bnfold.fold.testing import randomize_bn
from fastai_bnfold.fold.verify import max_err
from fastai_bnfold.fold.inputs import run
from test_faults import Dense, conv_bn

gen = torch.Generator().manual_seed(3)
images = torch.randn(22,3,10,10, generator=gen) # batches of 4: the last ones are smaller
def get_x(i): return images[i]
def get_y(i): return torch.tensor(i%4)
counts = dict(checks=0)

class Machine(RuleBasedStateMachine):
    "`self.unfolded` is the model as it would be without any fold"
    @initialize(make=st.sampled_from([conv_bn, Dense]), seed=st.integers(0,5))
    def start(self, make, seed):
        torch.manual_seed(seed)
        self.dir,self.files,self.n = tempfile.TemporaryDirectory(),{},0
        dls = Datasets(range(22), tfms=[[get_x],[get_y]], splits=[list(range(22)), list(range(9))]).dataloaders(bs=4, num_workers=0)
        self.learn = Learner(dls, randomize_bn(make(), seed), loss_func=CrossEntropyLossFlat(), metrics=[accuracy], path=self.dir.name)
        self.learn.remove_cbs([c for c in self.learn.cbs if type(c).__name__=='ProgressCallback']); self.learn.logger = lambda *_: None
        self.forget()
    def teardown(self):
        if hasattr(self, 'dir'): self.dir.cleanup()

    def forget(self): self.unfolded,self.folded,self.objects = copy.deepcopy(self.learn.model),False,None
    def path(self): self.n += 1; return f'm{self.n}'

    @precondition(lambda self: not self.folded)
    @rule(lr=st.sampled_from([1e-3,1e-2]))
    def fit(self, lr): self.learn.fit(1, lr); self.forget()
    @precondition(lambda self: self.folded)
    @rule()
    def fit_is_refused(self):
        with pytest.raises(FoldedError): self.learn.fit(1)
    @precondition(lambda self: not self.folded)
    @rule(validate=st.booleans())
    def fold(self, validate):
        self.objects = self.learn.opt,self.learn.model.state_dict(keep_vars=True),dict(self.learn.model.named_modules())
        rep = self.learn.fold_bn(validate=validate, latency=0)
        assert rep.n_folded>=1 and rep.n_changed in ((0,) if validate else (None,)); self.folded = True
    @precondition(lambda self: self.folded)
    @rule()
    def fold_again_is_refused(self):
        with pytest.raises(FoldedError): self.learn.fold_bn()
    @precondition(lambda self: self.folded and self.objects)
    @rule()
    def unfold(self):
        self.learn.unfold_bn()
        opt,state,modules = self.objects
        assert self.learn.opt is opt and dict(self.learn.model.named_modules())==modules
        now,was = self.learn.model.state_dict(keep_vars=True),self.unfolded.state_dict()
        assert list(now)==list(was) and all(now[k] is state[k] and torch.equal(now[k], was[k]) for k in now)
        self.folded = False
    @precondition(lambda self: not self.folded)
    @rule()
    def unfold_what_is_not_folded(self):
        with pytest.raises(FoldError): self.learn.unfold_bn()
    @rule()
    def save(self): f = self.path(); self.learn.save(f); self.files[f] = self.folded,copy.deepcopy(self.unfolded)
    @precondition(lambda self: self.files)
    @rule(i=st.integers(0,9))
    def load(self, i):
        "A file of the same state (folded or not) loads, another is refused, and changes nothing"
        f = list(self.files)[i%len(self.files)]
        folded,unfolded = self.files[f]
        if folded!=self.folded:
            kept = copy.deepcopy(self.learn.model.state_dict())
            with pytest.raises(FoldedError, match='Nothing was loaded'): self.learn.load(f)
            now = self.learn.model.state_dict()
            assert all(torch.equal(now[k], kept[k]) for k in kept)
            return
        self.learn.load(f)
        if folded: self.unfold() # the numbers of another fold perhaps: what comes back is what was trained
        else: self.unfolded = unfolded
    @rule()
    def export_and_load(self):
        f = self.path()+'.pkl'; self.learn.export(f); other = load_learner(Path(self.dir.name)/f)
        assert max_err(run(self.unfolded, (images,)), run(other.model, (images,)))<1e-4
        if self.folded:
            with pytest.raises(FoldError): other.unfold_bn()
            with pytest.raises(FoldedError): other.fit(1)
    @rule(i=st.integers(0,21))
    def predict(self, i):
        probs = self.learn.predict(i)[2]
        [want] = run(self.unfolded, (images[i:i+1],))
        assert torch.allclose(probs, want[0].softmax(0), atol=1e-4)
    @rule()
    def validate(self):
        loss,acc = self.learn.validate()
        other = Learner(self.learn.dls, self.unfolded, loss_func=CrossEntropyLossFlat(), metrics=[accuracy]); other.logger = lambda *_: None
        with other.no_bar(): l,a = other.validate()
        assert abs(loss-l)<=1e-4*max(1, abs(l)) and acc==a
    @invariant()
    def predictions_are_the_unfolded_models(self):
        if not hasattr(self, 'learn'): return
        counts['checks'] += 1
        preds = self.learn.get_preds(dl=self.learn.dls.valid)[0]
        [want] = run(self.unfolded, (images[:9],))
        assert torch.allclose(preds, want.softmax(1), atol=1e-4)

def test_learner_in_any_order(record_property):
    run_state_machine_as_test(Machine, settings=settings(max_examples=int(os.environ.get('STATE_EXAMPLES', 80)), stateful_step_count=12, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck), print_blob=False))
    record_property('checks', counts['checks'])
    assert counts['checks']>100
