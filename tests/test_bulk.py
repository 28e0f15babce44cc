"Bulk inference on Ray: nothing is lost when a worker dies, and a job that was killed goes on where it stopped"
import json, os, signal, subprocess, sys, time
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
ray = pytest.importorskip('ray'); psutil = pytest.importorskip('psutil')
import pyarrow as pa, pyarrow.dataset, pyarrow.parquet
from fastai_bnfold.deploy.export import export_model, write_eager
from fastai_bnfold.deploy.serve import Deployed, sha256

root = Path(__file__).parent.parent

@pytest.fixture(scope='module')
def setup(tmp_path_factory):
    "A deployed model, 600 images as Parquet, one of them broken"
    d = tmp_path_factory.mktemp('bulk')
    torch.manual_seed(0)
    (d/'model').mkdir()
    net = torch.nn.Sequential(torch.nn.Conv2d(3,4,3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4,3))
    write_eager(export_model(net.eval(), (torch.randn(2,3,64,64),)), d/'model')
    card = dict(name='model', backend='eager', files={'model.pt2': sha256(d/'model'/'model.pt2')}, inputs=[dict(name='x', dtype='float32', shape=[None,3,None,None])],
                input=dict(kind='image', mode='RGB', steps=[dict(op='to_array', div=255.)]), output=dict(kind='softmax', vocab=['a','b','c']), fold=dict(n_bn=0, n_folded=0), parity=dict(n_items=0, n_changed=0, max_err=0))
    (d/'model'/'card.json').write_text(json.dumps(card))
    (d/'images').mkdir()
    rng,rows = np.random.default_rng(0),[]
    for i in range(600):
        f = d/'one.png'
        Image.fromarray(rng.integers(0, 256, (64,64,3), dtype=np.uint8)).save(f)
        rows.append(dict(path=f'image {i}', bytes=b'no image' if i==7 else f.read_bytes()))
    for k in range(30): pa.parquet.write_table(pa.Table.from_pylist(rows[k*20:k*20+20]), d/'images'/f'{k:02}.parquet')
    return d, rows

def start(d, out): # in a group of its own, so that all of it can be killed
    return subprocess.Popen([sys.executable, root/'examples'/'bulk.py', d/'model', d/'images', out, '--batch', '4', '--block', '1'], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
                            env={**os.environ, 'OMP_NUM_THREADS': '1', 'RAY_DATA_DISABLE_PROGRESS_BARS': '1'})

def written(out):
    "Rows in the files that are whole"
    n = 0
    for f in out.glob('*.parquet'):
        try: n += pa.parquet.read_metadata(f).num_rows
        except (pa.ArrowInvalid, OSError): pass
    return n

def wait(p, what, seconds=300):
    end = time.time()+seconds
    while not (res := what()):
        assert p.poll() is None and time.time()<end, p.communicate()[0][-3000:] if p.poll() is not None else 'too slow'
        time.sleep(.02)
    return res

def workers(p):
    try: return [c for c in psutil.Process(p.pid).children(recursive=True) if 'MapWorker' in ' '.join(c.cmdline()) or 'Predictor' in ' '.join(c.cmdline())]
    except psutil.Error: return []

def check(out, rows, d):
    res = pa.dataset.dataset(out).to_table().to_pylist()
    assert sorted(r['path'] for r in res)==sorted(r['path'] for r in rows) # every one, and once
    by,m = {r['path']: r for r in res},Deployed(d/'model')
    assert 'cannot be read as an image' in by['image 7']['error'] and not any(r['error'] for r in res if r['path']!='image 7')
    for i in (0, 299, 599):
        want = m.predict(rows[i]['bytes'])
        assert by[f'image {i}']['label']==want.label and abs(by[f'image {i}']['prob']-want.probs.max())<1e-6

def test_a_worker_dies_and_the_job_is_killed(setup, tmp_path):
    d,rows = setup
    out = tmp_path/'out'
    p = start(d, out)
    try:
        victim = wait(p, lambda: workers(p))[0]
        victim.send_signal(signal.SIGKILL)
        wait(p, lambda: written(out)>40)
        family = psutil.Process(p.pid).children(recursive=True)
    finally:
        os.killpg(p.pid, signal.SIGKILL)
    for c in family:
        try: c.kill()
        except psutil.Error: pass
    p.communicate()
    before = written(out)
    print(before)
    p = start(d, out)
    log = p.communicate(timeout=400)[0]
    assert p.returncode==0, log[-3000:]
    assert '600 images' in log
    check(out, rows, d)
