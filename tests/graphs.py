"Random networks out of the ops that have rules, and some that have none; and a check for missed folds that knows nothing of the rules"
import torch, torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

C = 4
class LayerScale(nn.Module):
    def __init__(self): super().__init__(); self.gamma = nn.Parameter(torch.randn(C,1,1))
    def forward(self, x): return x*self.gamma
class BNAct(nn.BatchNorm2d):
    "As timm's: the activation is a submodule"
    def __init__(self, n): super().__init__(n); self.act = nn.ReLU()
    def forward(self, x): return self.act(super().forward(x))
class ChannelNorm(nn.LayerNorm):
    def forward(self, x): return super().forward(x.permute(0,2,3,1)).permute(0,3,1,2)
class Mat(nn.Module):
    def __init__(self): super().__init__(); self.w = nn.Parameter(torch.randn(C,C))
    def forward(self, x): return (x.flatten(2).transpose(1,2)@self.w).transpose(1,2).reshape_as(x)
class Shift(nn.Module):
    def __init__(self): super().__init__(); self.b = nn.Parameter(torch.randn(1,C,1,1))
    def forward(self, x): return x+self.b

class CatConv(nn.Module):
    def __init__(self): super().__init__(); self.conv = nn.Conv2d(2*C,C,1)
    def forward(self, x, y): return self.conv(torch.cat([x,y], 1))

bns = {'bn': lambda: nn.BatchNorm2d(C), 'bn, plain': lambda: nn.BatchNorm2d(C,affine=False), 'bn, frozen': lambda: FrozenBatchNorm2d(C), 'bn, act': lambda: BNAct(C),
       'instance norm': lambda: nn.InstanceNorm2d(C,affine=True,track_running_stats=True)}
layers = { # what may absorb
    'conv': lambda: nn.Conv2d(C,C,3,padding=1), 'conv, no bias, groups': lambda: nn.Conv2d(C,C,3,padding=1,groups=2,bias=False), 'conv 1x1': lambda: nn.Conv2d(C,C,1),
    'conv reflect': lambda: nn.Conv2d(C,C,3,padding=1,padding_mode='reflect'), 'conv_t': lambda: nn.ConvTranspose2d(C,C,3,padding=1), 'matmul': Mat,
    'layer norm': lambda: ChannelNorm(C), 'group norm': lambda: nn.GroupNorm(2,C), 'cat conv': CatConv,
    'weight norm': lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(C,C,1)),
}
modules = {'layer scale': LayerScale, 'shift': Shift, 'relu': nn.ReLU, 'relu, in place': lambda: nn.ReLU(inplace=True), 'relu6': nn.ReLU6, 'hardtanh': nn.Hardtanh, 'leaky': nn.LeakyReLU,
           'prelu': lambda: nn.PReLU(C), 'dropout': lambda: nn.Dropout(inplace=True), 'shuffle': lambda: nn.ChannelShuffle(2)}
functions = {
    'f.relu': F.relu, 'f.relu_': F.relu_, 'clamp': lambda x: x.clamp(max=1.), 'sigmoid': torch.sigmoid,
    'avg': lambda x: F.avg_pool2d(x,3,1,1,count_include_pad=False), 'avg zeros': lambda x: F.avg_pool2d(x,3,1,1), 'max': lambda x: F.max_pool2d(x,3,1,1),
    'up and down': lambda x: F.avg_pool2d(F.interpolate(x,scale_factor=2,mode='bilinear'),2), 'global': lambda x: x.mean((2,3),keepdim=True).expand_as(x).contiguous(), 'global max': lambda x: x.amax((2,3),keepdim=True).expand_as(x).contiguous(),
    'flip': lambda x: x.flip(1), 'roll': lambda x: x.roll(1,1), 'number': lambda x: (x*2-1)/3, 'minus': lambda x: 1-x, 'number_': lambda x: x.clone().add_(.5),
    'view': lambda x: x.flatten(1).view(x.shape), 'swap': lambda x: torch.cat(x.chunk(2,1)[::-1],1), 'half': lambda x: torch.cat([x[:,:C//2],x[:,:C//2]],1),
    'index': lambda x: x[:,[2,0,3,1]], 'pad': lambda x: F.pad(x,(1,0))[...,:-1], 'tokens': lambda x: x.flatten(2).transpose(1,2).contiguous().transpose(1,2).reshape(x.shape),
}
binary = {'add': lambda x,y: x+y, 'sub': lambda x,y: x-y, 'mul': lambda x,y: x*y, 'halves': lambda x,y: torch.cat([x[:,:C//2],y[:,C//2:]],1), 'gate': lambda x,y: x*y.mean((2,3),keepdim=True).sigmoid()}
makes = bns | layers | modules
step = st.tuples(st.sampled_from([*makes, *functions, *['bn']*8, *['conv']*6, *['conv 1x1']*3, *['relu']*4, *['add']*3, *binary]), st.integers(0,99), st.integers(0,99), st.booleans())
programs = st.tuples(st.lists(step, min_size=2, max_size=12), st.integers(0,10**6))

class Program(nn.Module):
    "Each step `(name, i, j, last)` reads earlier values (the last one, or any), and may use an earlier step's module again"
    def __init__(self, steps):
        super().__init__()
        self.steps,self.mods,self.reads = steps,nn.ModuleList(),[]
        for k,(name,i,j,last) in enumerate(steps):
            old = [m for s,m in zip(steps, self.mods) if s[0]==name]
            self.mods.append(old[i%len(old)] if old and name in makes and i%11==0 else makes[name]() if name in makes else nn.Identity())
            self.reads.append([k if last or i%3 else i%(k+1)] + [j%(k+1)]*(name in binary or name=='cat conv')) # of the values, the input being the first
        self.head_bn,self.head = nn.BatchNorm1d(C),nn.Linear(C,3)
    def values(self, x, read=lambda v, k, i: v):
        "All values; `read(v, k, i)` may put another in the place of the k-th where it is the i-th to be read"
        vals,n = [x.clone()],0 # some steps write into what they read
        for (name,i,_,_),m,reads in zip(self.steps, self.mods, self.reads):
            args = [read(vals[r], r, n+j) for j,r in enumerate(reads)]
            n += len(reads)
            if name in ('dropout','relu, in place','f.relu_') and (i%2 or name=='dropout'): args = [a.clone() for a in args] # else they write into the value itself
            vals.append(m(*args) if name in makes else (functions|binary)[name](*args))
        return vals
    def forward(self, x):
        vals = self.values(x)
        return self.head(self.head_bn(vals[-1].mean((2,3)))), vals[len(vals)//2]

# --- which folds exist? ---------------------------------------------------------------------------

def neighbourhood(net, k, gone):
    "For the BN of step `k`: the layers next to it, up and down the flow, and the values between them, by the wiring alone; BNs of the steps `gone` are no layers"
    name = lambda s: net.steps[s][0]
    readers = lambda v: [s for s,r in enumerate(net.reads) if v in r]
    is_bn = lambda s: name(s) in ('bn','instance norm','bn, act') and s not in gone
    near,between,todo,seen = set(),set(),list(net.reads[k]),set()
    while todo: # up: value v is made by step v-1
        v = todo.pop()
        if v in (0,(len(net.steps)+1)//2) or v in seen: continue # the model's input, and what it returns, cannot change
        seen.add(v)
        if name(v-1) in layers or is_bn(v-1): near.add(v-1); between.add(v)
        else: todo += net.reads[v-1]
    for v in sorted(seen): # a value changes if a layer above it does
        if v-1 not in near and any(r in between for r in net.reads[v-1]): between.add(v)
    todo = [k+1]*(k+1!=(len(net.steps)+1)//2) # what the model returns must be right as it is
    between.add(k+1)
    while todo: # down
        v = todo.pop()
        between.add(v)
        for s in readers(v):
            if name(s) in layers and name(s) not in ('layer norm','group norm') or is_bn(s): near.add(s)
            else: todo.append(s+1)
    last = len(net.steps)
    return {s for s in near-{k} if name(s)!='weight norm'},between,last in between # (PyTorch has no forward derivative of weight norm)

def missed(net, k, xs, gone=(), steps=40):
    """Is there a legal fold of the BN of step `k`? Its γ and β are moved in small steps to where it does nothing; after each, the weights of the layers next to it
    are corrected by least squares, such that no value but those in between changes, on batches `xs` of several image sizes. If that goes well all the way the BN could be folded into them: returns the error at the end."""
    bn = net.mods[k]
    near,between,head = neighbourhood(net, k, gone)
    uses = [sum(m is o for o in net.mods) for m in net.mods]
    params = {f'mods.{s}.{n}':p for s in near if uses[s]==1 for n,p in net.mods[s].named_parameters()} | ({f'head.{n}':p for n,p in net.head.named_parameters()} if head else {})
    params = {n:p for n,p in params.items() if 'act' not in n}
    # outside the algebra, and solvable all the same: a square can be completed, (s·v+t)·v being affine in (v+t/2s)²; a layer of two inputs can take back from one what changed in the other
    if not params or any(name in ('mul','gate','cat conv') and set(r)<=between for (name,*_),r in zip(net.steps, net.reads)): return float('inf')
    names,sizes = list(params),[p.numel() for p in params.values()]
    keep = [v for v in range(len(net.steps)+1) if v not in between or v==(len(net.steps)+1)//2 or not any(v in r for r in net.reads) and v<len(net.steps)] # (what nobody reads may be looked at, too)
    end = torch.cat([(bn.running_var+bn.eps).sqrt(), bn.running_mean])
    start = torch.cat([bn.weight, bn.bias]).detach()
    gen = torch.Generator().manual_seed(0)
    class Locally(nn.Module):
        "All values that must not change; whoever reads one of them reads random numbers instead, so that what holds does so for any values there, and not because two of them depend on each other"
        def __init__(self): super().__init__(); self.net,self.noise = net,[torch.randn(2*len(net.steps), *x.shape, generator=gen, dtype=x.dtype)*2-1 for x in xs] # (maxima of zeros, too)
        def forward(self, *xs):
            seen = []
            for x,noise in zip(xs, self.noise):
                vals = self.net.values(x, lambda v, k, i: v if k in between else noise[i].clone())
                seen += [vals[k].flatten() for k in keep]
                if head: seen.append(self.net.head(self.net.head_bn(vals[-1].mean((2,3)))).flatten())
            return torch.cat(seen)
    model = Locally().eval()
    def f(theta, gb):
        ps = {f'net.{n}':t.view(params[n].shape) for n,t in zip(names, theta.split(sizes))} | {f'net.mods.{k}.weight':gb[:C], f'net.mods.{k}.bias':gb[C:]}
        return torch.func.functional_call(model, ps, tuple(xs))
    theta = torch.cat([p.detach().flatten() for p in params.values()])
    with torch.no_grad(): want = f(theta, start)
    with torch.no_grad(): moves = (f(theta, end)-want).abs().max()
    if moves==0: return float('inf') # nobody reads it
    def solve(theta, r):
        J = torch.func.jacfwd(lambda t: f(t, gb))(theta)
        return theta - torch.linalg.lstsq(J, r[:,None], driver='gelsd').solution[:,0]
    size = want.abs().max()
    for i in range(1, steps+1):
        gb = start + (end-start)*i/steps
        for _ in range(3):
            with torch.no_grad(): r = f(theta, gb)-want
            if r.abs().max() < 1e-10*size: break
            theta = solve(theta, r).detach()
        if r.abs().max() > 1e-6*moves: return float('inf') # it fails, as a rule at the first step
    with torch.no_grad(): return ((f(theta, gb)-want).abs().max()/size).item()
