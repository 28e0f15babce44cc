"""README_files/block.svg: a residual block before and after folding, drawn from the plan that `BNFolder` makes of it.

    python docs/picture.py [FILE]
"""
import sys
from html import escape
from pathlib import Path
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock
from fastai_bnfold.fold import BNFolder
from fastai_bnfold.fold.testing import randomize_bn

# Where everything is in the block: name → (column, row). The short cut has a row of its own
PLACES = {'conv1': (0,0), 'bn1': (1,0), 'relu': (2,0), 'conv2': (3,0), 'bn2': (4,0), 'add': (5,0), 'out': (6,0),
          'downsample.0': (1,1), 'downsample.1': (3,1)}
LINES = [('conv1','bn1'), ('bn1','relu'), ('relu','conv2'), ('conv2','bn2'), ('bn2','add'), ('add','out'),
         ('downsample.0','downsample.1')]
WORDS = {'conv1': 'conv 3×3', 'conv2': 'conv 3×3', 'downsample.0': 'conv 1×1', 'relu': 'ReLU', 'out': 'ReLU', 'add': '+',
         'bn1': 'BN', 'bn2': 'BN', 'downsample.1': 'BN'}
WIDE,TALL,STEP,ROW,LEFT = 84,36,110,92,70

def fold_block():
    "Before and after, and the report"
    torch.manual_seed(42)
    block = BasicBlock(64, 128, 2, nn.Sequential(nn.Conv2d(64, 128, 1, 2, bias=False), nn.BatchNorm2d(128)))
    folder = BNFolder()
    folder.fold(randomize_bn(block).eval(), torch.randn(2,64,16,16))
    assert not folder.report.kept
    return folder.report

def centre(name, top):
    column,row = PLACES[name]
    return LEFT+WIDE/2+column*STEP, top+TALL/2+row*ROW

def line(*points): return f'<polyline points="{" ".join(f"{x:g},{y:g}" for x,y in points)}" class="line"/>'

def text(x, y, words, kind='word'): return f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(words)}</text>'

def box(name, top, kind):
    "One operation"
    x,y = centre(name, top)
    wide = WIDE if name!='add' else TALL
    return (f'<rect x="{x-wide/2:g}" y="{y-TALL/2:g}" width="{wide}" height="{TALL}" rx="{8 if name!="add" else TALL/2:g}" class="{kind}"/>'
            + text(x, y+5, WORDS[name]))

def way(bn, layer, top):
    "The map of a BN on its way"
    (x0,y0),(x1,y1) = centre(bn, top),centre(layer, top)
    start,end = y0-TALL/2,y1-TALL/2
    return (f'<path d="M{x0:g},{start-1:g} C{x0:g},{start-38:g} {x1:g},{end-38:g} {x1:g},{end-4:g}" class="way" marker-end="url(#tip)"/>'
            + text((x0+x1)/2, start-34, 's·x + t', 'map'))

def drawn(top, rows, folded):
    "The block, with the ways of its maps or without its BNs"
    layers = {into for row in rows for into in row.into}
    bns = {row.bn for row in rows}
    def kind(name): return 'bn' if name in bns else 'layer' if folded and name in layers else 'plain'
    (x0,y0),(x1,_),(x2,y2) = centre('conv1', top),centre('add', top),centre('downsample.0', top)
    parts = [line((8,y0), (x0,y0)), line((34,y0), (34,y2), (x1,y2), (x1,y0)), text(14, y0-7, 'x', 'map')]
    parts += [line(centre(a, top), centre(b, top)) for a,b in LINES]
    parts += [line(centre('out', top), (centre('out', top)[0]+WIDE/2+26, y0))]
    parts += [box(name, top, kind(name)) for name in PLACES if not (folded and name in bns)]
    if not folded: parts += [way(row.bn, into, top) for row in rows for into in row.into]
    return '\n'.join(parts)

STYLE = """text{font-family:system-ui,sans-serif;text-anchor:middle;fill:#1f2933} .word{font-size:14px}
.map{font-size:13px;font-style:italic;fill:#1e7e46} .title{font-size:15px;font-weight:600;text-anchor:start}
rect{stroke:#52606d;stroke-width:1.2} .plain{fill:#e4e9ee} .bn{fill:#fde2e1;stroke:#c0392b;stroke-dasharray:4 3} .layer{fill:#d3efdd;stroke:#1e7e46}
.line{fill:none;stroke:#7b8794;stroke-width:1.4} .way{fill:none;stroke:#27ae60;stroke-width:2}"""

def picture():
    "The whole picture"
    rep = fold_block()
    width,first,second = LEFT+7*STEP+20,86,308
    what = 'A residual block. Before: the map of every batch norm goes back into the convolution before it. After: no batch norm is left.'
    before = f'before: {rep.n_bn} batch norms, {rep.params_before:,} parameters'
    after = f'after: no batch norm, {rep.params_after:,} parameters, the same outputs'
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} 450" role="img" aria-label="{what}">
<title>{what}</title>
<style>{STYLE}</style>
<defs><marker id="tip" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="7" markerHeight="7" orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="#27ae60"/></marker></defs>
<rect x=".5" y=".5" width="{width-1}" height="449" rx="12" style="fill:#fff;stroke:#d9dee3"/>
{text(20, 28, before, 'title')}
{drawn(first, rep.rows, False)}
{text(20, 282, after, 'title')}
{drawn(second, rep.rows, True)}
</svg>
"""

if __name__=='__main__':
    out = Path(sys.argv[1] if len(sys.argv)>1 else Path(__file__).parent.parent/'README_files'/'block.svg')
    out.write_text(picture(), encoding='utf-8')
