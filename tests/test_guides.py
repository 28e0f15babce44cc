"The code on the pages of `docs/` runs, as it stands there; with a small network, so that it is quick"
import re
from pathlib import Path
import numpy as np, pytest, torch, torchvision
from PIL import Image
from torch import nn
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.vision.all import CategoryBlock, DataBlock, ImageBlock, IndexSplitter, set_seed
import fastai_bnfold.all as bnfold

docs = Path(__file__).parent.parent/'docs'
pages = ['start/ten_minutes.md','guides/fold.md','guides/stays.md','guides/statistics.md','guides/integers.md','guides/deploy.md']
# What takes long, and what stands for it
small = {"vision_learner(dls, resnet18, pretrained=False, metrics=accuracy)": 'small_learner()', "get_dls('digits')": 'small_learner().dls',
         'densenet121': 'resnet18', 'fine_tune(3,': 'fine_tune(1,', 'fit_one_cycle(2,': 'fit_one_cycle(1,', 'learn.fold_bn()': 'learn.fold_bn(latency=.1)'}

def picture(i): return Image.fromarray(np.random.default_rng(i).integers(0, 64+64*(i%3), (16,16,3), dtype=np.uint8))
def label(i): return 'abc'[i%3]

def small_learner():
    block = DataBlock((ImageBlock, CategoryBlock), get_items=lambda _: list(range(120)), get_x=picture, get_y=label, splitter=IndexSplitter(range(30)))
    net = nn.Sequential(nn.Conv2d(3,8,3,2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8,8,3), nn.BatchNorm2d(8), nn.ReLU(),
                        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8,3))
    return Learner(block.dataloaders(None, bs=16, num_workers=0), net, metrics=accuracy)

def blocks(page):
    "The code of a page, with small things for large ones"
    text = (docs/page).read_text(encoding='utf-8')
    for large,little in small.items(): text = text.replace(large, little)
    return re.findall(r'^```python\n(.*?)^```', text, re.M|re.S)

def execute(block, names):
    "A block, statement by statement; one whose comment names an error raises it"
    for line in re.split(r'\n(?=\S)', block.strip()):
        error = re.search(r'# (\w+Error):', line)
        if not error: exec(line, names)
        else:
            with pytest.raises(getattr(bnfold, error[1])): exec(line, names)

@pytest.mark.parametrize('page', pages)
def test_code_runs(page, tmp_path, monkeypatch):
    pytest.importorskip('onnxruntime')
    monkeypatch.chdir(tmp_path)
    set_seed(42)
    learn = small_learner()
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)
    for i,name in enumerate(['image.png','a.png','b.png']): picture(i).save(name)
    names = dict(learn=learn, dls=learn.dls, model=torchvision.models.resnet18(num_classes=10).eval(), xb=torch.randn(2,3,64,64), small_learner=small_learner,
                 items=list(range(60)), rep=bnfold.BNFolder().plan(learn.model.eval(), torch.randn(2,3,16,16)))
    exec('from fastai.vision.all import *\nfrom fastai_bnfold.all import *', names)
    found = blocks(page)
    assert found
    for block in found: execute(block, names)


def test_every_benchmark_has_its_page(tmp_path):
    "From the figures that are committed, without the generator of the site"
    import subprocess, sys
    code = "import sys; sys.path.insert(0, 'docs'); import benchmarks; from pathlib import Path; benchmarks.write_all(Path(sys.argv[1]))"
    root = Path(__file__).parent.parent
    subprocess.run([sys.executable, '-c', code, tmp_path], check=True, cwd=root)
    assert sorted(page.stem for page in tmp_path.glob('*.md'))==sorted(file.stem for file in (root/'benchmarks'/'results').glob('*.json'))
