"""Quantization-aware training on ImageNette: accuracy by bits, after training and aware, and what becomes of the predictions in the integer network and in its file.

    python benchmarks/aware.py [--networks resnet18/0,mobilenet/0] [--cache FOLDER] [--out benchmarks/results/aware.json]

The networks are those of `benchmarks/shift.py`, trained as there (64 pixels; their weights and the images are kept in the folder `cache`). From these, each number of
bits begins anew: a few epochs of `learn.fit_one_cycle(..., cbs=QuantAware(bits))` with a distilled loss, first and last layer with 8 bits; then `learn.reestimate_bn()`. Accuracy is that of all 3,925 validation images, in float32.
"""
import json, tempfile
from pathlib import Path
import numpy as np
from fastai.vision.all import *
from copy import deepcopy
from fastcore.script import call_parse
from torch.utils.data import DataLoader as TorchLoader, Dataset
from fastai_bnfold.all import *
from fastai_bnfold.integer.quantizers import quantizers_of
from fastai_bnfold.fold.report import text_table
from fastai_bnfold.lab.command import machine
from fastai_bnfold.lab.training import AutocastCPU
from integer import onnxruntime_all
from shift import arrays, augmented, normalized, trained

# Data

class Images(Dataset):
    "Images, uint8, with labels"
    def __init__(self, x, y): self.x,self.y = x,y
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i],self.y[i]

def stacked(items): return (torch.stack(o) for o in zip(*items))

def for_training(items):
    x,y = stacked(items)
    return augmented(x, 64), y

def for_validation(items):
    x,y = stacked(items)
    return normalized(x), y

def loaders(images, bs):
    train = TorchLoader(Images(*images['train']), bs, shuffle=True, drop_last=True, collate_fn=for_training)
    valid = TorchLoader(Images(*images['val']), 128, collate_fn=for_validation)
    return DataLoaders(train, valid)

# Training

class Distill(Callback):
    "The loss is half that of the labels, half the distance to the outputs of the network before it was quantized"
    def __init__(self, teacher): self.teacher = teacher.eval()

    def after_loss(self):
        if not self.training: return
        with torch.no_grad(): wanted = self.teacher(*self.xb).float().softmax(1)
        distance = F.kl_div(self.pred.float().log_softmax(1), wanted, reduction='batchmean')
        self.learn.loss_grad = (self.learn.loss_grad+distance)/2
        self.learn.loss = self.learn.loss_grad.clone()

recipes = dict(resnet18={4: dict(epochs=2, lr=1e-3), 2: dict(epochs=6, lr=2e-3)}, # bits → how they are trained
               mobilenet={4: dict(epochs=2, lr=4e-3)}) # depthwise convolutions train slowly on a CPU

def aware(network, bits, model, images, cache):
    "A copy of the network, trained for a few bits, with statistics of the network as it is then; made once"
    file = Path(cache)/f"{network.replace('/','_')}_{bits}bits.pt"
    if not file.exists():
        set_seed(0)
        loss_func = LabelSmoothingCrossEntropyFlat(eps=.05)
        learn = Learner(loaders(images, 64), deepcopy(model), loss_func=loss_func)
        recipe = recipes[network.split('/')[0]][bits]
        learn.fit_one_cycle(recipe['epochs'], recipe['lr'], cbs=[AutocastCPU(), QuantAware(bits), Distill(deepcopy(model))])
        learn.reestimate_bn()
        torch.save(learn.model.eval(), file)
    return torch.load(file, weights_only=False)

# What comes of it

@torch.no_grad()
def outputs(model, x): return torch.cat([model(normalized(part)) for part in x.split(128)])

def accuracy_of(outs, y): return (outs.argmax(1)==y).float().mean().item()
def changed(outs, others): return (outs.argmax(1)!=others.argmax(1)).sum().item()

def judged(net, outs, x, y):
    "Accuracy of an integer network, and how many predictions are others than `outs`"
    found = outputs(net, x)
    return dict(accuracy=accuracy_of(found, y), changed=changed(found, outs))

def after_training(model, images, bits, outs):
    "Without training: the scales of 128 images"
    x,y = images['val']
    few = normalized(images['train'][0][:128,:,4:68,4:68])
    return judged(IntegerNet(model, [few[:64],few[64:]], bits, first_bits=8), outs, x, y)

def of_the_file(net, x, outs):
    "The exported network in ONNX Runtime: predictions that are others than `outs`; values with integers that are others, for 64 images"
    with tempfile.TemporaryDirectory() as folder:
        card = net.export(Path(folder)/'net.onnx', normalized(x[:1]), integers=True)
        engine = onnxruntime_all(str(Path(folder)/'net.onnx'))
    def of_engine(part): return engine(normalized(part).numpy())
    seen,first = {},normalized(x[:64])
    net(first, see=lambda name, value: seen.update({name: value.numpy()}))
    names = [name.removeprefix('integers_') for name in card.integers]
    other = [name for name,ints in zip(names, of_engine(x[:64])[net.n_outputs:]) if not np.array_equal(ints, seen[name])]
    predictions = torch.cat([torch.from_numpy(of_engine(part)[0]) for part in x.split(64)]) # (the integers of all images would take 16 GB)
    return dict(card=str(card), changed=changed(predictions, outs), values=len(names), values_that_differ=len(other))

def facts(network, images, cache):
    "Everything about a network"
    x,y = images['val']
    model = trained(network, images, cache)
    outs = outputs(model, x)
    res = dict(float=accuracy_of(outs, y), after={bits: after_training(model, images, bits, outs) for bits in (8,4,2)}, aware={})
    for bits,recipe in recipes[network.split('/')[0]].items():
        quantized = aware(network, bits, model, images, cache)
        net = quantizers_of(quantized).integer_net(quantized)
        wide = deepcopy(quantized).double()
        fake,fake64,whole = outputs(quantized, x),outputs(lambda x: wide(x.double()), x),outputs(net, x)
        res['aware'][bits] = recipe | dict(accuracy=accuracy_of(fake, y), changed_from_float=changed(fake, outs), integer=accuracy_of(whole, y),
            changed_float32=changed(fake, whole), changed_float64=changed(fake64, whole), max_err_float64=((fake64-whole).abs().max()/whole.abs().max()).item(),
            file=of_the_file(net, x, whole))
    print(network, res, flush=True)
    return res

@call_parse
def main(
    networks:str='resnet18/0,resnet18/1,mobilenet/0', # Names and seeds, with commas
    cache:str='aware_cache',  # Where images and weights are kept
    out:str='benchmarks/results/aware.json' # Where the figures go
):
    "Few bits, after training and aware"
    torch.set_num_threads(1)
    Path(cache).mkdir(exist_ok=True)
    images = arrays(os.environ.get('IMAGENETTE', ''), cache)
    res = json.loads(Path(out).read_text()) if Path(out).exists() else {}
    res['machine'] = machine()
    for network in networks.split(','):
        res[network] = facts(network, images, cache)
        Path(out).write_text(json.dumps(res, indent=1))
    rows = [[network, f"{found['float']:.4f}", *(f"{v['accuracy']:.4f}" for v in (*found['after'].values(), *found['aware'].values()))]
            for network,found in res.items() if network!='machine']
    print(text_table(['accuracy','float','8 bits after','4 after','2 after','4 aware','2 aware'], rows))
