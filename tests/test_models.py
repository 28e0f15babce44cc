"Real networks: torchvision's, fastai's"
import copy
import pytest, torch, torchvision
from torch import nn
from fastai.vision.all import (xresnet18, vision_learner, unet_learner, resnet18, ImageDataLoaders, Learner, accuracy, DataBlock, ImageBlock,
                               MaskBlock, PILImage, PILMask, Resize, CrossEntropyLossFlat)
from fastai.tabular.all import tabular_learner, TabularDataLoaders, Categorify, FillMissing, Normalize
from fastai_bnfold.all import *
from fastai_bnfold.fold.testing import randomize_bn
from fastai_bnfold.lab.data import digits_dls
from conftest import error64

# name: (arguments, size, live BNs, folded BNs, BNs that never run)
models = {
    'resnet50': ({}, (3,64,64), 53, 53, 0),
    'vgg16_bn': ({}, (3,32,32), 13, 13, 0),
    'mobilenet_v2': ({}, (3,64,64), 52, 52, 0),
    'efficientnet_b0': ({}, (3,64,64), 49, 49, 0),
    'regnet_y_400mf': ({}, (3,64,64), None, None, 0),
    'shufflenet_v2_x1_0': ({}, (3,64,64), 56, 56, 0),
    'googlenet': (dict(aux_logits=True, init_weights=False), (3,64,64), 57, 57, 2),
    'inception_v3': (dict(aux_logits=True, init_weights=False), (3,96,96), 94, 94, 2),
    'r3d_18': ({}, (3,4,32,32), 20, 20, 0),
    'deeplabv3_resnet50': (dict(weights_backbone=None, aux_loss=True), (3,64,64), None, None, 0),
}

@pytest.mark.parametrize('name', models)
def test_torchvision(name):
    kw,size,live,n,never = models[name]
    m = randomize_bn(torchvision.models.get_model(name, weights=None, num_classes=10, **kw))
    folder = BNFolder()
    folded = folder.fold(m, torch.randn(2,*size))
    rep = folder.report
    ran = [r for r in rep.rows if r.live]
    bns = [p for p,o in m.named_modules() if isinstance(o, nn.modules.batchnorm._BatchNorm)]
    assert {r.bn for r in rep.rows}==set(bns)
    assert len(ran)==(len(bns)-never if live is None else live) and rep.n_folded==(len(ran) if n is None else n), str(rep)
    assert [('never ran' in r.reason) for r in rep.rows if not r.live]==[True]*never
    assert rep.max_err < 1e-5
    assert error64(folded, m, torch.randn(1,*size)) < 1e-5
    other = [s+32 if i else s for i,s in enumerate(size)] if len(size)==3 else [3,5,48,48]
    assert error64(folded, m, torch.randn(3,*other)) < 1e-5

def test_the_articles_parameter_counts():
    for name,n in (('vgg16_bn',8448), ('resnet50',26560)):
        folder = BNFolder()
        m = torchvision.models.get_model(name, weights=None, num_classes=10)
        folder.fold(m, torch.randn(1,3,32,32), inplace=True)
        r = folder.report
        assert r.params_before-r.params_after==n and r.n_folded==r.n_bn and sum(p.numel() for p in m.parameters())==r.params_after

def test_xresnet():
    m = randomize_bn(xresnet18(n_out=10)); folder = BNFolder()
    folded = folder.fold(m, torch.randn(2,3,64,64))
    assert folder.report.n_folded==folder.report.n_bn==22 and error64(folded, m, torch.randn(3,3,96,64)) < 1e-5

@pytest.fixture(scope='module')
def dls(): return digits_dls(size=64, bs=16)

def test_vision_learner(dls):
    learn = vision_learner(dls, resnet18, pretrained=False, metrics=accuracy)
    randomize_bn(learn.model); old = copy.deepcopy(learn.model)
    rep = learn.fold_bn(latency=0)
    assert rep.n_folded==rep.n_bn==22, str(rep)
    assert rep.n_changed==0 and rep.metrics_before['accuracy']==rep.metrics_after['accuracy']
    assert error64(learn.model, old, torch.randn(3,3,96,64)) < 1e-5

def test_unet_learner():
    import numpy as np
    rng = np.random.default_rng(0)
    def image(i): return PILImage.create(rng.integers(0, 255, (64,64,3), dtype=np.uint8))
    def mask(i): return PILMask.create(rng.integers(0, 3, (64,64), dtype=np.uint8))
    dls = DataBlock((ImageBlock, MaskBlock(['a','b','c'])), get_items=lambda _: list(range(6)), get_x=image, get_y=mask,
                    splitter=lambda o: ([0,1],[2,3,4,5])).dataloaders(None, bs=2, num_workers=0)
    learn = unet_learner(dls, resnet18, pretrained=False, n_out=3)
    randomize_bn(learn.model); old = copy.deepcopy(learn.model)
    folder = BNFolder(); folded = folder.fold(learn.model, torch.randn(2,3,64,64))
    rep = folder.report
    assert rep.n_bn==len([m for m in old.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)])
    assert all(r.folded or r.reason for r in rep.rows) and rep.n_folded>=20, str(rep)
    assert error64(folded, old, torch.randn(1,3,96,96)) < 1e-4
    rep = learn.fold_bn(validate=False, latency=0)
    assert rep.n_folded>=20

def adults(n=120):
    import numpy as np, pandas as pd
    rng = np.random.default_rng(0)
    return pd.DataFrame(dict(age=rng.normal(40,10,n), hours=rng.normal(35,5,n), job=rng.choice(['a','b','c'],n), sex=rng.choice(['m','f'],n), y=rng.choice(['lo','hi'],n)))

def test_tabular():
    df = adults()
    dls = TabularDataLoaders.from_df(df, procs=[Categorify, FillMissing, Normalize], cat_names=['job','sex'], cont_names=['age','hours'], y_names='y', valid_idx=range(40), bs=16)
    learn = tabular_learner(dls, layers=[20,10], metrics=accuracy)
    randomize_bn(learn.model); old = copy.deepcopy(learn.model)
    rep = learn.fold_bn(latency=.2)
    assert rep.n_folded==rep.n_bn==3, str(rep)
    assert rep.n_changed==0 and rep.n_items==40
    xc,xn = torch.randint(0,3,(7,2)),torch.randn(7,2)
    assert error64(learn.model, old, xc, xn) < 1e-5
    learn.predict(df.iloc[0])
    learn.unfold_bn()
    learn.fit(1)
