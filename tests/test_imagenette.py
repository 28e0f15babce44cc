"The real data, where it is at hand (environment variable IMAGENETTE)"
import json
from pathlib import Path
import torch
from torchvision.models import resnet18
from fastai.vision.all import Learner, accuracy
import fastai.callback.all
from fastai_bnfold.all import *
from fastai_bnfold.lab.data import get_dls

def test_fold_on_all_of_imagenette(imagenette):
    "A few steps of training, so that the statistics are real; then all 3,925 validation images, before and after"
    dls = get_dls('imagenette', size=64)
    assert (len(dls.train_ds), len(dls.valid_ds), dls.c) == (9469, 3925, 10)
    learn = Learner(dls, resnet18(num_classes=10), metrics=accuracy)
    learn.opt = None; learn.create_opt()
    learn.model.train()
    for i,(x,y) in zip(range(8), dls.train):
        learn.loss_func(learn.model(x), y).backward(); learn.opt.step(); learn.opt.zero_grad()
    rep = learn.fold_bn(latency=.5)
    assert rep.n_folded==rep.n_bn==20 and rep.n_items==3925 and rep.n_changed==0
    assert rep.metrics_before['accuracy']==rep.metrics_after['accuracy']
    assert abs(rep.metrics_before['valid_loss']-rep.metrics_after['valid_loss']) <= 1e-5*rep.metrics_before['valid_loss']

def test_committed_results_are_the_articles():
    "The figures in benchmarks/results/imagenette.json, which README and tutorial show"
    res = json.loads((Path(__file__).parent.parent/'benchmarks'/'results'/'imagenette.json').read_text())['networks']
    for name,n in (('vgg16_bn',8448), ('resnet50',26560)):
        r = res[name]
        assert r['params_before']-r['params_after']==n and r['n_changed']==0 and r['n_items']==3925 and r['n_folded']==r['n_bn']
        assert r['metrics_before']['accuracy']==r['metrics_after']['accuracy'] and len(r['history'])==5
