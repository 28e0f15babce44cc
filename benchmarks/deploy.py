"""What `learn.deploy` keeps and what it brings: parity on every backend, re-parameterized networks, latency in every engine.

    python benchmarks/deploy.py [--part parity,reparameterize,latency,engines] [--out benchmarks/results/deploy.json]

Parity: nine kinds of Learners, deployed to every backend and compared on the validation set (every 32nd image of ImageNette from the
environment variable IMAGENETTE, if that is set, else the digits, at 224 pixels; a synthetic table). The networks are not trained: their BN
statistics are computed on training images. Re-parameterize: number of convolutions and latency beside timm's own `reparameterize_model`.
Latency: `bnfold bench` for all nine with four engines and tools; engines: for two networks with all of them. Interleaved runs, medians.
"""
import json, os, time
from pathlib import Path
import pandas as pd, torchvision
from fastai.vision.all import *
from fastai.tabular.all import *
from fastcore.script import call_parse
from fastai_bnfold.all import *
from fastai_bnfold.lab.bench import bench, bench_table
from fastai_bnfold.lab.models import example, subnormal_share, warm_up, find_model
from fastai_bnfold.lab.tools import reparameterized
from fastai_bnfold.deploy.engines import backends, load_engine
from fastai_bnfold.deploy.export import export_model
from fastai_bnfold.lab.command import machine
from fastai_bnfold.lab.data import get_dls
from fastai_bnfold.fold.verify import max_err
from fastai_bnfold.timing import latency, median, ratio
from fastai_bnfold.fold.ops import op_name

networks = 'resnet50,vgg16_bn,mobilenet_v2,densenet121,efficientnet_b0,repvgg_a0,levit_128s'.split(',')
learners = ['vision_learner','tabular_learner']

def image_dls():
    dls = get_dls('imagenette' if os.environ.get('IMAGENETTE') else 'digits', 224, 16)
    if os.environ.get('IMAGENETTE'): dls.loaders[1] = dls.test_dl(dls.valid_ds.items[::32], with_labels=True)
    return dls

def table_learner():
    g = np.random.default_rng(0)
    df = pd.DataFrame({'colour': g.choice(['red','green','blue'], 2000), 'size': g.normal(3, 2, 2000), 'weight': g.normal(0, 1, 2000)})
    df.loc[::9,'weight'] = np.nan
    df['kind'] = np.where(df['size']+(df.colour=='red')>3, 'large', 'small')
    dls = TabularDataLoaders.from_df(df, procs=[Categorify, FillMissing, Normalize], cat_names=['colour'], cont_names=['size','weight'], y_names='kind', y_block=CategoryBlock, bs=64)
    learn = tabular_learner(dls, metrics=accuracy)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2)
    return learn

def learner(name, dls):
    set_seed(0)
    if name=='tabular_learner': return table_learner()
    learn = vision_learner(dls, resnet18, pretrained=False) if name=='vision_learner' else Learner(dls, find_model(name)[0], loss_func=CrossEntropyLossFlat())
    warm_up(learn.model, batches=((x.as_subclass(Tensor),) for x,_ in itertools.islice(dls.train.new(bs=16, num_workers=0), 8)))
    return learn

def parity(out, names, rows):
    dls,rows = image_dls(),[r for r in rows if r['network'] not in names]
    for k in progress_bar(names):
        learn = learner(k, dls)
        for b in backends:
            t,r = time.time(),dict(network=k, backend=b)
            try:
                m = learn.deploy(out/f'{k}.{b}', b)
                r.update(seconds=time.time()-t, **m.card['parity'], **{n: m.card['fold'][n] for n in ('n_bn','n_folded')}, shape=m.card['inputs'][0]['shape'], mb=sum(f.stat().st_size for f in m.path.iterdir())/1e6)
            except FoldError as e: r['error'] = str(e)
            shutil.rmtree(out/f'{k}.{b}', ignore_errors=True)
            rows.append(r); print(r, flush=True)
    return dict(data='ImageNette, every 32nd validation image' if os.environ.get('IMAGENETTE') else 'digits', rows=rows)

def reparameterize(seconds):
    res = {}
    for k in progress_bar(['repvgg_a0','mobileone_s0']):
        m = warm_up(find_model(k)[0], 224)
        ep = export_model(m, example(m, 2))
        folder = BNFolder()
        ours,theirs = folder.fold_graph(ep),reparameterized(m).eval()
        g,(x,) = ours.module(check_guards=False),example(m, 1)
        exported = export_model(theirs, example(m, 2))
        h = exported.module(check_guards=False)
        with tempfile.TemporaryDirectory() as d: # in the same engine, both
            for n in 'ab': (Path(d)/n).mkdir()
            a,b = (load_engine('onnx', Path(d)/n/backends['onnx'](p, Path(d)/n), torch.get_num_threads()) for n,p in (('a',ours),('b',exported)))
        inputs = {'x': x.numpy()}
        t = latency({'unfolded': lambda: m(x), 'ours': lambda: g(x), 'timm': lambda: theirs(x), 'timm, exported': lambda: h(x), 'ours, ONNX Runtime': lambda: a(inputs), 'timm, ONNX Runtime': lambda: b(inputs)}, seconds, max_rounds=2000, warm=.01)
        with torch.no_grad(): errs = [max_err([m(x)], [f(x)]) for f in (g, theirs)]
        res[k] = dict(convs=sum(isinstance(o, nn.Conv2d) for o in m.modules()), convs_ours=sum(op_name(n)=='conv2d' for n in ours.graph.nodes), convs_timm=sum(isinstance(o, nn.Conv2d) for o in theirs.modules()),
                      n_bn=folder.report.n_bn, n_folded=folder.report.n_folded, merged=sum(map(len, folder.report.merged.values())), max_err_ours=errs[0], max_err_timm=errs[1], rounds=len(t['ours']),
                      ms={n: 1e3*median(v) for n,v in t.items()}, ours_over_timm=ratio(t, 'ours', 'timm'), ours_over_timm_exported=ratio(t, 'ours', 'timm, exported'), ours_over_timm_onnx=ratio(t, 'ours, ONNX Runtime', 'timm, ONNX Runtime'), speedup=ratio(t, 'unfolded', 'ours'))
        print(k, res[k], flush=True)
    return res

few = ('eager','ONNX Runtime','OpenVINO','limit: BNs deleted') # the fewer take turns, the more rounds there are

def latencies(names, seconds, only):
    res = {}
    for k in progress_bar(names):
        torch.manual_seed(0)
        m = learner(k, get_dls('digits', 224, 16)).model if k in learners else warm_up(find_model(k)[0], 224)
        x = example(m, 1)
        rows = bench(m, x, seconds, only=only)
        res[k] = dict(subnormal_share=subnormal_share(m, x), rows=rows)
        print(f'\n{k}\n{bench_table(rows)}', flush=True)
    return res

@call_parse
def main(
    part:str='parity,reparameterize,latency,engines',  # What to measure
    seconds:float=60,                          # For each network's latencies
    network:str='',                            # Networks to measure parity and latency of (default: all); others that are there stay
    out:str='benchmarks/results/deploy.json'   # Where the figures go; other parts that are there stay
):
    "Parity, re-parameterization and latency of deployed models"
    out = Path(out); out.parent.mkdir(parents=True, exist_ok=True)
    res = json.loads(out.read_text()) if out.exists() else {}
    names,old = network.split(',') if network else networks+learners, lambda p, k, none: res.get(p, {}).get(k, none) if network else none
    with tempfile.TemporaryDirectory() as d:
        for p in part.split(','):
            res[p] = dict(machine=machine()) | {'parity': lambda: parity(Path(d), names, old('parity', 'rows', [])), 'reparameterize': lambda: dict(networks=reparameterize(seconds)), 'latency': lambda: dict(networks=old('latency', 'networks', {}) | latencies(names, seconds, few)), 'engines': lambda: dict(networks=latencies(['resnet50','mobilenet_v2'], seconds, ()))}[p]()
            out.write_text(json.dumps(res, indent=1))
    print(f'All figures: {out}')
