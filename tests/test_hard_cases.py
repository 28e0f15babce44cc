"A catalogue of hard cases: each is folded right, or kept with a reason, or refused with a clear error; never wrong, never a raw traceback, and the model is as it was"
import dataclasses
import pytest, torch, torch.nn.functional as F
from torch import nn
from fastai_bnfold.all import *
from fastai_bnfold.fold.testing import randomize_bn
from fastai_bnfold.fold.verify import max_err, tolerance
from fastai_bnfold.fold.inputs import as_args, map_tensors, run
from conftest import snapshot, unchanged

gen = torch.Generator().manual_seed(1)
x,bigger,one = torch.randn(2,3,9,9, generator=gen),torch.randn(5,3,12,7, generator=gen),torch.randn(1,3,9,9, generator=gen)
pool = nn.AdaptiveAvgPool2d(2)

class Net(nn.Module):
    "conv1, conv2: 3→8; bn1, bn2 over 8; `f(self, x)` is the forward"
    def __init__(self, f=lambda m,x: m.bn1(m.conv1(x)).relu()):
        super().__init__()
        self.bn1,self.bn2,self.conv1,self.conv2,self.f = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.Conv2d(3,8,3,bias=False), nn.Conv2d(3,8,3), f
        randomize_bn(self)
    def forward(self, *xs): return self.f(self, *xs)

cases = {}
def case(want, *others, args=(x,)):
    "Register a function that makes a model. `want`: for each BN that runs, '' if it folds, else words of the reason; or `(error, words)`. `others`: further inputs on which the folded model must agree"
    def deco(f): cases[f.__name__.replace('_',' ')] = f,want,args,[as_args(o) for o in others]; return f
    return deco

# --- who else reads it?

@case(['also read by the model'], bigger)
def a_conv_output_stored_on_self():
    def f(m, x): m.features = m.conv1(x); return m.bn1(m.features).relu()
    return Net(f)
@case(['also read by the model'], bigger)
def a_conv_output_in_a_list_on_self():
    class Lister(Net):
        def forward(self, x): self.all = [self.conv1(x)]; return self.bn1(self.all[0]).relu()
    return Lister()
@case([''], bigger)
def a_BN_output_stored_on_self():
    def f(m, x): m.features = m.bn1(m.conv1(x)); return m.features.relu()
    return Net(f)
@case(['also read by the model'], bigger)
def a_hook_keeps_the_conv_output():
    m = Net(); m.conv1.register_forward_hook(lambda m,a,o: setattr(m, 'seen', o)); return m
@case(['also read by `mean`'], bigger)
def a_hook_logs_a_mean_of_the_conv_output():
    m,log = Net(),[]; m.conv1.register_forward_hook(lambda m,a,o: log.append(o.mean().item())); return m
@case(['`numpy`'], bigger)
def a_hook_logs_the_conv_output_as_a_list():
    m,log = Net(),[]; m.conv1.register_forward_hook(lambda m,a,o: log.append(o.tolist())); return m
@case([''], bigger)
def a_hook_logs_a_mean_of_the_BN_output():
    m,log = Net(),[]; m.bn1.register_forward_hook(lambda m,a,o: log.append(o.mean().item())); return m
@case(["also read by the model's output"], bigger)
def a_conv_output_also_returned(): return Net(lambda m,x: (lambda c: (m.bn1(c),c))(m.conv1(x)))
@case(['also read by `slice`'], bigger)
def a_view_of_the_conv_output_also_returned(): return Net(lambda m,x: (lambda c: (m.bn1(c),c[:,:3]))(m.conv1(x)))
@case(['also read by `add`'], bigger)
def a_conv_output_also_added(): return Net(lambda m,x: (lambda c: m.bn1(c).sin()+c)(m.conv1(x)))
@case([''], bigger)
def outputs_that_are_views_of_each_other(): return Net(lambda m,x: (lambda y: (y, y[:,:2], y.flatten(1)))(m.bn1(m.conv1(x))))

# --- shared modules and weights

@case(['used 2 times'], bigger)
def a_conv_called_twice_BN_on_one_path(): return Net(lambda m,x: m.bn1(m.conv1(x)) + m.conv1(x))
@case(['used 2 times']*2, bigger)
def a_conv_called_twice_a_BN_each(): return Net(lambda m,x: m.bn1(m.conv1(x)) * m.bn2(m.conv1(x)))
@case([''], bigger)
def a_BN_on_two_convs(): return Net(lambda m,x: m.bn1(m.conv1(x)) + m.bn1(m.conv2(x)))
@case(['',''], bigger)
def siblings_registered_in_the_other_order(): return Net(lambda m,x: m.bn2(m.conv1(x)) + m.bn1(m.conv2(x)))
@case(['tied','tied'], bigger)
def weights_tied_across_modules():
    m = Net(lambda m,x: m.bn1(m.conv1(x)) * m.bn2(m.conv2(x))); m.conv2.weight = m.conv1.weight; return m
@case(['used 2 times'], bigger)
def a_weight_used_through_the_functional_form(): return Net(lambda m,x: m.bn1(m.conv1(x)) + F.conv2d(x, m.conv1.weight))
@case([''], bigger)
def modules_registered_under_two_names():
    m = Net(); m.alias,m.bn_alias = m.conv1,m.bn1; return m
@case([''], bigger)
def a_BN_of_a_constant():
    class Constant(Net):
        def __init__(self): super().__init__(); self.query = nn.Parameter(torch.randn(1,8,1,1))
        def forward(self, x): return self.conv1(x)*self.bn1(self.query)
    return Constant()

# --- in place

@case([''], bigger)
def a_number_added_in_place_before_the_BN(): return Net(lambda m,x: m.bn1(m.conv1(x).add_(1)))
@case(['`sigmoid`'], bigger)
def written_to_before_the_BN(): return Net(lambda m,x: m.bn1(m.conv1(x).sigmoid_()))
@case(['also read by `add`'], bigger)
def written_to_after_the_BN(): return Net(lambda m,x: (lambda c: m.bn1(c)*c.add_(1).sum())(m.conv1(x)))
@case([''], bigger)
def the_BN_output_written_to(): return Net(lambda m,x: m.bn1(m.conv1(x)).relu_().mul_(2))
@case(['',''], bigger)
def the_input_written_to(): return Net(lambda m,x: m.bn1(m.conv1(x)) + m.bn2(m.conv2(x.relu_())))
@case([''], bigger)
def a_buffer_written_to():
    class Counter(Net):
        def __init__(self): super().__init__(); self.register_buffer('calls', torch.zeros((), dtype=torch.long)); self.register_buffer('mean', torch.zeros(3,1,1))
        def forward(self, x): self.calls += 1; self.mean = self.mean*.9+x.mean((0,2,3)).view(3,1,1)*.1; return self.bn1(self.conv1(x))
    return Counter()

# --- the state of the BN

@case(['statistics of the batch'], bigger)
def a_BN_in_training_mode_inside_an_eval_model():
    m = Net().eval(); m.bn1.train(); return m
@case(['statistics of the batch'], bigger)
def a_model_that_keeps_its_BN_in_training_mode():
    class Stubborn(Net):
        def train(self, mode=True): super().train(mode); self.bn1.training = True; return self
    return Stubborn()
@case(['statistics of the batch'], bigger)
def no_running_statistics():
    m = Net(); m.bn1 = nn.BatchNorm2d(8, track_running_stats=False); return m
@case([''], bigger)
def momentum_None():
    m = Net(); m.bn1.momentum = None; return m
def _var(v, eps=1e-5):
    m = Net(); m.bn1.running_var.fill_(v); m.bn1.eps = eps; return m
@case([''], bigger)
def zero_variance(): return _var(0.)
@case([''], bigger)
def huge_variance(): return _var(1e30)
@case([''], bigger)
def tiny_variance(): return _var(1e-30)
@case([''], bigger)
def tiny_variance_and_eps_0(): return _var(1e-12, 0.)
@case((StatisticsError, 'bn1.running_var'))
def zero_variance_and_eps_0(): return _var(0., 0.)
@case((StatisticsError, 'bn1.running_mean'))
def statistics_that_are_not_finite():
    m = Net(); m.bn1.running_mean[3] = float('nan'); return m

# --- dtypes, formats, devices

@case([''], bigger.half(), args=(x.half(),))
def half(): return Net().half()
@case([''], bigger.bfloat16(), args=(x.bfloat16(),))
def bf16(): return Net().bfloat16()
@case([''], bigger.double(), args=(x.double(),))
def double(): return Net().double()
@case([''], bigger)
def the_conv_half_the_BN_float():
    m = Net(lambda m,x: m.bn1(m.conv1(x.half()).float()).relu()); m.conv1.half(); return m
@case(['whose bias is computed anew'], bigger)
def a_bias_of_another_dtype():
    class Own(nn.Conv2d):
        def forward(self, x): return F.conv2d(x, self.weight, self.bias.to(x.dtype))
    m = Net(); m.conv1 = Own(3,8,3); m.conv1.bias.data = m.conv1.bias.data.double(); return m
@case(['overflow'], args=(x.half(),))
def an_overflow_in_half():
    m = Net(); m.bn1.running_var[:] = 1e-6; m.bn1.eps = 1e-9; m.bn1.weight.data[:] = 6e4; return m.half()
@case([''], bigger)
def channels_last(): return Net().to(memory_format=torch.channels_last)
@case((FoldError, 'meta device'))
def the_meta_device(): return Net().to('meta')

# --- what others made of the model

@case([''], bigger)
def a_submodule_that_is_compiled():
    m = Net(); m.conv1 = torch.compile(m.conv1, backend='eager'); return m
@case([''], bigger)
def a_compiled_model(): return torch.compile(Net(), backend='eager')
@case(['TorchScript'], bigger)
def a_scripted_conv():
    m = Net(); m.conv1 = torch.jit.script(m.conv1); return m
@case([''], bigger)
def a_scripted_BN():
    m = Net(); m.bn1 = torch.jit.script(m.bn1.eval()); return m
@case(['does more than to normalize'], bigger)
def a_scripted_conv_and_BN():
    m = Net(lambda m,x: m.both(x)); m.both = torch.jit.script(nn.Sequential(m.conv1, m.bn1)); return m
@case(['does more than to normalize'])
def a_jit_traced_model(): return torch.jit.trace(Net().eval(), x)
@case([''], bigger)
def parametrized_weights():
    m = Net(); m.conv1 = nn.utils.parametrizations.spectral_norm(m.conv1); return m
@case([''], bigger)
def DataParallel(): return nn.DataParallel(Net())
@case((FoldError, 'cannot be copied'))
def a_model_that_cannot_be_copied():
    m = Net(); m.lock = __import__('threading').Lock(); return m

# --- hooks that change values

@case([''], bigger)
def a_pre_hook_on_the_conv():
    m = Net(); m.conv1.register_forward_pre_hook(lambda m,a: (a[0].sin(),)); return m
@case([''], bigger)
def a_pre_hook_on_the_BN():
    m = Net(); m.bn1.register_forward_pre_hook(lambda m,a: (a[0]*2,)); return m
@case(['`sin`'], bigger)
def a_pre_hook_on_the_BN_that_is_not_affine():
    m = Net(); m.bn1.register_forward_pre_hook(lambda m,a: (a[0].sin(),)); return m
@case(['`sigmoid`'], bigger)
def a_hook_on_the_conv():
    m = Net(); m.conv1.register_forward_hook(lambda m,a,o: o.sigmoid()); return m
@case([''], bigger)
def a_hook_on_the_BN():
    m = Net(); m.bn1.register_forward_hook(lambda m,a,o: o.sigmoid()); return m
@case([''], bigger)
def a_backward_hook():
    m = Net(); m.conv1.register_full_backward_hook(lambda m,gi,go: None); return m

# --- inputs and outputs

@dataclasses.dataclass
class Inputs:
    image:torch.Tensor
    k:int=2
@dataclasses.dataclass(frozen=True)
class Outputs:
    a:torch.Tensor
    b:list
@case(['',''], (bigger, bigger+1), args=(x, x+1))
def several_inputs(): return Net(lambda m,x,y: m.bn1(m.conv1(x)) + m.bn2(m.conv2(y)))
@case(['',''], [{'y': bigger, 'z': [bigger]}], args=({'y': x, 'z': [x]},))
def dicts_and_lists(): return Net(lambda m,d: {'a': m.bn1(m.conv1(d['y'])), 'b': [m.bn2(m.conv2(d['z'][0])), 3]})
@case(['',''], [Inputs(bigger)], args=(Inputs(x),))
def dataclasses_in_and_out(): return Net(lambda m,i: Outputs(m.bn1(m.conv1(i.image)), [m.bn2(m.conv2(i.image))]))

# --- control flow, chance

@case(['another way for another input: `bn1` runs 0 times'], args=(x.abs(),))
def a_branch_not_taken_that_a_probe_takes(): return Net(lambda m,x: m.bn1(m.conv1(x)) if x[0,0,0,0]>0 else m.conv1(x))
@case(['another way for another input: `bn1` runs 0 times'], bigger, one)
def a_branch_for_another_batch_size(): return Net(lambda m,x: m.bn1(m.conv1(x)) if len(x)>1 else m.conv1(x))
@case([''], bigger)
def a_branch_that_no_probe_takes(): return Net(lambda m,x: m.conv1(x) if x.mean().item()>1e6 else m.bn1(m.conv1(x)))
@case((TraceError, 'not deterministic'))
def not_deterministic_in_eval():
    class Noisy(Net):
        def forward(self, x): return super().forward(x)+torch.rand(1)
    return Noisy()
@case((TraceError, 'call `model.eval'))
def a_dropout_in_training_mode():
    m = Net(); m.f = lambda m,x: m.drop(m.bn1(m.conv1(x))); m.drop = nn.Dropout(); m.eval(); m.drop.train(); return m

# --- reports about torch.fx and torch.ao, rebuilt: pytorch/pytorch issues

@case(['used 2 times'], (bigger, one), args=(x, one))
def pytorch_197539_a_reused_conv_BN_on_one_path(): return Net(lambda m,x,y: (m.bn1(m.conv2(x)), m.conv2(y)))
@case(['used 2 times'], (bigger[:,:1], bigger[:,1:2]), args=(x[:,:1], x[:,1:2]))
def pytorch_104593_a_conv_used_twice_BN_once():
    m = Net(lambda m,x,y: m.conv(x)+m.bn(m.conv(y))); m.conv,m.bn = nn.Conv2d(1,1,1),nn.BatchNorm2d(1)
    nn.init.normal_(m.bn.weight); return m
@case(['bare function call'], bigger)
def pytorch_122070_a_functional_BN():
    class Functional(Net):
        def __init__(self):
            super().__init__(); self.gamma,self.beta = nn.Parameter(torch.randn(8)),nn.Parameter(torch.randn(8))
        def forward(self, x): return F.batch_norm(self.conv1(x), self.bn1.running_mean, self.bn1.running_var, self.gamma, self.beta)
    return Functional()
@case([''], torch.randn(3,4,70,1), args=(torch.randn(2,4,5,1),))
def pytorch_111322_linear_conv_BN_ReLU(): return randomize_bn(nn.Sequential(nn.Linear(1,258), nn.Conv2d(4,5,2,stride=64,dilation=(4,2)), nn.BatchNorm2d(5), nn.ReLU()))
@case(['',''], bigger)
def pytorch_112579_a_chain_of_convs_and_BNs(): return randomize_bn(nn.Sequential(nn.Conv2d(3,64,3,1,1), nn.BatchNorm2d(64), nn.Conv2d(64,64,3,1,1), nn.BatchNorm2d(64)))

# ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('inplace', [False, True], ids=['copy','in place'])
@pytest.mark.parametrize('name', cases)
def test_hard_case(name, inplace, record_property):
    make,want,args,others = cases[name]
    torch.manual_seed(0)
    model = make()
    kept,given = snapshot(model),map_tensors(torch.clone, args)
    folder = BNFolder()
    if isinstance(want, tuple) and not (inplace and want[1]=='cannot be copied'):
        with pytest.raises(want[0], match=want[1]): folder.fold(model, args, inplace=inplace)
        assert unchanged(model, kept); record_property('fate', 'refused with a clear error'); return
    if isinstance(want, tuple): want = ['']
    batches = [args, *others]
    before = [run(model, b) for b in batches]
    folded = folder.fold(model, args, inplace=inplace)
    rows = [r for r in folder.report.rows if r.live]
    assert [r.folded for r in rows]==[w=='' for w in want], [r.fate for r in rows]
    for r,w in zip(rows, want): assert w in r.reason
    for r in folder.report.rows: assert r.folded or r.reason
    for b,out in zip(batches, before): assert max_err(out, run(folded, b)) <= tolerance(out+[p for p in folded.parameters()], len(rows))
    map_tensors((given_ := []).append, given); map_tensors((args_ := []).append, args)
    assert all(torch.equal(a, b) for a,b in zip(given_, args_)) # the batch, too
    if inplace: folder.unfold()
    assert unchanged(model, kept)
    record_property('fate', 'kept with a reason' if any(want) else 'folded right')

def test_the_report_warns_of_other_ways():
    folder = BNFolder(); folder.fold(cases['a branch that no probe takes'][0](), x)
    assert any('looks at its data' in n and 'conv1' in n for n in folder.report.notes) and 'looks at its data' in str(folder.report)
    folder.fold(Net(lambda m,x: m.conv1(x) if x.numpy().mean()>1e6 else m.bn1(m.conv1(x))), x); assert any('looks at its data' in n for n in folder.report.notes)
    folder.fold(Net(), x); assert not folder.report.notes

def test_without_verification_nothing_is_promised():
    "`verify=False` folds what the trace shows, and the report has no error to show"
    m = cases['a branch for another batch size'][0]()
    folder = BNFolder(verify=False); folder.fold(m, x)
    assert folder.report.n_folded==1 and folder.report.max_err is None and any('Not verified' in n for n in folder.report.notes) and 'Not verified' in str(folder.report)

def test_a_compiled_model_runs_folded():
    "Not the stale compiled code: compile, fold, unfold in place"
    m = torch.compile(Net().eval(), backend='eager')
    with torch.no_grad():
        y = m(x); folder = BNFolder(); folder.fold(m, x, inplace=True)
        assert isinstance(m._orig_mod.bn1, nn.Identity) and torch.allclose(m(x), y, atol=1e-5)
        w = m._orig_mod.conv1.weight; kept = w.clone()
        w.zero_(); assert not torch.allclose(m(x), y, atol=1e-2) # it is the folded one that runs
        with pytest.raises(FoldedError, match='changed after the fold'): folder.unfold()
        w.copy_(kept); folder.unfold(); assert torch.equal(m(x), y)

def test_distributed_data_parallel(tmp_path):
    from torch.nn.parallel import DistributedDataParallel
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        m = DistributedDataParallel(Net()); kept = snapshot(m)
        before = run(m, (bigger,))
        folder = BNFolder(); folder.fold(m, x, inplace=True)
        assert folder.report.n_folded==1 and max_err(before, run(m, (bigger,)))<1e-5
        folder.unfold(); assert unchanged(m, kept)
    finally: torch.distributed.destroy_process_group()

_memory = '''
import resource, sys, torch
from torch import nn
from fastai_bnfold.all import BNFolder
n,k = 56,3072
w = torch.randn(k,k)*(2/k)**.5
def linear(): l = nn.utils.skip_init(nn.Linear, k, k, bias=False); l.weight.data.copy_(w); return l
m = nn.Sequential(*[l for _ in range(n) for l in (linear(), nn.BatchNorm1d(k), nn.ReLU())]).eval()
x = torch.randn(2,k)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024
with torch.no_grad(): m(x); m(x[:1])
BNFolder().fold(nn.Sequential(nn.Conv2d(3,4,3), nn.BatchNorm2d(4)), torch.randn(2,3,5,5)) # imports, caches
changed = 4*n*k*k
before = peak(); folder = BNFolder(); folder.fold(m, x, inplace=True)
print(folder.report.n_folded, (peak()-before)/changed, changed)
'''
def test_memory():
    "A model of 2 GB: one extra copy of what changes, and the arithmetic of one layer in float64"
    import subprocess, sys
    out = subprocess.run([sys.executable, '-c', _memory], capture_output=True, text=True)
    assert out.returncode==0, out.stderr[-2000:]
    n,ratio,changed = out.stdout.split()
    assert n=='56' and 2e9<float(changed) and float(ratio)<1.2, out.stdout
