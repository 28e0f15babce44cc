"""The proof finds what is wrong: one percent of one channel, in every dtype. And it lets pass what is right: a network that amplifies rounding"""
import copy, os, random
from dataclasses import replace
import pytest, torch
from hypothesis import HealthCheck, given, settings
from torch import nn
from fastai_bnfold.fold import *
from fastai_bnfold.fold.affine import Affine
from fastai_bnfold.fold.apply import edits_of, exact_parameters
from fastai_bnfold.fold.folder import program_and_run
from fastai_bnfold.fold.graph import set_argument
from fastai_bnfold.fold.plan import make_plan
from fastai_bnfold.fold.state import Absorb, Rebound, State
from fastai_bnfold.fold.verify import max_err, prove_locally
from graphs import C, programs
from test_property import network

n_plans = int(os.environ.get('FAULTY_PLANS', 60)) # for each dtype
dtypes = torch.float32,torch.float64,torch.bfloat16,torch.float16

def off_in_one_channel(x, channel):
    "`x` with 1 % more in one channel"
    flat = x.flatten().clone()
    flat[channel%len(flat)] *= 1.01
    return flat.view(x.shape)

def faulty(edit, rng):
    "The edit, wrong by one percent in one channel"
    channel = rng.randrange(C)
    if isinstance(edit, Rebound): return replace(edit, **{('lo' if torch.isfinite(edit.lo).any() else 'hi'): off_in_one_channel(edit.lo if torch.isfinite(edit.lo).any() else edit.hi, channel)})
    part = rng.choice(['scale','shift'])
    return replace(edit, map=replace(edit.map, **{part: off_in_one_channel(getattr(edit.map, part), channel)}))

def with_a_fault(program, plan, rng):
    "The steps and the state with one fault that changes something; None if none could be made"
    places = [(i, j) for i,step in enumerate(plan.steps) for j,edit in enumerate(step.edits) if isinstance(edit, Absorb) and edit.node not in plan.state.gone]
    rng.shuffle(places)
    for i,j in places:
        edits = list(plan.steps[i].edits)
        edits[j] = faulty(edits[j], rng)
        steps = [*plan.steps[:i], replace(plan.steps[i], edits=tuple(edits)), *plan.steps[i+1:]]
        weight = edits[j].absorber.weight
        right,wrong = (exact_parameters(program, edits_of(s, plan.state.gone)[weight]) for s in (plan.steps, steps))
        if not any((right[k]-wrong[k]).abs().max()>1e-5*right[k].abs().max().clamp(min=1e-3) for k in right if k in wrong): continue
        state = State()
        for step in steps: state = state.without(program, step.links, step.edits)
        return steps, state
    return None

@pytest.mark.parametrize('dtype', dtypes, ids=str)
def test_one_percent_of_one_channel_is_found(dtype, record_property):
    found = []
    @settings(max_examples=3*n_plans, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, print_blob=False, database=None)
    @given(programs)
    def check(case):
        if len(found)>=n_plans: return
        steps,seed = case
        net = network(steps, seed, positive=seed%2==0).to(dtype)
        x = torch.randn(2,C,5,6).to(dtype)
        try: program,_ = program_and_run(net, (x,))
        except TraceError: return # (an operation that PyTorch has not in this dtype)
        plan = make_plan(program, costly=True)
        assert prove_locally(program, plan.steps, plan.state).wrong=={}
        wrong = with_a_fault(program, plan, random.Random(seed))
        if wrong is None: return
        proof = prove_locally(program, *wrong)
        assert proof.wrong, (steps, seed)
        found.append(1)
    check()
    record_property('plans', len(found))
    assert len(found)==n_plans

class Deep(nn.Module):
    "Amplifies: each layer divides by a tiny standard deviation"
    def __init__(self, n=12):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16,16), nn.BatchNorm1d(16)) for _ in range(n))
        for layer in self.layers: layer[1].running_var.fill_(.01)
    def forward(self, x):
        for layer in self.layers: x = layer(x).sin()
        return x

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
def test_a_network_that_amplifies_rounding_folds_and_is_said_to_be_one(dtype):
    net = Deep(30 if dtype==torch.float64 else 14).to(dtype).eval()
    folder = BNFolder(); folder.fold(net, torch.randn(8,16).to(dtype))
    report = folder.report
    assert report.n_folded==report.n_bn and report.local_err<1e-10 and report.max_err>(1e-4 if dtype==torch.float32 else 1e-9), report.max_err
    assert any('amplifies rounding' in note for note in report.notes)

def test_the_first_number_is_the_local_one():
    net = nn.Sequential(nn.Conv2d(3,8,3), nn.BatchNorm2d(8)).eval()
    folder = BNFolder(); folder.fold(net, torch.randn(2,3,8,8))
    title = str(folder.report).splitlines()[0]
    assert title.index('largest error of a fold')<title.index('difference of the outputs') and folder.report.local_err<1e-14
    assert len(folder.report.proved)==3 and 'batch and size' in folder.report.proved[1]

@pytest.mark.parametrize('name', ['weight','bias'])
def test_a_stored_number_that_is_not_what_was_computed(name, monkeypatch):
    import fastai_bnfold.fold.apply as apply
    real = apply.stored
    monkeypatch.setattr(apply, 'stored', lambda x, like: off_in_one_channel(real(x, like), 3) if (x.ndim==1)==(name=='bias') else real(x, like))
    net = randomize_bn(nn.Sequential(nn.Conv2d(3,8,3), nn.BatchNorm2d(8))).bfloat16().eval()
    with pytest.raises(VerificationError, match='not what was computed'): BNFolder().fold(net, torch.randn(2,3,8,8).bfloat16())

convs = {f'{kind}{nd}d {kw}': (kind, nd, kw) for nd in (1,2) for kind,kws in {
    'Conv': [dict(kernel_size=3,padding=1), dict(kernel_size=3,padding=2,dilation=2), dict(kernel_size=3,padding=36,dilation=36), dict(kernel_size=3,padding=1,dilation=3),
        dict(kernel_size=3,stride=2,padding=1), dict(kernel_size=2,stride=3), dict(kernel_size=7,padding=3), dict(kernel_size=3,padding='same',dilation=3),
        dict(kernel_size=4,padding='same',dilation=2), dict(kernel_size=3,padding='valid',dilation=2), dict(kernel_size=1,stride=2), dict(kernel_size=3,groups=8,padding=1)],
    'ConvTranspose': [dict(kernel_size=3,padding=1), dict(kernel_size=3,stride=3,padding=2,dilation=2,output_padding=1), dict(kernel_size=2,stride=2,groups=4), dict(kernel_size=1)]}.items() for kw in kws}

def proof_of(net, x, spoil=None):
    program,_ = program_and_run(net, (x,))
    plan = make_plan(program)
    [step] = plan.steps
    if spoil: step = replace(step, edits=tuple(map(spoil, step.edits)))
    return prove_locally(program, [step], State().without(program, step.links, step.edits))

@pytest.mark.parametrize('name', convs)
def test_a_few_positions_prove_a_convolution(name):
    kind,nd,kw = convs[name]
    conv,bn = getattr(nn, f'{kind}{nd}d'),getattr(nn, f'BatchNorm{nd}d')
    net = randomize_bn(nn.Sequential(conv(8, 8, **kw), bn(8))).eval()
    x = torch.randn(2, 8, *[13]*nd)
    right = proof_of(net, x)
    assert right.wrong=={} and right.unchecked=={} and right.largest<1e-12
    for channel in range(8):
        def spoil(edit): return replace(edit, map=Affine(off_in_one_channel(edit.map.scale, channel), edit.map.shift))
        if net[1].weight[channel]==0: continue # there is nothing to be wrong
        assert proof_of(net, x, spoil).wrong, channel

@pytest.mark.parametrize('pad', [0,1])
@pytest.mark.parametrize('dilation', [1,2])
def test_a_shift_that_padded_zeros_do_not_reach_is_found(pad, dilation):
    "As if the plan had not looked at the padding: in front of a padded convolution a shift must not go in"
    net = randomize_bn(nn.Sequential(nn.AvgPool2d(1), nn.BatchNorm2d(3), nn.Conv2d(3, 5, 3, dilation=dilation))).eval()
    program,_ = program_and_run(net, (torch.randn(2,3,9,9),))
    plan = make_plan(program)
    conv = next(node for node in program.nodes if 'conv2d' in node.name)
    set_argument(conv, 'padding', [pad*dilation]*2)
    wrong = prove_locally(program, plan.steps, plan.state).wrong
    assert bool(wrong)==bool(pad)
