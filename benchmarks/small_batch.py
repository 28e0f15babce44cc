"""Networks trained from scratch on ImageNette in small batches, and what inference with other BN statistics makes of them.

    python benchmarks/small_batch.py [--data imagenette] [--weights FOLDER] [--runs 2/0,32/0] [--out benchmarks/results/small_batch.json]

ResNet-18 with a 3×3 stem, 64 px, two epochs of AdamW with the one-cycle policy, without augmentation. A run is `batch size/seed`. Trained weights
are kept in the folder and not trained again; runs that are in the results already are not measured again. Training and validation are in bfloat16
autocast (it is twice as fast on the CPUs that have it).
"""
import json
from pathlib import Path
import torch, torchvision
from fastai.vision.all import *
from fastcore.script import call_parse
from fastai_bnfold.all import *
from fastai_bnfold.stats.item import shares
from fastai_bnfold.lab.command import machine
from fastai_bnfold.lab.data import find_images
from fastai_bnfold.lab.training import AutocastCPU
from fastai_bnfold.fold.report import text_table

size,epochs = 64,2
all_runs = [(2,0),(4,0),(32,0),(8,0),(2,1),(4,1),(32,1),(2,2),(4,2)]
alphas = (.02,.05,.1,.15,.2,.3)

def small_images(data, to):
    "The images of `data`, no larger than needed, in the folder `to`"
    src = find_images(data)
    for d in (o for part in ('train','val') for o in sorted((src/part).iterdir()) if o.is_dir()):
        if not (dest := Path(to)/d.parent.name/d.name).exists(): resize_images(d, max_size=size, dest=dest, ext='.png')
    return Path(to)

def net(n_out):
    "torchvision's ResNet-18 with a 3×3 stem"
    m = torchvision.models.resnet18(num_classes=n_out)
    m.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    return m

def trained(path, bs, seed, weights):
    "The Learner of one run; trained now where the folder `weights` does not hold it"
    set_seed(seed, reproducible=True)
    dls = ImageDataLoaders.from_folder(path, train='train', valid='val', item_tfms=Resize(size), batch_tfms=Normalize.from_stats(*imagenet_stats),
                                       bs=bs, val_bs=64, num_workers=0)
    learn = Learner(dls, net(dls.c), metrics=accuracy, opt_func=partial(OptimWrapper, opt=torch.optim.AdamW, fused=True), cbs=AutocastCPU())
    f = Path(weights)/f'resnet18_bs{bs}_seed{seed}.pth'
    if f.exists(): learn.model.load_state_dict(torch.load(f, weights_only=True))
    else:
        learn.fit_one_cycle(epochs, 2e-3*(bs/64)**.5)
        f.parent.mkdir(parents=True, exist_ok=True)
        torch.save(learn.model.state_dict(), f)
    return learn

def measure(learn, bs, first):
    "Validation loss and accuracy with each kind of statistics. For the `first` seed also the curves over α and the folded network; with batches of two all of them folded, averages over batches of 64, a share with the old statistics"
    full = first and bs==2
    res,curves,trained = {},{},{k: v.clone() for k,v in learn.model.state_dict().items()}
    def validate(): return dict(zip(('loss','accuracy'), learn.validate()))
    def measured(name, **more):
        res[name] = validate() | more
        if full or first and name in ('standard', 'population, batches of 64'):
            rep = learn.fold_bn(validate=False, latency=0)
            res[name]['folded'] = dict(n_bn=rep.n_bn, n_folded=rep.n_folded, max_err=rep.max_err) | (validate() if rep.n_folded else {})
            if rep.n_folded: learn.unfold_bn()
    def corrected(stats):
        c = learn.correct_bn(alphas=alphas, n=1024)
        best = float(c.index[c.chosen][0])
        curves[stats] = dict(train=c['training loss'].to_dict(), chosen=best)
        measured(f'{stats}, α', alpha=best)
        return best
    def reestimated(b, var, **kwargs):
        learn.model.load_state_dict(trained)
        learn.reestimate_bn(bs=b, var=var, **kwargs)
        measured(f'{var}, batches of {"the training" if b==bs else b}')
    measured('standard')
    if full and corrected('standard'): learn.uncorrect_bn()
    for var in ('precise','population'): reestimated(bs, var, n_batches=min(512, 4096//bs))
    for var in ('precise','population') if full else ('population',): reestimated(64, var)
    best = corrected('population')
    if first:
        curves['population']['valid'] = {}
        for a in alphas:
            learn.correct_bn(a); curves['population']['valid'][a] = validate()
    learn.correct_bn(per_layer=True, alphas=(best or .02,))
    measured('population, α per layer', alpha=shares(learn.model))
    return dict(results=res, curves=curves)

def table(networks):
    "Means over the seeds, accuracy in % and loss"
    sizes = sorted({n['bs'] for n in networks.values()})
    def cell(bs, k):
        r = [n['results'][k] for n in networks.values() if n['bs']==bs and k in n['results']]
        return f"{100*sum(o['accuracy'] for o in r)/len(r):.2f} % / {sum(o['loss'] for o in r)/len(r):.3f} ({len(r)})" if r else ''
    names = dict.fromkeys(k for n in networks.values() for k in n['results'])
    return text_table(['accuracy / loss (seeds)', *[f"batch size {b}" for b in sizes]], [[k, *[cell(b, k) for b in sizes]] for k in names])

@call_parse
def main(
    data:str='imagenette',     # 'imagenette', or a folder or archive with train/ and val/
    weights:str='out/small_batch', # Folder of trained weights and of the small images
    runs:str='',               # Runs to do, as batch size/seed, separated by commas; all if left out
    out:str='benchmarks/results/small_batch.json' # Where the figures go
):
    "Train in small batches, and compare the statistics to do inference with"
    out = Path(out)
    read = lambda: json.loads(out.read_text()) if out.exists() else dict(networks={})
    path = small_images(data, Path(weights)/'images')
    for bs,seed in [tuple(map(int, r.split('/'))) for r in runs.split(',')] if runs else all_runs:
        if f'{bs}/{seed}' in read()['networks']: continue
        print(f'\nbatch size {bs}, seed {seed}', flush=True)
        learn = trained(path, bs, seed, weights)
        with learn.no_bar(), learn.no_logging(): r = dict(bs=bs, seed=seed, **measure(learn, bs, seed==0))
        networks = read()['networks'] | {f'{bs}/{seed}': r}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(dict(machine=machine(), size=size, epochs=epochs, n_train=len(learn.dls.train_ds), n_valid=len(learn.dls.valid_ds), networks=networks), indent=1))
        print(table({'': r}), flush=True)
    print('\n'+table(read()['networks']))
