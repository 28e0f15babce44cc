"What a prediction means: classes along any dimension, points in pixels, yes and no; and what is no input is refused with the reason"
import numpy as np, pytest, torch
from PIL import Image
from torch import nn
from fastai.vision.all import (BCEWithLogitsLossFlat, CategoryBlock, CrossEntropyLossFlat, DataBlock, DataLoaders, ImageBlock, IndexSplitter, L,
    Learner, MaskBlock, MSELossFlat, PointBlock, Resize, Transform, TransformBlock, accuracy, aug_transforms, get_image_files, tensor)
from fastai_bnfold.all import *
from fastai_bnfold.deploy.engines import backends
from fastai_bnfold.fold.testing import randomize_bn
from odd_images import class_folder, net, said

@pytest.fixture(scope='module')
def folder(tmp_path_factory): return class_folder(tmp_path_factory.mktemp('images'))

def deployed(learn, where):
    with learn.no_bar(): return learn.deploy(where/'m', 'eager')

# points

def corners(file): return tensor([[10.,20.],[30.,40.]])
@pytest.mark.parametrize('size,tfms', [(32,aug_transforms()), ((48,32),aug_transforms()), (64,aug_transforms(size=40)), ((40,48),aug_transforms(size=(24,56)))], ids=str)
def test_points_are_in_pixels(folder, tmp_path, size, tfms):
    block = DataBlock((ImageBlock, PointBlock), get_items=get_image_files, get_y=corners, splitter=IndexSplitter(range(6)), item_tfms=Resize(size), batch_tfms=tfms)
    learn = Learner(block.dataloaders(folder, bs=4, num_workers=0), net(4), loss_func=MSELossFlat())
    file = get_image_files(folder)[0]
    pixels,_,values = said(learn, file)
    got = deployed(learn, tmp_path).predict([file]*3)[1]
    assert np.allclose(got.label, pixels, atol=1e-3) and got.label.shape==(2,2)
    assert np.allclose(got.probs, values, atol=1e-5)

# dimensions of classes

class PerWord(nn.Module):
    "Five classes for each of six words"
    def __init__(self, classes_last):
        super().__init__()
        self.conv,self.bn,self.classes_last = nn.Conv1d(4,5,1),nn.BatchNorm1d(5),classes_last
    def forward(self, x):
        out = self.bn(self.conv(x.transpose(1,2)))
        return out.transpose(1,2) if self.classes_last else out

def word_learner(loss, classes_last):
    rng = np.random.default_rng(0)
    data = [(tensor(rng.normal(size=(6,4)).astype(np.float32)), tensor(rng.integers(0,5,6))) for _ in range(12)]
    return Learner(DataLoaders.from_dsets(data, data, bs=4, num_workers=0, device='cpu'), randomize_bn(PerWord(classes_last)), loss_func=loss), data

@pytest.mark.parametrize('axis', [1,-1])
def test_classes_along_any_dimension(tmp_path, axis):
    learn,data = word_learner(CrossEntropyLossFlat(axis=axis), axis!=1)
    with learn.no_bar(): probs,_,classes = learn.get_preds(with_decoded=True)
    got = deployed(learn, tmp_path).predict([x.numpy() for x,_ in data])
    assert np.allclose([p.probs for p in got], probs, atol=1e-5)
    assert np.array_equal([p.index for p in got], classes)

def test_changed_words_are_counted(tmp_path, monkeypatch):
    "In the last dimension"
    load = backends['eager'].load
    monkeypatch.setattr(backends['eager'], 'load', lambda file, threads: lambda inputs: [-out for out in load(file, threads)(inputs)])
    learn,_ = word_learner(CrossEntropyLossFlat(), True)
    with pytest.raises(DeployError, match='12 of 12 predictions'): deployed(learn, tmp_path)

def test_one_number_for_yes_or_no(tmp_path):
    "Without a dimension of classes"
    data = [(torch.randn(4), float(i%2)) for i in range(12)]
    model = randomize_bn(nn.Sequential(nn.Linear(4,8), nn.BatchNorm1d(8), nn.Linear(8,1), nn.Flatten(0)))
    learn = Learner(DataLoaders.from_dsets(data, data, bs=4, num_workers=0, device='cpu'), model, loss_func=BCEWithLogitsLossFlat())
    with learn.no_bar(): probs,_,yes = learn.get_preds(with_decoded=True)
    got = deployed(learn, tmp_path).predict([x.numpy() for x,_ in data])
    assert np.allclose([p.probs for p in got], probs, atol=1e-5) and np.array_equal([p.label for p in got], yes)
    assert got[0].to_dict()['label'] in (True,False)

class Log(Transform):
    def encodes(self, x): return tensor(np.log1p(x)).float()
    def decodes(self, x): return x.exp()-1

@pytest.mark.parametrize('log', [False,True])
def test_a_transform_of_the_target_is_said(folder, tmp_path, log):
    "`learn.predict` undoes it"
    def items(file): return int(file.stem)
    block = TransformBlock(type_tfms=[Log()] if log else [])
    dls = DataBlock((ImageBlock, block), get_items=get_image_files, get_y=items, splitter=IndexSplitter(range(6)), item_tfms=Resize(32)).dataloaders(folder, bs=4, num_workers=0)
    learn = Learner(dls, net(1), loss_func=MSELossFlat())
    if log:
        with pytest.warns(UserWarning, match='`label` holds'): m = deployed(learn, tmp_path)
    else: m = deployed(learn, tmp_path)
    file = get_image_files(folder)[0]
    same = np.allclose(np.ravel(np.float32(said(learn, file)[0])), m.predict(file).label, atol=1e-3)
    assert same!=log and len(m.card['notes'])==int(log)

# what is no input

class OfMask(nn.Module):
    def __init__(self): super().__init__(); self.n = net(2, 1)
    def forward(self, x): return self.n(x[:,None].float())

@pytest.fixture
def of_masks(tmp_path):
    (tmp_path/'masks').mkdir()
    rng = np.random.default_rng(0)
    for i in range(8): Image.fromarray(rng.integers(0, 3, (32,32), dtype=np.uint8)).save(tmp_path/'masks'/f'{i}.png')
    block = DataBlock((MaskBlock, CategoryBlock), get_items=get_image_files, get_y=lambda file: int(file.stem)%2, splitter=IndexSplitter(range(4)))
    learn = Learner(block.dataloaders(tmp_path/'masks', bs=2, num_workers=0), OfMask())
    with pytest.warns(UserWarning, match='mask'): return learn, deployed(learn, tmp_path), get_image_files(tmp_path/'masks')[0]

def test_a_file_of_a_mask_is_refused_with_the_reason(of_masks):
    _,m,file = of_masks
    with pytest.raises(DeployError, match='int64.*got a PosixPath.*a mask as an input is not known'): m.predict(file)

def test_the_mask_itself_is_taken(of_masks):
    learn,m,file = of_masks
    assert np.allclose(m.predict(np.asarray(Image.open(file))).probs, said(learn, file)[2], atol=1e-5)

@pytest.mark.parametrize('item', ['text', b'bytes', {'a': 1}, ('one','two')], ids=repr)
def test_what_is_no_array(of_masks, item):
    with pytest.raises(DeployError, match="own input as an array"): of_masks[1].predict(item)

# fastai's lists

def test_lists_of_fastai(folder, tmp_path):
    learn = Learner(DataBlock((ImageBlock, CategoryBlock), get_items=get_image_files, get_y=lambda file: file.parent.name, splitter=IndexSplitter(range(6)),
                              item_tfms=Resize(32)).dataloaders(folder, bs=4, num_workers=0), net(), metrics=accuracy)
    m,files = deployed(learn, tmp_path),get_image_files(folder)
    want = [p.probs for p in m.predict(list(files))]
    forms = dict(paths=files, bytes=files.map(lambda file: file.read_bytes()), images=files.map(Image.open), tensors=L(m.inputs(file)[0] for file in files))
    for name,items in forms.items(): assert np.allclose([p.probs for p in m.predict(items)], want, atol=1e-6), name
    assert type(m.predict(files[:1])) is list

def test_lists_of_arrays(tmp_path):
    learn,data = word_learner(CrossEntropyLossFlat(), True)
    m = deployed(learn, tmp_path)
    assert len(m.predict(L(x for x,_ in data)))==len(data)
