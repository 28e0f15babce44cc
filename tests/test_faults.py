"""Fault injection: whatever line of the package a fold is interrupted at, the model and the Learner are as they were.

A fault is an exception raised at a line of `fastai_bnfold` that a fold executes, the first or the last time it does. Only the lines that undo and put back
(`finally`, `except`, `undo`) are left out: nobody can restore if restoring is what fails. `FAULTS=1000 pytest tests/test_faults.py` tries more of them."""
import ast, copy, os, random, sys
from collections import Counter
from pathlib import Path
import pytest, torch
from torch import nn
from fastai.vision.all import CrossEntropyLossFlat, DataLoaders, Learner, accuracy
import fastai_bnfold
from fastai_bnfold.all import *
from fastai_bnfold.fold.testing import randomize_bn
from fastai_bnfold.fold.verify import max_err
from fastai_bnfold.fold.inputs import run
from conftest import snapshot, unchanged

package = str(Path(fastai_bnfold.__file__).parent)
n_faults = int(os.environ.get('FAULTS', 70)) # for each model

def restoring():
    "All (file, line) of the package that restore something"
    res = set()
    for f in Path(package).rglob('*.py'):
        for n in ast.walk(ast.parse(f.read_text())):
            parts = [*n.finalbody, *n.handlers] if isinstance(n, ast.Try) else [n] if isinstance(n, ast.FunctionDef) and n.name in ('undo','unfold','unfold_bn') else []
            res |= {(str(f), i) for p in parts for i in range(p.lineno, p.end_lineno+1)}
    return res
restore = restoring()

def lines(f, at=None, exc=None):
    "Call `f`, and raise `exc` `at` a line, the n-th time; returns how often each line of the package that may fail was executed"
    seen = Counter()
    def local(frame, event, _):
        if event=='line' and (where := (frame.f_code.co_filename, frame.f_lineno)) not in restore:
            seen[where] += 1
            if (where,seen[where])==at: raise exc(f'injected at {where}')
        return local
    def enter(frame, event, _): return local if frame.f_code.co_filename.startswith(package) else None
    before = sys.gettrace(); sys.settrace(enter)
    try: f()
    finally: sys.settrace(before)
    return seen

def places(seen, n, seed=0):
    "Where to inject: the first and the last execution of as many different lines as there may be, drawn at random"
    all_ = sorted({(w,k) for w,last in seen.items() for k in (1,last)})
    return random.Random(seed).sample(all_, min(n, len(all_)))

def inject(f, at):
    "The error that comes out of `f` when one is raised `at` a line; None if it was an error of a rule (which keeps a BN) or of a run on other inputs (which the model may not take)"
    exc = (KeyboardInterrupt, RuntimeError, MemoryError)[sum(map(ord, str(at)))%3]
    try: lines(f, at, exc)
    except (exc, FoldError) as e: return e
    if exc is KeyboardInterrupt: pytest.fail(f"the {exc.__name__} at {at} was swallowed")

def no_hooks():
    "Is no hook left that every module would call?"
    m = nn.modules.module
    return not (m._global_forward_pre_hooks or m._global_forward_hooks or m._global_forward_hooks_always_called)

def conv_bn(): return nn.Sequential(nn.Conv2d(3,8,3,bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8,8,3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(8), nn.Linear(8,4))
class Dense(nn.Module):
    "Clamps, a cat, a sum, a BN that stays"
    def __init__(self):
        super().__init__()
        self.stem,self.bn1,self.relu,self.conv,self.bn2,self.kept = nn.Conv2d(3,8,3,padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.Conv2d(16,8,1), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
    def forward(self, x):
        y = self.stem(x)
        return self.kept(self.bn2(self.conv(self.relu(self.bn1(torch.cat([y, y*2], 1)))+1).sigmoid()) + y).mean((2,3))[:,:4]
def parametrized(): return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Conv2d(3,8,3)), nn.BatchNorm2d(8), nn.ReLU(), nn.utils.weight_norm(nn.Conv2d(8,4,3)), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
class Looks(nn.Module):
    "Looks at its data, counts its calls, keeps a value"
    def __init__(self): super().__init__(); self.conv,self.bn = nn.Conv2d(3,4,3),nn.BatchNorm2d(4); self.register_buffer('calls', torch.zeros(()))
    def forward(self, x):
        self.calls += 1; self.kept = self.bn(self.conv(x))
        return self.kept.mean((2,3)) if x.mean().item()<1e6 else self.conv(x).mean((2,3))
models = {'conv and BN': conv_bn, 'clamps, a cat, a sum': Dense, 'parametrized': parametrized, 'looks at its data': Looks}
x = torch.randn(2,3,10,10, generator=torch.Generator().manual_seed(2))

@pytest.mark.parametrize('name', models)
def test_folder(name, record_property):
    "`fold`, in place and on a copy, and `plan`: the model is bit-identical to before, and can be folded afterwards"
    model = randomize_bn(models[name]())
    def fold(): folder.fold(model, x, inplace=True)
    def copied(): folder.fold(model, x)
    def plan(): folder.plan(model, x)
    folder,n = BNFolder(),0
    before = run(model, (x,))
    for f,share in ((fold, n_faults), (copied, n_faults//7), (plan, n_faults//7)):
        seen = lines(f)
        if f is fold: folder.unfold()
        kept = snapshot(model); attributes = set(vars(model))
        for at in places(seen, share):
            error = inject(f, at)
            if error is None and f is fold:
                assert max_err(before, run(model, (x,)))<1e-5 # what was folded is right all the same
                folder.unfold()
            assert error is None or 'injected' in str(error)+str(error.__cause__), error
            assert unchanged(model, kept) and set(vars(model))==attributes and no_hooks(), at
            n += 1
    fold(); assert folder.report.n_folded>0 and max_err(before, run(model, (x,)))<1e-5
    record_property('faults', n)

def test_learner(record_property, tmp_path):
    "`fold_bn`, validation and latency included: model, optimizer, callbacks, metrics, recorder and data are as they were"
    data = [(torch.randn(3,10,10), i%4) for i in range(20)]
    learn = Learner(DataLoaders.from_dsets(data, data[:9], bs=4, num_workers=0), conv_bn(), loss_func=CrossEntropyLossFlat(), metrics=[accuracy], path=tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, 1e-2)
    def state():
        r = learn.recorder
        return (learn.opt, copy.deepcopy(learn.opt.state_dict()['hypers']), list(learn.cbs), list(learn.metrics), list(learn.dls.loaders), learn.model, list(map(float, r.losses)), copy.deepcopy(r.values), list(r.lrs), r.metric_names, learn.loss_func, learn.lr)
    def fold(): learn.fold_bn(latency=1e-9) # the least number of rounds, whatever the time
    with learn.no_bar(), learn.no_logging():
        seen = lines(fold); learn.unfold_bn()
        kept,old,n = snapshot(learn.model),state(),0
        for at in places(seen, n_faults):
            error = inject(fold, at)
            if error is None: learn.unfold_bn()
            assert error is None or 'injected' in str(error)+str(error.__cause__), error
            assert unchanged(learn.model, kept) and state()==old, at
            with pytest.raises(FoldError, match='not folded'): learn.unfold_bn()
            n += 1
        fold(); learn.unfold_bn(); learn.fit(1)
    record_property('faults', n)
