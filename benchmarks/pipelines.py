"""Does a deployed model say of odd image files what `learn.predict` says?

    python benchmarks/pipelines.py [--sizes 64,224,384] [--out benchmarks/results/pipelines.json]

24 files (modes, formats, EXIF, extreme shapes) × 8 pipelines × sizes, each as path, bytes and opened Pillow image, on ONNX Runtime: label, and
probabilities to 1e-5. Where fastai itself fails, the deployed model has to say `DeployError`. The networks are not trained; their BN statistics are random.
"""
import json, sys, tempfile
from pathlib import Path
from fastcore.script import call_parse
from fastai_bnfold.lab.command import machine
sys.path.append(str(Path(__file__).parent.parent/'tests'))
from odd_images import class_folder, image_learner, odd_files, pipelines, said, differs

def one(where, files, name, size):
    "Deploy one pipeline at one size, and try all files"
    learn = image_learner(where/'classes', *pipelines(size)[name])
    with learn.no_bar(): deployed = learn.deploy(where/'m', 'onnx')
    wrong = {file: differs(learn, deployed, path) for file,path in files.items()}
    refused = [file for file,path in files.items() if said(learn, path) is None]
    return dict(pipeline=name, size=size, notes=deployed.card['notes'], files=len(files), fastai_fails=refused,
                wrong={file: why for file,why in wrong.items() if why})

@call_parse
def main(
    sizes:str='64,224,384',                     # In pixels
    out:str='benchmarks/results/pipelines.json' # Where the figures go
):
    "`learn.predict` and `Deployed.predict`, side by side"
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        class_folder(where/'classes')
        files = odd_files(where/'odd')
        for size in map(int, sizes.split(',')):
            for name in pipelines(size):
                rows.append(one(where, files, name, size))
                print(rows[-1], flush=True)
    n = sum(3*row['files'] for row in rows)
    res = dict(machine=machine(), items=n, wrong=sum(len(row['wrong']) for row in rows), rows=rows)
    Path(out).write_text(json.dumps(res, indent=1, ensure_ascii=False))
    print(f"{n:,} items, {res['wrong']} files wrong. All figures: {out}")
