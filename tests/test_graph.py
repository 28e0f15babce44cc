"Graph folding: what eager folding must leave, parallel branches, and what goes in and out of an exported program"
import io, os
import pytest, torch, torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from torch import nn
from torch.export import Dim, export
from torchvision.ops import FrozenBatchNorm2d
from fastai_bnfold.all import *
from fastai_bnfold.fold.testing import randomize_bn
from fastai_bnfold.fold.verify import max_err
from fastai_bnfold.fold.inputs import tensors_of
from fastai_bnfold.fold.ops import op_name
from graphs import C, programs
from test_property import network

auto = {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}
def exported(m, *args, **kw):
    with torch.no_grad(): return export(m, args, **kw)
def folded(m, *args, **kw):
    "The folded program, the report, and the error on the arguments"
    f = BNFolder(); ep = exported(m, *args, **kw)
    new = f.fold_graph(ep)
    with torch.no_grad(): return new, f.report, max_err(tensors_of(m(*args)), tensors_of(new.module()(*args)))
def count(ep, *names): return sum(op_name(n) in names for n in ep.graph.nodes if n.op=='call_function')

class Net(nn.Module):
    "Some layers, and a forward"
    def __init__(self, forward, **layers):
        super().__init__()
        for k,l in layers.items(): setattr(self, k, l)
        self.f = forward
        randomize_bn(self); self.double().eval()
    def forward(self, x): return self.f(self, x)

def conv(i=8, o=8, k=3, **kw): return nn.Conv2d(i, o, k, **({'padding': k//2} if isinstance(k, int) else {}) | kw)
x8 = torch.randn(2,8,9,9, generator=torch.Generator().manual_seed(0)).double()

# name: (network, its BNs of which eager folding leaves some)
free = {
    'one ReLU for all': lambda: Net(lambda m,x: m.c2(m.act(m.b2(m.act(m.b1(m.act(m.c1(x))))))), c1=conv(), b1=nn.BatchNorm2d(8), b2=nn.BatchNorm2d(8), c2=conv(), act=nn.ReLU()),
    'functional ReLU': lambda: Net(lambda m,x: m.c2(F.relu(m.b2(F.relu(m.b1(torch.sigmoid(x)))))), b1=nn.BatchNorm2d(8), b2=nn.BatchNorm2d(8), c2=conv(8,8,1)),
    'functional BN': lambda: Net(lambda m,x: F.batch_norm(m.c1(x), m.b1.running_mean, m.b1.running_var, m.b1.weight, m.b1.bias, eps=1e-3), c1=conv(bias=False), b1=nn.BatchNorm2d(8)),
    'BN in a module that does more': lambda: Net(lambda m,x: m.c2(m.inner(x)), c1=conv(), c2=conv(8,8,1), inner=Net(lambda m,x: F.relu(m.b1(m.c1(x)*2)+1), c1=conv(), b1=nn.BatchNorm2d(8))),
    'the model is the BN': lambda: Net(lambda m,x: F.linear(m.b1(x.mean((2,3))), m.w), b1=nn.BatchNorm1d(8), w=nn.Parameter(torch.randn(3,8))),
    'in place': lambda: Net(lambda m,x: F.relu_(m.b2(F.relu_(m.b1(m.c1(x))))+1), c1=conv(), b1=nn.BatchNorm2d(8), b2=nn.BatchNorm2d(8)),
}
@pytest.mark.parametrize('name', free)
def test_no_module_boundaries(name):
    ep,rep,err = folded(free[name](), x8)
    n_bn = rep.n_bn
    assert count(ep, 'batch_norm', '_native_batch_norm_legit_no_training')==n_bn-rep.n_folded and err<1e-12
    assert rep.n_folded==n_bn>0, str(rep)

def test_what_stays_has_a_reason():
    ep,rep,err = folded(Net(lambda m,x: m.b1(m.act(x)), b1=nn.BatchNorm2d(8), act=nn.GELU()), x8)
    assert rep.n_folded==0 and '`act` (gelu)' in rep.kept[0].reason and "the model's output" in rep.kept[0].reason and count(ep, 'batch_norm')==1 and err==0

# name: (network, convolutions or linear layers left)
branches = {
    'RepVGG': (lambda: Net(lambda m,x: m.a(x)+m.b(x)+m.i(x), a=nn.Sequential(conv(bias=False), nn.BatchNorm2d(8)), b=nn.Sequential(conv(k=1,bias=False), nn.BatchNorm2d(8)), i=nn.BatchNorm2d(8)), 1),
    'signs, numbers, nested': (lambda: Net(lambda m,x: 2-((m.a(x)-3*m.b(x))-(x-m.c(x)/1.)), a=conv(), b=conv(k=1), c=conv(k=1)), 1),
    'multiples alone': (lambda: Net(lambda m,x: torch.relu(2*m.a(x)), a=conv()), 1),
    'alpha': (lambda: Net(lambda m,x: torch.sub(torch.add(m.a(x), m.b(x), alpha=3), x, alpha=.5), a=conv(), b=conv(k=1)), 1),
    'rsub': (lambda: Net(lambda m,x: torch.rsub(m.a(x), m.b(x), alpha=2), a=conv(), b=conv(k=1)), 1),
    'stride': (lambda: Net(lambda m,x: m.a(x)+m.b(x), a=conv(stride=2), b=conv(k=1,stride=2)), 1),
    'dilation': (lambda: Net(lambda m,x: m.a(x)+m.b(x)+m.c(x)+x, a=nn.Conv2d(8,8,3,padding=2,dilation=2), b=conv(k=1), c=nn.Conv2d(8,8,3,padding=1)), 2), # taps at other places
    'larger dilation in a 5x5': (lambda: Net(lambda m,x: m.a(x)+m.b(x), a=conv(k=5), b=conv(k=3)), 1),
    'groups into fewer': (lambda: Net(lambda m,x: m.a(x)+m.b(x)+m.c(x), a=conv(), b=conv(groups=4), c=conv(groups=8,k=1)), 1),
    'depthwise': (lambda: Net(lambda m,x: m.a(x)+m.b(x)+x, a=conv(k=7,groups=8), b=conv(groups=8)), 1),
    'a dense 1x1 in no depthwise': (lambda: Net(lambda m,x: m.a(x)+m.b(x), a=conv(groups=8), b=conv(k=1)), 2),
    'cross': (lambda: Net(lambda m,x: m.a(x)+m.b(x)+m.c(x), a=conv(k=(1,3),padding=(0,1)), b=conv(k=(3,1),padding=(1,0)), c=conv()), 1),
    'half a cross stays': (lambda: Net(lambda m,x: m.a(x)+m.b(x), a=conv(k=(1,3),padding=(0,1)), b=conv(k=(3,1),padding=(1,0))), 2),
    'other places': (lambda: Net(lambda m,x: m.a(x)+m.b(x)[...,1:-1,1:-1], a=nn.Conv2d(8,8,3), b=conv(k=1)), 2),
    'no padding': (lambda: Net(lambda m,x: m.a(x)+m.b(x), a=nn.Conv2d(8,8,3,bias=False), b=nn.Conv2d(8,8,3)), 1),
    'padding by name': (lambda: Net(lambda m,x: m.a(x)+m.b(x)+x, a=conv(padding='same'), b=conv(k=1,padding='valid')), 1),
    'other channels': (lambda: Net(lambda m,x: m.a(x)+m.b(x), a=conv(8,4), b=conv(8,4,1)), 1),
    'no identity with other channels': (lambda: Net(lambda m,x: m.a(x)+x[:,:1], a=conv()), 1),
    'broadcast': (lambda: Net(lambda m,x: m.a(x)+m.b(x)+x.mean((2,3),keepdim=True), a=conv(), b=conv(k=1)), 1),
    'one has another reader': (lambda: Net(lambda m,x: (lambda a: torch.cat([a+m.b(x), a]))(m.a(x)), a=conv(), b=conv(k=1)), 2),
    'shared weight': (lambda: Net(lambda m,x: m.a(x)+m.b(x)+m.a(x.flip(2)), a=conv(), b=conv(k=1)), 3),
    'other inputs': (lambda: Net(lambda m,x: m.a(x)+m.b(x*2), a=conv(), b=conv(k=1)), 2),
    'another layer between': (lambda: Net(lambda m,x: m.c(m.a(x)+m.b(x))+m.a2(x), a=conv(), b=conv(k=1), c=conv(), a2=conv()), 3),
    'twice': (lambda: Net(lambda m,x: m.c(y:=m.a(x)+m.b(x))+y, a=conv(), b=conv(k=1), c=conv()), 2),
    'linear': (lambda: Net(lambda m,x: m.a(x)+m.b(x)-x, a=nn.Linear(9,9,bias=False), b=nn.Linear(9,9)), 1),
    'x twice': (lambda: Net(lambda m,x: m.a(x)+x+x, a=conv()), 1),
    'x cancels': (lambda: Net(lambda m,x: m.a(x)+x-x, a=conv()), 1),
}
@pytest.mark.parametrize('name', branches)
def test_branches(name):
    make,left = branches[name]
    net = make()
    ep,rep,err = folded(net, x8, dynamic_shapes=(auto,))
    assert count(ep, 'conv2d', 'linear')==left and err<1e-12
    other = torch.randn(3,8,12,9 if name=='linear' else 7).double()
    with torch.no_grad(): assert max_err([net(other)], [ep.module()(other)])<1e-12
    if left==1: assert not any('batch_norm' in op_name(n) for n in ep.graph.nodes)

@pytest.mark.parametrize('d', [1,3])
def test_other_dimensions(d):
    cls = {1: nn.Conv1d, 3: nn.Conv3d}[d]
    net = Net(lambda m,x: m.a(x)+m.b(x)+x, a=cls(4,4,3,padding=1,groups=2), b=cls(4,4,1,groups=4))
    ep,rep,err = folded(net, torch.randn(2,4,*[5]*d).double())
    assert count(ep, f'conv{d}d')==1 and err<1e-12 and rep.merged=={f'conv{d}d': ['a','b','its input']}

@pytest.mark.parametrize('name', ['repvgg_a0','mobileone_s0','fastvit_t8','repvit_m0_9','repghostnet_050'])
def test_reparameterized_as_timm_does(name):
    "As many convolutions as timm's own code leaves, and no BN, which theirs leaves in some"
    timm = pytest.importorskip('timm')
    from timm.utils.model import reparameterize_model
    m = randomize_bn(timm.create_model(name, num_classes=5).eval()).double()
    x = torch.randn(2,3,96,96).double()
    ep,rep,err = folded(m, x, dynamic_shapes=(auto,))
    assert err<1e-11 and rep.n_folded==rep.n_bn and count(ep, 'conv2d')==sum(isinstance(o, nn.Conv2d) for o in reparameterize_model(m).modules())
    x = torch.randn(1,3,64,128).double()
    with torch.no_grad(): assert max_err([m(x)], [ep.module()(x)])<1e-11

class Block(nn.Module):
    "Branches, deep inside, that meet here"
    def __init__(self): super().__init__(); self.deep,self.other,self.skip = nn.Sequential(nn.Sequential(conv(bias=False), nn.BatchNorm2d(8))),nn.Sequential(conv(k=1)),nn.BatchNorm2d(8)
    def forward(self, x): return torch.relu(self.deep(x)+self.other(x)+self.skip(x))

def test_a_merged_layer_lives_where_its_branches_met():
    ep,rep,err = folded(Net(lambda m,x: m.body(x), body=nn.Sequential(Block(), Block())), x8)
    assert set(ep.state_dict)=={f'body.{i}.conv2d.{k}' for i in (0,1) for k in ('weight','bias')} and err<1e-12
    assert {k: sorted(v) for k,v in rep.merged.items()}=={f'body.{i}.conv2d': [f'body.{i}.deep.0.0',f'body.{i}.other.0','its input'] for i in (0,1)}
    assert '6 parallel branches became 2 layers' in rep.notes[-1]

@pytest.mark.parametrize('readers', [1,2])
def test_clamps_of_a_graph_work_in_place(readers):
    "BN and ReLU behind a `cat`, as in DenseNet: it is written into if nobody else reads it"
    net = Net(lambda m,x: (lambda y: m.c(m.act(m.b(y)))+(y if readers==2 else 0))(torch.cat([x,-x],1)), b=nn.BatchNorm2d(16), act=nn.ReLU(), c=conv(16,16,1))
    ep,rep,err = folded(net, x8)
    assert rep.n_folded==1 and err<1e-12 and [str(n.target) for n in ep.graph.nodes if 'clamp' in op_name(n)]==['aten.clamp_min_.Tensor' if readers==1 else 'aten.clamp_min.Tensor','aten.clamp_max_.Tensor']

def test_operations_without_inputs():
    "What is made of sizes alone, as LeViT's and others' indices, masks and positions"
    net = Net(lambda m,x: torch.relu(m.b(m.c(x)))+torch.arange(x.shape[2], dtype=x.dtype)[:,None]+torch.arange(8)[:,None,None].cumsum(0), c=conv(), b=nn.BatchNorm2d(8))
    ep,rep,err = folded(net, x8, dynamic_shapes=(auto,))
    x = torch.randn(3,8,7,11).double()
    with torch.no_grad(): assert rep.n_folded==1 and err<1e-12 and max_err([net(x)], [ep.module()(x)])<1e-12

def test_constants_are_computed_once():
    net = Net(lambda m,x: m.frozen(m.c(x)), c=nn.utils.parametrizations.weight_norm(conv()), frozen=FrozenBatchNorm2d(8))
    ep,rep,err = folded(net, x8)
    assert err<1e-12 and [op_name(n) for n in ep.graph.nodes if n.op=='call_function']==['conv2d']

def test_structures_survive():
    "Dicts, keyword arguments, several inputs, a constant as an output"
    class M(nn.Module):
        def __init__(self): super().__init__(); self.c,self.b,self.k = nn.Conv2d(3,8,3),nn.BatchNorm2d(8),nn.Parameter(torch.ones(2))
        def forward(self, x, more, *, scale): return {'y': self.b(self.c(x))*scale, 'rest': [more['a']+1, self.k]}
    m = randomize_bn(M()).double().eval()
    x,more,scale = torch.randn(2,3,8,8).double(),{'a': torch.randn(4).double()},torch.rand(1).double()
    with torch.no_grad(): ep = export(m, (x, more), dict(scale=scale), dynamic_shapes=dict(x={0: Dim.DYNAMIC}, more={'a': None}, scale=None))
    f = BNFolder(); new = f.fold_graph(ep)
    x = torch.randn(5,3,8,8).double()
    with torch.no_grad(): a,b = (g(x, more, scale=scale) for g in (m, new.module()))
    assert f.report.n_folded==1 and b.keys()==a.keys() and max_err(tensors_of(a), tensors_of(b))<1e-12

def test_saved_and_decomposed_programs():
    m = randomize_bn(nn.Sequential(conv(3,8,bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8,8,2), nn.BatchNorm2d(8), nn.GroupNorm(2,8), nn.Flatten(), nn.LayerNorm(8*81), nn.Linear(8*81,3), nn.BatchNorm1d(3))).double().eval()
    x = torch.randn(2,3,8,8).double()
    ep = exported(m, x, dynamic_shapes=({0: Dim.DYNAMIC},))
    buf = io.BytesIO(); torch.export.save(ep, buf); buf.seek(0)
    for p in (torch.export.load(buf), ep.run_decompositions()):
        f = BNFolder(); new = f.fold_graph(p, x)
        with torch.no_grad(): assert f.report.n_folded==3 and max_err([m(x)], [new.module()(x)])<1e-12

def test_the_program_is_not_changed():
    m = randomize_bn(nn.Sequential(conv(), nn.BatchNorm2d(8), nn.ReLU())).double().eval()
    ep = exported(m, x8); before,state = str(ep.graph),{k:t.clone() for k,t in ep.state_dict.items()}
    BNFolder().fold_graph(ep)
    assert str(ep.graph)==before and all(torch.equal(t, state[k]) for k,t in ep.state_dict.items()) and ep.state_dict.keys()==state.keys()

def test_a_wrong_merge_is_an_error(monkeypatch):
    from fastai_bnfold.fold.graph import Branch
    plus = Branch.plus
    def wrong(self, others):
        W,b = plus(self, others)
        return W*1.01, b
    monkeypatch.setattr(Branch, 'plus', wrong)
    with pytest.raises(VerificationError, match='not the sum of its parts'): folded(branches['RepVGG'][0](), x8)

def test_in_training_mode():
    with torch.no_grad(): ep = export(nn.Sequential(conv(), nn.BatchNorm2d(8)).train(), (x8.float(),))
    f = BNFolder(); f.fold_graph(ep)
    assert f.report.n_folded==0 and 'statistics of the batch' in f.report.kept[0].reason

@settings(max_examples=int(os.environ.get('EXPORTED_EXAMPLES', 12)), deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, print_blob=False)
@given(programs)
def test_random_graphs(program):
    steps,seed = program
    net = network(steps, seed)
    x = torch.randn(2,C,5,6).double()
    try: ep = exported(net, x, dynamic_shapes=({0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO},))
    except Exception: assume(False)
    f = BNFolder(); new = f.fold_graph(ep)
    assert all(r.folded or r.reason for r in f.report.rows)
    for v in (x, torch.randn(3,C,5,6).double()):
        with torch.no_grad(): assert max_err(tensors_of(net(v)), tensors_of(new.module()(v)))<1e-9
