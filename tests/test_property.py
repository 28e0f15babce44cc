"Random networks: folded equals unfolded, whatever is planned, and no fold is missed"
import os
import pytest, torch
from hypothesis import HealthCheck, assume, given, settings
from fastai_bnfold.all import *
from fastai_bnfold.fold.testing import randomize_bn
from fastai_bnfold.fold.plan import bns_of
from fastai_bnfold.fold.state import View
from fastai_bnfold.fold.program import program_of
from conftest import error64
from graphs import C, Program, missed, programs

def network(steps, seed, positive=False):
    torch.manual_seed(seed)
    net = randomize_bn(Program(steps), seed).double().eval()
    if positive:
        for m in net.modules():
            if getattr(m, 'running_var', None) is not None and getattr(m, 'weight', None) is not None: m.weight.data = m.weight.data.abs()+.3
    return net

@pytest.fixture(autouse=True, scope='module')
def one_thread():
    "The values are tiny: a second thread only waits"
    n = torch.get_num_threads(); torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

common = dict(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, print_blob=False)

def n_bns(net, x): return sum(bn.is_bn for bn in bns_of(View(program_of(net, (x,)))))

n_graphs = 2000
@settings(max_examples=n_graphs, **common)
@given(programs)
def test_folded_equals_unfolded(program):
    steps,seed = program
    net = network(steps, seed)
    x = torch.randn(2,C,5,6).double()
    folder = BNFolder(costly=seed%2==0); folded = folder.fold(net, x)
    rep = folder.report
    if seed%5==0: # as many BNs run as the report says
        n_ran = sum(r.live and r.is_bn for r in rep.rows)
        assert (n_bns(net, x), n_bns(folded, x))==(n_ran, n_ran-rep.n_folded)
    assert all(r.folded or r.reason for r in rep.rows)
    for v in (x, torch.randn(3,C,7,5).double()): assert error64(folded, net, v) < 1e-9

@settings(max_examples=int(os.environ.get('MISSED_EXAMPLES', 150)), **common)
@given(programs)
def test_no_fold_is_missed(program):
    """For every BN that stays: a least-squares solver that knows nothing of the rules finds no way to fold it either (γ > 0, since it moves them steadily;
    the environment variable MISSED_EXAMPLES sets how many graphs)"""
    steps,seed = program
    assume(not {'half','halves'} & {name for name,*_ in steps}) # they leave channels that nobody reads
    net = network(steps, seed, positive=True)
    torch.manual_seed(seed)
    xs = [2*torch.randn(80,C,*size).double() for size in ((4,3),(3,5))]
    plan = BNFolder(costly=True).plan(net, xs[0])
    gone = {int(r.bn.split('.')[1]) for r in plan.rows if r.folded and r.bn.startswith('mods.')}
    for r in plan.rows:
        if r.folded or r.possible or not r.live or not r.bn.startswith('mods.') or not r.reason.startswith('backward'): continue
        k = int(r.bn.split('.')[1])
        if steps[k][0] not in ('bn','instance norm') or sum(m is net.mods[k] for m in net.mods)>1: continue
        assert (e := missed(net, k, xs, gone)) > 1e-6, f"{e:.1e} "+f'{r.bn}: {r.reason}\n{list(enumerate(steps))}'
