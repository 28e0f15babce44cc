"Two processes (gloo, CPU), started by `accelerate launch`: the same folded model on each, validation over all, and no process waits for one that fails"
import json, os, subprocess, sys
from pathlib import Path
import pytest, torch
pytest.importorskip('accelerate')
script = Path(__file__).parent.parent/'examples'/'distributed.py'

def launch(out, *args):
    env = os.environ | dict(CUDA_VISIBLE_DEVICES='', ACCELERATE_USE_CPU='1', OMP_NUM_THREADS='1')
    cmd = [Path(sys.executable).parent/'accelerate', 'launch', '--multi_gpu', '--num_processes', '2', '--num_machines', '1', '--mixed_precision', 'no', '--dynamo_backend', 'no', '--main_process_port', '0', script, '--epochs', '1', '--out', out, *args]
    res = subprocess.run([str(c) for c in cmd], env=env, capture_output=True, text=True, timeout=240)
    assert res.returncode==0, res.stderr[-3000:]
    return [json.loads((out/f'{r}.json').read_text()) for r in (0,1)]

def test_two_processes_fold_the_same(tmp_path):
    a,b = launch(tmp_path)
    assert a==b and a['n_processes']==2 and a['n_folded']==20
    assert a['n_items']==360 and a['n_changed']==0 # all of the validation set, each item once
    assert a['before']['accuracy']==a['after']['accuracy'] and abs(a['before']['valid_loss']-a['after']['valid_loss'])<1e-4*max(1, a['before']['valid_loss'])
    x,y = (torch.load(tmp_path/f'{r}.pth') for r in (0,1))
    assert list(x)==list(y) and all(torch.equal(x[k], y[k]) for k in x) and not any('running' in k for k in x)

def test_one_process_fails(tmp_path):
    a,b = launch(tmp_path, '--fail-on', '1')
    assert 'TraceError' in b['error'] and 'process 1: TraceError' in a['error'] and a['unchanged'] and b['unchanged']

def test_pytorch_has_no_sync_bn_on_the_cpu(tmp_path):
    "Why the processes above do not train with `SyncBatchNorm`; if this fails one day, they can"
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        m = torch.nn.Sequential(torch.nn.Conv2d(3,4,3), torch.nn.SyncBatchNorm(4))
        with pytest.raises(ValueError, match='only work with GPU'): torch.nn.parallel.DistributedDataParallel(m)
        with pytest.raises(ValueError, match='on GPU'): m.train()(torch.randn(2,3,5,5))
    finally: torch.distributed.destroy_process_group()
