"Integers in an engine's own arithmetic: right for every input, or said not to be"
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from fastai_bnfold.fold.testing import randomize_bn
from fastai_bnfold.integer.engine_scale import (EngineScale, engine_arithmetic, engine_scale, first_products, n_different,
                                                onnxruntime_levels, pair_limit, room_of)
from fastai_bnfold.integer.fixed_point import exact_bn
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
