"""The zoo: how many BNs still run after folding, and how large the error is, model by model: this library, FasterAI, torch.fx, AIMET.

    pip install timm; pip install --no-deps fasterai==0.4.1; pip install aimet-torch==2.42.0   # optional; a tool that is not installed says so
    python benchmarks/zoo.py [--only resnet] [--out benchmarks/results/zoo.json]

Untrained weights, random BN statistics (`randomize_bn`: negative, zero and tiny γ too), one image of the model's default size. What is counted is the BN
operations that run, functional ones included, not the BN modules that are left. A crash or a wrong answer of a tool is a cell of the table, and counts as nothing folded.
"""
import copy, gc, importlib.util, json, logging, time, warnings
from pathlib import Path
import torch, torchvision
from torch import nn
from fastcore.script import call_parse
from fastprogress.fastprogress import progress_bar
from fastai.vision.all import create_cnn_model, xresnet18, xresnet50, resnet18, resnet34, DynamicUnet, create_body
from fastai.tabular.all import TabularModel
from fastai_bnfold.all import *
from fastai_bnfold.fold.testing import randomize_bn
from fastai_bnfold.fold.verify import max_err
from fastai_bnfold.fold.plan import bns_of
from fastai_bnfold.fold.program import program_of
from fastai_bnfold.fold.state import View
from fastai_bnfold.fold.inputs import run
from fastai_bnfold.fold.report import text_table
from fastai_bnfold.lab.tools import fasterai_fold, fx_fuse

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

def n_bns(model, args):
    "How many batch norms run"
    return sum(bn.is_bn for bn in bns_of(View(program_of(model, args))))

def tv(name, *size, **kw): return lambda: (torchvision.models.get_model(name, weights=None, **kw), (torch.randn(1,3,*(size or (224,224))),))
def timm_model(name):
    def make():
        import timm
        m = timm.create_model(name)
        return m, (torch.randn(1, *m.default_cfg['input_size']),)
    return make

# the 44 models of the project's yardstick
tv44 = 'vgg16_bn resnet50 densenet121 mobilenet_v2 mobilenet_v3_large mnasnet1_0 shufflenet_v2_x1_0 efficientnet_b0 efficientnet_v2_s regnet_y_400mf resnext50_32x4d'.split()
timm44 = '''repvgg_a0 mobileone_s0 dla34 hrnet_w18 res2net50_26w_4s cspdarknet53 vovnet39a dpn68 xception nasnetalarge resnetv2_50 selecsls42 skresnet18 ghostnet_100 levit_128s
    rexnet_100 fastvit_t8 efficientformer_l1 repghostnet_050 mobilevit_s tresnet_m convmixer_768_32 coatnet_bn_0_rw_224 resnest14d mobilenetv4_conv_small starnet_s1 hgnet_tiny repvit_m0_9
    inception_v4 efficientnet_b0 resnet50d'''.split()
yardstick = {**{f'tv {k}': tv(k) for k in tv44}, 'tv googlenet': tv('googlenet', init_weights=False), 'tv inception_v3': tv('inception_v3', 299, 299, init_weights=False),
             **{f'timm {k}': timm_model(k) for k in timm44}}
more = {
    **{f'tv {k}': tv(k) for k in ('resnet18','resnet152','densenet201','wide_resnet50_2','squeezenet1_1','regnet_x_800mf')},
    **{f'tv {k}': tv(k, weights_backbone=None) for k in ('deeplabv3_resnet50','fcn_resnet50','lraspp_mobilenet_v3_large')},
    **{f'tv {k}': tv(k, *s) for k,s in {'r3d_18':(8,112,112), 'mc3_18':(8,112,112), 'r2plus1d_18':(8,112,112), 's3d':(16,224,224)}.items()},
    'fastai xresnet18': lambda: (xresnet18(n_out=10), (torch.randn(1,3,128,128),)), 'fastai xresnet50': lambda: (xresnet50(n_out=10), (torch.randn(1,3,128,128),)),
    "fastai vision_learner's resnet18": lambda: (create_cnn_model(resnet18, 10, pretrained=False), (torch.randn(1,3,128,128),)),
    "fastai unet_learner's resnet34": lambda: (DynamicUnet(create_body(resnet34(), pretrained=False), 4, (128,128)), (torch.randn(1,3,128,128),)),
    'fastai TabularModel': lambda: (TabularModel([(5,3),(4,2)], 3, 2, [20,10]), (torch.randint(0,4,(8,2)), torch.randn(8,3))),
    **{f'timm {k}': timm_model(k) for k in ('mobilenetv3_small_100','ese_vovnet19b_dw','seresnet18','resnet26t','gernet_s','cs3darknet_s','regnetz_b16','edgenext_xx_small','repvgg_b0','mixnet_s')},
    'hard: a conv used twice, BN on one path': lambda: (Reused(), (torch.randn(2,3,16,16),)),
    'hard: registered in another order': lambda: (Swapped(), (torch.randn(2,3,16,16),)),
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
    "Tool → function of a model and its arguments, or None"
    return {'FasterAI': (lambda m, args: fasterai_fold(m)) if importlib.util.find_spec('fasterai') else None, 'torch.fx fuse': lambda m, args: fx_fuse(m), 'AIMET': aimet()}

def in64(args): return tuple(a.double() if a.is_floating_point() else a for a in args)

def one(make, others):
    "The row of one model"
    torch.manual_seed(0)
    m,args = make()
    m = randomize_bn(m).eval()
    ref,res = run(m, args),dict(live=n_bns(m, args))
    start,folder = time.perf_counter(),BNFolder()
    g = folder.fold(m, args); rep = folder.report
    seconds = time.perf_counter()-start
    res['fastai_bnfold'] = dict(left=n_bns(g, args), max_err=max_err(ref, run(g, args)), seconds=seconds, possible=rep.n_possible,
                                clamps=len({a for r in rep.rows for a in r.acts}), constants=sum(not r.is_bn for r in rep.rows))
    res['kept'] = {r.bn: r.reason for r in rep.rows if not r.folded and r.live}
    every = BNFolder(costly=True)
    d = copy.deepcopy(m).double()
    res['fastai_bnfold']['max_err64'] = max_err(run(d, in64(args)), run(every.fold(d, in64(args)), in64(args)))
    for k,f in others.items():
        if f is None: res[k] = dict(error='not installed'); continue
        start = time.perf_counter()
        try:
            g = f(m, args); seconds = time.perf_counter()-start
            err = max_err(ref, run(g.eval(), args))
            res[k] = dict(left=n_bns(g, args), max_err=err, seconds=seconds) | (dict(wrong=True) if err>1e-3 else {})
        except Exception as e: res[k] = dict(error=f'fails: {type(e).__name__}')
    return res

def n_folded(row, tool):
    "How many BNs a tool folded in a model: none where it failed or was wrong"
    c = row[tool]
    return 0 if 'left' not in c or c.get('wrong') else row['live']-c['left']

@call_parse
def main(
    only:str='',                           # Only models whose name contains this
    out:str='benchmarks/results/zoo.json'  # Where the figures go
):
    "BN operations that still run after folding, and the error, tool by tool"
    warnings.filterwarnings('ignore'); logging.disable(logging.WARNING)
    others = tools()
    names = [n for n in [*yardstick, *more] if only in n]
    res = {}
    for n in (bar := progress_bar(names)):
        bar.comment = n
        try: res[n] = one((yardstick|more)[n], others) | dict(yardstick=n in yardstick)
        except ImportError as e: print(f'{n}: {e}')
        gc.collect()
        Path(out).write_text(json.dumps(dict(tools=['fastai_bnfold', *others], torch=torch.__version__, models=res), indent=1))
    ts = ['fastai_bnfold', *others]
    def cell(c): return c.get('error') or f"{c['left']} left, {c['max_err']:.0e}" + (' WRONG' if c.get('wrong') else '')
    print(text_table(['model','BNs that run',*ts], [[k, r['live'], *[cell(r[t]) for t in ts]] for k,r in res.items()]))
    for title,rows in (('the yardstick',[r for r in res.values() if r['yardstick']]), ('all',list(res.values()))):
        print(f"{title}: {len(rows)} models, {sum(r['live'] for r in rows):,} BNs run; folded: " + ', '.join(f"{t} {sum(n_folded(r,t) for r in rows):,}" for t in ts)
              + f"; possible: {sum(r['fastai_bnfold']['possible'] for r in rows):,}")
