"""Kinds of faults that a third hostile look found: one BN that cannot go held the others back, true folds were refused, reasons were untrue.
Each has the right value, and variations; a fold is compared with the unfolded model, also on inputs that it has not seen"""
import copy
from math import log2
import pytest, torch, torch.nn.functional as F
from torch import nn
from torch.export import Dim, export
from torch.nn.utils import parametrizations, prune
from fastai_bnfold.fold import *
from fastai_bnfold.fold import sums
from fastai_bnfold.fold.folder import Fold
from fastai_bnfold.fold.inputs import run
from fastai_bnfold.fold.plan import make_plan
from fastai_bnfold.fold.program import program_of
from fastai_bnfold.fold.verify import max_err
from test_kinds import Net, bn, conv, folded, x
from test_kinds_2 import exported, folded_graph

# --- many BNs that cannot go -----------------------------------------------------------------------

class Liars(nn.Module):
    "Pairs of convolution and BN; of the BNs at the places `liars` the forward reads something else, too"
    def __init__(self, n, liars, lie):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3,3,1) for _ in range(n))
        self.bns = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(n))
        self.liars,self.lie = liars,lie
        randomize_bn(self).double().eval()
    def forward(self, x):
        for i,(conv,bn) in enumerate(zip(self.convs, self.bns)):
            x = bn(conv(x))
            if i in self.liars: x = self.lie(conv, bn, x)
        return x

def by_attribute(conv, bn, x): return x.view(len(x), bn.num_features, *x.shape[2:])
def by_numpy(conv, bn, x): return x*float(1+abs(conv.weight.detach().numpy()).mean())

@pytest.mark.parametrize('lie', [by_attribute, by_numpy])
@pytest.mark.parametrize('liars', [range(12, 24), range(0, 24, 2), [17]])
def test_many_that_cannot_go(monkeypatch, lie, liars):
    proofs = []
    monkeypatch.setattr(Fold, '_why_wrong', lambda self, *args, of=Fold._why_wrong: proofs.append(0) or of(self, *args))
    report = folded(Liars(24, liars, lie), x)
    assert {row.bn for row in report.kept}=={f'bns.{i}' for i in liars}
    assert all(row.kind=='proof failed' for row in report.kept)
    assert len(proofs)<=2*len(liars)*log2(24)+3

def test_each_says_why_it_cannot_go():
    report = folded(Liars(6, [1,4], by_attribute), x)
    assert all("'Identity' object has no attribute 'num_features'" in row.reason for row in report.kept)

@pytest.mark.parametrize('patience', [0, 1e-3]) # seconds: over before the search is
def test_a_search_has_an_end(monkeypatch, patience):
    monkeypatch.setattr(Fold, 'patience', patience)
    report = folded(Liars(24, range(12), by_attribute), x)
    late = [row for row in report.kept if 'of search did not show' in row.reason]
    assert late and {f'bns.{i}' for i in range(12)}<={row.bn for row in report.kept}

# --- one that overflows, or is no number -----------------------------------------------------------

def stack(n=4, **kw):
    layers = [layer for i in range(n) for layer in (conv(8 if i else 3, 8, padding=1, **kw), bn(), nn.ReLU())]
    return randomize_bn(nn.Sequential(*layers)).eval()

def too_large(net):
    net[4].weight.data.fill_(6e4)
    net[4].running_var.data.fill_(1e-6)
def large_shift(net):
    net[3].weight.data.mul_(1e-3)
    net[4].weight.data.fill_(2e3)
    net[4].running_mean.data.fill_(-300)
def no_number(net): net[3].weight.data[2] = float('nan')
def infinite_bias(net): net[3].bias.data[1] = float('inf')

def kept_alone(report, kind, n_bn=4):
    assert (report.n_folded, report.n_bn)==(n_bn-1, n_bn)
    [row] = report.kept
    assert kind in row.kind and ('overflow torch.float16' in row.reason or 'not finite' in row.reason)

@pytest.mark.parametrize('verify', [True, False])
def test_one_that_overflows(verify):
    net,image = stack().half(),x.half()
    too_large(net)
    folder = BNFolder(verify=verify)
    assert folder.plan(net, image).n_folded==3
    folder.fold(net, image)
    kept_alone(folder.report, 'dtype')
    graph = BNFolder(verify=verify)
    with torch.no_grad(): graph.fold_graph(export(net, (image,)))
    kept_alone(graph.report, 'dtype')
    assert BNFolder().plan(net.float(), image.float()).n_folded==4

def test_where_a_bias_would_overflow_another_way_is_found():
    net,image = stack().half(),x.half()
    large_shift(net)
    folder = BNFolder()
    new = folder.fold(net, image)
    assert folder.report.n_folded==4 and 'split' in {row.how for row in folder.report.rows}
    assert all(torch.isfinite(p).all() for p in new.parameters())

@pytest.mark.parametrize('spoil', [no_number, infinite_bias])
def test_one_that_is_no_number(spoil):
    net = stack().double()
    spoil(net)
    kept_alone(folded(net, x), 'not finite')
    kept_alone(folded_graph(exported(net, x), x), 'not finite')

def nan_mean(bn): bn.running_mean[1] = float('nan')
def infinite_mean(bn): bn.running_mean[1] = float('inf')
def infinite_variance(bn): bn.running_var[0] = float('inf')
def negative_variance(bn): bn.running_var[2] = -1
def nan_gamma(bn): bn.weight.data[0] = float('nan')
def infinite_beta(bn): bn.bias.data[0] = -float('inf')
broken = nan_mean,infinite_mean,infinite_variance,negative_variance,nan_gamma,infinite_beta

@pytest.mark.parametrize('spoil', broken)
@pytest.mark.parametrize('at', [1,4,10])
def test_a_bn_with_broken_statistics_stays_and_the_others_go(spoil, at):
    net = stack().double()
    with torch.no_grad(): spoil(net[at])
    for report in (folded(net, x), folded_graph(exported(net, x), x)):
        assert (report.n_folded, report.n_bn)==(3, 4)
        [row] = report.kept
        assert row.bn==str(at) and row.kind=='not finite' and (f'`{at}.' in row.reason)

def test_a_map_does_not_go_into_a_bn_with_broken_statistics():
    net = randomize_bn(nn.Sequential(nn.AvgPool2d(2), bn(3), nn.AvgPool2d(2), bn(3))).double().eval()
    net[3].running_var[1] = float('nan')
    assert folded(net, x).n_folded==0

def test_a_model_in_which_all_is_broken_is_refused():
    net = stack().double()
    for layer in net:
        if isinstance(layer, nn.BatchNorm2d): nan_mean(layer)
    with pytest.raises(StatisticsError, match='diverged'): BNFolder().fold(net, x)

# --- what weights are computed from ----------------------------------------------------------------

def weight_norm(net): parametrizations.weight_norm(net.c)
def spectral_norm(net): parametrizations.spectral_norm(net.c)
def old_weight_norm(net): nn.utils.weight_norm(net.c)
def pruned(net): prune.l1_unstructured(net.c, 'weight', .3)
read = {'weight_norm': (weight_norm, lambda net: net.c.parametrizations.weight.original0.norm()),
    'spectral_norm': (spectral_norm, lambda net: net.c.parametrizations.weight.original.norm()),
    'old weight_norm': (old_weight_norm, lambda net: net.c.weight_g.norm()), 'pruned': (pruned, lambda net: net.c.weight_mask.mean()),
    'a loop': (weight_norm, lambda net: sum(p.abs().sum() for p in net.c.parametrizations.parameters()))}

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', read)
def test_a_forward_that_reads_what_a_weight_is_computed_from(name):
    parametrize,value = read[name]
    net = Net(lambda m,x: m.b2(m.c2(m.b(m.c(x))*value(m))), c=conv(), b=bn(), c2=conv(8,4), b2=bn(4))
    parametrize(net)
    assert folded(net.eval(), x).n_folded==2
    again = BNFolder()
    assert max_err(run(net, (x,)), run(again.fold(again.fold(net, x), x), (x,)))<1e-9

def test_a_bn_that_is_pruned():
    net = Net(lambda m,x: m.b(m.c(x)), c=conv(), b=prune.l1_unstructured(bn(), 'weight', .3))
    report = folded(net, x)
    assert [(row.bn, row.folded) for row in report.rows]==[('b', True)]

@pytest.mark.filterwarnings('ignore')
def test_a_bn_that_is_compiled():
    net = Net(lambda m,x: m.b(m.c(x)), c=conv(), b=bn())
    net.b = torch.compile(net.b, backend='eager')
    assert folded(net, x).n_folded==1

# --- simple operators ------------------------------------------------------------------------------

simple = {'-y': lambda y: -y, 'neg': torch.neg, 'negative': torch.negative, 'positive': torch.positive, 'true_divide': lambda y: torch.true_divide(y, 2),
    'divide': lambda y: torch.divide(y, 4), '*.5': lambda y: y*.5, '.5*': lambda y: .5*y, 'multiply': lambda y: torch.multiply(y, -3),
    'subtract': lambda y: torch.subtract(y, 2), '1-y': lambda y: 1-y, 'subtract, alpha': lambda y: torch.subtract(y, 1, alpha=2),
    'halves': lambda y: torch.cat([y[:,4:], y[:,:4]], 1), 'thirds': lambda y: torch.cat([y[:,6:], y[:,:3], y[:,3:6]], 1),
    'rows': lambda y: torch.cat([y[:,:,3:], y[:,:,:3]], 2), 'a half': lambda y: torch.cat([y[:,:4], y[:,:4].flip(1)], 1),
    'clip': lambda y: torch.clip(y, -1, 2), 'maximum': lambda y: torch.maximum(y, torch.tensor(.5).double()),
    'minimum': lambda y: torch.minimum(y, torch.linspace(-1, 1, 8).double().view(8,1,1)), 'twice': lambda y: -(-y)}

@pytest.mark.parametrize('name', simple)
def test_simple_operators(name):
    f = simple[name]
    net = Net(lambda m,x: m.b(f(m.c(x))).sin(), c=conv(), b=bn())
    in_graph = folded_graph(exported(net, x), x).n_folded
    assert in_graph==(0 if name=='a half' else 1)
    if name not in ('clip','maximum','minimum'): assert folded(net, x, others=[(x[:1],)]).n_folded==in_graph

def test_a_difference_with_a_sign():
    net = Net(lambda m,x: -(m.b(m.c(x))-m.b2(m.c2(x)))/2, c=conv(), b=bn(), c2=conv(), b2=bn())
    assert folded(net, x).n_folded==2
    report = folded_graph(exported(net, x), x)
    assert report.n_folded==2 and report.merged

# --- an encoder that is called several times -------------------------------------------------------

def encoder(m, x): return m.b2(m.c2(m.b(m.c(x)).relu())).sin()
siamese = {'two': (lambda m,x,y: (encoder(m, x), encoder(m, y)), 4), 'difference': (lambda m,x,y: encoder(m, x)-encoder(m, y), 4),
    'three': (lambda m,x,y: encoder(m, x)+encoder(m, y)*encoder(m, x.flip(3)), 6),
    'one without its BN': (lambda m,x,y: (encoder(m, x), m.c(y).sin(), m.c2(m.b(m.c(y)).relu()).sin()), 2), # forward
    'a BN for each': (lambda m,x,y: (m.b(m.c(x)).sin(), m.b3(m.c(y)).sin()), 0)}

@pytest.mark.parametrize('decomposed', [False, True])
@pytest.mark.parametrize('name', siamese)
def test_siamese_graphs(name, decomposed):
    forward,n = siamese[name]
    net = Net(forward, c=conv(), b=bn(), c2=conv(8,8), b2=bn(), b3=bn())
    pair = x,x.flip(0)
    folder,ep = BNFolder(),exported(net, *pair, decomposed=decomposed)
    new = folder.fold_graph(ep)
    assert folder.report.n_folded==n
    for given in (pair, (pair[1], 2*x)):
        assert max_err(run(ep.module(), given), run(new.module(), given))<1e-9
    eager = BNFolder()
    eager.fold(net, pair)
    assert (eager.report.n_folded>0)==(n>2)

def test_a_scale_for_each_channel_in_two_places():
    net = Net(lambda m,x,y: (m.c(x)*m.gamma).sin()+(m.c(y)*m.gamma).cos(), c=conv())
    net.gamma = nn.Parameter(torch.randn(8,1,1).double())
    pair = x,x.flip(0)
    folder,ep = BNFolder(),exported(net, *pair)
    new = folder.fold_graph(ep)
    assert [row.folded for row in folder.report.rows]==[True, True]
    assert max_err(run(ep.module(), pair), run(new.module(), pair))<1e-9

# --- right, though the outputs differ --------------------------------------------------------------

def body(m, x): return m.b2(m.c2(m.b(m.c(x)).relu()))
jumps = {'to int8': lambda m,x: (body(m, x)*50).to(torch.int8), 'round': lambda m,x: (body(m, x)*20).round().cumsum(1), 'sign': lambda m,x: body(m, x).sign(),
    'argmax': lambda m,x: body(m, x).argmax(1), 'mask': lambda m,x: (body(m, x)>0).float().cumsum(3),
    'before a layer': lambda m,x: m.b2(m.c2((m.b(m.c(x))*30).round()))}

@pytest.mark.parametrize('name', jumps)
def test_outputs_that_jump(name):
    for seed in (2, 5):
        torch.manual_seed(seed)
        net = Net(jumps[name], c=conv(), b=bn(), c2=conv(8,8), b2=bn()).float()
        image = torch.randn(4,3,40,40)
        assert BNFolder().plan(net, image).n_folded==2
        reports = [BNFolder(), BNFolder()]
        reports[0].fold(net, image)
        reports[1].fold_graph(exported(net, image))
        assert [folder.report.n_folded for folder in reports]==[2, 2], [folder.report.kept for folder in reports]

def test_a_jump_is_said():
    def forward(m, x): return (body(m, x)*50).round()
    for seed in range(20):
        torch.manual_seed(seed)
        net = Net(forward, c=conv(), b=bn(), c2=conv(8,8), b2=bn()).float()
        folder = BNFolder()
        folder.fold(net, torch.randn(4,3,40,40))
        assert folder.report.n_folded==2
        if any('jump' in note and 'in float64 only' in note for note in folder.report.notes): return
    raise AssertionError('no output jumped')

@pytest.mark.parametrize('outside', [lambda y: (y*50).to(torch.int8), torch.round])
def test_a_wrong_fold_is_found_behind_a_jump(outside):
    net = Net(lambda m,x: outside(10*by_numpy(m.c, m.b, body(m, x))), c=conv(bias=False), b=bn(), c2=conv(8,8), b2=bn()).float()
    folder = BNFolder()
    folder.fold(net, x.float())
    assert [row.bn for row in folder.report.kept]==['b']

low = {'float32': lambda y: y.float().double(), 'bfloat16': lambda y: y.bfloat16().double(), 'half': lambda y: y.half().double()}

@pytest.mark.parametrize('where', ['between', 'at the end'])
@pytest.mark.parametrize('name', low)
def test_a_piece_of_low_precision(name, where):
    f = low[name]
    def between(m, x): return m.b2(m.c2(m.b(f(m.c(x))).relu()))
    def at_the_end(m, x): return f(body(m, x))
    for seed in range(3):
        torch.manual_seed(seed)
        net = Net(between if where=='between' else at_the_end, c=conv(), b=bn(), c2=conv(8,8), b2=bn())
        image = torch.randn(4,3,24,24).double()
        folder,graph = BNFolder(),BNFolder()
        folder.fold(net, image)
        graph.fold_graph(exported(net, image))
        assert (folder.report.n_folded, graph.report.n_folded)==(2, 2)

# --- time ------------------------------------------------------------------------------------------

class Branches(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.convs,self.bns = nn.ModuleList(conv() for _ in range(n)),nn.ModuleList(bn() for _ in range(n))
        randomize_bn(self).double().eval()
    def forward(self, x): return sum(bn(conv(x)) for conv,bn in zip(self.convs, self.bns))

@pytest.mark.parametrize('n', [16, 64])
def test_a_sum_of_branches_is_taken_apart_once_for_each(monkeypatch, n):
    looked = []
    monkeypatch.setattr(sums, 'summands', lambda *args, of=sums.summands: looked.append(0) or of(*args))
    program = program_of(Branches(n), (x,))
    assert make_plan(program).n_folded==n
    assert len(looked)<=4*n

# --- reasons ---------------------------------------------------------------------------------------

def behind_numpy(m, x): return m.b(torch.from_numpy(m.c(x).numpy()))
reasons = {'numpy': (behind_numpy, 'outside of PyTorch (by NumPy'),
    'divisor': (lambda m,x: m.b(F.avg_pool2d(m.c(x), 2, divisor_override=3)), '`divisor_override`'),
    'matrix on the left': (lambda m,x: m.b((m.w@m.c(x).flatten(2)).unflatten(2, (6,6))), 'stands on the left'),
    'two values': (lambda m,x: m.b(m.c(x)@m.c(x)), 'product of two values')}

@pytest.mark.parametrize('name', reasons)
def test_reasons(name):
    forward,words = reasons[name]
    net = Net(forward, c=conv(), b=bn())
    net.k,net.w = nn.Parameter(torch.randn(1,8,4,4).double()),nn.Parameter(torch.randn(8,8).double())
    folder = BNFolder()
    folder.fold(net, x)
    [row] = folder.report.rows
    assert not row.folded and words in row.reason

# --- what runs is the same, in other kernels, or more often ----------------------------------------

class Sequences(nn.Module):
    "A BN over the features of sequences, items × length × features: without it the next layer reads values that lie otherwise in memory"
    def __init__(self, after):
        super().__init__()
        self.before,self.bn,self.after = nn.Linear(5,6),nn.BatchNorm1d(6),after
    def forward(self, x):
        out = self.after(self.bn(self.before(x).transpose(1,2)).transpose(1,2).relu())
        return out[0] if isinstance(out, tuple) else out

class Attention(nn.Module):
    def forward(self, x): return F.scaled_dot_product_attention(x, x, x)

afters = {'linear': lambda: nn.Linear(6,2), 'linear without bias': lambda: nn.Linear(6,2,bias=False), 'lstm': lambda: nn.LSTM(6,4,batch_first=True),
    'gru': lambda: nn.GRU(6,4), 'attention': Attention, 'two layers': lambda: nn.Sequential(nn.Linear(6,6), nn.LayerNorm(6))}

@pytest.mark.parametrize('inplace', [False, True])
@pytest.mark.parametrize('after', afters)
def test_layers_that_choose_their_kernels_by_where_numbers_lie(after, inplace):
    net = randomize_bn(Sequences(afters[after]())).double().eval()
    sequences = torch.randn(3,7,5).double()
    before,folder = net(sequences),BNFolder()
    new = folder.fold(net, sequences, inplace=inplace)
    assert folder.report.n_folded==1 and max_err([before], [new(sequences)])<1e-12

def one_by_one(m, x): return torch.cat([m.b(m.c(item[None])) for item in x])
def in_pieces(m, x): return torch.cat([m.b(m.c(item)).relu() for item in x.split(1)])

@pytest.mark.parametrize('forward', [one_by_one, in_pieces])
def test_one_call_for_each_item(forward):
    net = randomize_bn(Net(forward, c=conv(), b=bn())).double()
    assert folded(net, x, others=[(x[:1],), (torch.cat([x,x]),)]).n_folded==1

def test_a_layer_that_is_called_out_of_proportion_for_another_batch():
    net = Net(lambda m,x: one_by_one(m, x) if len(x)>1 else one_by_one(m, x)+m.c(x), c=conv(), b=bn())
    [row] = folded(randomize_bn(net).double(), x, others=[(x[:1],)]).rows
    assert not row.folded and 'goes another way' in row.reason

# --- functions of functions ------------------------------------------------------------------------

def in_vmap(m, x): return torch.func.vmap(lambda z: m.b(m.c(z[None]))[0])(x)
def behind_vmap(m, x): return m.b(m.c(torch.func.vmap(lambda z: z.softmax(0)*m.k)(x)))
def between_vmap(m, x): return m.c(torch.func.vmap(torch.relu)(m.b0(x)))
def tangent(m, x): return m.b(m.c(torch.func.jvp(torch.sin, (x,), (torch.ones_like(x),))[1]))
def value_of_jvp(m, x): return m.b(m.c(torch.func.jvp(torch.sin, (x,), (torch.ones_like(x),))[0]))
def cotangent(m, x): return m.b(m.c(torch.func.vjp(torch.sin, x)[1](torch.ones_like(x))[0]))
def gradient(m, x): return m.b(m.c(torch.func.grad(lambda z: z.sin().sum())(x)))
def jacobian(m, x): return m.b(m.c(torch.func.vmap(torch.func.jacrev(lambda z: z.mean().sin()))(x)))
def nested(m, x): return m.b(m.c(torch.func.vmap(torch.func.grad(lambda z: z.sin().sum()))(x)))

@pytest.mark.parametrize('forward', [behind_vmap, tangent, value_of_jvp, cotangent, gradient, jacobian, nested])
def test_functions_that_are_transformed(forward):
    net = randomize_bn(Net(forward, c=conv(), b=bn())).double()
    net.k = nn.Parameter(torch.rand(3,1,1).double()+1)
    assert folded(net, x, others=[(x[:1],), (x[...,:5],)]).n_folded==1

def test_a_bn_inside_of_vmap_stays():
    net = randomize_bn(Net(in_vmap, c=conv(), b=bn())).double()
    [row] = folded(net, x).rows
    assert row.kind=='does more' and '`permute`' in row.reason

def test_a_map_does_not_pass_a_function_that_is_transformed_unseen():
    net = randomize_bn(Net(between_vmap, c=conv(k=1), b0=bn(3))).double()
    report = folded(net, x)
    assert report.n_folded==0 or report.rows[0].how=='forward'

# --- what was compiled -----------------------------------------------------------------------------

def compiled_bn(net): net[1] = torch.compile(net[1], backend='eager')
def compiled_conv(net): net[0] = torch.compile(net[0], backend='eager')
def compiled_block(net): net[2] = torch.compile(nn.Sequential(net[2]), backend='eager')

@pytest.mark.parametrize('compiled', [compiled_bn, compiled_conv, compiled_block])
@pytest.mark.parametrize('inplace', [False, True])
def test_what_was_compiled_has_the_name_that_its_user_gave_it(compiled, inplace):
    net = stack(1).double()
    compiled(net)
    before,folder = net(x),BNFolder()
    new = folder.fold(net, x, inplace=inplace)
    [row] = folder.report.rows
    assert (row.bn, row.into)==('1', ['0'])
    assert max_err([before], [new(x)])<1e-12

def test_a_compiled_model_has_the_names_of_its_parts():
    net = torch.compile(stack(2).double(), backend='eager')
    assert [row.bn for row in folded(net, x).rows]==['1','4']

# --- constants -------------------------------------------------------------------------------------

def expanded_index(m, x):
    y = m.c(x)
    return m.b(y.gather(1, torch.arange(7, -1, -1).view(1,8,1,1).expand_as(y)))
def ones_like(m, x):
    y = m.c(x)
    return m.b(y+2*torch.ones_like(y))
def by_dtype(m, x):
    y = m.c(x)
    return m.b(y*m.k[:,:,:1,:1].float().type_as(y))

@pytest.mark.parametrize('forward', [expanded_index, ones_like, by_dtype])
def test_constants_of_the_size_of_a_value(forward):
    net = Net(forward, c=conv(k=1), b=bn())
    net.k = nn.Parameter(torch.rand(1,8,16,16).double()+1)
    assert folded(net, x, others=[(x[:1],), (x[...,:5],)]).n_folded==1

def position(m, x): return m.b(m.c(x)+m.k[:,:,:x.shape[2],:x.shape[3]])
def narrowed(m, x): return m.b(m.c(x)+m.k.narrow(2, 0, x.shape[2]).narrow(3, 0, x.shape[3]))
def spread(m, x): return m.b(m.c(x)+m.k[:,:,:1,:1].expand(-1, -1, *x.shape[2:]))
def factor(m, x): return m.b(m.c(x)*m.k[:,:,:x.shape[2],:x.shape[3]])

@pytest.mark.parametrize('forward', [position, narrowed, spread, factor])
def test_a_constant_cut_to_a_dynamic_size(forward):
    net = Net(forward, c=conv(k=1), b=bn())
    net.k = nn.Parameter(torch.randn(1,8,16,16).double())
    ep = exported(net, x, dynamic_shapes={'args': ({0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO},)})
    others = [(x[:1],), (x[...,:5],), (torch.cat([x,x[:,:,:5]], 2),)]
    report = folded_graph(ep, x, others=others)
    assert 'rule failed' not in ''.join(row.kind for row in report.rows)
    assert report.n_folded==(0 if forward is factor else 1)

def pieces_of(m): return [m.p[:,:1], m.q.view(1,3,1,1)[:,:2]]

prompts = {
    'expanded to an input': lambda m,x: m.p.expand_as(x), 'expanded to its items': lambda m,x: m.p.expand(len(x), -1, -1, -1),
    'as it is': lambda m,x: m.p, 'repeated': lambda m,x: m.p.repeat(len(x), 1, 1, 1),
    'plus nothing': lambda m,x: m.p+0*x, 'plus zeros': lambda m,x: m.p+torch.zeros_like(x),
    'a view': lambda m,x: m.q.view(1,3,1,1).expand_as(x), 'permuted': lambda m,x: m.r.permute(2,0,1)[None].expand_as(x),
    'a piece': lambda m,x: m.two.chunk(2, 1)[0].expand_as(x), 'two side by side': lambda m,x: torch.cat(pieces_of(m), 1).expand_as(x),
    'behind a layer': lambda m,x: m.c0(m.p.expand_as(x)), 'behind a function': lambda m,x: m.p.relu().expand_as(x),
    'a buffer': lambda m,x: m.fixed.expand_as(x)}

class Prompted(nn.Module):
    "Reads nothing of its input but the size"
    def __init__(self, prompt):
        super().__init__()
        self.prompt,self.bn,self.c0,self.conv = prompt,bn(3),conv(3, 3, k=1),conv(3, 5, k=1)
        sizes = dict(p=(1,3,1,1), q=(3,), r=(1,1,3), two=(1,6,1,1))
        for name,size in sizes.items(): setattr(self, name, nn.Parameter(torch.randn(size)))
        self.register_buffer('fixed', torch.randn(1,3,1,1))
    def forward(self, x): return self.conv(self.bn(self.prompt(self, x)))+x.mean()

@pytest.mark.parametrize('prompt', prompts)
def test_bn_of_parameters_goes(prompt):
    net = randomize_bn(Prompted(prompts[prompt])).double().eval()
    image = torch.randn(2,3,9,9).double()
    assert folded(net, image, others=[(image[:1],), (image[...,:5],)]).n_folded==1

def test_bn_of_a_parameter_that_others_read_stays():
    net = randomize_bn(Prompted(lambda m,x: m.p*x.mean()+m.bn(m.p).sin())).double().eval()
    net.forward = lambda x: net.prompt(net, x)
    before = net.p.detach().clone()
    [row] = folded(net, torch.randn(2,3,9,9).double()).rows
    assert 'shared weight' in row.kind and torch.equal(net.p, before)

def test_a_weight_that_is_standardized_is_a_constant():
    def forward(m, x): return F.conv2d(x, F.batch_norm(m.c.weight.flatten(1)[None], None, None, training=True).view_as(m.c.weight))
    [row] = folded(Net(forward, c=conv()), x).rows
    assert row.kind=='constant' and 'constant of the model' in row.reason

# --- a weight that is multiplied by constants where it is read --------------------------------------

def with_mask(layer, read, register='buffer'):
    "A layer that reads its weight through `read`, which gets a mask, too"
    mask = torch.randint(0, 3, layer.weight.shape)-1. # nothing, once, and turned over
    if register=='buffer': layer.register_buffer('mask', mask)
    else: layer.mask = nn.Parameter(mask, requires_grad=register=='trained')
    layer.read = read
    return layer

class MaskedConv(nn.Conv2d):
    def forward(self, x): return self._conv_forward(x, self.read(self.weight, self.mask), self.bias)
class MaskedTransposed(nn.ConvTranspose2d):
    def forward(self, x): return F.conv_transpose2d(x, self.read(self.weight, self.mask), self.bias, groups=self.groups)

masked_layers = {'conv': lambda: MaskedConv(4,4,3), 'without bias': lambda: MaskedConv(4,4,3,bias=False), 'groups': lambda: MaskedConv(4,4,3,groups=2),
                 'depthwise': lambda: MaskedConv(4,4,1,groups=4,bias=False), 'transposed': lambda: MaskedTransposed(4,4,1)}
readings = {'mask': torch.mul, 'scaled': lambda weight, mask: 3*mask*weight, 'divided': lambda weight, mask: weight/(mask+2),
            'where': lambda weight, mask: torch.where(mask>0, weight, 0.), 'flat': lambda weight, mask: (weight.flatten()*mask.flatten()).view_as(weight),
            'turned': lambda weight, mask: (weight*mask).flip(0)}

@pytest.mark.parametrize('layer', masked_layers)
@pytest.mark.parametrize('read', readings)
def test_masked_weights(layer, read):
    torch.manual_seed(0)
    def forward(m, x): return m.after(m.layer(m.before(x.relu()))).relu()
    net = Net(forward, before=nn.BatchNorm2d(4), layer=with_mask(masked_layers[layer](), readings[read]), after=nn.BatchNorm2d(4))
    image = torch.randn(2,4,9,9).double()
    assert folded(net, image, others=[(image[:1,:,:7],)]).n_folded==2
    assert folded_graph(export(net, (image,)), image).n_folded==2

@pytest.mark.parametrize('register', ['frozen','trained'])
def test_a_mask_may_be_a_parameter(register):
    def forward(m, x): return m.after(m.layer(x))
    net = Net(forward, layer=with_mask(MaskedConv(3,4,3), torch.mul, register), after=nn.BatchNorm2d(4))
    mask = net.layer.mask.clone()
    report = folded(net, x)
    assert report.n_folded==1 and torch.equal(net.layer.mask, mask)

def test_masked_linear_layer():
    class Masked(nn.Linear):
        def forward(self, x): return F.linear(x, self.weight*self.mask, self.bias)
    def forward(m, x): return m.second(m.bn(m.first(x)).relu())
    def layer(): return with_mask(Masked(6,6), None)
    numbers = torch.randn(5,6).double()
    assert folded(Net(forward, first=layer(), bn=nn.BatchNorm1d(6), second=layer()), numbers, others=[(numbers[:2],)]).n_folded==1

def test_what_a_mask_hides_cannot_take_a_value_beside_in():
    "`conv(x) + bn(x)`: the conv could add its input, if its mask did not hide that place"
    def forward(m, x): return m.layer(x)+m.bn(x)
    layer = with_mask(MaskedConv(3,3,3,padding=1), torch.mul)
    for hidden in (True, False):
        layer.mask.fill_(1)
        if hidden: layer.mask[:,:,1,1] = 0
        report = folded(Net(forward, layer=copy.deepcopy(layer), bn=bn(3)), x)
        assert report.n_folded==(not hidden)

@pytest.mark.parametrize('read', [lambda w,mask: w*mask+1e-3, lambda w,mask: w*w, lambda w,mask: w.sign()*mask, lambda w,mask: w-w.mean(), lambda w,mask: mask.cumsum(0)*w.cumsum(0)])
def test_what_is_more_than_a_mask_stays(read):
    def forward(m, x): return m.bn(m.layer(x)).sin()
    [row] = folded(Net(forward, layer=with_mask(MaskedConv(3,3,3), read), bn=bn(3)), x).rows
    assert not row.folded and 'computed weight' in row.kind

def test_one_weight_behind_two_masks_stays():
    def forward(m, x): return m.bn(F.conv2d(x, m.c.weight*m.one)).relu()+m.other(F.conv2d(x, m.c.weight*m.two)).relu()
    net = Net(forward, c=conv(3,3), bn=bn(3), other=bn(3))
    for name in ('one','two'): net.register_buffer(name, torch.randint(0, 2, net.c.weight.shape).double())
    assert folded(net, x).n_folded==0
