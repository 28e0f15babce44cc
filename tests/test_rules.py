"Maps on their way: through sums, averages, maxima, movements"
import pytest, torch
from torch import nn
from fastai_bnfold.all import *
from fastai_bnfold.fold.testing import randomize_bn
from fastai_bnfold.fold.ops import op_name
from fastai_bnfold.fold.program import program_of
from conftest import error64

class Net(nn.Module):
    "Three convolutions 3→8 and one 8→8, three BNs, a linear layer"
    def __init__(self, f, positive=False):
        super().__init__()
        self.c1,self.c2,self.c3,self.c4,self.f = nn.Conv2d(3,8,3,padding=1), nn.Conv2d(3,8,3,padding=1,bias=False), nn.ConvTranspose2d(3,8,3,padding=1), nn.Conv2d(8,8,1), f
        self.b1,self.b2,self.b3,self.b1d,self.fc = nn.BatchNorm2d(8),nn.BatchNorm2d(8),nn.BatchNorm2d(16),nn.BatchNorm1d(8),nn.Linear(8,5)
        randomize_bn(self)
        if positive:
            for b in (self.b1,self.b2,self.b3): b.weight.data.abs_()
    def forward(self, x): return self.f(self, x)

folds = { # name: (forward, needs positive scales)
    'sum of two convs': (lambda m,x: m.b1(m.c1(x)+m.c2(x)).relu(), False),
    'difference, in place, of three': (lambda m,x: m.b1((m.c1(x)-m.c2(x)).add_(m.c3(x), alpha=.3)), False),
    'sum with numbers': (lambda m,x: m.b1((m.c1(x)*3+1)/2-5), False),
    'a BN inside and one outside a sum': (lambda m,x: m.b2(m.b1(m.c1(x))+m.c2(x)), False),
    'cat of convs': (lambda m,x: m.b3(torch.cat([m.c1(x),m.c3(x)],1)), False),
    'average pool': (lambda m,x: m.b1(nn.functional.avg_pool2d(m.c1(x),2)), False),
    'global average': (lambda m,x: m.b1d(m.c1(x).mean((2,3))), False),
    'global average, forward': (lambda m,x: m.fc(m.b1(m.c1(x).tanh()).mean((2,3))), False),
    'interpolation': (lambda m,x: m.b1(nn.functional.interpolate(m.c1(x),scale_factor=2,mode='bilinear')), False),
    'max pool': (lambda m,x: m.b1(nn.functional.max_pool2d(m.c1(x),3,2,1)), True),
    'max pool, forward': (lambda m,x: m.c4(nn.functional.max_pool2d(m.b1(m.c1(x).tanh()),2)), True),
    'tokens': (lambda m,x: m.b1d(m.c1(x).flatten(2).transpose(1,2).flatten(0,1)), False),
    'channel shuffle': (lambda m,x: m.b1(nn.functional.channel_shuffle(m.c1(x),2)), False),
    'roll and flip': (lambda m,x: m.b1(m.c1(x).roll(3,1).flip(3)), False),
    'forward through a chunk': (lambda m,x: (lambda p,q: m.fc(p)+m.fc2(q))(*m.b16(torch.cat([x.mean((2,3)).repeat(1,2), x.amax((2,3)).sin().repeat(1,3)[:,:2]],1).repeat(1,2)).chunk(2,1)), False),
}

@pytest.mark.parametrize('name', folds)
def test_folds(name):
    f,positive = folds[name]
    net = Net(f, positive); net.b16,net.fc2 = randomize_bn(nn.BatchNorm1d(16)),nn.Linear(8,5)
    folder = BNFolder(); x = torch.randn(2,3,8,8)
    folded = folder.fold(net, x)
    live = [r for r in folder.report.rows if r.live]
    assert live and all(r.folded for r in live), str(folder.report)
    for v in (x, torch.randn(5,3,12,10)): assert error64(folded, net, v) < 1e-5

stays = {
    'max pool, negative scales': (lambda m,x: m.b1(nn.functional.max_pool2d(m.c1(x),2)), 'negative'),
    'a summand that cannot absorb': (lambda m,x: m.b1(m.c1(x)+m.c2(x).sin()), '`sin`'),
    'average of padded zeros': (lambda m,x: m.b1(nn.functional.avg_pool2d(m.c1(x),3,1,1)), 'padded zeros'),
    'pixel shuffle of the channels': (lambda m,x: m.b1d(nn.functional.pixel_shuffle(m.c4(m.c1(x)),2).flatten(1)[:,:8]), ''),
    'constant padding': (lambda m,x: m.b1(nn.functional.pad(m.c1(x),(1,1))), 'constant'),
    'a product of values': (lambda m,x: m.b1(m.c1(x)*m.c2(x)), 'product of two values'),
}

@pytest.mark.parametrize('name', stays)
def test_stays(name):
    f,why = stays[name]
    net = Net(f); x = torch.randn(2,3,8,8)
    folder = BNFolder(); folded = folder.fold(net, x)
    rows = [r for r in folder.report.rows if r.live]
    assert rows and all(not r.folded and why in r.reason and 'backward' in r.reason and 'forward' in r.reason for r in rows), str(folder.report)
    assert error64(folded, net, x) < 1e-5

y = torch.randn(2,3,4,4)
shares = { # functions of `z`, a value that the model has made, and of other values
    'type_as': lambda z: z.type_as(y), 'to': lambda z: z.to(y), 'float': lambda z: z.float(), 'view': lambda z: z.view(2,-1), 'reshape': lambda z: z.reshape(6,16), 'flatten': lambda z: z.flatten(1),
    'broadcast_tensors': lambda z: torch.broadcast_tensors(z, y)[0], 'broadcast_tensors, the second': lambda z: torch.broadcast_tensors(y+1, z)[1], 'atleast_3d': torch.atleast_3d, 'expand_as': lambda z: z.expand_as(y),
    'chunk': lambda z: z.chunk(2)[1], 'unsafe_chunk': lambda z: torch.unsafe_chunk(z, 2)[0], 'unsafe_split': lambda z: torch.unsafe_split(z, 1)[1], 'meshgrid': lambda z: torch.meshgrid(z[0,0,0], z[0,0,1], indexing='ij')[1],
    'einsum of one': lambda z: torch.einsum('abcd->abdc', z), 'unfold': lambda z: z.unfold(2, 2, 1), 'dropout': lambda z: nn.functional.dropout(z, .5, False), 'contiguous': lambda z: z.contiguous(), 'transpose': lambda z: z.mT,
    'in place': lambda z: z.add_(1), 'out': lambda z: torch.add(y, 1, out=z), 'sum_to_size': lambda z: z.sum_to_size(2,3,4,4), 'slice': lambda z: z[:,1:], 'squeeze': lambda z: z.squeeze(),
    'sum': lambda z: z+y, 'cat of one': lambda z: torch.cat([z]), 'relu': lambda z: z.relu(), 'clone': lambda z: z.clone(), 'in place, the other': lambda z: y.clone().add_(z), 'type_as, the other': lambda z: y.double().type_as(z), 'pick': lambda z: z[[0,1]],
}
@pytest.mark.parametrize('name', shares)
def test_shared_memory_is_known(name):
    "What PyTorch shares, the trace knows; what it does not share, the trace does not say"
    def forward(m, x): return (z := x.sin()), shares[name](z)
    net,x = Net(forward).eval(),torch.randn(2,3,4,4)
    t,(z,out) = program_of(net, (x,)),net(x)
    [sin] = [n for n in t.nodes if op_name(n)=='sin']
    assert (t.nodes[-1].args[0][1] in t.aliases(sin)) == (z.untyped_storage().data_ptr()==out.untyped_storage().data_ptr())
