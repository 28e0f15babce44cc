"Every kind of layer, against the unfolded model in float64, with random statistics"
import copy, itertools
import pytest, torch
from torch import nn
from fastai_bnfold.all import *
from fastai_bnfold.fold.testing import randomize_bn
from conftest import error64

convs = {f'{k}{d}d': (getattr(nn, f'{k}{d}d'), getattr(nn, f'BatchNorm{d}d'), d) for k in ('Conv','ConvTranspose') for d in (1,2,3)}
groups = {'dense':1, 'grouped':2, 'depthwise':16}
bounds = {torch.float32:1e-5, torch.float64:1e-12}

def bn_net(first, bn, affine, n):
    return nn.Sequential(first, bn(n, affine=affine), nn.Tanh())

def check(net, x, others, dtype, n=1, how=None):
    "Fold `net` on `x`, and compare on `x` and on inputs of other sizes"
    randomize_bn(net)
    net = net.to(dtype)
    folder = BNFolder()
    folded = folder.fold(net, x.to(dtype))
    assert folder.report.n_folded == n, str(folder.report)
    if how: assert [r.how for r in folder.report.rows] == [how]*n
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded.modules())
    for v in (x, *others): assert error64(folded, net, v.to(dtype)) <= bounds[dtype]
    return folded

@pytest.mark.parametrize('dtype', bounds, ids=str)
@pytest.mark.parametrize('affine', [True, False], ids=['affine','plain'])
@pytest.mark.parametrize('bias', [True, False], ids=['bias','nobias'])
@pytest.mark.parametrize('g', groups)
@pytest.mark.parametrize('kind', convs)
def test_backward_into_conv(kind, g, bias, affine, dtype):
    conv,bn,d = convs[kind]
    net = bn_net(conv(16, 16, 3, stride=2, padding=1, groups=groups[g], bias=bias), bn, affine, 16)
    check(net, torch.randn(2,16,*[7]*d), [torch.randn(3,16,*range(6,6+d)), torch.randn(1,16,*[11]*d)], dtype, how='backward')

@pytest.mark.parametrize('dtype', bounds, ids=str)
@pytest.mark.parametrize('affine', [True, False], ids=['affine','plain'])
@pytest.mark.parametrize('bias', [True, False], ids=['bias','nobias'])
def test_backward_into_linear(bias, affine, dtype):
    check(bn_net(nn.Linear(8, 16, bias=bias), nn.BatchNorm1d, affine, 16), torch.randn(2,8), [torch.randn(7,8), torch.randn(1,8)], dtype, how='backward')

@pytest.mark.parametrize('dtype', bounds, ids=str)
@pytest.mark.parametrize('affine', [True, False], ids=['affine','plain'])
@pytest.mark.parametrize('bias', [True, False], ids=['bias','nobias'])
@pytest.mark.parametrize('g', groups)
@pytest.mark.parametrize('kind', convs)
def test_forward_into_conv(kind, g, bias, affine, dtype):
    conv,bn,d = convs[kind]
    k = 1 if 'Transpose' in kind else 3
    net = nn.Sequential(nn.Tanh(), bn(16, affine=affine), nn.Dropout(.5), nn.Identity(), conv(16, 16, k, groups=groups[g], bias=bias))
    check(net, torch.randn(2,16,*[7]*d), [torch.randn(3,16,*range(6,6+d))], dtype, how='forward')

@pytest.mark.parametrize('dtype', bounds, ids=str)
@pytest.mark.parametrize('affine', [True, False], ids=['affine','plain'])
@pytest.mark.parametrize('bias', [True, False], ids=['bias','nobias'])
@pytest.mark.parametrize('flat', [True, False], ids=['flatten','vector'])
def test_forward_into_linear(flat, bias, affine, dtype):
    "Through Dropout, Flatten and Identity"
    n = 16*9 if flat else 16
    net = nn.Sequential(nn.Tanh(), (nn.BatchNorm2d if flat else nn.BatchNorm1d)(16, affine=affine), nn.Dropout2d() if flat else nn.Dropout(),
                        nn.Flatten(), nn.Identity(), nn.Linear(n, 5, bias=bias))
    s = (16,3,3) if flat else (16,)
    check(net, torch.randn(2,*s), [torch.randn(5,*s), torch.randn(1,*s)], dtype, how='forward')

@pytest.mark.parametrize('mode', ['reflect','replicate','circular'])
def test_padding_that_is_not_zeros_lets_a_shift_pass(mode):
    net = nn.Sequential(nn.Tanh(), nn.BatchNorm2d(16), nn.Conv2d(16, 8, 3, padding=1, padding_mode=mode))
    check(net, torch.randn(2,16,7,7), [torch.randn(3,16,5,9)], torch.float64, how='forward')

@pytest.mark.parametrize('padding', [1, 'same'])
def test_zero_padding_stops_a_shift(padding):
    net = randomize_bn(nn.Sequential(nn.Tanh(), nn.BatchNorm2d(16), nn.Conv2d(16, 8, 3, padding=padding)))
    [row] = BNFolder().plan(net, torch.randn(2,16,7,7)).rows
    assert not row.folded and 'pads with zeros' in row.reason and 'tanh' in row.reason.lower()

def test_zero_padding_lets_a_pure_scale_pass():
    net = nn.Sequential(nn.Tanh(), nn.BatchNorm2d(16), nn.Conv2d(16, 8, 3, padding=1))
    randomize_bn(net); net[1].bias.data.zero_(); net[1].running_mean.zero_()
    folder = BNFolder(); x = torch.randn(2,16,7,7)
    folded = folder.fold(net, x)
    assert folder.report.n_folded==1 and error64(folded, net, x) < 1e-5

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('kind', [*convs, 'Linear'])
def test_low_precision(kind, dtype):
    "No worse than the unfolded model in the same dtype, by more than rounding"
    conv,bn,d = convs.get(kind, (None, nn.BatchNorm1d, 0))
    net = bn_net(conv(16, 16, 3) if conv else nn.Linear(16, 16), bn, True, 16)
    randomize_bn(net).to(dtype)
    x = torch.randn(2,16,*[7]*d).to(dtype)
    try: net.eval()(x)
    except RuntimeError as e: pytest.skip(f'this CPU build cannot: {e}')
    folder = BNFolder(); folded = folder.fold(net, x)
    assert folder.report.n_folded==1 and all(p.dtype==dtype for p in folded.parameters())
    assert error64(folded, net, x) <= 2*error64(net, net, x) + 4*torch.finfo(dtype).eps

@pytest.mark.parametrize('bn', [nn.SyncBatchNorm, nn.LazyBatchNorm2d])
def test_sync_and_lazy(bn):
    net = nn.Sequential(nn.LazyConv2d(16, 3), bn(16) if bn is nn.SyncBatchNorm else bn(), nn.ReLU())
    x = torch.randn(2,3,9,9)
    if bn is nn.LazyBatchNorm2d: net.eval()
    net(x) if bn is nn.LazyBatchNorm2d else net.eval()(x)
    check(net, x, [torch.randn(1,3,12,5)], torch.float32, how='backward')

def test_chain_of_bns():
    net = nn.Sequential(nn.Conv2d(3,16,3), nn.BatchNorm2d(16), nn.BatchNorm2d(16), nn.Dropout2d(), nn.BatchNorm2d(16), nn.Tanh(),
                        nn.BatchNorm2d(16), nn.BatchNorm2d(16), nn.Conv2d(16,4,1), nn.BatchNorm2d(4))
    check(net, torch.randn(2,3,9,9), [torch.randn(1,3,12,5)], torch.float64, n=6)

def test_memory_format_flags_and_requires_grad_stay():
    net = randomize_bn(bn_net(nn.Conv2d(3,16,3), nn.BatchNorm2d, True, 16)).to(memory_format=torch.channels_last)
    net[0].weight.requires_grad_(False); net[1].eval(); net[0].bias.requires_grad_(False)
    folded = BNFolder().fold(net, torch.randn(2,3,9,9))
    assert folded[0].weight.is_contiguous(memory_format=torch.channels_last) and not folded[0].weight.requires_grad and not folded[0].bias.requires_grad
    assert folded.training and not folded[1].training and type(folded[1]) is nn.Identity

def test_no_subnormal_numbers():
    net = randomize_bn(bn_net(nn.Conv2d(3,16,3), nn.BatchNorm2d, True, 16))
    net[1].weight.data[:] = 1e-38
    w = BNFolder().fold(net, torch.randn(2,3,9,9))[0].weight
    assert not ((w!=0) & (w.abs()<torch.finfo(w.dtype).tiny)).any()
