"""A network in another place: what statistics from a few unlabelled items are worth, and whether `bn_shift` sees the shift.

    python benchmarks/shift.py [--networks resnet18/0,densenet/0] [--cache FOLDER] [--severities 1] [--out benchmarks/results/shift.json]
    python benchmarks/shift.py --mild --cache FOLDER --n-judged 200 --draws 3 # only what `bn_shift` sees of the mildest shifts

Networks (`name/seed`) are trained on ImageNette at 64 pixels, which the environment variable IMAGENETTE names: nine epochs of SGD (MobileNetV2: six),
the first half of them at 48 pixels. Weights, images and every figure are kept in the folder `cache`, and nothing in it is made again: a run that was stopped goes on where it was.
`adapt_bn` (with a prior of its own choice, and with fixed ones) gets draws of items from one part of the validation set; each draw is judged by
another part of the images that none of them is taken from, so that the figures of all draws together are those of all these images (without
a shift, every draw is judged by all of them). The same draws go to every prior. All runs are in bfloat16 autocast, except the deployed ones.
"""
import json
from pathlib import Path
from statistics import mean, median, stdev
import torchvision
from fastai.vision.all import *
from fastcore.script import call_parse
from fastprogress.fastprogress import progress_bar
from PIL import Image
from torch.utils.data import DataLoader as TorchLoader
from torchvision.transforms.v2 import functional as T
from fastai_bnfold.all import *
from fastai_bnfold.fold.report import text_table
from fastai_bnfold.lab.command import machine
from fastai_bnfold.lab.data import find_images
from fastai_bnfold.lab.training import AutocastCPU
from fastai_bnfold.stats.batch import batch_statistics
from fastai_bnfold.stats.shift import item_products, item_rows, left_out

# --- images

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

def arrays(data, cache):
    "`{part: (images, labels)}`, made once"
    file = Path(cache)/'arrays.pt'
    if not file.exists():
        folder = find_images(data)
        torch.save({name: part(folder/name, size) for name,size in (('train',72),('val',64))}, file)
    return torch.load(file)

pixel_mean,pixel_std = (torch.tensor(o).view(3,1,1) for o in imagenet_stats)
def normalized(x): return ((x.float()/255-pixel_mean)/pixel_std).contiguous(memory_format=torch.channels_last)

# --- networks

def resnet18(width=32):
    "Conv, BN, ReLU: ResNet-18 with a 3×3 stem, of fastai's blocks"
    layers,ni = [ConvLayer(3, width), nn.MaxPool2d(3, 2, 1)],width
    for i in range(4):
        nf = width*2**i
        layers += [ResBlock(1, ni, nf, stride=1 if i==0 else 2), ResBlock(1, nf, nf)]
        ni = nf
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), Flatten(), nn.Linear(ni, 10))

def mobilenet():
    "Depthwise convolutions; sums without a ReLU: torchvision's MobileNetV2 of half width, with a stem of stride 1"
    model = torchvision.models.mobilenet_v2(num_classes=10, width_mult=.5)
    model.features[0][0].stride = (1,1)
    return model

def densenet():
    "BN, ReLU, conv: DenseNet-121 with a growth of 16"
    return torchvision.models.DenseNet(16, (6,12,24,16), 32, num_classes=10)

def conv(ni, nf, stride=1): return nn.Conv2d(ni, nf, 3, stride, 1, padding_mode='reflect')
def ic_conv(ni, nf, stride=1): return nn.Sequential(nn.ReLU(), nn.BatchNorm2d(ni), nn.Dropout(.05), conv(ni, nf, stride))

class ICBlock(nn.Module):
    "A residual block of ReLU, IC layer, conv"
    def __init__(self, ni, nf, stride):
        super().__init__()
        self.convs = nn.Sequential(ic_conv(ni, nf, stride), ic_conv(nf, nf))
        pool = [nn.AvgPool2d(stride)] if stride>1 else []
        widen = [nn.Conv2d(ni, nf, 1)] if ni!=nf else []
        self.shortcut = nn.Sequential(*pool, *widen)
    def forward(self, x): return self.shortcut(x)+self.convs(x)

def icnet(width=32):
    "ReLU, BN, dropout, conv: a ResNet-18 with the independent component layers of Chen et al. (2019)"
    layers,ni = [conv(3, width), nn.MaxPool2d(3, 2, 1)],width
    for i in range(4):
        nf = width*2**i
        layers += [ICBlock(ni, nf, stride=1 if i==0 else 2), ICBlock(nf, nf, 1)]
        ni = nf
    return nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), Flatten(), nn.BatchNorm1d(ni), nn.Dropout(.05), nn.Linear(ni, 10))

makers = dict(resnet18=resnet18, mobilenet=mobilenet, densenet=densenet, icnet=icnet)
epochs = dict(resnet18=9, mobilenet=6, densenet=9, icnet=9) # depthwise convolutions train slowly on a CPU
all_networks = 'resnet18/0,densenet/0,icnet/0,resnet18/1,mobilenet/0,resnet18/2'

def augmented(x, size):
    "A random crop of 64 of 72 pixels, some of them flipped, at `size` pixels"
    top,left = torch.randint(0, 9, (2,)).tolist()
    x = normalized(x[:,:,top:top+64,left:left+64])
    flip = torch.rand(len(x))<.5
    x[flip] = x[flip].flip(3)
    return x if size==64 else F.interpolate(x, size=size, mode='bilinear', antialias=True)

def fit(model, x, y, epochs, bs=64, lr=.1):
    "SGD, one cycle"
    matrices,vectors = ([p for p in model.parameters() if (p.ndim>1)==big] for big in (True,False))
    groups = [dict(params=matrices, weight_decay=5e-4), dict(params=vectors, weight_decay=0)]
    opt = torch.optim.SGD(groups, lr=lr, momentum=.9, nesterov=True)
    steps = len(x)//bs
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=steps*epochs, pct_start=.25)
    for epoch in progress_bar(range(epochs)):
        for idxs in torch.randperm(len(x))[:steps*bs].split(bs):
            batch = augmented(x[idxs], 48 if epoch<epochs//2 else 64)
            with torch.autocast('cpu', torch.bfloat16): out = model.train()(batch)
            loss = F.cross_entropy(out.float(), y[idxs], label_smoothing=.05)
            opt.zero_grad()
            loss.backward()
            opt.step()
            schedule.step()

def trained(network, images, cache):
    "The network of a `name/seed`; trained now where the folder does not hold it"
    name,seed = network.split('/')
    set_seed(int(seed))
    model = makers[name]().to(memory_format=torch.channels_last)
    file = Path(cache)/f'{name}_{seed}.pth'
    if not file.exists():
        fit(model, *images['train'], epochs[name])
        torch.save(model.state_dict(), file)
    model.load_state_dict(torch.load(file, weights_only=True))
    return model.eval()

# --- other places

def gen(): return torch.Generator().manual_seed(0)
def to_uint8(x): return x.round().clamp(0,255).to(torch.uint8)
def noise(x, sigma): return to_uint8(x+sigma*torch.randn(x.shape, generator=gen()))
def dots(x, share):
    u = torch.rand(len(x),1,*x.shape[2:], generator=gen())
    return torch.where(u<share/2, 0, torch.where(u>1-share/2, 255, x))
def blur(x, sigma): return T.gaussian_blur(x, 13, [sigma]*2)
def pixels(x, size):
    few = T.resize(x, [size]*2, antialias=True)
    return T.resize(few, list(x.shape[-2:]), T.InterpolationMode.NEAREST)
def bright(x, more): return to_uint8(x.float()+more)
def fog(x, share): return to_uint8(x*share+237*(1-share))
def warm(x, factors): return to_uint8(x*torch.tensor(factors).view(-1,1,1))
def jpeg(x, quality): return torch.stack([T.jpeg(image, quality) for image in x])

corruptions = { # name → function, and its argument at three severities
    'noise': (noise, (15,38,64)),
    'dots': (dots, (.01,.05,.12)),
    'blur': (blur, (.7,1.5,2.5)),
    'pixels': (pixels, (40,24,16)),
    'dark': (T.adjust_brightness, (.6,.3,.15)),
    'bright': (bright, (35,80,120)),
    'contrast': (T.adjust_contrast, (.6,.25,.12)),
    'fog': (fog, (.75,.45,.25)),
    'warm light': (warm, ([1.,.9,.75],[1.,.75,.45],[1.,.6,.2])),
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
def outputs(model, x, bs=64):
    with torch.autocast('cpu', torch.bfloat16): return torch.cat([model(batch).float() for batch in x.split(bs)])

def figures(outs, y):
    right = outs.argmax(1)==y
    return dict(accuracy=right.float().mean().item(), loss=F.cross_entropy(outs, y).item(), ece=calibration(outs.softmax(1), y))

def split(dataset, images, n_judged):
    "Items to adapt with, images to judge by, and those that the Learner knows for validation"
    x,y = images['val']
    perm = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    at = dict(pool=perm[:1500], judged=perm[1500:1500+n_judged], known=perm[-900:])[dataset]
    return x[at], y[at]

def learner(model, images, cbs=AutocastCPU):
    "A Learner with some of the training data, and validation data"
    x,y = images['train']
    few = torch.randperm(len(x), generator=gen())[:2048]
    train = list(zip(normalized(x[few][:,:,4:68,4:68]), y[few]))
    x,y = split('known', images, 0)
    dls = DataLoaders(DataLoader(train, bs=64), DataLoader(list(zip(normalized(x), y)), bs=64))
    return Learner(dls, model, loss_func=CrossEntropyLossFlat(), cbs=cbs and cbs())

def batches(items): return TorchLoader(list(items.split(64)), batch_size=None)

def draws_of(n, n_all, draws):
    return [torch.randperm(n_all, generator=torch.Generator().manual_seed(i))[:n] for i in range(draws)]

def adapted(learn, items, prior, x):
    "Outputs for `x` with the statistics of `items`, and the share of these"
    moves = learn.adapt_bn(batches(items), prior=prior)
    try: return outputs(learn.model, x), moves['share of the new'].iloc[0]
    finally: learn.restore_bn()

def of_draws(learn, items, x, y, n, prior, draws, whole):
    "The figures of all draws together: each is judged by a part of the images, or by the `whole`"
    outs,shares,accuracies,ys = [],[],[],[]
    for i,idxs in enumerate(draws_of(n, len(items), draws)):
        mine = slice(None) if whole else slice(i, None, draws)
        out,share = adapted(learn, items[idxs], prior, x[mine])
        outs.append(out)
        ys.append(y[mine])
        shares.append(share)
        accuracies.append((out.argmax(1)==y[mine]).float().mean().item())
    return figures(torch.cat(outs), torch.cat(ys)) | dict(share=mean(shares), accuracies=accuracies, draws=draws)

def trained_outputs(learn, x): return outputs(learn.model, x)
def batch_outputs(learn, x):
    with batch_statistics(learn.model): return outputs(learn.model, x)
def item_outputs(learn, x, alpha=1.):
    if not alpha: return outputs(learn.model, x)
    learn.correct_bn(alpha=alpha)
    try: return outputs(learn.model, x)
    finally: learn.uncorrect_bn()

# --- what is kept

class Kept:
    "Figures by key, in a file of JSON lines: what is in it is not measured again"
    def __init__(self, file):
        self.file,self.rows = Path(file),{}
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        for key,value in map(json.loads, lines): self.rows[tuple(key)] = value
    def __call__(self, key, measure):
        if key not in self.rows:
            self.rows[key] = measure()
            with self.file.open('a') as file: file.write(json.dumps([key, self.rows[key]])+'\n')
        return self.rows[key]

# --- what is measured

few_ns,many_ns = (8,16,64),(512,1024)
fixed_priors = (0,4,16,64,256)

def settings(severity, ns):
    "`(n, prior)` to measure at a severity"
    if severity!=1: return [(n, 'auto') for n in (16,64) if n in ns]
    few = [(n, prior) for n in few_ns for prior in ('auto',*fixed_priors)]
    many = [(n, prior) for n in many_ns for prior in ('auto',0,16)]
    return [(n, prior) for n,prior in few+many if n in ns]

def of_place(keep, network, learn, alpha, name, severity, images, n_judged, draws, ns):
    "The figures of one place"
    x,y = split('judged', images, n_judged)
    pool,_ = split('pool', images, n_judged)
    there,items = place(x, name, severity),place(pool, name, severity)
    plain = {'as trained': trained_outputs, 'batch statistics, 64': batch_outputs, 'batch statistics, 1': item_outputs,
             'correct_bn': partial(item_outputs, alpha=alpha)}
    for method,run in plain.items(): keep((network, name, severity, method), lambda: figures(run(learn, there), y))
    for n,prior in settings(severity, ns):
        n_draws = draws if n<=64 else max(2, draws//5)
        keep((network, name, severity, f'{n}/{prior}'), lambda: of_draws(learn, items, there, y, n, prior, n_draws, name=='none'))

def misuse(learn, images, n_judged, n=32):
    "Items of one class only, and of two places: accuracies, beside those of proper items and as trained"
    x,y = split('judged', images, n_judged)
    pool,labels = split('pool', images, n_judged)
    def accuracy(items, there): return figures(adapted(learn, items, 'auto', there)[0], y)['accuracy']
    res = {}
    for name in ('none','contrast','noise'):
        there,items,fogged = place(x, name),place(pool, name),place(pool, 'fog')
        of_class = [accuracy(items[labels==label][:n], there) for label in range(10)]
        proper = [accuracy(items[n*i:n*(i+1)], there) for i in range(5)]
        mixed = [accuracy(torch.cat([items[n*i:n*i+n//2], fogged[n*i+n//2:n*(i+1)]]), there) for i in range(5)]
        res[name] = dict(trained=figures(outputs(learn.model, there), y)['accuracy'], items=mean(proper), one_class=mean(of_class),
                         worst_class=min(of_class), mixed_with_fog=mean(mixed))
    return res

def auc(far, near):
    "The probability that one of `far` is larger than one of `near`"
    far,near = torch.tensor(far)[:,None],torch.tensor(near)[None]
    return ((far>near).float()+.5*(far==near).float()).mean().item()

def distances(learn, x, like, n=32):
    "`BNShift.times` of every `n` of the images"
    rows,n_items = item_rows(learn, batches(x), len(x), 64)
    products = item_products(*like, rows, n_items)
    items = torch.arange(n_items)+like[1]
    apart = [left_out(products, like[1], n, draw) for draw in items.split(n)]
    return [median(far)/median(near) for far,near in apart]

def seen_shifts(learn, images, n=32, draws=20):
    """`bn_shift` at the lowest severity against fresh draws of validation items: areas under the ROC curve.
    No item is in two draws; every shift gets half as many"""
    pool,_ = split('pool', images, 0)
    with torch.no_grad():
        like = item_rows(learn, learn.dls.valid, 8*n, 64)
        near = distances(learn, place(pool[:n*draws], 'none'), like, n)
        far = {name: distances(learn, place(pool[:n*draws//2], name, 0), like, n) for name in corruptions}
    every = [value for values in far.values() for value in values]
    medians = {name: median(values) for name,values in dict(none=near, **far).items()}
    area = {name: auc(values, near) for name,values in far.items()} | dict(all=auc(every, near))
    return dict(area=area, times=medians, most_without_a_shift=max(near))

def mild_shifts(keep, network, learn, images, n_judged):
    "`seen_shifts`, and how many points of accuracy each costs"
    x,y = split('judged', images, n_judged)
    def as_trained(name, severity):
        return keep((network, name, severity, 'as trained'), lambda: figures(trained_outputs(learn, place(x, name, severity)), y))['accuracy']
    res = keep(('mild shifts',), lambda: seen_shifts(learn, images))
    at_home = as_trained('none', 1)
    return res | dict(n_judged=n_judged, costs={name: 100*(at_home-as_trained(name, 0)) for name in corruptions})

def deployed(model, images, cache, n_judged):
    "Adapted to three places, folded, deployed with ONNX Runtime: folded BNs, changed predictions"
    x,_ = split('judged', images, n_judged)
    pool,_ = split('pool', images, n_judged)
    learn,res = learner(model, images, cbs=None),{}
    for name in ('dark','fog','noise'):
        learn.adapt_bn(batches(place(pool[:64], name)))
        there = place(x, name).contiguous()
        with torch.no_grad(): want = torch.cat([learn.model(batch) for batch in there.split(64)]).argmax(1)
        engine = learn.deploy(Path(cache)/'deployed', backend='onnx')
        got = torch.cat([torch.as_tensor(engine(batch.numpy())[0]) for batch in there.split(64)]).argmax(1)
        learn.restore_bn()
        report = engine.report
        res[name] = dict(items=len(want), changed=int((want!=got).sum()), bns=report.n_bn, folded=report.n_folded)
    return res

# --- what it comes to

def table_of(df):
    "Accuracies of one network at the middle severity, place × method"
    return df[df.severity==1].pivot(index='place', columns='method', values='accuracy')

def both(accuracies):
    "Without a shift, mean over the shifts; the mean of these two, and of all places"
    none,shifted = accuracies['none'],accuracies.drop('none').mean()
    return dict(none=none, shifted=shifted, both=(none+shifted)/2, places=accuracies.mean())

def gains(table):
    "Where a shift costs more than 30 points: the mean gain of each number of items; without a shift: the loss"
    trained = table['as trained']
    hard = trained['none']-trained>.3
    res = dict(places=int(hard.sum()), cost=(trained['none']-trained[hard]).mean())
    for n in (*few_ns,*many_ns):
        if f'{n}/auto' not in table: continue
        gain = table[f'{n}/auto']-trained
        res[f'gain, {n}'],res[f'loss without a shift, {n}'] = gain[hard].mean(),-gain['none']
    return res

def summary(rows):
    "Of one network"
    table = table_of(rows)
    return dict(methods={method: both(table[method]) for method in table}, gains=gains(table))

def method_order(method):
    n,_,prior = method.partition('/')
    return (int(n), prior=='auto', float(prior) if prior!='auto' else 0) if prior else (0, method)

def show(name, res):
    print(f'\n{name}: {100*res["validation"]["accuracy"]:.1f} % of the validation set')
    methods = sorted(res['summary']['methods'].items(), key=lambda item: str(method_order(item[0])))
    lines = [[method, *[f'{100*value:.1f}' for value in row.values()]] for method,row in methods]
    print(text_table(['items/prior','no shift','shifted','mean of both','mean of places'], lines))
    for key in ('misuse','mild','deployed'): print(key, json.dumps(res.get(key)))
    print('gains', json.dumps(res['summary']['gains']))

def as_rows(kept):
    "The figures of places, one row each; `spread` is that of the draws' accuracies"
    rows = []
    for key,value in kept.rows.items():
        if len(key)!=4: continue
        row = dict(zip(('place','severity','method'), key[1:]), **value)
        accuracies = row.pop('accuracies', None)
        rows.append(row | dict(spread=stdev(accuracies)) if accuracies else row)
    return pd.DataFrame(rows).round(4)

def kept_of(network, cache, n_judged, draws): return Kept(Path(cache)/f"{network.replace('/', '_')}_{n_judged}x{draws}.jsonl")

def only_mild(network, images, cache, n_judged, draws, found):
    "The figures that were found before, and what `bn_shift` sees of the lowest severity"
    learn = learner(trained(network, images, cache), images)
    with learn.no_bar(): mild = mild_shifts(kept_of(network, cache, n_judged, draws), network, learn, images, n_judged)
    print(network, json.dumps(mild))
    return found | dict(mild=mild)

def measured(network, images, cache, severities, n_judged, draws, ns):
    "All the figures of one network, and their summary"
    model = trained(network, images, cache)
    keep = kept_of(network, cache, n_judged, draws)
    learn = learner(model, images)
    x,y = images['val']
    with learn.no_bar():
        res = dict(n_judged=n_judged, draws=draws, validation=keep(('validation',), lambda: figures(outputs(model, normalized(x)), y)))
        def choose():
            curve = learn.correct_bn()
            if curve.index[curve.chosen][0]: learn.uncorrect_bn()
            return float(curve.index[curve.chosen][0])
        alpha = res['alpha'] = keep(('alpha',), choose)
        places = [('none',1),*[(name, severity) for severity in severities for name in corruptions]]
        for name,severity in progress_bar(places):
            of_place(keep, network, learn, alpha, name, severity, images, n_judged, draws, ns)
        res['mild'] = mild_shifts(keep, network, learn, images, n_judged)
        res['misuse'] = keep(('misuse',), lambda: misuse(learn, images, n_judged))
        res['deployed'] = keep(('deployed',), lambda: deployed(model, images, cache, n_judged))
    rows = as_rows(keep)
    return res | dict(summary=summary(rows), rows=json.loads(rows.to_json(orient='split', index=False)))

def forget(cache, method):
    "Measure a method (as 'auto') again: its rows are taken out of what is kept"
    for file in Path(cache).glob('*.jsonl'):
        lines = file.read_text().splitlines(True)
        file.write_text(''.join(line for line in lines if not json.loads(line)[0][-1].endswith(method)))

@call_parse
def main(
    data:str='imagenette',     # As in `bnfold reproduce`
    networks:str=all_networks, # `name/seed`, separated by commas
    cache:str='out/shift',     # Folder for weights, images and figures
    severities:str='1,0,2',    # In this order: 1 is the middle one
    ns:str='8,16,64,512,1024', # Numbers of items
    n_judged:int=800,          # Images to judge by
    draws:int=10,              # Of items, for up to 64 of them; a fifth as many for more
    again:str='',              # Measure this method again, as 'auto'
    mild:bool=False,           # Only what `bn_shift` sees of the mildest shifts; all else in `out` stays
    out:str='benchmarks/results/shift.json' # Where the figures go
):
    "Accuracy, loss and calibration in other places, as trained and with other statistics"
    Path(cache).mkdir(parents=True, exist_ok=True)
    if again: forget(cache, again)
    images,out = arrays(data, cache),Path(out)
    read = lambda: json.loads(out.read_text()) if out.exists() else dict(networks={})
    severities,ns = ([int(o) for o in text.split(',')] for text in (severities, ns))
    for network in networks.split(','):
        found = read()['networks']
        if mild: res = only_mild(network, images, cache, n_judged, draws, found.get(network, {}))
        else: res = measured(network, images, cache, severities, n_judged, draws, ns)
        out.write_text(json.dumps(dict(machine=machine(), networks=read()['networks'] | {network: res})))
        if not mild: show(network, res)
