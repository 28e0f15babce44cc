"""Integer networks in engines: what their arithmetic is, and how fast it is.

    python benchmarks/integer.py [--parts engines,channels,coverage,latency,resnet50] [--out benchmarks/results/integer.json]

- `engines`: ONNX Runtime and OpenVINO on quantizers and convolutions of integers, beside the same in NumPy, rounding by rounding. A count of 0
  means that the formula is what the engine computes, for all of the millions of values that were tried.
- `channels`: how many channels have a multiplier, a bias and a scale with which the engine is exact, by bits.
- `coverage`: 14 networks of torchvision with random weights and statistics, 4 bits: which layers are integers, and are all integers of the file those
  of the network for an image?
- `latency`: ResNet-18 of width 64 with a 3×3 stem at 64 px, batch 1, one thread: the folded network in float32, its exports as integers, and
  ONNX Runtime's own static int8, in ONNX Runtime and OpenVINO; interleaved rounds in random order, ratios of medians, of the time that passed and of
  the processor's (which other programs on the machine disturb less).
- `resnet50`: ResNet-50 at 224 px, 4 bits, all layers proved exact in both engines: are the outputs for any images those of the network?
"""
import json, os, random, tempfile, time
from pathlib import Path
from statistics import median
import numpy as np, torch
from fastcore.script import call_parse
from torch import nn
from fastai_bnfold.deploy.engines import import_openvino, signal_stack_kept
from fastai_bnfold.fold.folder import BNFolder
from fastai_bnfold.fold.ops import op_name
from fastai_bnfold.fold.report import text_table
from fastai_bnfold.fold.testing import randomize_bn
from fastai_bnfold.integer.engine_scale import engine_arithmetic, engine_scale
from fastai_bnfold.integer.onnx_forms import OnnxGraph, Products, Stored, dequantized
from fastai_bnfold.all import IntegerNet
from fastai_bnfold.integer.task import task_of
from fastai_bnfold.lab.command import machine

f32 = np.float32

# Engines

def onnxruntime_all(model, threads=1):
    "A function from the input to all outputs"
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads,options.log_severity_level = threads,3
    engine = onnxruntime.InferenceSession(model, options, providers=['CPUExecutionProvider'])
    name = engine.get_inputs()[0].name
    return lambda x: engine.run(None, {name: x})

def onnxruntime_of(model):
    "A function from the input to the first output"
    run = onnxruntime_all(model)
    return lambda x: run(x)[0]

def openvino_of(model, threads=1, precision='f32'):
    "The same in OpenVINO"
    core = import_openvino().Core()
    config = {'INFERENCE_NUM_THREADS': threads, 'PERFORMANCE_HINT': 'LATENCY', 'INFERENCE_PRECISION_HINT': precision}
    with signal_stack_kept(): engine = core.compile_model(core.read_model(model), 'CPU', config)
    request = engine.create_infer_request()
    return lambda x: next(iter(request.infer([x]).values())).copy()

engines = dict(onnxruntime=onnxruntime_of, openvino=openvino_of)

def run_both(graph, out, x):
    "engine → output"
    model = graph.model({'x': (x.dtype,x.shape)}, {out: (None,None)}).SerializeToString()
    return {name: make(model)(x) for name,make in engines.items()}

# What they compute

def near_ties(scale, n=5_000_000):
    "Normal numbers, and numbers next to those that are halfway between two integers"
    normal = np.random.default_rng(0).standard_normal(n).astype(f32)
    halves = ((np.arange(-127, 127)+f32(.5)).astype(f32)*scale).astype(f32)
    return np.concatenate([normal, halves, *(np.nextafter(halves, f32(end)) for end in (-9,9))])

def input_quantizers(scale=f32(.032820765)):
    "How many of the inputs an engine rounds otherwise than a formula; zero points × formulas × engines"
    x,res = near_ties(scale),{}
    formulas = {'x/s in float32': lambda zero: np.rint(x/scale),
                'x·(1/s) in float32': lambda zero: np.rint(x*(f32(1)/scale)),
                'x·(1/s)+z in float32': lambda zero: np.rint(x*(f32(1)/scale)+f32(zero))-zero,
                'x/s in float64': lambda zero: np.rint(x.astype(float)/float(scale))}
    for zero in (0,128):
        graph = OnnxGraph()
        stored = graph('QuantizeLinear', 'x', scale, np.uint8(zero))
        got = run_both(graph, graph('DequantizeLinear', stored, f32(1), np.uint8(zero)), x)
        for name,formula in formulas.items():
            want = formula(zero).clip(-zero, 255-zero)
            res[f'{name}, zero point {zero}'] = {engine: int((y!=want).sum()) for engine,y in got.items()}
    graph = OnnxGraph() # rounded first, then stored: nothing is left to chance
    rounded = graph('Clip', graph('Round', graph('Mul', 'x', f32(1)/scale)), f32(-127), f32(127))
    stored = graph('QuantizeLinear', rounded, f32(1), np.uint8(128))
    got = run_both(graph, graph('DequantizeLinear', stored, f32(1), np.uint8(128)), x)
    want = np.rint(x*(f32(1)/scale)).clip(-127, 127)
    res['Mul, Round, Clip, then stored'] = {engine: int((y!=want).sum()) for engine,y in got.items()}
    return res

def layer_outputs(scale, bias, zero, x, weight):
    "A 1×1 convolution between quantizers, in both engines; then the sums without the bias"
    graph,n = OnnxGraph(),len(weight)
    values = dequantized(graph, Stored('x', 0, 255, x.shape))
    w = graph('DequantizeLinear', weight[:,:,None,None].astype(np.int8), scale, np.zeros(n, np.int8), axis=0)
    b = graph('DequantizeLinear', bias.astype(np.int32), scale, axis=0)
    out = graph('QuantizeLinear', graph('Conv', values, w, b, kernel_shape=[1,1]), f32(1), np.uint8(zero))
    sums = np.einsum('oi,bihw->bohw', weight.astype(np.int64), x.astype(np.int64))
    return run_both(graph, out, x), sums

def requantization(n=64, size=64):
    "How many outputs an engine rounds otherwise than a formula"
    draw = np.random.default_rng(1)
    x = draw.integers(0, 256, (1,n,size,size)).astype(np.uint8)
    weight,bias = draw.integers(-127, 128, (n,n)),draw.integers(-100_000, 100_000, n)
    scales = {'powers of two': np.full(n, 2.**-11), 'beside a power of two': 2.**-11*(1+2.**-23*draw.integers(-3, 4, n)),
              'any': 1/draw.integers(1000, 3000, n)}
    res = {}
    for (name,scale),zero in ((scale,zero) for scale in scales.items() for zero in (0,8,128)):
        scale = scale.astype(f32)
        got,sums = layer_outputs(scale, bias, zero, x, weight)
        column = (1,-1,1,1)
        for formula,levels_of in engine_arithmetic.items():
            want = levels_of(sums, bias.reshape(column), scale.reshape(column), zero)+zero
            wrong = {engine: int((y!=want.clip(0, 255)).sum()) for engine,y in got.items()}
            res[f"{formula}'s formula, scales {name}, zero point {zero}"] = wrong
    return res

def engine_facts():
    "Tables of what was found"
    res = dict(input=input_quantizers(), layer=requantization())
    for title,table in res.items():
        rows = [[name, *counts.values()] for name,counts in table.items()]
        print(text_table([f'{title}: rounded otherwise', *engines], rows), '\n')
    return res

# How many channels have a scale

def channel_facts(n=26_560):
    "By bits of activations and weights: channels that are not exact, wrong inputs, seconds"
    rows = []
    for bits,weight_bits in ((2,2),(4,4),(5,5),(6,6),(8,4),(8,8)):
        torch.manual_seed(0)
        task = task_of(randomize_bn(nn.BatchNorm1d(n)), 1e-5, (-2**22,2**22), 5/2**bits, bits)
        begin = time.perf_counter()
        found = engine_scale(task, 127//(2**(weight_bits-1)-1))
        seconds = time.perf_counter()-begin
        wrong = {engine: dict(channels=int((count>0).sum()), inputs=int(count.sum())) for engine,count in found.wrong.items()}
        rows.append(dict(bits=bits, weight_bits=weight_bits, channels=n, inputs=int(found.n_inputs.sum()), seconds=seconds, wrong=wrong))
        print(rows[-1], flush=True)
    return rows

# How fast

class Block(nn.Module):
    "Two convolutions beside a shortcut"
    def __init__(self, n_in, n_out, stride):
        super().__init__()
        self.conv1,self.bn1,self.act1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False),nn.BatchNorm2d(n_out),nn.ReLU()
        self.conv2,self.bn2,self.act2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False),nn.BatchNorm2d(n_out),nn.ReLU()
        short = nn.Conv2d(n_in, n_out, 1, stride, bias=False),nn.BatchNorm2d(n_out)
        self.short = nn.Sequential(*short) if stride!=1 or n_in!=n_out else nn.Identity()

    def forward(self, x):
        y = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        return self.act2(y+self.short(x))

def resnet18(n=64, n_out=10):
    "With a 3×3 stem, and BN statistics of random images"
    torch.manual_seed(0)
    layers,width = [nn.Conv2d(3, n, 3, 1, 1, bias=False), nn.BatchNorm2d(n), nn.ReLU(), nn.MaxPool2d(3, 2, 1)],n
    for i,wider in enumerate((n,2*n,4*n,8*n)):
        layers += [Block(width, wider, 1 if i==0 else 2), Block(wider, wider, 1)]
        width = wider
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, n_out)).train()
    with torch.no_grad():
        for _ in range(8): net(torch.randn(16, 3, 64, 64))
    return net.eval()

def static_int8(file, images, to):
    "ONNX Runtime's own quantization of a file, per channel"
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    import onnxruntime
    name = onnxruntime.InferenceSession(str(file), providers=['CPUExecutionProvider']).get_inputs()[0].name
    class Reader(CalibrationDataReader):
        def __init__(self): self.left = iter(images.numpy())
        def get_next(self): return next(({name: image[None]} for image in self.left), None)
    quantize_static(str(file), str(to), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
                    weight_type=QuantType.QInt8, activation_type=QuantType.QUInt8)
    return to.read_bytes()

exports = [('4 bits',4,{}), ('6 bits',6,{}), ('6 bits for OpenVINO',6,dict(engine='openvino')), ('8 bits',8,{}),
           ('8 bits, following',8,dict(follow=True)), ('8 bits, nearest',8,dict(exact=False))]

def exported(folder, model, images):
    "What is timed: name → ONNX file as bytes; and facts about the exports"
    folded = BNFolder().fold(model, images[:2])
    file = folder/'float32.onnx'
    torch.onnx.export(folded, (images[:1],), file, dynamo=True, verbose=False, external_data=False)
    files,facts = {'float32': file.read_bytes(), 'static int8': static_int8(file, images, folder/'int8.onnx')},{}
    for name,bits,options in exports:
        net = IntegerNet(model, [images], bits)
        if options.get('follow'): net.follow_engine()
        want = net(images[:1]).numpy()
        card = net.export(folder/'net.onnx', images[:1], **{k: v for k,v in options.items() if k!='follow'})
        files[name] = (folder/'net.onnx').read_bytes()
        err = {engine: float(abs(make(files[name])(images[:1].numpy())-want).max()/abs(want).max()) for engine,make in engines.items()}
        wrong = {engine: [layer.wrong[engine] for layer in card.layers] for engine in engines}
        sums = {engine: None if None in counts else sum(counts) for engine,counts in wrong.items()}
        facts[name] = dict(card=str(card), bytes=len(files[name]), max_err=err, wrong=sums, inputs=sum(layer.inputs for layer in card.layers))
        print(name, facts[name], flush=True)
    return files, facts

def latency_facts(rounds=60):
    "Medians and ratios, in both engines"
    torch.set_num_threads(1)
    model,images = resnet18(),torch.randn(16, 3, 64, 64)
    with tempfile.TemporaryDirectory() as folder: files,facts = exported(Path(folder), model, images)
    runs = {f'{name}, {engine}': make(file) for name,file in files.items() for engine,make in engines.items()}
    runs['bfloat16, openvino'] = openvino_of(files['float32'], precision='bf16')
    x,wall,cpu = images[:1].numpy(),{name: [] for name in runs},{name: [] for name in runs}
    order = list(runs)
    for i in range(rounds+3):
        random.shuffle(order) # no one comes always behind the same other
        for name in order:
            begin = time.perf_counter(),time.process_time()
            runs[name](x)
            end = time.perf_counter(),time.process_time()
            if i<3: continue
            wall[name].append(end[0]-begin[0])
            cpu[name].append(end[1]-begin[1])
    res = {name: dict(ms=1e3*median(wall[name]), cpu_ms=1e3*median(cpu[name])) for name in runs}
    base = res['float32, onnxruntime']
    for v in res.values(): v.update(times_as_fast=base['ms']/v['ms'], cpu_times_as_fast=base['cpu_ms']/v['cpu_ms'])
    rows = [[name, *(f'{v[key]:.2f}' for key in ('ms','times_as_fast','cpu_ms','cpu_times_as_fast'))] for name,v in res.items()]
    print(text_table(['batch 1, one thread','ms','times float32','ms of the processor','times float32'], rows))
    return dict(rounds=rounds, load=os.getloadavg()[0], exports=facts, latency=res)

# A large network, for any images

def resnet50_facts(size=224, bits=4):
    "ResNet-50, all layers exact in both engines: outputs for any images"
    import torchvision
    torch.manual_seed(0)
    model = torchvision.models.resnet50(num_classes=10).train()
    with torch.no_grad():
        for _ in range(4): model(torch.randn(8, 3, size, size))
    net = IntegerNet(model.eval(), [torch.randn(4, 3, size, size)], bits)
    with tempfile.TemporaryDirectory() as folder:
        card = net.export(Path(folder)/'net.onnx', torch.randn(1, 3, size, size), integers=True)
        file = (Path(folder)/'net.onnx').read_bytes()
    images,res = torch.randn(8, 3, size, size),dict(card=str(card))
    want = net(images).numpy()
    for engine,make in engines.items():
        err = abs(make(file)(images.numpy())-want).max(1)/abs(want).max(1)
        res[engine] = dict(images_with_other_outputs=int((err>1e-5).sum()), of=len(images), max_err=float(err.max()))
    print(res, flush=True)
    return res

# Which networks

families = dict(resnet18=64, resnet50=64, vgg16_bn=224, mobilenet_v2=64, mobilenet_v3_small=64, mnasnet0_5=64, densenet121=64, efficientnet_b0=64,
                googlenet=64, inception_v3=96, shufflenet_v2_x0_5=64, regnet_x_400mf=64, regnet_y_400mf=64, resnext50_32x4d=64) # → pixels

def family_facts(name, size, bits=4):
    "How much of a network of torchvision, with random weights and statistics, is integers; are those of its file the same for an image?"
    import torchvision
    torch.manual_seed(0)
    options = dict(init_weights=False) if name in ('googlenet','inception_v3') else {}
    model = randomize_bn(torchvision.models.get_model(name, weights=None, **options)).eval()
    images = torch.randn(4, 3, size, size)
    net = IntegerNet(model, [images], bits)
    seen,n_bn = {},sum(op_name(node)=='batch_norm' for node in net.nodes.values()) # those that run
    net(images[:1], see=lambda name, value: seen.update({name: value.numpy()}))
    with tempfile.TemporaryDirectory() as folder:
        card = net.export(Path(folder)/'net.onnx', images[:1], integers=True)
        runtime = onnxruntime_all((Path(folder)/'net.onnx').read_bytes())
    found = dict(zip(card.integers, runtime(images[:1].numpy())[net.n_outputs:]))
    other = [value for value,ints in found.items() if not np.array_equal(ints, seen[value.removeprefix('integers_')])]
    kinds = net.layers().kind.value_counts().to_dict()
    return dict(pixels=size, n_bn=n_bn, bns_on_integers=len(net.layout.bns),
                kinds=kinds, real=net.layout.reasons, card=str(card), exact={engine: card.is_exact(engine) for engine in engines},
                values=len(found), values_that_differ=len(other))

def coverage_facts():
    "Layers on integers in 14 networks of torchvision"
    res = {}
    for name,size in families.items():
        res[name] = family_facts(name, size)
        print(name, res[name], flush=True)
    return res

parts_of = dict(coverage=coverage_facts, engines=engine_facts, channels=channel_facts, latency=latency_facts, resnet50=resnet50_facts)

@call_parse
def main(
    parts:str='engines,channels,coverage,latency,resnet50', # Which, with commas
    out:str='benchmarks/results/integer.json' # Where the figures go
):
    "Integer networks in engines"
    res = json.loads(Path(out).read_text()) if Path(out).exists() else {}
    res['machine'] = machine()
    for part in parts.split(','):
        res[part] = parts_of[part]()
        Path(out).write_text(json.dumps(res, indent=1))
