"""Networks trained from scratch on ImageNette at small batch sizes, and what inference with other BN statistics makes of them.

    python benchmarks/small_batch.py [--data imagenette] [--weights FOLDER] [--out benchmarks/results/small_batch.json]

ResNet-18 with a 3×3 stem on 64 px images, AdamW, one-cycle policy. The weights are kept in the folder; what is there is not trained again.
"""
from pathlib import Path
import tempfile, torch, torchvision
from fastai.vision.all import *
from fastai_bnfold.experiments import AutocastCPU, find_images

def small_images(data, to):
    "The images at 64 px, in `to`"
    src = find_images(data)
    for d in [o for part in ('train','val') for o in sorted((src/part).iterdir()) if o.is_dir()]:
        if not (dest := to/d.parent.name/d.name).exists(): resize_images(d, max_size=64, dest=dest, ext='.png')
    return to

def small_dls(path, bs, seed=0):
    "The `DataLoaders` of one training"
    return ImageDataLoaders.from_folder(path, train='train', valid='val', item_tfms=Resize(64), batch_tfms=Normalize.from_stats(*imagenet_stats),
                                        bs=bs, val_bs=64, seed=seed, num_workers=0)

def net(n_out):
    "torchvision's ResNet-18 with a 3×3 stem"
    m = torchvision.models.resnet18(num_classes=n_out)
    m.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    return m

def trained(path, bs, seed, weights, epochs=2):
    "The Learner of one training run; trained now where `weights` does not hold it"
    set_seed(seed, reproducible=True)
    learn = Learner(small_dls(path, bs), net(10), metrics=accuracy, opt_func=partial(OptimWrapper, opt=torch.optim.AdamW, fused=True))
    f = Path(weights)/f'resnet18_bs{bs}_seed{seed}.pth'
    if f.exists(): learn.model.load_state_dict(torch.load(f, weights_only=True))
    else:
        learn.fit_one_cycle(epochs, 2e-3*(bs/64)**.5, cbs=AutocastCPU())
        f.parent.mkdir(parents=True, exist_ok=True)
        torch.save(learn.model.state_dict(), f)
    return learn
