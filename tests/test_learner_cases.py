"Learners as people have them: mixed precision, callbacks, several inputs, odd data. Folding keeps the metrics, and a fold that fails leaves the Learner as it was"
import copy
import pytest, torch
from torch import nn
from fastai.vision.all import (CrossEntropyLossFlat, CSVLogger, ChannelsLast, DataLoaders, Datasets, EarlyStoppingCallback, GradientAccumulation, GradientClip, Learner, Metric,
                               AccumMetric, SaveModelCallback, AvgMetric, accuracy, load_learner, params)
from fastai.callback.core import Callback
import fastai.callback.all
from fastai_bnfold.all import *
from fastai_bnfold.lab.data import digits_dls
from fastai_bnfold.fold.testing import randomize_bn
from conftest import snapshot, unchanged

def net(): return nn.Sequential(nn.Sequential(nn.Conv2d(3,16,3,2,bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.Conv2d(16,32,3,2), nn.BatchNorm2d(32), nn.ReLU()),
                                nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(32), nn.Dropout(.1), nn.Linear(32,10)))
def splitter(m): return [params(m[0]), params(m[1])]
@pytest.fixture(scope='module')
def dls(): return digits_dls(size=12, bs=64)
def learner(dls, tmp_path, model=None, metrics=accuracy, **kwargs):
    return Learner(dls, model or net(), metrics=metrics, path=tmp_path, splitter=splitter, **kwargs)
def fit(learn, *args, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, *(args or (1e-2,)), **kwargs)
    return learn

class EMA(Callback):
    "An exponential moving average of the model, in its place for validation"
    order = 60
    def before_fit(self):
        if not hasattr(self.learn, 'lr_finder') and not hasattr(self, 'average'): self.average = torch.optim.swa_utils.AveragedModel(self.model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(.9), use_buffers=True)
    def after_batch(self):
        if self.training: self.average.update_parameters(self.model)

def fp16(l): return l.to_fp16()
def bf16(l): return l.to_bf16()
def accumulation(l): l.add_cb(GradientAccumulation(128)); return l
def clipping(l): l.add_cb(GradientClip(1.)); return l
def ema(l): l.add_cb(EMA()); return l
def save_model(l): l.add_cb(SaveModelCallback(monitor='accuracy')); return l
def save_model_with_opt(l): l.add_cb(SaveModelCallback(monitor='accuracy', with_opt=True)); return l
def early_stopping(l): l.add_cb(EarlyStoppingCallback(monitor='accuracy')); return l
def csv_logger(l): l.add_cb(CSVLogger()); return l
def channels_last(l): l.add_cb(ChannelsLast()); return l
def frozen(l): l.freeze(); return l

def state(learn):
    "What a fold that fails must leave alone"
    r = learn.recorder
    return (learn.model, learn.opt, [{k:v for k,v in h.items()} for h in learn.opt.hypers], [p.requires_grad for p in learn.model.parameters()], list(learn.cbs), list(learn.metrics),
            list(learn.dls.loaders), list(map(float, r.losses)), copy.deepcopy(r.values), list(r.lrs), r.metric_names, [dict(s) and sorted(s) for s in learn.opt.state.values()])

@pytest.mark.parametrize('change', [fp16, bf16, accumulation, clipping, ema, save_model, save_model_with_opt, early_stopping, csv_logger, channels_last, frozen], ids=lambda f: f.__name__)
def test_callbacks_and_settings(change, dls, tmp_path):
    "Train, fail to fold, fold, predict, unfold, train on"
    learn = fit(change(learner(dls, tmp_path)))
    kept,old = snapshot(learn.model),state(learn)
    with pytest.raises(TraceError): learn.fold_bn(xb=torch.zeros(2))
    assert unchanged(learn.model, kept) and state(learn)==old
    best = getattr(getattr(learn, 'save_model', None), 'best', None); log = (tmp_path/'history.csv').read_text() if change is csv_logger else None
    rep = learn.fold_bn(latency=0)
    low = change in (fp16, bf16)
    assert rep.n_folded==rep.n_bn==3 and rep.n_items==len(dls.valid_ds)
    assert rep.n_changed<=(3 if low else 0) and abs(rep.metrics_before['accuracy']-rep.metrics_after['accuracy'])<=(3/rep.n_items if low else 0) # in low precision a tie may fall otherwise
    assert abs(rep.metrics_before['valid_loss']-rep.metrics_after['valid_loss'])<=(2e-2 if low else 1e-5)*max(1, rep.metrics_before['valid_loss'])
    if best is not None: assert learn.save_model.best==best
    if log: assert (tmp_path/'history.csv').read_text()==log # no new log
    learn.unfold_bn()
    assert unchanged(learn.model, kept) and state(learn)==old
    fit(learn).fold_bn(latency=0)
    assert learn.predict(dls.valid_ds[0][0])[0] in map(str, dls.vocab)

def test_discriminative_learning_rates(dls, tmp_path):
    learn = fit(learner(dls, tmp_path), slice(1e-4,1e-2))
    lrs = [h['lr'] for h in learn.opt.hypers]; assert lrs[0]<lrs[1]
    learn.fold_bn(latency=0); learn.unfold_bn()
    assert [h['lr'] for h in learn.opt.hypers]==lrs

def test_exported_and_loaded(dls, tmp_path):
    fit(learner(dls, tmp_path)).export('m.pkl')
    learn = load_learner(tmp_path/'m.pkl'); kept = snapshot(learn.model)
    before = learn.predict(dls.valid_ds[0][0])[2]
    with pytest.raises(NoDataError, match='xb'): learn.fold_bn() # an export has no data
    rep = learn.fold_bn(xb=dls.valid.one_batch()[0], latency=0)
    assert rep.n_folded==3 and any('no validation set' in n for n in rep.notes) and torch.allclose(learn.predict(dls.valid_ds[0][0])[2], before, atol=1e-5)
    learn.unfold_bn(); assert unchanged(learn.model, kept)

class Two(nn.Module):
    def __init__(self): super().__init__(); self.a,self.b,self.head = net()[0],nn.Sequential(nn.Linear(4,32), nn.BatchNorm1d(32), nn.ReLU()),net()[1]
    def forward(self, x, v): return self.head(self.a(x)*self.b(v)[...,None,None])
def get_x(i): return torch.randn(3,12,12, generator=torch.Generator().manual_seed(i))
def get_v(i): return torch.randn(4, generator=torch.Generator().manual_seed(i+1000))
def get_y(i): return torch.tensor(i%10)
def test_several_inputs(tmp_path):
    dls = Datasets(range(50), [[get_x],[get_v],[get_y]], n_inp=2, splits=[list(range(50)), list(range(21))]).dataloaders(bs=8, num_workers=0) # the last batch is smaller
    learn = Learner(dls, randomize_bn(Two()), loss_func=CrossEntropyLossFlat(), metrics=accuracy, path=tmp_path)
    fit(learn)
    rep = learn.fold_bn(latency=0)
    assert rep.n_folded==rep.n_bn==4 and rep.n_items==21 and rep.n_changed==0

class Confusion(Metric):
    "A metric that is a table"
    def reset(self): self.t = torch.zeros(10,10)
    def accumulate(self, learn):
        for p,y in zip(learn.pred.argmax(1), learn.y): self.t[y,p] += 1
    @property
    def value(self): return self.t.clone()
    @property
    def name(self): return 'confusion'
def mean_probability(preds, targs): return preds.softmax(1).max(1).values.mean()
def test_custom_metrics(dls, tmp_path):
    learn = fit(learner(dls, tmp_path, metrics=[accuracy, Confusion(), AvgMetric(mean_probability), AccumMetric(lambda p,t: (p.argmax(1)==t).sum(), flatten=False)]))
    rep = learn.fold_bn(latency=0)
    assert torch.equal(rep.metrics_before['confusion'], rep.metrics_after['confusion']) and rep.metrics_before['confusion'].sum()==360
    assert abs(rep.metrics_before['mean_probability']-rep.metrics_after['mean_probability'])<1e-5
    str(rep); rep._repr_html_(); rep.to_dict()

def test_no_validation_set(tmp_path):
    data = [(get_x(i), i%10) for i in range(20)]
    learn = Learner(DataLoaders(DataLoaders.from_dsets(data, bs=8, num_workers=0).train), randomize_bn(net()), loss_func=CrossEntropyLossFlat(), metrics=accuracy, path=tmp_path)
    rep = learn.fold_bn(latency=0)
    assert rep.n_folded==3 and rep.metrics_before=={} and any('no validation set' in n for n in rep.notes)

def test_a_validation_that_fails(dls, tmp_path):
    "A metric that raises, before or after the fold"
    calls = []
    def faulty(p, t):
        calls.append(1)
        if len(calls)==when: raise ZeroDivisionError('injected')
        return p.new_zeros(())
    for when in (1,8):
        calls.clear(); w,when = when,0
        learn = fit(learner(dls, tmp_path, metrics=[accuracy, faulty])); kept,old = snapshot(learn.model),state(learn)
        calls.clear(); when = w
        with pytest.raises(ZeroDivisionError, match='injected'): learn.fold_bn(latency=0)
        assert unchanged(learn.model, kept) and state(learn)==old
        learn.fold_bn(latency=0)
