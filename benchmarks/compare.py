"""How many BNs still run after folding, and how large the error is: this library, FasterAI, torch.fx, AIMET.

    pip install --no-deps fasterai==0.4.1; pip install aimet-torch==2.42.0   # optional; a tool that is not installed says so
    python benchmarks/compare.py [--out benchmarks/results/compare.json]

Random BN statistics; what is counted is the BN operations that run, functional ones included, not the BN modules that are left.
"""
import copy, json
from pathlib import Path
import torch, torchvision
from torch import nn
from fastcore.script import call_parse
from fastprogress.fastprogress import progress_bar
from fastai.vision.all import create_cnn_model, xresnet18, resnet18
from fastai.tabular.all import TabularModel
from fastai_bnfold.all import *
from fastai_bnfold.folder import randomize_bn, max_err
from fastai_bnfold.plan import bn_calls
from fastai_bnfold.trace import Trace, run
from fastai_bnfold.report import text_table
from fold import fasterai_folder

class Reused(nn.Module):
    "One convolution, called twice; a BN on one path only"
    def __init__(self):
        super().__init__()
        self.conv,self.bn = nn.Conv2d(3,8,3),nn.BatchNorm2d(8)
    def forward(self, x): return self.bn(self.conv(x)).relu() + self.conv(x)

class Swapped(nn.Module):
    "Registered in another order than executed"
    def __init__(self):
        super().__init__()
        self.conv1,self.bn2,self.conv2,self.bn1 = nn.Conv2d(3,8,3),nn.BatchNorm2d(8),nn.Conv2d(8,8,3),nn.BatchNorm2d(8)
    def forward(self, x): return self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))

def tv(name, size=64, **kw): return lambda: (torchvision.models.get_model(name, weights=None, num_classes=10, **kw), (torch.randn(2,3,size,size),))
models = {
    **{k: tv(k) for k in ('vgg16_bn','resnet50','mobilenet_v2','efficientnet_b0','regnet_y_400mf','shufflenet_v2_x1_0','densenet121')},
    'googlenet': tv('googlenet', init_weights=False), 'inception_v3': tv('inception_v3', 96, init_weights=False),
    'fastai xresnet18': lambda: (xresnet18(n_out=10), (torch.randn(2,3,64,64),)),
    "fastai vision_learner's resnet18": lambda: (create_cnn_model(resnet18, 10, pretrained=False), (torch.randn(2,3,64,64),)),
    'fastai TabularModel': lambda: (TabularModel([(5,3),(4,2)], 3, 2, [20,10]), (torch.randint(0,4,(8,2)), torch.randn(8,3))),
    'a conv used twice, BN on one path': lambda: (Reused(), (torch.randn(2,3,16,16),)),
    'registered in another order': lambda: (Swapped(), (torch.randn(2,3,16,16),)),
}

def aimet():
    try: from aimet_torch.batch_norm_fold import fold_all_batch_norms
    except ImportError: return None
    def fold(m, args):
        m = copy.deepcopy(m)
        fold_all_batch_norms(m, None, dummy_input=args)
        return m
    return fold

def tools():
    from torch.fx.experimental.optimization import fuse
    fai = fasterai_folder()
    return {'fastai_bnfold': lambda m, args: BNFolder().fold(m, args), 'FasterAI': fai and (lambda m, args: fai(m)),
            'torch.fx fuse': lambda m, args: fuse(m), 'AIMET': aimet()}

def one(make, ts):
    torch.manual_seed(0)
    m,args = make()
    m = randomize_bn(m).eval()
    ref,res = run(m, args),dict(live=len(bn_calls(Trace(m, args))))
    for k,f in ts.items():
        if f is None: res[k] = dict(error='not installed'); continue
        try:
            g = f(m, args)
            err = max_err(ref, run(g.eval(), args))
            res[k] = dict(left=len(bn_calls(Trace(g, args))), max_err=err, wrong=err>1e-3)
        except Exception as e: res[k] = dict(error=f'fails: {type(e).__name__}')
    return res

@call_parse
def main(
    out:str='benchmarks/results/compare.json' # Where the figures go
):
    "BN operations that still run after folding, and the error, tool by tool"
    ts = tools()
    res = {k: one(models[k], ts) for k in progress_bar(list(models))}
    Path(out).write_text(json.dumps(dict(tools=list(ts), torch=torch.__version__, models=res), indent=1))
    def cell(c): return c.get('error') or f"{c['left']} left, {c['max_err']:.0e}" + (' WRONG' if c['wrong'] else '')
    print(text_table(['model','BNs that run',*ts], [[k, r['live'], *[cell(r[t]) for t in ts]] for k,r in res.items()]))
