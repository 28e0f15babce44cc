"""Does a deployed model say of odd image files, and of rows of tables, what `learn.predict` says?

    python benchmarks/pipelines.py [--part images,tables] [--sizes 64,224,384] [--seed 0] [--out benchmarks/results/pipelines.json]

Images: 24 files (modes, formats, EXIF, extreme shapes) × 8 pipelines × sizes, each as path, bytes and opened Pillow image. Tables: 15 kinds
of columns, five rows of each (with and without a number missing) as `Series`, dict, dict of NumPy's numbers, JSON and in a data frame. Label,
and probabilities to 1e-5, on ONNX Runtime; `worst` is the largest difference. Where fastai itself fails, the deployed model has to say
`DeployError`. The networks are not trained; their weights and BN statistics are random, from the seed.
"""
import json, sys, tempfile, warnings
from pathlib import Path
import numpy as np, torch
from fastcore.script import call_parse
from fastai_bnfold.lab.command import machine
sys.path.append(str(Path(__file__).parent.parent/'tests'))
from odd_images import class_folder, image_learner, odd_files, pipelines, said, distance
from test_tables import learner_of, tables

def one(where, files, name, size, seed):
    "Deploy one pipeline at one size, and try all files"
    torch.manual_seed(seed)
    learn = image_learner(where/'classes', *pipelines(size)[name])
    with learn.no_bar(): deployed = learn.deploy(where/'m', 'onnx')
    found = {file: distance(learn, deployed, path) for file,path in files.items()}
    refused = [file for file,path in files.items() if said(learn, path) is None]
    worst = max((far for far in found.values() if not isinstance(far, str)), default=0.)
    wrong = {file: far for file,far in found.items() if isinstance(far, str) or not far<=1e-5}
    return dict(pipeline=name, size=size, notes=deployed.card['notes'], files=len(files), fastai_fails=refused, worst=worst, wrong=wrong)

def images(where, sizes, seed):
    class_folder(where/'classes')
    files,rows = odd_files(where/'odd'),[]
    for size in map(int, sizes.split(',')):
        for name in pipelines(size):
            rows.append(one(where, files, name, size, seed))
            print(rows[-1], flush=True)
    return dict(items=sum(3*row['files'] for row in rows), wrong=sum(len(row['wrong']) for row in rows),
                worst=max(row['worst'] for row in rows), rows=rows)

def boxed(row): return {k: np.asarray(v)[()] if isinstance(v, (int,float)) else v for k,v in row.items()}

def row_forms(df, i):
    "What one row of a data frame may come as"
    row = df.iloc[i]
    forms = dict(series=row, dict=row.to_dict(), numpy=boxed(row.to_dict()), frame=df.iloc[[i]])
    if 'bin' not in df: forms['json'] = json.loads(df.iloc[[i]].to_json(orient='records', date_format='iso'))[0] # (an interval is no JSON)
    return forms

def table(where, name, seed):
    "One kind of table"
    torch.manual_seed(seed)
    learn,df = learner_of(name),tables[name][0].drop(columns='y')
    with learn.no_bar(), learn.no_logging():
        deployed = learn.deploy(where/'m', 'onnx')
        wrong,n,worst = {},0,0.
        for i in (0,1,2,3,7):
            label,_,probs = learn.predict(df.iloc[i].astype(object))
            label = learn.dls.vocab[int(probs.argmax())]
            for form,item in row_forms(df, i).items():
                got = deployed.predict(item)
                got = got[0] if isinstance(got, list) else got
                far = float(np.abs(got.probs-probs.numpy()).max())
                n,worst = n+1,max(worst, far)
                if got.label!=label or not far<=1e-5: wrong[f'row {i}, {form}'] = far
    return dict(table=name, notes=deployed.card['notes'], items=n, worst=worst, wrong=wrong)

def all_tables(where, seed):
    rows = [table(where, name, seed) for name in tables]
    for row in rows: print(row, flush=True)
    return dict(items=sum(row['items'] for row in rows), wrong=sum(len(row['wrong']) for row in rows),
                worst=max(row['worst'] for row in rows), rows=rows)

@call_parse
def main(
    part:str='images,tables',                   # What is compared
    sizes:str='64,224,384',                     # In pixels
    seed:int=0,                                 # Of the networks
    out:str='benchmarks/results/pipelines.json' # Where the figures go; parts left out stay as they are
):
    "`learn.predict` and `Deployed.predict`, side by side"
    warnings.simplefilter('ignore')
    out = Path(out)
    res = json.loads(out.read_text()) if out.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        if 'images' in part: res['images'] = images(where, sizes, seed)
        if 'tables' in part: res['tables'] = all_tables(where, seed)
    res = {key: res[key] for key in ('images','tables') if key in res} | dict(seed=seed, machine=machine())
    out.write_text(json.dumps(res, indent=1, ensure_ascii=False))
    for key in part.split(','): print(f"{key}: {res[key]['items']:,} items, {res[key]['wrong']} wrong, worst {res[key]['worst']:.1e}")
