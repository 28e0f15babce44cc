"What is released: metadata, an sdist that can be built from, types, import time"
import configparser, re, subprocess, sys, tarfile
from pathlib import Path
import pytest, yaml

root = Path(__file__).parent.parent
cfg = configparser.ConfigParser()
cfg.read(root/'settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']

def setup(*args, cwd=root): return subprocess.run([sys.executable, 'setup.py', '-q', *args], cwd=cwd, capture_output=True, text=True, check=True).stdout

@pytest.fixture(scope='module')
def sdist(tmp_path_factory):
    "The unpacked sdist"
    out = tmp_path_factory.mktemp('sdist')
    setup('egg_info', '--egg-base', out, 'sdist', '--dist-dir', out)
    with tarfile.open(next(out.glob('*.tar.gz'))) as tar: tar.extractall(out, filter='data')
    return next(path for path in out.iterdir() if (path/'setup.py').exists())

def test_sdist_can_be_built_from(sdist): assert setup('--version', cwd=sdist).strip().splitlines()[-1]==cfg['version']

def test_sdist_has_all_of_the_package(sdist):
    def files(folder): return {path.relative_to(folder) for path in (folder/'fastai_bnfold').rglob('*') if path.suffix in ('.py','.typed')}
    assert files(sdist)==files(root) and Path('fastai_bnfold/py.typed') in files(sdist)

def test_one_version():
    assert f'## {cfg["version"]}' in (root/'CHANGELOG.md').read_text(encoding='utf-8')
    assert yaml.safe_load((root/'CITATION.cff').read_text(encoding='utf-8'))['version']==cfg['version']

def test_links_are_there_where_the_repository_is(monkeypatch):
    monkeypatch.setenv('GIT_URL', 'https://example.org/x')
    text = setup('--long-description')
    assert 'https://example.org/x/raw/main/README_files/block.svg' in text
    assert not re.search(r'\]\((?!https?:)', text)

@pytest.mark.parametrize('path', sorted((root/'.github'/'workflows').glob('*.yml')), ids=lambda p: p.stem)
def test_workflows_call_what_is_there(path):
    jobs = yaml.safe_load(path.read_text(encoding='utf-8'))['jobs'].values()
    runs = '\n'.join(step.get('run', '') for job in jobs for step in job['steps'])
    targets = re.findall(r'^([a-z-]+):', (root/'Makefile').read_text(), re.M)
    assert set(re.findall(r'\bmake ([a-z-]+)', runs))<=set(targets)
    assert all((root/file).exists() for file in re.findall(r'\.(?:github|ci)/\w+(?:\.py)?', runs))

def test_import_costs_little():
    "`from fastai_bnfold.all import *` beside `from fastai.vision.all import *`: at most 15 % more processor time"
    code = '''import time
start = time.process_time()
from fastai.vision.all import *
between = time.process_time()
from fastai_bnfold.all import *
print((time.process_time()-between)/(between-start))'''
    def share(): return float(subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, check=True, cwd=root).stdout)
    assert share()<=.15 or share()<=.15 # a second time, should the machine have been busy
