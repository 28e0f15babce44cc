"""A few unlabelled items of another place: what `adapt_bn` makes of them, against fixed priors, and what `bn_shift` sees.

    python benchmarks/adaptation.py [--data imagenette] [--weights FOLDER] [--out benchmarks/results/adaptation.json]

A ResNet-18 of width 32 at 64 pixels, trained on ImageNette (nine epochs of SGD, the first four at 48 pixels; weights are kept in the
folder and not trained again). Items to adapt with and images to judge by are two parts of the validation set. The same draws of
items go to every prior. Evaluation is in bfloat16 autocast.
"""
import json, time
from pathlib import Path
from PIL import Image
from fastai.vision.all import *
from fastcore.script import call_parse
from torch.utils.data import DataLoader as TorchLoader
from torchvision.transforms.v2 import functional as T
from fastai_bnfold.all import *
from fastai_bnfold.fold.report import text_table
from fastai_bnfold.lab.command import machine
from fastai_bnfold.lab.data import find_images
from fastai_bnfold.stats.batch import batch_statistics

# --- the network

def resnet18(width=32, n_out=10):
    "ResNet-18 with a 3×3 stem, of fastai's blocks"
    layers,ni = [ConvLayer(3, width), nn.MaxPool2d(3, 2, 1)],width
    for i in range(4):
        nf = width*2**i
        layers += [ResBlock(1, ni, nf, stride=1 if i==0 else 2), ResBlock(1, nf, nf)]
        ni = nf
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), Flatten(), nn.Linear(ni, n_out))

def square(file, size):
    "The middle of an image, uint8"
    image = Image.open(file)
    image.draft('RGB', (2*size, 2*size))
    image = image.convert('RGB')
    side = min(image.size)
    left,top = (image.size[0]-side)//2,(image.size[1]-side)//2
    return np.asarray(image.resize((size,size), Image.BILINEAR, box=(left,top,left+side,top+side)))

def part(folder, size):
    "Images, uint8, and labels"
    xs,ys = [],[]
    for label,of_class in enumerate(sorted(o for o in folder.iterdir() if o.is_dir())):
        for file in sorted(of_class.iterdir()):
            xs.append(square(file, size))
            ys.append(label)
    return torch.from_numpy(np.stack(xs)).permute(0,3,1,2), torch.tensor(ys)

def arrays(data, weights):
    "`{part: (images, labels)}`, made once"
    file = Path(weights)/'arrays.pt'
    if not file.exists():
        folder = find_images(data)
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save({name: part(folder/name, size) for name,size in (('train',72),('val',64))}, file)
    return torch.load(file)

mean,std = (torch.tensor(o).view(3,1,1) for o in imagenet_stats)
def normalized(x): return ((x.float()/255-mean)/std).contiguous(memory_format=torch.channels_last)

def augmented(x, size):
    "A random crop of 64 of 72 pixels, some of them flipped, at `size` pixels"
    top,left = torch.randint(0, 9, (2,)).tolist()
    x = normalized(x[:,:,top:top+64,left:left+64])
    flip = torch.rand(len(x))<.5
    x[flip] = x[flip].flip(3)
    return x if size==64 else F.interpolate(x, size=size, mode='bilinear', antialias=True)

def fit(model, x, y, epochs=9, bs=64, lr=.1):
    "SGD, one cycle"
    matrices,vectors = ([p for p in model.parameters() if (p.ndim>1)==big] for big in (True,False))
    groups = [dict(params=matrices, weight_decay=5e-4), dict(params=vectors, weight_decay=0)]
    opt = torch.optim.SGD(groups, lr=lr, momentum=.9, nesterov=True)
    steps = len(x)//bs
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=steps*epochs, pct_start=.25)
    for epoch in range(epochs):
        for idxs in torch.randperm(len(x))[:steps*bs].split(bs):
            batch = augmented(x[idxs], 48 if epoch<epochs//2 else 64)
            with torch.autocast('cpu', torch.bfloat16): out = model.train()(batch)
            loss = F.cross_entropy(out.float(), y[idxs], label_smoothing=.05)
            opt.zero_grad()
            loss.backward()
            opt.step()
            schedule.step()

def trained(images, weights):
    "The network; trained now where the folder does not hold it"
    set_seed(0)
    model = resnet18().to(memory_format=torch.channels_last)
    file = Path(weights)/'resnet18_32.pth'
    if not file.exists():
        fit(model, *images['train'])
        torch.save(model.state_dict(), file)
    model.load_state_dict(torch.load(file, weights_only=True))
    return model.eval()

# --- other places

def gen(): return torch.Generator().manual_seed(0)
def to_uint8(x): return x.round().clamp(0,255).to(torch.uint8)
def scaled(x, factors): return to_uint8(x*torch.tensor(factors).view(-1,1,1))
def jpeg(x, quality): return torch.stack([T.jpeg(image, quality) for image in x])
def pixelated(x, size):
    few = T.resize(x, [size]*2, antialias=True)
    return T.resize(few, list(x.shape[-2:]), T.InterpolationMode.NEAREST)
def dots(x, share):
    u = torch.rand(len(x),1,*x.shape[2:], generator=gen())
    return torch.where(u<share/2, 0, torch.where(u>1-share/2, 255, x))

corruptions = { # name → function, and its argument at three severities
    'noise': (lambda x, s: to_uint8(x+s*torch.randn(x.shape, generator=gen())), (15,38,64)),
    'dots': (dots, (.01,.05,.12)),
    'blur': (lambda x, s: T.gaussian_blur(x, 13, [s]*2), (.7,1.5,2.5)),
    'pixels': (pixelated, (40,24,16)),
    'dark': (T.adjust_brightness, (.6,.3,.15)),
    'bright': (lambda x, s: to_uint8(x.float()+s), (35,80,120)),
    'contrast': (T.adjust_contrast, (.6,.25,.12)),
    'fog': (lambda x, s: to_uint8(x*s+237*(1-s)), (.75,.45,.25)),
    'warm light': (scaled, ([1.,.9,.75],[1.,.75,.45],[1.,.6,.2])),
    'less colour': (T.adjust_saturation, (.5,.2,0.)),
    'gamma': (T.adjust_gamma, (1.5,2.2,3.5)),
    'JPEG': (jpeg, (25,10,5))}

def place(x, name, severity=1):
    "What a camera sees there of these images"
    if name=='none': return normalized(x)
    change,at = corruptions[name]
    return normalized(change(x, at[severity]))

# --- figures

def calibration(probs, y, bins=15):
    "Expected calibration error: confidence against accuracy, in bins of confidence"
    confidence,predicted = probs.max(1)
    right,which = (predicted==y).float(),(confidence*bins).long().clamp(max=bins-1)
    of_bins = [(right[which==i].sum()-confidence[which==i].sum()).abs() for i in range(bins)]
    return (sum(of_bins)/len(y)).item()

@torch.no_grad()
def judged(model, x, y, bs=64):
    "Accuracy, loss, calibration error"
    with torch.autocast('cpu', torch.bfloat16): outs = torch.cat([model(batch).float() for batch in x.split(bs)])
    acc = (outs.argmax(1)==y).float().mean().item()
    return dict(accuracy=acc, loss=F.cross_entropy(outs, y).item(), ece=calibration(outs.softmax(1), y))

def learner(model, x, y):
    "A Learner with validation data, and no training data"
    dls = DataLoaders(DataLoader([], bs=64), DataLoader(list(zip(x, y)), bs=64))
    return Learner(dls, model, loss_func=CrossEntropyLossFlat())

def adapted(learn, items, prior, x, y):
    "With the statistics of `items`, on `x`"
    moves = learn.adapt_bn(TorchLoader(items, 64), prior=prior)
    res = judged(learn.model, x, y) | dict(share=moves['share of the new'].iloc[0])
    learn.restore_bn()
    return res

def draws_of(n, n_all, draws):
    return [torch.randperm(n_all, generator=torch.Generator().manual_seed(i))[:n] for i in range(draws)]

def of_place(learn, name, pool, x, y, draws):
    "The rows of one place"
    there,items = place(x, name),place(pool, name)
    rows = [dict(method='as trained', **judged(learn.model, there, y))]
    with batch_statistics(learn.model): rows.append(dict(method='batch statistics, 64', **judged(learn.model, there, y)))
    learn.correct_bn(alpha=1.)
    rows.append(dict(method='batch statistics, 1', **judged(learn.model, there, y)))
    learn.uncorrect_bn()
    for n in (4,8,16,64,512):
        priors = (0,4,16,64,256,'auto') if n<512 else (0,16,'auto')
        for i,idxs in enumerate(draws_of(n, len(pool), draws if n<512 else 1)):
            for prior in priors:
                found = adapted(learn, items[idxs], prior, there, y)
                rows.append(dict(method='adapted', n=n, draw=i, prior=str(prior), **found))
    return [dict(place=name, **row) for row in rows]

def misuse(learn, pool, y_pool, x, y):
    "One class only; two places mixed: accuracies, as trained and adapted"
    res = {}
    for name in ('none','contrast'):
        there,items = place(x, name),place(pool, name)
        of_class = [items[y_pool==label][:32] for label in (0,5)]
        found = [adapted(learn, some, 'auto', there, y)['accuracy'] for some in of_class]
        res[f'{name}: 32 items of one class'] = sum(found)/len(found)
        res[f'{name}: 32 items'] = adapted(learn, items[:32], 'auto', there, y)['accuracy']
        res[f'{name}: as trained'] = judged(learn.model, there, y)['accuracy']
        other = place(pool, 'fog')
        mixed = torch.cat([items[:16], other[16:32]])
        res[f'{name}: 16 items of it and 16 of fog'] = adapted(learn, mixed, 'auto', there, y)['accuracy']
    return res

def auc(far, near):
    "The probability that one of `far` is larger than one of `near`"
    far,near = torch.tensor(far)[:,None],torch.tensor(near)[None]
    return ((far>near).float()+.5*(far==near).float()).mean().item()

def seen_shifts(learn, pool, n=32, draws=20):
    "`bn_shift` at the lowest severity against fresh draws of validation items: areas under the curve"
    def distances(name):
        items = place(pool, name, 0)
        return [learn.bn_shift(TorchLoader(items[idxs], n), n=n, draws=1).distance for idxs in draws_of(n, len(pool), draws)]
    near = distances('none')
    far = {name: distances(name) for name in corruptions}
    every = [value for values in far.values() for value in values]
    return {name: auc(values, near) for name,values in far.items()} | dict(all=auc(every, near))

def deployed(learn, pool, x, folder):
    "Adapted, folded, deployed with ONNX Runtime: changed predictions"
    items,there = place(pool, 'contrast'),place(x, 'contrast')
    learn.adapt_bn(TorchLoader(items[:64], 64))
    engine = learn.deploy(Path(folder)/'deployed', backend='onnx')
    with torch.no_grad(): want = torch.cat([learn.model(batch) for batch in there.split(64)]).argmax(1)
    got = torch.cat([torch.as_tensor(engine(batch.contiguous().numpy())[0]) for batch in there.split(64)]).argmax(1)
    learn.restore_bn()
    return dict(items=len(want), changed=int((want!=got).sum()), parity=engine.card['parity'])

# --- what is shown

def summary(rows):
    "Means over draws: per number of items and prior without a shift, over the shifts, and of both"
    df = pd.DataFrame(rows)
    res = {}
    for (n,prior),of in df[df.method=='adapted'].groupby(['n','prior']):
        by_place = of.groupby('place').accuracy.mean()
        shifted,same = by_place.drop('none').mean(),by_place['none']
        res[f'{n:.0f}/{prior}'] = dict(none=same, shifted=shifted, both=(same+shifted)/2)
    return res

def show(res):
    table = [[*key.split('/'), *[f'{100*o:.1f}' for o in row.values()]] for key,row in res['summary'].items()]
    print(text_table(['items','prior','no shift','shifted','mean of both'], table))
    for key in ('misuse','auc','deployed'): print(key, json.dumps(res[key], indent=1))

@call_parse
def main(
    data:str='imagenette',        # As in `bnfold reproduce`
    weights:str='out/adaptation', # Folder for weights and arrays
    n_judged:int=400,             # Images to judge by
    draws:int=2,                  # Of items, per place; three times as many without a shift
    out:str='benchmarks/results/adaptation.json' # Where the figures go
):
    "Compare priors, with and without a shift"
    start = time.time()
    images = arrays(data, weights)
    model = trained(images, weights)
    x,y = images['val']
    perm = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    pool,rest,known = perm[:1000],perm[1000:1000+n_judged],perm[-1000:]
    whole = judged(model, normalized(x), y)
    learn = learner(model, normalized(x[known]), y[known])
    rows = []
    with learn.no_bar():
        res = dict(machine=machine(), validation=whole, n_judged=n_judged, draws=draws)
        res['deployed'] = deployed(learn, x[pool], x[rest], weights)
        res['misuse'] = misuse(learn, x[pool], y[pool], x[rest], y[rest])
        res['auc'] = seen_shifts(learn, x[pool])
        for name in ('none',*corruptions):
            rows += of_place(learn, name, x[pool], x[rest], y[rest], draws*3 if name=='none' else draws)
            print(name, f'{time.time()-start:.0f} s', flush=True)
    res |= dict(summary=summary(rows), rows=rows)
    Path(out).write_text(json.dumps(res, indent=1))
    show(res)
