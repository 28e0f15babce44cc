"Random networks out of the ops that have rules, and some that have none: folded equals unfolded, whatever is planned"
import torch, torch.nn.functional as F
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn
from fastai_bnfold.all import *
from fastai_bnfold.folder import randomize_bn
from fastai_bnfold.plan import bn_calls
from fastai_bnfold.trace import Trace
from conftest import error64

C = 4
unary = { # name: (module or None, forward)
    'conv': (lambda: nn.Conv2d(C,C,3,padding=1), None), 'conv, no bias, groups': (lambda: nn.Conv2d(C,C,3,padding=1,groups=2,bias=False), None),
    'conv 1x1': (lambda: nn.Conv2d(C,C,1), None), 'conv reflect': (lambda: nn.Conv2d(C,C,3,padding=1,padding_mode='reflect'), None),
    'conv_t': (lambda: nn.ConvTranspose2d(C,C,3,padding=1), None), 'bn': (lambda: nn.BatchNorm2d(C), None), 'bn, plain': (lambda: nn.BatchNorm2d(C,affine=False), None),
    'relu': (None, F.relu), 'relu_': (None, F.relu_), 'sigmoid': (None, torch.sigmoid), 'dropout': (lambda: nn.Dropout(inplace=True), None),
    'avg': (None, lambda x: F.avg_pool2d(x,3,1,1,count_include_pad=False)), 'avg zeros': (None, lambda x: F.avg_pool2d(x,3,1,1)), 'max': (None, lambda x: F.max_pool2d(x,3,1,1)),
    'shuffle': (lambda: nn.ChannelShuffle(2), None), 'flip': (None, lambda x: x.flip(1)), 'number': (None, lambda x: (x*2-1)/3), 'number_': (None, lambda x: x.clone().add_(.5)),
    'view': (None, lambda x: x.flatten(1).view(x.shape)), 'swap': (None, lambda x: torch.cat(x.chunk(2,1)[::-1],1)), 'half': (None, lambda x: torch.cat([x[:,:C//2],x[:,:C//2]],1)),
}
binary = {'add': lambda x,y: x+y, 'sub': lambda x,y: x-y, 'mul': lambda x,y: x*y, 'cat': lambda x,y: torch.cat([x[:,:C//2],y[:,C//2:]],1)}
step = st.tuples(st.sampled_from([*unary, *['bn']*6, *['conv']*4, *binary]), st.integers(0,99), st.integers(0,99), st.booleans())

class Program(nn.Module):
    "Each step reads earlier values (the last one, or any), and may use an earlier step's module again"
    def __init__(self, steps):
        super().__init__()
        self.steps,self.mods = steps,nn.ModuleList()
        for name,i,_,again in steps:
            make = unary.get(name, (None,))[0]
            old = [m for s,m in zip(steps, self.mods) if s[0]==name]
            self.mods.append(old[i%len(old)] if again and old and i%5==0 else make() if make else nn.Identity())
        self.head_bn,self.head = nn.BatchNorm1d(C),nn.Linear(C,3)
    def forward(self, x):
        vals = [x]
        for (name,i,j,last),m in zip(self.steps, self.mods):
            a,b = (vals[-1] if last or i%3 else vals[i%len(vals)]), vals[j%len(vals)]
            if name in binary: v = binary[name](a, b)
            else: v = m(a.clone() if name=='dropout' else a) if unary[name][0] else unary[name][1](a.clone() if name=='relu_' and i%2 else a)
            vals.append(v)
        return self.head(self.head_bn(vals[-1].mean((2,3)))), vals[len(vals)//2]

@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.lists(step, min_size=2, max_size=12), st.integers(0,10**6))
def test_folded_equals_unfolded(steps, seed):
    torch.manual_seed(seed)
    net = randomize_bn(Program(steps), seed).double()
    x = torch.randn(2,C,5,6).double()
    n_ran = len(bn_calls(Trace(net, (x,))))
    folder = BNFolder(); folded = folder.fold(net, x)
    assert sum(r.live for r in folder.report.rows)==n_ran
    assert len(bn_calls(Trace(folded, (x,))))==n_ran-folder.report.n_folded
    assert all(r.folded or r.reason for r in folder.report.rows)
    for v in (x, torch.randn(3,C,7,5).double()): assert error64(folded, net, v) < 1e-9
