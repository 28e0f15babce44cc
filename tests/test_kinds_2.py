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

# --- crashes ---------------------------------------------------------------------------------------

shift = lambda: nn.Parameter(torch.randn(8,1,1))
decomposable = {'a shift behind it': (lambda m,x: m.b(m.c(x))+m.k, 1), 'a shift, forward': (lambda m,x: m.d(m.b(m.c(x).sin())+m.k), 1),
    'a second BN': (lambda m,x: m.b2(m.b(m.c(x))).sin(), 2), 'a second BN, forward': (lambda m,x: m.d(m.b2(m.b(m.c(x).sin()))), 2),
    'its own input': (lambda m,x: (lambda h: m.d((h+m.b(h))*2))(m.c(x).sin()), 1)}

@pytest.mark.parametrize('name', decomposable)
@pytest.mark.parametrize('decomposed', [False,True])
def test_what_stands_behind_a_decomposed_bn(name, decomposed):
    forward,n = decomposable[name]
    net = Net(forward, c=conv(k=1, bias=False), b=bn(), b2=bn(), d=conv(8,4,1), k=shift())
    assert folded_graph(exported(net, x, decomposed=decomposed), x).n_folded==n

def test_a_module_that_was_exported():
    net = Net(lambda m,x: m.b(m.c(x)), c=conv(), b=bn())
    [row] = folded(exported(net, x).module(), x).rows
    assert not row.folded and row.in_graph

buffers = {'sparse': torch.eye(3).to_sparse(), 'NaN, expanded': torch.full((1,), torch.nan).expand(8), 'NaN': torch.tensor([1.,torch.nan])}
@pytest.mark.parametrize('name', buffers)
def test_buffers_of_all_kinds(name):
    net = Net(lambda m,x: m.b(m.c(x)), c=conv(), b=bn())
    net.register_buffer('q', buffers[name])
    report = folded(net, x)
    assert report.n_folded==1 and net.q is buffers[name]

@pytest.mark.parametrize('write', [lambda q,x: q.resize_(len(x)+1).fill_(1), lambda q,x: q.fill_(torch.nan), lambda q,x: q.data.add_(1)])
def test_buffers_that_a_run_changes_come_back(write):
    net = Net(lambda m,x: (write(m.q, x), m.b(m.c(x)))[1], c=conv(), b=bn())
    net.register_buffer('q', torch.zeros(1))
    q = net.q
    assert folded(net, x).n_folded==1 and net.q is q and q.tolist()==[0.]

def test_an_expanded_parameter_where_rounding_is_measured():
    from fastai_bnfold.fold.verify import amplification
    net = Net(lambda m,x: m.c(x)+m.k.sum(), c=conv(), k=nn.Parameter(torch.ones(1).double().expand(5)))
    assert amplification(net, [((x,), run(net, (x,)))])<1e-12 and net.k.tolist()==[1]*5

outputs = {'sparse': lambda y: y.flatten(1).to_sparse(), 'sparse and dense': lambda y: (y, y.flatten(1).relu().to_sparse())}
@pytest.mark.parametrize('name', outputs)
def test_sparse_outputs(name):
    net = Net(lambda m,x: outputs[name](m.b(m.c(x))), c=conv(), b=bn())
    assert folded(net, x).n_folded==1

@pytest.mark.parametrize('f', [lambda y: y/0, lambda y: y*float('inf'), lambda y: y/0+y])
def test_products_with_no_number(f):
    assert folded(Net(lambda m,x: f(m.b(m.c(x).sin())).sigmoid(), c=conv(), b=bn()), x).n_folded==0

@pytest.mark.parametrize('lo,hi', [(.9,-.3), (.9,.9), (torch.tensor(1.), torch.tensor(0.))])
def test_a_lower_bound_above_the_upper(lo, hi):
    net = Net(lambda m,x: m.b(m.c(x).clamp(lo, hi)), c=conv(), b=bn())
    assert folded_graph(exported(net, x), x).n_folded==1

@pytest.mark.parametrize('parts', [lambda y: [torch.empty(0).double(), y], lambda y: [y, torch.empty(0).double(), y.sin()]])
def test_cat_with_an_empty_tensor(parts):
    net = Net(lambda m,x: m.b2(torch.cat(parts(m.c(x)), 1)), c=conv(), b2=bn(8*(len(parts(x))-1)))
    assert folded_graph(exported(net, x), x).n_folded==(len(parts(x))==2)

def test_functions_of_functions():
    net = Net(lambda m,x: m.b2(m.d(m.b(torch.vmap(lambda a: a*2)(m.c(x))).sin())), c=conv(), b=bn(), d=conv(8,8), b2=bn())
    report = folded_graph(exported(net, x), x)
    assert [row.folded for row in report.rows]==[False,True]

def test_a_bn_of_which_the_derivative_is_taken():
    net = randomize_bn(Net(lambda m,x: torch.func.jvp(lambda z: m.b(m.c(z)), (x,), (x,))[1], c=conv(), b=bn())).double()
    [row] = folded(net, x).rows
    assert not row.folded and row.kind=='does more'

# --- what a model's run changes --------------------------------------------------------------------

from conftest import snapshot, unchanged

def clamped(m, x):
    m.c.weight.data.clamp_(-.05, .05)
    return m.b(m.c(x))

writing = {'max_norm': (lambda m,i: m.b1(m.e(i).transpose(1,2)), torch.randint(0, 20, (4,7))), 'clamped': (clamped, x)}
@pytest.mark.parametrize('name', writing)
@pytest.mark.parametrize('ask', ['plan','fold'])
def test_parameters_that_forward_writes_into(name, ask):
    forward,given = writing[name]
    net = Net(forward, c=conv(), b=bn(), e=nn.Embedding(20, 8, max_norm=.5), b1=nn.BatchNorm1d(8))
    kept = snapshot(net)
    with pytest.raises(TraceError, match='writes into its own parameter'): getattr(BNFolder(), ask)(net, given)
    assert unchanged(net, kept)

def registers(m, x):
    if not hasattr(m, 'q'): m.register_buffer('q', torch.ones(8,1,1).double())
    if not hasattr(m, 'l'): m.l = nn.Identity()
    return m.l(m.b(m.c(x)*m.q))

@pytest.mark.parametrize('inplace', [False,True])
def test_what_forward_registers(inplace):
    net = Net(registers, c=conv(), b=bn())
    names = list(net.state_dict()),[name for name,_ in net.named_modules()]
    BNFolder().plan(net, x)
    assert names==(list(net.state_dict()),[name for name,_ in net.named_modules()])
    before = [registers(net, x).detach()]
    del net.q, net.l
    new = BNFolder().fold(net, x, inplace=inplace)
    assert not hasattr(new, 'q') and max_err(before, run(new, (x,)))<1e-9

def test_lazy_modules_are_refused():
    net = nn.Sequential(nn.LazyConv2d(8,3), nn.LazyBatchNorm2d()).eval()
    with pytest.raises(FoldError, match='lazy modules'): BNFolder().plan(net, x.float())
    assert isinstance(net[0], nn.LazyConv2d)

@pytest.mark.parametrize('persistent', [True,False])
def test_a_folded_program_has_its_own_buffers(persistent):
    net = Net(lambda m,x: (m.n.add_(1), m.b(m.c(x))+m.n)[1], c=conv(), b=bn())
    net.register_buffer('n', torch.zeros(()).double(), persistent=persistent)
    ep = exported(net, x)
    new = BNFolder().fold_graph(ep)
    def n_of(ep): return (ep.state_dict if persistent else ep.constants)['n']
    module = new.module()
    for _ in range(2): module(x)
    assert n_of(ep)==0 and n_of(new) is not n_of(ep)
