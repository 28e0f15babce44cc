"What `learn.predict` says of an odd image file, `Deployed.predict` says, whatever the pipeline; what fastai's Learners are made of deploys"
import random
import numpy as np, pandas as pd, pytest, torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader as TorchLoader, TensorDataset
from fastai.collab import CollabDataLoaders, collab_learner
from fastai.text.all import AWD_LSTM, TextDataLoaders, awd_lstm_clas_config, text_classifier_learner
from fastai.vision.all import (AddMaskCodes, CategoryBlock, CrossEntropyLossFlat, DataBlock, DataLoaders, 
    DynamicUnet, GrandparentSplitter, ImageBlock, IndexSplitter, IntToFloatTensor, Learner, MultiCategoryBlock, Normalize,
    PILImage, PointBlock, RatioResize, RegressionBlock, Resize, ResizeMethod, Rotate,
    SegmentationDataLoaders, SigmoidRange, TensorCategory, TensorImage, ToTensor, Transform, TransformBlock, accuracy, aug_transforms,
    fastuple, first, foreground_acc, get_image_files, imagenet_stats, noop, parent_label, tensor)
from fastai_bnfold.all import *
from fastai_bnfold.deploy import deploy as D
from fastai_bnfold.deploy.engines import backends
from fastai_bnfold.deploy.export import export_checked
from fastai_bnfold.deploy.serve import Deployed
from fastai_bnfold.deploy.parity import inputs_differ
from fastai_bnfold.fold.testing import randomize_bn
from odd_images import class_folder, differs, image_learner, imagenet, net, odd_files, pipelines, said, smooth

@pytest.fixture(scope='module')
def folder(tmp_path_factory): return class_folder(tmp_path_factory.mktemp('images'))

@pytest.mark.parametrize('name', pipelines(64))
def test_odd_files(folder, tmp_path, name):
    learn = image_learner(folder, *pipelines(64)[name])
    with learn.no_bar(): deployed = learn.deploy(tmp_path/'m', 'eager')
    assert deployed.card['notes']==[]
    wrong = {file.name: differs(learn, deployed, file) for file in odd_files(tmp_path/'odd').values()}
    assert {name: why for name,why in wrong.items() if why}=={}

@pytest.mark.parametrize('size', [224,384])
def test_aug_transforms_at_any_size(folder, tmp_path, size):
    learn = image_learner(folder, *pipelines(size)['crop, aug_transforms'])
    with learn.no_bar(): deployed = learn.deploy(tmp_path/'m', 'eager')
    assert deployed.card['input']['kind']=='image'
    file = get_image_files(folder/'val')[0]
    assert differs(learn, deployed, file) is None

def input_err(learn):
    spec,note = D.input_spec(learn)
    assert note is None, note
    deployed = Deployed.__new__(Deployed) # a card, but no files
    deployed.card = dict(input=spec)
    return inputs_differ(learn, deployed), spec

class Dimmer(Rotate):
    "Looks like fastai's, and is darker by a thousandth of a level of grey"
    def encodes(self, x:TensorImage): return super().encodes(x)-4e-6*224

def test_a_pipeline_that_is_truly_different_is_found(folder):
    assert input_err(image_learner(folder, Resize(224), [Rotate()]))[0]==''
    assert 'difference' in input_err(image_learner(folder, Resize(224), [Dimmer()]))[0]

def test_small_differences_are_found_beside_resampling(folder):
    "Smaller than fastai's resampling error, and in another transform"
    class Shifted(Normalize):
        def encodes(self, x:TensorImage): return super().encodes(x)+6e-5
    tfms = [Rotate(), Shifted.from_stats(*imagenet_stats, cuda=False)]
    assert 'difference' in input_err(image_learner(folder, Resize(224), tfms))[0]

@pytest.mark.parametrize('tfms', [Resize((224,96)), Resize((240,100), ResizeMethod.Squish)], ids=['crop','squish'])
def test_high_images_are_blurred_by_fastai(folder, tfms):
    "More than twice as high as wide: fastai averages before it resamples"
    assert input_err(image_learner(folder, tfms, aug_transforms()))[0]==''

def test_ratio_resize(folder):
    "Images of one shape, or a batch could not be made"
    dls = DataBlock((ImageBlock, CategoryBlock), get_items=lambda d: [f for f in get_image_files(d) if int(f.stem)%3],
                    get_y=parent_label, splitter=GrandparentSplitter('train','val'), item_tfms=RatioResize(64)).dataloaders(folder, bs=2, num_workers=0)
    assert input_err(Learner(dls, net()))[0]==''

def test_normalize_per_pixel(folder):
    stats = Normalize(torch.rand(1,3,32,32), torch.rand(1,3,32,32)+.5)
    assert input_err(image_learner(folder, Resize(32), [stats]))[0]==''

class OnlyTarget(Transform):
    def encodes(self, x:TensorCategory): return x

class OfTraining(Transform):
    split_idx = 0
    def encodes(self, x:PILImage): return x.rotate(90)

@pytest.mark.parametrize('tfm', [OnlyTarget, OfTraining, AddMaskCodes])
def test_what_does_not_touch_the_input_is_no_obstacle(folder, tfm):
    assert input_err(image_learner(folder, [Resize(32), tfm()], [imagenet]))[0]==''

class Darker(Transform):
    def encodes(self, x:PILImage): return x.point(lambda v: v//2)

def test_what_touches_it_is_named(folder):
    learn = image_learner(folder, [Resize(32), Darker()], [imagenet])
    assert '`Darker`' in D.input_spec(learn)[1]

def test_a_transform_after_opening_is_named(folder):
    dls = DataBlock((TransformBlock([PILImage.create, Darker()], item_tfms=ToTensor, batch_tfms=IntToFloatTensor), CategoryBlock), get_items=get_image_files,
                    get_y=parent_label, splitter=GrandparentSplitter('train','val'), item_tfms=Resize(32)).dataloaders(folder, bs=4, num_workers=0)
    assert '`Darker`' in D.input_spec(Learner(dls, net()))[1]

def test_a_way_of_opening_that_is_another_is_found(folder, tmp_path):
    def upside_down(file): return PILImage.create(Image.open(file).convert('RGB').transpose(Image.FLIP_TOP_BOTTOM))
    dls = DataBlock((TransformBlock(upside_down, item_tfms=ToTensor, batch_tfms=IntToFloatTensor), CategoryBlock), get_items=get_image_files,
                    get_y=parent_label, splitter=GrandparentSplitter('train','val'), item_tfms=Resize(32)).dataloaders(folder, bs=4, num_workers=0)
    assert 'difference' in input_err(Learner(dls, net()))[0]

# Learners of all kinds

def masks(where):
    for name in ('images','labels'): (where/name).mkdir()
    rng = np.random.default_rng(0)
    for i in range(8):
        smooth(rng, 32, 32).save(where/'images'/f'{i}.png')
        Image.fromarray(rng.integers(0, 2, (32,32), dtype=np.uint8)).save(where/'labels'/f'{i}.png')
    return SegmentationDataLoaders.from_label_func(where, bs=2, fnames=get_image_files(where/'images'), num_workers=0,
        label_func=lambda file: where/'labels'/file.name, codes=['background','box'], batch_tfms=aug_transforms())

def small_body(): return nn.Sequential(nn.Conv2d(3,8,3,2,1,bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8,16,3,2,1), nn.BatchNorm2d(16), nn.ReLU())

@pytest.mark.parametrize('backend', ['onnx','openvino'])
def test_unet(tmp_path, backend):
    "Its last layer makes a `TensorBase`"
    pytest.importorskip(dict(onnx='onnxruntime').get(backend, backend))
    dls = masks(tmp_path)
    learn = Learner(dls, DynamicUnet(small_body(), 2, (32,32)), loss_func=CrossEntropyLossFlat(axis=1), metrics=foreground_acc)
    with learn.no_bar(): deployed = learn.deploy(tmp_path/'m', backend)
    file = get_image_files(tmp_path/'images')[0]
    mask,_,probs = said(learn, file)
    got = deployed.predict(file)
    assert deployed.card['notes']==[] and 'foreground_acc' in deployed.card['metrics']
    assert np.array_equal(got.label, mask) and np.allclose(got.probs, probs, atol=1e-5)

@pytest.mark.parametrize('average', [nn.AdaptiveAvgPool2d(1), lambda x: x.mean((2,3), keepdim=True), lambda x: x.mean((-1,-2))[...,None,None]], ids=['pool','mean','mean of the last'])
@pytest.mark.parametrize('backend', ['onnx','openvino'])
def test_averages_of_a_white_page(tmp_path, average, backend):
    "55,000 numbers that are alike, added up in float32 one after another, are all rounded in the same direction: 8e-5 here"
    pytest.importorskip('onnxruntime' if backend=='onnx' else backend)
    class Average(nn.Module):
        def forward(self, x): return average(x)
    torch.manual_seed(1)
    model = randomize_bn(nn.Sequential(nn.Conv2d(3,8,3,2), nn.BatchNorm2d(8), nn.ReLU(), Average(), nn.Flatten(), nn.Linear(8,2))).eval()
    x = torch.ones(2,3,384,576)*tensor([2.2,2.4,2.6])[:,None,None]
    exported = export_checked(model, (x,), backend, tmp_path)
    with torch.no_grad(): exact = model.double()(x.double())
    assert np.abs(exported.run(x.numpy())[0]-exact.numpy()).max()<2e-6

class AsImage(nn.Module):
    def forward(self, x): return {'image': TensorImage(x), 'mean': x.mean((1,2,3))}

def test_tensor_subclasses_within_other_outputs(folder, tmp_path):
    learn = Learner(image_learner(folder, Resize(32), []).dls, nn.Sequential(net(3), nn.Unflatten(1,(3,1,1)), AsImage()), loss_func=noop)
    with learn.no_bar(): deployed = learn.deploy(tmp_path/'m', 'onnx')
    x = torch.rand(3,3,32,32)
    with torch.no_grad(): want = learn.model(x)
    assert [np.allclose(got, o, atol=1e-5) for got,o in zip(deployed(x.numpy()), want.values())]==[True,True]

def test_text_classifier(tmp_path):
    "fastai's LSTM cuts its batch by the number of sentences that are long enough: no exported program does"
    rng = np.random.default_rng(0)
    texts = [' '.join(rng.choice(['good','bad','film'], rng.integers(3,20))) for _ in range(24)]
    dls = TextDataLoaders.from_df(pd.DataFrame(dict(text=texts, label=[0,1]*12)), text_col='text', label_col='label', bs=4)
    learn = text_classifier_learner(dls, AWD_LSTM, pretrained=False, config=awd_lstm_clas_config|dict(n_hid=8, emb_sz=8, n_layers=2), metrics=accuracy)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert learn.fold_bn(latency=0, validate=False).n_folded==2
    learn.unfold_bn()
    with pytest.raises(DeployError, match=r'\(awdlstm.py:\d+\) decides by the values of its data'): learn.deploy(tmp_path/'m', 'onnx')

def test_collab(tmp_path):
    rng = np.random.default_rng(0)
    df = pd.DataFrame(dict(user=rng.integers(0,10,200), title=[f't{i}' for i in rng.integers(0,20,200)], rating=rng.integers(1,6,200).astype(float)))
    dls = CollabDataLoaders.from_df(df, bs=16, item_name='title')
    learn = collab_learner(dls, use_nn=True, layers=[8], y_range=(.5,5.5))
    randomize_bn(learn.model)
    with learn.no_bar(): deployed = learn.deploy(tmp_path/'m', 'onnx')
    some = df.iloc[:5]
    codes = dls.test_dl(some).one_batch()[0]
    with torch.no_grad(): want = learn.model.eval()(codes)
    assert deployed.card['fold']['n_folded']==1
    assert np.allclose([p.probs for p in deployed.predict(some)], want, atol=1e-5)

@pytest.mark.parametrize('y', ['points','classes','number'])
def test_other_targets(folder, tmp_path, y):
    blocks = dict(points=PointBlock, classes=MultiCategoryBlock, number=RegressionBlock)
    get_y = dict(points=lambda f: tensor([[10.,20.],[30.,40.]]), classes=lambda f: ['a','b'] if int(f.stem)%3 else ['c'], number=lambda f: float(f.stem))
    dls = DataBlock((ImageBlock, blocks[y]), get_items=get_image_files, get_y=get_y[y], splitter=IndexSplitter(range(6)),
                    item_tfms=Resize(32), batch_tfms=aug_transforms()).dataloaders(folder, bs=4, num_workers=0)
    model = net(dict(points=4, classes=3, number=1)[y])
    if y=='number': model.append(SigmoidRange(0, 20))
    learn = Learner(dls, model)
    with learn.no_bar(): deployed = learn.deploy(tmp_path/'m', 'eager')
    file = get_image_files(folder)[0]
    assert deployed.card['notes']==[]
    assert np.allclose(deployed.predict(file).probs, said(learn, file)[2], atol=1e-5)

class TwoInputs(nn.Module):
    def __init__(self): super().__init__(); self.n = net()
    def forward(self, *xs): return self.n(xs[0]), self.n(xs[0]-xs[1]).sum(1)

class OfPair(nn.Module):
    def __init__(self): super().__init__(); self.n = net()
    def forward(self, pair): return self.n(pair[0]-pair[1])

@pytest.mark.parametrize('backend', ['onnx','openvino','eager'])
def test_torch_loaders_with_several_inputs(tmp_path, backend):
    loader = TorchLoader(TensorDataset(torch.randn(12,3,16,16), torch.randn(12,3,16,16), torch.randint(0,2,(12,))), 4)
    learn = Learner(DataLoaders(loader, loader), TwoInputs(), loss_func=nn.CrossEntropyLoss())
    with learn.no_bar(), pytest.warns(UserWarning, match="PyTorch's `DataLoader`"): deployed = learn.deploy(tmp_path/'m', backend)
    x,y,_ = first(loader)
    with torch.no_grad(): want = learn.model.eval()(x, y)
    assert deployed.card['parity']['n_items']==12 and deployed.card['output']['n_outputs']==2
    assert all(np.allclose(got, o, atol=1e-5) for got,o in zip(deployed(x.numpy(), y.numpy()), want))

def pairs(folder):
    def pair(file): return fastuple(PILImage.create(file), PILImage.create(file))
    return DataBlock((TransformBlock(item_tfms=ToTensor, batch_tfms=IntToFloatTensor), CategoryBlock), get_items=get_image_files, get_x=pair,
                     get_y=parent_label, splitter=GrandparentSplitter('train','val'), item_tfms=Resize(32)).dataloaders(folder, bs=4, num_workers=0)

def test_a_tuple_as_input(folder, tmp_path):
    learn = Learner(pairs(folder), OfPair(), metrics=accuracy)
    with learn.no_bar(), pytest.warns(UserWarning, match='own inputs'): deployed = learn.deploy(tmp_path/'m', 'onnx')
    x,y = torch.rand(2,3,3,32,32)
    with torch.no_grad(): want = learn.model.eval()((x,y))
    assert len(deployed.card['inputs'])==2 and np.allclose(deployed(x.numpy(), y.numpy())[0], want, atol=1e-5)

def test_every_output_counts(tmp_path, monkeypatch):
    "The second one is wrong"
    loader = TorchLoader(TensorDataset(torch.randn(12,3,16,16), torch.randn(12,3,16,16), torch.randint(0,2,(12,))), 4)
    learn = Learner(DataLoaders(loader, loader), TwoInputs(), loss_func=nn.CrossEntropyLoss())
    load = backends['onnx'].load
    def wrong(file, threads):
        run = load(file, threads)
        def second(inputs): return [run(inputs)[0], run(inputs)[1]*1.01]
        return second
    monkeypatch.setattr(backends['onnx'], 'load', wrong)
    with pytest.raises(DeployError, match='changes the model'): learn.deploy(tmp_path/'m', 'onnx')
    assert list(tmp_path.iterdir())==[]

def test_random_generators_are_as_before(folder, tmp_path):
    learn = image_learner(folder, Resize(32), aug_transforms())
    random.seed(1); torch.manual_seed(1)
    want = random.random(),torch.rand(1)
    random.seed(1); torch.manual_seed(1)
    with learn.no_bar(): learn.deploy(tmp_path/'m', 'eager')
    assert (random.random(),torch.rand(1))==want

def test_why_a_model_cannot_be_exported(folder, tmp_path):
    class ByData(nn.Module):
        def __init__(self): super().__init__(); self.n = net()
        def forward(self, x): return self.n(x) if x.mean()>-100 else self.n(-x)
    class OfTwo(nn.Module):
        def __init__(self): super().__init__(); self.n = net()
        def forward(self, x): return self.n(x.reshape(-1, *x.shape[1:]))[:2] if len(x)==2 else self.n(x)
    dls = image_learner(folder, Resize(32), []).dls
    with pytest.raises(DeployError, match='decides by the values of its data') as e: Learner(dls, ByData()).deploy(tmp_path/'m', 'onnx')
    assert not any(other in str(e.value) for other in ('openvino','torch)','eager'))
    with pytest.raises(DeployError, match='the batch size of the example alone'): Learner(dls, OfTwo()).deploy(tmp_path/'m', 'onnx')
