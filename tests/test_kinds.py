"""Kinds of faults that were found from outside: wrong in silence, a crash, a refusal, a BN kept though foldable, a fold that hangs.
Each kind has a case and variations; a fold is compared with the unfolded model on the example and on inputs that the fold has not seen"""
import time
from collections import namedtuple
from types import SimpleNamespace
import pytest, torch, torch.nn.functional as F
from torch import nn
from torch.export import Dim, export
from fastai_bnfold.fold import *
from fastai_bnfold.fold.inputs import run
from fastai_bnfold.fold.plan import make_plan
from fastai_bnfold.fold.program import program_of
from fastai_bnfold.fold.verify import max_err
from conftest import snapshot, unchanged

x = torch.randn(2,3,8,8, generator=torch.Generator().manual_seed(1)).double()

class Net(nn.Module):
    "Layers by keyword, and a forward"
    def __init__(self, forward, **layers):
        super().__init__()
        self.f = forward
        for name,layer in layers.items(): setattr(self, name, layer)
        randomize_bn(self).double().eval()
    def forward(self, *args): return self.f(self, *args)

def conv(i=3, o=8, k=3, **kw): return nn.Conv2d(i, o, k, **kw)
def bn(n=8): return nn.BatchNorm2d(n)

def folded(net, *args, others=(), **kw):
    "The report of a fold, whose result is right on `args` and on the `others`"
    folder = BNFolder(**kw)
    new = folder.fold(net, args)
    for given in (args, *others): assert max_err(run(net, given), run(new, given))<1e-9
    return folder.report

# --- wrong in silence ------------------------------------------------------------------------------

class InAList(nn.Module):
    "Layers that are registered, and run from a plain list"
    def __init__(self, n, kind=list):
        super().__init__()
        self.mods = nn.ModuleList()
        for i in range(n): self.mods.extend([conv(8 if i else 3, 8, padding=1), bn()])
        self.order = kind(self.mods)
        randomize_bn(self).double()
    def forward(self, x):
        for layer in self.order: x = layer(x)
        return x

@pytest.mark.parametrize('training', [False,True])
@pytest.mark.parametrize('inplace', [False,True])
@pytest.mark.parametrize('kind', [list, tuple])
def test_layers_that_run_from_a_list(kind, inplace, training):
    net = InAList(2, kind).train(training)
    kept,before = snapshot(net),run(net, (x,))
    folder = BNFolder()
    new = folder.fold(net, x, inplace=inplace)
    assert max_err(before, run(new, (x,)))<1e-9 and unchanged(net, kept)
    assert folder.report.n_folded==0 and all('plain list' in row.reason and row.kind=='proof failed' for row in folder.report.rows)

def test_a_bn_in_a_list_alone():
    "Not registered at all: it runs in training mode, and its statistics are the model's own business"
    net = Net(lambda m,x: m.hidden[0](m.c(x)), c=conv())
    net.hidden = [bn().double()]
    state = [b.clone() for b in net.hidden[0].buffers()]
    folded(net, x)
    assert all(torch.equal(a, b) for a,b in zip(state, net.hidden[0].buffers()))

sizes = {
    'a number made of the size': lambda m,x: m.b(m.c(x)/x.shape[-1]),
    'a number made of both sizes': lambda m,x: m.b(m.c(x)*(x.shape[-1]-x.shape[-2]/2)),
    'a shift made of the size': lambda m,x: m.d(m.b(m.c(x).sin())*x.shape[-2]),
    'padded if odd': lambda m,x: m.d(F.pad(y, (0,1,0,1)) if (y := m.b(m.c(x).sigmoid())).shape[-1]%2 else y),
    'a branch': lambda m,x: m.b(m.c(x)) if x.shape[-1]%2==0 else m.c(x),
    'a loop': lambda m,x: [y := m.b(m.c(x)) for _ in range(x.shape[-1]//8)] and y,
}
@pytest.mark.parametrize('name', sizes)
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
def test_where_the_image_size_decides(name, dtype):
    net = Net(sizes[name], c=conv(k=1), b=bn(), d=conv(8, 8, 2, stride=2)).to(dtype)
    folder = BNFolder()
    new = folder.fold(net, x.to(dtype))
    for size in (8,11,12):
        other = torch.randn(2,3,size,size).to(dtype)
        try: before = run(net, (other,))
        except TraceError: continue
        assert max_err(before, run(new, (other,)))<=(1e-9 if dtype==torch.float64 else 1e-4 if dtype==torch.float32 else .05), size

def test_where_the_image_size_decides_in_a_graph():
    for name in ('a number made of the size','a shift made of the size'):
        net = Net(sizes[name], c=conv(k=1), b=bn(), d=conv(8, 8, 2, stride=2))
        with torch.no_grad(): ep = export(net, (x,), dynamic_shapes=(({0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO},),))
        new = BNFolder().fold_graph(ep)
        other = torch.randn(3,3,11,14).double()
        with torch.no_grad(): assert max_err([net(other)], [new.module()(other)])<1e-9

arguments = {
    'a number': (lambda m,x,k: m.b(m.c(x)*k), .5),
    'a flag': (lambda m,x,k: m.b(m.c(x)) if k else m.c(x), True),
    'which BN': (lambda m,x,k: m[f'b{k}'](m.c(x)) if False else (m.b if k==0 else m.b2)(m.c(x)), 0),
    'a tensor in an object': (lambda m,x,k: m.b(m.c(x)+k.style), SimpleNamespace(style=torch.randn(1,8,1,1))),
    'a key in a list': (lambda m,x,k: m.b(m.c(x)) if k[0]=='a' else m.c(x), ['a']),
    'None': (lambda m,x,k: m.b(m.c(x)) if k is None else m.c(x), None),
}
@pytest.mark.parametrize('name', arguments)
def test_arguments_that_are_no_tensors_are_said_to_be_constants(name):
    forward,k = arguments[name]
    report = folded(Net(forward, c=conv(k=1), b=bn(), b2=bn()), x, k)
    assert any('Taken as constants' in note and 'argument 2' in note for note in report.notes)

class Single(nn.Module):
    "Another way for single items"
    def __init__(self, n=8): super().__init__(); self.cs,self.bs = nn.ModuleList(conv(8,8,padding=1) for _ in range(n)),nn.ModuleList(bn() for _ in range(n))
    def forward(self, x):
        for c,b in zip(self.cs, self.bs): x = x + (c(x) if len(x)==1 else b(c(x))).relu()
        return x

@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_half_precision_hides_nothing(dtype):
    net,given = randomize_bn(Single()).to(dtype).eval(),torch.randn(2,8,9,9).to(dtype)
    folder = BNFolder(); folder.fold(net, given)
    assert folder.report.n_folded==0 and 'another way for another input' in folder.report.rows[0].reason
    data = Net(lambda m,x: m.b(m.after(m.c(x))), c=conv(), b=bn()).to(dtype)
    data.after = lambda y: (y.data.mul_(1.3), y)[1]
    with pytest.raises(TraceError, match='not what PyTorch'): BNFolder().fold(data, x.to(dtype))

class Slots:
    __slots__ = ('y',)
    def __init__(self, y): self.y = y
outs = {'tensor': lambda y: y, 'numpy': lambda y: y.numpy(), 'list': lambda y: y.tolist(), '__slots__': Slots, 'numbers': lambda y: {'mean': y.mean().item()}}
@pytest.mark.parametrize('name', outs)
def test_outputs_of_all_kinds_are_compared(name):
    net = Net(lambda m,x: outs[name](m.b(m.c(x)) if len(x)>1 else m.c(x)), c=conv(), b=bn())
    folder = BNFolder(); folder.fold(net, x)
    assert folder.report.n_folded==0 and 'another way' in folder.report.rows[0].reason
    report = folded(Net(lambda m,x: outs[name](m.b(m.c(x))), c=conv(), b=bn()), x)
    assert report.n_folded==1 or name!='tensor'

def test_nothing_to_compare_is_said():
    net = Net(lambda m,x: (m.b(m.c(x)), None)[1], c=conv(), b=bn())
    folder = BNFolder(); folder.fold(net, x)
    assert folder.report.max_err is None and any('no numbers' in note for note in folder.report.notes)
    folder = BNFolder(); folder.fold(Net(lambda m,x: m.b(m.c(x)), c=conv(), b=bn()), x[:0])
    assert folder.report.max_err is None and any('empty' in note for note in folder.report.notes) and 'not verified' in str(folder.report)

class Shift(nn.Module):
    def __init__(self, *shape): super().__init__(); self.k = nn.Parameter(torch.randn(*shape))
    def forward(self, x): return x+self.k
@pytest.mark.parametrize('shape', [(1,8,1,1), (8,1,1)])
@pytest.mark.parametrize('verify', [True,False])
def test_a_constant_that_took_a_map_in_is_another(shape, verify):
    "The BN changes the shift, the shift is folded afterwards: with its new value"
    net = Net(lambda m,x: m.d(m.b(m.sh(m.c(x)*m.e(x).sigmoid()))+m.z(x).tanh()), c=conv(), e=conv(), z=conv(), sh=Shift(*shape), b=nn.BatchNorm2d(8,affine=False), d=conv(8,4,1))
    assert folded(net, x, verify=verify).n_folded==1

@pytest.mark.parametrize('verify', [True,False])
def test_indices_of_a_maximum(verify):
    forward = lambda m,x: (lambda y,i: (m.d(y), i))(*F.max_pool2d(m.b(m.c(x).tanh()), 2, return_indices=True))
    backward = lambda m,x: (lambda y,i: F.max_unpool2d(m.b(y), i, 2))(*F.max_pool2d(m.c(x), 2, return_indices=True))
    for f,scale,n in ((forward,0.,0), (backward,0.,0), (forward,1.,1), (backward,1.,1)):
        net = Net(f, c=conv(), b=bn(), d=conv(8,4,1))
        net.b.weight.data.abs_().add_(.1); net.b.weight.data[:4] *= scale
        assert folded(net, torch.randn(2,3,10,10).double(), verify=verify).n_folded==n

# --- crashes ---------------------------------------------------------------------------------------

picks = {
    'last valid token': (lambda h,n: h[torch.arange(len(h)), n-1], torch.tensor([2,5,1])),
    'mask': (lambda h,k: h[k], torch.rand(3,5)>.5),
    'index_select': (lambda h,i: h.index_select(1, i)[:,0], torch.tensor([3])),
    'repeat_interleave': (lambda h,n: h[:,0].repeat_interleave(n, 0), torch.tensor([1,0,2])),
    'gather': (lambda h,i: h.gather(1, i[:,None,None].expand(-1,1,8))[:,0], torch.tensor([0,4,2])),
}
@pytest.mark.parametrize('name', picks)
def test_indices_from_the_data(name):
    pick,index = picks[name]
    net = Net(lambda m,x,i: m.b2(m.l2(m.b(pick(m.l(x), i)))), l=nn.Linear(6,8), b=nn.BatchNorm1d(8), l2=nn.Linear(8,8), b2=nn.BatchNorm1d(8))
    assert folded(net, torch.randn(3,5,6).double(), index).n_folded==2

positions = {
    'a parameter of the model': lambda: Net(lambda m,x: m.b(m.c(x)+m.k), c=conv(), b=bn(), k=nn.Parameter(torch.randn(1,8,6,6))),
    'a module': lambda: Net(lambda m,x: m.b(m.sh(m.c(x))), c=conv(), b=bn(), sh=Shift(1,8,6,6)),
    'expanded': lambda: Net(lambda m,x: m.b(m.c(x)+m.k.expand(len(x),-1,6,6)), c=conv(), b=bn(), k=nn.Parameter(torch.randn(1,8,1,1))),
    'a view': lambda: Net(lambda m,x: m.b(m.c(x)+m.k.t().reshape(8,6,6)), c=conv(), b=bn(), k=nn.Parameter(torch.randn(36,8))),
}
@pytest.mark.parametrize('name', positions)
def test_position_embeddings(name):
    net = positions[name]()
    assert folded(net, x).n_folded==1
    with torch.no_grad(): ep = export(net, (x,))
    folder = BNFolder(); new = folder.fold_graph(ep)
    with torch.no_grad(): assert folder.report.n_folded==1 and max_err([net(x)], [new.module()(x)])<1e-9

class Add(nn.Module):
    def forward(self, x, y): return (x+y).relu()
def test_a_module_named_like_an_op():
    for name in ('add','conv2d','relu'):
        net = Net(lambda m,x: getattr(m, name)(x, m.b(m.c(x)))+1, c=conv(3,3,1), b=bn(3), **{name: Add()})
        with torch.no_grad(): ep = export(net, (x,))
        folder = BNFolder(); new = folder.fold_graph(ep)
        with torch.no_grad(): assert folder.report.n_folded==1 and max_err([net(x)], [new.module()(x)])<1e-9

class Out(dict):
    def __getattr__(self, k): return self[k]
class Pair(tuple): pass
class Many(list): pass
Point = namedtuple('Point', 'y rest')
def itself(y):
    out = Many([y]); out.append(out)
    return out
@pytest.mark.parametrize('out', [lambda y: Out(logits=y), lambda y: Pair([y]), lambda y: Many([y]), lambda y: Point(y, [y]), itself], ids=['dict','tuple','list','namedtuple','itself'])
def test_subclasses_as_outputs_and_inputs(out):
    assert folded(Net(lambda m,x: out(m.b(m.c(x))), c=conv(), b=bn()), x).n_folded==1
    net = Net(lambda m,p: m.b(m.c(p[0]))+m.b2(m.c2(p[1])), c=conv(), b=bn(), c2=conv(), b2=bn())
    folder = BNFolder(); folder.fold(net, Pair([x, x+1]))
    assert folder.report.n_folded==1+1

@pytest.mark.parametrize('given,word', [(torch.eye(3).to_sparse(), 'sparse'), (torch.quantize_per_tensor(torch.ones(2,3,8,8), .1, 0, torch.quint8), 'quantized'),
                                        (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), 'nested')], ids=['sparse','quantized','nested'])
@pytest.mark.filterwarnings('ignore')
def test_tensors_that_are_not_dense(given, word):
    with pytest.raises(TraceError, match=word): BNFolder().fold(Net(lambda m,x: m.b(m.c(x)), c=conv(), b=bn()), given)

# --- refused, kept, slow ---------------------------------------------------------------------------

@pytest.mark.parametrize('size', [1,2])
@pytest.mark.parametrize('decomposed', [False,True])
def test_exports_of_one_batch_size(size, decomposed):
    net = Net(lambda m,x: m.fc(m.b(m.c(x)).relu().flatten(1)), c=conv(), b=bn(), fc=nn.Linear(8*36,3))
    given = torch.randn(size,3,8,8).double()
    with torch.no_grad(): ep = export(net, (given,))
    folder = BNFolder(); new = folder.fold_graph(ep.run_decompositions() if decomposed else ep)
    with torch.no_grad(): assert folder.report.n_folded==1 and max_err([net(given)], [new.module()(given)])<1e-9

reads = {'its dtype': lambda m: m.b.weight.dtype, 'its device and dtype': lambda m: m.b.running_mean.dtype}
@pytest.mark.parametrize('name', reads)
def test_one_bn_that_cannot_go_leaves_the_others(name):
    body = [layer for _ in range(6) for layer in (conv(3,3,1), bn(3), nn.ReLU())]
    net = Net(lambda m,x: m.b(m.c(m.body(x.to(reads[name](m))))), body=nn.Sequential(*body), c=conv(3,8,1), b=bn())
    report = folded(net, x)
    assert report.n_folded==6 and [row.bn for row in report.kept]==['b'] and report.kept[0].kind=='proof failed'

biases = {
    'x @ W + b': lambda: Net(lambda m,x: m.b(x@m.w+m.k), w=nn.Parameter(torch.randn(8,5)), k=nn.Parameter(torch.randn(5)), b=nn.BatchNorm1d(5)),
    'addmm': lambda: Net(lambda m,x: m.b(torch.addmm(m.k, x, m.w)), w=nn.Parameter(torch.randn(8,5)), k=nn.Parameter(torch.randn(5)), b=nn.BatchNorm1d(5)),
    'a module behind a gate': lambda: Net(lambda m,x: m.b(m.bias(m.a(x)*m.g(x).sigmoid())), a=nn.Linear(8,5), g=nn.Linear(8,5), bias=Shift(5), b=nn.BatchNorm1d(5)),
}
@pytest.mark.parametrize('name', biases)
def test_a_bias_as_an_operation_of_its_own(name):
    net,given = biases[name](),torch.randn(4,8).double()
    assert folded(net, given).n_folded==1
    with torch.no_grad(): ep = export(net, (given,))
    folder = BNFolder(); new = folder.fold_graph(ep)
    with torch.no_grad(): assert folder.report.n_folded==1 and max_err([net(given)], [new.module()(given)])<1e-9

def encoder(): return nn.Sequential(conv(bias=False), bn(), nn.ReLU(), conv(8,8), nn.ReLU(), bn(), conv(8,4))
siamese = {
    'two calls': (lambda m,a,b: torch.cat([m.e(a), m.e(b)], 1), 2),
    'three calls': (lambda m,a,b: m.e(a)-m.e(b)+m.e(a*b), 2),
    'a loop': (lambda m,a,b: sum(m.e(o).sin() for o in (a,b)), 2),
    'the second time without its BN': (lambda m,a,b: m.e(a)-m.e[3:](m.e[2](m.e[0](b))), 1),
}
@pytest.mark.parametrize('name', siamese)
def test_an_encoder_that_is_called_several_times(name):
    forward,n = siamese[name]
    report = folded(Net(forward, e=encoder()), x, x+1, others=[(torch.randn(1,3,9,9).double(), torch.randn(1,3,9,9).double())])
    assert (report.n_folded, report.n_bn)==(n,2), str(report)
    if n<2: assert report.kept[0].kind.split(' / ')[0]=='shared weight'

moves = {'rot90': lambda y: torch.rot90(y, 1, (2,3)), 'diagonal': lambda y: y.diagonal(dim1=2, dim2=3), 'roll': lambda y: y.roll((1,2), (2,3)), 'moveaxis': lambda y: y.moveaxis(1, 3).moveaxis(3, 1),
         'take_along_dim': lambda y: torch.take_along_dim(y, torch.tensor([[[[1],[0],[2]]]]), 2), 'fftshift': lambda y: torch.fft.fftshift(y, (2,3)), 'rot90 twice': lambda y: torch.rot90(y, 2, (2,3))}
@pytest.mark.parametrize('name', moves)
def test_movements_of_every_kind(name):
    nd = moves[name](torch.randn(1,8,6,6)).ndim
    norm = nn.BatchNorm2d if nd==4 else nn.BatchNorm1d
    assert folded(Net(lambda m,x: m.b(moves[name](m.c(x))).sin(), c=conv(), b=norm(8)), x).n_folded==1

@pytest.mark.parametrize('name', ['abs','sort','cummax','round','hardshrink'])
def test_what_only_looks_like_a_movement(name):
    f = {'abs': torch.abs, 'sort': lambda y: y.sort(2)[0], 'cummax': lambda y: y.cummax(2)[0], 'round': torch.round, 'hardshrink': lambda y: F.hardshrink(y, 1e-9)}[name]
    assert folded(Net(lambda m,x: m.b(f(m.c(x))).sin(), c=conv(), b=bn()), x).n_folded==0

def gated(n): return Net(lambda m,x: m.b(sum([F.avg_pool2d(x,3,1,1), *(layer(x) for layer in m.ops)])).tanh(), ops=nn.ModuleList(conv(4,4,padding=1) for _ in range(n-1)), b=bn(4))
def many(n): return Net(lambda m,x: m.b(sum(layer(x) for layer in m.ops)).tanh(), ops=nn.ModuleList(conv(4,4,padding=1) for _ in range(n)), b=bn(4))
@pytest.mark.parametrize('make,n_folded', [(gated,0), (many,1)])
def test_a_sum_of_64(make, n_folded):
    net,given = make(64),torch.randn(2,4,8,8).double()
    begin = time.perf_counter()
    assert folded(net, given).n_folded==n_folded
    assert time.perf_counter()-begin<20 # (3 s on a quiet machine: `benchmarks/planning.py`)

# --- planner and graph -----------------------------------------------------------------------------

def test_a_plan_is_a_function_of_the_program():
    net = randomize_bn(nn.Sequential(conv(), bn(), nn.ReLU(inplace=True), conv(8,4), bn(4), nn.ReLU(), bn(4)))
    program = program_of(net, (x.float(),))
    first = make_plan(program)
    second = make_plan(program)
    assert first==second and first is not second and first.n_folded==3

@pytest.mark.parametrize('sizes', [({0: Dim('b', min=4, max=32)},), ({0: Dim('b', min=4, max=32), 2: Dim('h', min=6, max=64)},)])
def test_dynamic_shapes_keep_their_bounds(sizes):
    net = randomize_bn(nn.Sequential(conv(), bn(), nn.ReLU())).eval()
    with torch.no_grad(): ep = export(net, (torch.randn(5,3,8,8),), dynamic_shapes=sizes)
    folder = BNFolder(); new = folder.fold_graph(ep)
    assert folder.report.n_folded==1 and {str(v) for v in new.range_constraints.values()}=={str(v) for v in ep.range_constraints.values()}
    for n in (4,32): new.module()(torch.randn(n,3,8,8))
    for n in (2,40):
        with pytest.raises(Exception): new.module()(torch.randn(n,3,8,8))

def test_a_rule_that_fails_keeps_a_bn(monkeypatch):
    from fastai_bnfold.fold.rules.registry import backward_rules
    def broken(view, node, amap): raise ZeroDivisionError('oops')
    monkeypatch.setitem(backward_rules, torch.ops.aten.conv2d, broken)
    net = Net(lambda m,x: m.d(m.b(m.c(x))), c=conv(), b=bn(), d=nn.Conv2d(8,3,3,padding=1))
    [row] = folded(net, x).rows
    assert 'whose rule failed (ZeroDivisionError: oops)' in row.reason and row.kind.startswith('rule failed')

def test_reasons_have_kinds():
    net = Net(lambda m,x: m.b2(m.c2(m.b(F.relu(m.c(x))).sin()).sin()), c=conv(), b=bn(), c2=conv(8,8), b2=bn())
    report = folded(net, x)
    counts = report.to_df().groupby('kind').size()
    assert counts.to_dict()=={'bare function / no rule': 1, 'no rule / input or output': 1}
    assert [row.in_graph for row in report.rows]==[True,False] and report.n_in_graph==1 and '1 of those that stay would go in an exported graph' in str(report)

def test_a_cache_that_the_first_run_fills():
    "LeViT keeps its attention biases: the first run does more than the others"
    def forward(m, x):
        if not m.cache: m.cache.append(m.k.exp())
        return m.b(m.c(x))+m.cache[0]
    net = Net(forward, c=conv(), b=bn(), k=nn.Parameter(torch.zeros(8,1,1)))
    net.cache = []
    assert folded(net, x).n_folded==1
    net.cache = []
    folder = BNFolder(); folder.fold(net, x, inplace=True)
    assert folder.report.n_folded==1


class Cut(nn.Module):
    "A parameter of which `forward` reads as much as the input is large"
    def __init__(self, layer, bn, size, cut): super().__init__(); self.layer,self.bn,self.pos,self.cut = layer,bn,nn.Parameter(torch.randn(size)),cut
    def forward(self, x): return self.bn(self.layer(x)+self.cut(self.pos, x))

parts_read = {'an image': (nn.Conv2d(3,8,1), nn.BatchNorm2d(8), (1,8,16,16), lambda pos,x: pos[...,:x.shape[2],:x.shape[3]], (2,3,8,8), (3,3,12,10)),
    'a sequence': (nn.Conv1d(3,8,1), nn.BatchNorm1d(8), (1,8,32), lambda pos,x: pos[...,:x.shape[2]], (2,3,9), (2,3,20)),
    'the batch': (nn.Conv2d(3,8,1), nn.BatchNorm2d(8), (8,8,1,1), lambda pos,x: pos[:len(x)], (2,3,8,8), (5,3,8,8))}

@pytest.mark.parametrize('case', parts_read.values(), ids=parts_read)
def test_a_parameter_that_is_read_in_part(case):
    *parts,given,other = case
    net = randomize_bn(Cut(*parts)).double().eval()
    rng = torch.get_rng_state()
    folder = BNFolder(); new = folder.fold(net, torch.ones(given).double())
    assert torch.equal(rng, torch.get_rng_state()) and folder.report.n_folded==1
    with torch.no_grad():
        x = torch.randn(other).double()
        assert max_err([net(x)], [new(x)])<1e-12

class Sized(nn.Module):
    "A number made of the size"
    def __init__(self, f, layer, bn): super().__init__(); self.f,self.layer,self.bn = f,layer,bn
    def forward(self, x): return self.f(self, x)

sized = {'a sequence': (lambda m,x: m.bn(m.layer(x)/x.shape[-1]), nn.Conv1d(3,8,1), nn.BatchNorm1d(8), torch.randn(2,3,9).double()),
    'frames': (lambda m,x: m.bn(m.layer(x)/x.shape[2]), nn.Conv3d(3,8,1), nn.BatchNorm3d(8), torch.randn(2,3,4,6,6).double()),
    'the aspect': (lambda m,x: m.bn(m.layer(x)*(x.shape[-1]/x.shape[-2])), nn.Conv2d(3,8,1), nn.BatchNorm2d(8), torch.randn(2,3,8,8).double()),
    'only when large': (lambda m,x: m.bn(m.layer(x)) if x.shape[-1]<=9 else m.layer(x), nn.Conv2d(3,8,1), nn.BatchNorm2d(8), torch.randn(2,3,8,8).double()),
    'whole numbers': (lambda m,x: m.bn(m.layer(x.double())*x.shape[-1]), nn.Conv2d(3,8,1), nn.BatchNorm2d(8), torch.randint(0, 255, (2,3,8,8)))}

@pytest.mark.parametrize('case', sized.values(), ids=sized)
def test_a_size_that_decides(case):
    *parts,x = case
    folder = BNFolder(); folder.fold(randomize_bn(Sized(*parts)).double().eval(), x)
    assert [row.kind for row in folder.report.rows]==['proof failed'] and folder.report.max_err==0

def view_written(m, x):
    h = x.sin(); a = m.layer(h); h[:,:4].mul_(2)
    return a+h
def view_read(m, x):
    h = x.sin(); v = h[:,:4]; h += m.layer(h)
    return torch.cat([v, h], 1)
def input_written(m, x):
    x += m.layer(x)
    return x
def converted(m, x): return m.layer(x.double())+x

@pytest.mark.parametrize('f', [view_written, view_read, input_written, converted])
def test_branches_that_must_not_be_merged(f):
    net,x = Sized(f, nn.Conv2d(8,8,3,padding=1).double(), None).eval(),torch.randn(2,8,8,8)
    if f is not converted: x = x.double()
    with torch.no_grad():
        ep = torch.export.export(net, (x,)); new = BNFolder().fold_graph(ep)
        before,after = x.clone(),x.clone()
        assert torch.equal(ep.module()(before), new.module()(after)) and torch.equal(before, after)

@pytest.mark.parametrize('act', [nn.ReLU(), nn.ReLU6(), nn.Hardtanh()], ids=lambda act: type(act).__name__)
def test_a_decomposed_program_stays_functional(act):
    net,x = randomize_bn(nn.Sequential(nn.Conv2d(3,8,3), act, nn.BatchNorm2d(8))).double().eval(),torch.randn(2,3,8,8).double()
    with torch.no_grad():
        ep = export(net, (x,)).run_decompositions()
        folder = BNFolder(); new = folder.fold_graph(ep)
        assert folder.report.n_folded==1 and max_err([net(x)], [new.module()(x)])<1e-12
