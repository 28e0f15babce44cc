"The card says what a user needs to judge a deployed model; `deploy(dl=...)` for Learners that have no data"
import copy, json
import pytest, torch
from torch import nn
from torch.utils.data import DataLoader as TorchLoader, TensorDataset
from fastai.vision.all import (AccumMetric, DataLoaders, F1Score, Learner, Perplexity, Resize, accuracy, get_image_files, load_learner,
                               resnet18, vision_learner)
from fastai_bnfold.all import *
from fastai_bnfold.deploy.parity import Scores
from conftest import snapshot, unchanged
from odd_images import class_folder, image_learner, imagenet, said

@pytest.fixture(scope='module')
def folder(tmp_path_factory): return class_folder(tmp_path_factory.mktemp('images'))

@pytest.fixture
def learn(folder): return image_learner(folder, Resize(32), [imagenet])

def deployed(learn, path, **kw):
    with learn.no_bar(), learn.no_logging(): return learn.deploy(path, 'eager', **kw)

def card(learn, path, **kw):
    deployed(learn, path, **kw)
    return json.loads((path/'card.json').read_text())

def test_what_was_trained(learn, tmp_path):
    facts = card(learn, tmp_path/'m')['learner']
    n_params = sum(p.numel() for p in learn.model.parameters())
    assert facts==dict(model='Sequential', arch=None, n_params=n_params, loss='CrossEntropyLossFlat', classes=['a','b'], n_train=8, n_valid=8)

def test_the_architecture_of_a_vision_learner(learn, tmp_path):
    assert card(vision_learner(learn.dls, resnet18, pretrained=False), tmp_path/'m')['learner']['arch']=='resnet18'

def test_metrics_are_those_of_the_learner(learn, tmp_path):
    learn.metrics = [accuracy, Perplexity(), F1Score(average='macro')]
    learn = Learner(learn.dls, learn.model, metrics=[accuracy, Perplexity(), F1Score(average='macro')])
    with learn.no_bar(), learn.no_logging(): want = learn.validate()
    found = card(learn, tmp_path/'m')['metrics']
    assert list(found)==['valid_loss','accuracy','perplexity','f1_score']
    assert list(found.values())==pytest.approx(list(want), abs=1e-5)

def test_metrics_are_those_of_the_engine(learn, tmp_path, monkeypatch):
    "Not of the Learner's model: an engine that says the opposite has the opposite accuracy"
    from fastai_bnfold.deploy.engines import backends
    load = backends['eager'].load
    def opposite(file, threads):
        run = load(file, threads)
        return lambda inputs: [-out for out in run(inputs)]
    with learn.no_bar(), learn.no_logging(): want = learn.validate()[1]
    monkeypatch.setattr(backends['eager'], 'load', opposite)
    found = card(learn, tmp_path/'m', tol=10, max_changed=8)
    assert found['metrics']['accuracy']==pytest.approx(1-want) and found['parity']['n_changed']==8

def broken(pred, y): raise ValueError('no such class')
def test_a_metric_that_fails_is_said(learn, tmp_path):
    learn = Learner(learn.dls, learn.model, metrics=[broken, accuracy])
    found = card(learn, tmp_path/'m')
    assert found['metrics_failed']==dict(broken='ValueError: no such class') and 'accuracy' in found['metrics']

def test_two_metrics_of_one_name(learn):
    scores = Scores(Learner(learn.dls, learn.model, metrics=[accuracy, accuracy]))
    x,y = learn.dls.valid.one_batch()
    scores.add(torch.eye(2)[y], (y,))
    assert scores.values()['accuracy']==scores.values()['accuracy 2']==1.

def test_the_learners_own_metrics_and_model_are_untouched(learn, tmp_path):
    before,states = snapshot(learn.model),[copy.deepcopy(vars(metric)) for metric in learn.metrics]
    deployed(learn, tmp_path/'m')
    assert unchanged(learn.model, before) and [vars(metric) for metric in learn.metrics]==states

def test_a_folded_learner_has_its_own_report(learn, tmp_path):
    want = card(learn, tmp_path/'before')
    report = learn.fold_bn(latency=0, validate=False)
    found = card(learn, tmp_path/'after')
    assert (found['fold']['n_bn'],found['fold']['n_folded'])==(1,1)==(report.n_bn,report.n_folded)
    assert found['fold']['max_err']==report.max_err and found['learner']==want['learner']

def test_kept_batch_norms_have_their_reasons(learn, tmp_path):
    learn.model.append(nn.Softplus()).append(nn.BatchNorm1d(2))
    learn.model.append(nn.Softplus()).eval()
    kept = card(learn, tmp_path/'m')['fold']['kept']
    assert list(kept)==['7'] and kept['7']

def loaded(learn, tmp_path):
    learn.export(tmp_path/'learner.pkl')
    return load_learner(tmp_path/'learner.pkl')

@pytest.mark.parametrize('labelled', [False,True])
def test_a_loaded_learner(learn, folder, tmp_path, labelled):
    "Without labels there are no metrics, but parity; images go in"
    other,files = loaded(learn, tmp_path),get_image_files(folder/'val')
    m = deployed(other, tmp_path/'m', dl=other.dls.test_dl(files, with_labels=labelled))
    assert m.card['parity']['n_items']==8 and m.card['notes']==[]
    assert ('accuracy' in m.card['metrics'])==labelled
    assert m.predict(files[0]).label==said(learn, files[0])[0]

def test_a_loaded_folded_learner_says_so(learn, folder, tmp_path):
    learn.fold_bn(latency=0, validate=False)
    other = loaded(learn, tmp_path)
    m = deployed(other, tmp_path/'m', dl=other.dls.test_dl(get_image_files(folder/'val')))
    assert 'folded before it was loaded' in m.card['fold']['notes'][-1]

def test_without_data(learn, tmp_path):
    with pytest.raises(NoDataError, match=r'dl=learn.dls.test_dl\(items\)'): loaded(learn, tmp_path).deploy(tmp_path/'m')
    assert not (tmp_path/'m').exists()

@pytest.mark.parametrize('dl', [[1,2], 'val', torch.zeros(2,3,32,32)], ids=['list','str','tensor'])
def test_what_is_no_loader(learn, tmp_path, dl):
    with pytest.raises(NoDataError, match='should be a `DataLoader`'): learn.deploy(tmp_path/'m', dl=dl)

def test_a_loader_that_shuffles_and_drops(learn, tmp_path):
    "The training set: in order, all of it, as the validation set would see it"
    m = deployed(learn, tmp_path/'m', dl=learn.dls.train.new(bs=3, drop_last=True))
    assert m.card['parity']['n_items']==8 and m.card['input']['kind']=='image'

def test_pytorchs_own_loader(tmp_path):
    loader = TorchLoader(TensorDataset(torch.randn(10,4), torch.randint(0,2,(10,))), 4)
    learn = Learner(DataLoaders(loader, loader), nn.Sequential(nn.Linear(4,8), nn.BatchNorm1d(8), nn.Linear(8,2)), loss_func=nn.CrossEntropyLoss(), metrics=accuracy)
    with pytest.warns(UserWarning, match="PyTorch's `DataLoader`"): found = card(learn, tmp_path/'m', dl=TorchLoader(loader.dataset, 5))
    assert found['parity']['n_items']==10 and 'accuracy' in found['metrics']

def test_changed_predictions_count_for_plain_losses(tmp_path, monkeypatch):
    "fastai decodes nothing there, but a class is a class"
    from fastai_bnfold.deploy.engines import backends
    load = backends['eager'].load
    monkeypatch.setattr(backends['eager'], 'load', lambda file, threads: lambda inputs: [-out for out in load(file, threads)(inputs)])
    loader = TorchLoader(TensorDataset(torch.randn(10,4), torch.randint(0,2,(10,))), 4)
    learn = Learner(DataLoaders(loader, loader), nn.Sequential(nn.Linear(4,8), nn.BatchNorm1d(8), nn.Linear(8,2)), loss_func=nn.CrossEntropyLoss())
    with pytest.raises(DeployError, match='10 of 10 predictions'): deployed(learn, tmp_path/'m')
