"`FoldBN` in daily use: the last fit wins, and what is no finished training is not folded"
import warnings
import pytest, torch
from copy import deepcopy
from torch import nn
from fastai.vision.all import (Callback, CancelFitException, DataLoaders, EarlyStoppingCallback, Learner, SaveModelCallback,
                               TerminateOnNaNCallback, accuracy, CrossEntropyLossFlat, params)
import fastai.callback.all
from fastai_bnfold.all import *

def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1,8,3,bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8,3)))
def item(i): return torch.randn(1,8,8, generator=torch.Generator().manual_seed(i)),i%3
def halves(model): return [params(part) for part in model]
@pytest.fixture
def learner(tmp_path):
    def make(**kwargs):
        data = [item(i) for i in range(24)]
        dls = DataLoaders.from_dsets(data, data[:9], bs=8, num_workers=0, device='cpu')
        dls.train.rng.seed(0)
        learn = Learner(dls, net(), loss_func=CrossEntropyLossFlat(), metrics=accuracy, path=tmp_path, splitter=halves, **kwargs)
        learn.create_mbar,learn.logger = False,lambda *_: None
        return learn
    return make
def fold_cb(**kwargs): return FoldBN(latency=0, show=False, **kwargs)
def folded(learn): return not any(isinstance(m, nn.BatchNorm2d) for m in learn.model.modules())

ways = dict(fit=lambda l,**k: l.fit(1, **k), fit_one_cycle=lambda l,**k: l.fit_one_cycle(1, 1e-2, **k), fine_tune=lambda l,**k: l.fine_tune(1, **k),
            fit_flat_cos=lambda l,**k: l.fit_flat_cos(1, 1e-2, **k), fit_sgdr=lambda l,**k: l.fit_sgdr(1, 1, 1e-2, **k))
@pytest.mark.parametrize('way', ways)
def test_a_carried_callback_folds_after_every_training(learner, way):
    learn = learner(cbs=fold_cb())
    for _ in '12':
        ways[way](learn)
        assert folded(learn)
@pytest.mark.parametrize('way', ways)
def test_a_callback_of_the_call_folds_after_every_training(learner, way):
    learn = learner()
    for _ in '12':
        ways[way](learn, cbs=fold_cb())
        assert folded(learn)
@pytest.mark.parametrize('way', ways)
def test_weights_are_those_without_it(learner, way):
    "Two trainings, a fold after each: bit for bit the weights, and the same layers frozen"
    plain,other = learner(),learner(cbs=fold_cb())
    for learn in (plain,other):
        torch.manual_seed(1)
        for _ in '12': ways[way](learn)
    other.unfold_bn()
    assert all(torch.equal(a, b) for a,b in zip(plain.model.state_dict().values(), other.model.state_dict().values()))
    assert [p.requires_grad for p in plain.model.parameters()]==[p.requires_grad for p in other.model.parameters()]
def test_as_a_class(learner):
    learn = learner()
    learn.fit(1, cbs=FoldBN)
    learn.fit(1, cbs=FoldBN)
    assert folded(learn)
def test_without_it_a_training_is_refused(learner):
    learn = learner()
    learn.fit(1, cbs=fold_cb())
    with pytest.raises(FoldedError, match='unfold_bn'): learn.fit(1)
def test_what_its_user_folded_it_leaves_alone(learner):
    learn = learner(cbs=fold_cb())
    learn.fold_bn(latency=0)
    with pytest.raises(FoldedError, match='unfold_bn'): learn.fit(1)
def test_a_refused_training_freezes_nothing(learner):
    learn = learner()
    learn.fit(1)
    learn.fold_bn(latency=0)
    with pytest.raises(FoldedError): learn.fine_tune(1)
    learn.unfold_bn()
    assert all(p.requires_grad for p in learn.model.parameters())
def test_freeze_while_it_is_folded(learner):
    learn = learner()
    learn.fold_bn(latency=0)
    learn.freeze()
    learn.unfold_bn()
    assert not learn.model[0][0].weight.requires_grad and learn.model[1][2].weight.requires_grad

class Fails(Callback):
    def __init__(self, error): self.error = error
    def after_batch(self):
        if self.training: raise self.error
@pytest.mark.parametrize('error', [KeyboardInterrupt, ValueError('no')], ids=['interrupt','error'])
@pytest.mark.parametrize('then', ['validate', 'get_preds', 'predict'])
def test_an_unfinished_training_is_not_folded_later(learner, error, then):
    learn = learner(cbs=fold_cb())
    with pytest.raises((KeyboardInterrupt,ValueError)): learn.fit(1, cbs=Fails(error))
    if then=='predict': learn.get_preds(dl=[learn.dls.one_batch()])
    else: getattr(learn, then)()
    assert not folded(learn)
def test_early_stopping_folds(learner):
    learn = learner()
    learn.fit(9, 0., cbs=[EarlyStoppingCallback(patience=1), fold_cb()])
    assert folded(learn)
def test_lr_find_leaves_a_fold_as_it_was(learner):
    "The same model, the same report; and the next training folds again"
    plain,learn = learner(),learner(cbs=fold_cb())
    for o in (plain,learn):
        torch.manual_seed(1)
        o.fit(1)
    before,report = {name: x.clone() for name,x in learn.model.state_dict().items()},learn.bn_folding.report
    for o in (plain,learn):
        torch.manual_seed(2)
        o.lr_find(num_it=6, show_plot=False)
    assert folded(learn) and learn.bn_folding.report is report
    assert all(torch.equal(x, before[name]) for name,x in learn.model.state_dict().items())
    for o in (plain,learn): o.fit(1)
    learn.unfold_bn()
    assert all(torch.equal(a, b) for a,b in zip(plain.model.state_dict().values(), learn.model.state_dict().values()))
def test_lr_find_after_a_load_into_the_fold(learner):
    "The folded model has numbers of its own then, and keeps them"
    learn = learner(cbs=fold_cb())
    learn.fit(1)
    loaded = {name: x*2 for name,x in learn.model.state_dict().items()}
    learn.model.load_state_dict(loaded)
    learn.lr_find(num_it=6, show_plot=False)
    assert all(torch.equal(x, loaded[name]) for name,x in learn.model.state_dict().items())
@pytest.mark.parametrize('error', [KeyboardInterrupt, ValueError('no')], ids=['interrupt','error'])
def test_an_interrupted_lr_find_is_not_folded(learner, error):
    "fastai leaves the weights as they are then"
    learn = learner(cbs=fold_cb())
    learn.fit(1)
    learn.add_cb(Fails(error))
    with pytest.raises((KeyboardInterrupt,ValueError)): learn.lr_find(num_it=6, show_plot=False)
    assert not folded(learn)
    learn.validate()
def test_stopped_before_it_began(learner):
    class Stop(Callback):
        def before_fit(self): raise CancelFitException
    learn = learner(cbs=fold_cb())
    learn.fit(1, cbs=Stop())
    assert not folded(learn)
def test_lr_find_does_not_fold(learner):
    learn = learner(cbs=fold_cb())
    learn.lr_find(num_it=6, show_plot=False)
    assert not folded(learn)
def test_a_validation_inside_a_training(learner):
    "By another callback: it folds nothing, and the training folds when it is over"
    seen = []
    class Looks(Callback):
        order = 70
        def after_epoch(self):
            if self.learn.lock.locked(): return
            self.learn.validate()
            seen.append(folded(self.learn))
    learn = learner(cbs=fold_cb())
    learn.fit(2, cbs=Looks())
    assert seen==[False,False] and folded(learn)

def test_a_fold_that_fails_is_a_warning(learner):
    learn = learner()
    cb = fold_cb()
    with pytest.warns(UserWarning, match='(?s)FoldBN could not fold it.*StatisticsError.*Traceback'):
        learn.fit(1, 1e30, cbs=[TerminateOnNaNCallback(), cb])
    assert cb.report is None and not folded(learn)
def test_or_an_error(learner):
    with pytest.raises(FoldError): learner().fit(1, cbs=fold_cb(on_error='raise', xb=torch.zeros(2)))
def test_the_report_is_that_of_the_last_fit(learner):
    learn = learner()
    cb = fold_cb()
    learn.fit(1, cbs=cb)
    cb.kwargs['xb'] = torch.zeros(2)
    with warnings.catch_warnings(record=True): learn.fit(1, cbs=cb)
    assert cb.report is None
@pytest.mark.parametrize('wrong', [dict(latencies=0), dict(inplace=True)], ids=str)
def test_a_typo_is_found_at_construction(wrong):
    with pytest.raises(TypeError, match=next(iter(wrong))): FoldBN(**wrong)
def test_an_unknown_way_to_fail():
    with pytest.raises(FoldError, match='on_error'): FoldBN(on_error='ignore')

def test_fold_and_unfold_leave_the_next_training_as_it_was(learner):
    plain,other = learner(),learner()
    for learn in (plain,other):
        torch.manual_seed(1)
        learn.fit_one_cycle(1, 1e-2)
        if learn is other:
            learn.fold_bn(latency=0)
            learn.unfold_bn()
        learn.fit_one_cycle(1, 1e-2)
    assert all(torch.equal(a, b) for a,b in zip(plain.model.state_dict().values(), other.model.state_dict().values()))
def test_without_a_validation_set_too(learner):
    "Then the batch comes from the training data"
    learn = learner()
    learn.dls = DataLoaders(learn.dls.train)
    state = learn.dls.train.rng.getstate(),torch.get_rng_state()
    learn.fold_bn(latency=0)
    assert learn.dls.train.rng.getstate()==state[0] and torch.equal(torch.get_rng_state(), state[1])
def test_best_model_in_a_later_validation(learner):
    "`SaveModelCallback` loads after every validation; a folded Learner has nothing to load"
    learn = learner(cbs=[SaveModelCallback(), fold_cb()])
    learn.fit(1)
    saved = (learn.path/learn.model_dir/'model.pth').read_bytes()
    learn.validate()
    assert folded(learn) and (learn.path/learn.model_dir/'model.pth').read_bytes()==saved
def test_a_copy_after_the_fold(learner):
    learn = learner(cbs=fold_cb())
    learn.fit(1)
    copied = deepcopy(learn)
    copied.fit(1)
    assert folded(copied) and folded(learn)
