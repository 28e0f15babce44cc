"""BN as a fixed-point operation, layer by layer, for networks trained on ImageNette, at 2, 4 and 8 bits.

    python benchmarks/fixed_point.py [--data imagenette] [--weights nbs/tutorials/models] [--arch resnet50,vgg16_bn] [--out benchmarks/results/fixed_point.json]

The networks of `nbs/tutorials/01_imagenette.ipynb` (96 px; trained now where the folder has no weights). For every BN: the smallest shift and the bits of
A, B and the accumulator, the same for plain rounding and for a 32-bit multiplier, and how many of all possible inputs (every integer of the
accumulator's range, every channel) float32 evaluation of the folded BN, `floor(a·x + b)`, gets wrong. Then the integer network end to end: are its
predictions those of the same network with exact arithmetic?
"""
import json, time
from pathlib import Path
import numpy as np
from fastai.vision.all import *
from fastcore.script import call_parse
from fastai_bnfold.all import *
from fastai_bnfold.learner.training import subset_dl
from fastai_bnfold.lab.command import machine
from fastai_bnfold.lab.data import get_dls
from fastai_bnfold.lab.training import train
from fastai_bnfold.integer.staircase import first_true, unbounded
from fastai_bnfold.integer.task import from_left, task_of
from fastai_bnfold.fold.testing import randomize_bn
from fastai_bnfold.fold.report import text_table

def float32_wrong(*args):
    "How many inputs float32 gets wrong, and how many there are, over all channels"
    task = task_of(*args)
    p,lo,hi,_ = from_left(task.params, task.lo, task.hi)
    lo,past = lo[:,None],hi[:,None]+1
    exact = np.where(task.stairs.l<unbounded, task.stairs.l, past)
    inv = (1/np.sqrt((p.var+p.eps).astype(np.float32))).astype(np.float32)
    numbers = (p.weight, p.bias, p.mean, p.in_scale, p.out_scale)
    weight,bias,mean,in_scale,out_scale = (np.asarray(v, np.float32) for v in numbers)
    a32 = (weight*inv*in_scale/out_scale)[:,None]
    b32 = ((bias-weight*inv*mean)/out_scale+np.float32(.5))[:,None]
    def reached(x): return np.floor(x.astype(np.float32)*a32+b32) >= task.stairs.levels # monotone, too
    def full(v): return np.broadcast_to(v, exact.shape)
    first = first_true(reached, full(lo), full(past))
    low,high = np.minimum(exact, first),np.maximum(exact, first) # between the two thresholds the output is wrong
    before = np.maximum.accumulate(np.concatenate([lo, high[:,:-1]], 1), 1)
    wrong = np.maximum(high-np.maximum(low, before), 0)
    return int(wrong.sum()), int((task.hi-task.lo+1).sum())

def random_layers(seeds=8, octaves=6):
    "Layers of 64 random channels behind sums of 9·64 products of k-bit activations and 7-bit weights, for several scales of the input: bits, smallest shift, that of plain rounding"
    rows = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        bn = nn.BatchNorm2d(64)
        nn.init.uniform_(bn.weight, .5, 1.5); nn.init.normal_(bn.bias, 0, .5); bn.running_mean.normal_(); bn.running_var.uniform_(.5, 2)
        for bits in (2,4,8):
            top = 2**bits-1
            U,std = 9*64*top*63, (9*64 * 63**2/3 * top*(2*top+1)/6)**.5 # of sums of uniform integers
            for e in range(octaves):
                f = fixed_point_bn(bn, 2.**e/std, (-U,U), 3/top, bits).figures
                rows.append((bits, f['n'], f['plain']['n']))
    return rows

def accuracy_of(net, batches):
    "Accuracy, and the outputs"
    out = [net(x) for x,_ in batches]
    return torch.cat([(o.argmax(1)==y).float() for o,(_,y) in zip(out, batches)]).mean().item(), torch.cat(out)

def network(learn, n_end):
    "All figures of one network, by bits"
    n = len(learn.dls.valid_ds)
    batches = [(x.as_subclass(Tensor), y.as_subclass(Tensor)) for x,y in subset_dl(learn.dls.valid, list(range(0, n, n//n_end))[:n_end], 16)]
    learn.model.eval()
    with torch.no_grad(): res = {'float': dict(accuracy=accuracy_of(learn.model, batches)[0], n=n_end)}
    for bits in (2,4,8):
        t = time.perf_counter(); net = learn.integer_net(bits); t = time.perf_counter()-t
        layers = {}
        for name in net.layout.bns.values():
            b = net.bns[name]
            f = b.figures
            wrong,inputs = float32_wrong(*b.args)
            layers[name] = dict(channels=len(b.A), **{k: f[k] for k in ('n','bits_A','bits_B','accumulator','plain','multiplier')}, dtype=str(b.dtype), float32_wrong=wrong, inputs=inputs,
                                channel_n=[int(v) for v in np.percentile(f['per_channel'], (0,50,100))])
        acc,fixed = accuracy_of(net, batches)
        net.exact = True
        same = torch.equal(fixed, accuracy_of(net, batches)[1])
        res[bits] = dict(seconds=t, layers=layers, accuracy=acc, same=same)
        print(f'{bits} bits: accuracy {acc:.4f} (float {res["float"]["accuracy"]:.4f}), same as exact: {same}, {t:.0f} s', flush=True)
    return res

def summary(r):
    "One line per number of bits"
    rows = []
    for bits in ('2','4','8'):
        L = r[bits]['layers'].values()
        span = lambda f: (lambda v: f'{min(v)}-{max(v)}' if v else 'none')([x for x in map(f, L) if x is not None])
        rows.append([bits, span(lambda l: l['n']), span(lambda l: l['plain'] and l['plain']['n']), span(lambda l: l['bits_A']), span(lambda l: l['plain'] and l['plain']['bits_A']), span(lambda l: l['accumulator']),
                     f"{sum(l['multiplier']['wrong'] for l in L)} of {sum(l['channels'] for l in L):,}", f"{sum(l['float32_wrong'] for l in L):,} of {sum(l['inputs'] for l in L):.2e}", f"{r[bits]['accuracy']:.4f}", r[bits]['same']])
    return text_table(['bits','n','plain n','bits of A','plain','accumulator','32-bit multiplier: wrong channels','float32: wrong inputs','accuracy','= exact'], rows)

@call_parse
def main(
    data:str='imagenette',               # As in `bnfold reproduce`
    weights:str='nbs/tutorials/models',  # Folder of trained weights
    arch:str='resnet50,vgg16_bn',        # torchvision networks
    size:int=96,                         # Of the images, pixels
    n_end:int=128,                       # Validation images for the networks end to end
    out:str='benchmarks/results/fixed_point.json' # Where the figures go
):
    "How small can BN be in fixed point?"
    dls,res = get_dls(data, size),dict(machine=machine(), size=size, networks={})
    bn = randomize_bn(nn.BatchNorm1d(26560))
    t = time.perf_counter(); f = fixed_point_bn(bn, 1e-5, (-2**22,2**22), .02, 8)
    res['all channels of ResNet-50 at once, 8 bits'] = dict(seconds=time.perf_counter()-t, n=f.figures['n'])
    res['random layers'] = random_layers()
    for a in arch.split(','):
        print(f'\n{a}', flush=True)
        learn,_ = train(a, dls, 5, bf16=True, weights=weights)
        res['networks'][a] = json.loads(json.dumps(network(learn, n_end)))
        Path(out).write_text(json.dumps(res, indent=1))
        print(summary(res['networks'][a]))
