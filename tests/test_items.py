"Items as a web service has them: what a deployed model says of each is what `learn.predict` says of the same file"
import io, json, os, tempfile, warnings
from pathlib import Path
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest, torch
from PIL import Image
from torch import nn
from fastai.vision.all import DataBlock, CategoryBlock, ImageBlock, IndexSplitter, L, Learner, Normalize, PILImage, PILImageBW, Resize, imagenet_stats
from fastai_bnfold.all import *
from fastai_bnfold.deploy.items import many_items, open_image
from fastai_bnfold.fold.testing import randomize_bn

rng = np.random.default_rng(0)
rgb = Image.fromarray(rng.integers(0, 256, (40,48,3), dtype=np.uint8))

def odd_files(folder):
    "Files of every mode that Pillow writes"
    def save(name, im, **kw): im.save(folder/name, **kw)
    for mode in ('1','L','LA','P','RGB','RGBA'): save(f'{mode}.png', rgb.convert(mode))
    for mode in ('1','L','P','RGB','RGBA','CMYK','LAB','F','I'): save(f'{mode}.tif', rgb.convert(mode))
    for mode in ('L','RGB','CMYK'): save(f'{mode}.jpg', rgb.convert(mode))
    save('I16.png', Image.fromarray(rng.integers(0, 65536, (40,48), dtype=np.uint16)))
    save('transparent.png', rgb.convert('P'), transparency=3)
    save('transparent bytes.png', rgb.convert('P', palette=Image.ADAPTIVE), transparency=bytes(range(0, 256)))
    save('transparent.gif', rgb.convert('P'), transparency=3)
    save('frames.gif', rgb.convert('P'), save_all=True, append_images=[rgb.transpose(0).convert('P')])
    save('frames.webp', rgb, save_all=True, append_images=[rgb.transpose(0)])
    exif = Image.Exif()
    exif[0x112] = 6 # turned by a quarter
    save('turned.jpg', rgb, exif=exif)
    return sorted(folder.iterdir())

@pytest.fixture(scope='module')
def files(tmp_path_factory): return odd_files(tmp_path_factory.mktemp('files'))

def deployed_to(folder, files, image, channels):
    block = DataBlock((ImageBlock(image), CategoryBlock), get_y=lambda f: len(f.name)%2, splitter=IndexSplitter(range(4)), item_tfms=Resize(32))
    dls = block.dataloaders(files, bs=4, num_workers=0)
    net = nn.Sequential(nn.Conv2d(channels,8,3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32,2))
    learn = Learner(dls, randomize_bn(net))
    with learn.no_bar(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return learn, learn.deploy(folder/'m', 'eager')

@pytest.fixture(scope='module')
def deployed(files, tmp_path_factory): return deployed_to(tmp_path_factory.mktemp('m'), files, PILImage, 3)

def says(learn, item):
    with learn.no_bar(): return learn.predict(item)[2].numpy()
def close(p, want): return np.allclose(p.probs, want, atol=1e-5)

def forms_of(file):
    "What a service may have of a file"
    data = file.read_bytes()
    yield from (str(file), file, data, bytearray(data), memoryview(data), io.BytesIO(data), open(file, 'rb'), open(file, 'rb', buffering=0))
    spooled = tempfile.SpooledTemporaryFile()
    spooled.write(data)
    spooled.seek(0)
    yield spooled
    yield SimpleNamespace(filename=file.name, file=io.BytesIO(data)) # as FastAPI's
    yield Image.open(file)

@pytest.mark.filterwarnings('ignore')
def test_forms(deployed, files):
    learn,m = deployed
    for file in files:
        want = says(learn, file)
        for form in forms_of(file): assert close(m.predict(form), want), (file.name, type(form))

@pytest.mark.filterwarnings('ignore')
def test_grey(files, tmp_path):
    learn,m = deployed_to(tmp_path, files, PILImageBW, 1)
    for file in files:
        if file.name=='LAB.tif': # Pillow does not, and so fastai does not either
            with pytest.raises(DeployError, match="mode 'LAB' cannot become one of mode 'L'"): m.predict(file)
            continue
        want = says(learn, file)
        for form in (file, file.read_bytes(), Image.open(file)): assert close(m.predict(form), want), (file.name, type(form))

@pytest.mark.parametrize('mode', ['1','L','LA','PA','P','RGB','RGBA','RGBX','RGBa','CMYK','YCbCr','LAB','HSV','I','F','I;16'])
def test_pillow_modes(mode):
    "An image in memory is converted like one from a file"
    im = rgb.convert('L').convert(mode) if mode=='I;16' else rgb.convert(mode)
    assert np.array_equal(np.asarray(open_image(im)), np.asarray(im.convert('RGB')))

def test_arrays(deployed):
    learn,m = deployed
    pixels = np.asarray(rgb)
    want = m.predict(rgb).probs
    for form in (pixels, pixels.transpose(2,0,1), torch.tensor(pixels), np.dstack([pixels, np.full((40,48), 255, np.uint8)]), pixels[::-1][::-1]): assert close(m.predict(form), want)
    assert close(m.predict(pixels[...,:1]), m.predict(rgb.getchannel(0)).probs)
    assert [p.label for p in m.predict(np.stack([pixels]*3))]==[m.predict(rgb).label]*3

def test_files_stay_open_and_where_they_are(deployed, files):
    _,m = deployed
    data = files[0].read_bytes()
    f = io.BytesIO(b'a header'+data)
    f.seek(8)
    assert close(m.predict(f), m.predict(files[0]).probs)
    assert not f.closed and f.tell()==8+len(data)
    with pytest.raises(DeployError, match='Nothing is left to read'): m.predict(f)

def test_many(deployed, files):
    _,m = deployed
    some = files[:3]
    want = [m.predict(f).probs for f in some]
    for many in (list(some), tuple(some), L(some), (f for f in some), pd.Series(some), pd.Series([str(f) for f in some], index=[5,6,7]), np.array([str(f) for f in some]), np.array(some, dtype=object), dict.fromkeys(some).keys()):
        got = m.predict(many)
        assert len(got)==3 and all(map(close, got, want)), type(many)
    assert m.predict([])==[] and m.predict(iter([]), on_error='return')==[]

def test_generators_are_not_read_ahead(deployed, files):
    _,m = deployed
    taken = []
    def items():
        for i in range(6):
            taken.append(i)
            yield files[0] if i<3 else b'no image'
    with pytest.raises(DeployError, match='^Item 3: these bytes cannot be read'): m.predict(items(), bs=2)
    assert taken==[0,1,2,3]

@pytest.mark.parametrize('bad,said', [(b'', 'cannot be read'), ('no such file.png', 'no file'), (3, 'got int'), (None, 'got NoneType'), (np.zeros((4,4,3)), 'uint8'), (io.StringIO('x'), "mode 'rb'"), ({}, 'got dict')])
def test_one_bad_item(deployed, files, bad, said):
    _,m = deployed
    with pytest.raises(DeployError, match=said) as e: m.predict(bad)
    assert not str(e.value).startswith('Item')
    with pytest.raises(DeployError, match=f'Item 1: .*{said}'): m.predict([files[0], bad])
    good,error,also = m.predict([files[0], bad, io.BytesIO(files[0].read_bytes())], on_error='return')
    assert isinstance(error, DeployError) and close(good, also.probs)
    assert isinstance(m.predict(bad, on_error='return'), DeployError)

def test_a_bad_batch_reads_no_file_twice(deployed, files):
    "The model refuses one item of a batch; the others are files that can be read once"
    _,m = deployed
    wrong = np.zeros((5,32,32), np.float32)
    got = m.predict([open(files[0], 'rb'), wrong, open(files[0], 'rb')], on_error='return')
    assert [isinstance(p, DeployError) for p in got]==[False,True,False]

def test_an_upload_that_is_asynchronous(deployed):
    class Upload:
        async def read(self): return b''
    with pytest.raises(DeployError, match='await item.read'): deployed[1].predict(Upload())

def test_arguments(deployed, files):
    with pytest.raises(DeployError, match="'raise' or 'return', got 'skip'"): deployed[1].predict(files[0], on_error='skip')
    with pytest.raises(DeployError, match='`bs` should be 1'): deployed[1].predict(files[0], bs=0)

def test_to_dict(deployed, files):
    p = deployed[1].predict(files[0])
    said = json.loads(json.dumps(p.to_dict()))
    assert said==dict(label=p.label, index=int(p.index), probs=p.probs.tolist())
    label,index,probs = p # a named tuple
    assert label==p.label and p._fields==('label','index','probs')

@pytest.mark.parametrize('value', [np.float32(.5), np.int64(3), np.array([[True,False]]), np.array([.5,np.nan]), ['a',np.bool_(True)]])
def test_to_dict_of_all_kinds(value):
    from fastai_bnfold.deploy.serve import Prediction
    json.dumps(Prediction(value, value, value).to_dict(), allow_nan=False)

def test_one_or_many():
    assert many_items((1,2), 'array') is None and list(many_items([1,2], 'array'))==[1,2]
    assert many_items(pd.Series({'a': 1}), 'table') is None and len(list(many_items(pd.DataFrame({'a': [1,2]}), 'table')))==2
