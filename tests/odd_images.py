"Images as a web service meets them, and the pipelines that they go through: for `test_pipelines.py` and `benchmarks/pipelines.py`"
import numpy as np
from PIL import Image
from torch import nn
from fastai.vision.all import (CropPad, DihedralItem, FlipItem, ImageDataLoaders, Learner, Normalize, PadMode, RandomCrop, RandomErasing,
    RandomResizedCrop, Resize, ResizeMethod, Rotate, Warp, Zoom, accuracy, aug_transforms, imagenet_stats)
from fastai_bnfold.all import DeployError
from fastai_bnfold.fold.testing import randomize_bn

def net(n_out=2, n_in=3):
    return randomize_bn(nn.Sequential(nn.Conv2d(n_in,8,3,2), nn.BatchNorm2d(8), nn.ReLU(),
                                      nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8,n_out))).eval()

def smooth(rng, width, height, mode='RGB'):
    "Noise enlarged, so that neighbours are alike, as in a photograph"
    small = rng.integers(0, 256, (max(height//4,1), max(width//4,1), 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width,height), Image.BICUBIC).convert(mode)

def class_folder(where):
    "16 images, in two classes, of two shapes"
    rng = np.random.default_rng(0)
    for i in range(16):
        file = where/('train' if i<8 else 'val')/'ab'[i%2]/f'{i}.png'
        file.parent.mkdir(parents=True, exist_ok=True)
        smooth(rng, *((100,80) if i%3 else (70,90))).save(file)
    return where

def odd_files(where):
    "Name → file: modes, formats and shapes that a web service meets"
    rng = np.random.default_rng(1)
    where.mkdir(exist_ok=True)
    im,files = smooth(rng, 90, 70),{}
    def save(name, image, **kw):
        image.save(where/name, **kw)
        files[name] = where/name
    for mode in ('1','L','LA','RGBA'): save(f'{mode}.png', im.convert(mode))
    save('P.png', im.convert('P', palette=Image.ADAPTIVE))
    save('P transparent.png', im.convert('P', palette=Image.ADAPTIVE), transparency=3)
    save('I16.png', Image.fromarray((np.asarray(im.convert('L')).astype(np.uint16)*257)))
    save('CMYK.jpg', im.convert('CMYK'))
    for orientation in (2,3,5,6,8):
        exif = Image.Exif()
        exif[274] = orientation
        save(f'exif {orientation}.jpg', im, exif=exif)
    save('progressive.jpg', im, progressive=True)
    for ending in ('gif','bmp','webp','tiff','ppm'): save(f'RGB.{ending}', im)
    save('RGBA.webp', im.convert('RGBA'))
    for width,height in ((1,1), (3,200), (400,5), (701,203)): save(f'{width}×{height}.png', smooth(rng, width, height))
    return files

imagenet = Normalize.from_stats(*imagenet_stats, cuda=False)
def pipelines(size):
    "Name → item and batch transforms"
    wide = (size, size*3//2)
    return {
        'crop, aug_transforms': (Resize(size), [*aug_transforms(), imagenet]),
        'squish': (Resize(wide, ResizeMethod.Squish), [imagenet]),
        'pad, reflection': (Resize(wide, ResizeMethod.Pad), [imagenet]),
        'pad, zeros': (Resize(size, ResizeMethod.Pad, pad_mode=PadMode.Zeros), [*aug_transforms(pad_mode=PadMode.Zeros), RandomErasing()]),
        'RandomResizedCrop': ([RandomResizedCrop(size), FlipItem()], [imagenet]),
        'CropPad': (CropPad(wide, pad_mode=PadMode.Border), [Rotate(), Zoom(), Warp(), imagenet]),
        'RandomCrop': ([Resize(size+20), RandomCrop(size), DihedralItem()], [imagenet]),
        'presized': (Resize(size+40), [*aug_transforms(size=size), imagenet])}

def image_learner(folder, item_tfms, batch_tfms):
    dls = ImageDataLoaders.from_folder(folder, train='train', valid='val', item_tfms=item_tfms, batch_tfms=batch_tfms, bs=4, num_workers=0)
    return Learner(dls, net(), metrics=accuracy)

def said(learn, item):
    "What `learn.predict` says; None where fastai itself fails"
    try:
        with learn.no_bar(), learn.no_logging(): return learn.predict(item)
    except Exception: return None

def forms(file):
    "The same image as a path, as bytes, and opened"
    with Image.open(file) as im: im.load()
    return file, file.read_bytes(), im

def distance(learn, deployed, file):
    "The largest difference of the probabilities of a file, over its forms; in words, where anything else differs"
    want,worst = said(learn, file),0.
    for item in forms(file):
        try: got = deployed.predict(item)
        except DeployError as e: got = e
        failed = isinstance(got, DeployError)
        if want is None and failed: continue
        if want is None or failed: return f'{type(item).__name__}: {want} {got}'
        if want[0]!=got.label: return f'{type(item).__name__}: {want[0]} {got.label}'
        worst = max(worst, float(np.abs(np.asarray(want[2])-got.probs).max()))
    return worst

def differs(learn, deployed, file, tol=1e-5):
    "In words, how the predictions of a file differ; None if they do not"
    far = distance(learn, deployed, file)
    if isinstance(far, str): return far
    return None if far<=tol else f'{far:.1e}'
