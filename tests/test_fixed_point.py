"BN as an exact fixed-point operation: right for every input, and the smallest"
import copy, math
from fractions import Fraction
from decimal import Decimal as D, localcontext
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from fastai_bnfold.all import FoldError
from fastai_bnfold.integer.fixed_point import FixedPointBN, exact_bn, fixed_point_bn
from fastai_bnfold.integer.net import IntegerNet
from fastai_bnfold.integer.steps import FixedPointError, roundings
from fastai_bnfold.fold.testing import randomize_bn

def make(weight, bias, mean, var, eps=1e-5, cls=nn.BatchNorm1d):
    n = len(np.atleast_1d(weight))
    m = cls(n, eps=eps).double().eval()
    with torch.no_grad():
        for p,v in ((m.weight,weight),(m.bias,bias),(m.running_mean,mean),(m.running_var,var)): p.copy_(torch.as_tensor(v, dtype=torch.float64))
    return m

def quantized(bn, x, in_scale, out_scale, qmin, qmax, rounding):
    "One value, in decimal arithmetic with 120 digits: independent of the library"
    with localcontext() as c:
        c.prec = 120
        g,b,m,v = (D(float(o)) for o in (bn.weight, bn.bias, bn.running_mean, bn.running_var))
        y = (g*(D(x)*D(in_scale)-m)/(v+D(bn.eps)).sqrt()+b)/D(out_scale)
        y = y.quantize(D(1).scaleb(-90)) # 1/3·3 is 1
        low = math.floor(y); part = y-low
        up = part>D('.5') or part==D('.5') and {'half_up': True, 'half_even': low%2==1, 'half_away': y>0}[rounding]
        return min(max(low+up, qmin), qmax)

nice = st.sampled_from([-2.,-1.,-.5,0.,.25,.5,1.,1.5,3.])
numbers = st.one_of(nice, st.floats(-4, 4, allow_nan=False, allow_subnormal=False), st.sampled_from([1e-6,-1e-6,1e-30]))
scales = st.one_of(st.sampled_from([.125,.25,.5,1.,2.]), st.floats(.01, 2))

@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(numbers, numbers, numbers, st.one_of(st.sampled_from([.25,1.,4.]), st.floats(.01, 9)), st.sampled_from([0.,1e-5]), scales, scales,
       st.integers(-150,50), st.integers(0,200), st.integers(1,4), st.booleans(), st.sampled_from(roundings))
def test_every_input(g, b, m, v, eps, s_in, s_out, lo, width, bits, signed, rounding):
    "Ties, one step, no step, negative and zero γ: exhaustively, against decimal arithmetic"
    bn = make([g], [b], [m], [v], eps)
    f = fixed_point_bn(bn, s_in, (lo,lo+width), s_out, bits, signed, rounding)
    x = torch.arange(lo, lo+width+1)[:,None]
    want = [quantized(bn, i, s_in, s_out, f.qmin, f.qmax, rounding) for i in range(lo, lo+width+1)]
    assert f(x)[:,0].tolist()==want==exact_bn(x, bn, s_in, (lo,lo+width), s_out, bits, signed, rounding)[:,0].tolist()

ulps = st.integers(-2,2)
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.integers(-40,40), st.integers(-400,400), st.integers(0,6), ulps, ulps, st.integers(1,4), st.booleans(), st.sampled_from(roundings), st.sampled_from([60,2**12,2**24]))
def test_next_to_a_lattice_point(A, B, m, da, db, bits, signed, rounding, width):
    "a and b are A/2^m and B/2^m, or a few units in the last place beside them: every input, or in long ranges both sides of every step"
    a,b = A/2**m, B/2**m-.5
    for _ in range(abs(da)): a = math.nextafter(a, math.inf*da)
    for _ in range(abs(db)): b = math.nextafter(b, math.inf*db)
    bn = make([a], [b], [0.], [1.], 0.)
    lo,args = -width//2,(1., (-width//2,width//2), 1., bits, signed, rounding)
    qmin,qmax = (-2**(bits-1), 2**(bits-1)-1) if signed else (0, 2**bits-1)
    a,b,half = Fraction(a),Fraction(b),Fraction(1,2)
    around = {0} | {math.floor((k-half-b)/a)+j for k in range(qmin, qmax+2) for j in range(-2,4)} if a else {0}
    xs = sorted({lo,-lo} | {i for i in around if lo<=i<=-lo}) if width>100 else range(lo, -lo+1)
    def want(i):
        y = a*i+b; low = math.floor(y)
        up = y-low>half or y-low==half and {'half_up': True, 'half_even': low%2==1, 'half_away': y>0}[rounding]
        return min(max(low+up, qmin), qmax)
    x,want = torch.tensor(xs)[:,None],[want(i) for i in xs]
    assert exact_bn(x, bn, *args)[:,0].tolist()==want
    try: f = fixed_point_bn(bn, *args)
    except FixedPointError as e: # ties that go up, down and up again are on no line
        assert rounding=='half_even' and 'half_up' in str(e)
        ties = [i for i in range(lo, -lo+1) if (a*i+b-half).denominator==1 and qmin<=a*i+b<=qmax] if a else []
        assert len(ties)>2
    else:
        assert f(x)[:,0].tolist()==want
        if da==db==0 and rounding=='half_up': assert f.figures['n']<=m

def by_search(q, lo, hi, n, qmin, qmax):
    "Is there any (A, B) with this shift?"
    top = (max(abs(qmin), abs(qmax))+1) << (n+1)
    x = torch.arange(lo, hi+1)[None,None]
    A,B = torch.arange(-top, top+1).view(-1,1,1),torch.arange(-4*top, 4*top+1).view(1,-1,1)
    return bool((((A*x+B) >> n).clamp(qmin, qmax)==q).all(2).any())

@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(numbers, numbers, numbers, st.floats(.1, 4), scales, scales, st.integers(-4,0), st.integers(0,4), st.integers(1,2), st.booleans())
def test_optimal(g, b, m, v, s_in, s_out, lo, hi, bits, signed):
    "One bit less is not feasible, by a search through all A and B"
    f = fixed_point_bn(make([g], [b], [m], [v]), s_in, (lo,hi), s_out, bits, signed)
    n = f.figures['n']
    if n>4: return # too many to search
    q = f(torch.arange(lo, hi+1)[:,None])[:,0]
    assert by_search(q, lo, hi, n, f.qmin, f.qmax) and (n==0 or not by_search(q, lo, hi, n-1, f.qmin, f.qmax))

@pytest.mark.parametrize('bits', (2,4,8))
@pytest.mark.parametrize('signed', (False,True))
def test_large_ranges(bits, signed):
    "Ranges of 2**24: both edges of every step, against decimal arithmetic for some channels; all inputs of a sample"
    bn = randomize_bn(nn.BatchNorm2d(24), seed=bits)
    args = dict(in_scale=3e-6, in_range=(-2**23,2**23), out_scale=4/2**bits, out_bits=bits, signed=signed)
    f = fixed_point_bn(bn, **args)
    x = torch.randint(-2**23, 2**23+1, (20000,24)); x[0],x[1] = -2**23,2**23
    assert torch.equal(f(x).long(), exact_bn(x, bn, **args))
    steps = torch.arange(-2**23, 2**23+1, 997)[:,None].expand(-1,24)
    y = f(steps); assert torch.equal(y.long(), exact_bn(steps, bn, **args))
    for c in (0,4,8,12,20): # γ = -0.7, 0, 1e-6 and others
        one = make(bn.weight[c:c+1].detach(), bn.bias[c:c+1].detach(), bn.running_mean[c:c+1], bn.running_var[c:c+1])
        for i in x[:40,c].tolist(): assert int(f(torch.full((1,24), i))[0,c])==quantized(one, i, 3e-6, args['out_scale'], f.qmin, f.qmax, 'half_up')
        change = (y[1:,c]!=y[:-1,c]).nonzero()[:,0].tolist()[:6]
        for j in change: # the edge between two sampled inputs
            a,z = int(steps[j,c]),int(steps[j+1,c]); ya = int(y[j,c])
            while z-a>1:
                mid = (a+z)//2
                if int(f(torch.full((1,24), mid))[0,c])==ya: a = mid
                else: z = mid
            for i in (a,z): assert int(f(torch.full((1,24), i))[0,c])==quantized(one, i, 3e-6, args['out_scale'], f.qmin, f.qmax, 'half_up')

def test_optimal_for_the_layer():
    "With one bit less some channel has no A and B; plain rounding needs as much or more"
    bn = randomize_bn(nn.BatchNorm2d(64))
    for bits in (2,4,8):
        f = fixed_point_bn(bn, 1e-4, (-2**18,2**18), 4/2**bits, bits)
        assert f.figures['n']==f.figures['per_channel'].max() and f.figures['plain']['n']>=f.figures['n']
        assert f.figures['bits_A']<=f.figures['plain']['bits_A'] and f.figures['accumulator']<=64

def test_shapes_and_dtypes():
    for d,cls in enumerate((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
        bn = randomize_bn(cls(5))
        args = dict(in_scale=.01, in_range=(-500,500), out_scale=.2, out_bits=4)
        f = fixed_point_bn(bn, **args)
        for shape in ((3,5), (3,5,4), (3,5,4,2), (3,5,2,2,2)):
            for dtype in (torch.int16, torch.int32, torch.int64):
                x = torch.randint(-500, 501, shape, dtype=dtype); kept = x.clone()
                assert torch.equal(f(x).long(), exact_bn(x, bn, **args)) and torch.equal(x, kept) and f(x).dtype==f.dtype
    assert fixed_point_bn(bn, .01, (-5,5), .5, 1).dtype==torch.int32

def test_intermediates_fit():
    "What is computed in int32 is the same in int64"
    for seed in range(20):
        bn = randomize_bn(nn.BatchNorm1d(8), seed)
        f = fixed_point_bn(bn, 1e-3, (-4000,3000), .3, 3)
        if f.dtype!=torch.int32: continue
        x = torch.arange(-4000, 3001)[:,None].expand(-1,8)
        wide = FixedPointBN(f.A, f.B, f.n, f.qmin, f.qmax, torch.int64)
        assert torch.equal(wide(x).int(), f(x))

def test_scales_and_ranges_per_channel():
    bn = randomize_bn(nn.BatchNorm1d(6))
    s,lo,hi = torch.rand(6)*.01+.001,-torch.arange(100,106),torch.arange(200,206)
    f = fixed_point_bn(bn, s, (lo,hi), .2, 4)
    for c in range(6):
        one = make(bn.weight[c:c+1].detach(), bn.bias[c:c+1].detach(), bn.running_mean[c:c+1], bn.running_var[c:c+1])
        x = torch.arange(int(lo[c]), int(hi[c])+1)
        y = f(x[:,None].expand(-1,6))[:,c].tolist()
        assert y==[quantized(one, i, float(s[c]), .2, 0, 15, 'half_up') for i in x.tolist()]

def test_no_affine_parameters():
    bn = nn.BatchNorm1d(3, affine=False)
    x = torch.arange(-50, 51)[:,None].expand(-1,3)
    args = dict(in_scale=.1, in_range=(-50,50), out_scale=1., out_bits=3, signed=True)
    assert torch.equal(fixed_point_bn(bn, **args)(x).long(), exact_bn(x, bn, **args))

def test_both_ways_check_what_they_get():
    for f in (lambda *a: fixed_point_bn(nn.BatchNorm1d(3), *a), lambda *a: exact_bn(torch.ones(1,3).long(), nn.BatchNorm1d(3), *a)):
        with pytest.raises(FixedPointError, match='empty'): f(.1, (3,2), 1., 4)

@pytest.mark.parametrize('change, words', [
    (dict(in_scale=0.), 'positive'), (dict(in_scale=float('nan')), 'finite'), (dict(out_scale=-1.), 'positive'), (dict(in_range=(3,2)), 'empty'), (dict(in_range=9), 'smallest and the largest'), (dict(in_range=(-2**63,5)), 'int64'),
    (dict(in_range=(0,1.5)), 'integers'), (dict(out_bits=0), '1 to 16'), (dict(out_bits=2.5), '1 to 16'), (dict(rounding='up'), 'half_up'), (dict(in_scale=[1.,2.]), 'one per channel')])
def test_mistakes(change, words):
    args = dict(in_scale=.1, in_range=(-9,9), out_scale=1., out_bits=4) | change
    with pytest.raises(FixedPointError, match=words): fixed_point_bn(nn.BatchNorm1d(3), **args)

def test_bad_modules_and_inputs():
    args = ((.1, (-9,9), 1., 4))
    bn = nn.BatchNorm1d(3); bn.weight.data[1] = float('inf')
    with pytest.raises(FixedPointError, match='finite'): fixed_point_bn(bn, *args)
    for m in (nn.BatchNorm1d(3, track_running_stats=False), nn.Linear(3,3)):
        with pytest.raises(FixedPointError, match='running statistics'): fixed_point_bn(m, *args)
    f = fixed_point_bn(nn.BatchNorm1d(3), *args)
    for x in (torch.randn(2,3), torch.ones(2,3).bool(), torch.ones(2,4).long(), torch.ones(3).long()):
        with pytest.raises(FixedPointError): f(x)
    assert issubclass(FixedPointError, FoldError)

def test_does_not_fit():
    "A tiny slope over a huge range needs more than 64 bits: an error, no overflow"
    bn = make([1.], [0.], [2.**45], [1.])
    args = (1+2.**-40, (-2**55,2**55), 2.**52/3, 8)
    with pytest.raises(FixedPointError, match='64 bits'): fixed_point_bn(bn, *args)
    ends = [-2**55, -1, 2**45, 2**54+1, 2**55-1, 2**55] # float64 has no 2**55-1
    assert exact_bn(torch.tensor(ends)[:,None], bn, *args)[:,0].tolist()==[quantized(bn, i, args[0], args[2], 0, 255, 'half_up') for i in ends]

# --- a network of integers

def small(seed=0, cls=nn.BatchNorm2d):
    "Convolution with and without bias, sum, strides, groups, maximum"
    class Block(nn.Module):
        def __init__(self, n): super().__init__(); self.c1,self.b1,self.c2,self.b2 = nn.Conv2d(n,n,3,1,1,groups=2),cls(n),nn.Conv2d(n,n,1,bias=False),cls(n)
        def forward(self, x): return torch.relu(x+self.b2(self.c2(torch.relu(self.b1(self.c1(x))))))
    torch.manual_seed(seed)
    m = nn.Sequential(nn.Conv2d(3,8,3,2,1), cls(8), nn.ReLU(inplace=True), Block(8), nn.MaxPool2d(2), nn.Dropout(.3), Block(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8,4))
    return randomize_bn(m, seed).eval()

@pytest.mark.parametrize('bits', (2,4,8))
@pytest.mark.parametrize('seed', range(3))
def test_integer_net(bits, seed):
    "Bit-identical to exact arithmetic, for other batch and image sizes, too; close to the network in floating point at 8 bits; the model is not changed"
    m = small(seed); before = copy.deepcopy(m.state_dict())
    net = IntegerNet(m, [torch.randn(8,3,16,16) for _ in range(2)], bits)
    assert len(net.bns)==6 # and an average
    for shape in ((8,3,16,16), (1,3,24,20)):
        x = torch.randn(shape)
        y = net(x); net.exact = True; assert torch.equal(y, net(x)); net.exact = False
        assert torch.equal(copy.deepcopy(net)(x), y)
        if bits==8: assert (y-m(x)).abs().max()/m(x).abs().max()<.15
    assert all(torch.equal(v, before[k]) for k,v in m.state_dict().items())

def test_integers_go_from_layer_to_layer():
    "What every BN gets and puts out is of integer dtype, and within its bounds"
    net = IntegerNet(small(), [torch.randn(8,3,16,16)], 4)
    seen = []
    for b in net.bns.values(): b.register_forward_hook(lambda b,a,o: seen.append((b, a[0], o)))
    net(torch.randn(4,3,16,16))
    assert len(seen)==6
    for b,x,y in seen:
        (lo,hi),c = b.args[2],(1,-1,*[1]*(x.ndim-2))
        assert not x.is_floating_point() and not y.is_floating_point() and y.min()>=b.qmin and y.max()<=b.qmax
        lo,hi = (torch.as_tensor(end).expand(x.shape[1]) for end in (lo,hi))
        assert (x>=lo.view(c)).all() and (x<=hi.view(c)).all()
    assert sum(b.qmin<0 for b,_,_ in seen)==2 # before the sums

def test_integer_net_of_a_learner():
    from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner
    g = torch.Generator().manual_seed(0)
    data = [(x,int(y)) for x,y in zip(torch.randn(40,3,16,16, generator=g), torch.randint(4, (40,), generator=g))]
    learn = Learner(DataLoaders.from_dsets(data, data[:8], bs=8, num_workers=0), small(), loss_func=CrossEntropyLossFlat())
    state = torch.get_rng_state()
    net = learn.integer_net(4, n=16)
    assert torch.equal(state, torch.get_rng_state()) and len(net.bns)==6
    learn.fold_bn(latency=0, validate=False)
    with pytest.raises(FixedPointError, match='no batch norm'): learn.integer_net(4)

@pytest.mark.parametrize('bits', (2,4,8))
def test_trained_parameters(bits):
    "A network trained on the digits: both sides of every step of every channel against decimal arithmetic; all inputs of one layer"
    from fastai.basics import Learner
    from fastai_bnfold.lab.data import digits_dls
    torch.manual_seed(0)
    learn = Learner(digits_dls(size=16, bs=64), nn.Sequential(small()[:-1], nn.Linear(8,10)))
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)
    for b in learn.integer_net(bits, n=64).bns.values():
        bn,s_in,ends,s_out,_,signed,rounding = b.args
        L,U = (torch.as_tensor(end).expand(len(b.A)) for end in ends)
        s_in = torch.as_tensor(s_in).expand(len(b.A))
        for c in range(0, len(b.A), 3):
            one = make(*(getattr(bn, k)[c:c+1].detach() for k in ('weight','bias','running_mean','running_var')), eps=bn.eps)
            lo,hi = int(L[c]),int(U[c])
            def got(i): return int(b(torch.full((1,len(b.A)), i))[0,c])
            def edges(a, z): # all (i, i+1) in [a, z] with different outputs
                if got(a)==got(z): return []
                return [a,z] if z-a==1 else edges(a, (a+z)//2)+edges((a+z)//2, z)
            for i in {lo, hi, *edges(lo, hi)}: assert got(i)==quantized(one, i, float(s_in[c]), s_out, b.qmin, b.qmax, rounding)
    x = torch.arange(int(L.max()), int(U.min())+1)[:,None].expand(-1,len(b.A))
    assert torch.equal(b(x).long(), exact_bn(x, *b.args))

def test_shared_and_functional():
    "A BN that runs twice gets two fixed-point operations; a functional one stays real"
    class Shared(nn.Module):
        def __init__(self): super().__init__(); self.a,self.b,self.bn,self.c = nn.Conv2d(3,4,3),nn.Conv2d(4,4,3),nn.BatchNorm2d(4),nn.Conv2d(4,4,3); self.register_buffer('m', torch.ones(4)); self.register_buffer('v', torch.ones(4)*2)
        def forward(self, x):
            x = torch.relu(self.bn(self.b(torch.relu(self.bn(self.a(x))))))
            return torch.nn.functional.batch_norm(self.c(x), self.m, self.v).mean((2,3))
    m = randomize_bn(Shared()).eval()
    x = torch.randn(4,3,12,12)
    net = IntegerNet(m, [x], 8)
    y = net(x)
    assert len(net.bns)==2 and (y-m(x)).abs().max()/m(x).abs().max()<.15
    net.exact = True; assert torch.equal(y, net(x))

def test_a_model_that_keeps_a_value():
    "What it keeps is no output"
    m = small(); m[3].register_forward_hook(lambda m,a,o: setattr(m, 'seen', o))
    x = torch.randn(4,3,16,16); net = IntegerNet(m, [x], 8)
    y = net(x); assert torch.is_tensor(y) and y.shape==(4,4)
    net.exact = True; assert torch.equal(y, net(x))

def test_integer_net_mistakes():
    for bits in (1,9,4.): 
        with pytest.raises(FixedPointError, match='2 to 8'): IntegerNet(small(), [torch.randn(2,3,16,16)], bits)
    with pytest.raises(FixedPointError, match='inputs'): IntegerNet(small(), [], 4)
    with pytest.raises(FixedPointError, match='no batch norm'): IntegerNet(nn.Sequential(nn.Flatten(), nn.Linear(12,2)), [torch.randn(2,3,2,2)], 4)
    assert len(fixed_point_bn(nn.BatchNorm1d(3), .1, (-9,9), 1., 4).figures)>=6

def test_a_multiple_in_a_sum_is_not_forgotten():
    "`torch.add(a, b, alpha=…)` is no sum of integers: with 0, it is `a`"
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.c1,self.b1,self.c2,self.b2 = nn.Conv2d(3,8,3,padding=1),nn.BatchNorm2d(8),nn.Conv2d(8,8,3,padding=1),nn.BatchNorm2d(8)
        def forward(self, x): y = self.b1(self.c1(x)).relu(); return y, torch.add(y, self.b2(self.c2(y)), alpha=0)
    torch.manual_seed(0)
    net,x = randomize_bn(Net()).eval(),torch.randn(4,3,8,8)
    with torch.no_grad(): y,total = IntegerNet(net, [x])(x)
    assert torch.equal(y, total.to(y.dtype))

@pytest.mark.parametrize('bits', [2,3,4,8])
@pytest.mark.parametrize('last', [True,False])
def test_terms_of_a_clipped_sum_reach_as_far_as_the_sum(bits, last):
    "Of few bits a term has one more for its sign where a ReLU follows the sum; else as many as all others"
    from int_nets import Residual, conv_bn, head
    torch.manual_seed(0)
    model = randomize_bn(nn.Sequential(*conv_bn(3,8), nn.ReLU(), Residual(last=last), *conv_bn(8,8), nn.ReLU(), *head(8))).eval()
    net = IntegerNet(model, [torch.randn(4,3,16,16)], bits)
    spans = {layer.name: net.layout.spans[layer.out] for layer in net.layout.layers.values() if layer.bn}
    n = bits+(last and bits<4)
    assert spans['3_body_4']==(-2**(n-1), 2**(n-1)-1)
    assert spans['1']==spans['5']==(0, 2**bits-1)
