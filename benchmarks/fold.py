"""Time to fold (a module, and its export), and latency after folding, beside FasterAI's `BN_Folder`, `torch.fx` `fuse`, and the limit (BNs deleted).

    python benchmarks/fold.py [--arch resnet50,vgg16_bn] [--seconds 30] [--out benchmarks/results/fold.json]

Interleaved runs, medians; ratios are medians over rounds. The networks are warmed up: the BN statistics are computed on random
images, so that activations are of ordinary size (no subnormal numbers, which would fake a speed-up). `pip install --no-deps fasterai==0.4.1`
adds FasterAI to the table; without it, it says so.
"""
import importlib.util, json
from pathlib import Path
import torch
from torch import nn
from fastcore.script import call_parse
from fastprogress.fastprogress import progress_bar
from fastai_bnfold.all import *
from fastai_bnfold.lab.models import find_model, warm_up
from fastai_bnfold.lab.tools import bn_deleted, fasterai_fold, fx_fuse
from fastai_bnfold.lab.command import machine
from fastai_bnfold.timing import latency, median, ratio
from fastai_bnfold.fold.verify import max_err
from fastai_bnfold.fold.report import text_table

def bench(arch, seconds):
    torch.manual_seed(0)
    m,x = warm_up(find_model(arch)[0]),torch.randn(1,3,224,224)
    tools = {'fastai_bnfold': lambda m: BNFolder().fold(m, x), 'fastai_bnfold, verify=False': lambda m: BNFolder(verify=False).fold(m, x),
             'torch.fx fuse': fx_fuse, 'FasterAI BN_Folder': fasterai_fold if importlib.util.find_spec('fasterai') else None}
    with torch.no_grad(): ref = [m(x)]
    folded,rows,missing = {},{},[k for k,f in tools.items() if f is None]
    tools = {k:f for k,f in tools.items() if f}
    for k,f in tools.items():
        g = f(m)
        with torch.no_grad(): rows[k] = dict(max_err=max_err(ref, [g(x)]), bn_left=sum(isinstance(o, nn.BatchNorm2d) for o in g.modules()))
        folded[k] = g
    with torch.no_grad(): ep = torch.export.export(m, (x,))
    fold = latency({'one forward pass': lambda: m(x), **{k: (lambda f=f: f(m)) for k,f in tools.items()}, 'fold_graph': lambda: BNFolder().fold_graph(ep)}, seconds)
    for k in [*tools, 'fold_graph']: rows.setdefault(k, {}).update(fold_seconds=median(fold[k]), fold_in_forwards=ratio(fold, k, 'one forward pass'))
    rows['fold_graph']['over_fold'] = ratio(fold, 'fold_graph', 'fastai_bnfold') # of an export, with proof, beside the module with proof
    run = {'unfolded': m, 'limit': bn_deleted(m), **{k:g for k,g in folded.items() if 'verify' not in k}}
    lat = latency({k: (lambda g=g: g(x)) for k,g in run.items()}, seconds, max_rounds=2000)
    for k in run: rows.setdefault(k, {}).update(latency_ms=1e3*median(lat[k]), over_limit=ratio(lat, k, 'limit'), speedup=ratio(lat, 'unfolded', k))
    return dict(rounds_fold=len(fold['one forward pass']), rounds_latency=len(lat['unfolded']), rows=rows, missing=missing)

@call_parse
def main(
    arch:str='resnet50,vgg16_bn',            # torchvision networks, separated by commas
    seconds:float=30,                        # Time for each of the two measurements of each network
    out:str='benchmarks/results/fold.json'   # Where the figures go
):
    "Time to fold, and latency after folding"
    res = {}
    for a in progress_bar(arch.split(',')): res[a] = bench(a, seconds)
    out = Path(out); out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(dict(machine=machine(), image=224, batch=1, networks=res), indent=1))
    f = lambda v, p: '' if v is None else format(v, p)
    for a,r in res.items():
        print(f"\n{a}: one 224x224 image, {r['rounds_latency']} interleaved rounds (folding: {r['rounds_fold']})")
        print(text_table(['', 'time to fold, s', 'in forward passes', 'max_err', 'BNs left', 'latency, ms', 'over the limit', 'speed-up'],
              [[k, f(v.get('fold_seconds'),'.2f'), f(v.get('fold_in_forwards'),'.1f'), f(v.get('max_err'),'.1e'), f(v.get('bn_left'),'d'),
                f(v.get('latency_ms'),'.2f'), f(v.get('over_limit'),'.3f'), f(v.get('speedup'),'.3f')] for k,v in r['rows'].items()]))
        print(f"fold_graph takes {r['rows']['fold_graph']['over_fold']:.2f} times as long as fold, both with proof")
        for k in r['missing']: print(f'{k}: not installed')
    print(f'\nAll figures: {out}')
