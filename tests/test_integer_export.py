"Integers in an engine's own arithmetic: right for every input, or said not to be"
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from fastai_bnfold.fold.testing import randomize_bn
from fastai_bnfold.integer.engine_scale import (EngineScale, engine_arithmetic, engine_scale, first_products, n_different,
                                                onnxruntime_levels, pair_limit, room_of)
from fastai_bnfold.integer.fixed_point import FixedPointBN, exact_bn
from fastai_bnfold.integer.onnx_forms import (OnnxGraph, Products, Stored, added, clipped, concatenated, conv_integer_sums,
                                              engine_layer, float_line, float_sums, line_staircase, looked_up,
                                              matmul_sums, partial_bound, quantized,
                                              shift_staircase, summing)
from fastai_bnfold.integer.task import task_of

def make(weight, bias, mean, var, eps=1e-5):
    "A BN with these numbers"
    bn = nn.BatchNorm1d(len(weight), eps=eps).double().eval()
    numbers = zip((bn.weight,bn.bias,bn.running_mean,bn.running_var), (weight,bias,mean,var))
    with torch.no_grad():
        for stored,value in numbers: stored.copy_(torch.as_tensor(value, dtype=torch.float64))
    return bn

def differ(found, bn, *args, engine='onnxruntime'):
    "For how many inputs the engine's output is not the exact one, per channel: all of them are tried"
    lo,hi = args[1]
    x = torch.arange(lo, hi+1)[:,None].expand(-1, len(bn.weight))
    return (found(x.numpy(), engine)!=exact_bn(x, bn, *args).numpy()).sum(0)

numbers = st.one_of(st.sampled_from([-2.,-1.,-.5,0.,.25,.5,1.,3.,1e-6,-1e-6,1e-30,1e6,-1e6]), st.floats(-4, 4, allow_subnormal=False))
scales = st.one_of(st.sampled_from([.125,.5,1.,1e-3]), st.floats(.01, 2))

@pytest.mark.parametrize('engine', engine_arithmetic)
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(g=numbers, b=numbers, m=numbers, v=st.sampled_from([.25,1.,4.,.3]), s_in=scales, s_out=scales, lo=st.integers(-150,50),
       width=st.integers(0,300), bits=st.integers(1,5), signed=st.booleans(), room=st.integers(1,127))
def test_every_input(engine, g, b, m, v, s_in, s_out, lo, width, bits, signed, room):
    "Tiny and huge slopes, negative and zero γ, one step, no step: what is said to be wrong is wrong, and nothing else"
    bn,args = make([g], [b], [m], [v]),(s_in, (lo,lo+width), s_out, bits, signed)
    found = engine_scale(task_of(bn, *args), room)
    assert differ(found, bn, *args, engine=engine).tolist()==found.wrong[engine].tolist()

@pytest.mark.parametrize('engine', engine_arithmetic)
@pytest.mark.parametrize('bits,room', [(8,1),(8,3),(4,18),(2,127)])
def test_every_input_of_many_channels(bits, room, engine):
    torch.manual_seed(bits)
    bn = randomize_bn(nn.BatchNorm1d(40))
    args = (3e-4, (-20000,30000), 3/2**bits, bits)
    found = engine_scale(task_of(bn, *args), room)
    assert differ(found, bn, *args, engine=engine).tolist()==found.wrong[engine].tolist()

def many(bits, room):
    torch.manual_seed(0)
    return engine_scale(task_of(randomize_bn(nn.BatchNorm1d(500)), 1e-4, (-2**18,2**18), 3/2**bits, bits), room)

@pytest.mark.parametrize('bits,room,share', [(2,127,1.),(4,18,.99),(5,8,.8)])
def test_few_bits_have_a_scale(bits, room, share): assert (many(bits, room).wrong['onnxruntime']==0).mean()>=share

def test_eight_bits_have_hardly_any(): assert (many(8, 1).wrong['onnxruntime']>0).mean()>.9
def test_what_is_wrong_is_one_product_away(): assert many(8, 1).wrong['onnxruntime'].max()<=255
def test_spare_bits_help(): assert many(4, 18).wrong['onnxruntime'].sum()<many(4, 1).wrong['onnxruntime'].sum()

def one(weight=1., bias=0., mean=0., var=1., range_=(-100,100), bits=4, signed=False, room=18, in_scale=.1, out_scale=.5):
    return engine_scale(task_of(make([weight], [bias], [mean], [var]), in_scale, range_, out_scale, bits, signed), room)

def test_negative_gamma_has_a_negative_multiplier(): assert one(weight=-1.).multiplier[0]<0
def test_positive_gamma_has_a_positive_multiplier(): assert one().multiplier[0]>0
def test_zero_gamma_is_a_bias(): assert (one(weight=0., bias=2.).multiplier[0], one(weight=0., bias=2.).bias[0])==(0,4)
def test_zero_gamma_is_exact(): assert one(weight=0., bias=2.).is_exact()
def test_a_constant_beyond_the_levels(): assert one(weight=0., bias=200.).bias[0]==15
def test_a_constant_below_zero(): assert one(weight=0., bias=-200., signed=True).bias[0]==-8
def test_a_channel_that_never_steps(): assert one(range_=(3,3)).is_exact()
def test_one_step_far_from_zero(): assert one(bias=3., range_=(0,9)).is_exact()
def test_all_levels_in_one_step(): assert one(weight=1e9).is_exact()
def test_a_slope_of_nearly_nothing(): assert one(weight=1e-12, bias=1.).is_exact()
def test_multiplier_within_its_room(): assert all(abs(one(room=m).multiplier[0])<=m for m in (1,2,18))

def test_sums_beyond_int32_have_none():
    found = one(range_=(0,2**33), in_scale=1e-9)
    assert found.wrong['onnxruntime'].tolist()==found.n_inputs.tolist()

def test_sums_stay_within_int32():
    found = one(range_=(-2**30,2**30), in_scale=1e-8, room=127)
    assert max(abs(int(found.multiplier[0])*x+int(found.bias[0])) for x in (-2**30,2**30))<2**31

@pytest.mark.parametrize('engine', engine_arithmetic)
@pytest.mark.parametrize('zero', [0,8,128])
@pytest.mark.parametrize('bias,scale', [(0,.1),(12345,1e-3),(-10**6,3e-5),(2**30,1e-8),(-2**29,7e-8),(5,2.**-20)])
def test_first_products_are_first(bias, scale, zero, engine):
    "Thresholds of bisection, at both edges of every step"
    levels_of,levels = engine_arithmetic[engine],np.arange(-zero+1, 256-zero)
    bias,scale = np.array([bias]),np.array([scale], np.float32)
    first = first_products(levels_of, bias, scale, zero, levels)[0]
    at,before = (levels_of(p, bias, scale, zero) for p in (first,first-1))
    assert (at>=levels).all() and (before<levels).all()

def test_no_differences(): assert n_different(np.array([[2,5]]), np.array([[2,5]]), np.array([0])).tolist()==[0]

@pytest.mark.parametrize('seed', range(20))
def test_differences_are_counted_once(seed):
    draw = np.random.default_rng(seed)
    one,other = np.sort(draw.integers(-5, 30, (2,6)), 1)
    x = np.arange(-5, 31)
    levels = [np.searchsorted(first, x, 'right') for first in (one,other)]
    assert n_different(one[None], other[None], np.array([-5])).tolist()==[(levels[0]!=levels[1]).sum()]

def test_room(): assert room_of(np.array([[[7]],[[-127]],[[0]]])).tolist()==[18,1,127]
def test_pairs_fit_into_16_bits(): assert all(2*top*pair_limit(top)<2**15 for top in range(1, 256))
def test_the_largest_that_fit(): assert 2*255*(pair_limit(255)+1)>=2**15

# the engines themselves

def graph(form, found, weight, n_positions):
    "One 1×1 convolution of inputs from 0 to 255, with multiplied weights"
    onnx = pytest.importorskip('onnx')
    make_,array = onnx.helper,onnx.numpy_helper.from_array
    zero = np.uint8(-found.qmin)
    w = (weight*found.multiplier[:,None])[:,:,None,None]
    assert abs(w).max()<=127
    values = dict(one=np.float32(1), none=np.uint8(0), zero=zero, w=w.astype(np.int8), scale=found.scale,
                  zeros=np.zeros(len(w), np.int8), bias=found.bias)
    if form=='qlinear':
        inputs = ['x','one','none','w','scale','zeros','one','zero','bias']
        nodes = [make_.make_node('QLinearConv', inputs, ['y'])]
    else:
        ends = [('DequantizeLinear', ['x','one','none'], 'x1', {}), ('DequantizeLinear', ['w','scale','zeros'], 'w1', dict(axis=0)),
                ('DequantizeLinear', ['bias','scale'], 'b1', dict(axis=0)), ('Conv', ['x1','w1','b1'], 'sums', {}),
                ('QuantizeLinear', ['sums','one','zero'], 'y', {})]
        nodes = [make_.make_node(op, inputs, [to], **options) for op,inputs,to,options in ends]
    port = make_.make_tensor_value_info
    shape = [1, weight.shape[1], 1, n_positions]
    uint8 = onnx.TensorProto.UINT8
    made = make_.make_graph(nodes, 'layer', [port('x', uint8, shape)], [port('y', uint8, None)],
                            [array(np.asarray(v), k) for k,v in values.items()])
    return make_.make_model(made, opset_imports=[make_.make_opsetid('', 21)], ir_version=10)

def run_onnxruntime(model, x):
    runtime = pytest.importorskip('onnxruntime')
    options = runtime.SessionOptions()
    options.add_session_config_entry('session.x64quantprecision', '1')
    return runtime.InferenceSession(model.SerializeToString(), options, providers=['CPUExecutionProvider']).run(None, {'x': x})[0]

def run_openvino(model, x):
    pytest.importorskip('openvino')
    from fastai_bnfold.deploy.engines import import_openvino, signal_stack_kept
    core = import_openvino().Core()
    with signal_stack_kept():
        read = core.read_model(model.SerializeToString())
        compiled = core.compile_model(read, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32', 'INFERENCE_NUM_THREADS': 1})
    return list(compiled([x]).values())[0]

weight = np.tile([[7,7,7,7,7,7,7,1,-7,-7,-7,-7]], (40,1))

def all_sums():
    "Inputs for which the sums are all integers from -7·1020 to 7·1785+6, and these"
    sums = np.arange(-7*4*255, 7*7*255+7)
    ones,sevens = sums%7,sums//7
    def spread(total, n): return np.stack([(total-255*i).clip(0, 255) for i in range(n)])
    x = np.concatenate([spread(sevens.clip(0), 7), ones[None], spread((-sevens).clip(0), 4)])
    return x.astype(np.uint8)[None,:,None], sums

def layer(bits, signed, n=40):
    torch.manual_seed(bits)
    bn = randomize_bn(nn.BatchNorm1d(n))
    args = (2e-4, (-7*4*255,7*7*255+6), 3/2**bits, bits, signed)
    return bn, args, engine_scale(task_of(bn, *args), room_of(weight))

@pytest.mark.parametrize('run,engine,form', [(run_onnxruntime,'onnxruntime','qlinear'), (run_onnxruntime,'onnxruntime','qdq'),
                                             (run_openvino,'openvino','qdq')])
@pytest.mark.parametrize('bits,signed', [(2,False),(4,False),(4,True),(8,False),(8,True)])
def test_the_engine_computes_what_we_say(run, engine, form, bits, signed):
    "All inputs of 40 channels, bit by bit; engines clip at 0 and 255, so do we"
    bn,args,found = layer(bits, signed)
    x,sums = all_sums()
    stored = run(graph(form, found, weight, len(sums)), x)[0,:,0]
    got = (stored.astype(int)+found.qmin).clip(found.qmin, found.qmax)
    assert (got==found(np.tile(sums, (1,40,1)), engine)[0]).all()

@pytest.mark.parametrize('run,engine', [(run_onnxruntime,'onnxruntime'), (run_openvino,'openvino')])
def test_the_engine_is_exact_where_we_say_so(run, engine):
    bn,args,found = layer(4, False)
    x,sums = all_sums()
    stored = run(graph('qdq', found, weight, len(sums)), x)[0,:,0].clip(0, 15)
    want = exact_bn(torch.from_numpy(sums)[:,None].expand(-1, 40), bn, *args).numpy().T
    assert ((stored!=want).sum(1)==found.wrong[engine]).all() and found.is_exact(engine)

@pytest.mark.parametrize('bias,scale', [(2**25,2.**-19),(2**30,1.1e-7),(-2**28,4e-7),(2**24-500,5e-6)])
def test_the_cast_to_float32_loses_bits(bias, scale):
    "Sums beyond 2^24: ONNX Runtime rounds them before it multiplies"
    channels = np.full(40, bias)+np.arange(40)
    zero = -128 if bias>0 else 0
    found = EngineScale(np.ones(40, int), channels.astype(np.int32), np.full(40, scale, np.float32), zero, zero+255, {}, None)
    x,sums = all_sums()
    got = run_onnxruntime(graph('qlinear', found, weight, len(sums)), x)[0,:,0].astype(int)+zero
    want = onnxruntime_levels(sums[None], channels[:,None], found.scale[:,None], 0).clip(zero, zero+255)
    assert (got==want).all()

# forms of ONNX

def evaluate(graph, out, x):
    model = graph.model({'x': (x.dtype,x.shape)}, {out: (None,None)})
    return run_onnxruntime(model, x)

def conv_of(dims, kernel, stride=1, padding=0, dilation=1, groups=1, n=6, out=8):
    draw = np.random.default_rng(dims*100+kernel)
    weight = draw.integers(-127, 128, (out,n//groups,*[kernel]*dims))
    return Products(weight, *[(v,)*dims for v in (stride,padding,dilation)], groups)

kernels = [(1,3,1,1),(1,5,2,0),(2,1,1,0),(2,1,2,0),(2,3,1,1),(2,3,2,1),(2,3,1,2,2),(2,2,2,0),(2,5,3,2),(3,3,2,1),(3,1,1,0)]
def true_sums(products, x, stored):
    f = {1: torch.nn.functional.conv1d, 2: torch.nn.functional.conv2d, 3: torch.nn.functional.conv3d}[len(products.kernel)]
    values = torch.from_numpy(stored).double()-x.zero
    return f(values, torch.from_numpy(products.weight).double(), None, products.stride, products.padding, products.dilation,
             products.groups).numpy()

def stored_like(x): return np.random.default_rng(1).integers(0, x.top+1, x.shape).astype(np.uint8)

@pytest.mark.parametrize('lo,hi', [(0,255),(-8,7),(-127,127)])
@pytest.mark.parametrize('options', kernels)
@pytest.mark.parametrize('form', [matmul_sums,float_sums,conv_integer_sums])
def test_sums(form, options, lo, hi):
    products,dims = conv_of(*options),options[0]
    x,graph = Stored('x', lo, hi, (2,6,*[9]*dims)),OnnxGraph()
    stored = stored_like(x)
    got = evaluate(graph, form(graph, x, products), stored)
    if form is matmul_sums: got = np.moveaxis(got, -1, 1)
    assert np.array_equal(got, true_sums(products, x, stored))

@pytest.mark.parametrize('form', [matmul_sums,float_sums])
def test_sums_of_a_linear_layer(form):
    weight,x,graph = np.random.default_rng(0).integers(-127, 128, (8,6)),Stored('x', -3, 200, (5,6)),OnnxGraph()
    stored = stored_like(x)
    assert np.array_equal(evaluate(graph, form(graph, x, Products(weight)), stored), (stored.astype(int)-3)@weight.T)

@pytest.mark.parametrize('options', kernels)
def test_size_of_outputs(options):
    products,x = conv_of(*options),Stored('x', 0, 1, (2,6,*[9]*options[0]))
    assert products.out_size(x.shape[2:])==true_sums(products, x, stored_like(x)).shape[2:]

@pytest.mark.parametrize('groups', [2,6])
def test_groups(groups):
    products = conv_of(2, 3, 1, 1, groups=groups, out=12)
    x,graph = Stored('x', -4, 11, (1,6,7,7)),OnnxGraph()
    stored = stored_like(x)
    assert np.array_equal(evaluate(graph, float_sums(graph, x, products), stored), true_sums(products, x, stored))

def test_averages_are_sums():
    products,graph = summing(6, (3,3), (2,2), (1,1)),OnnxGraph()
    x = Stored('x', 0, 255, (2,6,9,9))
    stored = stored_like(x)
    want = torch.nn.functional.avg_pool2d(torch.from_numpy(stored).double(), 3, 2, 1)*9
    assert np.array_equal(evaluate(graph, float_sums(graph, x, products), stored), want.numpy())

@pytest.mark.parametrize('run,engine', [(run_onnxruntime,'onnxruntime'),(run_openvino,'openvino')])
@pytest.mark.parametrize('kernel,bits', [((1,1),8),((2,2),8),((8,8),8),((8,8),4)])
def test_averages_in_one_operator(kernel, bits, run, engine):
    torch.manual_seed(0)
    products,bn = summing(16, kernel, kernel, (0,0)),randomize_bn(nn.BatchNorm2d(16)).eval()
    n = kernel[0]*kernel[1]
    args = (4/255/n, products.range(0, 255), 5/2**bits, bits)
    found,graph = engine_scale(task_of(bn, *args), room_of(products.weight)),OnnxGraph()
    x = Stored('x', 0, 255, (4,16,8,8))
    stored = stored_like(x)
    y = engine_layer(graph, x, products, found, (4,16,*products.out_size((8,8))))
    got = run(graph.model({'x': (stored.dtype,stored.shape)}, {y.name: (None,None)}), stored)
    sums = evaluate((other := OnnxGraph()), float_sums(other, x, products), stored)
    assert np.array_equal(got, found(sums.astype(int), engine))

def test_bound_of_partial_sums():
    products = Products(np.array([[3,-2,1]]))
    assert partial_bound(products, Stored('x', -1, 10, (1,3)))==42

def fixed_of(A, B, n, qmin, qmax):
    return FixedPointBN(torch.tensor(A), torch.tensor(B), n, qmin, qmax, torch.int64)

@pytest.mark.parametrize('n_positions', [0,1])
@pytest.mark.parametrize('bits', [10,30,47])
@pytest.mark.parametrize('qmin', [0,-128])
def test_shifted_staircases(bits, qmin, n_positions):
    "Slopes of both signs, up to what 64 bits hold"
    draw = np.random.default_rng(bits)
    slope = draw.integers(2**(bits-1), 2**bits, 20)*draw.choice([-1,1], 20)
    fixed = fixed_of(slope.tolist(), draw.integers(-2**bits, 2**bits, 20).tolist(), max(bits-2, 0), qmin, qmin+255)
    x = draw.integers(-120, 120, (7,20,5)[:2+n_positions]).astype(np.int32)
    graph = OnnxGraph()
    got = evaluate(graph, shift_staircase(graph, 'x', fixed, n_positions), x).astype(int)+qmin
    assert np.array_equal(got, fixed(torch.from_numpy(x)).numpy())

def line_task(bits, width, signed, seed=0, n=40):
    torch.manual_seed(seed)
    bn,args = randomize_bn(nn.BatchNorm1d(n)),(4/width, (-width,width), 3/2**bits, bits, signed)
    with torch.no_grad(): bn.weight[:2] = 0.
    return bn, args, task_of(bn, *args)

def line_of(line, x): return np.floor(x.astype(line.slope.dtype)*line.slope+line.shift).clip(0, line.top)

@pytest.mark.parametrize('dtype', [np.float32,np.float64])
@pytest.mark.parametrize('signed', [False,True])
@pytest.mark.parametrize('bits,width', [(2,100),(4,5000),(8,3000),(8,200_000)])
def test_lines_are_wrong_where_they_say_so(bits, width, signed, dtype):
    "All inputs of 40 channels, γ of both signs and zero among them"
    bn,args,task = line_task(bits, width, signed)
    line = float_line(task, dtype)
    x = np.arange(-width, width+1)[:,None]
    want = exact_bn(torch.from_numpy(x).expand(-1, 40), bn, *args).numpy()-task.qmin
    assert ((line_of(line, x)!=want).sum(0)==line.wrong['twice']).all()

@pytest.mark.parametrize('bits,width', [(2,2**20),(8,2**20),(8,2**24),(8,2**30)])
def test_float64_has_bits_to_spare(bits, width): assert float_line(line_task(bits, width, False)[2], np.float64).is_exact('twice')

def test_float32_has_not(): assert float_line(line_task(8, 2**24, False)[2], np.float32).wrong['twice'].sum()>0

@pytest.mark.parametrize('rounded', ['twice','once'])
def test_sums_beyond_24_bits_are_rounded_first(rounded):
    "At both edges of every step"
    _,_,task = line_task(4, 2**27, False)
    line = float_line(task, np.float32)
    edges = np.unique(np.concatenate([task.stairs.l[task.stairs.l<2**30]+d for d in (-1,0)]))
    wide = edges[:,None].astype(np.float32)
    y = wide*line.slope+line.shift if rounded=='twice' else (wide.astype(np.longdouble)*line.slope+line.shift).astype(np.float32)
    climbing = [-edges if mirrored else edges for mirrored in task.mirrored]
    want = np.stack([np.searchsorted(*v, 'right') for v in zip(task.stairs.l, climbing)], 1)
    differs = (np.floor(y).clip(0, 15)!=want).any(0)
    assert (differs<=(line.wrong[rounded]>0)).all()

@pytest.mark.parametrize('run,dtype', [(run_onnxruntime,np.float32),(run_onnxruntime,np.float64),(run_openvino,np.float32)])
@pytest.mark.parametrize('bits,width', [(4,30_000),(8,30_000),(8,300_000)])
def test_engines_compute_lines(run, dtype, bits, width):
    "OpenVINO may round once or twice"
    _,_,task = line_task(bits, width, True)
    line,graph = float_line(task, dtype),OnnxGraph()
    x = np.broadcast_to(np.arange(-width, width)[None,None], (1,40,2*width)).astype(np.int32)
    y = line_staircase(graph, 'x', line, 1)
    got = run(graph.model({'x': (x.dtype,x.shape)}, {y: (None,None)}), x)[0]
    twice = line_of(line, x[0].T).T
    wide = x[0].T.astype(dtype).astype(np.longdouble)*line.slope+line.shift
    once = np.floor(wide.astype(dtype)).clip(0, line.top).T
    assert (got==twice).all() or run is run_openvino and ((got==twice) | (got==once)).all()

spans = [(0,15),(-8,7),(-128,127),(0,255),(-127,127)]
@pytest.mark.parametrize('a', spans)
@pytest.mark.parametrize('b', spans)
@pytest.mark.parametrize('lo,hi', [(0,15),(-128,127),(-8,22)])
@pytest.mark.parametrize('engine', [run_onnxruntime,run_openvino])
def test_added(engine, a, b, lo, hi):
    one,graph = Stored('x', *a, (1,600)),OnnxGraph()
    stored = stored_like(one)
    reverse = Stored(graph('Clip', 'x', np.uint8(0), np.uint8(b[1]-b[0])), *b, one.shape)
    y = added(graph, one, reverse, lo, hi)
    got = engine(graph.model({'x': (stored.dtype,stored.shape)}, {y.name: (None,None)}), stored).astype(int)-y.zero
    values = stored.astype(int)
    assert np.array_equal(got, (values-one.zero+values.clip(0, b[1]-b[0])-reverse.zero).clip(lo, hi))

@pytest.mark.parametrize('lo,hi', [(0,6),(-3,3),(0,100),(5,6),(-100,-50),(50,60)])
def test_clipped(lo, hi):
    x,graph = Stored('x', -8, 7, (1,16)),OnnxGraph()
    stored = np.arange(16, dtype=np.uint8)[None]
    y = clipped(graph, x, lo, hi)
    got = stored if y.name=='x' else evaluate(graph, y.name, stored)
    assert np.array_equal(got.astype(int)-y.zero, (np.arange(16)-8).clip(lo, hi)[None])

def test_concatenated_with_other_zero_points():
    a,b,graph = Stored('x', -8, 7, (1,16)),Stored('x', 0, 15, (1,16)),OnnxGraph()
    y = concatenated(graph, [a,b], 1, -8, 15)
    stored = np.arange(16, dtype=np.uint8)[None]
    assert np.array_equal(evaluate(graph, y.name, stored).astype(int)-y.zero, [[*range(-8, 8),*range(16)]])

def test_looked_up():
    x,graph = Stored('x', -128, 127, (1,256)),OnnxGraph()
    table = np.random.default_rng(0).integers(-5, 100, 256)
    y = looked_up(graph, x, table, -5, 99)
    assert np.array_equal(evaluate(graph, y.name, np.arange(256, dtype=np.uint8)[None]).astype(int)-y.zero, table[None])

def test_equal_operators_are_one():
    graph = OnnxGraph()
    assert graph('Relu', 'x')==graph('Relu', 'x')

def test_other_options_are_another_operator():
    graph = OnnxGraph()
    assert graph('Softmax', 'x', axis=1)!=graph('Softmax', 'x', axis=2)

# networks

from fastai_bnfold.all import DeployError
from fastai_bnfold.integer.export import Exporter, Shapes, onnx_model
from fastai_bnfold.integer.net import Ints, IntegerNet
from fastai_bnfold.integer.steps import FixedPointError

from int_nets import build_nets, conv_bn, example, head, kinds

names = list(build_nets() | kinds())

@pytest.fixture(scope='module')
def integer_nets():
    "name, bits → the network"
    made = {}
    def get(name, bits):
        if (name,bits) not in made:
            torch.manual_seed(1)
            made[name,bits] = IntegerNet(randomize_bn((build_nets() | kinds())[name]).eval(), [example(name, 8)], bits)
        return made[name,bits]
    return get

def integers_of(net, x):
    "value → the integers that the network computes"
    found = {}
    net(x, see=lambda name, value: found.update({name: value.numpy()}))
    return found

def all_outputs(model, x):
    runtime = pytest.importorskip('onnxruntime')
    options = runtime.SessionOptions()
    options.add_session_config_entry('session.x64quantprecision', '1')
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=['CPUExecutionProvider'])
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return dict(zip([port.name for port in session.get_outputs()], found))

@pytest.mark.parametrize('bits', [2,4,8])
@pytest.mark.parametrize('name', names)
def test_all_integers_are_those_of_the_network(name, bits, integer_nets):
    net = integer_nets(name, bits)
    model,card = onnx_model(net, (example(name, 1),), integers=True)
    x = example(name)
    got,want = all_outputs(model, x),integers_of(net, x)
    assert len(card.integers)>=2
    wrong = [v for v in card.integers if not np.array_equal(got[v], want[v.removeprefix('integers_')])]
    assert not wrong and card.is_exact()

@pytest.mark.parametrize('bits', [4,8])
@pytest.mark.parametrize('name', names)
def test_outputs_are_those_of_the_network(name, bits, integer_nets):
    net,x = integer_nets(name, bits),example(name)
    model,_ = onnx_model(net, (x[:1],))
    got,want = all_outputs(model, x)['output0'],net(x).numpy()
    assert abs(got-want).max()<=1e-5*abs(want).max()

@pytest.mark.parametrize('name', names)
def test_openvino_agrees_where_the_card_says_so(name, integer_nets):
    net = integer_nets(name, 4)
    x = example(name)*2 # any numbers, and some beyond the largest integer
    model,card = onnx_model(net, (x[:1],))
    want = net(x).numpy()
    assert card.is_exact('openvino') and abs(run_openvino(model, x.numpy())-want).max()<=1e-5*abs(want).max()

@pytest.mark.parametrize('name', ['residual','depthwise'])
def test_the_nearest_comes_near(name, integer_nets):
    net,x = integer_nets(name, 8),example(name)
    model,card = onnx_model(net, (x[:1],), exact=False)
    want = net(x).numpy()
    assert not card.is_exact() and abs(all_outputs(model, x)['output0']-want).max()<.1*abs(want).max()

def following(name):
    torch.manual_seed(1)
    net = IntegerNet(randomize_bn((build_nets() | kinds())[name]).eval(), [example(name, 8)], 8)
    return net, net.follow_engine()

@pytest.mark.parametrize('name', names)
def test_a_network_that_follows_the_engine(name):
    "All integers, in one operator a layer"
    net,changed = following(name)
    model,card = onnx_model(net, (example(name, 1),), integers=True)
    x = example(name)
    got,want = all_outputs(model, x),integers_of(net, x)
    assert all(np.array_equal(got[v], want[v.removeprefix('integers_')]) for v in card.integers)
    assert card.is_exact() and card.count('adopted')==len(changed)
    assert all(layer.kind=='product' for layer in card.layers if layer.way=='exact') # which is not one operator anyway

def test_following_changes_little():
    _,changed = following('residual')
    assert changed and all(0<wrong<n/500 for wrong,n in changed.values())

def test_following_twice_changes_nothing(): assert following('plain')[0].follow_engine()=={}

def test_a_layer_that_follows_is_its_scale():
    net,changed = following('residual')
    layer = net.bns[next(iter(changed))]
    x = torch.randint(-10**6, 10**6, (5,len(layer.scale),7))
    assert np.array_equal(layer(x).numpy(), layer.found(x.numpy()))

def test_four_bits_are_one_operator_each(integer_nets):
    _,card = onnx_model(integer_nets('residual', 4), (example('residual'),))
    assert card.count('engine')==len(card.layers)==7

def test_eight_bits_are_exact_in_another_form(integer_nets):
    _,card = onnx_model(integer_nets('residual', 8), (example('residual'),))
    assert card.count('exact')>=4 and all('no exact scale' in layer.why for layer in card.layers if layer.way=='exact')

@pytest.mark.parametrize('run,engine', [(run_onnxruntime,'onnxruntime'),(run_openvino,'openvino')])
@pytest.mark.parametrize('name', ['residual','pools','grouped','depthwise','one_d'])
def test_six_bits_in_both_engines(name, run, engine, integer_nets):
    "Sums and staircases in float32, for the engine that is asked for"
    net = integer_nets(name, 6)
    x = example(name)*2
    model,card = onnx_model(net, (x[:1],), engine=engine, names=['x'])
    want = net(x).numpy()
    assert card.is_exact(engine) and abs(run(model, x.numpy())-want).max()<=1e-5*abs(want).max()

def test_unknown_engine(integer_nets):
    with pytest.raises(FixedPointError, match="'tensorrt'"): onnx_model(integer_nets('plain', 4), (example('plain'),), engine='tensorrt')

def test_few_bits_are_safe_without_vnni(integer_nets):
    _,card = onnx_model(integer_nets('residual', 4), (example('residual'),))
    assert not card.needs_vnni()

def test_eight_bits_need_vnni(integer_nets):
    _,card = onnx_model(integer_nets('residual', 8), (example('residual'),))
    assert card.needs_vnni()

@pytest.mark.parametrize('bits', [4,8])
def test_pairs_fit_where_the_card_says_so(bits, integer_nets):
    "Looked up in the file: the largest weight beside the largest input"
    import onnx
    net = integer_nets('residual', bits)
    model,card = onnx_model(net, (example('residual'),), exact=False)
    stored = {v.name: onnx.numpy_helper.to_array(v) for v in model.graph.initializer}
    weights = [v for v in stored.values() if v.ndim==4]
    tops = [255] + [2**bits-1]*(len(weights)-1) # the first reads the image
    convolutions = [layer for layer in card.layers if layer.form=='Conv']
    assert [layer.pairs_fit for layer in convolutions]==[2*top*abs(w.astype(int)).max()<2**15 for w,top in zip(weights, tops)]

def test_what_is_real_is_named(integer_nets):
    torch.manual_seed(1)
    net = IntegerNet(randomize_bn(nn.Sequential(*conv_bn(3, 8), *head(8), nn.Softmax(1))).eval(), [example('plain')], 4)
    _,card = onnx_model(net, (example('plain'),))
    assert list(card.real.values())==['softmax']

def test_inputs_at_the_ends_of_their_span(integer_nets):
    "Beyond the largest integer there is the largest, not one more"
    net = integer_nets('plain', 4)
    x = torch.tensor([-1e9,1e9,-127.5,127.5,-126.5,126.5,.5,-.5]).repeat(96).view(1,3,16,16)*net.scale[next(iter(net.scale))]
    model,_ = onnx_model(net, (x,), integers=True)
    first = next(iter(integers_of(net, x)))
    assert np.array_equal(all_outputs(model, x)[f'integers_{first}'], integers_of(net, x)[first])

def test_names_of_inputs(integer_nets):
    model,_ = onnx_model(integer_nets('plain', 4), (example('plain'),), names=['image'])
    assert [port.name for port in model.graph.input]==['image']

def test_the_card_is_in_the_file(integer_nets, tmp_path):
    import json, onnx
    card = integer_nets('plain', 4).export(tmp_path/'net.onnx', example('plain'))
    kept = json.loads(onnx.load(tmp_path/'net.onnx').metadata_props[0].value)
    assert [layer['way'] for layer in kept['layers']]==[layer.way for layer in card.layers]

def test_an_earlier_file_is_replaced(integer_nets, tmp_path):
    (tmp_path/'net.onnx').write_text('old')
    integer_nets('plain', 4).export(tmp_path/'net.onnx', example('plain'))
    assert (tmp_path/'net.onnx').stat().st_size>1000 and len([*tmp_path.iterdir()])==1

@pytest.mark.parametrize('error,path,args', [(FixedPointError,'net.xml',1), (FixedPointError,'net.onnx',0), (DeployError,'no/net.onnx',1)])
def test_errors_leave_nothing(error, path, args, integer_nets, tmp_path):
    with pytest.raises(error): integer_nets('plain', 4).export(tmp_path/path, *[example('plain')]*args)
    assert not [*tmp_path.iterdir()]

class Real(nn.Module):
    "What works on real numbers, behind the last integers"
    def __init__(self, f):
        super().__init__()
        self.f = f
    def forward(self, x): return self.f(torch.sigmoid(x))

real_functions = dict(
    silu=nn.SiLU(), gelu=nn.GELU(), leaky=nn.LeakyReLU(.2), relu6=nn.ReLU6(), hardtanh=nn.Hardtanh(-.2, .7), hardswish=nn.Hardswish(),
    hardsigmoid=nn.Hardsigmoid(), mish=nn.Mish(), tanh=nn.Tanh(), conv=nn.Conv2d(8, 4, 3, 2, 1), norm=nn.BatchNorm2d(8),
    max_pool=nn.MaxPool2d(3, 2, 1), average=nn.AvgPool2d(2), softmax=nn.Softmax(1), mean=lambda x: x.mean((2,3)),
    cat=lambda x: torch.cat([x,x*2.], 1), chunk=lambda x: x.chunk(2, 1)[1], minus=lambda x: x-.5,
    clamp=lambda x: x.clamp(max=.6), transpose=lambda x: x.transpose(1, 2), slice=lambda x: x[:,:,2:-1:2], division=lambda x: x/3.)

@pytest.mark.parametrize('name', real_functions)
def test_real_numbers(name):
    torch.manual_seed(0)
    net = IntegerNet(randomize_bn(nn.Sequential(*conv_bn(3, 8), nn.ReLU(), Real(real_functions[name]))).eval(), [example('plain')], 4)
    x = example('plain')
    model,card = onnx_model(net, (x,))
    got,want = all_outputs(model, x)['output0'],net(x).numpy()
    assert got.shape==want.shape and abs(got-want).max()<=1e-5*abs(want).max()

def test_an_example_that_does_not_run(integer_nets):
    with pytest.raises(FixedPointError, match='does not run on this example'): onnx_model(integer_nets('plain', 4), (torch.randn(1, 7, 9, 9),))

class Strange(nn.Module):
    def forward(self, x): return torch.special.i0(x)

def test_what_has_no_form_is_named(tmp_path):
    net = IntegerNet(randomize_bn(nn.Sequential(*conv_bn(3, 8), nn.ReLU(), *head(8), Strange())).eval(), [example('plain')], 4)
    with pytest.raises(FixedPointError, match='special_i0'): net.export(tmp_path/'net.onnx', example('plain'))
    assert not [*tmp_path.iterdir()]

def test_without_onnx(integer_nets, tmp_path, monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, 'onnx', None)
    with pytest.raises(FixedPointError, match='pip install onnx'): integer_nets('plain', 4).export(tmp_path/'net.onnx', example('plain'))

def test_interrupted_writes_leave_nothing(integer_nets, tmp_path, monkeypatch):
    def interrupt(*args): raise KeyboardInterrupt
    monkeypatch.setattr('os.replace', interrupt)
    with pytest.raises(KeyboardInterrupt): integer_nets('plain', 4).export(tmp_path/'net.onnx', example('plain'))
    assert not [*tmp_path.iterdir()]
