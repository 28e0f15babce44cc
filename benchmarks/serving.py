"""A deployed model that many use at once: are the answers right, and how many are there in a second?

    python benchmarks/serving.py [--part threads,server] [--out benchmarks/results/serving.json]

Threads: 8 threads share one `Deployed` of each backend and send 2,000 requests each, one item a request, in the order of their own;
every answer is compared with what the same model said to the item alone. Server: `examples/server.py` with a resnet18 (not trained,
ONNX Runtime) on two processors, 8 clients that upload JPEGs of 256 × 256 pixels, beside a plain loop over the same bytes that may use
both processors. The clients run on the same two processors. Interleaved rounds; the ratio is the median of those of the rounds. `load`
is how many processes wanted a processor on average when a part began: with others beside, ratios mean something, requests a second little.
"""
import http.client, itertools, json, os, socket, subprocess, sys, tempfile, time, warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
import numpy as np, torch
from fastai.vision.all import CategoryBlock, DataBlock, ImageBlock, IndexSplitter, Learner, Normalize, Resize, TransformBlock, imagenet_stats
from fastcore.script import call_parse
from PIL import Image
from torch import nn
from torchvision.models import resnet18
from fastai_bnfold.all import *
from fastai_bnfold.deploy.engines import backends
from fastai_bnfold.deploy.serve import Deployed
from fastai_bnfold.fold.testing import randomize_bn
from fastai_bnfold.lab.command import machine

n_threads,n_requests = 8,2000

def random_x(i): return torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(i))
def a_class(i): return i%4

def small_learner():
    block = DataBlock((TransformBlock, CategoryBlock), get_x=random_x, get_y=a_class, splitter=IndexSplitter(range(4)))
    dls = block.dataloaders(list(range(16)), bs=4, num_workers=0)
    net = nn.Sequential(nn.Conv2d(3,32,3), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32,4))
    return Learner(dls, randomize_bn(net))

def in_threads(model):
    "Requests that were right, wrong, or an error; requests per second"
    items = [random_x(i).numpy() for i in range(16)]
    want = [model.predict(x).probs for x in items]
    def outcome(i):
        try: return 'right' if np.allclose(model.predict(items[i]).probs, want[i], atol=1e-5) else 'wrong'
        except Exception: return 'error'
    def client(start): return [outcome((start+i)%16) for i in range(n_requests)]
    began = time.time()
    with ThreadPoolExecutor(n_threads) as pool: outcomes = list(itertools.chain(*pool.map(client, range(n_threads))))
    counts = {kind: outcomes.count(kind) for kind in ('right','wrong','error')}
    return counts | dict(per_second=len(outcomes)/(time.time()-began))

def threads(folder):
    rows,learn = [],small_learner()
    for backend in backends:
        with learn.no_bar(): learn.deploy(folder/backend, backend)
        rows.append(dict(backend=backend, threads=n_threads, requests=n_requests*n_threads, **in_threads(Deployed(folder/backend, threads=1))))
        print(rows[-1], flush=True)
    return rows

def photos(folder):
    "JPEGs of random patterns"
    rng = np.random.default_rng(0)
    for i in range(32):
        small = Image.fromarray(rng.integers(0, 256, (12,12,3), dtype=np.uint8))
        small.resize((256,256), Image.BICUBIC).save(folder/f'{i}.jpg', quality=90)
    return sorted(folder.glob('*.jpg'))

def image_learner(files):
    block = DataBlock((ImageBlock, CategoryBlock), get_y=lambda file: int(file.stem)%10, splitter=IndexSplitter(range(8)),
                      item_tfms=Resize(224), batch_tfms=Normalize.from_stats(*imagenet_stats))
    return Learner(block.dataloaders(files, bs=8, num_workers=0), randomize_bn(resnet18(num_classes=10)))

def multipart(files):
    "The body of a request that uploads them"
    head = '--x\r\nContent-Disposition: form-data; name="file"; filename="{}"\r\nContent-Type: image/jpeg\r\n\r\n'
    return b''.join(head.format(file.name).encode()+file.read_bytes()+b'\r\n' for file in files)+b'--x--\r\n'

def post(connection, body):
    connection.request('POST', '/predict', body, {'Content-Type': 'multipart/form-data; boundary=x'})
    return json.loads(connection.getresponse().read())

def start_server(path):
    "The process and its port, when it answers"
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    server = Path(__file__).parent.parent/'examples'/'server.py'
    process = subprocess.Popen([sys.executable, server, path, '--port', str(port)])
    while process.poll() is None:
        try:
            socket.create_connection(('127.0.0.1', port), 1).close()
            return process, port
        except OSError: time.sleep(.1)
    raise RuntimeError('the server did not start')

def by_server(port, bodies, want):
    "Uploads per second, and how many answers were wrong"
    def client(mine):
        connection,wrong = http.client.HTTPConnection('127.0.0.1', port, timeout=120),0
        for i in mine:
            said = post(connection, bodies[i])
            wrong += sum(not np.allclose(s['probs'], p, atol=1e-5) for s,p in zip(said, want[i]))
        connection.close()
        return wrong
    began = time.time()
    with ThreadPoolExecutor(8) as pool: wrong = sum(pool.map(client, [range(k, len(bodies), 8) for k in range(8)]))
    return sum(map(len, want))/(time.time()-began), wrong

def by_loop(model, data):
    began = time.time()
    for item in data: model.predict(item)
    return len(data)/(time.time()-began)

def measured(port, model, files, group, rounds):
    "The server with requests of `group` uploads, and the loop, in turns"
    groups = [files[i:i+group] for i in range(0, len(files), group)]
    want = [[p.probs for p in model.predict([file.read_bytes() for file in g])] for g in groups]
    bodies,data = [multipart(g) for g in groups],[file.read_bytes() for file in files]
    by_server(port, bodies, want), by_loop(model, data[:8])
    pairs,wrong = [],0
    for _ in range(rounds):
        served,more = by_server(port, bodies, want)
        pairs.append((served, by_loop(model, data)))
        wrong += more
    ratios = sorted(served/looped for served,looped in pairs)
    return dict(uploads_per_request=group, rounds=rounds, wrong=wrong, server_per_second=median(s for s,_ in pairs),
                loop_per_second=median(l for _,l in pairs), ratio=median(ratios), ratio_range=[ratios[0],ratios[-1]])

def server(folder, rounds, copies):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    files = photos(folder)
    learn = image_learner(files)
    with learn.no_bar(): learn.deploy(folder/'resnet18', 'onnx')
    process,port = start_server(folder/'resnet18')
    try:
        model,rows = Deployed(folder/'resnet18', threads=2),[]
        for group in (1,8):
            rows.append(measured(port, model, files*copies, group, rounds))
            print(rows[-1], flush=True)
    finally:
        process.terminate()
        process.wait()
    return rows

@call_parse
def main(
    part:str='threads,server',                     # What to measure
    rounds:int=7,                                  # Of server and loop in turns
    copies:int=4,                                  # Of the 32 photos, in a round
    out:Path=Path('benchmarks/results/serving.json') # Results; parts not measured stay as they are
):
    warnings.simplefilter('ignore')
    res = json.loads(out.read_text()) if out.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        load = res.setdefault('load', {})
        for name,measure in dict(threads=threads, server=partial(server, rounds=rounds, copies=copies)).items():
            if name not in part: continue
            load[name] = os.getloadavg()[0]
            res[name] = measure(Path(folder))
            out.write_text(json.dumps(res | dict(machine=machine()), indent=1))
