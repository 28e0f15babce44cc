"""What `learn.deploy` keeps and what it brings: parity on every backend, re-parameterized networks, latency in every engine.

    python benchmarks/deploy.py [--data imagenette] [--part parity,reparameterize,latency] [--out benchmarks/results/deploy.json]

Parity: nine kinds of Learners, deployed to every backend and compared on the validation set (every 32nd image of ImageNette from the
environment variable IMAGENETTE, if that is set, else the digits, at 224 pixels; a synthetic table). The networks are not trained: their BN
statistics are computed on training images. Re-parameterize: number of convolutions and latency beside timm's own `reparameterize_model`.
Latency: `bnfold bench` for the seven networks. Interleaved runs, medians.
"""
import json, os, time
from pathlib import Path
import pandas as pd, torchvision
from fastai.vision.all import *
from fastai.tabular.all import *
from fastcore.script import call_parse
from fastai_bnfold.all import *
from fastai_bnfold.bench import bench, bench_table, example, reparameterized, subnormal_share, warm_up, find_model
from fastai_bnfold.deploy import backends, export_model
from fastai_bnfold.experiments import get_dls, machine
from fastai_bnfold.folder import max_err
from fastai_bnfold.latency import latency, median, ratio
from fastai_bnfold.report import text_table

networks = 'resnet50,vgg16_bn,mobilenet_v2,densenet121,efficientnet_b0,repvgg_a0,levit_128s'.split(',')

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
    bns = [m for m in learn.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for m in bns: m.momentum = None
    learn.model.train()
    with torch.no_grad():
        for x,_ in itertools.islice(dls.train.new(bs=16, num_workers=0), 8): learn.model(x.as_subclass(Tensor))
    for m in bns: m.momentum = .1
    learn.model.eval()
    return learn

def parity(out):
    dls,rows = image_dls(),[]
    for k in progress_bar([*networks, 'vision_learner','tabular_learner']):
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
        t = latency({'unfolded': lambda: m(x), 'ours': lambda: g(x), 'timm': lambda: theirs(x)}, seconds, max_rounds=2000, warm=1)
        with torch.no_grad(): errs = [max_err([m(x)], [f(x)]) for f in (g, theirs)]
        res[k] = dict(convs=sum(isinstance(o, nn.Conv2d) for o in m.modules()), convs_ours=sum('conv2d' in str(n.target) for n in ours.graph.nodes), convs_timm=sum(isinstance(o, nn.Conv2d) for o in theirs.modules()),
                      n_bn=folder.report.n_bn, n_folded=folder.report.n_folded, merged=sum(map(len, folder.report.merged.values())), max_err_ours=errs[0], max_err_timm=errs[1], rounds=len(t['ours']),
                      ms={n: 1e3*median(v) for n,v in t.items()}, ours_over_timm=ratio(t, 'ours', 'timm'), speedup=ratio(t, 'unfolded', 'ours'))
        print(k, res[k], flush=True)
    return res

def latencies(seconds):
    res = {}
    for k in progress_bar(networks):
        torch.manual_seed(0)
        m = warm_up(find_model(k)[0], 224)
        x = example(m, 1)
        rows = bench(m, x, seconds)
        res[k] = dict(subnormal_share=subnormal_share(m, x), rows=rows)
        print(f'\n{k}\n{bench_table(rows)}', flush=True)
    return res

@call_parse
def main(
    part:str='parity,reparameterize,latency',  # What to measure
    seconds:float=60,                          # For each network's latencies
    out:str='benchmarks/results/deploy.json'   # Where the figures go; other parts that are there stay
):
    "Parity, re-parameterization and latency of deployed models"
    out = Path(out); out.parent.mkdir(parents=True, exist_ok=True)
    res = json.loads(out.read_text()) if out.exists() else {}
    with tempfile.TemporaryDirectory() as d:
        for p in part.split(','):
            res[p] = dict(machine=machine()) | {'parity': lambda: parity(Path(d)), 'reparameterize': lambda: dict(networks=reparameterize(seconds)), 'latency': lambda: dict(networks=latencies(seconds))}[p]()
            out.write_text(json.dumps(res, indent=1))
    print(f'All figures: {out}')
