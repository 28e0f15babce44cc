"Dataflow: what may be folded, what may not, and what bad input gives"
import pytest, torch, torch.nn.functional as F
from torch import nn
from fastai_bnfold.all import *
from fastai_bnfold.fold.testing import randomize_bn
from conftest import error64, snapshot, unchanged

x = torch.randn(2,3,9,9, generator=torch.Generator().manual_seed(1))

class Net(nn.Module):
    "conv1, conv2: 3→8; bn1, bn2 over 8; `f(self, x)` is the forward"
    def __init__(self, f):
        super().__init__()
        self.bn1,self.bn2,self.conv1,self.conv2,self.f = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.Conv2d(3,8,3,bias=False), nn.Conv2d(3,8,3), f
        randomize_bn(self)
    def forward(self, x): return self.f(self, x)

# name: (forward, path of each BN call → what its row must say ('' = folded))
cases = {
    'registration order is not execution order': (lambda m,x: m.bn1(m.conv1(x)) + m.bn2(m.conv2(x)), ['','']),
    'crosswise': (lambda m,x: m.bn2(m.conv1(x)) + m.bn1(m.conv2(x)), ['','']),
    'conv called twice, BN on one path': (lambda m,x: m.bn1(m.conv1(x)) + m.conv1(x), ['used 2 times']),
    'conv called twice, a BN each': (lambda m,x: m.bn1(m.conv1(x)) * m.bn2(m.conv1(x)), ['used 2 times']*2),
    'one BN on two convs': (lambda m,x: m.bn1(m.conv1(x)) + m.bn1(m.conv2(x)), ['']),
    'conv output also added': (lambda m,x: (lambda c: m.bn1(c).sin()+c)(m.conv1(x)), ['also read by `add`']),
    'conv output also returned': (lambda m,x: (lambda c: (m.bn1(c),c))(m.conv1(x)), ["also read by the model's output"]),
    'BN output is all that is read': (lambda m,x: m.bn1(m.conv1(x)).relu_(), ['']),
    'written to before the BN': (lambda m,x: m.bn1(m.conv1(x).sigmoid_()), ['`sigmoid`']),
    'a number added in place before the BN': (lambda m,x: m.bn1(m.conv1(x).add_(1)), ['']),
    'written to after the BN': (lambda m,x: (lambda c: m.bn1(c).sum() + c.add_(1).sum())(m.conv1(x)), ['also read by `add`']),
    'weight read elsewhere': (lambda m,x: m.bn1(m.conv1(x)) + F.conv2d(x, m.conv1.weight), ['used 2 times']),
    'functional BN': (lambda m,x: F.batch_norm(m.conv1(x), m.bn1.running_mean, m.bn1.running_var), ['bare function call']),
    'no absorber': (lambda m,x: m.bn1(m.conv1(x).sigmoid()).sigmoid(), ['`sigmoid`']),
    'two readers, both absorb': (lambda m,x: (lambda b: m.conv1(b[:,:3])+m.conv2(b[:,5:]))(m.bn1(x.repeat(1,3,1,1)[:,:8].sin())), ['']),
    'two readers, one does not': (lambda m,x: (lambda b: m.conv1(b[:,:3])+b[:,:,1:-1,1:-1].sin())(m.bn1(x.repeat(1,3,1,1)[:,:8].sin())), ['`sin`']),
}

@pytest.mark.parametrize('name', cases)
def test_dataflow(name):
    f,want = cases[name]
    net = Net(f)
    folder = BNFolder()
    folded = folder.fold(net, x)
    ran = [r for r in folder.report.rows if r.live]
    assert len(ran)==len(want)
    for r,w in zip(ran, want):
        assert r.folded==(w=='') and w in r.reason, r.fate
    for v in (x, torch.randn(5,3,12,7)): assert error64(folded, net, v) < 1e-5
    for r in folder.report.rows:
        if not r.live: assert 'never ran' in r.reason and not r.folded

def test_tied_weight_is_kept():
    net = Net(lambda m,x: m.bn1(m.conv1(x)))
    net.conv2.weight = net.conv1.weight
    row = BNFolder().plan(net, x).rows[0]
    assert not row.folded and 'tied' in row.reason and 'conv2' in row.reason

def test_a_module_under_two_names_is_one_module():
    net = Net(lambda m,x: m.bn1(m.conv1(x)).relu()); net.alias,net.alias_bn = net.conv1,net.bn1
    folder = BNFolder(); folded = folder.fold(net, x)
    assert folder.report.rows[0].folded and error64(folded, net, x) < 1e-5
    assert folded.alias is folded.conv1 and folded.alias_bn is folded.bn1 and isinstance(folded.bn1, nn.Identity)

def test_subclass_with_its_own_forward_is_kept():
    class Loud(nn.BatchNorm2d):
        def forward(self, x): return super().forward(x).exp()
    net = Net(lambda m,x: m.bn1(m.conv1(x))); net.bn1 = Loud(8); randomize_bn(net)
    row = BNFolder().plan(net, x).rows[0]
    assert not row.folded and 'Loud' in row.reason

def test_a_forward_replaced_on_the_instance_is_kept():
    net = Net(lambda m,x: m.bn1(m.conv1(x))); f = net.bn1.forward
    net.bn1.forward = lambda x: f(x).exp()
    row = BNFolder(verify=False).plan(net, x).rows[0]
    assert not row.folded and 'applies `exp`' in row.reason

def test_a_weight_that_is_a_buffer_is_kept():
    net = Net(lambda m,x: m.bn1(m.conv1(x))); w = net.conv1.weight.data
    del net.conv1.weight; net.conv1.register_buffer('weight', w)
    row = BNFolder().plan(net, x).rows[0]
    assert not row.folded and 'buffer' in row.reason

def test_a_weight_that_forward_computes_is_kept():
    net = Net(lambda m,x: m.bn1(F.conv2d(x, m.conv1.weight**2)))
    row = BNFolder().plan(net, x).rows[0]
    assert not row.folded and 'computed anew' in row.reason

def test_a_value_that_leaves_pytorch_is_a_reader_too():
    net = Net(lambda m,x: (lambda c: m.bn1(c)*float(c.detach().numpy().mean()))(m.conv1(x))); state = snapshot(net)
    folder = BNFolder(); folder.fold(net, x, inplace=True)
    assert 'also read by `detach`' in folder.report.rows[0].reason and unchanged(net, state)

def test_a_hook_on_the_bn_goes_on_working():
    net = Net(lambda m,x: m.bn1(m.conv1(x)).relu()); seen = []
    net.bn1.register_forward_hook(lambda m,i,o: seen.append(o.detach().clone()))
    BNFolder().fold(net, x, inplace=True); net.eval()(x)
    assert isinstance(net.bn1, nn.Identity) and torch.allclose(seen[0], seen[-1], atol=1e-4)

def test_a_hook_that_changes_the_value_in_between():
    net = Net(lambda m,x: m.bn1(m.conv1(x)).relu())
    net.conv1.register_forward_hook(lambda m,i,o: o.sigmoid())
    folder = BNFolder(); folded = folder.fold(net, x)
    assert not folder.report.rows[0].folded and 'sigmoid' in folder.report.rows[0].reason

def test_subclass_without_a_forward_of_its_own_folds():
    class Named(nn.BatchNorm2d): pass
    net = Net(lambda m,x: m.bn1(m.conv1(x))); net.bn1 = Named(8); randomize_bn(net)
    folder = BNFolder(); assert error64(folder.fold(net, x), net, x) < 1e-5 and folder.report.rows[0].folded

def test_several_inputs_and_structured_outputs():
    class Two(Net):
        def forward(self, x, d): return {'a': self.bn1(self.conv1(x)), 'b': [self.bn2(self.conv2(d['y'])), 3]}
    net = Two(None); folder = BNFolder()
    folded = folder.fold(net, (x, {'y': x+1}))
    assert folder.report.n_folded==2
    a,b = net.eval()(x, {'y':x+1}),folded.eval()(x, {'y':x+1})
    assert torch.allclose(a['a'], b['a'], atol=1e-5) and torch.allclose(a['b'][0], b['b'][0], atol=1e-5)

def test_a_model_that_writes_into_its_input():
    "Found by the property test; the batch stays as it was, too"
    net = Net(lambda m,x: m.bn1(m.conv1(x)) + m.bn2(m.conv2(x.relu_()))); batch = x.clone()
    folder = BNFolder(); folded = folder.fold(net, batch)
    assert folder.report.n_folded==2 and torch.equal(batch, x) and error64(folded, net, x) < 1e-5

# --- bad input -----------------------------------------------------------------------------------

def test_no_bn_is_fine():
    folder = BNFolder(); m = nn.Sequential(nn.Conv2d(3,4,3))
    folder.fold(m, x)
    assert folder.report.n_bn==0 and 'no batch norm' in str(folder.report) and folder.report.params_before==folder.report.params_after

def test_no_running_statistics_is_kept_with_a_reason():
    m = nn.Sequential(nn.Conv2d(3,4,3), nn.BatchNorm2d(4, track_running_stats=False)); state = snapshot(m)
    folder = BNFolder(); folder.fold(m, x, inplace=True)
    assert not folder.report.n_folded and 'statistics of the batch' in folder.report.rows[0].reason and unchanged(m, state)

@pytest.mark.parametrize('bad', [float('nan'), float('inf'), -float('inf')])
@pytest.mark.parametrize('what', ['running_mean','running_var','weight','bias'])
def test_statistics_that_are_no_numbers(what, bad):
    net = Net(lambda m,x: m.bn1(m.conv1(x)) + m.bn2(m.conv2(x)))
    getattr(net.bn2, what).data[3] = bad
    state = snapshot(net)
    folder = BNFolder()
    folder.fold(net, x, inplace=True)
    [row] = folder.report.kept
    assert (row.bn, row.kind)==('bn2', 'not finite') and f'`bn2.{what}`' in row.reason
    folder.unfold()
    assert unchanged(net, state) and net.training

def test_negative_variance():
    net = Net(lambda m,x: m.bn1(m.conv1(x))); net.bn1.running_var[0] = -1
    with pytest.raises(StatisticsError, match='bn1.running_var'): BNFolder().fold(net, x, inplace=True)

@pytest.mark.parametrize('batch', [torch.randn(2,4,9,9), torch.randint(0,9,(2,3,9,9)), 'text', torch.randn(2,3,1,1)])
def test_a_batch_that_does_not_fit(batch):
    net = Net(lambda m,x: m.bn1(m.conv1(x))); state = snapshot(net)
    with pytest.raises(TraceError, match='(?s)Given: .*Expected'): BNFolder().fold(net, batch, inplace=True)
    assert unchanged(net, state) and net.training

def test_not_a_module():
    with pytest.raises(FoldError, match='fold_bn'): BNFolder().fold('resnet', x)

def test_no_batch():
    net = Net(lambda m,x: m.bn1(m.conv1(x)))
    folder = BNFolder(); folder.fold(net)
    assert folder.report.n_folded==1
    with pytest.raises(NoDataError, match='Give a batch'): BNFolder().fold(nn.Sequential(nn.Linear(3,4), nn.BatchNorm1d(4)))

def test_not_deterministic():
    class Noisy(Net):
        def forward(self, x): return self.bn1(self.conv1(x)) + torch.rand(1)
    net = Noisy(None); state = snapshot(net)
    with pytest.raises(TraceError, match='not deterministic'): BNFolder().fold(net, x, inplace=True)
    assert unchanged(net, state)

@pytest.mark.parametrize('exc', [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize('step', ['swaps_for', 'record', 'max_err', 'make_plan', 'program_of', 'prove_locally', 'perturbed'])
def test_a_failure_in_any_step_changes_nothing(step, exc, monkeypatch):
    "Fault injection: the n-th call of each step fails"
    import fastai_bnfold.fold.folder as f
    if not hasattr(f, step): import fastai_bnfold.fold.verify as f
    real = getattr(f, step)
    for nth in range(1,5):
        calls = []
        def faulty(*a, **k):
            calls.append(1)
            if len(calls)==nth: raise exc('injected')
            return real(*a, **k)
        net = Net(lambda m,x: m.bn1(m.conv1(x)) + m.bn2(m.conv2(x))); state = snapshot(net)
        monkeypatch.setattr(f, step, faulty)
        try: BNFolder().fold(net, x, inplace=True)
        except (exc, FoldError) as e: assert isinstance(e, exc) or 'injected' in str(e) and isinstance(e.__cause__, exc); assert unchanged(net, state) and net.training and isinstance(net.bn1, nn.BatchNorm2d)
        else: assert len(calls)<nth

def test_overflow_in_half():
    net = Net(lambda m,x: m.bn1(m.conv1(x))); net.bn1.running_var[:] = 1e-6; net.bn1.eps = 1e-9; net.bn1.weight.data[:] = 6e4
    net.half(); state = snapshot(net)
    folder = BNFolder(); folder.fold(net, x.half(), inplace=True)
    assert not folder.report.n_folded and 'would overflow torch.float16' in folder.report.rows[0].reason
    assert unchanged(net, state)

def test_unfold_without_fold():
    with pytest.raises(FoldError, match='fold'): BNFolder().unfold()

def test_a_model_that_rounds_badly_is_not_refused():
    "A BN with a tiny variance magnifies the noise of its input: the fold is as right as the model is"
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3,8,3), nn.BatchNorm2d(8), nn.Conv2d(8,8,1), nn.BatchNorm2d(8)).eval()
    randomize_bn(net[:2])
    net[3].running_var.fill_(1e-12); net[3].eps = 1e-14
    with torch.no_grad(): net[3].running_mean.copy_(net[:3](torch.ones(1,3,8,8)).mean((0,2,3)))
    f = BNFolder()
    f.fold(net, 1+1e-6*torch.randn(2,3,8,8))
    assert f.report.n_folded==2 and f.report.max_err>1e-4
