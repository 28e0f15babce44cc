"""Does an installed package work? Run where nothing but the package is installed, from a folder that is not the repository:

    python -m venv empty && empty/bin/pip install dist/fastai_bnfold-*.whl && cd /tmp && .../empty/bin/python .../.github/smoke.py
"""
import subprocess, sys
from importlib.metadata import version
from pathlib import Path
import torch
from torch import nn
import fastai_bnfold
from fastai.vision.all import Learner, accuracy
import fastai.callback.all
from fastai_bnfold.all import *
from fastai_bnfold.lab.data import get_dls

net = nn.Sequential(nn.Conv2d(3,8,3,2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(8), nn.Linear(8,10))
learn = Learner(get_dls('digits', 16), net, metrics=accuracy)
with learn.no_bar(), learn.no_logging():
    learn.fit_one_cycle(1, 1e-2)
    rep = learn.fold_bn(latency=0)
assert rep.n_folded==rep.n_bn==2 and rep.n_changed==0, rep
assert isinstance(learn.unfold_bn().model[1], nn.BatchNorm2d)

xb = torch.randn(2,3,16,16)
folder = BNFolder()
folder.fold_graph(torch.export.export(net.eval(), (xb,)))
assert folder.report.n_folded==2

assert Path(fastai_bnfold.__file__).with_name('py.typed').exists()
assert version('fastai_bnfold')==fastai_bnfold.__version__
command = Path(sys.executable).with_name('bnfold')
assert 'reproduce' in subprocess.run([command, '--help'], capture_output=True, text=True, check=True).stdout
print(f'fastai_bnfold {fastai_bnfold.__version__}: folds, with torch {torch.__version__} and fastai {version("fastai")}')
