"Loading into folded Learners, replacing, copying, exporting: refused before anything is touched, or it works"
import subprocess, sys, warnings
import pytest, torch
from copy import deepcopy
from torch import nn
from fastai.vision.all import (CrossEntropyLossFlat, DataLoaders, Datasets, ImageDataLoaders, Learner, PILImage, accuracy, load_learner, load_model)
import numpy as np
from fastai_bnfold.all import *
from fastai_bnfold.fold.testing import randomize_bn

def net(seed=0, bias=False, last=3):
    torch.manual_seed(seed)
    return randomize_bn(nn.Sequential(nn.Conv2d(1,8,3,bias=bias), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8,8,3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8,last))).eval().double()
def clamping():
    "Its BN needs a `Clamp` in the activation before it"
    return randomize_bn(nn.Sequential(nn.Conv2d(1,8,3), nn.ReLU(), nn.BatchNorm2d(8), nn.Conv2d(8,8,3,padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8,3))).eval().double()
def item(i): return torch.randn(1,8,8, dtype=torch.double, generator=torch.Generator().manual_seed(i)),i%3
data = [item(i) for i in range(12)]
x = torch.stack([o for o,_ in data])
def get_x(i): return data[i][0]
def get_y(i): return data[i][1]
def learner(path, model=None):
    both = [list(range(12)), list(range(12))]
    dls = Datasets(range(12), [[get_x],[get_y]], splits=both).dataloaders(bs=6, num_workers=0, device='cpu')
    learn = Learner(dls, model or net(), loss_func=CrossEntropyLossFlat(), metrics=accuracy, path=path)
    learn.create_mbar,learn.logger = False,lambda *_: None
    return learn
@pytest.fixture
def learn(tmp_path):
    learn = learner(tmp_path)
    learn.create_opt()
    learn.save('trained')
    return learn
def fold(learn, **kwargs): return learn.fold_bn(latency=0, **kwargs)
def copies(model): return {name: value.clone() for name,value in model.state_dict().items()}
def same(model, state): return list(model.state_dict())==list(state) and all(torch.equal(value, state[name]) for name,value in model.state_dict().items())

def file(learn, name): return learn.path/'models'/f'{name}.pth'
def state(learn, name):
    saved = torch.load(file(learn, name), weights_only=False)
    return saved.get('model', saved)
ways = dict(
    load=lambda l,name: l.load(name),
    load_not_strict=lambda l,name: l.load(name, strict=False),
    load_model=lambda l,name: load_model(file(l, name), l.model, l.opt),
    state=lambda l,name: l.model.load_state_dict(state(l, name)),
    not_strict=lambda l,name: l.model.load_state_dict(state(l, name), strict=False),
    plain_dict=lambda l,name: l.model.load_state_dict(dict(state(l, name)), strict=False),
    assign=lambda l,name: l.model.load_state_dict(state(l, name), assign=True))
@pytest.mark.parametrize('way', ways)
def test_unfolded_into_folded(learn, way):
    fold(learn)
    before,opt = copies(learn.model),learn.opt
    with pytest.raises(FoldedError, match='unfold_bn'): ways[way](learn, 'trained')
    assert same(learn.model, before) and learn.opt is opt
@pytest.mark.parametrize('way', ways)
def test_folded_into_unfolded(learn, way):
    fold(learn)
    learn.save('folded')
    learn.unfold_bn()
    before = copies(learn.model)
    with pytest.raises(FoldedError, match='not folded'): ways[way](learn, 'folded')
    assert same(learn.model, before)
@pytest.mark.parametrize('way', ways)
def test_folded_into_folded(learn, way, tmp_path):
    "As in deployment; and the trained model comes back all the same"
    other = learner(tmp_path, net(1))
    fold(other)
    other.save('folded')
    trained = copies(learn.model)
    fold(learn)
    ways[way](learn, 'folded')
    assert torch.equal(learn.model(x), other.model(x))
    learn.unfold_bn()
    assert same(learn.model, trained)
def test_what_was_refused_loads_after_unfolding(learn):
    fold(learn)
    learn.unfold_bn().load('trained')
    fold(learn)
def test_biases_everywhere_and_a_plain_dict():
    "Nothing but the BNs' names tells that the numbers are of a folded model"
    model = net(bias=True)
    state = dict(BNFolder().fold(model, x).state_dict())
    with pytest.raises(FoldedError, match='not folded'): model.load_state_dict(state)
def test_without_bns_on_purpose():
    "To load all but the BNs is common, and has nothing to do with folding"
    model,other = net(),net(1)
    model.load_state_dict({name: value for name,value in other.state_dict().items() if not name.startswith('1.')}, strict=False)
    assert torch.equal(model[0].weight, other[0].weight)
def test_what_nobody_can_tell_is_said():
    "A plain dict, a bias everywhere, and `strict=False`: a folded model's names are those of all but the BNs"
    model = net(bias=True)
    state = dict(BNFolder().fold(model, x).state_dict())
    with pytest.warns(UserWarning, match='If a folded model was saved'): model.load_state_dict(state, strict=False)
def test_the_rest_is_loaded_without_a_word():
    model,other = net(),net(1)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        model.load_state_dict({name: value for name,value in other.state_dict().items() if not name.startswith('1.')}, strict=False)
        net(bias=True).load_state_dict({'7.weight': other[7].weight}, strict=False)
def test_another_network_is_pytorchs_to_refuse():
    with pytest.raises(RuntimeError) as e: net().load_state_dict(nn.Linear(2,2).state_dict())
    assert not isinstance(e.value, FoldError)
def test_a_part_of_a_folded_model(learn):
    fold(learn)
    with pytest.raises(FoldedError): learn.model[0].load_state_dict(net()[0].state_dict())
def test_a_wrapped_model(learn):
    fold(learn)
    trained = net().state_dict()
    with pytest.raises(FoldedError): nn.DataParallel(learn.model).load_state_dict({f'module.{name}': value for name,value in trained.items()}, strict=False)
def test_a_file_of_a_folded_learner_refuses_too(learn, tmp_path):
    fold(learn)
    learn.export('m.pkl')
    with pytest.raises(FoldedError): load_learner(tmp_path/'m.pkl').load('trained')

def test_another_model(learn):
    learn.fit(1)
    fold(learn)
    learn.model = net(1)
    with pytest.warns(UserWarning, match='another one'): learn.unfold_bn()
    before = learn.model[7].weight.clone()
    learn.fit(1)
    assert not torch.equal(learn.model[7].weight, before)
def test_another_model_is_trained_without_a_word(learn):
    learn.fit(1)
    fold(learn)
    learn.model = net(1)
    before = learn.model[7].weight.clone()
    learn.fit_one_cycle(1)
    assert not torch.equal(learn.model[7].weight, before)
def test_the_old_model_again(learn):
    trained = copies(learn.model)
    fold(learn)
    old = learn.model
    learn.model = net(1)
    learn.model = old
    learn.unfold_bn()
    assert same(learn.model, trained)
def test_a_replaced_head(learn):
    trained = copies(learn.model)
    fold(learn)
    learn.model[7] = nn.Linear(8,99)
    learn.unfold_bn()
    assert same(learn.model, trained)
def test_two_learners_of_one_model(learn, tmp_path):
    other = learner(tmp_path, learn.model)
    trained = copies(learn.model)
    fold(learn)
    other.unfold_bn()
    assert same(learn.model, trained)
    with pytest.raises(FoldError, match='not folded'): learn.unfold_bn()
def test_mode_after_unfolding(learn):
    learn.model.train()
    fold(learn)
    learn.model.eval()
    learn.unfold_bn()
    assert not learn.model[1].training
@pytest.mark.parametrize('change', [nn.Module.half, nn.Module.bfloat16, nn.Module.float])
def test_a_conversion_takes_nothing_away(learn, change):
    trained = copies(learn.model)
    fold(learn)
    change(learn.model)
    learn.unfold_bn()
    assert same(learn.model, trained)
def test_numbers_that_are_gone(learn):
    "Changed in place, where the folded model shares them: said, and the fold stays"
    fold(learn)
    learn.model[7].weight.data.mul_(2)
    with pytest.raises(FoldedError, match='not in memory'): learn.unfold_bn()
    assert isinstance(learn.model[1], nn.Identity)

def test_a_copy_unfolds(learn):
    trained,y = copies(learn.model),learn.model(x)
    fold(learn)
    copied = deepcopy(learn)
    copied.unfold_bn()
    assert same(copied.model, trained) and isinstance(learn.model[1], nn.Identity)
    learn.unfold_bn()
    assert same(learn.model, trained)
def test_a_copy_trains_alone(learn):
    learn.fit(1)
    fold(learn)
    trained = deepcopy(learn).unfold_bn()
    before = copies(trained.model)
    trained.fit(1)
    learn.unfold_bn()
    assert same(learn.model, before) and not same(trained.model, before)

def needs(learn):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        learn.export('m.pkl')
    return [str(o.message) for o in said if 'fastai_bnfold' in str(o.message)]
def test_export_of_a_clamp(tmp_path):
    learn = learner(tmp_path, clamping())
    fold(learn)
    [words] = needs(learn)
    assert 'Clamp' in words and 'clamps=False' in words
def test_without_clamps(tmp_path):
    learn = learner(tmp_path, clamping())
    fold(learn, clamps=False)
    assert needs(learn)==[]
class Of(nn.Module):
    "A model that holds something of this package"
    def __init__(self): super().__init__(); self.net,self.how = net(),randomize_bn
    def forward(self, x): return self.net(x)
def test_whatever_else_is_of_this_package(tmp_path):
    assert 'randomize_bn' in needs(learner(tmp_path, Of()))[0]
def test_nothing_of_this_package(learn):
    fold(learn)
    assert needs(learn)==[]
_load = '''
import sys; sys.modules['fastai_bnfold'] = None # as if it were not installed
from fastai.vision.all import load_learner
print(type(load_learner(sys.argv[1])).__name__)
'''
@pytest.mark.parametrize('folds', [False, True])
def test_export_with_the_callback(tmp_path, folds):
    for folder in ('train/a','train/b'):
        (tmp_path/folder).mkdir(parents=True)
        for i in range(3): PILImage.create(np.full((8,8,3), 9*i, np.uint8)).save(tmp_path/folder/f'{i}.png')
    dls = ImageDataLoaders.from_folder(tmp_path, train='train', valid='train', bs=3, num_workers=0, device='cpu')
    model = nn.Sequential(nn.Conv2d(3,4,3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4,2))
    learn = Learner(dls, model, path=tmp_path, cbs=FoldBN(latency=0, show=False))
    with learn.no_bar(), learn.no_logging():
        if folds: learn.fit(1)
    learn.export('m.pkl')
    assert any(isinstance(cb, FoldBN) for cb in learn.cbs) and learn.bn_folding in learn.cbs
    out = subprocess.run([sys.executable, '-c', _load, tmp_path/'m.pkl'], capture_output=True, text=True)
    assert out.stdout.split()==['Learner'], out.stderr
def test_an_export_that_fails_loses_nothing(learn):
    learn.fails = (i for i in range(3)) # generators cannot be pickled
    dls,opt = learn.dls,learn.opt
    with pytest.raises(TypeError): learn.export('m.pkl')
    assert learn.dls is dls and learn.opt is opt

def test_a_whole_batch(learn): assert fold(learn, xb=learn.dls.one_batch()).n_folded==1
def test_a_labelled_dl(learn):
    learn.export('m.pkl')
    loaded = load_learner(learn.path/'m.pkl')
    dl = loaded.dls.test_dl(range(12), with_labels=True, num_workers=0)
    with loaded.no_bar(): report = fold(loaded, dl=dl)
    assert report.n_folded==1 and 'accuracy' in report.metrics_before
def test_an_unlabelled_dl(learn):
    learn.export('m.pkl')
    loaded = load_learner(learn.path/'m.pkl')
    dl = loaded.dls.test_dl(range(12), num_workers=0)
    assert fold(loaded, dl=dl, validate=False).n_folded==1
def test_pytorch_loaders(tmp_path):
    loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)
    for loaders in ([loader,loader], [loader]):
        learn = Learner(DataLoaders(*loaders), net(), loss_func=nn.CrossEntropyLoss(), metrics=accuracy, path=tmp_path)
        with learn.no_bar(): assert fold(learn).n_folded==1
class Many(nn.Module):
    "Any number of inputs"
    def __init__(self): super().__init__(); self.net = net()
    def forward(self, *xs): return self.net(sum(xs))
@pytest.mark.parametrize('whole', [True, False])
def test_any_number_of_inputs(tmp_path, whole):
    loader = torch.utils.data.DataLoader([(o,o,i) for o,i in data], batch_size=4)
    learn = Learner(DataLoaders(loader, loader), Many(), loss_func=nn.CrossEntropyLoss(), path=tmp_path)
    batch = next(iter(loader))
    with learn.no_bar(): assert fold(learn, xb=tuple(batch) if whole else tuple(batch[:2])).n_folded==1
class OfDict(nn.Module):
    def __init__(self): super().__init__(); self.net = net()
    def forward(self, batch): return self.net(batch['image'])
def test_a_dict(tmp_path):
    loader = torch.utils.data.DataLoader([(dict(image=o),i) for o,i in data], batch_size=4)
    learn = Learner(DataLoaders(loader, loader), OfDict(), loss_func=nn.CrossEntropyLoss(), path=tmp_path)
    with learn.no_bar(): assert fold(learn).n_folded==1
