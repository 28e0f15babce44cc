"""Are planning and proof linear? Seconds, and per edge of the program (a `cat` of n values has n): python benchmarks/planning.py

Networks of the same kind in several depths, sums of n convolutions, with and without a summand that stops the map, and of n convolutions with a BN each.
A plan asks no data, so it is timed alone: the median of a few runs in turn, on one thread, of which the processor time counts (others may use the machine). `ratio` is the time per edge over that of the smallest of its kind.
Of sums the whole fold, proved, is timed, too: of the module, and of its export."""
import json, statistics, time
from pathlib import Path
import torch, torch.nn.functional as F, torchvision
from torch import nn
from fastcore.script import call_parse
from fastai_bnfold.fold import BNFolder
from fastai_bnfold.fold.plan import make_plan
from fastai_bnfold.fold.program import program_of
from fastai_bnfold.fold.report import text_table
from fastai_bnfold.fold.testing import randomize_bn
from fastai_bnfold.lab.command import machine

class Sum(nn.Module):
    "A BN behind the sum of `n` convolutions, and of a value that lets no map pass if `gated`"
    def __init__(self, n, gated):
        super().__init__()
        self.layers,self.bn,self.gated = nn.ModuleList(nn.Conv2d(4,4,3,padding=1) for _ in range(n)),nn.BatchNorm2d(4),gated
    def forward(self, x):
        values = [layer(x) for layer in self.layers]
        if self.gated: values.append(F.avg_pool2d(x, 3, 1, 1))
        return self.bn(sum(values)).tanh()

class Branches(nn.Module):
    "The sum of `n` convolutions, each with a BN of its own"
    def __init__(self, n):
        super().__init__()
        self.layers,self.bns = nn.ModuleList(nn.Conv2d(4,4,3,padding=1) for _ in range(n)),nn.ModuleList(nn.BatchNorm2d(4) for _ in range(n))
    def forward(self, x): return sum(bn(layer(x)) for layer,bn in zip(self.layers, self.bns))

def networks():
    "`(kind, name, function that makes it, input size)`"
    for name in ('resnet50','resnet101','resnet152','densenet121','densenet169','densenet201'):
        kind = 'ResNet' if name.startswith('resnet') else 'DenseNet'
        yield kind, name, lambda name=name: torchvision.models.get_model(name, weights=None, num_classes=10), 64
    for gated in (False, True):
        for n in (8,16,32,64,128): yield f"sum{' and a gate' if gated else ''}", f'{n} convolutions', lambda n=n, gated=gated: Sum(n, gated), 8
    for n in (8,16,32,64,128): yield 'sum of BNs', f'{n} convolutions', lambda n=n: Branches(n), 8

def seconds_of(f):
    begin = time.process_time()
    f()
    return time.process_time()-begin

def proved(model, x, rounds):
    "Median seconds of a fold with proof, of the module and of its export"
    with torch.no_grad(): ep = torch.export.export(model, (x,))
    both = [(seconds_of(lambda: BNFolder().fold(model, x)), seconds_of(lambda: BNFolder().fold_graph(ep))) for _ in range(rounds)]
    return tuple(map(statistics.median, zip(*both)))

def measured(program, model, rounds):
    "Median seconds of a plan"
    times = []
    for _ in range(rounds):
        begin = time.process_time()
        plan = make_plan(program, model=model)
        times.append(time.process_time()-begin)
    return statistics.median(times), plan

@call_parse
def main(
    rounds:int=3,                                  # Plans of each network
    out:str='benchmarks/results/planning.json'     # Where the figures go; '' for nowhere
):
    "Time plans, and print a table"
    torch.set_num_threads(1)
    rows,first = [],{}
    for kind,name,make,size in networks():
        model = randomize_bn(make()).eval()
        x = torch.randn(1, 4 if kind.startswith('sum') else 3, size, size)
        program = program_of(model, (x,))
        n_nodes = sum(len(node.all_input_nodes) for node in program.nodes)
        seconds,plan = measured(program, model, rounds)
        first.setdefault(kind, seconds/n_nodes)
        fold,graph = proved(model, x, rounds) if kind.startswith('sum') else (None,None)
        rows.append(dict(fold=fold, fold_graph=graph, kind=kind, name=name, nodes=n_nodes, bns=plan.n_bn, folded=plan.n_folded, seconds=seconds, per_node_ms=seconds/n_nodes*1e3, ratio=seconds/n_nodes/first[kind]))
        print(rows[-1], flush=True)
    head = ['','network','edges','BNs','folded','seconds','ms per edge','ratio','fold','fold_graph']
    def short(seconds): return '' if seconds is None else f'{seconds:.2f}'
    print(text_table(head, [[r['kind'], r['name'], r['nodes'], r['bns'], r['folded'], f"{r['seconds']:.3f}", f"{r['per_node_ms']:.2f}", f"{r['ratio']:.2f}", short(r['fold']), short(r['fold_graph'])] for r in rows], left=2))
    if out: Path(out).write_text(json.dumps(dict(machine=machine(), rows=rows), indent=1)+'\n')
