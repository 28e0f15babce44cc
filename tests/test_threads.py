"A deployed model in threads and in forked processes: to each its own predictions"
import os, pickle, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
import numpy as np, pytest, torch
from torch import nn
from fastai.vision.all import CategoryBlock, DataBlock, IndexSplitter, Learner, TransformBlock
from fastai_bnfold.all import *
from fastai_bnfold.fold.testing import randomize_bn

backends = ['onnx','openvino','torch','eager']
packages = dict(onnx='onnxruntime', openvino='openvino')

def get_x(i): return torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(i))
def get_y(i): return i%4
items = [get_x(i).numpy() for i in range(8)]

@pytest.fixture(scope='module')
def learn():
    block = DataBlock((TransformBlock, CategoryBlock), get_x=get_x, get_y=get_y, splitter=IndexSplitter(range(4)))
    dls = block.dataloaders(list(range(8)), bs=4, num_workers=0)
    net = nn.Sequential(nn.Conv2d(3,16,3), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16,4))
    return Learner(dls, randomize_bn(net))

@pytest.fixture(scope='module', params=backends)
def deployed(request, learn, tmp_path_factory):
    if request.param in packages: pytest.importorskip(packages[request.param])
    with learn.no_bar(): return learn.deploy(tmp_path_factory.mktemp(request.param)/'m', request.param)

def same(m, i, want): return np.allclose(m.predict(items[i]).probs, want[i], atol=1e-5)

def test_threads(deployed):
    "One item a request"
    want = [deployed.predict(x).probs for x in items]
    assert len({p.argmax() for p in want})>1 or np.ptp(want)>1e-3 # they differ, or nothing is tested
    with ThreadPoolExecutor(8) as threads: right = list(threads.map(lambda i: same(deployed, i%8, want), range(400)))
    assert all(right)

@pytest.mark.parametrize('bs', [1,3,64])
def test_threads_with_lists(deployed, bs):
    want = np.stack([deployed.predict(x).probs for x in items])
    def right(start):
        order = [(start+i)%8 for i in range(8)]
        probs = [p.probs for p in deployed.predict([items[i] for i in order], bs=bs)]
        return np.allclose(probs, want[order], atol=1e-5)
    with ThreadPoolExecutor(8) as threads: assert all(threads.map(right, range(64)))

def test_outputs_stay(deployed):
    "What was returned is not overwritten by the next call"
    first = deployed(items[0][None])[0]
    copy = first.copy()
    deployed(items[1][None])
    assert np.array_equal(first, copy)

def test_an_error_in_one_thread_is_its_own(deployed):
    want = [deployed.predict(x).probs for x in items]
    def request(i):
        if i%5: return same(deployed, i%8, want)
        try: deployed.predict(np.zeros((5,16,16), np.float32))
        except DeployError: return True
    with ThreadPoolExecutor(8) as threads: assert all(threads.map(request, range(100)))

def test_a_copy(deployed):
    "`multiprocessing` with 'spawn' and Ray pickle what they send"
    m = pickle.loads(pickle.dumps(deployed))
    assert np.allclose(m.predict(items[0]).probs, deployed.predict(items[0]).probs, atol=1e-6)

forked = """
import os, sys, time, numpy as np
from concurrent.futures import ThreadPoolExecutor
from fastai_bnfold.deploy.serve import Deployed
m = Deployed(sys.argv[1])
items = np.random.default_rng(0).normal(size=(8,3,64,64)).astype(np.float32)
def probs(_=None): return np.stack([p.probs for p in m.predict(list(items), bs=4)])
want = probs()
child = os.fork()
right = np.allclose(probs(), want, atol=1e-5)
with ThreadPoolExecutor(4) as threads: right = right and all(np.allclose(p, want, atol=1e-5) for p in threads.map(probs, range(8)))
if not child: sys.exit(0 if right else 3)
end = time.time()+60
while time.time()<end:
    pid,status = os.waitpid(child, os.WNOHANG)
    if pid: sys.exit(status if right else 4)
    time.sleep(.05)
os.kill(child, 9)
sys.exit(5)
"""
@pytest.mark.skipif(not hasattr(os, 'fork'), reason='no fork')
def test_fork(deployed):
    "Used in the parent, then in the child, in its threads, and the child ends by itself"
    env = {k: v for k,v in os.environ.items() if k!='OMP_NUM_THREADS'} # with the engines' own threads
    p = subprocess.run([sys.executable, '-c', forked, deployed.path], env=env, capture_output=True, text=True, timeout=120)
    assert p.returncode==0, f'{p.returncode}: {p.stderr[-500:]}'

def test_onnx_sends_nothing(deployed):
    "ONNX Runtime's telemetry is off, unless the user says otherwise"
    if deployed.card['backend']!='onnx': pytest.skip('of ONNX Runtime')
    code = "import os, sys; from fastai_bnfold.deploy.serve import Deployed; Deployed(sys.argv[1]); print(os.environ['ORT_DISABLE_TELEMETRY'])"
    for set_by_user in ({}, {'ORT_DISABLE_TELEMETRY': '0'}):
        env = {k: v for k,v in os.environ.items() if k!='ORT_DISABLE_TELEMETRY'} | set_by_user
        out = subprocess.run([sys.executable, '-c', code, deployed.path], env=env, capture_output=True, text=True).stdout
        assert out.strip()==set_by_user.get('ORT_DISABLE_TELEMETRY', '1')

def test_openvino_sends_nothing(deployed):
    "OpenVINO's telemetry starts a process, which a fork would inherit"
    if deployed.card['backend']!='openvino': pytest.skip('of OpenVINO')
    code = "import sys; from fastai_bnfold.deploy.serve import Deployed; Deployed(sys.argv[1]); print([m for m in sys.modules if 'openvino_telemetry' in m])"
    assert subprocess.run([sys.executable, '-c', code, deployed.path], capture_output=True, text=True).stdout.strip()=='[]'

signalled = """
import faulthandler, os, signal, sys
if sys.argv[2]=='on': faulthandler.enable()
from fastai_bnfold.deploy.engines import signal_stack
from fastai_bnfold.deploy.serve import Deployed
before = bytes(signal_stack())
m = Deployed(sys.argv[1])
assert bytes(signal_stack())==before
seen = []
signal.signal(signal.SIGCHLD, lambda *args: seen.append(1))
if not os.fork(): os._exit(0)
os.wait()
assert seen
"""
@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='stacks for signal handlers as Linux has them')
@pytest.mark.parametrize('faults', ['on','off'])
def test_signals_are_handled(deployed, faults):
    "OpenVINO leaves a stack for signal handlers behind whose memory it freed: the next signal ended the process"
    p = subprocess.run([sys.executable, '-c', signalled, deployed.path, faults], capture_output=True, text=True, timeout=120)
    assert p.returncode==0, f'{p.returncode}: {p.stderr[-500:]}'
