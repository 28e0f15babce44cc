"Small networks with every kind of layer that an integer network has"
import torch
from torch import nn
import torch.nn.functional as F

def conv_bn(n_in, n_out, kernel=3, stride=1, groups=1, cls=nn.Conv2d, norm=nn.BatchNorm2d, **options):
    return [cls(n_in, n_out, kernel, stride, kernel//2, groups=groups, **options), norm(n_out)]

class Residual(nn.Module):
    def __init__(self, n=8, last=True):
        super().__init__()
        self.body = nn.Sequential(*conv_bn(n, n), nn.ReLU(), *conv_bn(n, n))
        self.relu = nn.ReLU() if last else nn.Identity()
    def forward(self, x): return self.relu(x+self.body(x))

class Double(nn.Module):
    "A value added to itself"
    def forward(self, x): return torch.relu(x+x)

def head(n): return nn.AdaptiveAvgPool2d(1),nn.Flatten(),nn.Linear(n, 5)

def build_nets():
    stem = conv_bn(3, 8)
    shapes = nn.Sequential(*conv_bn(3, 8, 5, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8*64, 5))
    one_d = nn.Sequential(*conv_bn(3, 8, cls=nn.Conv1d, norm=nn.BatchNorm1d), nn.ReLU(), nn.MaxPool1d(2),
                          *conv_bn(8, 8, cls=nn.Conv1d, norm=nn.BatchNorm1d), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 5))
    return dict(
        plain=nn.Sequential(*stem, nn.ReLU(), *head(8)),
        residual=nn.Sequential(*conv_bn(3, 8), nn.ReLU(), Residual(), Residual(), *head(8)),
        pools=nn.Sequential(*conv_bn(3, 8), nn.ReLU(), nn.MaxPool2d(3, 2, 1), *conv_bn(8, 8), nn.ReLU(), nn.MaxPool2d(2), *head(8)),
        signed=nn.Sequential(*conv_bn(3, 8), nn.MaxPool2d(2), *conv_bn(8, 8, 1), *head(8)),
        depthwise=nn.Sequential(*conv_bn(3, 8), nn.ReLU(), *conv_bn(8, 8, groups=8), nn.ReLU(), *conv_bn(8, 16, 1), nn.ReLU(), *head(16)),
        grouped=nn.Sequential(*conv_bn(3, 8), nn.ReLU(), *conv_bn(8, 16, groups=2, stride=2), nn.ReLU(), *head(16)),
        dilated=nn.Sequential(*conv_bn(3, 8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=2, dilation=2), nn.BatchNorm2d(8), nn.ReLU(), *head(8)),
        double=nn.Sequential(*conv_bn(3, 8), nn.ReLU(), Double(), *conv_bn(8, 8), nn.ReLU(), *head(8)),
        bias=nn.Sequential(*conv_bn(3, 8, bias=True), nn.ReLU(), nn.Dropout(), *conv_bn(8, 8, bias=False), nn.ReLU(), *head(8)),
        large_pool=nn.Sequential(*conv_bn(3, 8), nn.ReLU(), nn.AdaptiveAvgPool2d((3,20)), nn.Flatten(), nn.Linear(8*60, 5)),
        flat=shapes, one_d=one_d,
        three_d=nn.Sequential(*conv_bn(3, 8, cls=nn.Conv3d, norm=nn.BatchNorm3d), nn.ReLU(), nn.MaxPool3d(2),
                              *conv_bn(8, 8, cls=nn.Conv3d, norm=nn.BatchNorm3d), nn.ReLU(), nn.Flatten(), nn.Linear(8*64, 5)))

class Gate(nn.Module):
    "Squeeze and excitation: an average, two layers, a table, a product"
    def __init__(self, n=8):
        super().__init__()
        self.squeeze,self.gate = nn.AdaptiveAvgPool2d(1),nn.Sequential(nn.Conv2d(n, 4, 1), nn.ReLU(), nn.Conv2d(4, n, 1), nn.Hardsigmoid())
    def forward(self, x): return x*self.gate(self.squeeze(x))

class Beside(nn.Module):
    "Branches side by side: one with a sign, one without"
    def __init__(self, n=8):
        super().__init__()
        self.a,self.b = nn.Sequential(*conv_bn(n, n), nn.ReLU()),nn.Sequential(*conv_bn(n, n))
    def forward(self, x): return torch.cat([self.a(x), self.b(x)], 1)

class Shuffle(nn.Module):
    "Half of the channels go on as they are, as in ShuffleNetV2"
    def __init__(self, n=8):
        super().__init__()
        self.branch = nn.Sequential(*conv_bn(n//2, n//2), nn.ReLU())
    def forward(self, x):
        a,b = x.chunk(2, 1)
        y = torch.cat([a, self.branch(b)], 1)
        n,c,h,w = y.shape
        return y.view(n, 2, c//2, h, w).transpose(1, 2).reshape(n, c, h, w)

class PerChannel(nn.Module):
    "A clamp with bounds of its own for every channel"
    def __init__(self, n=8):
        super().__init__()
        self.register_buffer('low', torch.linspace(-1, .2, n).view(1,-1,1,1))
        self.register_buffer('high', torch.linspace(.3, 2, n).view(1,-1,1,1))
    def forward(self, x): return x.clamp(self.low, self.high)

class Inverted(nn.Module):
    "MobileNetV2: a sum without a ReLU"
    def __init__(self, n=8):
        super().__init__()
        self.body = nn.Sequential(*conv_bn(n, 2*n, 1), nn.ReLU6(), *conv_bn(2*n, 2*n, groups=2*n), nn.ReLU6(), *conv_bn(2*n, n, 1))
    def forward(self, x): return x+self.body(x)

class Mean(nn.Module):
    def forward(self, x): return x.mean((2,3))

class ConcatPool(nn.Module):
    "The head of fastai's vision learners: maxima and averages, side by side"
    def __init__(self):
        super().__init__()
        self.ap,self.mp = nn.AdaptiveAvgPool2d(1),nn.AdaptiveMaxPool2d(1)
    def forward(self, x): return torch.cat([self.mp(x), self.ap(x)], 1)

class Viewed(nn.Module):
    "Flat by the size of the batch, as fastai's `Flatten` is"
    def forward(self, x): return x.view(x.size(0), -1)

def kinds():
    "Networks with what else a layer can be"
    def net(*layers, n=8): return nn.Sequential(*conv_bn(3, 8), nn.ReLU(), *layers, *head(n))
    def pre_activation(): return nn.BatchNorm2d(8),nn.ReLU(),nn.Conv2d(8, 8, 3, 1, 1)
    return dict(
        relu6=nn.Sequential(*conv_bn(3, 8), nn.ReLU6(), *conv_bn(8, 8), nn.ReLU6(), *head(8)),
        inverted=nn.Sequential(*conv_bn(3, 8), nn.ReLU6(), Inverted(), Inverted(), *conv_bn(8, 8, 1), nn.ReLU6(), *head(8)),
        gate=net(*conv_bn(8, 8), nn.Hardswish(), Gate(), *conv_bn(8, 8, 1)),
        silu=net(*conv_bn(8, 8), nn.SiLU(), nn.Conv2d(8, 8, 1), nn.GELU(), *conv_bn(8, 8)),
        beside=net(Beside(), *conv_bn(16, 8, 1), nn.ReLU()),
        shuffle=net(Shuffle(), *conv_bn(8, 8, 1), nn.ReLU()),
        per_channel=nn.Sequential(*conv_bn(3, 8), PerChannel(), *conv_bn(8, 8), PerChannel(), *head(8)),
        average=net(nn.AvgPool2d(3, 2, 1), *conv_bn(8, 8), nn.ReLU(), nn.AvgPool2d(2), *conv_bn(8, 8)),
        halved=net(nn.AvgPool2d(2, ceil_mode=True), *conv_bn(8, 8), nn.ReLU()),
        mean=nn.Sequential(*conv_bn(3, 8), nn.ReLU(), Mean(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5)),
        pre_activation=net(*pre_activation(), *pre_activation()),
        alone=nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.BatchNorm1d(8*196), nn.Linear(8*196, 5)),
        viewed=nn.Sequential(*conv_bn(3, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), Viewed(), nn.Linear(8, 5)),
        fastai_head=nn.Sequential(*conv_bn(3, 8), nn.ReLU(), ConcatPool(), nn.Flatten(), nn.BatchNorm1d(16), nn.Dropout(), nn.Linear(16, 8, bias=False),
                                  nn.ReLU(), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 5, bias=False)),
        dense=nn.Sequential(*conv_bn(3, 8), nn.ReLU(), nn.Conv2d(8, 5, 1)),
        no_bias=nn.Sequential(*conv_bn(3, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5, bias=False)))

sizes = dict(one_d=(16,), three_d=(8,8,8))
def example(name, n=4): return torch.randn(n, 3, *sizes.get(name, (16,16)))
