"Re-estimated statistics and example-weighted inference"
import copy
from functools import partial
import pytest, torch
from torch import nn
import torch.nn.functional as F
from fastai.basics import Learner, DataLoaders, Datasets, CrossEntropyLossFlat, Callback, load_learner, set_seed
from fastai.metrics import accuracy
from fastai.callback.all import CSVLogger
from fastai.callback.training import BnFreeze
from torchvision.ops import FrozenBatchNorm2d
from fastai_bnfold.all import *
from fastai_bnfold.stats.batch import batch_norms, batch_statistics
from fastai_bnfold.stats.correct import best_share
from fastai_bnfold.stats.item import ItemStatistics, shares
from fastai_bnfold.lab.training import AutocastCPU
from fastai_bnfold.fold.testing import randomize_bn

def items(n, seed=0, size=6, shift=1.):
    "Two classes of images, each image with a contrast and a brightness of its own"
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(2, (n,), generator=g)
    x = torch.randn(n,3,size,size, generator=g)
    x[:,0] += (y.float()*2-1).view(-1,1,1)*torch.linspace(-1, 1, size)
    return [(a,b) for a,b in zip(x*(shift*torch.randn(n,1,1,1, generator=g)).exp() + 2*shift*torch.randn(n,1,1,1, generator=g), y)]

def net(): return nn.Sequential(nn.Conv2d(3,8,3,bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8,8,3,bias=False), nn.BatchNorm2d(8), nn.ReLU(),
                                nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(8), nn.Linear(8,2))
def learner(model=None, n=256, bs=2, shift=1., **kwargs):
    set_seed(0)
    dls = DataLoaders.from_dsets(items(n, shift=shift), items(64, 1, shift=shift), bs=bs, num_workers=0)
    return Learner(dls, randomize_bn(model or net()), loss_func=CrossEntropyLossFlat(), metrics=accuracy, **kwargs)
@pytest.fixture
def learn(): return learner()
@pytest.fixture(scope='module')
def fitted():
    "Trained in batches of two, on images of equal contrast and brightness"
    l = learner(net(), shift=0.)
    with l.no_bar(), l.no_logging(): l.fit(2, 3e-3)
    return l.model.state_dict()
def trained(state): l = learner(); l.model.load_state_dict(state); return l

def state(m): return {k: v.clone() for k,v in m.state_dict().items()}
def same(a, b): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)
def preds(l):
    with l.no_bar(): return l.get_preds()[0]
def hooks(m): return [h for o in m.modules() for h in o._forward_pre_hooks.values()]

# --- statistics

@pytest.mark.parametrize('B', (1,2,4,16,64))
def test_synthetic(B):
    "Known variance within and between items: what each estimate converges to"
    w,b,S,g = 1.,2.,9,torch.Generator().manual_seed(B)
    data = [(x,torch.tensor(0)) for x in 3 + b**.5*torch.randn(8192,1,1,1, generator=g) + w**.5*torch.randn(8192,1,3,3, generator=g)]
    l = Learner(DataLoaders.from_dsets(data, data[:2], bs=B, num_workers=0), nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(9,2)), loss_func=CrossEntropyLossFlat())
    found = {}
    with l.no_bar():
        for var in ('population','precise'):
            l.reestimate_bn(n_batches=8192//B, bs=B, var=var)
            found[var] = l.model[0].running_var.item()
            assert abs(l.model[0].running_mean.item()-3)<.06
    assert abs(found['population']/(w+b)-1)<.04
    assert abs(found['precise']/(w + b*(1-1/B)*B*S/(B*S-1))-1)<.04
    assert found['population']==pytest.approx(torch.cat([x for x,_ in data]).var().item(), rel=1e-3)

def test_estimates_are_their_formulas(learn):
    "The first BN against the values themselves"
    xs = [torch.stack([x for x,_ in items(64, s)]) for s in range(5)]
    conv,bn = learn.model[0],learn.model[1]
    learn.model.eval()
    with torch.no_grad(), batch_statistics(learn.model) as seen:
        for x in xs: learn.model(x)
        z = [conv(x).double().transpose(0,1).flatten(1) for x in xs]
    mean,var = seen[bn].estimate('precise')
    torch.testing.assert_close(mean, torch.stack([o.mean(1) for o in z]).mean(0)); torch.testing.assert_close(var, torch.stack([o.var(1) for o in z]).mean(0))
    mean,var = seen[bn].estimate('population')
    torch.testing.assert_close(var, torch.stack([o.var(1, correction=0) for o in z]).mean(0) + torch.stack([o.mean(1) for o in z]).var(0))

def test_only_statistics_change(learn):
    before,flags,ptr = state(learn.model),[m.training for m in learn.model.modules()],learn.model[1].running_mean.data_ptr()
    rng = torch.get_rng_state()
    with learn.no_bar(): moves = learn.reestimate_bn()
    assert torch.equal(rng, torch.get_rng_state()) and [m.training for m in learn.model.modules()]==flags and ptr==learn.model[1].running_mean.data_ptr()
    after = state(learn.model)
    assert {k for k in before if not torch.equal(before[k], after[k])}=={f'{i}.running_{k}' for i in (1,4,8) for k in ('mean','var')}
    assert list(moves.index)==['1','4','8'] and not hooks(learn.model)
    with learn.no_bar(): learn.reestimate_bn()
    assert same(after, learn.model.state_dict()) # the same items

def test_deep_layers_see_what_they_will_see(fitted):
    "With large batches, what every BN puts out at test time has mean β and variance γ²·σ²/(σ²+ε)"
    l = trained(fitted)
    with l.no_bar(): l.reestimate_bn(bs=256, n_batches=1)
    x,outs = torch.stack([x for x,_ in l.dls.train.dataset]),{}
    for m in batch_norms(l.model).values(): m.register_forward_hook(lambda m,_,o: outs.update({m: o}))
    l.model.eval()(x)
    for m,o in outs.items():
        o = o.transpose(0,1).flatten(1)
        torch.testing.assert_close(o.mean(1), m.bias, atol=1e-3, rtol=1e-3); torch.testing.assert_close(o.var(1, correction=0), m.weight**2*m.running_var/(m.running_var+m.eps), atol=1e-3, rtol=1e-2)

def frozen_like(m):
    "The same with torchvision's `FrozenBatchNorm2d`"
    m = copy.deepcopy(m)
    for i in (1,4): f = FrozenBatchNorm2d(8, eps=m[i].eps); f.load_state_dict(m[i].state_dict()); m[i] = f
    return m

def test_kinds_of_batch_norm():
    "Frozen in whatever way, synchronized: the statistics are the same"
    def stats(l):
        with l.no_bar(): l.reestimate_bn()
        return [o for i in (1,4,8) for o in (l.model[i].running_mean, l.model[i].running_var)]
    m = randomize_bn(net())
    want = stats(learner(copy.deepcopy(m)))
    frozen = learner(copy.deepcopy(m)); frozen.freeze()
    no_grad = learner(copy.deepcopy(m)); [p.requires_grad_(False) for p in no_grad.model.parameters()]
    for l in (frozen, no_grad, learner(copy.deepcopy(m), cbs=BnFreeze()), learner(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(m))), learner(frozen_like(m))):
        for a,b in zip(want, stats(l)): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

def test_bn_with_activation():
    timm = pytest.importorskip('timm')
    m = nn.Sequential(nn.Conv2d(3,8,3), timm.layers.BatchNormAct2d(8), nn.Flatten(), nn.Linear(8*16,2))
    l = learner(m)
    with l.no_bar(): l.reestimate_bn(); l.correct_bn(.2); l.uncorrect_bn(); assert l.fold_bn(latency=0).n_folded==1

def test_shared_bn():
    "A BN that is called twice gets the statistics of all its inputs"
    class Twice(nn.Module):
        def __init__(self): super().__init__(); self.bn,self.head = nn.BatchNorm2d(3),nn.Linear(3,2)
        def forward(self, x): return self.head((self.bn(x)+self.bn(2*x)).mean((2,3)))
    l = learner(Twice())
    with l.no_bar(): l.reestimate_bn(n_batches=1, bs=256)
    x = torch.stack([x for x,_ in l.dls.train.dataset]).double().transpose(0,1).flatten(1)
    v = (x.var(1, correction=0)+(2*x).var(1, correction=0))/2 + torch.stack([x.mean(1), 2*x.mean(1)]).var(0)
    torch.testing.assert_close(l.model.bn.running_var.double(), v, rtol=1e-4, atol=1e-5)

def test_a_bn_that_does_not_run(learn):
    learn.model.add_module('spare', nn.Identity()); learn.model.spare.bn = nn.BatchNorm2d(3)
    with learn.no_bar(): moves = learn.reestimate_bn()
    assert 'spare.bn' not in moves.index and learn.model.spare.bn.running_mean.eq(0).all()

def test_folded_then_unfolded():
    a,b = learner(),learner()
    with a.no_bar(), b.no_bar():
        a.reestimate_bn()
        b.fold_bn(latency=0)
        with pytest.raises(FoldedError): b.reestimate_bn()
        with pytest.raises(FoldedError): b.correct_bn(.1)
        b.unfold_bn().reestimate_bn()
        assert same(a.model.state_dict(), b.model.state_dict())
        rep = b.fold_bn(latency=0)
    assert rep.n_folded==rep.n_bn==3 and rep.n_changed==0

def test_mixed_precision():
    a,b = learner(),learner(cbs=AutocastCPU())
    with a.no_bar(), b.no_bar(): a.reestimate_bn(); b.reestimate_bn(); b.correct_bn(per_layer=True)
    for i in (1,4):
        assert b.model[i].running_var.dtype==torch.float32
        assert (a.model[i].running_var/b.model[i].running_var-1).abs().max()<.02

class Interrupt(Callback):
    "Stop at the `at`-th batch"
    def __init__(self, at): self.at = at
    def after_pred(self):
        self.at -= 1
        if self.at<0: raise KeyboardInterrupt

@pytest.mark.parametrize('at', (0,1,3))
@pytest.mark.parametrize('what', ('reestimate','correct','per layer'))
def test_interruption(fitted, what, at):
    l = trained(fitted); l.correct_bn({'1': .3}) if what!='reestimate' else None
    before,y,alphas = state(l.model),preds(l),shares(l.model)
    with l.added_cbs(Interrupt(at)), l.no_bar(), pytest.raises(KeyboardInterrupt):
        if what=='reestimate': l.reestimate_bn()
        elif what=='correct': l.correct_bn()
        else: l.correct_bn(per_layer=True, alphas=[.1], n=64)
    assert same(before, l.model.state_dict()) and torch.equal(y, preds(l)) and shares(l.model)==alphas and len(hooks(l.model))==len(alphas)
    assert torch.is_grad_enabled() and len(l.metrics)==1

def test_interruption_while_storing(learn, monkeypatch):
    before,n = state(learn.model),[0]
    class Stubborn(torch.Tensor):
        def copy_(self, *args):
            n[0] += 1
            if n[0]==8: raise KeyboardInterrupt # after `batch_statistics` has put the old ones back
            return super().copy_(*args)
    m = learn.model[4]; m.running_var = m.running_var.as_subclass(Stubborn)
    with learn.no_bar(), pytest.raises(KeyboardInterrupt): learn.reestimate_bn(n_batches=6, bs=32)
    assert n[0]>=8 and same(before, learn.model.state_dict())

def test_nothing_else_is_touched(learn, tmp_path):
    "The recorder, the metrics and a logger's file are as the training left them"
    learn.path = tmp_path
    with learn.no_bar(): learn.fit(1, cbs=CSVLogger())
    history,values = (tmp_path/'history.csv').read_text(),list(learn.recorder.values)
    learn.add_cb(CSVLogger())
    with learn.no_bar(): learn.reestimate_bn(); learn.correct_bn(n=64)
    assert (tmp_path/'history.csv').read_text()==history and learn.recorder.values==values and learn.metrics[0].name=='accuracy'

def test_augmentation_is_off():
    from fastai.basics import Transform
    class Brighten(Transform):
        split_idx = 0
        def encodes(self, x:torch.Tensor): return x+10.
    data = items(64); xs = [x for x,_ in data]
    dsets = Datasets(range(64), tfms=[[lambda i: xs[i], Brighten()], [lambda i: data[i][1]]], splits=[range(48), range(48,64)])
    l = Learner(dsets.dataloaders(bs=2, num_workers=0), net(), loss_func=CrossEntropyLossFlat())
    with l.no_bar():
        def mean(**kwargs): l.reestimate_bn(**kwargs); return l.model[1].running_mean.clone()
        off,on = mean(),mean(augment=True)
    w = l.model[0].weight.detach().sum((1,2,3))
    torch.testing.assert_close(on-off, 10*w, rtol=1e-3, atol=1e-3)
    assert l.dls.train.dataset.split_idx==0

def test_torch_dataloaders(learn):
    dl = [torch.utils.data.DataLoader(items(64, s), 4) for s in (0,1)]
    l = Learner(DataLoaders(*dl), net(), loss_func=CrossEntropyLossFlat())
    with l.no_bar(): l.reestimate_bn(); l.correct_bn(n=32)
    assert not torch.equal(l.model[1].running_mean, torch.zeros(8))
    l.correct_bn(0)
    with l.no_bar(): assert l.fold_bn(latency=0).n_folded==3

def test_tabular():
    import pandas as pd
    from fastai.tabular.all import TabularDataLoaders, tabular_learner, Categorify, Normalize
    df = pd.DataFrame({'a': range(80), 'b': [i%3 for i in range(80)], 'y': [str(i%2) for i in range(80)]})
    l = tabular_learner(TabularDataLoaders.from_df(df, procs=[Categorify,Normalize], cat_names=['b'], cont_names=['a'], y_names='y', bs=8), layers=[8])
    with l.no_bar():
        moves = l.reestimate_bn()
        assert len(moves)==len(batch_norms(l.model))>1
        with pytest.raises(StatisticsError, match='bs'): l.reestimate_bn(bs=1)
        with pytest.raises(StatisticsError, match='one position'): l.correct_bn()

# --- example-weighted inference

@pytest.mark.parametrize('d', (1,2,3))
@pytest.mark.parametrize('a', (0.,.07,.5,1.))
def test_item_statistics(d, a):
    bn = randomize_bn([nn.BatchNorm1d,nn.BatchNorm2d,nn.BatchNorm3d][d-1](6)).double().eval()
    x = torch.randn(4,6,*[5,3,2][:d]).double()*3+1
    dims = tuple(range(2, d+2))
    def c(o): return o.view(1,-1,*[1]*d)
    m,v = x.mean(dims, keepdim=True),x.var(dims, correction=0, keepdim=True)
    r,q = c(bn.running_mean),c(bn.running_var)
    want = (x-(a*m+(1-a)*r))/(a*v+(1-a)*q+a*(1-a)*(m-r)**2+bn.eps).sqrt()*c(bn.weight)+c(bn.bias)
    bn.register_forward_pre_hook(ItemStatistics(a), with_kwargs=True)
    torch.testing.assert_close(bn(x), want, rtol=1e-10, atol=1e-10); torch.testing.assert_close(bn(input=x), want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(bn.float()(x.float()), want.float(), rtol=1e-4, atol=1e-4)
    assert bn.half()(x.half()).dtype==torch.float16

def test_correct_and_uncorrect(learn):
    before,y = state(learn.model),preds(learn)
    assert learn.correct_bn(.2) is None and shares(learn.model)=={'1': .2, '4': .2} # the BN1d has no positions
    z = preds(learn)
    assert (y-z).abs().max()>1e-3 and same(before, learn.model.state_dict())
    learn.correct_bn(.2); assert torch.equal(z, preds(learn)) and len(hooks(learn.model))==2 # replaced, not added
    learn.uncorrect_bn()
    assert torch.equal(y, preds(learn)) and not hooks(learn.model)
    with pytest.raises(StatisticsError, match='not corrected'): learn.uncorrect_bn()
    learn.correct_bn(0); assert torch.equal(y, preds(learn)) and not hooks(learn.model)

def test_training_is_the_same():
    "Corrected or not, a step of training does the same"
    a,b = learner(),learner(); b.correct_bn(.3)
    for l in (a,b):
        set_seed(3)
        with l.no_bar(), l.no_logging(): l.fit(1)
    assert same(a.model.state_dict(), b.model.state_dict())

def test_per_bn_and_fold(learn):
    learn.correct_bn({'1': .1, '4': 0})
    y = preds(learn)
    with learn.no_bar(): rep = learn.fold_bn(latency=0)
    assert [r.folded for r in rep.rows]==[False,True,True] and 'share of α = 0.1' in rep.rows[0].reason and rep.n_changed==0
    torch.testing.assert_close(preds(learn), y, rtol=1e-4, atol=1e-5)
    learn.unfold_bn(); assert torch.equal(preds(learn), y)

def test_frozen_and_corrected_is_explained():
    "A `FrozenBatchNorm2d` has a row in the report, corrected or not"
    l = learner(frozen_like(net())); l.correct_bn(.1)
    with l.no_bar(): rep = l.fold_bn(latency=0)
    assert [(r.bn,r.folded) for r in rep.rows]==[('1',False),('4',False),('8',True)] and 'α = 0.1' in rep.rows[0].reason

def lambda_x(i): return items(8)[i][0]
def lambda_y(i): return items(8)[i][1]

def test_export(learn, tmp_path):
    x = learn.dls.valid.one_batch()[0]
    learn.dls = DataLoaders.from_dsets(Datasets(range(8), [[lambda_x],[lambda_y]]), Datasets(range(8), [[lambda_x],[lambda_y]]), bs=2, num_workers=0)
    learn.correct_bn(.2)
    y = learn.model.eval()(x)
    learn.path = tmp_path; learn.export('m.pkl')
    new = load_learner(tmp_path/'m.pkl')
    assert torch.equal(new.model.eval()(x), y) and shares(new.model)==shares(learn.model)
    for f in (new.reestimate_bn, partial(new.correct_bn)):
        with pytest.raises(FoldError): f()
    assert torch.equal(copy.deepcopy(learn.model).eval()(x), y)

def test_alpha_is_chosen(fitted):
    "Items with a contrast of their own: their statistics help. What the validation set holds has no say"
    l = trained(fitted)
    with l.no_bar():
        loss = l.validate()[0]
        curve = l.correct_bn()
        best = curve.index[curve.chosen][0]
        assert best>0 and curve['training loss'].idxmin()==best and curve['training loss'][best]<curve['training loss'][0] and l.validate()[0]<loss
        alphas = shares(l.model)
        each = l.correct_bn(per_layer=True)
        assert each['training loss']['per layer']<=curve['training loss'][best] and each.chosen['per layer'] and shares(l.model).keys()==alphas.keys()
        assert all(type(a) is float and 0<a<1 for a in shares(l.model).values()) and all(p.grad is None for p in l.model.parameters())
    other = trained(fitted); other.dls.loaders[1] = other.dls.valid.new([(x, 1-y) for x,y in items(64, 7)])
    with other.no_bar(): other.correct_bn()
    assert shares(other.model)==alphas

def test_no_gain_no_change():
    "A share that is no significant gain is not taken"
    g = torch.Generator().manual_seed(0); zero = torch.rand(500, generator=g)
    assert best_share({0.: zero, .1: zero-.05*torch.randn(500, generator=g).abs(), .2: zero+.1})==.1
    assert best_share({0.: zero, .1: zero+torch.randn(500, generator=g)-.001})==0.

# --- mistakes

def test_mistakes(learn):
    y = preds(learn)
    for f in (partial(learn.correct_bn, 1.5), partial(learn.correct_bn, -.1), partial(learn.correct_bn, 'a'), partial(learn.correct_bn, {'1': 2}), partial(learn.correct_bn, {'9': .1}),
              partial(learn.correct_bn, float('nan')), partial(learn.correct_bn, alphas=(.1,3)), partial(learn.correct_bn, n=0), partial(learn.reestimate_bn, var='biased'), partial(learn.reestimate_bn, bs=0),
              partial(learn.reestimate_bn, n_batches=-1), partial(learn.reestimate_bn, n_batches=1.5), partial(learn.reestimate_bn, bs=1)):
        with pytest.raises(StatisticsError, match='got|bs'), learn.no_bar(): f()
    assert torch.equal(y, preds(learn)) and not hooks(learn.model)
    learn.correct_bn(.1)
    with pytest.raises(StatisticsError, match='uncorrect_bn'): learn.reestimate_bn()

def test_no_bn():
    l = learner(nn.Sequential(nn.Flatten(), nn.Linear(108,2)))
    for f in (l.reestimate_bn, l.correct_bn):
        with pytest.raises(StatisticsError, match='no batch norm'): f()

def test_no_data(learn):
    empty = Learner(DataLoaders(), net(), loss_func=CrossEntropyLossFlat())
    for f in (empty.reestimate_bn, empty.correct_bn):
        with pytest.raises(NoDataError): f()

def test_diverged(learn):
    learn.model[0].weight.data[0] = float('nan'); before = state(learn.model)
    with pytest.raises(StatisticsError, match='not finite'), learn.no_bar(): learn.reestimate_bn()
    assert all(torch.equal(before[k].nan_to_num(7), v.nan_to_num(7)) for k,v in learn.model.state_dict().items())

# --- several processes

def worker(rank, folder):
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2)
    l = learner()
    with l.no_bar(): l.reestimate_bn(bs=16, n_batches=8); c = l.correct_bn(n=128)
    torch.save((l.model.state_dict(), shares(l.model), c['training loss'].to_dict()), f'{folder}/{rank}.pt')
    torch.distributed.destroy_process_group()

def test_two_processes(tmp_path):
    "Each takes half of the items, and all end with the same statistics and shares"
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)
    (s0,a0,c0),(s1,a1,c1) = (torch.load(tmp_path/f'{r}.pt') for r in range(2))
    assert same(s0, s1) and a0==a1 and c0==c1
    one = learner()
    with one.no_bar(): one.reestimate_bn(bs=16, n_batches=8)
    torch.testing.assert_close(s0['1.running_mean'], one.model[1].running_mean, rtol=1e-4, atol=1e-5)
    assert (s0['1.running_var']/one.model[1].running_var-1).abs().max()<.1 # the batches are put together differently
