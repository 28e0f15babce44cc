"""int8 and bfloat16 beside float32: latency in ONNX Runtime and OpenVINO, with and without folding first; what cross-layer equalization is worth.

    python benchmarks/precision.py [--part latency,equalization] [--networks resnet50,mobilenet_v2] [--cache FOLDER] [--out benchmarks/results/precision.json]

Latency: networks with random weights and BN statistics of their own activations, 224 pixels, a batch of one, one thread; interleaved rounds, medians.
Equalization (Nagel et al. 2019): MobileNetV2 of half width, trained on ImageNette at 64 pixels by `benchmarks/shift.py`, whose folder of weights `cache` is;
the accuracy of int8 on the validation set, with a scale for every channel of a weight and with one for all, before and after the weights of neighbouring
convolutions are made as large as each other. A ReLU6 then has a bound for every channel, or becomes a ReLU, as in the article.
"""
import copy, json, tempfile, warnings
from pathlib import Path
import onnx, torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from fastcore.script import call_parse
from onnxruntime.quantization.shape_inference import quant_pre_process
from fastai_bnfold.all import *
from fastai_bnfold.deploy.engines import backends, load_engine, openvino_capabilities
from fastai_bnfold.deploy.export import export_model, graph_names
from fastai_bnfold.deploy.precision import Calibration, quantize_onnx
from fastai_bnfold.fold.report import text_table
from fastai_bnfold.fold.verify import max_err
from fastai_bnfold.lab.command import machine
from fastai_bnfold.lab.models import example, find_model, subnormal_share, warm_up
from fastai_bnfold.timing import interval, latency, median, ratios

def write(model, args, folder, fold=True):
    "An ONNX file of the model, in a new folder; the name of its input"
    folder.mkdir()
    program = export_model(model, args)
    if fold: program = BNFolder(**backends['onnx'].options).fold_graph(program)
    backends['onnx'](program, folder)
    return graph_names(program)[0]

def quantized(file, name, batches, to='int8.onnx', **options):
    "A file beside it, with integers"
    to = file.with_name(to)
    quantize_onnx(file, to, Calibration([[x.numpy()] for x in batches], [name]), **options)
    return to

# --- latency

def variants(model, folder):
    "Name → (file, precision); and the name of the input"
    two = example(model, 2)
    name = write(model, two, folder/'folded')
    write(model, two, folder/'left', fold=False)
    (folder/'preprocessed').mkdir()
    quant_pre_process(str(folder/'left'/'model.onnx'), str(folder/'preprocessed'/'model.onnx'), skip_symbolic_shape=True)
    batches = [torch.randn(4,3,224,224, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    floats = {kind: folder/kind/'model.onnx' for kind in ('folded','left','preprocessed')}
    ints = {kind: quantized(file, name, batches) for kind,file in floats.items()}
    res = {('f32','folded'): (floats['folded'], 'f32'), ('f32','left'): (floats['left'], 'f32'), ('bf16','folded'): (floats['folded'], 'bf16')}
    return res | {('int8',kind): (file, 'int8') for kind,file in ints.items()}, name

def n_bns(file): return sum(node.op_type=='BatchNormalization' for node in onnx.load(file).graph.node)

def runners(files, name, x):
    "(engine, precision, BNs) → function without arguments"
    res = {}
    for backend in ('onnx','openvino'):
        for (precision,kind),(file,_) in files.items():
            if precision not in backends[backend].precisions: continue
            if precision=='bf16' and 'BF16' not in openvino_capabilities(): continue
            res[backend,precision,kind] = lambda run=load_engine(backend, file, 1, precision): run({name: x.numpy()})
    return res

def latency_of(network, seconds, folder):
    torch.manual_seed(0)
    model = warm_up(find_model(network)[0], 224)
    x, = args = example(model, 1)
    files,name = variants(model, folder)
    fns = runners(files, name, x)
    with torch.no_grad(): want = model(x)
    errs = {key: max_err([want], [torch.from_numpy(fn()[0])]) for key,fn in fns.items()}
    times = latency(fns, seconds, max_rounds=2000, warm=.01)
    rows = []
    for key in fns:
        over = ratios(times, (key[0],'f32','folded'), key)
        rows.append(dict(engine=key[0], precision=key[1], bns=key[2], ms=1e3*median(times[key]), times_as_fast=median(over), interval=interval(over), rounds=len(over), max_err=errs[key]))
    print(network)
    print(text_table(['engine','precision','BNs','ms','times as fast','95 %','max_err'],
                     [[r['engine'], r['precision'], r['bns'], f"{r['ms']:.1f}", f"{r['times_as_fast']:.2f}", '–'.join(f'{v:.2f}' for v in r['interval'] or ()), f"{r['max_err']:.0e}"] for r in rows], left=3), flush=True)
    return dict(subnormal_share=subnormal_share(model, args), batch_norms_in_file={kind: n_bns(folder/kind/'model.onnx') for kind in ('folded','left','preprocessed')}, rows=rows)

# --- equalization

class ClipEach(nn.Module):
    "ReLU6 whose upper bound was scaled, channel by channel"
    def __init__(self, high):
        super().__init__()
        self.register_buffer('high', high.view(1,-1,1,1))
    def forward(self, x): return torch.minimum(x.relu(), self.high)

def folded_modules(model):
    "The model with its BNs in the convolutions, as modules"
    model = copy.deepcopy(model)
    for seq in [module for module in model.modules() if isinstance(module, nn.Sequential)]:
        for i in range(len(seq)-1):
            if not isinstance(seq[i+1], nn.BatchNorm2d): continue
            seq[i],seq[i+1] = fuse_conv_bn_eval(seq[i], seq[i+1]),nn.Identity()
    return model

def chains(model):
    "Of every block of a MobileNetV2: the convolutions in a row, with the `Sequential` of the ReLU6 behind each"
    for i,block in enumerate(model.features[1:-1]):
        rows = [(part[0],part) if isinstance(part, nn.Sequential) else (part,None) for part in block.conv if not isinstance(part, nn.Identity)]
        yield [(model.features[0][0],model.features[0]), *rows] if i==0 else rows

def per_channel(weight, dim): return weight.abs().amax([d for d in range(4) if d!=dim])

@torch.no_grad()
def balance(first, second):
    "`W1/s, W2·s` so that the largest weight of a channel is as large in both; `s`"
    depthwise = second.groups>1
    a,b = per_channel(first.weight, 0),per_channel(second.weight, 0 if depthwise else 1)
    s = ((a*b).sqrt()/b).nan_to_num(1, 1, 1).clamp(1e-4, 1e4)
    s[a*b==0] = 1
    first.weight /= s.view(-1,1,1,1)
    first.bias /= s
    second.weight *= s.view(-1,1,1,1) if depthwise else s.view(1,-1,1,1)
    return s

def set_clip(seq, make):
    i = next(i for i,layer in enumerate(seq) if isinstance(layer, nn.ReLU6))
    seq[i] = make()

def equalized(model, bounds, rounds=20):
    "Cross-layer equalization of a folded MobileNetV2; `bounds`: scale the bounds of ReLU6, else there are none"
    model = copy.deepcopy(model)
    for chain in chains(model):
        scales = [1]*(len(chain)-1)
        for _ in range(rounds):
            for i,((first,_),(second,_)) in enumerate(zip(chain, chain[1:])): scales[i] = scales[i]*balance(first, second)
        for (_,seq),s in zip(chain, scales): set_clip(seq, (lambda: ClipEach(6/s)) if bounds else nn.ReLU)
    return model

def predictions(run, x): return torch.cat([torch.from_numpy(run(part.numpy())).argmax(1) for part in x.split(64)])

def equalization(cache, every):
    from shift import arrays, normalized, trained
    images = arrays(None, cache)
    model = trained('mobilenet/0', images, cache).to(memory_format=torch.contiguous_format)
    x,y = normalized(images['val'][0][::every]).contiguous(),images['val'][1][::every]
    idxs = torch.randperm(len(images['train'][0]), generator=torch.Generator().manual_seed(0))[:256]
    batches = [part.contiguous() for part in normalized(images['train'][0][idxs][:,:,4:68,4:68]).split(32)]
    plain,rows = folded_modules(model),[]
    nets = {'as it is': plain, 'equalized, bounds per channel': equalized(plain, True), 'equalized, ReLU': equalized(plain, False)}
    for kind,net in nets.items():
        with tempfile.TemporaryDirectory() as d:
            name = write(net, (batches[0][:2],), Path(d)/'f32', fold=False)
            file = Path(d)/'f32'/'model.onnx'
            files = {'float32': file} | {f'int8, scales per {each}': quantized(file, name, batches, f'{each}.onnx', per_channel=each=='channel') for each in ('channel','weight')}
            for how,which in files.items():
                run = load_engine('onnx', which, 1, 'f32' if which==file else 'int8')
                p = predictions(lambda part: run({name: part})[0], x)
                if not rows: want = p
                rows.append(dict(network=kind, precision=how, accuracy=(p==y).float().mean().item(), n_changed=int((p!=want).sum())))
                print(rows[-1], flush=True)
    return dict(n_items=len(y), rows=rows)

@call_parse
def main(
    part:str='latency,equalization',            # What to measure
    networks:str='resnet50,mobilenet_v2',       # For latency
    seconds:float=120,                          # For each network's latencies
    cache:str='out/shift',                      # Folder of `benchmarks/shift.py`
    every:int=1,                                # Of the validation images, for equalization
    out:str='benchmarks/results/precision.json' # Where the figures go; other parts that are there stay
):
    "Latency and accuracy in fewer bits"
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    res = json.loads(out.read_text()) if out.exists() else {}
    if 'latency' in part:
        for network in networks.split(','):
            with tempfile.TemporaryDirectory() as d: found = latency_of(network, seconds, Path(d))
            res.setdefault('latency', {})[network] = dict(machine=machine(), **found)
            out.write_text(json.dumps(res, indent=1))
    if 'equalization' in part:
        res['equalization'] = dict(machine=machine(), **equalization(cache, every))
        out.write_text(json.dumps(res, indent=1))
    print(f'All figures: {out}')
