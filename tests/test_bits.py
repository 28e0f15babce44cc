"`learn.deploy(bits=…)`: the integer network in an engine, every integer compared; refused with words, and nothing half written"
import json, numpy as np, pytest, torch
from fastai.vision.all import CrossEntropyLossFlat, DataLoaders, Learner, accuracy, set_seed
from torch import nn
from fastai_bnfold.all import *
from fastai_bnfold.deploy import bits as bits_module
from test_precision import Net, blobs, deploy, dls_of, left, with_
from conftest import snapshot, unchanged

pytest.importorskip('onnxruntime'); pytest.importorskip('onnx')

@pytest.fixture(scope='module')
def learn():
    set_seed(0)
    learn = Learner(dls_of(blobs(200, 0), blobs(100, 1)), Net(), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(6, 2e-2)
    return learn

@pytest.fixture(scope='module')
def aware(learn):
    other = with_(learn, model=Net())
    other.model.load_state_dict(learn.model.state_dict())
    with other.no_bar(), other.no_logging(): other.fit_one_cycle(2, 2e-3, cbs=QuantAware(4))
    return other

@pytest.mark.parametrize('backend', ('onnx','openvino'))
@pytest.mark.parametrize('bits', (4,8))
def test_the_engine_computes_the_integer_network(learn, tmp_path, backend, bits):
    pytest.importorskip(dict(onnx='onnxruntime').get(backend, backend))
    before = snapshot(learn.model)
    m = deploy(learn, tmp_path/'m', backend, bits=bits, max_drop=100)
    x = torch.randn(7, 3, 8, 8)*2
    want = learn.integer_net(bits, n=256)(x).numpy()
    assert abs(m(x.numpy())[0]-want).max()<1e-5*abs(want).max()
    assert unchanged(learn.model, before)

def test_the_card_has_the_layers(learn, tmp_path):
    card = json.loads((deploy(learn, tmp_path/'m', bits=4, max_drop=100).path/'card.json').read_text())
    found = card['integers']
    assert (card['precision'],found['bits']['outputs'],found['real'])==('int8',4,{})
    assert [layer['kind'] for layer in found['layers']]==['sums','sums','sums','average','logits'] and found['n_values_equal']>=6
    assert card['fold']['n_bn']==card['fold']['n_folded']==3 and card['drop']['metric']=='accuracy'

def test_a_learner_with_quantizers_deploys_what_it_was_trained_for(aware, tmp_path):
    m = deploy(aware, tmp_path/'m')
    x = torch.stack([x for x,_ in aware.dls.valid.dataset])
    with torch.no_grad(): want = aware.model.eval()(x)
    assert m.card['integers']['bits']['outputs']==4 and m.card['parity']['n_changed']==0
    assert (m(x.numpy())[0].argmax(1)==want.argmax(1).numpy()).all() and 'on integers' in repr(m)

def test_too_few_bits_are_refused(learn, tmp_path):
    with pytest.raises(DeployError, match='points worse'): deploy(learn, tmp_path/'m', bits=2)
    assert left(tmp_path)==[]

@pytest.mark.parametrize('kwargs, words', ((dict(bits=4, precision='int8'),'give one of them'), (dict(bits=4, backend='torch'),"no precision 'int8'"),
    (dict(bits=12),'2 to 8'), (dict(bits=4, backend='tensorrt'),'Unknown backend')))
def test_mistakes(learn, tmp_path, kwargs, words):
    with pytest.raises(FoldError, match=words): deploy(learn, tmp_path/'m', **kwargs)
    assert left(tmp_path)==[]

@pytest.mark.parametrize('kwargs, words', ((dict(bits=2),'was trained with 4'), (dict(precision='int8'),'remove_quant')))
def test_other_than_trained(aware, tmp_path, kwargs, words):
    with pytest.raises(DeployError, match=words): deploy(aware, tmp_path/'m', **kwargs)

def test_an_engine_that_rounds_otherwise_is_found(learn, tmp_path, monkeypatch):
    "One integer of one value, by one"
    load = bits_module.load_for_arrays
    def wrong(*args):
        run = load(*args)
        def changed(*arrays):
            outs = run(*arrays)
            return [*outs[:-1], outs[-1]+(np.arange(outs[-1].size)==0).reshape(outs[-1].shape)]
        return changed
    monkeypatch.setattr(bits_module, 'load_for_arrays', wrong)
    with pytest.raises(DeployError, match='other integers than the network .1 of'): deploy(learn, tmp_path/'m', bits=4, max_drop=100)
    assert left(tmp_path)==[]

def test_calibration_with_nothing(learn, tmp_path):
    zeros = [(torch.zeros(3,8,8), torch.tensor(0))]*40
    blank = with_(learn, dls=DataLoaders.from_dsets(zeros, blobs(20, 1), bs=20, shuffle=False, num_workers=0))
    with pytest.raises(FoldError, match='nothing but zeros'): deploy(blank, tmp_path/'m', bits=4)
    assert left(tmp_path)==[]
