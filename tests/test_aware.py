"Quantization-aware training: what is trained is what the integer network computes; nothing is left behind"
import copy, pickle, pytest, torch
from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner, OptimWrapper, accuracy
import fastai.callback.schedule # fit_one_cycle, lr_find
from torch import nn
from fastai_bnfold.all import FixedPointError, FoldedError, FoldError, IntegerNet, QuantAware
from fastai_bnfold.fold.testing import randomize_bn
from fastai_bnfold.integer.layout import Bits
from fastai_bnfold.integer.quantizers import attach_quantizers, fake_quantize, quantizers_of, Step
from int_nets import build_nets, conv_bn, example, head, kinds

nets = build_nets() | kinds()

def made(name, bits, first=8):
    torch.manual_seed(1)
    model = randomize_bn((build_nets() | kinds())[name]).eval()
    return model, attach_quantizers(model, [example(name, 8)], Bits(bits, bits, first, 8))

def trained(model, x, steps=3):
    "After a few steps of training on random labels"
    opt = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        out = model.train()(x).flatten(1)
        opt.zero_grad()
        nn.functional.cross_entropy(out, torch.arange(len(x))%out.shape[1]).backward()
        opt.step()
    return model.eval()

@pytest.mark.parametrize('bits', (2,4))
@pytest.mark.parametrize('name', nets)
@torch.no_grad()
def test_the_integer_network_is_what_was_trained(name, bits):
    "In float64, which meets no ties; for another batch, too"
    model,_ = made(name, bits)
    with torch.enable_grad(): trained(model, example(name, 8))
    wide = copy.deepcopy(model).double()
    net,x = quantizers_of(wide).integer_net(wide),example(name, 3)
    trained_outputs,outputs = wide(x.double()),net(x)
    assert (trained_outputs-outputs).abs().max()<=1e-9*outputs.abs().max()

@pytest.mark.parametrize('name', nets)
def test_without_quantizers_all_is_as_before(name):
    torch.manual_seed(1)
    model,x = randomize_bn((build_nets() | kinds())[name]).eval(),example(name)
    names,before = list(model.state_dict()),model(x)
    quantizers = attach_quantizers(model, [x], Bits(2, 2))
    assert not torch.equal(model(x), before)
    quantizers.remove(model)
    assert list(model.state_dict())==names and torch.equal(model(x), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

def test_every_step_learns():
    model,quantizers = made('gate', 4)
    before = [p.detach().clone() for p in quantizers.parameters()]
    trained(model, example('gate', 8))
    assert len(before)>10 and all(not torch.equal(p, b) for p,b in zip(quantizers.parameters(), before))

@pytest.mark.parametrize('make', (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))))
def test_copies_have_quantizers_of_their_own(make):
    model,_ = made('residual', 4)
    x,clone = example('residual'),make(model)
    assert torch.equal(clone(x), model(x))
    with torch.no_grad():
        for p in quantizers_of(clone).parameters(): p.add_(.7)
    assert not torch.equal(clone(x), model(x))
    quantizers_of(clone).remove(clone)
    assert quantizers_of(model) is not None and list(clone.state_dict())==list((build_nets()['residual']).state_dict())

def test_state_dict_carries_the_steps():
    model,_ = made('residual', 4)
    trained(model, example('residual', 8))
    other,_ = made('residual', 4)
    other.load_state_dict(model.state_dict())
    x = example('residual')
    assert torch.equal(other(x), model(x))

def test_a_step_is_half_up():
    x = torch.tensor([-.75,-.25,.25,.75])
    assert fake_quantize(x, torch.tensor(.5), -4, 4).tolist()==[-.5,0,.5,1]

def test_gradients_are_those_of_lsq():
    "Esser et al. 2020, (3): round(v/s)-v/s inside, the nearest bound outside"
    x,step = torch.tensor([-3.,-.6,.3,1.2,9.]).requires_grad_(),torch.tensor([.5]).requires_grad_()
    fake_quantize(x, step, -2, 3).sum().backward()
    inside = [-1+.6/.5, 1-.3/.5, 2-1.2/.5]
    assert x.grad.tolist()==[0,1,1,1,0]
    assert step.grad.item()==pytest.approx((-2+sum(inside)+3)/3**.5, rel=1e-5)

def test_an_exception_in_the_middle_leaves_the_weights():
    model,_ = made('plain', 4)
    weight = model[0].weight
    with pytest.raises(RuntimeError): model(torch.randn(1,5,9,9))
    assert model[0].weight is weight and isinstance(weight, nn.Parameter)

def test_a_run_that_failed_half_way_is_forgotten():
    "The ReLU of a block runs twice, and has a quantizer for each"
    torch.manual_seed(1)
    relu = nn.ReLU()
    model = randomize_bn(nn.Sequential(*conv_bn(3, 8), relu, *conv_bn(8, 8), relu, *head(8))).eval()
    x = example('plain', 8)
    quantizers = attach_quantizers(model, [x], Bits(4, 4, 8, 8))
    assert len({id(point.step) for hook in quantizers.hooks for point in hook.points.values() if hook.n_runs==2})==2
    right = model(x)
    def fail(*args): raise RuntimeError('half way')
    with model[3].register_forward_pre_hook(fail), pytest.raises(RuntimeError): model(x)
    assert torch.equal(model(x), right)

class TwoReaders(nn.Module):
    def __init__(self): super().__init__(); self.conv,self.bn,self.next = nn.Conv2d(3,3,1),nn.BatchNorm2d(3),nn.Conv2d(3,3,1)
    def forward(self, x):
        y = torch.relu(self.bn(self.conv(x))).clamp(max=1.)
        return self.next(y)+y

class Computed(nn.Module):
    "A weight that is no parameter"
    def __init__(self): super().__init__(); self.w,self.bn = nn.Parameter(torch.randn(4,3,1,1)),nn.BatchNorm2d(4)
    def forward(self, x): return self.bn(nn.functional.conv2d(x, self.w))

@pytest.mark.parametrize('model, words', ((TwoReaders(),'no module returns it'), (Computed(),'no parameter `weight`'), (nn.Sequential(nn.Conv2d(3,3,1)),'no batch norm')))
def test_what_cannot_be_is_refused_and_the_model_is_as_it_was(model, words):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FixedPointError, match=words): attach_quantizers(model.eval(), [torch.randn(2,3,8,8)], Bits(4))
    assert list(before)==list(model.state_dict()) and quantizers_of(model) is None

# In a Learner

def learner(model=None, **kwargs):
    g = torch.Generator().manual_seed(0)
    data = [(x,int(y)) for x,y in zip(torch.randn(48,3,16,16, generator=g), torch.randint(5, (48,), generator=g))]
    torch.manual_seed(0)
    model = model or randomize_bn(build_nets()['residual'])
    return Learner(DataLoaders.from_dsets(data, data[:16], bs=8, num_workers=0), model, loss_func=CrossEntropyLossFlat(), metrics=accuracy, **kwargs)

def fit(learn, *cbs, n=1, lr=1e-3):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, lr, cbs=cbs)

def test_a_second_fit_goes_on():
    learn = learner()
    fit(learn, QuantAware(4))
    quantizers,step = quantizers_of(learn.model),quantizers_of(learn.model).parameters()[0].item()
    fit(learn)
    assert quantizers_of(learn.model) is quantizers and quantizers.parameters()[0].item()!=step
    fit(learn, QuantAware(4))
    assert quantizers_of(learn.model) is quantizers

@pytest.mark.parametrize('opt', ('Adam','SGD'))
def test_steps_are_not_decayed(opt):
    import fastai.optimizer as optimizer
    learn = learner(opt_func=getattr(optimizer, opt), wd=.5)
    fit(learn, QuantAware(4), lr=0.)
    before = [p.item() for p in quantizers_of(learn.model).parameters() if p.numel()==1]
    fit(learn, lr=1e-9)
    assert [p.item() for p in quantizers_of(learn.model).parameters() if p.numel()==1]==pytest.approx(before, abs=1e-6)

def test_an_optimizer_of_pytorch():
    learn = learner(opt_func=lambda params, **kwargs: OptimWrapper(params, torch.optim.AdamW, **kwargs))
    fit(learn, QuantAware(4))
    assert quantizers_of(learn.model) is not None

def test_frozen_layers_keep_their_weights_and_learn_their_steps():
    learn = learner(splitter=lambda m: [list(m[:3].parameters()), list(m[3:].parameters())])
    learn.freeze()
    weight = learn.model[0].weight.detach().clone()
    fit(learn, QuantAware(4))
    begin = quantizers_of(learn.model).weights['conv2d'].step.log.detach().clone()
    fit(learn)
    assert torch.equal(learn.model[0].weight, weight)
    assert not torch.equal(quantizers_of(learn.model).weights['conv2d'].step.log, begin)

def test_hyperparameters_and_schedule_survive():
    learn = learner()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, 3e-3, cbs=QuantAware(4))
    assert len(learn.recorder.lrs)==6 and max(learn.recorder.lrs)<=3e-3

def test_lr_find():
    learn = learner(cbs=QuantAware(4))
    before = copy.deepcopy(learn.model.state_dict())
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=5, show_plot=False)
    assert all(torch.equal(learn.model.state_dict()[name], v) for name,v in before.items())

def test_mixed_precision():
    "What was trained in bfloat16 is validated in float32 as the integer network is"
    from fastai_bnfold.lab.training import AutocastCPU
    learn = learner()
    fit(learn, QuantAware(4), AutocastCPU(), n=2)
    x,net = torch.randn(16,3,16,16),learn.integer_net()
    with torch.no_grad(): assert torch.equal(learn.model.eval()(x).argmax(1), net(x).argmax(1))

def test_statistics_are_estimated_with_the_quantizers():
    learn = learner()
    fit(learn, QuantAware(4))
    before = learn.model[1].running_mean.clone()
    with learn.no_bar(): learn.reestimate_bn()
    assert not torch.equal(learn.model[1].running_mean, before)
    wide,x = copy.deepcopy(learn.model).double().eval(),torch.randn(4,3,16,16)
    with torch.no_grad(): assert (wide(x.double())-learn.integer_net()(x)).abs().max()<1e-9

def test_remove_quant_keeps_what_was_trained():
    learn = learner()
    fit(learn, QuantAware(4))
    weight = learn.model[0].weight.detach().clone()
    learn.remove_quant()
    assert torch.equal(learn.model[0].weight, weight) and 'step' not in ' '.join(learn.model.state_dict())
    fit(learn)
    with pytest.raises(FixedPointError, match='no quantizers'): learn.remove_quant()

def test_a_loaded_learner_has_its_integer_network(tmp_path):
    from fastai.learner import load_learner
    from fastai_bnfold.lab.data import digits_dls
    model = nn.Sequential(*conv_bn(3, 8, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    learn = Learner(digits_dls(16, 256), model)
    fit(learn, QuantAware(4))
    learn.path = tmp_path
    learn.export('aware.pkl')
    x = torch.randn(4,3,16,16)
    assert torch.equal(load_learner(tmp_path/'aware.pkl').integer_net()(x), learn.integer_net()(x))

@pytest.mark.parametrize('kwargs', (dict(bits=1), dict(bits=9), dict(bits=4.), dict(first_bits=0), dict(last_bits=16), dict(n=0)))
def test_mistakes(kwargs):
    with pytest.raises(FixedPointError): QuantAware(**kwargs)

def test_other_bits_than_trained():
    learn = learner()
    fit(learn, QuantAware(4))
    with pytest.raises(FixedPointError, match='trained'): learn.integer_net(2)
    with pytest.raises(FixedPointError, match='trained'): fit(learn, QuantAware(2))
    assert learn.integer_net(4).bits.outputs==4

def test_a_folded_learner_says_unfold():
    learn = learner()
    learn.fold_bn(latency=0, validate=False)
    with pytest.raises(FoldedError, match='unfold'): fit(learn, QuantAware(4))

def test_a_quantized_learner_does_not_fold():
    "Its weights are computed in every run"
    learn = learner()
    fit(learn, QuantAware(4))
    x = torch.randn(4,3,16,16)
    before = learn.model.eval()(x)
    try: learn.fold_bn(latency=0, validate=False)
    except FoldError: pass
    assert torch.allclose(learn.model.eval()(x), before, atol=1e-5)
