"""What a fastai user does with a Learner that is folded or deployed: one function a workflow, which checks what came of it.

    python benchmarks/workflows.py NAME

A function that returns nothing went as it should; a text is what the user is told where it has to be refused. The outcome is printed
as JSON: 'right', 'refused', 'wrong' (with what), or 'raw error' (with the traceback). `reliability.py` runs all of them.
"""
import io, json, os, subprocess, sys, tempfile, traceback, warnings
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import lru_cache
from fastai.vision.all import *
from fastai.tabular.all import *
from fastai.text.all import AWD_LSTM, TextDataLoaders, awd_lstm_clas_config, text_classifier_learner
from fastai.collab import CollabDataLoaders, collab_learner
from fastai.callback.all import *
from fastcore.script import call_parse
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader as TorchLoader, TensorDataset
from fastai_bnfold.all import *
from fastai_bnfold.deploy.serve import Deployed
from fastai_bnfold.fold.testing import randomize_bn
from fastai_bnfold.learner.fold import is_folded

workflows = {}
def workflow(f):
    "Register a workflow; its docstring says what the user does"
    workflows[f.__name__] = f
    return f

# Data and Learners

where = None # a folder, while a workflow runs

@lru_cache
def digits():
    images,labels = load_digits(return_X_y=True)
    return torch.tensor(images/16).float().view(-1,1,8,8)[:360],torch.tensor(labels)[:360]
def image(i): return digits()[0][i]
def label(i): return digits()[1][i]

def digit_dls(get_y=label, **kwargs):
    splits = [list(range(300)), list(range(300,360))]
    return Datasets(range(360), [[image],[get_y]], splits=splits).dataloaders(bs=30, device='cpu', **(dict(num_workers=0) | kwargs))

def net(n_out=10, n_in=1, bias=False):
    return nn.Sequential(
        nn.Conv2d(n_in, 16, 3, bias=bias), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, n_out))

def learner(model=None, get_y=label, loss=None, metrics=accuracy, data=None, **kwargs):
    set_seed(0)
    model = net() if model is None else model
    learn = Learner(digit_dls(get_y) if data is None else data, randomize_bn(model), loss_func=loss or CrossEntropyLossFlat(), metrics=metrics, path=where, **kwargs)
    return quiet(learn)

def quiet(learn):
    learn.remove_cbs(learn.cbs.filter(lambda cb: isinstance(cb, ProgressCallback)))
    learn.logger,learn.create_mbar = noop,False
    return learn

@lru_cache
def photos():
    "A folder of 24 images, in two classes"
    rng = np.random.default_rng(0)
    for i in range(24):
        file = where/'photos'/('train' if i<12 else 'valid')/'ab'[i%2]/f'{i}.png'
        file.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (9,12,3), dtype=np.uint8))
        small.resize((120,90), Image.BICUBIC).save(file)
    return where/'photos'
def files(): return get_image_files(photos()/'valid')

def photo_learner(size=64, batch_tfms=None, arch=None, **kwargs):
    set_seed(0)
    batch_tfms = [Normalize.from_stats(*imagenet_stats)] if batch_tfms is None else batch_tfms
    dls = ImageDataLoaders.from_folder(photos(), item_tfms=Resize(size), batch_tfms=batch_tfms, bs=6, num_workers=0)
    if arch: learn = vision_learner(dls, arch, pretrained=False, metrics=accuracy, **kwargs)
    else: learn = Learner(dls, net(2, 3), metrics=accuracy, **kwargs)
    randomize_bn(learn.model)
    learn.path = where
    return quiet(learn)

def block_learner(blocks, get_y, n_out, loss=None, last=None, size=32, **kwargs):
    set_seed(0)
    block = DataBlock(blocks, get_items=get_image_files, get_y=get_y, splitter=GrandparentSplitter(), item_tfms=Resize(size))
    model = randomize_bn(net(n_out, 3))
    if last: model.append(last)
    return quiet(Learner(block.dataloaders(photos(), bs=6, num_workers=0), model, loss_func=loss, path=where, **kwargs))

def torch_learner(n_inputs=1, n=24):
    xs = [torch.randn(n,3,16,16) for _ in range(n_inputs)]
    loader = TorchLoader(TensorDataset(*xs, torch.randint(0, 2, (n,))), 6)
    return quiet(Learner(DataLoaders(loader, loader), randomize_bn(Siamese() if n_inputs>1 else net(2, 3)), loss_func=nn.CrossEntropyLoss(), metrics=accuracy, path=where))

class Siamese(nn.Module):
    "The same network twice, as in fastai's tutorial"
    def __init__(self): super().__init__(); self.body,self.head = net(8, 3),nn.Linear(16, 2)
    def forward(self, a, b): return self.head(torch.cat([self.body(a), self.body(b)], 1))

def table():
    rng = np.random.default_rng(0)
    df = pd.DataFrame(dict(shop=rng.integers(0,5,120), colour=rng.choice(['red','blue'], 120), size=rng.normal(3,2,120)))
    df.loc[::9,'size'] = np.nan
    return df.assign(sold=np.where(df.shop%2==0, 'yes', 'no'))
def table_learner():
    set_seed(0)
    dls = TabularDataLoaders.from_df(table(), procs=[Categorify,FillMissing,Normalize], cat_names=['shop','colour'], cont_names=['size'],
                                     y_names='sold', y_block=CategoryBlock(), bs=20, valid_idx=list(range(40)))
    learn = tabular_learner(dls, layers=[16], metrics=accuracy, path=where)
    randomize_bn(learn.model)
    return quiet(learn)

# What is looked at

def predictions(learn, **kwargs):
    with learn.no_bar(): return learn.get_preds(**kwargs)[0]
def close(a, b, tol=1e-5): return a.shape==b.shape and torch.allclose(a, b, atol=tol)
def fold(learn, **kwargs): return learn.fold_bn(**(dict(latency=0) | kwargs))
def bits(learn): return {name: x.clone() for name,x in learn.model.state_dict().items()}
def same_bits(learn, before):
    now = learn.model.state_dict()
    return list(now)==list(before) and all(torch.equal(x.nan_to_num(), before[name].nan_to_num()) for name,x in now.items())

def keeps_its_predictions(learn, **kwargs):
    "Fold, and compare"
    want,before = predictions(learn),bits(learn)
    report = fold(learn, **kwargs)
    assert report.n_folded and not report.n_changed, report
    assert close(predictions(learn), want), 'other predictions'
    learn.unfold_bn()
    assert same_bits(learn, before), 'another model after unfold_bn'
    return report

def refused(f, *args, error=FoldError, **kwargs):
    "The sentence of the error that has to come"
    try: f(*args, **kwargs)
    except error as e: return str(e)
    raise AssertionError('nothing was refused')

def deploy(learn, backend='onnx', **kwargs):
    with warnings.catch_warnings():
        if kwargs.pop('quiet', False): warnings.simplefilter('ignore')
        return learn.deploy(where/'deployed', backend, **kwargs)
def agrees(learn, m, items, label=True):
    "Label and probabilities of every item are those of `learn.predict`"
    for item,got in zip(items, m.predict(items)):
        want = learn.predict(item)
        assert np.allclose(np.asarray(want[2]), got.probs, atol=1e-5), (item, want[2], got.probs)
        if label: assert str(want[0])==str(got.label), (item, want[0], got.label)

def fold_cb(**kwargs): return FoldBN(**(dict(latency=0, show=False) | kwargs))
class Stops(Callback):
    "Ctrl-C in the third batch of a training"
    def after_batch(self):
        if self.training and self.iter==2: raise KeyboardInterrupt

# The callback

@workflow
def callback_once():
    "fit(1, cbs=FoldBN())"
    learn = learner()
    learn.fit(1, cbs=fold_cb())
    assert is_folded(learn)

@workflow
def callback_carried():
    "a Learner with FoldBN in its cbs, two fits: the weights are those of training without it"
    plain,learn = learner(),learner(cbs=fold_cb())
    for o in (plain,learn):
        o.dls.train.rng.seed(0)
        set_seed(1)
        for _ in range(2): o.fit_one_cycle(1, 1e-2)
    assert is_folded(learn)
    learn.unfold_bn()
    assert same_bits(learn, bits(plain)), 'other weights'

@workflow
def callback_fine_tune():
    "vision_learner(...).fine_tune(1, cbs=FoldBN())"
    learn = photo_learner(arch=resnet18)
    cb = fold_cb()
    learn.fine_tune(1, cbs=cb)
    assert is_folded(learn) and cb.report.n_folded==cb.report.n_bn

@workflow
def callback_interrupted():
    "Ctrl-C in a fit with FoldBN, then validate, get_preds and another fit"
    learn = learner(cbs=fold_cb())
    try: learn.fit(1, cbs=Stops())
    except KeyboardInterrupt: pass
    learn.validate()
    predictions(learn)
    assert not is_folded(learn)
    learn.fit(1)
    assert is_folded(learn)

@workflow
def callback_diverged():
    "a training that diverges: a warning with the reason, report=None, the Learner as it was trained"
    learn,cb = learner(),fold_cb()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        learn.fit(1, 1e30, cbs=[TerminateOnNaNCallback(), cb])
    assert cb.report is None and not is_folded(learn)
    return next(str(o.message).splitlines()[0] for o in said if 'FoldBN' in str(o.message))

@workflow
def callback_typo():
    "FoldBN(latencies=0)"
    return refused(FoldBN, latencies=0, error=TypeError)

@workflow
def callback_lr_find():
    "fit, lr_find, fit with FoldBN in the cbs: the search leaves the fold as it was"
    learn = learner(cbs=fold_cb())
    learn.fit(1)
    before = bits(learn)
    learn.lr_find(num_it=10, show_plot=False)
    assert is_folded(learn) and same_bits(learn, before)
    learn.fit(1)
    assert is_folded(learn)

@workflow
def callback_best_model():
    "SaveModelCallback, EarlyStoppingCallback and FoldBN together; then a validation"
    learn = learner(cbs=[SaveModelCallback(), EarlyStoppingCallback(patience=2), fold_cb()])
    learn.fit(2, 1e-2)
    saved = (where/'models'/'model.pth').read_bytes()
    learn.validate()
    assert is_folded(learn) and (where/'models'/'model.pth').read_bytes()==saved
    learn.unfold_bn().load('model')

@workflow
def callback_logger():
    "CSVLogger and FoldBN: one line an epoch"
    learn = learner(cbs=[CSVLogger(fname=where/'log.csv'), fold_cb()])
    learn.fit(2)
    assert len(pd.read_csv(where/'log.csv'))==2

@workflow
def callback_mixup():
    "MixUp, gradient accumulation and FoldBN"
    learn = learner(cbs=[MixUp(), GradientAccumulation(60), fold_cb()])
    learn.fit(1)
    assert is_folded(learn) and not learn.bn_folding.report.n_changed

@workflow
def callback_bf16():
    "to_bf16() and FoldBN"
    learn = learner(cbs=fold_cb()).to_bf16()
    learn.fit(1)
    assert is_folded(learn)

# Fold and unfold

@workflow
def fold_and_unfold():
    "fold_bn, predictions, unfold_bn"
    report = keeps_its_predictions(learner())
    assert report.metrics_before.keys()=={'valid_loss','accuracy'}

@workflow
def fold_between_fits():
    "fit, fold_bn, unfold_bn, fit: the weights are those without the fold"
    plain,learn = learner(),learner()
    for o in (plain,learn):
        o.dls.train.rng.seed(0)
        set_seed(1)
        o.fit(1)
        if o is learn:
            fold(o)
            o.unfold_bn()
        o.fit(1)
    assert same_bits(learn, bits(plain))

@workflow
def fold_twice():
    "fold_bn, fold_bn"
    learn = learner()
    fold(learn)
    return refused(learn.fold_bn)

@workflow
def train_folded():
    "fold_bn, fit"
    learn = learner()
    fold(learn)
    before = bits(learn)
    said = refused(learn.fit_one_cycle, 1)
    assert same_bits(learn, before)
    return said

@workflow
def unfold_unfolded():
    "unfold_bn of a Learner that is not folded"
    return refused(learner().unfold_bn)

@workflow
def fold_a_batch():
    "fold_bn(learn.dls.one_batch())"
    learn = learner()
    keeps_its_predictions(learn, xb=learn.dls.one_batch())

@workflow
def fold_wrong_batch():
    "fold_bn with a batch of the wrong shape"
    learn = learner()
    before = bits(learn)
    said = refused(learn.fold_bn, torch.zeros(2,7))
    assert same_bits(learn, before) and not is_folded(learn)
    return said

@workflow
def fold_interrupted():
    "Ctrl-C while the fold validates"
    learn,seen = learner(),[]
    class Slow(nn.Module):
        def forward(self, x):
            seen.append(1)
            if len(seen)>stop: raise KeyboardInterrupt
            return x
    stop = 10**9
    learn.model.append(Slow())
    fold(learn, validate=False)
    learn.unfold_bn()
    before,stop = bits(learn),len(seen)*2+1
    try: fold(learn)
    except KeyboardInterrupt: stop = 10**9
    else: raise AssertionError('nothing was interrupted')
    assert same_bits(learn, before) and not is_folded(learn)
    keeps_its_predictions(learn)

@workflow
def fold_without_validation_set():
    "a Learner without a validation set"
    learn = learner()
    learn.dls = DataLoaders(learn.dls.train)
    report = fold(learn)
    assert report.n_folded==2 and any('validation set' in note for note in report.notes)

@workflow
def fold_with_workers():
    "DataLoaders with two worker processes"
    keeps_its_predictions(learner(data=digit_dls(num_workers=2)))

@workflow
def fold_pytorch_loaders():
    "PyTorch's DataLoaders and nn.CrossEntropyLoss"
    assert fold(torch_learner()).n_changed==0

@workflow
def fold_siamese():
    "two inputs, one body called twice"
    report = fold(torch_learner(2))
    assert report.n_folded==2 and report.n_changed==0

@workflow
def fold_regression():
    "a regression: no classes to compare"
    learn = learner(net(1), get_y=lambda i: float(i)/360, loss=MSELossFlat(), metrics=rmse)
    report = keeps_its_predictions(learn)
    assert report.n_changed is None and 'no classes to compare' in str(report)

@workflow
def fold_plain_function():
    "loss_func=F.cross_entropy, two metrics of one name"
    report = fold(learner(loss=F.cross_entropy, metrics=[accuracy, accuracy]))
    assert report.n_changed==0 and list(report.metrics_before)==['valid_loss','accuracy','accuracy 2']

@workflow
def fold_in_half_precision():
    "learn.model.bfloat16()"
    learn = learner(data=digit_dls(after_batch=[lambda x: x]))
    learn.model.bfloat16()
    report = fold(learn, xb=torch.rand(2,1,8,8).bfloat16(), validate=False)
    assert report.n_folded==2

@workflow
def fold_channels_last():
    "a model in channels_last"
    learn = learner()
    learn.model.to(memory_format=torch.channels_last)
    keeps_its_predictions(learn)
    assert learn.model[3].weight.is_contiguous(memory_format=torch.channels_last)

@workflow
def tta_and_interpretation():
    "tta and ClassificationInterpretation of a folded Learner"
    learn = photo_learner(batch_tfms=aug_transforms())
    set_seed(0)
    want,matrix = learn.tta(n=2)[0],ClassificationInterpretation.from_learner(learn).confusion_matrix()
    fold(learn)
    set_seed(0)
    assert close(learn.tta(n=2)[0], want)
    assert (ClassificationInterpretation.from_learner(learn).confusion_matrix()==matrix).all()

@workflow
def predict_a_file():
    "learn.predict(file) before and after"
    learn = photo_learner()
    want = [learn.predict(file)[2] for file in files()[:3]]
    fold(learn)
    assert all(close(learn.predict(file)[2], o) for file,o in zip(files(), want))

@workflow
def freeze_while_folded():
    "fold_bn, freeze_to, unfold_bn, fit"
    learn = photo_learner(arch=resnet18)
    fold(learn)
    learn.freeze()
    learn.unfold_bn()
    assert not learn.model[0][0].weight.requires_grad
    learn.fit(1)

@workflow
def statistics_then_fold():
    "reestimate_bn, then fold_bn"
    learn = learner()
    learn.reestimate_bn()
    keeps_its_predictions(learn)

for arch in (resnet18, resnet50, densenet121, squeezenet1_1, vgg11_bn, xresnet18):
    def of_arch(arch=arch):
        report = keeps_its_predictions(photo_learner(arch=arch)) if arch is not squeezenet1_1 else fold(photo_learner(arch=arch))
        assert not report.n_changed
    of_arch.__name__,of_arch.__doc__ = f'vision_learner_{arch.__name__}',f'vision_learner(dls, {arch.__name__}).fold_bn()'
    workflow(of_arch)

# Files

@workflow
def load_trained_into_folded():
    "save, fold_bn, load: refused; after unfold_bn it loads"
    learn = learner()
    learn.create_opt()
    learn.save('trained')
    fold(learn)
    before = bits(learn)
    said = refused(learn.load, 'trained')
    assert same_bits(learn, before)
    learn.unfold_bn().load('trained')
    return said

@workflow
def load_folded_into_trained():
    "fold_bn, save, a new Learner, load: refused"
    learn = learner()
    fold(learn)
    learn.save('folded')
    other = learner()
    before = bits(other)
    said = refused(other.load, 'folded')
    assert same_bits(other, before)
    return said

@workflow
def load_folded_into_folded():
    "fold two Learners in the same way, and load the file of one into the other"
    learn,other = learner(),learner()
    randomize_bn(other.model)
    for o in (learn,other): fold(o)
    learn.save('folded')
    other.load('folded')
    assert close(predictions(other), predictions(learn), 1e-7)

@workflow
def copies():
    "deepcopy(learn) of a folded Learner, unfold_bn of the copy"
    learn = learner()
    before = bits(learn)
    fold(learn)
    copied = deepcopy(learn)
    copied.unfold_bn()
    assert same_bits(copied, before) and is_folded(learn)

@workflow
def replaces_the_model():
    "fold_bn, learn.model = another, unfold_bn, fit"
    learn = learner()
    learn.fit(1)
    fold(learn)
    learn.model = net()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        learn.unfold_bn()
    before = bits(learn)
    learn.fit(1)
    assert not same_bits(learn, before)
    return str(said[0].message)

@workflow
def exports():
    "fold_bn, export, load_learner, predict"
    learn = photo_learner()
    want = learn.predict(files()[0])[2]
    fold(learn)
    learn.export(where/'m.pkl')
    assert close(quiet(load_learner(where/'m.pkl')).predict(files()[0])[2], want)

@workflow
def exports_a_clamp():
    "a fold that needs a Clamp: export says so, and clamps=False avoids it"
    model = nn.Sequential(nn.Conv2d(1,8,3), nn.ReLU(), nn.BatchNorm2d(8), nn.Conv2d(8,8,3,padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8,10))
    said = []
    for clamps in (True,False):
        learn = learner(deepcopy(model))
        fold(learn, clamps=clamps)
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter('always')
            learn.export(where/'m.pkl')
        said.append([str(o.message) for o in heard if 'fastai_bnfold' in str(o.message)])
    assert said[0] and not said[1]
    return said[0][0]

@workflow
def loaded_and_folded():
    "load_learner, fold_bn(dl=learn.dls.test_dl(files)), labelled and not"
    photo_learner().export(where/'m.pkl')
    for labelled in (False,True):
        learn = quiet(load_learner(where/'m.pkl'))
        report = fold(learn, dl=learn.dls.test_dl(files(), with_labels=labelled))
        assert report.n_folded==2 and report.n_changed==0 and ('accuracy' in report.metrics_before)==labelled

@workflow
def loaded_without_data():
    "load_learner, fold_bn()"
    photo_learner().export(where/'m.pkl')
    return refused(load_learner(where/'m.pkl').fold_bn)

# Other kinds of models

@workflow
def segmentation():
    "unet_learner: fold_bn, deploy, predict"
    (where/'labels').mkdir()
    rng = np.random.default_rng(0)
    for file in get_image_files(photos()): Image.fromarray(rng.integers(0, 2, (90,120), dtype=np.uint8)).save(where/'labels'/file.name)
    dls = SegmentationDataLoaders.from_label_func(photos(), bs=2, fnames=get_image_files(photos()), label_func=lambda file: where/'labels'/file.name,
                                                  codes=['background','thing'], item_tfms=Resize(64), num_workers=0)
    learn = quiet(unet_learner(dls, resnet18, pretrained=False, path=where))
    randomize_bn(learn.model)
    for name,module in learn.model.named_modules(): # deep and not trained: keep it tame
        if isinstance(module, nn.BatchNorm2d): nn.init.constant_(module.weight, .5)
    m = deploy(learn)
    want,got = learn.predict(files()[0]),m.predict(files()[0])
    assert np.allclose(want[2], got.probs, atol=1e-4) and (np.asarray(want[1])!=got.index).mean()<1e-3
    report = fold(learn)
    assert report.n_folded and not report.n_changed

@workflow
def text():
    "text_classifier_learner: fold_bn; deploy is refused with the reason"
    rng = np.random.default_rng(0)
    texts = [' '.join(rng.choice(['good','bad','film'], rng.integers(3,20))) for _ in range(24)]
    dls = TextDataLoaders.from_df(pd.DataFrame(dict(text=texts, label=[0,1]*12)), text_col='text', label_col='label', bs=4, n_workers=1, num_workers=0)
    config = awd_lstm_clas_config | dict(n_hid=8, emb_sz=8, n_layers=2)
    learn = quiet(text_classifier_learner(dls, AWD_LSTM, pretrained=False, config=config, metrics=accuracy, path=where))
    learn.fit(1)
    keeps_its_predictions(learn)
    return refused(learn.deploy, where/'text', error=DeployError)

@workflow
def tables():
    "tabular_learner: fold_bn; deploy; rows as dicts, Series and a data frame"
    learn,df = table_learner(),table()
    keeps_its_predictions(learn)
    m,rows = deploy(learn),df.drop(columns='sold').iloc[:12]
    want = [learn.predict(row) for _,row in df.iloc[:12].iterrows()]
    for items in (rows, rows.to_dict('records'), L(row for _,row in rows.iterrows())):
        for p,(_,index,probs) in zip(m.predict(items), want): assert p.index==int(index) and np.allclose(p.probs, probs, atol=1e-5)

@workflow
def unseen_category():
    "a row with a category that the training had not: as fastai, and said once"
    learn,m = table_learner(),deploy(table_learner())
    row = dict(shop=99, colour='red', size=1.)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        got = [m.predict(row) for _ in range(3)][0]
    assert np.allclose(got.probs, learn.predict(pd.Series(row))[2], atol=1e-5) and len(said)==1
    return str(said[0].message)

@workflow
def recommends():
    "collab_learner with a neural network and y_range"
    rng = np.random.default_rng(0)
    df = pd.DataFrame(dict(user=rng.integers(0,10,200), title=[f't{i}' for i in rng.integers(0,20,200)], rating=rng.integers(1,6,200).astype(float)))
    dls = CollabDataLoaders.from_df(df, bs=16, item_name='title', num_workers=0)
    learn = quiet(collab_learner(dls, use_nn=True, layers=[8], y_range=(.5,5.5), path=where))
    randomize_bn(learn.model)
    keeps_its_predictions(learn)
    want = predictions(learn, dl=learn.dls.test_dl(df[:5]))
    assert np.allclose([p.probs for p in deploy(learn).predict(df[:5])], want, atol=1e-5)

@workflow
def several_labels():
    "MultiCategoryBlock"
    learn = block_learner((ImageBlock, MultiCategoryBlock), lambda file: ['x','y'] if int(file.stem)%3 else ['z'], 3)
    keeps_its_predictions(learn)
    agrees(learn, deploy(learn), files()[:4])

@workflow
def keypoints():
    "PointBlock: labels in pixels"
    learn = block_learner((ImageBlock, PointBlock), lambda file: tensor([[10.,20.],[30.,40.]]), 4)
    m = deploy(learn)
    want,got = learn.predict(files()[0]),m.predict(files()[0])
    assert np.allclose(want[0], got.label, atol=1e-3) and np.allclose(want[2], got.probs, atol=1e-5)

@workflow
def numbers_in_a_range():
    "RegressionBlock with y_range"
    learn = block_learner((ImageBlock, RegressionBlock), lambda file: float(file.stem), 1, last=SigmoidRange(0, 30))
    keeps_its_predictions(learn)
    agrees(learn, deploy(learn), files()[:4], label=False)

@workflow
def masks_as_inputs():
    "MaskBlock as the input: files are refused with the reason, arrays are taken"
    learn = block_learner((MaskBlock, CategoryBlock), lambda file: int(file.stem)%2, 2)
    class AsFloat(nn.Module):
        def forward(self, x): return x[:,None].float()
    learn.model = nn.Sequential(AsFloat(), randomize_bn(net(2)))
    m = deploy(learn, quiet=True)
    said = refused(m.predict, files()[0])
    mask = np.zeros((32,32), np.int64)
    with torch.no_grad(): want = learn.model.eval()(torch.tensor(mask)[None])[0]
    assert np.allclose(m.predict(mask).probs, want, atol=1e-5)
    return said

# Deployment

for backend in ('onnx','openvino','torch','eager'):
    def on_backend(backend=backend):
        learn = photo_learner()
        agrees(learn, deploy(learn, backend), files()[:4])
    on_backend.__name__,on_backend.__doc__ = f'deploy_{backend}',f'learn.deploy(path, {backend!r}).predict(files)'
    workflow(on_backend)

@workflow
def augmented_at_224():
    "aug_transforms() at 224 pixels"
    learn = photo_learner(224, [*aug_transforms(), Normalize.from_stats(*imagenet_stats)])
    agrees(learn, deploy(learn), files()[:4])

@workflow
def deploy_folded():
    "fold_bn, deploy: the card has the Learner's report"
    learn = photo_learner()
    fold(learn)
    m = deploy(learn)
    assert m.card['fold']['n_folded']==2
    agrees(learn, m, files()[:2])

@workflow
def deploy_loaded():
    "load_learner, deploy(dl=learn.dls.test_dl(files))"
    photo_learner().export(where/'m.pkl')
    learn = quiet(load_learner(where/'m.pkl'))
    agrees(learn, deploy(learn, dl=learn.dls.test_dl(files())), files()[:2])

@workflow
def items_of_a_service():
    "paths, bytes, open files, BytesIO, Pillow images, arrays, L, generators"
    m,file = deploy(photo_learner()),files()[0]
    want,data,opened = m.predict(file).probs,file.read_bytes(),Image.open(file)
    forms = [str(file), data, bytearray(data), memoryview(data), io.BytesIO(data), open(file, 'rb'), opened, opened.convert('RGBA'), np.asarray(opened), PILImage.create(file)]
    for item in forms: assert np.allclose(m.predict(item).probs, want, atol=1e-6), item
    for many in ([file]*3, (file,)*3, L([file]*3), (file for _ in '123'), pd.Series([file]*3), np.array([str(file)]*3)):
        assert np.allclose([p.probs for p in m.predict(many)], [want]*3, atol=1e-6), many
    json.dumps(m.predict(file).to_dict())

@workflow
def one_bad_item():
    "a broken file in a list: an error for that item"
    m = deploy(photo_learner())
    items = [files()[0], b'no image', files()[1]]
    good = m.predict(items, on_error='return')
    assert isinstance(good[1], DeployError) and good[0].label and good[2].label
    return refused(m.predict, items)

@workflow
def empty_list():
    "predict([])"
    assert deploy(photo_learner()).predict([])==[]

@workflow
def eight_threads():
    "a threaded web service on all four backends"
    learn = photo_learner()
    for backend in ('onnx','openvino','torch','eager'):
        m = deploy(learn, backend)
        want = [m.predict(file).probs for file in files()]
        def right(i): return np.allclose(m.predict(files()[i%12]).probs, want[i%12], atol=1e-5)
        with ThreadPoolExecutor(8) as threads: assert all(threads.map(right, range(96))), backend

@workflow
def forked():
    "a service that forks after loading the model"
    m = deploy(photo_learner())
    want = m.predict(files()[0]).probs
    pid = os.fork()
    if not pid: os._exit(0 if np.allclose(m.predict(files()[0]).probs, want, atol=1e-6) else 1)
    assert os.waitpid(pid, 0)[1]==0

@workflow
def serves_without_fastai():
    "a service on ONNX Runtime imports neither torch nor fastai"
    deploy(photo_learner())
    code = f"import sys; from fastai_bnfold.deploy.serve import Deployed; Deployed({str(where/'deployed')!r}).predict({str(files()[0])!r}); print([o for o in ('torch','fastai') if o in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip()=='[]'

@workflow
def half_a_folder():
    "a deployment that was copied by half"
    deploy(photo_learner())
    (where/'deployed'/'model.onnx').write_bytes(b'x')
    return refused(Deployed, where/'deployed', error=DeployError)

@workflow
def somebodys_folder():
    "deploy into a folder with other files"
    (where/'mine').mkdir()
    (where/'mine'/'thesis.txt').write_text('x')
    said = refused(photo_learner().deploy, where/'mine', error=DeployError)
    assert (where/'mine'/'thesis.txt').exists()
    return said

@workflow
def unknown_backend():
    "deploy(path, 'tensorrt')"
    return refused(photo_learner().deploy, where/'deployed', 'tensorrt', error=DeployError)

@workflow
def several_inputs_deployed():
    "two inputs and PyTorch's DataLoaders"
    learn = torch_learner(2)
    m,x = deploy(learn, quiet=True),torch.rand(3,3,16,16)
    with torch.no_grad(): want = learn.model.eval()(x, x.flip(0))
    assert np.allclose(m(x.numpy(), x.flip(0).numpy())[0], want, atol=1e-5)

# One of them

def outcome(f):
    "What came of it"
    try: said = f()
    except AssertionError as e: return dict(outcome='wrong', said=str(e)[:300], where=traceback.format_exc()[-600:])
    except BaseException as e: return dict(outcome='raw error', said=f'{type(e).__name__}: {e}'[:300], where=traceback.format_exc()[-600:])
    return dict(outcome='refused' if said else 'right', said=said and said[:300])

def run(name):
    "One workflow, in a folder of its own"
    global where
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        where = Path(folder)
        found = outcome(workflows[name])
        return {key: text and text.replace(f'{folder}/', '') for key,text in found.items()}

@call_parse
def main(
    name:str # Of the workflow
): print(json.dumps(run(name), indent=1))
