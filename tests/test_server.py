"The example server, started on localhost: real uploads, in parallel"
import io, os, socket, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from torch import nn
from fastai.vision.all import DataBlock, CategoryBlock, ImageBlock, IndexSplitter, Learner, Resize
from fastai_bnfold.all import *
from fastai_bnfold.fold.testing import randomize_bn
httpx = pytest.importorskip('httpx')
for needed in ('starlette','uvicorn','python_multipart'): pytest.importorskip(needed)

root = Path(__file__).parent.parent
rng = np.random.default_rng(0)

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

@pytest.fixture(scope='module')
def deployed(tmp_path_factory):
    folder = tmp_path_factory.mktemp('server')
    for i in range(12): Image.fromarray(rng.integers(0, 256, (40+i,48,3), dtype=np.uint8)).save(folder/f'{i}.png')
    block = DataBlock((ImageBlock, CategoryBlock), get_y=lambda f: 'ab'[int(f.stem)%2], splitter=IndexSplitter(range(6)), item_tfms=Resize(32))
    dls = block.dataloaders(sorted(folder.iterdir()), bs=4, num_workers=0)
    net = nn.Sequential(nn.Conv2d(3,8,3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32,2))
    learn = Learner(dls, randomize_bn(net))
    with learn.no_bar(): return learn.deploy(folder/'m', 'eager'), sorted(folder.glob('*.png'))

def answers(url):
    try: return httpx.get(url).status_code==200
    except httpx.TransportError: return False

@pytest.fixture(scope='module')
def url(deployed):
    port = free_port()
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': os.pathsep.join([str(root), os.environ.get('PYTHONPATH', '')])}
    p = subprocess.Popen([sys.executable, root/'examples'/'server.py', deployed[0].path, '--port', str(port)], env=env, stderr=subprocess.PIPE, text=True)
    url,end = f'http://127.0.0.1:{port}',time.time()+60
    while not answers(url):
        assert p.poll() is None and time.time()<end, p.stderr.read() if p.poll() is not None else 'too slow'
        time.sleep(.1)
    yield url
    p.terminate()
    p.wait(20)

def upload(url, files):
    "What the server says of the files"
    res = httpx.post(f'{url}/predict', files=[('file', (f.name, f.read_bytes(), 'image/png')) for f in files], timeout=60)
    assert res.status_code==200
    return res.json()

def test_uploads_in_parallel(deployed, url):
    "To each its own prediction"
    m,files = deployed
    want = {f.name: m.predict(f).to_dict() for f in files}
    def right(i):
        some = [files[(i+k)%12] for k in range(1+i%3)]
        said = upload(url, some)
        close = [np.allclose(s['probs'], want[f.name]['probs'], atol=1e-5) and s['label']==want[f.name]['label'] for s,f in zip(said, some)]
        return [s['name'] for s in said]==[f.name for f in some] and all(close)
    with ThreadPoolExecutor(8) as threads: assert all(threads.map(right, range(120)))

def test_one_bad_upload(deployed, url, tmp_path):
    m,files = deployed
    (tmp_path/'bad.png').write_bytes(b'no image')
    good,bad,also = upload(url, [files[0], tmp_path/'bad.png', files[1]])
    assert 'cannot be read as an image' in bad['error'] and good['label']==m.predict(files[0]).label and 'error' not in also

def test_no_upload(url):
    res = httpx.post(f'{url}/predict', data={'file': 'text'})
    assert res.status_code==400 and "field 'file'" in res.json()['error']

def test_about(deployed, url):
    assert httpx.get(url).json()['classes']==['a','b'] and len((root/'examples'/'server.py').read_text().splitlines())<=60
