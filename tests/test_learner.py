"The Learner: everything of fastai goes on working, and nothing is lost"
import copy, json, subprocess, sys
import pytest, torch
from torch import nn
import matplotlib.pyplot as plt, numpy as np, pandas as pd
from fastai.vision.all import (ClassificationInterpretation, CrossEntropyLossFlat, CSVLogger, DataLoaders, ImageDataLoaders, Learner, PILImage,
                               accuracy, error_rate, load_learner)
import fastai.callback.all # fit_one_cycle and its like
from fastai_bnfold.all import *
from fastai_bnfold.lab.data import digits_dls
from fastai_bnfold.fold.testing import randomize_bn

def net(): return nn.Sequential(nn.Conv2d(3,16,3,padding=1,bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.Conv2d(16,32,3,2), nn.BatchNorm2d(32), nn.ReLU(),
                                nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(32), nn.Dropout(.1), nn.Linear(32,10))
@pytest.fixture(scope='module')
def dls(): return digits_dls(size=16, bs=64)
@pytest.fixture
def learn(dls, tmp_path):
    learn = Learner(dls, net(), metrics=[accuracy, error_rate], path=tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, 1e-2)
    return learn
def state(m): return {k:v.clone() for k,v in m.state_dict().items()}
def equal(a, b): return list(a)==list(b) and all(torch.equal(a[k], b[k]) for k in a)

def test_fold_and_report(learn):
    losses,values = list(learn.recorder.losses),list(learn.recorder.values)
    rep = learn.fold_bn(latency=.3)
    assert rep.n_folded==rep.n_bn==3 and rep.n_changed==0 and rep.n_items==360
    assert list(rep.metrics_before)==['valid_loss','accuracy','error_rate'] and rep.metrics_before['accuracy']==rep.metrics_after['accuracy']
    assert abs(rep.metrics_before['valid_loss']-rep.metrics_after['valid_loss']) <= 1e-5*rep.metrics_before['valid_loss']
    assert rep.params_before-rep.params_after == 2*(16+32+32)-16 and rep.latency_before>0 and rep.speedup>0
    assert learn.recorder.losses==losses and learn.recorder.values==values
    text = str(rep)
    for word in ('parameters','buffers','latency','valid_loss','accuracy','0 of 360 predictions changed','2 × backward, 1 × forward'): assert word in text
    for word in ('backward into 0','forward into 10'): assert word in str(rep.rows)
    html = rep._repr_html_(); assert '<table>' in html and 'accuracy' in html
    assert list(rep.to_df().columns)==['bn','folded','how','into','acts','reason','possible','live','is_bn','kind','in_graph','calls'] and len(rep.to_df())==3
    rep.plot(); plt.close('all')
    json.dumps(rep.to_dict())

def test_all_of_fastai_goes_on_working(learn, dls, tmp_path):
    img = dls.valid_ds[3][0]
    before = learn.predict(img)
    preds = learn.get_preds()[0]
    learn.fold_bn(latency=0)
    after = learn.predict(img)
    assert before[0]==after[0] and torch.allclose(before[2], after[2], atol=1e-5)
    assert torch.allclose(preds, learn.get_preds()[0], atol=1e-5)
    learn.show_results(); plt.close('all')
    assert 'Identity' in str(learn.summary())
    learn.save('folded'); learn.load('folded')
    assert torch.allclose(preds, learn.get_preds()[0], atol=1e-5)
    ClassificationInterpretation.from_learner(learn)

_load = '''
import sys; sys.modules['fastai_bnfold'] = None # as if it were not installed
from fastai.vision.all import *
learn = load_learner(sys.argv[1])
x = torch.load(sys.argv[2])
with torch.no_grad(): torch.save(learn.model.eval()(x), sys.argv[3])
item = PILImage.create(np.zeros((16,16,3), dtype=np.uint8))
print(learn.predict(item)[0], sum(isinstance(m, nn.BatchNorm2d) for m in learn.model.modules()))
'''
def _get_y(f): return f.parent.name

def test_export_loads_without_this_package(tmp_path):
    "On a Learner whose DataLoaders are fastai's alone"
    for d in ('train','val'):
        for c in ('a','b'):
            (tmp_path/d/c).mkdir(parents=True)
            for i in range(4): PILImage.create(np.full((16,16,3), 60*i+9, dtype=np.uint8)).save(tmp_path/d/c/f'{i}.png')
    dls = ImageDataLoaders.from_folder(tmp_path, train='train', valid='val', bs=4, num_workers=0)
    learn = Learner(dls, randomize_bn(net()), path=tmp_path, metrics=accuracy); learn.model[10] = nn.Linear(32,2)
    learn.fold_bn(latency=0)
    learn.export('m.pkl')
    x = torch.randn(2,3,16,16); torch.save(x, tmp_path/'x.pt')
    out = subprocess.run([sys.executable, '-c', _load, tmp_path/'m.pkl', tmp_path/'x.pt', tmp_path/'y.pt'], capture_output=True, text=True)
    assert out.returncode==0, out.stderr
    with torch.no_grad(): assert torch.equal(torch.load(tmp_path/'y.pt'), learn.model.eval()(x))
    assert out.stdout.split()[-1]=='0'
    learn.unfold_bn(); learn.fit(1) # still trainable here
    loaded = load_learner(tmp_path/'m.pkl') # and where the package is, a loaded one says why it cannot be trained
    with pytest.raises(FoldedError): loaded.fit(1)
    with pytest.raises(FoldedError, match='elsewhere'): loaded.unfold_bn()

def test_activations_that_change(dls, tmp_path):
    "Folded through a ReLU, with zero padding behind it: validated, exported, loaded, unfolded; the report says that the export needs this package"
    torch.manual_seed(0)
    m = randomize_bn(nn.Sequential(nn.Conv2d(3,16,3), nn.ReLU(inplace=True), nn.BatchNorm2d(16), nn.Conv2d(16,8,3,padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8,10)))
    learn = Learner(dls, m, path=tmp_path, metrics=accuracy); old,relu = state(m),m[1]
    rep = learn.fold_bn(latency=0)
    assert rep.n_folded==1 and rep.rows[0].how=='split' and rep.rows[0].acts==['1'] and rep.n_changed==0 and 'needs fastai_bnfold' in str(rep) and 'needs fastai_bnfold' in rep._repr_html_()
    preds = learn.get_preds()[0]
    learn.export('m.pkl'); loaded = load_learner(tmp_path/'m.pkl')
    assert torch.equal(loaded.get_preds(dl=dls.valid)[0], preds)
    learn.unfold_bn(); assert m[1] is relu and equal(state(m), old); learn.fit(1)

def test_unfold_is_bit_for_bit(learn):
    old,objects,opt = state(learn.model),learn.model.state_dict(keep_vars=True),learn.opt
    momenta = [v['grad_avg'].clone() for v in opt.state_dict()['state'] if 'grad_avg' in v]
    learn.fold_bn(latency=.2); learn.export('m.pkl'); learn.unfold_bn()
    now = learn.model.state_dict(keep_vars=True)
    assert equal(state(learn.model), old) and all(now[k] is objects[k] for k in now) and learn.opt is opt
    assert all(torch.equal(a, v['grad_avg']) for a,v in zip(momenta, [v for v in opt.state_dict()['state'] if 'grad_avg' in v]))
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    assert not equal(state(learn.model), old)

def test_training_a_folded_learner_is_refused(learn):
    learn.fold_bn(latency=0); old = state(learn.model)
    for f in (lambda: learn.fit(1), lambda: learn.fit_one_cycle(1), lambda: learn.fine_tune(1), lambda: learn.lr_find()):
        with pytest.raises(FoldedError, match='unfold_bn'): f()
    with pytest.raises(FoldedError, match='already'): learn.fold_bn()
    assert equal(state(learn.model), old)
    learn.unfold_bn()
    with pytest.raises(FoldError, match='not folded'): learn.unfold_bn()

def test_callback(dls, tmp_path):
    learn = Learner(dls, net(), metrics=accuracy, path=tmp_path)
    cb = FoldBN(latency=0)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, 1e-2, cbs=[cb, CSVLogger()])
    assert cb.report.n_folded==3 and cb.report.n_changed==0 and cb.report.metrics_before['accuracy']>.1
    assert len(learn.recorder.losses)==2*len(dls.train) and len(pd.read_csv(tmp_path/'history.csv'))==2 # the validations wrote no log
    assert isinstance(learn.model[1], nn.Identity)
    learn.validate(); learn.get_preds()
    learn.unfold_bn()

def test_callback_that_stays(dls):
    learn = Learner(dls, net(), metrics=accuracy, cbs=FoldBN(latency=0, show=False))
    with learn.no_bar(), learn.no_logging():
        learn.validate(); assert isinstance(learn.model[1], nn.BatchNorm2d) # no training, no fold
        learn.fit(1, 1e-2)
    assert learn.bn_folding.report.n_folded==3

def test_no_validation_set(dls):
    learn = Learner(DataLoaders(dls.train), net(), loss_func=CrossEntropyLossFlat())
    rep = learn.fold_bn(latency=0)
    assert rep.n_folded==3 and rep.metrics_before=={} and 'no validation set' in str(rep)

def test_nothing_to_fold(dls):
    learn = Learner(dls, nn.Sequential(nn.Conv2d(3,8,3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8,10)), metrics=accuracy)
    rep = learn.fold_bn()
    assert rep.n_bn==0 and 'no batch norm' in str(rep) and 'no batch norm' in rep._repr_html_() and rep.n_changed==0
    with learn.no_bar(), learn.no_logging(): learn.fit(1)

def test_a_metric_that_is_no_number(dls):
    "And a loss that tells no classes: shapes and dtypes do"
    from fastai.learner import AvgMetric
    def shape(p, y): return torch.tensor([1.,2.])
    learn = Learner(dls, net(), loss_func=lambda p,y: nn.functional.cross_entropy(p, y), metrics=AvgMetric(shape))
    rep = learn.fold_bn(latency=0)
    assert rep.n_folded==3 and rep.n_changed==0 and 'shape' in str(rep) and 'shape' in rep._repr_html_()

def test_no_data(learn, tmp_path):
    learn.export('plain.pkl'); loaded = load_learner(tmp_path/'plain.pkl'); old = state(loaded.model)
    with pytest.raises(NoDataError, match='xb='): loaded.fold_bn()
    assert equal(state(loaded.model), old)
    rep = loaded.fold_bn(torch.randn(2,3,16,16), latency=0)
    assert rep.n_folded==3 and 'no validation set' in str(rep)

def test_bad_batch(learn):
    old = state(learn.model)
    with pytest.raises(TraceError, match='Given'): learn.fold_bn(torch.randn(2,7,16,16))
    assert equal(state(learn.model), old)
    learn.fold_bn(latency=0)

@pytest.mark.parametrize('exc', [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize('nth', [1,2,5,12])
def test_interrupted_validation_loses_nothing(learn, exc, nth, monkeypatch):
    "In the first batch or a later one, in the unfolded model or the folded"
    from fastai_bnfold.learner.validate import Validation
    real,calls = Validation.run,[]
    def faulty(self, i, batch):
        calls.append(1)
        if len(calls)==nth: raise exc('injected')
        return real(self, i, batch)
    monkeypatch.setattr(Validation, 'run', faulty)
    old,opt,cbs,losses = state(learn.model),learn.opt,list(learn.cbs),list(learn.recorder.losses)
    with pytest.raises(exc): learn.fold_bn(latency=0)
    assert equal(state(learn.model), old) and learn.opt is opt and list(learn.cbs)==cbs and learn.recorder.losses==losses
    copy.deepcopy(learn)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)

def test_bad_statistics(learn):
    learn.model[4].running_var[2] = float('nan')
    old,report = state(learn.model),learn.fold_bn(latency=0)
    [row] = report.kept
    assert (row.bn, row.kind)==('4', 'not finite') and '`4.running_var`' in row.reason
    learn.unfold_bn()
    assert all(torch.equal(torch.nan_to_num(x), torch.nan_to_num(old[name])) for name,x in state(learn.model).items())

def test_nothing_but_bad_statistics(learn):
    bns = [module for module in learn.model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for bn in bns: bn.running_var[0] = float('nan')
    old = state(learn.model)
    with pytest.raises(StatisticsError, match='running_var'): learn.fold_bn()
    assert torch.equal(learn.model[0].weight, old['0.weight']) and not getattr(learn.model, 'bn_folded', False)

def test_channels_last_and_a_frozen_body(learn):
    learn.model.to(memory_format=torch.channels_last); learn.freeze()
    assert learn.fold_bn(latency=0).n_changed==0

def test_latency_stays_in_its_budget(learn):
    import time
    rep = learn.fold_bn(validate=False, latency=0); assert rep.latency_before is None
    t = time.perf_counter(); before,after,speedup = learn.latency_bn(seconds=.5)
    assert time.perf_counter()-t < 3 and before>0 and after>0
    assert isinstance(learn.model[1], nn.Identity)
