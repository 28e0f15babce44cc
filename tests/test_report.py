"The report: both models in one pass, with what a validation needs and nothing else; classes by shapes; noise is called noise"
import copy, json, random, warnings
from functools import partial
import numpy as np
import pytest, torch
import torch.nn.functional as F
from torch import nn
from fastai.vision.all import (AccumMetric, AvgMetric, BCEWithLogitsLossFlat, CrossEntropyLossFlat, DataLoader, DataLoaders, F1Score, Learner, Metric,
                               MSELossFlat, ProgressCallback, RocAucBinary, ValueMetric, accuracy, before_batch_cb, error_rate, skm_to_fastai)
from fastai.callback.core import Callback
import fastai.callback.all
from fastai_bnfold.all import *
from fastai_bnfold.fold.report import FoldReport, Row, speed_in_words
from fastai_bnfold.fold.testing import randomize_bn
from fastai_bnfold.learner.compare import Classes, compare
from fastai_bnfold.learner.latency import Latency, time_both
from fastai_bnfold.learner.validate import takes_part, validate_both
from fastai_bnfold.timing import interval

n_valid = 22
events = ['before_fit', 'before_epoch', 'before_train', 'before_validate', 'before_batch', 'after_pred', 'after_loss', 'after_batch',
          'after_validate', 'after_epoch', 'after_fit']

def net(n_out=3):
    return randomize_bn(nn.Sequential(nn.Conv2d(3,8,3,bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8,n_out))).double()

def image(i): return torch.randn(3,8,8, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
def index(i): return i%3
def binary(i): return float(i%2)
def several(i): return torch.tensor([i%2, i%3==0, i%5==0]).double()
def number(i): return torch.tensor([i*1.7], dtype=torch.float64)

class Items:
    def __init__(self, n, target): self.n,self.target,self.reads = n,target,0
    def __len__(self): return self.n
    def __getitem__(self, i):
        self.reads += 1
        return (image(i), self.target(i)) if self.target else (image(i),)

def learner(target=index, loss=None, model=None, **kwargs):
    dls = DataLoaders(DataLoader(Items(16, target), bs=8, shuffle=True), DataLoader(Items(n_valid, target), bs=8))
    return Learner(dls, model or net(), loss_func=loss or nn.CrossEntropyLoss(), **kwargs)

def trains(target=index, **kwargs):
    "A Learner in float32: fastai's `Recorder` takes no other losses"
    def x32(i): return image(i).float(), target(i)
    data = [x32(i) for i in range(16)]
    dls = DataLoaders(DataLoader(data, bs=8, shuffle=True), DataLoader(data, bs=8))
    return Learner(dls, net().float(), loss_func=nn.CrossEntropyLoss(), **kwargs)

def fold(learn, **kwargs):
    with learn.no_bar(): return learn.fold_bn(latency=0, **kwargs)
def values(learn):
    with learn.no_bar(), learn.no_logging(): return [float(v) for v in learn.validate()]
def close(a, b, tol=1e-9): return len(a)==len(b) and all(abs(x-y)<=tol*max(1, abs(x)) for x,y in zip(a, b))

# One pass

def test_every_item_is_loaded_once():
    learn = learner(metrics=accuracy)
    fold(learn, xb=torch.stack([image(0), image(1)]))
    assert learn.dls.valid.dataset.reads==n_valid

@pytest.mark.parametrize('metrics', [[accuracy, error_rate], F1Score(average='macro'), AccumMetric(lambda p,t: (p.argmax(1)==t).sum(), flatten=False),
                                     AvgMetric(lambda p,t: p.softmax(1).max())], ids=['functions', 'sklearn', 'accumulated', 'averaged'])
def test_loss_and_metrics_are_those_of_fastai(metrics):
    learn = learner(metrics=metrics)
    want = values(learn)
    rep = fold(learn)
    assert close(want, list(rep.metrics_before.values())) and close(values(learn), list(rep.metrics_after.values()))
    assert rep.n_changed==0 and rep.n_items==n_valid and 0<rep.pred_diff<1e-9*rep.pred_scale

def test_two_models_that_differ_are_told_apart():
    learn = learner(metrics=accuracy)
    folder = BNFolder()
    folder.fold(learn.model, torch.randn(2,3,8,8).double(), inplace=True)
    with torch.no_grad(): learn.model[0].weight.mul_(-1)
    folded = values(learn)
    folder.swaps.undo(); unfolded = values(learn); folder.swaps.redo()
    validate_both(learn, folder)
    rep = folder.report
    assert close(unfolded, list(rep.metrics_before.values())) and close(folded, list(rep.metrics_after.values()))
    assert unfolded[0]!=folded[0] and rep.n_changed>0

def test_two_metrics_of_one_name():
    rep = fold(learner(metrics=[accuracy, AvgMetric(accuracy), accuracy]))
    assert list(rep.metrics_before)==['valid_loss','accuracy','accuracy 2','accuracy 3']

class Same(Metric):
    "A `reset` that keeps the list"
    def __init__(self): self.seen = []
    def reset(self): self.seen.clear()
    def accumulate(self, learn): self.seen += learn.pred.argmax(1).tolist()
    @property
    def value(self): return len(self.seen)

def test_a_metric_with_a_list_of_its_own():
    metric = Same()
    rep = fold(learner(metrics=metric))
    assert rep.metrics_before['same']==rep.metrics_after['same']==n_valid and metric.seen==[]

class Remembers(nn.Module):
    "A running sum over the batches: in an attribute, and in a buffer"
    def __init__(self):
        super().__init__()
        self.net,self.hidden = net(),0.
        self.register_buffer('n', torch.zeros(()))
    def forward(self, x):
        y = self.net(x)
        self.n += 1
        self.hidden = self.hidden*.5+y.detach().mean(0)
        return y+self.hidden+self.n

def test_each_model_has_a_memory_of_its_own():
    model = Remembers()
    learn,alone = learner(model=model),learner(model=copy.deepcopy(model))
    want = values(alone)
    folder = BNFolder()
    folder.fold(model.net, torch.randn(2,3,8,8).double(), inplace=True)
    validate_both(learn, folder)
    assert close(want, list(folder.report.metrics_before.values())) and close(want, list(folder.report.metrics_after.values()))
    assert model.n==0 and model.hidden==0.

class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net()
    def forward(self, x): return self.net(x)+torch.randn(3)*10

def test_both_draw_the_same_random_numbers():
    learn = learner(model=Noisy())
    folder = BNFolder()
    folder.fold(learn.model.net, torch.randn(2,3,8,8).double(), inplace=True)
    validate_both(learn, folder)
    assert folder.report.n_changed==0 and folder.report.pred_diff<1e-9*folder.report.pred_scale

class WritesIntoItsInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net()
    def forward(self, x): return self.net(x.mul_(2))

def test_a_model_that_writes_into_its_input():
    assert fold(learner(model=WritesIntoItsInput())).n_changed==0

def test_unlabelled():
    learn = learner()
    test_dl = DataLoader(Items(n_valid, None), bs=8)
    folder = BNFolder()
    folder.fold(learn.model, torch.randn(2,3,8,8).double(), inplace=True)
    validate_both(learn, folder, test_dl)
    rep = folder.report
    assert rep.metrics_before=={} and rep.n_items==n_valid and rep.n_changed==0 and 'no targets' in str(rep)

def test_pytorch_loaders():
    def loader(n): return torch.utils.data.DataLoader(Items(n, index), batch_size=8)
    learn = Learner(DataLoaders(loader(16), loader(n_valid)), net(), loss_func=F.cross_entropy, metrics=accuracy)
    want = values(learn)
    rep = fold(learn)
    assert close(want, list(rep.metrics_before.values())) and rep.n_items==n_valid

# Callbacks

class Spy(Callback):
    "Sees everything, changes nothing"
    def __init__(self): self.seen = []
for name in events: setattr(Spy, name, lambda self, name=name: self.seen.append(name))

def test_spies_see_nothing():
    spy = Spy()
    learn = learner(cbs=spy)
    fold(learn)
    assert spy.seen==[]

def test_events_of_a_fit_come_once():
    def seen(*cbs):
        spy = Spy()
        learn = trains(cbs=spy)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=list(cbs))
        return spy.seen
    assert seen()==seen(FoldBN(latency=0, show=False))

class Scales(Callback):
    def before_batch(self): self.learn.xb = tuple(x*3 for x in self.xb)
class ScalesInPlace(Callback):
    def before_batch(self): self.xb[0].mul_(3)
class ByAHelper(Callback):
    def before_batch(self): self.scale()
    def scale(self): setattr(self.learn, 'xb', tuple(x*3 for x in self.xb))
class FirstOutput(Callback):
    def after_pred(self): self.learn.pred = self.pred[0]
class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net()
    def forward(self, x): return self.net(x), x.mean((2,3))

@pytest.mark.parametrize('cb,model', [(Scales, None), (ScalesInPlace, None), (ByAHelper, None), (partial(before_batch_cb, lambda self,xb,yb: ((xb[0]*3,), yb)), None),
                                      (FirstOutput, Pair)], ids=['new', 'in place', 'helper', 'before_batch_cb', 'one of two outputs'])
def test_callbacks_that_take_part_do(cb, model):
    learn = learner(model=model and model(), cbs=cb(), metrics=accuracy)
    assert takes_part(learn.cbs[-1])
    want = values(learn)
    assert close(want, list(fold(learn).metrics_before.values()))

def test_nothing_else_of_the_learner_changes():
    learn = trains(metrics=accuracy)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    model,keys = learn.model,set(vars(learn))
    kept = {name: value for name,value in vars(learn).items() if name not in ('opt','lock')}
    log,rng = list(learn.recorder.log),[(dl.rng, dl.rng.getstate()) for dl in learn.dls.loaders]
    states = torch.get_rng_state(),np.random.get_state()[1].tolist(),random.getstate()
    model.train()
    fold(learn)
    assert all(m.training for m in learn.model.modules())
    learn.unfold_bn()
    assert all(m.training for m in model.modules())
    assert set(vars(learn))==keys and all(vars(learn)[name] is value for name,value in kept.items() if name!='progress')
    assert list(learn.recorder.log)==log and [(dl.rng, dl.rng.getstate()) for dl in learn.dls.loaders][1]==rng[1]
    assert torch.equal(torch.get_rng_state(), states[0]) and np.random.get_state()[1].tolist()==states[1] and random.getstate()==states[2]

class Boom(Exception): pass
def test_an_interrupted_iteration_is_closed():
    class Data(torch.utils.data.IterableDataset):
        def __iter__(self):
            for i in range(n_valid):
                if broken and i==12: raise Boom
                yield image(i), index(i)
        def __len__(self): return n_valid
    broken = True
    learn = learner()
    learn.dls.loaders[1] = DataLoader(Data(), bs=8)
    attributes = dict(vars(learn.dls.valid))
    with pytest.raises(Boom): fold(learn, xb=torch.stack([image(0), image(1)]))
    assert vars(learn.dls.valid)==attributes
    copy.deepcopy(learn)
    broken = False
    assert fold(learn, xb=torch.stack([image(0), image(1)])).n_items==n_valid

# Classes

def lambda_ce(p, y): return F.cross_entropy(p, y)
def flat_bce(p, y): return F.binary_cross_entropy_with_logits(p.squeeze(1), y)
@pytest.mark.parametrize('target,loss,n_out', [
    (index, nn.CrossEntropyLoss(), 3), (index, F.cross_entropy, 3), (index, partial(F.cross_entropy, label_smoothing=.1), 3), (index, lambda_ce, 3),
    (index, nn.MultiMarginLoss(), 3), (index, lambda p,y: F.nll_loss(p.log_softmax(1), y), 3), (several, nn.BCEWithLogitsLoss(), 3),
    (several, nn.MultiLabelSoftMarginLoss(), 3), (binary, flat_bce, 1), (several, BCEWithLogitsLossFlat(), 3), (index, CrossEntropyLossFlat(), 3),
    (lambda i: several(i).softmax(0), nn.CrossEntropyLoss(), 3)])
def test_changed_predictions_are_counted(target, loss, n_out):
    learn = learner(target, loss, net(n_out))
    folder = BNFolder()
    folder.fold(learn.model, torch.randn(2,3,8,8).double(), inplace=True)
    validate_both(learn, folder)
    assert (folder.report.n_changed, folder.report.n_items)==(0, n_valid)
    other = copy.deepcopy(learn.model[-1])
    with torch.no_grad():
        for p in other.parameters(): p.neg_() # says the opposite
    folder.swaps.add(learn.model._modules, '5', other)
    validate_both(learn, folder)
    assert folder.report.n_changed==n_valid

@pytest.mark.parametrize('loss', [nn.MSELoss(), F.l1_loss, MSELossFlat(), lambda p,y: F.mse_loss(p, y), nn.HuberLoss()])
def test_a_regression_has_no_classes(loss):
    rep = fold(learner(number, loss, net(1)))
    assert rep.n_changed is None and rep.n_items==n_valid and rep.pred_diff<1e-9<rep.pred_scale
    assert 'no classes to compare' in str(rep) and 'no classes to compare' in rep._repr_html_()

def test_masks_and_words():
    pred = torch.randn(4,3,5,5)
    assert Classes(nn.CrossEntropyLoss())(pred, (torch.zeros(4,5,5, dtype=torch.long),))[0].shape==(4,5,5)
    assert Classes(lambda p,y: 0)(torch.randn(4,6,9), (torch.zeros(4,6, dtype=torch.long),))[0].shape==(4,6)

def test_probabilities_have_their_border_at_a_half():
    pred = torch.tensor([[.2],[.7]])
    assert Classes(nn.BCELoss())(pred, (torch.tensor([[0.],[1.]]),))[0].tolist()==[[False],[True]]
    assert Classes(nn.BCEWithLogitsLoss())(pred, (torch.tensor([[0.],[1.]]),))[0].tolist()==[[True],[True]]

def test_boxes_of_another_number_are_a_change():
    assert compare(torch.zeros(3,4), torch.zeros(2,4), 2)[:,0].tolist()==[1,1]

# Noise

def test_too_few_rounds_say_nothing():
    assert interval([1.]*5) is None and 'too few' in speed_in_words(1.5, None)

@pytest.mark.parametrize('speedup,span,words', [(1.2, (1.1,1.3), '1.20x faster (1.10x to 1.30x)'), (.8, (.7,.9), '1.25x slower (1.11x to 1.43x)'),
    (1.2, (.9,1.5), 'no difference measurable (0.90x to 1.50x as fast)'), (1.003, (1.001,1.004), 'no difference measurable (1.00x to 1.00x as fast)')])
def test_only_what_is_sure_is_said(speedup, span, words): assert speed_in_words(speedup, span)==words

def test_latency_is_one_set_of_rounds():
    before,after = [2.,3.,4.,5.,6.,7.],[1.,2.,2.,3.,3.,4.]
    times = Latency(dict(before=before, after=after))
    assert times==(4.5, 2.5, 1.875) and times.interval==(1.5,2.) and times.before_interval==(2.,7.)

def test_a_race_leaves_a_training_model_alone():
    model = net().train()
    folder = BNFolder()
    folder.fold(model, torch.randn(2,3,8,8).double(), inplace=True)
    bn = next(o for _,_,o in folder.swaps.old if isinstance(o, nn.BatchNorm2d))
    mean = bn.running_mean.clone()
    time_both(model, (torch.randn(1,3,8,8).double(),), folder.swaps, 0.)
    assert bn.training and torch.equal(bn.running_mean, mean) and isinstance(model[1], nn.Identity)

def test_the_report_holds_the_intervals():
    learn = learner()
    with learn.no_bar(): rep = learn.fold_bn(latency=.05)
    low,high = rep.speedup_interval
    assert low<=rep.speedup<=high and rep.latency_before_interval[0]<=rep.latency_before<=rep.latency_before_interval[1]
    json.dumps(rep.to_dict())

# What is shown

def many(n_kept): return [Row('first', True, 'backward', ['conv']), *[Row(f'bn{i}', reason='a sigmoid reads it', kind='sigmoid') for i in range(n_kept)]]

def test_a_terminal_shows_the_kept_ones_and_counts():
    text = str(FoldReport(many(3)))
    assert 'bn2' in text and 'backward into conv' not in text and '1 × backward' in text

def test_a_long_list_is_shortened():
    rep = FoldReport(many(40))
    assert len(str(rep).splitlines())<25 and '32 × sigmoid' in str(rep)
    assert 'bn39' in str(rep.rows) and 'backward into conv' in str(rep.rows) and 'bn39' in rep._repr_html_() and len(rep.to_df())==41

def test_metrics_that_are_tables_go_into_json():
    report = FoldReport(many(1), metrics_before={'confusion': torch.eye(2)}, metrics_after={'confusion': np.eye(2)})
    assert json.loads(json.dumps(report.to_dict()))['metrics_after']['confusion']==[[1,0],[0,1]]

@pytest.mark.parametrize('change', [lambda l: l, lambda l: l.to_fp16(), lambda l: l.to_bf16()], ids=['float32', 'fp16', 'bf16'])
def test_no_warnings(change):
    learn = change(learner(model=nn.Sequential(net())))
    with learn.no_bar(), warnings.catch_warnings():
        warnings.simplefilter('error')
        fold(learn)

def test_one_bar_with_a_title(capsys):
    learn = learner()
    learn.fold_bn(latency=.01)
    out = capsys.readouterr().out
    assert all(word in out for word in ('Folding', 'Validating', 'Timing')) and '\n' not in out

def test_no_bar(capsys):
    learn = learner()
    with learn.no_bar(): learn.fold_bn(latency=.01)
    learn.unfold_bn()
    learn.remove_cb(ProgressCallback)
    learn.fold_bn(latency=.01)
    assert capsys.readouterr().out==''
