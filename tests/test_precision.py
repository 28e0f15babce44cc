"`learn.deploy(precision=…)`: int8 and bfloat16 in the engines that have them, judged by the first metric; refused with words, and nothing half written"
import builtins, json, warnings
import numpy as np, pytest, torch
from torch import nn
from fastai.vision.all import CrossEntropyLossFlat, DataLoaders, Learner, MSELossFlat, accuracy, error_rate, mse, set_seed
from fastai_bnfold.all import *
from fastai_bnfold.deploy import engines as E, precision as P
from fastai_bnfold.deploy.precision import *
from fastai_bnfold.fold.testing import randomize_bn
from fastai_bnfold.lab.data import get_dls
from conftest import snapshot, unchanged

pytest.importorskip('onnxruntime'); pytest.importorskip('onnx'); pytest.importorskip('onnxscript')

class Net(nn.Module):
    "Conv, depthwise, a sum, pooling, a classifier"
    def __init__(self, n_out=10):
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(3,16,3,2,1,bias=False), nn.BatchNorm2d(16), nn.ReLU6())
        self.b = nn.Sequential(nn.Conv2d(16,16,3,1,1,groups=16,bias=False), nn.BatchNorm2d(16), nn.ReLU6(), nn.Conv2d(16,16,1,bias=False), nn.BatchNorm2d(16))
        self.c = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16,n_out))
    def forward(self, x):
        x = self.a(x)
        return self.c(x+self.b(x))

class Sets(list):
    "Items that know how many they are"

def blobs(n, seed):
    "Images of ten colours and brightnesses, with noise"
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n)%10
    x = torch.randn(n, 3, 8, 8, generator=g)*.3 + torch.stack([(y%5)-2., (y//5)*3-1.5, y%2*2-1.], 1).view(n,3,1,1)
    return Sets(zip(x, y))

def dls_of(train, valid=None, bs=20): return DataLoaders.from_dsets(*[ds for ds in (train, valid) if ds is not None], bs=bs, shuffle=False, drop_last=False, device='cpu', num_workers=0)

@pytest.fixture(scope='module')
def learn():
    set_seed(0)
    learn = Learner(dls_of(blobs(200, 0), blobs(100, 1)), Net(), loss_func=CrossEntropyLossFlat(), metrics=[accuracy, error_rate])
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(6, 2e-2)
    return learn

def deploy(learn, path, *args, **kw):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return learn.deploy(path, *args, **kw)

def with_(learn, **kw):
    "Another Learner with the same model"
    args = dict(dls=learn.dls, model=learn.model, loss_func=learn.loss_func, metrics=list(learn.metrics)) | kw
    return Learner(args.pop('dls'), args.pop('model'), **args)

def left(path): return sorted(file.name for file in path.iterdir())

@pytest.fixture(scope='module', params=['onnx','openvino'])
def int8(request, learn, tmp_path_factory):
    if request.param=='openvino': pytest.importorskip('openvino')
    before = snapshot(learn.model)
    m = deploy(learn, tmp_path_factory.mktemp('m')/'m', request.param, precision='int8', n_calib=100)
    assert unchanged(learn.model, before)
    return m

def test_int8_is_judged(int8):
    card = json.loads((int8.path/'card.json').read_text())
    assert card['precision']=='int8' and card['drop']['metric']=='accuracy' and card['drop']['points']<=1
    assert card['metrics']['accuracy']==card['drop']['after'] and card['metrics_f32']['accuracy']==card['drop']['before']>.9
    assert card['parity']['n_items']==100 and 0<card['parity']['max_err']<.2
    assert card['int8']['n_calib']==96 and card['int8']['on_integers']['Conv']==3 and 'Conv' not in card['int8']['on_floats']

def test_int8_has_the_metric_that_it_says(learn, int8):
    x,y = zip(*learn.dls.valid.dataset)
    found = int8(torch.stack(x).numpy())[0].argmax(1)
    assert (found==torch.stack(y).numpy()).mean()==pytest.approx(int8.card['metrics']['accuracy'], abs=1e-6)

def test_int8_is_near_the_model(learn, int8):
    "As far apart as some roundings to 256 values"
    x = torch.stack([x for x,_ in learn.dls.valid.dataset])
    with torch.no_grad(): want = learn.model.eval()(x).numpy()
    assert 0 < np.abs(int8(x.numpy())[0]-want).max() < .1*np.abs(want).max()

def test_int8_loads_again_and_serves_any_batch(int8):
    again = Deployed(int8.path, threads=1)
    x = torch.randn(5,3,8,8).numpy()
    together = again(x)[0]
    assert again.precision=='int8' and 'int8' in repr(again) and together.shape==(5,10)
    alone = np.concatenate([again(x[i:i+1])[0] for i in range(5)])
    assert np.allclose(together, alone, atol=1e-5) and np.allclose(together, int8(x)[0], atol=1e-5)
    assert [p.label for p in again.predict(list(x))]==[p.label for p in int8.predict(list(x))]

def test_openvino_gets_single_items(int8, monkeypatch):
    "With a free batch size, OpenVINO 2026.4 computes wrong sums in deep networks of integers"
    if int8.card['backend']!='openvino': pytest.skip('another engine')
    seen = []
    def spy(run): return lambda inputs: run({name: (seen.append(len(x)), x)[1] for name,x in inputs.items()})
    real = E.item_by_item
    monkeypatch.setattr(E, 'item_by_item', lambda run: real(spy(run)))
    x = torch.randn(5,3,8,8).numpy()
    assert np.allclose(Deployed(int8.path)(x)[0], int8(x)[0], atol=1e-5) and seen==[1]*5

def has_bf16():
    pytest.importorskip('openvino')
    return 'BF16' in E.openvino_capabilities()

@pytest.fixture(scope='module')
def bf16(learn, tmp_path_factory):
    if not has_bf16(): pytest.skip('no bfloat16')
    return deploy(learn, tmp_path_factory.mktemp('m')/'m', 'openvino', precision='bf16')

def test_bf16(learn, bf16):
    x = torch.stack([x for x,_ in learn.dls.valid.dataset])
    with torch.no_grad(): want = learn.model.eval()(x).numpy()
    again = Deployed(bf16.path)
    apart = np.abs(again(x.numpy())[0]-want).max()/np.abs(want).max()
    assert again.precision=='bf16' and 1e-4<apart<.1 and np.array_equal(again(x.numpy())[0], bf16(x.numpy())[0])
    assert bf16.card['drop']['metric']=='accuracy' and 'int8' not in bf16.card

def test_bf16_without_the_processor(learn, tmp_path, monkeypatch):
    pytest.importorskip('openvino')
    monkeypatch.setattr(P, 'openvino_capabilities', lambda: ['FP32','INT8'])
    with pytest.raises(DeployError, match='no bfloat16 .OpenVINO finds FP32, INT8'): deploy(learn, tmp_path/'m', 'openvino', precision='bf16')
    assert left(tmp_path)==[]

def test_bf16_moved_to_another_processor(bf16, monkeypatch):
    monkeypatch.setattr(E, 'openvino_capabilities', lambda: ['FP32'])
    with pytest.warns(UserWarning, match='runs in float32'): Deployed(bf16.path)

@pytest.mark.parametrize('kw,words', {
    'int4': (dict(precision='int4'), "one of f32, bf16, int8, got 'int4'"), 'bits': (dict(precision=8), 'got 8'), 'none': (dict(precision=None), 'got None'),
    'bf16 in onnx': (dict(backend='onnx', precision='bf16'), 'Backends that have it: openvino'), 'int8 in eager': (dict(backend='eager', precision='int8'), 'Backends that have it: onnx, openvino'),
    'int8 in torch': (dict(backend='torch', precision='int8'), 'it has f32'),
    'negative': (dict(precision='int8', max_drop=-1), '`max_drop`'), 'nan': (dict(precision='int8', max_drop=float('nan')), '`max_drop`'), 'text': (dict(precision='int8', max_drop='1'), '`max_drop`'),
    'no items': (dict(precision='int8', n_calib=0), '`n_calib`'), 'half an item': (dict(precision='int8', n_calib=.5), '`n_calib`'), 'true': (dict(precision='int8', n_calib=True), '`n_calib`'),
}.values())
def test_what_cannot_be_meant(learn, tmp_path, kw, words):
    with pytest.raises(DeployError, match=words): learn.deploy(tmp_path/'m', **kw)
    assert left(tmp_path)==[]

def fragile():
    "A network that int8 cannot hold: one class is decided by what is below a step"
    m = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3,4,bias=False), nn.Linear(4,2,bias=False))
    with torch.no_grad():
        m[2].weight.copy_(torch.tensor([[1.,0,0],[0,1,0],[0,0,1],[0,0,0]]))
        m[3].weight.copy_(torch.tensor([[0.,1,0,0],[0,0,1,0]]))
    return m

def close_calls(n, seed):
    "A large first channel; the other two decide, and are near each other and near zero"
    g = torch.Generator().manual_seed(seed)
    x = torch.zeros(n,3,4,4)
    x[:,0] = torch.where(torch.arange(n)%2==0, 1000., -1000.).view(n,1,1)
    y = torch.randint(0, 2, (n,), generator=g)
    x[:,1] = (.5-y.float()).view(n,1,1)
    x[:,2] = -x[:,1]
    return Sets(zip(x, y))

def test_refused_if_the_metric_falls(tmp_path, metric=error_rate):
    learn = Learner(dls_of(close_calls(64,0), close_calls(64,1)), fragile(), loss_func=CrossEntropyLossFlat(), metrics=metric)
    with learn.no_bar():
        deploy(learn, tmp_path/'m', 'eager')
        before = (tmp_path/'m'/'card.json').read_text()
        with pytest.raises(DeployError, match=rf'{metric.__name__} goes from .* points worse .allowed by `max_drop`: 1'): deploy(learn, tmp_path/'m', 'onnx', precision='int8')
        assert left(tmp_path)==['m'] and (tmp_path/'m'/'card.json').read_text()==before # the earlier one stands
        m = deploy(learn, tmp_path/'n', 'onnx', precision='int8', max_drop=100)
    assert m.card['drop']['points']>10 and m.card['parity']['n_changed']>6

def test_no_metric_and_no_labels(learn, tmp_path):
    small = nn.Sequential(nn.Flatten(), nn.Linear(192,10))
    for i,kw in enumerate((dict(metrics=[], model=small), dict(dls=dls_of(blobs(200, 0), Sets((x,) for x,_ in blobs(40, 1))), model=small))):
        with pytest.warns(UserWarning, match='was not judged'): m = with_(learn, **kw).deploy(tmp_path/str(i), 'onnx', precision='int8')
        assert 'drop' not in m.card and 'not judged' in m.card['notes'][0] and m.card['parity']['n_items'] in (40,100)

def test_no_validation_data(learn, tmp_path):
    learn = with_(learn, model=nn.Sequential(nn.Flatten(), nn.Linear(192,10)))
    with pytest.raises(NoDataError): with_(learn, dls=dls_of(blobs(40, 0))).deploy(tmp_path/'m', 'onnx', precision='int8')
    m = deploy(with_(learn, dls=dls_of(blobs(200, 0))), tmp_path/'m', 'onnx', precision='int8', max_drop=50, dl=dls_of(blobs(60, 2))[0])
    assert m.card['parity']['n_items']==60 and 'drop' in m.card

def test_a_metric_where_lower_is_better(tmp_path):
    set_seed(0)
    points = [(torch.randn(4), torch.randn(1)) for _ in range(80)]
    learn = Learner(dls_of(Sets(points), Sets(points[:40])), nn.Sequential(nn.Linear(4,16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16,1)), loss_func=MSELossFlat(), metrics=mse)
    randomize_bn(learn.model)
    m = deploy(learn, tmp_path/'m', 'onnx', precision='int8', max_drop=50)
    assert m.card['drop']['metric']=='mse' and m.card['drop']['points']==pytest.approx(100*(m.card['drop']['after']/m.card['drop']['before']-1))

def zeros(n): return Sets((torch.zeros(3,8,8), torch.tensor(i%10)) for i in range(n))

@pytest.mark.parametrize('train,error,words', [(Sets(), NoDataError, 'no training data'), (zeros(40), DeployError, 'zero throughout')])
def test_calibration_data_without_a_range(learn, tmp_path, train, error, words):
    small = nn.Sequential(nn.Flatten(), nn.Linear(192,10))
    with pytest.raises(error, match=words): deploy(with_(learn, model=small, dls=DataLoaders(*[torch.utils.data.DataLoader(ds, 8) for ds in (train, blobs(40,1))])), tmp_path/'m', 'onnx', precision='int8')
    assert left(tmp_path)==[]

@pytest.mark.parametrize('missing,precision,backend', [('onnxruntime','int8','onnx'), ('onnxruntime','int8','openvino'), ('openvino','bf16','openvino')])
def test_missing_engine(learn, tmp_path, monkeypatch, missing, precision, backend):
    real = builtins.__import__
    def without(name, *args, **kw):
        if name.split('.')[0]==missing: raise ImportError(f"No module named '{missing}'")
        return real(name, *args, **kw)
    monkeypatch.setattr(builtins, '__import__', without)
    with pytest.raises(DeployError, match='pip install'): deploy(learn, tmp_path/'m', backend, precision=precision)
    assert left(tmp_path)==[]

def test_nothing_to_quantize(learn, tmp_path):
    class Sum(nn.Module):
        def forward(self, x): return torch.stack([x.cumsum(1)[:,-1,0,i].sin() for i in range(8)], 1)
    with pytest.raises(DeployError, match='No convolution and no matrix product'): deploy(with_(learn, model=Sum()), tmp_path/'m', 'onnx', precision='int8')
    assert left(tmp_path)==[]

def test_interrupted(learn, tmp_path, monkeypatch):
    def stop(*args, **kw): raise KeyboardInterrupt
    monkeypatch.setattr(P, 'integer_ops', stop)
    learn = with_(learn, model=nn.Sequential(nn.Flatten(), nn.Linear(192,10)))
    before = snapshot(learn.model)
    with pytest.raises(KeyboardInterrupt): deploy(learn, tmp_path/'m', 'onnx', precision='int8')
    assert left(tmp_path)==[] and unchanged(learn.model, before)

def test_folded_learner(learn, tmp_path):
    other = with_(learn, model=randomize_bn(Net()).eval(), metrics=[])
    other.fold_bn(validate=False, latency=0)
    m = deploy(other, tmp_path/'m', 'onnx', precision='int8')
    assert m.card['fold']['n_folded']==3 and m.card['int8']['on_integers']['Conv']==3

def test_float_cards_are_as_before(learn, tmp_path):
    m = deploy(learn, tmp_path/'m', 'eager')
    assert m.precision=='f32' and not {'precision','drop','int8','metrics_f32'} & set(m.card) and ', f32' not in repr(m)

@pytest.mark.parametrize('name,before,after,points', [('accuracy',.9,.88,2), ('error_rate',.1,.12,2), ('valid_loss',2.,2.1,5), ('mse',.01,.02,100), ('_rmse',1.,.9,-10), ('bleu',40.,38.,5), ('r2_score',-.5,-.6,10), ('dice',0.,0.,0), ('mae',0.,0.,0), ('mae',0.,1.,np.inf), ('perplexity',20.,22.,10), ('hamming_loss',.1,.11,1)])
def test_points(name, before, after, points): assert points_worse(name, before, after)==pytest.approx(points)

@pytest.mark.parametrize('name,lower', [('accuracy',0),('error_rate',1),('valid_loss',1),('mse',1),('_exp_rmspe',1),('brier_score',1),('roc_auc_score',0),('dice',0),('perplexity',1),('mean_absolute_error',1),('r2_score',0),('foreground_acc',0)])
def test_direction(name, lower): assert is_lower_better(name)==bool(lower)
