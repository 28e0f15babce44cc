"The notebooks are the source: in sync with the package, clean, and the fast ones run"
import configparser, filecmp, json, os, shutil, subprocess, sys
from pathlib import Path
import pytest
import fastai_bnfold

root = Path(__file__).parent.parent
nbs = sorted((root/'nbs').rglob('*.ipynb'))
fast = [p for p in nbs if 'tutorials' not in p.relative_to(root).parts]
bin_ = Path(sys.executable).parent

def test_there_are_notebooks(): assert len(fast)>=9 and len(nbs)>len(fast)

def copy(tmp_path):
    for d in ('nbs','fastai_bnfold','benchmarks'): shutil.copytree(root/d, tmp_path/d, ignore=shutil.ignore_patterns('__pycache__','.ipynb_checkpoints'))
    for f in ('pyproject.toml','settings.ini','setup.py','README.md'): shutil.copy(root/f, tmp_path/f)
    return tmp_path

def test_export_is_in_sync(tmp_path):
    new = copy(tmp_path)
    subprocess.run([bin_/'nbdev-export'], cwd=new, check=True)
    names = {str(p.relative_to(d/'fastai_bnfold')) for d in (root,new) for p in (d/'fastai_bnfold').rglob('*.py')}
    assert filecmp.cmpfiles(root/'fastai_bnfold', new/'fastai_bnfold', names, shallow=False)[1:]==([],[])

def test_notebooks_are_clean(tmp_path):
    new = copy(tmp_path)
    subprocess.run([bin_/'nbdev-clean'], cwd=new, check=True)
    assert [p for p in nbs if p.read_text()!=(new/p.relative_to(root)).read_text()]==[]

@pytest.mark.parametrize('p', nbs, ids=lambda p: str(p.relative_to(root/'nbs')))
def test_notebooks_are_committed_executed(p):
    "Outputs are there, and none is an error"
    cells = [c for c in json.loads(p.read_text())['cells'] if c['cell_type']=='code']
    assert any(c['outputs'] for c in cells)
    assert not any(o['output_type']=='error' for c in cells for o in c['outputs'])

@pytest.mark.parametrize('p', fast, ids=lambda p: str(p.relative_to(root/'nbs')))
def test_fast_notebooks_run(p, tmp_path):
    new = copy(tmp_path)
    out = subprocess.run([sys.executable, new/'nbs'/'run.py', new/p.relative_to(root)], capture_output=True, text=True, cwd=root)
    assert out.returncode==0, out.stderr[-3000:]

def test_readme_is_in_sync(tmp_path):
    subprocess.run([sys.executable, root/'nbs'/'readme.py', tmp_path], check=True)
    assert (tmp_path/'README.md').read_text()==(root/'README.md').read_text()

def test_one_home_of_the_version():
    cfg = configparser.ConfigParser(); cfg.read(root/'settings.ini')
    assert cfg['DEFAULT']['version']==fastai_bnfold.__version__
    assert 'version =' not in (root/'pyproject.toml').read_text()

def test_no_paths_of_one_machine():
    files = subprocess.run(['git','ls-files'], cwd=root, capture_output=True, text=True).stdout.split()
    texts = [root/f for f in files if not f.endswith(('.png',)) and f!='.ci/run']
    words = ['/'.join(w) for w in (('','work',''), ('','root',''), ('..','shared'))] # in pieces, so that this file has none either
    for f in texts: assert not any(w in f.read_text() for w in words), f

def test_public_names():
    import fastai_bnfold.all as a
    from fastai.learner import Learner
    assert all(hasattr(a, n) for n in a.__all__) and all(hasattr(Learner, n) for n in ('fold_bn','unfold_bn'))
    for n in a.__all__: assert getattr(a, n).__doc__
