"`learn.deploy`: what a Learner predicts, every engine predicts, from the same items; and what goes wrong leaves nothing behind"
import builtins, json, os, resource, shutil, signal, sys, warnings
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from PIL import Image
from torch import nn
from fastai.vision.all import (CategoryBlock, DataBlock, ImageBlock, ImageDataLoaders, IndexSplitter, Learner, MultiCategoryBlock, Normalize, PILImageBW, RandomResizedCrop, RandomResizedCropGPU,
                               Resize, ResizeMethod, PadMode, CrossEntropyLossFlat, BCEWithLogitsLossFlat, aug_transforms, get_image_files, imagenet_stats, noop, ItemTransform, Contrast, Rotate, set_seed)
from fastai.tabular.all import Categorify, FillMissing, TabularDataLoaders, tabular_learner, RegressionBlock
from fastai_bnfold.all import *
from fastai_bnfold.deploy import deploy as D
from fastai_bnfold.fold.testing import randomize_bn
from fastai_bnfold.deploy.engines import backends as registry
from fastai_bnfold.deploy.serve import Deployed
from conftest import snapshot, unchanged

backends = ['onnx','openvino','eager','torch']
packages = dict(onnx='onnxruntime', openvino='openvino')

@pytest.fixture(scope='module')
def images(tmp_path_factory):
    "24 images of different shapes, in two classes"
    d,rng = tmp_path_factory.mktemp('images'),np.random.default_rng(0)
    for i in range(24):
        w,h = rng.integers(30, 90, 2)
        a = np.asarray(Image.fromarray(rng.integers(0, 256, (6,6,3), dtype=np.uint8)).resize((w,h), Image.BICUBIC))
        p = d/('train' if i<12 else 'val')/f'c{i%2}'/f'{i}.png'; p.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(a).save(p)
    return d

def dls_of(images, item_tfms, batch_tfms=(), **kw): return ImageDataLoaders.from_folder(images, train='train', valid='val', item_tfms=item_tfms, batch_tfms=[*batch_tfms, Normalize.from_stats(*imagenet_stats)], bs=4, num_workers=0, **kw)
def net(c=2, i=3): return randomize_bn(nn.Sequential(nn.Conv2d(i,8,3,bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8,8,3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8,c))).eval()
def learner(dls, model=None, **kw): return Learner(dls, model or net(), **kw)
@pytest.fixture(scope='module')
def learn(images): set_seed(0); return learner(dls_of(images, Resize(32)))
def left(d): return sorted(p.name for p in d.iterdir())
def says(learn, item):
    with learn.no_bar(): return learn.predict(item)

@pytest.mark.parametrize('backend', backends)
def test_every_backend(learn, tmp_path, backend, images):
    if backend in packages: pytest.importorskip(packages[backend])
    before = snapshot(learn.model)
    m = learn.deploy(tmp_path/'m', backend)
    assert unchanged(learn.model, before) and left(tmp_path)==['m'] and learn.opt is None
    card = json.loads((tmp_path/'m'/'card.json').read_text())
    assert card['parity']['n_changed']==0 and card['parity']['n_items']==12 and card['parity']['max_err']<1e-5 and card['fold']['n_folded']==card['fold']['n_bn']==2 and card['output']['vocab']==['c0','c1']
    shutil.move(tmp_path/'m', tmp_path/'elsewhere')
    m = Deployed(tmp_path/'elsewhere', threads=1)
    fs = get_image_files(images/'val')[:3]
    for f,p in zip(fs, m.predict(list(fs))):
        label,i,probs = says(learn, f)
        assert p.label==label and p.index==i and np.allclose(p.probs, probs, atol=1e-5)
    im = Image.open(fs[0]).convert('RGB')
    same = [m.predict(o).probs for o in (fs[0], str(fs[0]), fs[0].read_bytes(), im, np.asarray(im), torch.as_tensor(np.array(im)))]
    assert all(np.array_equal(same[0], s) for s in same[1:])
    for bs,size in ((1,(32,32)), (5,(32,32)), (3,(48,40))): # dynamic batch and image size
        x = torch.randn(bs,3,*size)
        with torch.no_grad(): assert np.allclose(m(x.numpy())[0], learn.model(x), atol=1e-4)

def test_a_folder_that_is_not_there_is_made(learn, tmp_path):
    "The folders above it, too; none of them stays where the deployment fails"
    with pytest.raises(FoldError): learn.deploy(tmp_path/'a'/'b'/'m', 'eager', tol=1e-15)
    assert left(tmp_path)==[]
    learn.deploy(tmp_path/'a'/'b'/'m', 'eager')
    assert Deployed(tmp_path/'a'/'b'/'m').card['name']=='m'
    (tmp_path/'file').touch()
    with pytest.raises(FoldError, match='Not a directory'): learn.deploy(tmp_path/'file'/'m', 'eager')

def test_a_prediction_prints_as_people_write_it(learn, tmp_path, images):
    m = learn.deploy(tmp_path/'m', 'eager')
    p = m.predict(get_image_files(images/'val')[0])
    assert type(p.index) is int and 'np.' not in repr(p) and 'dtype' not in repr(p)
    many = np.linspace(0, 1, 1000, dtype=np.float32)
    assert repr(D.Prediction(many[1], many[1], many))=='Prediction(label=0.001, index=0.001, probs=[0.   , 0.001, 0.002, ..., 0.998, 0.999, 1.   ])'

pipelines = {
    'crop': (Resize(32), ()), 'squish': (Resize((24,40), method=ResizeMethod.Squish), ()), 'pad': (Resize(40, method=ResizeMethod.Pad), ()),
    'pad zeros': (Resize(40, method=ResizeMethod.Pad, pad_mode=PadMode.Zeros), ()), 'pad border': (Resize((50,30), method=ResizeMethod.Pad, pad_mode=PadMode.Border), ()),
    'random crop': (RandomResizedCrop(32), ()), 'random crop, no edge': (RandomResizedCrop(32, val_xtra=0), ()), 'augmented': (Resize(32), aug_transforms()),
    'presized': (Resize(48), aug_transforms(size=32)), 'presized, much larger': (Resize(100), aug_transforms(size=32)), 'presized, crop': (Resize(64), aug_transforms(size=24, min_scale=.75)),
    'gpu crop, much larger': (Resize((120,200)), [RandomResizedCropGPU((20,30))]), 'presized, not square': (Resize((160,90)), aug_transforms(size=(20,30))),
    'gpu crop': (Resize((80,40)), [RandomResizedCropGPU(32)]), 'gpu crop, a part': (Resize((40,80)), [RandomResizedCropGPU((16,32), valid_scale=.8)]), 'rotate': (Resize(32), [Rotate(p=1.), Contrast(p=1.)]),
}
@pytest.mark.parametrize('name', pipelines)
def test_pipelines(images, name):
    "The steps of the card make of an image what the Learner's transforms make of it on the validation set"
    learn = learner(dls_of(images, *pipelines[name]))
    spec,note = D.input_spec(learn)
    assert note is None, note
    m = Deployed.__new__(Deployed) # a card, but no files
    m.card = dict(input=spec)
    assert D.input_err(learn, m) < 2e-6

def test_grey_images(images, tmp_path):
    from fastai.vision.all import parent_label, GrandparentSplitter
    dls = DataBlock((ImageBlock(PILImageBW), CategoryBlock), get_items=get_image_files, splitter=GrandparentSplitter('train','val'), get_y=parent_label, item_tfms=Resize(32)).dataloaders(images, bs=4, num_workers=0)
    learn = learner(dls, net(i=1))
    m = learn.deploy(tmp_path/'m', 'eager')
    f = get_image_files(images/'val')[0]
    assert m.card['input']['mode']=='L' and np.allclose(m.predict(f).probs, says(learn, f)[2], atol=1e-5)

def test_unknown_transform_is_named(images, tmp_path):
    class Dim(ItemTransform):
        def encodes(self, b): return b
    learn = learner(dls_of(images, [Resize(32), Dim()]))
    with pytest.warns(UserWarning, match='`Dim`'): m = learn.deploy(tmp_path/'m', 'eager')
    x = learn.dls.valid.one_batch()[0][0]
    assert m.card['input']['kind']=='array' and '`Dim`' in m.card['notes'][0] and m.predict(np.asarray(x)).label in ('c0','c1')

def test_steps_that_do_not_agree_are_not_used(images, tmp_path):
    "A subclass may do anything"
    class Darker(Resize):
        def encodes(self, x:Image.Image): return super().encodes(x).point(lambda v: v//2)
    with pytest.warns(UserWarning, match='could not be reproduced'): m = learner(dls_of(images, Darker(32))).deploy(tmp_path/'m', 'eager')
    assert m.card['input']['kind']=='array'

def test_multi_label(images, tmp_path):
    dls = DataBlock((ImageBlock, MultiCategoryBlock), get_items=get_image_files, splitter=IndexSplitter(range(12)), get_y=lambda f: ['a','b'] if int(f.stem)%3 else ['c'], item_tfms=Resize(32)).dataloaders(images, bs=4, num_workers=0)
    learn = learner(dls, net(3), loss_func=BCEWithLogitsLossFlat(thresh=.4))
    m = learn.deploy(tmp_path/'m', 'eager')
    for f in get_image_files(images)[:4]:
        label,mask,probs = says(learn, f); p = m.predict(f)
        assert list(label)==p.label and np.array_equal(mask, p.index) and np.allclose(probs, p.probs, atol=1e-5)

@pytest.mark.parametrize('y', ['class','number'])
def test_tables(tmp_path, y):
    g = np.random.default_rng(0)
    df = pd.DataFrame({'colour': g.choice(['red','green','blue'], 300), 'code': g.integers(0, 4, 300), 'size': g.normal(3, 2, 300), 'weight': g.normal(0, 1, 300)})
    df.loc[::7,'weight'] = np.nan
    df['class'] = np.where(df['size']>3, 'large', 'small'); df['number'] = df['size'].astype('float32')
    dls = TabularDataLoaders.from_df(df, procs=[Categorify, FillMissing, Normalize], cat_names=['colour','code'], cont_names=['size','weight'], y_names=y, y_block=CategoryBlock() if y=='class' else RegressionBlock(), bs=64, valid_idx=list(range(60)))
    learn = tabular_learner(dls, layers=[20,10])
    randomize_bn(learn.model)
    m = learn.deploy(tmp_path/'m', 'onnx' if y=='class' else 'eager')
    assert m.card['parity']['n_items']==60 and not m.card['notes']
    some = df.drop(columns='number').iloc[[0,1,7,100]] # (fastai's `predict` does not take a number to predict)
    for (_,row),p in zip(some.iterrows(), m.predict(some)):
        _,i,probs = says(learn, row)
        assert np.allclose(p.probs, probs, atol=1e-4) and (y=='number' or p.label==learn.dls.vocab[i])
    assert np.array_equal(m.predict(dict(df.iloc[0])).probs, m.predict(df.iloc[0]).probs)
    assert m.predict(df.iloc[0].to_dict() | {'colour': 'pink'}).probs is not None # unknown: the class for missing values, as in fastai
    with pytest.raises(DeployError, match="no column 'weight'"): m.predict(df.iloc[0].drop('weight'))
    with pytest.raises(DeployError, match="Column 'size' has no value"): m.predict(df.iloc[0].to_dict() | {'size': None})

def test_fixed_image_size(images, tmp_path):
    "A network for one size of images; a folded Learner"
    model = nn.Sequential(nn.Conv2d(3,8,3,bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8*30*30,2))
    learn = learner(dls_of(images, Resize(32)), randomize_bn(model).eval())
    learn.fold_bn(latency=0)
    for b in ('eager','onnx'):
        m = learn.deploy(tmp_path/b, b)
        assert m.card['inputs'][0]['shape']==[None,3,32,32]
        with pytest.raises(DeployError, match=r'does not take this batch: input of shape \(1, 3, 40, 40\)'): m(np.zeros((1,3,40,40)))

class ByData(nn.Module):
    def __init__(self): super().__init__(); self.n = net()
    def forward(self, x): return self.n(x) if x.mean()>-100 else self.n(-x)

def test_bad_input(learn, images, tmp_path):
    def fails(match, path=tmp_path/'m', l=learn, **kw):
        with pytest.raises(DeployError, match=match): l.deploy(path, **{'backend': 'onnx'} | kw)
        assert left(tmp_path)==kept
    kept = []
    fails("Unknown backend 'tensorrt'. Expected one of: onnx, openvino, torch, eager", backend='tensorrt')
    fails('decides by the values of its data', tmp_path/'no'/'such'/'m', l=learner(learn.dls, ByData())) # and the folders are gone
    fails('decides by the values of its data', l=learner(learn.dls, ByData()))
    (tmp_path/'file').write_text('x'); (tmp_path/'folder').mkdir(); (tmp_path/'folder'/'x').write_text('x'); kept = ['file','folder']
    fails('exists and is no deployment', tmp_path/'file'); fails('exists and is no deployment', tmp_path/'folder'); fails('not write', tmp_path/'file'/'m')
    only_train = learner(learn.dls); only_train.dls = type(learn.dls)(learn.dls.train)
    with pytest.raises(NoDataError, match='no validation set'): only_train.deploy(tmp_path/'m')

@pytest.mark.skipif(os.name!='posix' or os.geteuid()==0, reason='root may write everywhere')
def test_read_only(learn, tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(DeployError, match='Permission denied'): learn.deploy(tmp_path/'m', 'eager')
    finally: tmp_path.chmod(0o700)
    assert left(tmp_path)==[]

def test_full_disk(learn, tmp_path, monkeypatch):
    "Known beforehand, or found by the operating system in the middle of writing"
    monkeypatch.setattr(D.shutil, 'disk_usage', lambda p: shutil._ntuple_diskusage(10**6, 10**6, 100))
    with pytest.raises(DeployError, match='is full'): learn.deploy(tmp_path/'m', 'eager')
    monkeypatch.undo()
    old,handler = resource.getrlimit(resource.RLIMIT_FSIZE),signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for b in ('onnx','openvino','eager'):
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, old[1]))
        try:
            with pytest.raises(DeployError): learn.deploy(tmp_path/'m', b)
        finally: resource.setrlimit(resource.RLIMIT_FSIZE, old)
        assert left(tmp_path)==[], b
    signal.signal(signal.SIGXFSZ, handler)

def test_an_engine_that_changes_predictions(learn, tmp_path, monkeypatch):
    learn.deploy(tmp_path/'m', 'eager'); before = (tmp_path/'m'/'card.json').read_text()
    def wrong(program, to):
        program.state_dict['8.bias'] = nn.Parameter(program.state_dict['8.bias']+torch.tensor([5.,-5.])) # (a new one: the model has the old one, too)
        return good(program, to)
    good = registry['eager'].write; monkeypatch.setattr(registry['eager'], 'write', wrong)
    with pytest.raises(DeployError, match=r"changes the model: \d+ of 12 predictions"): learn.deploy(tmp_path/'m', 'eager')
    assert left(tmp_path)==['m'] and (tmp_path/'m'/'card.json').read_text()==before # the earlier deployment stands
    monkeypatch.undo()
    learn.deploy(tmp_path/'m', 'eager', n_check=5)
    assert left(tmp_path)==['m'] and Deployed(tmp_path/'m').card['parity']['n_items']==5

@pytest.mark.parametrize('backend,package', [('onnx','onnxscript'), ('onnx','onnxruntime'), ('openvino','openvino')])
def test_missing_package(learn, tmp_path, monkeypatch, backend, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DeployError, match=r"pip install"): learn.deploy(tmp_path/'m', backend)
    assert left(tmp_path)==[]

def test_interrupted(learn, tmp_path, monkeypatch):
    def stop(*a): raise KeyboardInterrupt
    monkeypatch.setattr(D, 'parity', stop)
    with pytest.raises(KeyboardInterrupt): learn.deploy(tmp_path/'m', 'eager')
    assert left(tmp_path)==[]
