"What is released: metadata, an sdist that can be built from, types, import time"
import configparser, os, re, subprocess, sys, sysconfig, tarfile, venv
from pathlib import Path
import pytest, yaml

root = Path(__file__).parent.parent
cfg = configparser.ConfigParser()
cfg.read(root/'settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']

def setup(*args, cwd=root): return subprocess.run([sys.executable, 'setup.py', '-q', *args], cwd=cwd, capture_output=True, text=True, check=True).stdout

@pytest.fixture(scope='module')
def archive(tmp_path_factory):
    "The sdist"
    out = tmp_path_factory.mktemp('sdist')
    setup('egg_info', '--egg-base', out, 'sdist', '--dist-dir', out)
    return next(out.glob('*.tar.gz'))

@pytest.fixture(scope='module')
def sdist(archive):
    "The unpacked sdist"
    with tarfile.open(archive) as tar: tar.extractall(archive.parent, filter='data')
    return next(path for path in archive.parent.iterdir() if (path/'setup.py').exists())

def pip(*args):
    quiet = '--quiet', '--no-deps', '--no-index', '--no-build-isolation', '--disable-pip-version-check'
    subprocess.run([sys.executable, '-m', 'pip', *args, *quiet], capture_output=True, text=True, check=True)

@pytest.fixture(scope='module')
def wheel(archive):
    "Built from the sdist, as an installer does where there is no wheel"
    pip('wheel', archive, '-w', archive.parent)
    return next(archive.parent.glob('*.whl'))

@pytest.fixture
def empty(tmp_path):
    "An environment's Python: this one's packages without the editable install (whose `.pth` counts only where it lies)"
    venv.create(tmp_path/'env', with_pip=False)
    python = tmp_path/'env'/('Scripts' if sys.platform=='win32' else 'bin')/'python'
    ask = [python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))']
    own = Path(subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip())
    (own/'others.pth').write_text(sysconfig.get_path('purelib'))
    return python

def run_alone(python, *args, cwd):
    env = {name: value for name,value in os.environ.items() if name!='PYTHONPATH'}
    return subprocess.run([python, *args], capture_output=True, text=True, cwd=cwd, env=env)

def test_nothing_of_the_repository_is_in_the_empty_environment(empty, tmp_path):
    assert 'No module named' in run_alone(empty, '-c', 'import fastai_bnfold', cwd=tmp_path).stderr

def test_wheel_works_where_it_is_installed(empty, wheel, tmp_path):
    "`make dist-test` does the same in environments that get everything from the package's own requirements, for the sdist, too"
    pip('--python', empty, 'install', wheel)
    res = run_alone(empty, '-W', 'ignore', root/'.github'/'smoke.py', cwd=tmp_path)
    assert 'folds' in res.stdout, res.stderr[-3000:]

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
