"The example server, started on localhost: real uploads, in parallel"
import importlib.util, threading, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np, pytest
from PIL import Image
from torch import nn
from fastai.vision.all import DataBlock, CategoryBlock, ImageBlock, IndexSplitter, Learner, Resize
from fastai_bnfold.all import *
from fastai_bnfold.fold.testing import randomize_bn
httpx = pytest.importorskip('httpx')
for needed in ('starlette','python_multipart'): pytest.importorskip(needed)
uvicorn = pytest.importorskip('uvicorn')

root = Path(__file__).parent.parent
rng = np.random.default_rng(0)

@pytest.fixture(scope='module')
def deployed(tmp_path_factory):
    folder = tmp_path_factory.mktemp('server')
    for i in range(12): Image.fromarray(rng.integers(0, 256, (40+i,48,3), dtype=np.uint8)).save(folder/f'{i}.png')
    block = DataBlock((ImageBlock, CategoryBlock), get_y=lambda f: 'ab'[int(f.stem)%2], splitter=IndexSplitter(range(6)), item_tfms=Resize(32))
    dls = block.dataloaders(sorted(folder.iterdir()), bs=4, num_workers=0)
    net = nn.Sequential(nn.Conv2d(3,8,3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32,2))
    learn = Learner(dls, randomize_bn(net))
    with learn.no_bar(): return learn.deploy(folder/'m', 'eager'), sorted(folder.glob('*.png'))

@pytest.fixture(scope='module')
def url(deployed):
    spec = importlib.util.spec_from_file_location('server', root/'examples'/'server.py')
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    server = uvicorn.Server(uvicorn.Config(module.make_app(deployed[0]), port=0, log_level='warning'))
    thread,end = threading.Thread(target=server.run),time.time()+60
    thread.start()
    while not server.started:
        assert thread.is_alive() and time.time()<end
        time.sleep(.05)
    yield f'http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}'
    server.should_exit = True
    thread.join(20)

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
