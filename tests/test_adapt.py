"Statistics for another place: `bn_shift`, `adapt_bn`, `restore_bn`"
import math
import numpy as np, pandas as pd, pytest, torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoaders, Datasets, Learner, Transform, load_learner, set_seed
from fastai.metrics import accuracy
from torchvision.ops import FrozenBatchNorm2d
from fastai_bnfold.all import *
from fastai_bnfold.fold.testing import randomize_bn
from fastai_bnfold.lab.training import AutocastCPU
from fastai_bnfold.stats import adapt
from fastai_bnfold.stats.adapt import auto_prior
from fastai_bnfold.stats.batch import batch_norms
from fastai_bnfold.stats.sampling import ItemMoments
from fastai_bnfold.stats.shift import distance, distances_of_draws, item_products, item_rows, left_out
from fastai_bnfold.stats.unlabelled import unlabelled_dl

def images(n, seed=0, light=1., dtype=torch.float32):
    "Images, each with a brightness of its own"
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(n,3,6,6, generator=gen) + torch.randn(n,3,1,1, generator=gen)
    return (light*x + (light-1)).to(dtype)

def labelled(x): return list(zip(x, torch.arange(len(x))%2))

def net():
    return nn.Sequential(nn.Conv2d(3,8,3,bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8,8,3,bias=False), nn.BatchNorm2d(8),
                         nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(8), nn.Linear(8,2))

def learner(model=None, fit=True, dtype=torch.float32, **kwargs):
    "With statistics that fit its data"
    set_seed(0)
    model = randomize_bn(model or net()).to(dtype)
    train,valid = (labelled(images(n, seed, dtype=dtype)) for n,seed in ((512,1),(256,2)))
    dls = DataLoaders.from_dsets(train, valid, bs=64, num_workers=0)
    learn = Learner(dls, model, loss_func=CrossEntropyLossFlat(), **kwargs)
    if fit:
        with learn.no_bar(): learn.reestimate_bn(n_batches=8)
    return learn

@pytest.fixture
def learn(): return learner()
def state(model): return {name: value.clone() for name,value in model.state_dict().items()}
def same(a, b): return a.keys()==b.keys() and all(torch.equal(a[name], b[name]) for name in a)
def quiet(method, *args, **kwargs):
    with method.__self__.no_bar(): return method(*args, **kwargs)

# --- what the new statistics are

@pytest.mark.parametrize('prior', (0,4,16.5))
def test_formula(prior):
    "Schneider et al., equation 3; the variance is that within the items and between their means"
    model = nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3,2))
    learn,x = learner(model, fit=False, dtype=torch.float64),images(10, light=.5, dtype=torch.float64)
    bn,means = model[0],x.mean((2,3))
    old_mean,old_var = bn.running_mean.clone(),bn.running_var.clone()
    moves = quiet(learn.adapt_bn, x, prior=prior)
    share = 10/(10+prior)
    var = (x-means[:,:,None,None]).square().mean((0,2,3)) + means.var(0)
    torch.testing.assert_close(bn.running_mean, share*means.mean(0)+(1-share)*old_mean)
    torch.testing.assert_close(bn.running_var, share*var+(1-share)*old_var)
    assert moves['share of the new'].iloc[0]==pytest.approx(share)

def test_layer_by_layer():
    "With prior 0 and one batch, every BN's input has the BN's statistics"
    learn,x = learner(dtype=torch.float64),images(64, light=.5, dtype=torch.float64)
    quiet(learn.adapt_bn, x, prior=0)
    seen = {}
    for path,bn in batch_norms(learn.model).items(): bn.register_forward_pre_hook(lambda bn, args: seen.setdefault(bn, args[0]))
    with torch.no_grad(): learn.model.eval()(x)
    for bn,value in seen.items():
        torch.testing.assert_close(bn.running_mean, value.transpose(0,1).flatten(1).mean(1))
        torch.testing.assert_close(bn.running_var, value.transpose(0,1).flatten(1).var(1), rtol=.02, atol=0)

def test_a_prior_counts_on_the_way():
    "Each BN's statistics come from what the BNs before it make of *their* new ones"
    learn,x = learner(dtype=torch.float64),images(16, light=.5, dtype=torch.float64)
    first,second = (learn.model[i] for i in (1,4))
    old = second.running_mean.clone()
    quiet(learn.adapt_bn, x, prior=16)
    with torch.no_grad(): got = learn.model[:4].eval()(x).mean((0,2,3)) # with the new statistics of the first
    torch.testing.assert_close(second.running_mean, .5*got+.5*old)

def test_batches_matter_little():
    x = images(128, light=.5)
    a,b = learner(),learner()
    quiet(a.adapt_bn, x, bs=128)
    quiet(b.adapt_bn, x, bs=16)
    for mine,yours in zip(batch_norms(a.model).values(), batch_norms(b.model).values()):
        assert ((mine.running_mean-yours.running_mean)/mine.running_var.sqrt()).abs().max()<.2
        assert (mine.running_var/yours.running_var).log().abs().max()<.3

def test_rows_are_no_items():
    "Two rows of one item (a pair of images, one after the other) count once"
    class Pairs(nn.Module):
        def __init__(self): super().__init__(); self.bn,self.head = nn.BatchNorm2d(3),nn.Linear(3,2)
        def forward(self, x): return self.head(self.bn(torch.cat([x,x])).mean((2,3)))[:len(x)]
    learn,x = learner(Pairs(), fit=False, dtype=torch.float64),images(8, dtype=torch.float64)
    old = learn.model.bn.running_mean.clone()
    quiet(learn.adapt_bn, x, prior=8)
    torch.testing.assert_close(learn.model.bn.running_mean, .5*x.mean((0,2,3))+.5*old)

# --- the prior that is chosen

@pytest.mark.parametrize('n', (2,4,16,64))
def test_distance_is_one_without_a_shift(n):
    "Whatever the number of items, and with BNs that see one value per item, too"
    learn,squares = learner(),[]
    for seed in range(8):
        with learn.no_bar(): rows,_ = item_rows(learn, unlabelled_dl(learn, images(n, 30+seed)), 64, 64)
        far, = distances_of_draws(rows, n, n)
        squares += [of_bn**2 for of_bn in far.values()]
    assert .6<np.mean(squares)**.5<1.7

def test_sparse_features():
    "Features that are zero in most items: a few items' variance of zero is no shift"
    class Sparse(nn.Module):
        def __init__(self): super().__init__(); self.bn,self.head = nn.BatchNorm1d(16),nn.Linear(16,2)
        def forward(self, x): return self.head(self.bn(x))
    gen = torch.Generator().manual_seed(0)
    def sparse(n): return torch.relu(torch.randn(n,16, generator=gen)-1.3)
    dls = DataLoaders.from_dsets(labelled(sparse(512)), labelled(sparse(128)), bs=64, num_workers=0)
    learn = Learner(dls, Sparse(), loss_func=CrossEntropyLossFlat())
    quiet(learn.reestimate_bn)
    for n in (4,16):
        shares = []
        for _ in range(6):
            shares.append(quiet(learn.adapt_bn, sparse(n))['share of the new'].iloc[0])
            learn.restore_bn()
        assert np.mean(shares)<.65*n/(n+2)

def test_auto_prior():
    assert auto_prior(.5, 16)==auto_prior(1., 16)==math.inf
    assert auto_prior(1e9, 16)==pytest.approx(2)
    chosen = [auto_prior(far, 16) for far in (1.1,1.5,2,5,20)]
    assert chosen==sorted(chosen, reverse=True)

@pytest.mark.parametrize('n', (2,4,16,64))
def test_auto_follows_the_data(n):
    shares = {}
    for light in (1.,.3):
        of_draws = []
        for seed in range(4):
            learn = learner()
            of_draws.append(quiet(learn.adapt_bn, images(n, 10+seed, light))['share of the new'].iloc[0])
        shares[light] = np.mean(of_draws)
    assert shares[1.]<.4*n/(n+2)
    assert shares[.3]>.6*n/(n+2)

def test_no_shift_no_change(learn, monkeypatch):
    "Where nothing is to be seen, nothing is changed"
    monkeypatch.setattr(adapt, 'auto_prior', lambda distance, n: math.inf)
    before = state(learn.model)
    moves = quiet(learn.adapt_bn, images(16))
    assert same(state(learn.model), before)
    assert moves['share of the new'].eq(0).all()

def test_it_helps():
    "Half the light: what was learned comes back"
    set_seed(0)
    x = images(512)
    x[::2,0] += torch.linspace(-1, 1, 6)
    x[1::2,0] -= torch.linspace(-1, 1, 6)
    model = net()
    dls = DataLoaders.from_dsets(labelled(x[:384]), labelled(x[384:]), bs=32, num_workers=0)
    learn = Learner(dls, model, loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(6, 1e-2)
    there = .1*x+3
    y = torch.arange(128)%2
    def acc():
        with torch.no_grad(): return (model.eval()(there[384:]).argmax(1)==y).float().mean().item()
    before = acc()
    quiet(learn.adapt_bn, there[:32])
    assert before<.7<.85<acc()

# --- kinds of data

def test_files(tmp_path):
    from fastai.vision.all import ImageDataLoaders, get_image_files, PILImage
    for i in range(24):
        folder = tmp_path/'ab'[i%2]
        folder.mkdir(exist_ok=True)
        PILImage.create(np.random.default_rng(i).integers(0, 255, (8,8,3), np.uint8)).save(folder/f'{i}.png')
    dls = ImageDataLoaders.from_folder(tmp_path, valid_pct=.5, bs=4, num_workers=0, seed=0)
    learn = Learner(dls, net(), loss_func=CrossEntropyLossFlat())
    before = state(learn.model)
    for data in (get_image_files(tmp_path), list(map(str, get_image_files(tmp_path))), dls.test_dl(get_image_files(tmp_path)), dls.train):
        quiet(learn.adapt_bn, data)
        assert not torch.equal(learn.model[1].running_mean, before['1.running_mean'])
        learn.restore_bn()
    for wrong in (tmp_path, str(tmp_path), [tmp_path/'missing.png'], [], get_image_files(tmp_path)[:0]):
        with pytest.raises(FoldError): quiet(learn.adapt_bn, wrong)
    assert same(state(learn.model), before)

def test_rows():
    from fastai.tabular.all import TabularDataLoaders, tabular_learner, Categorify, Normalize
    df = pd.DataFrame({'a': range(80), 'b': [i%3 for i in range(80)], 'y': [str(i%2) for i in range(80)]})
    dls = TabularDataLoaders.from_df(df, procs=[Categorify,Normalize], cat_names=['b'], cont_names=['a'], y_names='y', bs=8)
    learn = tabular_learner(dls, layers=[8])
    there = df.drop(columns='y')
    there['a'] += 500
    before = state(learn.model)
    assert quiet(learn.bn_shift, there, n=16).times>2
    assert len(quiet(learn.adapt_bn, there))==len(batch_norms(learn.model))
    assert not same(state(learn.model), before)
    learn.restore_bn()
    with pytest.raises(StatisticsError, match='one value per channel'): quiet(learn.adapt_bn, there[:1], prior=4)
    with pytest.raises(NoDataError): quiet(learn.adapt_bn, there[:0])
    with pytest.raises(FoldError): quiet(learn.adapt_bn, there.drop(columns='a'))
    assert same(state(learn.model), before)

class Stream(IterableDataset):
    def __iter__(self): return iter(images(20, light=.5))

@pytest.mark.parametrize('make', (
    lambda x: x, lambda x: list(x), lambda x: x.numpy(), lambda x: DataLoader(x, 8), lambda x: DataLoader(TensorDataset(x), 8),
    lambda x: DataLoader(TensorDataset(x, torch.full((20,), 99)), 8), lambda x: DataLoader(Stream(), 8),
    lambda x: DataLoader([x[:10], x[10:]], batch_size=None), lambda x: DataLoader(x, 8, shuffle=True, drop_last=True)))
def test_arrays_and_loaders(learn, make):
    "The same items, however they come; labels of unknown classes are not looked at"
    x = images(20, light=.5)
    want = learner()
    quiet(want.adapt_bn, x, prior=0)
    quiet(learn.adapt_bn, make(x), prior=0)
    torch.testing.assert_close(learn.model[1].running_mean, want.model[1].running_mean)
    torch.testing.assert_close(learn.model[1].running_var, want.model[1].running_var)

def test_several_inputs():
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.bn,self.head = nn.BatchNorm2d(3),nn.Linear(3,2)
        def forward(self, a, b): return self.head(self.bn(a+b).mean((2,3)))
    x = images(32)
    data = TensorDataset(x, x, torch.zeros(32, dtype=torch.long))
    learn = Learner(DataLoaders(DataLoader(data, 8), DataLoader(data, 8)), Two(), loss_func=CrossEntropyLossFlat())
    quiet(learn.adapt_bn, DataLoader(data, 8), prior=0)
    torch.testing.assert_close(learn.model.bn.running_mean, 2*x.mean((0,2,3)))

def test_n_items(learn):
    seen = []
    learn.model.register_forward_hook(lambda model, args, out: seen.append(len(out)))
    quiet(learn.adapt_bn, images(100), prior=4, n=40, bs=16)
    assert seen==[16,16,8]

def test_augmentation_is_off():
    class Brighten(Transform):
        split_idx = 0
        def encodes(self, x:torch.Tensor): return x+10.
    x = images(64)
    dsets = Datasets(range(64), tfms=[[lambda i: x[i], Brighten()], [lambda i: i%2]], splits=[range(48), range(48,64)])
    learn = Learner(dsets.dataloaders(bs=8, num_workers=0, after_batch=Brighten()), net(), loss_func=CrossEntropyLossFlat())
    quiet(learn.adapt_bn, learn.dls.train, prior=0)
    with torch.no_grad(): want = learn.model[0](x[:48]).mean((0,2,3))
    torch.testing.assert_close(learn.model[1].running_mean, want, rtol=1e-4, atol=1e-5)
    assert learn.dls.train.dataset.split_idx==0

def _number_to_image(i): return images(64)[i] if isinstance(i, int) else i
def _parity(i): return i%2
def exportable():
    dsets = Datasets(range(64), tfms=[[_number_to_image], [_parity]], splits=[range(48), range(48,64)])
    set_seed(0)
    return Learner(dsets.dataloaders(bs=8, num_workers=0), randomize_bn(net()), loss_func=CrossEntropyLossFlat())

def test_loaded_learner(tmp_path):
    "An exported Learner has no data to compare with, and adapts as well"
    learn = exportable()
    learn.export(tmp_path/'learn.pkl')
    loaded = load_learner(tmp_path/'learn.pkl')
    shift = quiet(loaded.bn_shift, images(32, light=.3))
    assert shift.times is None and shift.distance>2 and 'no validation set' in str(shift)
    quiet(loaded.adapt_bn, images(32, light=.3))
    quiet(learn.adapt_bn, images(32, light=.3))
    torch.testing.assert_close(loaded.model[1].running_mean, learn.model[1].running_mean)

# --- kinds of models

def test_kinds_of_batch_norm():
    bn = nn.BatchNorm2d(8)
    model = nn.Sequential(nn.Conv2d(3,8,3), bn, nn.ReLU(), nn.Conv2d(8,8,1), bn, FrozenBatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8,2))
    model.unused = nn.BatchNorm1d(3)
    learn = learner(model[:9], fit=False)
    learn.model.add_module('unused', nn.Sequential())
    before = state(learn.model)
    moves = quiet(learn.adapt_bn, images(16), prior=4)
    assert len(moves)==2
    changed = [name for name,value in learn.model.state_dict().items() if not torch.equal(value, before[name])]
    assert all('running' in name for name in changed) and '5.running_mean' in changed

def test_a_bn_that_does_not_run(learn):
    class Odd(nn.Module):
        def __init__(self): super().__init__(); self.net,self.idle = net(),nn.BatchNorm1d(3)
        def forward(self, x): return self.net(x)
    learn = learner(Odd())
    idle = learn.model.idle.running_mean.clone()
    assert len(quiet(learn.adapt_bn, images(16)))==3
    assert len(quiet(learn.bn_shift, images(16)).table)==3
    assert torch.equal(learn.model.idle.running_mean, idle)

def test_mixed_precision():
    learn,plain = learner(cbs=AutocastCPU()),learner()
    for each in (learn,plain): quiet(each.adapt_bn, images(64, light=.5), prior=0)
    torch.testing.assert_close(learn.model[4].running_mean, plain.model[4].running_mean, rtol=.02, atol=.02)

def test_half():
    learn = learner()
    learn.model.to(torch.bfloat16)
    quiet(learn.adapt_bn, images(64, light=.5).bfloat16())
    assert learn.model[1].running_mean.dtype==torch.bfloat16
    learn.restore_bn()

# --- back

def test_restore(learn):
    states = [state(learn.model)]
    for light in (.5,.3):
        quiet(learn.adapt_bn, images(32, light=light))
        states.append(state(learn.model))
    quiet(learn.reestimate_bn)
    for earlier in reversed(states):
        assert learn.restore_bn() is learn
        assert same(state(learn.model), earlier)

def test_restore_after_fold(learn):
    before = state(learn.model)
    quiet(learn.adapt_bn, images(32, light=.5))
    quiet(learn.fold_bn, latency=0)
    with pytest.raises(FoldedError, match='unfold_bn'): learn.restore_bn()
    learn.unfold_bn()
    learn.restore_bn()
    assert same(state(learn.model), before)

def _trained(learn):
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
def _loaded(learn): learn.model.load_state_dict({name: value+1 for name,value in learn.model.state_dict().items()})
def _replaced(learn): learn.model = net()
@pytest.mark.parametrize('change', (_trained,_loaded,_replaced))
def test_nothing_stale_is_restored(learn, change):
    quiet(learn.adapt_bn, images(32, light=.5), prior=4)
    change(learn)
    before = state(learn.model)
    with pytest.raises(StatisticsError, match='no longer'): learn.restore_bn()
    assert same(state(learn.model), before)

def test_nothing_to_restore():
    with pytest.raises(StatisticsError, match='no earlier'): learner(fit=False).restore_bn()

def test_history_is_not_exported(tmp_path):
    learn = exportable()
    quiet(learn.adapt_bn, images(32, light=.5))
    learn.export(tmp_path/'learn.pkl')
    with pytest.raises(StatisticsError, match='no earlier'): load_learner(tmp_path/'learn.pkl').restore_bn()

def test_moved_to_another_dtype_is_said(learn):
    quiet(learn.adapt_bn, images(32, light=.5))
    learn.model.half()
    with pytest.raises(StatisticsError): learn.restore_bn()

# --- nothing else

class Interrupt(Callback):
    "Interrupts the run after `at` batches"
    def __init__(self, at): self.at,self.seen = at,[] # a list: callbacks are put back as they were after a run
    def after_pred(self):
        self.seen.append(1)
        if len(self.seen)>self.at: raise KeyboardInterrupt

@pytest.mark.parametrize('at', (0,1,2,3))
@pytest.mark.parametrize('what', ('adapt_bn','bn_shift'))
def test_interruption(learn, what, at):
    before,modes = state(learn.model),[module.training for module in learn.model.modules()]
    with learn.added_cbs(Interrupt(at)), pytest.raises(KeyboardInterrupt):
        quiet(getattr(learn, what), images(32, light=.5), bs=16)
    assert same(state(learn.model), before)
    assert modes==[module.training for module in learn.model.modules()]
    assert not any(module._forward_pre_hooks for module in learn.model.modules())

def test_interruption_while_storing(learn, monkeypatch):
    from fastai_bnfold.stats import restore
    before,put,calls = state(learn.model),restore.put_stats,[]
    def interrupted(stats):
        calls.append(stats)
        if len(calls)>1: return put(stats)
        put(dict([next(iter(stats.items()))]))
        raise KeyboardInterrupt
    monkeypatch.setattr(restore, 'put_stats', interrupted)
    with pytest.raises(KeyboardInterrupt): quiet(learn.adapt_bn, images(32, light=.5))
    monkeypatch.undo()
    assert same(state(learn.model), before)
    learn.restore_bn() # the re-estimation before it

@pytest.mark.parametrize('what', ('adapt_bn','bn_shift'))
def test_nothing_else_is_touched(what):
    learn = learner(metrics=accuracy)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    values,weights = list(learn.recorder.values),{name: p.clone() for name,p in learn.model.named_parameters()}
    callbacks,opt,rng = list(learn.cbs),learn.opt,torch.get_rng_state()
    modes = [module.training for module in learn.model.modules()]
    getattr(learn, what)(images(32, light=.5))
    assert learn.recorder.values==values and list(learn.cbs)==callbacks and learn.opt is opt
    assert torch.equal(torch.get_rng_state(), rng) and learn.metrics[0].name=='accuracy'
    assert all(torch.equal(p, weights[name]) for name,p in learn.model.named_parameters())
    assert modes==[module.training for module in learn.model.modules()]

def test_the_loss_is_not_asked(learn):
    "Labelled data are never used for choosing"
    def loss_func(*args): raise AssertionError('labels were used')
    learn.loss_func = loss_func
    quiet(learn.adapt_bn, learn.dls.valid)
    quiet(learn.bn_shift, learn.dls.valid)

# --- how far

def test_shift_tells_places_apart(learn):
    before = state(learn.model)
    same_place = [quiet(learn.bn_shift, images(32, 20+i)).times for i in range(5)]
    others = [quiet(learn.bn_shift, images(32, 20+i, light)).times for i,light in enumerate((.8,.6,.4,1.3))]
    assert max(same_place)<1.6 and max(same_place)<min(others)
    assert same(state(learn.model), before)

def rows_of(learn, x):
    with learn.no_bar(), torch.no_grad(): return item_rows(learn, unlabelled_dl(learn, DataLoader(x, len(x))), len(x), len(x))

def test_formula_of_times(learn):
    "Products between items say what the matrix of the channels does"
    like,items = images(24, 3),images(8, 4, .8)
    like_rows,n_like = rows_of(learn, like)
    rows,n_items = rows_of(learn, items)
    (first,_),(own,_) = left_out(item_products(like_rows, n_like, rows, n_items), n_like, 12)
    features = []
    for bn in like_rows:
        there,here = (torch.cat([mean,(square+1e-3).log()], 1).double() for mean,square in (rows[bn], like_rows[bn]))
        unit = ((here.var(0)+1e-6)*here.shape[1]*len(like_rows)).sqrt()
        features.append(torch.cat([here, there])/unit)
    features = torch.cat(features, 1)
    rest = features[12:24]
    x = rest-rest.mean(0)
    inverse = (torch.eye(x.shape[1], dtype=x.dtype)+x.T@x).inverse()
    for group,got in ((features[24:], first), (features[:12], own)):
        d = group.mean(0)-rest.mean(0)
        assert got==pytest.approx((d@inverse@d/(1/len(group)+1/12)).sqrt().item(), rel=1e-4)

def test_times_is_one_without_a_shift(learn):
    "Of a network whose statistics do not fit the validation set, too: it is that which data are compared with"
    fresh = [quiet(learn.bn_shift, images(32, 20+i)).times for i in range(10)]
    assert .8<np.median(fresh)<1.25
    before = quiet(learn.bn_shift, images(32, 20))
    learn.model[1].running_mean += 1
    after = quiet(learn.bn_shift, images(32, 20))
    assert after.distance>2*before.distance and after.times<1.6

def test_sees_past_what_varies():
    "A shift that is small beside the differences between items, in a direction in which they do not differ"
    gen = torch.Generator().manual_seed(0)
    alternately = (-1.)**torch.arange(32)
    def rows(n, amount=0.):
        common = torch.randn(n,1, generator=gen)
        mean = common + .1*torch.randn(n,32, generator=gen) + amount*alternately
        return {'bn': (mean, mean**2+torch.rand(n,32, generator=gen))}
    bn,like = nn.BatchNorm2d(32),rows(256)
    def summed(found):
        moments = ItemMoments(bn)
        moments.add(*(part.double() for part in found['bn']))
        return distance(moments)
    def apart(found): return np.median(left_out(item_products(like, 256, found, 32), 256, 32)[0])
    same,other = ([rows(32, amount) for _ in range(20)] for amount in (0.,.1))
    assert min(map(apart, other))>max(map(apart, same))
    assert np.median(list(map(summed, other)))<max(map(summed, same))

def test_rows_of_other_numbers():
    "A BN that sees two rows for each item, or one for several"
    gen = torch.Generator().manual_seed(0)
    def rows(n): return tuple(torch.randn(n,4, generator=gen)**2 for _ in range(2))
    def doubled(parts): return tuple(part.repeat_interleave(2, 0) for part in parts)
    like,items = rows(16),rows(8)
    once = item_products(dict(bn=like), 16, dict(bn=items), 8)
    assert torch.allclose(item_products(dict(bn=doubled(like)), 16, dict(bn=doubled(items)), 8), once, rtol=1e-5, atol=1e-6)
    assert item_products(dict(bn=rows(4)), 16, dict(bn=rows(2)), 8).isfinite().all()

def test_few_validation_items():
    "Four can be compared with; fewer cannot"
    for n,known in ((3,False), (4,True)):
        learn = Learner(DataLoaders(DataLoader(images(64), 8), DataLoader(images(n), 8)), net(), loss_func=CrossEntropyLossFlat())
        assert (quiet(learn.bn_shift, DataLoader(images(16), 16), n=4).times is not None)==known

def test_shift_is_shown(learn):
    import matplotlib.pyplot as plt
    shift = quiet(learn.bn_shift, images(32, light=.5))
    assert shift.n==32 and list(shift.reference)==['validation','training']
    assert len(shift.reference['validation'])==len(shift.times_of_validation)==256//32
    assert np.median(shift.times_of_validation)==pytest.approx(1) and f'{shift.times:.2f} times' in str(shift)
    assert list(shift.table.index)==list(batch_norms(learn.model))
    assert 'times as far as validation items' in str(shift) and '<table' in shift._repr_html_()
    ax = shift.plot()
    assert len(ax.lines[0].get_ydata())==3
    plt.close('all')

@pytest.mark.parametrize('valid', ([], images(1), Stream()))
def test_shift_without_a_usable_validation_set(valid):
    learn = Learner(DataLoaders(DataLoader(images(64), 8), DataLoader(valid, 8)), net(), loss_func=CrossEntropyLossFlat())
    shift = quiet(learn.bn_shift, DataLoader(images(16), 16), n=16)
    assert list(shift.reference)==['training'] and shift.times is None and 'training items' in str(shift)

def test_shift_of_more_items_than_there_are(learn):
    "No more are taken than the validation set has"
    assert quiet(learn.bn_shift, images(400), n=400).n==256

def test_shift_in_sigma(learn):
    "A BN's shift of the mean and ratio of variances are what they are called"
    model = nn.Sequential(nn.BatchNorm2d(3, eps=0), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3,2))
    learn = learner(model, dtype=torch.float64)
    bn,x = model[0],images(64, light=.5, dtype=torch.float64)
    row = quiet(learn.bn_shift, x).table.iloc[0]
    shift = ((x.mean((0,2,3))-bn.running_mean)/bn.running_var.sqrt()).abs().median()
    assert row['shift of the mean, in σ']==pytest.approx(shift.item(), rel=1e-5)
    ratio = x.transpose(0,1).flatten(1).var(1)/bn.running_var
    assert row['variance / old']==pytest.approx(ratio.median().item(), rel=.02)

# --- it folds and deploys

def test_fold(learn):
    quiet(learn.adapt_bn, images(64, light=.5))
    report = quiet(learn.fold_bn, latency=0)
    assert report.n_folded==3 and report.n_changed==0

def test_several_places(learn, tmp_path):
    before,outs = state(learn.model),{}
    for light in (.5,.3,2.):
        x = images(32, light=light)
        quiet(learn.adapt_bn, x)
        deployed = learn.deploy(tmp_path/f'{light}', backend='eager')
        with torch.no_grad(): want = learn.model.eval()(x)
        outs[light], = deployed(x.numpy())
        np.testing.assert_allclose(outs[light], want, rtol=1e-3, atol=1e-4)
        assert deployed.card['parity']['n_changed']==0
        learn.restore_bn()
    assert same(state(learn.model), before)

# --- mistakes

def nan_images():
    x = images(8)
    x[3,0,0,0] = float('nan')
    return x

mistakes = dict(
    nothing=([], {}, NoDataError, 'no items'), one=(images(1), {}, StatisticsError, 'two items'),
    channels=(torch.randn(8,1,6,6), {}, StatisticsError, 'channels'), nan=(nan_images(), dict(prior=4), StatisticsError, 'finite'),
    nan_auto=(nan_images(), {}, StatisticsError, 'finite'),
    negative=(images(8), dict(prior=-1), StatisticsError, '`prior`'), word=(images(8), dict(prior='all'), StatisticsError, '`prior`'),
    true=(images(8), dict(prior=True), StatisticsError, '`prior`'), infinite=(images(8), dict(prior=math.inf), StatisticsError, '`prior`'),
    no_prior=(images(8), dict(prior=None), StatisticsError, '`prior`'), none=(None, {}, NoDataError, 'NoneType'),
    bs=(images(8), dict(bs=0), StatisticsError, '`bs`'), n=(images(8), dict(n=2.5), StatisticsError, '`n`'), ones=(images(8), dict(bs=1, prior=0), StatisticsError, '`bs`'))

@pytest.mark.parametrize('name', mistakes)
def test_mistakes(learn, name):
    data,kwargs,error,words = mistakes[name]
    before = state(learn.model)
    with pytest.raises(error, match=words): quiet(learn.adapt_bn, data, **kwargs)
    assert same(state(learn.model), before)
    assert not any(module._forward_pre_hooks for module in learn.model.modules())

@pytest.mark.parametrize('what', ('adapt_bn','bn_shift'))
def test_no_bn_folded_corrected(learn, what):
    without = Learner(learn.dls, nn.Sequential(nn.Flatten(), nn.Linear(108,2)), loss_func=CrossEntropyLossFlat())
    with pytest.raises(StatisticsError, match='no batch norm'): quiet(getattr(without, what), images(8))
    learn.correct_bn(alpha=.1)
    with pytest.raises(StatisticsError, match='uncorrect_bn'): quiet(getattr(learn, what), images(8))
    learn.uncorrect_bn()
    quiet(learn.fold_bn, latency=0)
    with pytest.raises(FoldedError, match='unfold_bn'): quiet(getattr(learn, what), images(8))

# --- several processes

def _worker(rank, folder):
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2)
    learn = learner()
    quiet(learn.adapt_bn, images(33, light=.5))
    torch.save(learn.model.state_dict(), f'{folder}/{rank}.pt')
    torch.distributed.destroy_process_group()

def test_two_processes(tmp_path):
    "Each has the statistics of all the items"
    torch.multiprocessing.spawn(_worker, (str(tmp_path),), nprocs=2)
    a,b = (torch.load(tmp_path/f'{rank}.pt') for rank in range(2))
    assert same(a, b)
