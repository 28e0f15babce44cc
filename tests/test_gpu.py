"""On a GPU: what a Learner does there is what it does on a CPU. All of it is skipped where there is none."""
import copy
import pytest, torch
from torch import nn
from fastai.vision.all import Learner, DataLoaders, accuracy, resnet18
from fastai.callback.fp16 import MixedPrecision
from fastai_bnfold.all import *
from fastai_bnfold.fold.testing import randomize_bn
from conftest import error64, snapshot, unchanged

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
if torch.cuda.is_available(): torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False

def small(n_classes=4):
    body = [nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU6()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(16), nn.Dropout(.1), nn.Linear(16, n_classes))

def a_learner(**kw):
    "A Learner on the GPU, on four classes of noisy stripes"
    torch.manual_seed(0)
    y = torch.arange(128)%4
    x = torch.randn(128,3,16,16)+y.view(-1,1,1,1)*torch.linspace(-1,1,16).view(1,1,1,-1)
    items = list(zip(x, y))
    dls = DataLoaders.from_dsets(items[:96], items[96:], bs=32, device='cuda')
    return Learner(dls, small().cuda(), loss_func=nn.CrossEntropyLoss(), metrics=accuracy, **kw)

@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('dtype,tol', [(torch.float64,1e-12), (torch.float32,1e-5), (torch.bfloat16,.1), (torch.float16,.02)])
def test_fold(dtype, tol, memory_format):
    model = randomize_bn(small()).eval().to('cuda', dtype, memory_format=memory_format)
    x = torch.randn(4,3,16,16, device='cuda', dtype=dtype)
    folder = BNFolder()
    folded = folder.fold(model, x)
    assert folder.report.n_folded==3
    assert all(p.is_cuda and p.dtype==dtype for p in folded.parameters())
    assert error64(folded, model, x)<tol

def test_resnet():
    model = randomize_bn(resnet18(num_classes=10)).eval().cuda()
    x = torch.randn(2,3,64,64, device='cuda')
    folder = BNFolder()
    assert error64(folder.fold(model, x), model, x)<1e-4
    assert folder.report.n_folded==20

def test_graph():
    model = randomize_bn(small()).eval().cuda()
    x = torch.randn(4,3,16,16, device='cuda')
    folded = BNFolder().fold_graph(torch.export.export(model, (x,))).module()
    assert folded(x).is_cuda
    with torch.no_grad(): assert torch.allclose(folded(x), model(x), rtol=1e-4, atol=1e-5)

def test_a_faulty_call_leaves_the_model():
    model = randomize_bn(small()).eval().cuda()
    kept = snapshot(model)
    with pytest.raises(FoldError): BNFolder().fold(model, torch.randn(4,3,16,16)) # on the CPU
    assert unchanged(model, kept)

def test_learner():
    learn = a_learner()
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(2, 1e-2)
        trained = copy.deepcopy(learn.model.state_dict())
        report = learn.fold_bn(latency=2)
        assert report.n_folded==3 and report.n_changed==0
        learn.unfold_bn()
    assert all(torch.equal(v, trained[k]) for k,v in learn.model.state_dict().items())

@pytest.mark.parametrize('autocast', [torch.float16, torch.bfloat16])
def test_mixed_precision_and_callback(autocast):
    from fastai.callback.fp16 import AMPMode
    mode = AMPMode.FP16 if autocast==torch.float16 else AMPMode.BF16
    learn = a_learner(cbs=MixedPrecision(mode))
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, 1e-2, cbs=FoldBN(show=False))
    assert isinstance(learn.model[1], nn.Identity) and learn.model[0].weight.dtype==torch.float32

def test_statistics():
    learn = a_learner()
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(1, 1e-2)
        before = {k: v.clone() for k,v in learn.model.named_buffers()}
        learn.reestimate_bn(2, bs=32)
        learn.restore_bn()
        assert all(torch.equal(v, before[k]) for k,v in learn.model.named_buffers())
        learn.adapt_bn(learn.dls.valid)
    assert all(v.is_cuda for v in learn.model.buffers())
    assert not torch.equal(learn.model[1].running_mean, before['1.running_mean'])

def test_integer_net():
    learn = a_learner()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, 1e-2)
    net = learn.integer_net(4, n=32)
    x = learn.dls.one_batch()[0]
    y = net(x)
    net.exact = True
    assert y.is_cuda and torch.equal(y, net(x))

def test_deploy(tmp_path):
    learn = a_learner()
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(1, 1e-2)
        deployed = learn.deploy(tmp_path/'net', 'eager')
    assert next(learn.model.parameters()).is_cuda
    assert deployed.card['parity']['n_changed']==0
