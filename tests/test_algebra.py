"The affine algebra: every row of the rule table, as whole folds; random statistics with negative, zero and tiny γ; in float64"
import copy, pickle
import pytest, torch, torch.nn.functional as F, torchvision
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm
from torchvision.ops import FrozenBatchNorm2d
from fastai_bnfold.all import *
from fastai_bnfold.fold.affine import Clamp
from fastai_bnfold.fold.testing import randomize_bn
from fastai_bnfold.fold.plan import make_plan
from fastai_bnfold.fold.search import Search
from fastai_bnfold.fold.program import program_of
from conftest import error64

class Scale(nn.Module):
    "A LayerScale over images"
    def __init__(self, n): super().__init__(); self.gamma = nn.Parameter(torch.randn(n,1,1))
    def forward(self, x): return x*self.gamma

class Net(nn.Module):
    "`f(self, x)` is the forward; modules by keyword"
    def __init__(self, f, **mods):
        super().__init__()
        self.f = f
        for k,m in mods.items(): setattr(self, k, m)
        randomize_bn(self)
    def forward(self, x): return self.f(self, x)

def conv(i=3, o=8, k=3, p=1, **kw): return nn.Conv2d(i, o, k, padding=p, **kw)
bn,relu = nn.BatchNorm2d,nn.ReLU
x = torch.randn(2,3,8,8, generator=torch.Generator().manual_seed(3)).double()
other = torch.randn(3,3,10,7).double()

def fold(net, *args, **kw):
    "Fold in float64, compare on two batches (the second of another size, if there is one); the rows of the BNs that ran"
    net = net.double()
    folder = BNFolder(**kw)
    folded = folder.fold(net, args[0] if args else x)
    for v in args or (x, other): assert error64(folded, net, *(v if isinstance(v, tuple) else (v,))) < 1e-10
    return [r for r in folder.report.rows if r.live], folded, folder.report

# name: (net, how, into, activations that change)
folds = {
    # clamps
    'conv, relu, bn, conv with zeros: shift back, scale forward': (Net(lambda m,x: m.c2(m.b(m.a(m.c(x)))), c=conv(), a=relu(), b=bn(8), c2=conv(8)), 'split', ['c2','c'], ['a']),
    'the same without zeros needs no other clamp': (Net(lambda m,x: m.c2(m.b(m.a(m.c(x)))), c=conv(), a=relu(), b=bn(8), c2=conv(8,p=0)), 'forward', ['c2'], []),
    'conv, relu, bn, gelu': (Net(lambda m,x: F.gelu(m.b(m.a(m.c(x)))), c=conv(), a=relu(), b=bn(8)), 'backward', ['c'], ['a']),
    'pre-activation: cat, bn, relu, conv 1x1': (Net(lambda m,x: torch.cat([x, m.c(m.a(m.b(x)))], 1), b=bn(3), a=relu(inplace=True), c=conv(k=1,p=0)), 'forward', ['c'], ['a']),
    'relu6': (Net(lambda m,x: m.b(m.a(m.c(x))).sin(), c=conv(), a=nn.ReLU6(), b=bn(8)), 'backward', ['c'], ['a']),
    'hardtanh, forward': (Net(lambda m,x: m.c(m.a(m.b(x.sin()))), c=conv(p=0), a=nn.Hardtanh(-.5,2.), b=bn(3)), 'forward', ['c'], ['a']),
    'clamp with two readers': (Net(lambda m,x: (lambda y: m.c(y)+m.d(y))(m.a(m.b(x.sin()))), c=conv(k=1,p=0), d=conv(p=0,k=1), a=relu(), b=bn(3)), 'forward', ['c','d'], ['a']),
    'leaky relu, positive scales without a shift': (Net(lambda m,x: m.c(m.a(m.b(x.sin()))), c=conv(), a=nn.LeakyReLU(), b=bn(3)), 'forward', ['c'], []),
    # averages, maxima
    'max pool: size back, sign forward': (Net(lambda m,x: m.c2(m.b(F.max_pool2d(m.c(x),2))), c=conv(), b=bn(8), c2=conv(8)), 'split', ['c2','c'], []),
    'adaptive pools, both': (Net(lambda m,x: m.fc(m.b(torch.cat([F.adaptive_avg_pool2d(m.c(x),1), F.adaptive_max_pool2d(m.d(x),1)],1)).flatten(1)), c=conv(), d=conv(), b=bn(16), fc=nn.Linear(16,3)), 'backward', ['c','d'], []),
    'bicubic': (Net(lambda m,x: m.b(F.interpolate(m.c(x), scale_factor=2, mode='bicubic')), c=conv(), b=bn(8)), 'backward', ['c'], []),
    # sums and products
    'shift through a sum, forward': (Net(lambda m,x: m.c2(m.b(m.p(m.c(x)))+x[:,:1].sin()), c=conv(), p=nn.AvgPool2d(1), b=bn(8), c2=conv(8,k=1,p=0)), 'backward', ['c'], []),
    'scale back, shift forward: the matrix has no bias': (Net(lambda m,x: m.fc((m.b(m.w(x).transpose(1,3)).transpose(1,3)) + x.sin().mean()), b=bn(7), w=nn.Linear(8,7,bias=False), fc=nn.Linear(7,2)), 'backward', ['w'], []),
    'the summand that can takes the shift': (Net(lambda m,x: m.b(m.a(m.c(x))+m.d(x)), c=conv(), a=relu(), d=conv(), b=bn(8)), 'backward', ['c','d'], ['a']),
    'both summands come from the BN': (Net(lambda m,x: m.c((lambda y: y.flip(3)+F.avg_pool2d(y,3,1,1,count_include_pad=False))(m.b(x.sin()))), b=bn(3), c=conv(p=0)), 'forward', ['c'], []),
    'x + bn(x)': (Net(lambda m,x: (lambda y: m.c(y+m.b(y)))(x.sin()), b=bn(3), c=conv(p=0)), 'forward', ['c'], []),
    'bn(x) - 2x, backward': (Net(lambda m,x: (lambda y: torch.sub(m.b(y),y,alpha=2).sin())(m.c(x)), b=bn(8), c=conv()), 'backward', ['c'], []),
    'a scale through a gate': (Net(lambda m,x: m.d(m.c(m.b(m.e(x))*x.mean((1,2,3),keepdim=True).sigmoid())), e=nn.Identity(), b=bn(3,affine=True), c=conv(bias=False), d=conv(8)), 'forward', ['c'], []),
    'split behind a constant': (Net(lambda m,x: m.c2(m.b(m.a(m.c(x)))+.5), c=conv(), a=nn.Identity(), b=bn(8), c2=conv(8)), 'backward', ['c'], []),
    'shift back, scale forward, behind a constant': (Net(lambda m,x: (lambda y: m.c2(m.b(F.interpolate(m.c(y),size=y.shape[2:])+y)+.5))(x.sin()), c=conv(3,3,k=2,p=0), b=bn(3), c2=conv(3)), 'split', ['c2','c'], []),
    'numbers': (Net(lambda m,x: m.b(2-(m.c(x)*3+1)/-2), c=conv(), b=bn(8)), 'backward', ['c'], []),
    # movement
    'there and back': (Net(lambda m,x: m.b(m.c(x).flatten(1).view(len(x),8,*x.shape[2:])), c=conv(), b=bn(8)), 'backward', ['c'], []),
    'chunks': (Net(lambda m,x: (lambda p,q: m.b(p).sin()*q)(*m.c(x).chunk(2,1)), c=conv(), b=bn(4)), 'backward', ['c'], []),
    'a selection': (Net(lambda m,x: m.b(m.c(x)[:,[3,1,0]]), c=conv(), b=bn(3)), 'backward', ['c'], []),
    'constant padding lets a scale pass': (Net(lambda m,x: m.c2(F.pad(m.b(m.a(m.c(x))),(1,1,1,1))), c=conv(), a=relu(), b=bn(8), c2=conv(8,p=0)), 'split', ['c2','c'], ['a']),
    'tokens, reshape_as reads only a shape': (Net(lambda m,x: (lambda y: m.b(y.flatten(0,1)).reshape_as(y))(m.l(x.flatten(2))), l=nn.Linear(64,5,bias=False), b=nn.BatchNorm1d(5)), 'backward', ['l'], []),
    # beside a layer
    'identity beside a conv': (Net(lambda m,x: (lambda y: m.c(y)+m.b(y))(x.sin()), c=conv(3,3), b=bn(3)), 'backward', ['c'], []),
    'conv - identity, in three summands': (Net(lambda m,x: (lambda y: (m.c(y)+m.d(y))-m.b(y))(x.sin()), c=conv(3,3,groups=3), d=conv(3,3,k=1,p=0), b=bn(3)), 'backward', ['c'], []),
    'bn of a sum of convs and their input': (Net(lambda m,x: (lambda y: m.b(m.c(y)+m.d(y)+y).sin())(x.sin()), c=conv(3,3), d=conv(3,3,k=1,p=0), b=bn(3)), 'backward', ['c','d'], []),
    # absorbers
    'group norm': (Net(lambda m,x: m.b(m.g(m.c(x))).sin(), c=conv(), g=nn.GroupNorm(2,8), b=bn(8)), 'backward', ['g'], []),
    'layer norm': (Net(lambda m,x: m.b(m.g(x).permute(0,3,1,2)).sin(), g=nn.LayerNorm(8), b=bn(8)), 'backward', ['g'], []),
    'instance norm of the batch': (Net(lambda m,x: m.b(m.g(x)).sin(), g=nn.InstanceNorm2d(3,affine=True), b=bn(3)), 'backward', ['g'], []),
}
folds['leaky relu, positive scales without a shift'][0].b.running_mean.zero_(); folds['leaky relu, positive scales without a shift'][0].b.bias.data.zero_()
folds['leaky relu, positive scales without a shift'][0].b.weight.data.abs_()
for k in ('a scale through a gate',):
    b = folds[k][0].b; b.running_mean.zero_(); b.bias.data.zero_()
folds['scale back, shift forward: the matrix has no bias'] = (Net(lambda m,x: m.fc(m.b((x.transpose(1,3)@m.w).transpose(1,3)).transpose(1,3)), b=bn(5), fc=nn.Linear(5,2)), 'forward', ['fc'], [])
folds['scale back, shift forward: the matrix has no bias'][0].w = nn.Parameter(torch.randn(3,5))

@pytest.mark.parametrize('name', folds)
def test_folds(name):
    net,how,into,acts = folds[name]
    fixed = any(isinstance(m, (nn.Linear,nn.LayerNorm)) for m in net.modules())
    rows,folded,rep = fold(copy.deepcopy(net), *([x] if fixed and 'pools' not in name else []))
    r = rows[-1]
    assert (r.folded, r.how, sorted(r.into), r.acts)==(True, how, sorted(into), acts), r.fate
    assert sum(isinstance(m, Clamp) for m in folded.modules())==len(acts)
    assert any('Clamp' in n for n in rep.notes)==bool(acts)

@pytest.mark.parametrize('name', [n for n,(m,*_) in folds.items() if any(_[2])])
def test_float32_and_undo(name):
    net = copy.deepcopy(folds[name][0]).float(); before = dict(net.state_dict(keep_vars=True)); tree = {k:m for k,m in net.named_modules()}
    folder = BNFolder(); folder.fold(net, x.float(), inplace=True)
    assert folder.report.max_err < 1e-5 and error64(net, folds[name][0], x.float()) < 1e-5
    assert [b.dtype for m in net.modules() if isinstance(m, Clamp) for b in m.buffers()] and all(b.dtype==torch.float32 for b in net.buffers())
    pickle.loads(pickle.dumps({k:m for k,m in net.named_modules() if isinstance(m, Clamp)}))
    folder.unfold()
    after = net.state_dict(keep_vars=True)
    assert list(after)==list(before) and all(after[k] is before[k] for k in before) and {k:m for k,m in net.named_modules()}==tree

# name: (net, words of the reason)
stays = {
    'a relu shared by several calls': (Net(lambda m,x: m.a(m.b(m.a(m.c(x)))).sin(), c=conv(), a=relu(), b=bn(8)), ['`a` (ReLU)', 'shared by 2 calls']),
    'a bare relu': (Net(lambda m,x: m.b(F.relu(m.c(x))).sin(), c=conv(), b=bn(8)), ['backward, it stops at `relu` in the model', 'bare function']),
    'a relu inside a block that does more': (Net(lambda m,x: m.b(m.blk(x)).sin(), blk=Net(lambda m,x: F.relu(m.c(x)), c=conv()), b=bn(8)), ['`relu` in `blk` (Net)', 'bare function']),
    'two sides to a max pool': (Net(lambda m,x: m.b(F.max_pool2d(m.c(x),2)).sin(), c=conv(), b=bn(8)), ['scales are negative']),
    'a leaky relu': (Net(lambda m,x: m.b(m.a(m.c(x))).sin(), c=conv(), a=nn.LeakyReLU(), b=bn(8)), ['`a` (LeakyReLU)', 'positive scales']),
    'another reader': (Net(lambda m,x: (lambda y: m.b(y).sin()*y)(m.c(x)), c=conv(), b=bn(8)), ['`c` (Conv2d), which is also read by `mul`', 'forward, it stops at `sin`']),
    'written to while the other is read': (Net(lambda m,x: (lambda y: m.c(m.a(m.b(y)))+m.d(y))(x.sin()), c=conv(k=1,p=0), d=conv(k=1,p=0), a=nn.Dropout(inplace=True), b=bn(3)), None),
    'a product with 0': (Net(lambda m,x: m.b(m.c(x)*0.), c=conv(), b=bn(8)), ['product with 0']),
    'a sibling with a stride': (Net(lambda m,x: (lambda y: m.c(y)+m.b(y)[...,::2,::2].sin())(x.sin()), c=conv(3,3,stride=2), b=bn(3)), ['`sin`']),
    'a weight that is a square': (Net(lambda m,x: m.b(F.conv2d(x, m.c.weight**2)).sin(), c=conv(), b=bn(8)), ['computed anew']),
}

@pytest.mark.parametrize('name', stays)
def test_stays(name):
    net,words = stays[name]
    rows,*_ = fold(copy.deepcopy(net))
    if words is None: return # whatever is planned, it is right
    assert not rows[0].folded and all(w in rows[0].reason for w in words), rows[0].reason
    assert 'backward, it stops at' in rows[0].reason and 'forward, it stops at' in rows[0].reason

def test_in_place_activation_behind_a_shared_value():
    "The BN's output becomes its input, which another layer reads: the in-place ReLU must not write into it"
    net = Net(lambda m,x: (lambda y: m.c(m.a(m.b(y)))+m.d(y))(x.sin()), c=conv(k=1,p=0), d=conv(k=1,p=0), a=relu(inplace=True), b=bn(3))
    net.b.weight.data.abs_(); net.b.bias.data = net.b.running_mean*net.b.weight.data*(net.b.running_var+net.b.eps).rsqrt() # no shift: no bound changes
    rows,folded,_ = fold(net)
    assert rows[0].folded and not getattr(folded.a, 'inplace', False)

def test_in_place_function_behind_a_shared_value():
    net = Net(lambda m,x: (lambda y: m.c(F.dropout(m.b(y),training=False).add_(1))+m.d(y))(x.sin()), c=conv(k=1,p=0), d=conv(k=1,p=0), b=bn(3))
    rows,*_ = fold(net)
    assert not rows[0].folded and 'memory' in rows[0].reason

def test_a_value_that_is_written_to_and_read_again():
    "Found by the random graphs: the second reader sees what the ReLU has left, so the ReLU must go on doing that"
    net = Net(lambda m,x: (lambda y: m.c(m.a(y))+m.d(y))(m.b(x.sin())), c=conv(k=1,p=0), d=conv(k=1,p=0), a=relu(inplace=True), b=bn(3))
    rows,*_ = fold(net)
    assert not rows[0].folded and 'may be read again' in rows[0].reason

def test_possible_but_costly():
    "Three activations that need both bounds: three passes more than before, for one BN"
    net = Net(lambda m,x: (lambda y: m.c(m.p(y))+m.d(m.q(y))+m.e(m.r(y)))(m.b(x.sin())), c=conv(k=1,p=0), d=conv(k=1,p=0), e=conv(k=1,p=0), p=relu(), q=relu(), r=relu(), b=bn(3))
    net.b.weight.data[:] = torch.tensor([1.,-1.,.5])
    rows,_,rep = fold(copy.deepcopy(net))
    assert not rows[0].folded and rows[0].possible and rep.n_possible==1 and rep.n_folded==0 and '3 passes' in rows[0].reason
    rows,folded,rep = fold(net, costly=True)
    assert rows[0].folded and rows[0].acts==['p','q','r'] and rep.n_possible==1

# --- constants ------------------------------------------------------------------------------------

def test_frozen_batch_norm():
    net = Net(lambda m,x: m.c2(m.b2(m.b(m.c(x)).relu())), c=conv(bias=False), b=FrozenBatchNorm2d(8), b2=FrozenBatchNorm2d(8), c2=conv(8,p=0))
    rows,folded,rep = fold(net)
    assert [(r.how,r.into) for r in rows]==[('backward',['c']),('forward',['c2'])] and isinstance(folded.b, nn.Identity)

def test_layer_scale():
    net = Net(lambda m,x: (lambda y: y+m.s(m.b(m.c(y))))(x.sin()), c=conv(3,3), b=bn(3), s=Scale(3))
    rows,folded,rep = fold(net)
    assert all(r.folded for r in rows) and [(r.bn,r.is_bn) for r in rows]==[('b',True),('s',False)] and rep.n_bn==rep.n_folded==1
    assert 'per-channel constant' in str(rep) and isinstance(folded.s, nn.Identity)

def test_a_constant_that_cannot_go_is_not_mentioned():
    rows,*_ = fold(Net(lambda m,x: m.s(x.sin()).sin(), s=Scale(3)))
    assert rows==[]

def test_embedding_and_position():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.e,self.pos,self.b = nn.Embedding(9,6),nn.Parameter(torch.randn(5,6)),nn.BatchNorm1d(6); randomize_bn(self)
        def forward(self, i): return self.b((self.e(i)+self.pos).transpose(1,2)).sin()
    i = torch.randint(0,9,(4,5))
    rows,folded,rep = fold(Words(), i, torch.randint(0,9,(7,5)))
    assert rows[0].folded and set(rows[0].into)=={'e','pos'}, rows

def test_a_kept_bn_takes_in_another():
    net = Net(lambda m,x: m.b2(m.b1(x.sin())).sin(), b1=bn(3), b2=bn(3))
    rows,folded,_ = fold(net)
    assert sorted((r.folded, tuple(r.into)) for r in rows)==[(False,()), (True,(next(r.bn for r in rows if not r.folded),))]

def test_a_bn_that_took_in_another_and_went():
    net = Net(lambda m,x: m.c(m.p(m.b2(m.b1(x.sin())))), b1=bn(3), b2=bn(3), p=nn.AvgPool2d(2), c=conv(p=0))
    rows,*_ = fold(net)
    assert [r.into for r in rows]==[['c'],['c']]

# --- modules --------------------------------------------------------------------------------------

class BNAct(nn.BatchNorm2d):
    def __init__(self, n): super().__init__(n); self.drop,self.act = nn.Identity(),nn.ReLU(inplace=True)
    def forward(self, x): return self.act(self.drop(super().forward(x)))

def test_the_activation_of_a_bn_stays_in_its_place():
    net = Net(lambda m,x: m.b(m.c(x)), c=conv(), b=BNAct(8)); act = net.b.act
    folder = BNFolder(); folder.fold(net, x.float(), inplace=True)
    assert net.b.act is act and [k for k,_ in net.named_modules()]==['','c','b','b.drop','b.act'] and type(net.b) is nn.Sequential

def test_the_activation_of_a_bn_changes():
    net = Net(lambda m,x: (lambda y: torch.cat([y, m.c(m.b(y))],1))(x.sin()), c=conv(3,5,k=1,p=0), b=BNAct(3))
    rows,folded,_ = fold(net)
    assert rows[0].how=='forward' and rows[0].acts==['b.act'] and isinstance(folded.b.act, Clamp)

# name: (what the BN reads, what is made of it beside the activation, may the clamp write into it?)
in_place = {
    'a value of its own': (lambda m,x: x.sin(), lambda m,y: 0, True),
    "the model's input": (lambda m,x: x, lambda m,y: 0, False),
    'a view of the input': (lambda m,x: x.view(x.shape), lambda m,y: 0, False),
    'read before': (lambda m,x: x.sin(), lambda m,y: y.mean(), True),
    'a parameter': (lambda m,x: m.p.expand_as(x), lambda m,y: 0, False),
    'repeated, not copied': (lambda m,x: x[:,:1].sin().expand(-1,3,-1,-1), lambda m,y: 0, False),
}
@pytest.mark.parametrize('name', in_place)
def test_clamps_work_in_place_where_nobody_sees_it(name):
    src,beside,expected = in_place[name]
    def forward(m, x):
        y = src(m, x)
        e = beside(m, y)
        return m.c(m.act(m.b(y)))+e
    net = Net(forward, b=nn.BatchNorm2d(3), act=nn.ReLU(inplace=True), c=conv(3,5,k=1,p=0))
    net.p = nn.Parameter(torch.randn(1,3,1,1))
    rows,folded,_ = fold(net)
    assert rows[0].folded and isinstance(folded.act, Clamp) and folded.act.inplace is expected
    y,p = x.clone(),folded.p.clone()
    folded(y)
    assert torch.equal(x, y) and torch.equal(p, folded.p)

def test_clamps_do_not_write_into_what_is_read_later():
    net = Net(lambda m,x: (lambda y: (lambda z: m.c(z)+m.d(y.view(y.shape)))(m.act(m.b(y))))(x.sin()), b=nn.BatchNorm2d(3), act=nn.ReLU(inplace=True), c=conv(3,5,k=1,p=0), d=conv(3,5,k=1,p=0))
    rows,folded,_ = fold(net)
    assert rows[0].acts==['act'] and not folded.act.inplace
    net = Net(lambda m,x: m.c(m.act(m.b(x.sin()))), b=nn.BatchNorm2d(3), act=nn.ReLU(), c=conv(3,5,k=1,p=0))
    rows,folded,_ = fold(net)
    assert isinstance(folded.act, Clamp) and not folded.act.inplace # as it was

@pytest.mark.parametrize('tracer', [torch.fx.symbolic_trace, lambda m: torch.jit.trace(m, x), lambda m: torch.export.export(m, (x,)).module()])
@pytest.mark.parametrize('inplace', [False,True])
def test_models_with_clamps_can_be_traced(tracer, inplace):
    net = nn.Sequential(bn(3), nn.ReLU6(inplace), conv(k=1,p=0)); randomize_bn(net)
    _,folded,_ = fold(nn.Sequential(nn.AvgPool2d(1), *net))
    assert isinstance(folded[2], Clamp) and folded[2].inplace is inplace
    assert torch.equal(tracer(folded.eval())(x), folded(x))

def test_subclasses():
    class Scaled(nn.BatchNorm2d):
        def forward(self, x): return super().forward(x)*2-1
    class Twice(nn.BatchNorm2d):
        def forward(self, x): y = super().forward(x); return y*y
    class Branch(nn.BatchNorm2d):
        def __init__(self, n): super().__init__(n); self.a,self.b = nn.ReLU(),nn.Sigmoid()
        def forward(self, x): y = super().forward(x); return self.a(y)+self.b(y)
    class Before(nn.BatchNorm2d):
        def __init__(self, n): super().__init__(n); self.a = nn.Sigmoid()
        def forward(self, x): return super().forward(self.a(x))
    rows,folded,_ = fold(Net(lambda m,x: m.b(m.c(x)), c=conv(), b=Scaled(8)))
    assert rows[0].folded
    for cls,word in ((Twice,'mul'),(Branch,'twice'),(Before,'more than')):
        rows,folded,_ = fold(Net(lambda m,x: m.b(m.c(x)), c=conv(), b=cls(8)))
        assert not rows[0].folded and cls.__name__ in rows[0].reason and word in rows[0].reason, rows[0].reason

def test_a_subclass_that_normalizes_twice():
    class Double(nn.BatchNorm2d):
        def forward(self, x): return super().forward(super().forward(x))
    rows,*_ = fold(Net(lambda m,x: m.b(m.c(x)), c=conv(), b=Double(8)))
    [row] = rows
    assert not row.folded and 'several times' in row.reason

def test_a_bn_with_a_constant_inside():
    class Scaling(nn.BatchNorm2d):
        def __init__(self, n): super().__init__(n); self.s = Scale(n)
        def forward(self, x): return self.s(super().forward(x))
    rows,folded,_ = fold(Net(lambda m,x: m.b(m.c(x)), c=conv(), b=Scaling(8)))
    assert [(r.bn,r.folded) for r in rows]==[('b',True),('b.s',True)] and isinstance(folded.b.s, nn.Identity)

def test_instance_norm_with_running_statistics_is_a_bn():
    rows,folded,rep = fold(Net(lambda m,x: m.b(m.c(x)), c=conv(), b=nn.InstanceNorm2d(8, affine=True, track_running_stats=True)))
    assert rows[0].folded and rep.n_bn==1

norms = {'weight_norm': weight_norm, 'spectral_norm': spectral_norm, 'weight_norm, new': parametrizations.weight_norm, 'spectral_norm, new': parametrizations.spectral_norm,
         'orthogonal': parametrizations.orthogonal, 'pruned': lambda m: prune.l1_unstructured(m, 'weight', .5)}
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', norms)
def test_computed_weights_are_baked_in(name):
    net = Net(lambda m,x: m.d(m.b(m.c(x)).relu()), c=norms[name](conv()), b=bn(8), d=norms[name](conv(8)))
    net.train()(x.float()); net.eval() # (spectral norm estimates)
    with torch.no_grad(): want = net(x.float())
    old,before = net.c,{k:v.clone() for k,v in net.state_dict().items()}
    folder = BNFolder(); folder.fold(net, x.float(), inplace=True)
    [r] = folder.report.rows
    assert r.folded and r.into==['c'] and 'Baked in: the weights of c ' in str(folder.report) and type(net.c) is nn.Conv2d and sorted(net.c._parameters)==['bias','weight']
    assert type(net.d) is not nn.Conv2d or len(net.d._forward_pre_hooks) # untouched: nothing went in
    with torch.no_grad(): assert torch.allclose(net(x.float()), want, atol=1e-4*want.abs().max())
    assert folder.report.params_after==sum(p.numel() for p in net.parameters())
    folder.unfold()
    assert net.c is old and all(torch.equal(v, before[k]) for k,v in net.state_dict().items()) and list(net.state_dict())==list(before)
    assert folder.plan(net, x.float()).params_after==folder.report.params_after

# --- the search -----------------------------------------------------------------------------------

class Dense(nn.Module):
    "A dense block of n layers: every BN reads all values before it"
    def __init__(self, n):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(bn(4+2*i), relu(), conv(4+2*i, 4, k=1, p=0), bn(4), relu(), conv(4, 2)) for i in range(n))
        randomize_bn(self)
    def forward(self, x):
        for l in self.layers: x = torch.cat([x, l(x)], 1)
        return x
class PreAct(nn.Module):
    "A residual network of n blocks that add and normalize before"
    def __init__(self, n): super().__init__(); self.layers = nn.ModuleList(nn.Sequential(bn(4), relu(), conv(4,4), bn(4), relu(), conv(4,4)) for _ in range(n)); randomize_bn(self)
    def forward(self, x):
        for l in self.layers: x = x+l(x)
        return x

@pytest.mark.parametrize('make', [Dense, PreAct])
def test_the_search_is_linear(make, monkeypatch):
    "Twice the layers, twice the rules asked"
    asked,real = [],Search._ask
    monkeypatch.setattr(Search, '_ask', lambda *a: (asked.append(1), real(*a))[1])
    def effort(n):
        asked.clear(); t = program_of(make(n).eval(), (torch.randn(1,4,5,5),)); make_plan(t)
        return len(asked)/sum(m.op=='call_function' for m in t.nodes)
    assert effort(24) < 1.2*effort(12) < 1.5*effort(6)

def test_frozen_detector_backbone():
    m = randomize_bn(torchvision.models.resnet18(weights=None, norm_layer=FrozenBatchNorm2d, num_classes=5))
    rows,folded,rep = fold(m, torch.randn(1,3,64,64).double(), torch.randn(2,3,48,80).double())
    assert rep.n_bn==rep.n_folded==20

def test_densenet_and_its_last_bn():
    m = randomize_bn(torchvision.models.densenet121(weights=None, num_classes=5))
    rows,folded,rep = fold(m, torch.randn(1,3,64,64).double(), torch.randn(2,3,48,80).double())
    assert (rep.n_folded, rep.n_bn)==(120, 121)
    [kept] = rep.kept
    assert kept.bn=='features.norm5' and 'bare function' in kept.reason and 'denselayer16' in kept.reason

# name: (live BNs, folded)
timms = {'resnetv2_50': (49,49), 'levit_128s': (52,52), 'repvgg_a0': (None,0), 'mobileone_s0': (None,0), 'repvit_m0_9': (None,0), 'fastvit_t8': (None,0), 'ghostnet_100': (None,0), 'dpn68': (None,0)}
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', timms)
def test_timm(name):
    timm = pytest.importorskip('timm')
    live,n = timms[name]
    m = randomize_bn(timm.create_model(name, num_classes=5))
    size = 224 if 'levit' in name else 64
    rows,folded,rep = fold(m, torch.randn(1,3,size,size).double())
    assert (rep.n_folded, rep.n_bn)==(n or rep.n_bn, live or rep.n_bn), str(rep)

def test_without_clamps():
    "For engines that are slow at bounds per channel: the BN stays, and the row says that it could go"
    net = randomize_bn(nn.Sequential(nn.Conv2d(3,8,3), nn.GELU(), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8,4,1))).eval()
    x = torch.randn(2,3,8,8)
    f = BNFolder(clamps=False); f.fold(net, x)
    assert (f.report.n_folded, f.report.n_possible)==(0,1) and 'clamps=False' in f.report.kept[0].reason
    assert BNFolder().plan(net, x).n_folded==1
