"""Both models in one pass over the data: how long beside `learn.validate` of each, and what is the least that it could be?

    python benchmarks/validating.py [--rounds 5] [--out benchmarks/results/validating.json]

48 JPEGs of 500 × 375 pixels; a small network and a resnet18 (random weights) at several sizes, folded, one thread. `ratio` is the time of one
pass for both over that of two validations. Only loading and decoding are shared: each model still needs its own forward pass. So the least is
one of the two loads saved, `bound` = 1 - loading / (both validations); it is 1/2 where there is nothing but loading. `loading` is a pass over the
`DataLoader` alone, in the same rounds. Medians of interleaved rounds.
"""
import json, os, tempfile, time, warnings
from pathlib import Path
from statistics import median
import numpy as np, torch
from fastai.vision.all import ImageDataLoaders, Learner, Normalize, Resize, accuracy, imagenet_stats, resnet18
from fastcore.script import call_parse
from PIL import Image
from torch import nn
from fastai_bnfold.all import *
from fastai_bnfold.fold.testing import randomize_bn
from fastai_bnfold.lab.command import machine
from fastai_bnfold.learner.validate import validate_both

def photos(folder):
    rng = np.random.default_rng(0)
    for i in range(56):
        file = folder/('train' if i<8 else 'valid')/'ab'[i%2]/f'{i}.jpg'
        file.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (24,32,3), dtype=np.uint8))
        small.resize((500,375), Image.BICUBIC).save(file, quality=90)
    return folder

def small_net():
    return nn.Sequential(nn.Conv2d(3,8,3,2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8,2))

def learner(folder, make, size):
    torch.manual_seed(0)
    dls = ImageDataLoaders.from_folder(folder, item_tfms=Resize(size), batch_tfms=Normalize.from_stats(*imagenet_stats), bs=16, num_workers=0)
    return Learner(dls, randomize_bn(make()), metrics=accuracy)

def seconds(f):
    began = time.perf_counter()
    f()
    return time.perf_counter()-began

def one_round(learn, folder):
    "Seconds of one pass for both, of two validations, and of loading alone"
    both = seconds(lambda: validate_both(learn, folder))
    folder.swaps.undo()
    unfolded = seconds(learn.validate)
    folder.swaps.redo()
    return both, unfolded+seconds(learn.validate), seconds(lambda: list(learn.dls.valid))

def measured(where, make, size, rounds):
    learn,folder = learner(where, make, size),BNFolder()
    folder.fold(learn.model, torch.randn(2,3,size,size), inplace=True)
    with learn.no_bar(), learn.no_logging():
        one_round(learn, folder)
        times = [one_round(learn, folder) for _ in range(rounds)]
    both,two,loading = map(median, zip(*times))
    return dict(both=both, two=two, loading=loading, ratio=median(b/t for b,t,_ in times), bound=median(1-l/t for _,t,l in times))

@call_parse
def main(
    rounds:int=5,                                 # Of the three, in turns
    out:str='benchmarks/results/validating.json'  # Where the figures go
):
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    rows,load = [],os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        where = photos(Path(folder))
        for name,make,size in (('small',small_net,64), ('small',small_net,128), ('small',small_net,224), ('resnet18',lambda: resnet18(num_classes=2),64), ('resnet18',lambda: resnet18(num_classes=2),128)):
            rows.append(dict(network=name, size=size) | measured(where, make, size, rounds))
            print({key: round(value, 3) if isinstance(value, float) else value for key,value in rows[-1].items()}, flush=True)
    Path(out).write_text(json.dumps(dict(rounds=rounds, load=load, machine=machine(), rows=rows), indent=1))
