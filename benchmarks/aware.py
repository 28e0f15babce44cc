"""Quantization-aware training on ImageNette: accuracy by bits, after training and aware, and what becomes of the predictions in the integer network and in its file.

    python benchmarks/aware.py [--networks resnet18/0,mobilenet/0] [--cache FOLDER] [--out benchmarks/results/aware.json]

The networks are those of `benchmarks/shift.py`, trained as there (64 pixels; their weights and the images are kept in the folder `cache`). From these, each number of
bits begins anew: a few epochs of `learn.fit_one_cycle(..., cbs=QuantAware(bits))` with a distilled loss, first and last layer with 8 bits. Accuracy is that of all 3,925 validation images, in float32.
"""
import json, tempfile
from pathlib import Path
import numpy as np, onnxruntime, pandas as pd
from fastai.vision.all import *
from copy import deepcopy
from fastcore.script import call_parse
from torch.utils.data import DataLoader as TorchLoader, Dataset
from fastai_bnfold.all import *
from fastai_bnfold.integer.quantizers import quantizers_of
from fastai_bnfold.lab.command import machine
from fastai_bnfold.lab.training import AutocastCPU
from shift import arrays, augmented, normalized, trained

# Data

class Images(Dataset):
    "Images, uint8, with labels"
    def __init__(self, x, y): self.x,self.y = x,y
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i],self.y[i]

def stacked(items): return (torch.stack(o) for o in zip(*items))

def for_training(items):
    x,y = stacked(items)
    return augmented(x, 64), y

def for_validation(items):
    x,y = stacked(items)
    return normalized(x), y

def loaders(images, bs):
    train = TorchLoader(Images(*images['train']), bs, shuffle=True, drop_last=True, collate_fn=for_training)
    valid = TorchLoader(Images(*images['val']), 128, collate_fn=for_validation)
    return DataLoaders(train, valid)

# Training

class Distill(Callback):
    "The loss is half that of the labels, half the distance to the outputs of the network before it was quantized"
    def __init__(self, teacher): self.teacher = teacher.eval()

    def after_loss(self):
        if not self.training: return
        with torch.no_grad(): wanted = self.teacher(*self.xb).float().softmax(1)
        distance = F.kl_div(self.pred.float().log_softmax(1), wanted, reduction='batchmean')
        self.learn.loss_grad = (self.learn.loss_grad+distance)/2
        self.learn.loss = self.learn.loss_grad.clone()

recipes = {4: dict(epochs=2, lr=1e-3), 2: dict(epochs=5, lr=2e-3)}

def aware(network, bits, model, images, cache):
    "A copy of the network, trained for a few bits; made once"
    file = Path(cache)/f"{network.replace('/','_')}_{bits}bits.pt"
    if not file.exists():
        set_seed(0)
        loss_func = LabelSmoothingCrossEntropyFlat(eps=.05)
        learn = Learner(loaders(images, 64), deepcopy(model), loss_func=loss_func)
        recipe = recipes[bits]
        learn.fit_one_cycle(recipe['epochs'], recipe['lr'], cbs=[AutocastCPU(), QuantAware(bits), Distill(deepcopy(model))])
        torch.save(learn.model.eval(), file)
    return torch.load(file, weights_only=False)

# What comes of it

@torch.no_grad()
def outputs(model, x): return torch.cat([model(normalized(part)) for part in x.split(128)])

def accuracy_of(outs, y): return (outs.argmax(1)==y).float().mean().item()
def changed(outs, others): return (outs.argmax(1)!=others.argmax(1)).sum().item()
