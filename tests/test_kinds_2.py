"""Kinds of faults that a second hostile look found. Each has the right value, and a variation; a fold is compared with the unfolded model"""
import pytest, torch, torch.nn.functional as F
from torch import nn
from torch.export import Dim, export
from fastai_bnfold.fold import *
from fastai_bnfold.fold.inputs import run
from fastai_bnfold.fold.verify import max_err
from test_kinds import Net, bn, conv, folded, x

def exported(net, *args, decomposed=False, **kw):
    with torch.no_grad(): ep = export(net, args, **kw)
    return ep.run_decompositions() if decomposed else ep

def folded_graph(ep, *args, others=(), bound=1e-9):
    "The report of a fold of an export, whose result is right on `args` and on the `others`"
    folder = BNFolder()
    new = folder.fold_graph(ep)
    with torch.no_grad():
        for given in (args, *others): assert max_err([ep.module()(*given)], [new.module()(*given)])<bound
    return folder.report

# --- graphs inside a graph -------------------------------------------------------------------------

def within(*managers):
    "A convolution and its BN inside of context managers"
    def forward(m, x):
        with managers[0]():
            if managers[1:]: return within(*managers[1:])(m, x)+1
            return m.b(m.c(x)).float()+1
    return forward

def autocast(enabled=True): return lambda: torch.autocast('cpu', dtype=torch.bfloat16, enabled=enabled)

wrapped = {'no_grad': (within(torch.no_grad), 1), 'autocast off': (within(autocast(False)), 1), 'both': (within(torch.no_grad, autocast(False)), 1),
    'both, the other way round': (within(autocast(False), torch.no_grad), 1), 'twice': (lambda m,x: within(torch.no_grad)(m, x).sin()+within(torch.no_grad)(m, x), 2),
    'autocast': (within(autocast()), 0), 'autocast in no_grad': (within(torch.no_grad, autocast()), 0), 'no autocast in autocast': (within(autocast(), autocast(False)), 0)}

@pytest.mark.parametrize('name', wrapped)
def test_what_is_wrapped_in_a_graph(name):
    forward,n = wrapped[name]
    net = Net(forward, c=conv(), b=bn()).float()
    ep = export(net, (x.float(),)) # with gradients: without, `no_grad` leaves no trace
    report = folded_graph(ep, x.float(), bound=1e-5)
    assert report.n_bn==max(1, n) and report.n_folded in (n, 0 if name=='twice' else n)
    for row in report.kept: assert row.kind=='sub-graph' and row.bn=='b' and 'run_decompositions' in row.reason or name=='twice'
    again = folded_graph(ep.run_decompositions(), x.float(), bound=.05)
    assert again.n_bn==max(1, n)

inner = {'cond': lambda m,x: torch.cond(x.sum()>0, lambda y: m.b(m.c(y)), lambda y: m.c(y)*2, (x,)),
    'both branches': lambda m,x: torch.cond(x.sum()>0, lambda y: m.b(m.c(y)), lambda y: m.b(m.c(y)*2), (x,)),
    'a part of it': lambda m,x: torch.cond(x.sum()>0, lambda y: m.b(y), lambda y: y*2, (m.c(x),))}

@pytest.mark.parametrize('name', inner)
def test_a_bn_in_a_branch_of_a_graph(name):
    net = Net(lambda m,x: m.b2(m.c2(inner[name](m, x))), c=conv(), b=bn(), c2=conv(8,4), b2=bn(4))
    report = folded_graph(exported(net, x), x)
    assert [row.bn for row in report.rows if row.folded]==['b2']
    assert [row.bn for row in report.kept]==['b']+['b_1']*(name=='both branches')
    assert all(row.kind=='sub-graph' and '`cond`' in row.reason for row in report.kept)

@pytest.mark.parametrize('branch', [lambda y: y+1, lambda y: y.relu()])
def test_cond_beside_bns_that_go(branch):
    net = Net(lambda m,x: m.b2(m.c2(torch.cond(x.sum()>0, branch, torch.sin, (m.b(m.c(x)),)))), c=conv(), b=bn(), c2=conv(8,4), b2=bn(4))
    assert folded(net, x, others=[(-x,)]).n_folded==2
    assert folded_graph(exported(net, x), x, others=[(-x,)]).n_folded==2

def test_what_the_tracer_cannot_follow_is_said():
    with pytest.raises(TraceError, match='torch.cond.*fold_graph'): BNFolder().fold(Net(inner['cond'], c=conv(), b=bn()), x)

# --- what a fold costs -----------------------------------------------------------------------------

from fastai_bnfold.fold.verify import ways_to_resize

@pytest.mark.parametrize('size,most', [(224,.35), (8,1.)])
def test_other_sizes_of_large_images_are_small(size, most):
    "But in both directions, and odd"
    image = torch.zeros(1,3,size,size)
    tried = [change((image,))[0].shape[2:] for change in ways_to_resize((image,))[0]]
    assert all(h*w<=most*size**2 and h%2 and w%2 for h,w in tried)
    assert tried[0]==tried[1][::-1] and min(tried[0])<size<max(tried[0])

def test_a_network_that_wants_large_images_is_tried_at_half_the_size():
    net = Net(lambda m,x: m.b(m.c(F.max_pool2d(x, 70))), c=conv(k=1), b=bn())
    folder = BNFolder(); folder.fold(net, torch.randn(1,3,224,224).double())
    assert folder.report.n_folded==1 and any('a size that differs the other way' in line for line in folder.report.proved)
