"""Does it pay to fold a BN through an activation? The ops alone, and whole networks: all foldable BNs against the plain pairs only.

    python benchmarks/clamp.py [--seconds 30] [--device cpu] [--out benchmarks/results/clamp.json]

Interleaved runs, medians; ratios are medians over rounds. The networks are warmed up: the BN statistics are computed on random images.
"""
import copy, json
from pathlib import Path
import torch
from torch import nn
from fastcore.script import call_parse
from fastprogress.fastprogress import progress_bar
from fastai_bnfold.all import *
from fastai_bnfold.fold.affine import Clamp
from fastai_bnfold.lab.models import find_model, warm_up
from fastai_bnfold.lab.tools import bn_deleted
from fastai_bnfold.lab.command import machine
from fastai_bnfold.timing import latency, median, ratio
from fastai_bnfold.fold.report import text_table

def ops(shape, seconds, device):
    "Medians of the ops before and after, in µs"
    x,bn = torch.randn(shape, device=device),nn.BatchNorm2d(shape[1]).to(device).eval()
    lo = torch.randn(1,shape[1],1,1, device=device); hi,no = lo+1,torch.full_like(lo, float('inf'))
    one,one_,two = Clamp(lo, no),Clamp(lo, no, inplace=True),Clamp(lo, hi)
    y = x.clone()
    calls = {'relu_': lambda: torch.relu_(y), 'relu': lambda: torch.relu(x), 'BN, relu_': lambda: torch.relu_(bn(x)), 'Clamp, one bound': lambda: one(x), 'Clamp, one bound, in place': lambda: one_(y), 'Clamp, both bounds': lambda: two(x), 'torch.clamp, both bounds': lambda: torch.clamp(x, lo, hi)}
    with torch.no_grad(): times = latency(calls, seconds, cuda=device!='cpu')
    return {k: dict(us=median(t)*1e6, of_bn_relu=ratio(times, k, 'BN, relu_')) for k,t in times.items()}

def network(name, seconds, device):
    "Latency of a network unfolded, with the plain pairs folded, with all folded, the same with clamps out of place, and with the BNs deleted"
    torch.manual_seed(0)
    m,x = warm_up(find_model(name)[0]),torch.randn(1,3,224,224)
    folder = BNFolder()
    full,pairs = folder.fold(m, x),BNFolder(clamps=False).fold(m, x)
    outside = copy.deepcopy(full)
    for o in outside.modules():
        if isinstance(o, Clamp): o.inplace = False
    nets = {k: n.to(device).eval() for k,n in {'unfolded': m, 'plain pairs': pairs, 'all': full, 'all, clamps out of place': outside, 'BNs deleted': bn_deleted(m)}.items()}
    left = {k: sum(isinstance(o, nn.BatchNorm2d) for o in n.modules()) for k,n in nets.items()}
    x = x.to(device)
    with torch.no_grad(): times = latency({k: (lambda n=n: n(x)) for k,n in nets.items()}, seconds, cuda=device!='cpu')
    return {k: dict(ms=median(t)*1e3, bn_left=left[k], speedup=ratio(times, 'unfolded', k), over_pairs=ratio(times, 'plain pairs', k), over_limit=ratio(times, k, 'BNs deleted')) for k,t in times.items()}

@call_parse
def main(
    seconds:float=30.,  # For each measurement
    device:str='cpu',   # Or 'cuda'
    out:str='benchmarks/results/clamp.json' # Where the figures go
):
    "What folding through activations brings"
    shapes = [(1,256,56,56),(1,512,28,28),(1,1024,14,14),(1,768,32,32),(8,128,28,28)]
    names = ['densenet121','resnetv2_50']
    res = dict(machine=machine(), device=device, ops={}, networks={})
    bar = progress_bar([*shapes, *names])
    for o in bar:
        if isinstance(o, tuple): res['ops']['×'.join(map(str,o))] = ops(o, seconds/10, device)
        else:
            try: res['networks'][o] = network(o, seconds, device)
            except ImportError as e: print(e)
    Path(out).write_text(json.dumps(res, indent=1))
    first = next(iter(res['ops'].values()))
    print(text_table(['shape', *[f'{k}, µs' for k in first]], [[s, *[f"{v['us']:.1f} ({v['of_bn_relu']:.2f})" for v in r.values()]] for s,r in res['ops'].items()]))
    print(text_table(['network','','BNs left','ms','times as fast as unfolded','as plain pairs'], [[n, k, v['bn_left'], f"{v['ms']:.1f}", f"{v['speedup']:.3f}", f"{v['over_pairs']:.3f}"] for n,r in res['networks'].items() for k,v in r.items()], left=2))
