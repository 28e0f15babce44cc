import copy, os, sys
from pathlib import Path
import pytest, torch
from fastai_bnfold.fold.verify import max_err
from fastai_bnfold.fold.inputs import run

os.environ.setdefault('MPLBACKEND', 'agg')
sys.modules.setdefault('openvino_telemetry', None) # "missing": OpenVINO's sender forks the process of the tests, threads and all
if 'PYTEST_XDIST_WORKER' in os.environ: # one thread for each worker, and for what it starts
    os.environ['OMP_NUM_THREADS'] = '1'; torch.set_num_threads(1)

@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)

@pytest.fixture(scope='session')
def imagenette():
    "The real data, where the environment variable IMAGENETTE names it"
    p = os.environ.get('IMAGENETTE')
    if not p or not Path(p).exists(): pytest.skip('IMAGENETTE does not name a folder or archive')
    return p

def error64(folded, model, *args):
    "Error of `folded` against `model` computed in float64, relative to the largest output"
    to64 = lambda o: o.double() if torch.is_tensor(o) and o.is_floating_point() else o
    ref = run(copy.deepcopy(model).double(), tuple(map(to64, args)))
    return max_err(ref, run(folded, args))

def snapshot(m):
    "What `unchanged` compares a model with: its tensors, copies of them, its modules and their flags"
    return {k:(t, None if t.is_meta else t.detach().clone()) for k,t in m.state_dict(keep_vars=True).items()}, [(k,o,o.training) for k,o in m.named_modules()]
def unchanged(m, kept):
    "Is everything of the model as it was: the very same tensors with the same numbers, the same modules with the same flags?"
    state,modules = kept
    now = m.state_dict(keep_vars=True)
    return list(now)==list(state) and all(now[k] is t and (c is None or torch.equal(t.nan_to_num(), c.nan_to_num())) for k,(t,c) in state.items()) and [(k,o,o.training) for k,o in m.named_modules()]==modules
