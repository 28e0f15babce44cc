"README: short, its links lead somewhere, its commands are there, its figures are those of the committed results"
import re, subprocess, sys
from pathlib import Path
import nbformat
import pytest

root = Path(__file__).parent.parent
readme = (root/'README.md').read_text(encoding='utf-8')
pages = [root/'README.md', root/'CONTRIBUTING.md', root/'CHANGELOG.md', *sorted((root/'docs').rglob('*.md'))]

def links(text):
    "Links of a page that stay in the repository"
    text = re.sub(r'^```(?!\{).*?^```$', '', text, flags=re.M|re.S)
    return [link.partition('#')[0] for link in re.findall(r'\]\(([^)\s]+)\)', text) if not link.startswith(('http','#'))]

def test_at_most_900_words(): assert len(readme.split())<=900

@pytest.mark.parametrize('page', pages, ids=lambda p: str(p.relative_to(root)))
def test_links_lead_somewhere(page):
    missing = [link for link in links(page.read_text(encoding='utf-8')) if link and not (page.parent/link).exists()]
    allowed = {'nbs/index.md'} if page.parent==root/'docs' else {'../api/index.md'} # written with the site
    assert set(missing)<=allowed, missing

def test_the_first_screen_shows_the_picture_and_the_commands():
    first = readme.split('## ')[0]
    assert all(word in first for word in ('README_files/block.svg','pip install','make demo','make test'))

def test_every_picture_has_words():
    for page in pages: assert not re.search(r'!\[\]\(', page.read_text(encoding='utf-8')), page

def test_commands_are_there():
    text = ''.join(page.read_text(encoding='utf-8') for page in pages)
    scripts = set(re.findall(r'python ((?:benchmarks|examples|nbs|docs)/\w+\.py)', text))
    assert len(scripts)>12 and [script for script in scripts if not (root/script).exists()]==[]
    targets = set(re.findall(r'make ([a-z-]+)\b', '\n'.join(re.findall(r'`make [a-z-]+`|^make [a-z-]+', text, re.M))))
    assert targets<=set(re.findall(r'^([a-z-]+):', (root/'Makefile').read_text(), re.M))

def test_figures_are_those_of_the_results(monkeypatch):
    "The cells that show figures, executed again"
    cells = [c for c in nbformat.read(root/'nbs'/'index.ipynb', 4).cells if c.source.startswith('#| echo: false')]
    monkeypatch.chdir(root/'nbs')
    names = {}
    for cell in cells:
        *lines,last = re.split(r'\n(?=\S)', cell.source)
        exec('\n'.join(lines), names)
        assert eval(last, names).data==cell.outputs[0]['data']['text/markdown']
    assert len(cells)==3

def test_code_shows_public_names_only():
    import fastai_bnfold.all as bnfold
    from fastai.learner import Learner
    methods = set(re.findall(r'learn\.(\w+_bn|deploy|integer_net|bn_shift)\b', ''.join(page.read_text(encoding='utf-8') for page in pages)))
    assert len(methods)>8 and [name for name in methods if not hasattr(Learner, name)]==[]

def test_picture_is_the_plan(tmp_path):
    subprocess.run([sys.executable, root/'docs'/'picture.py', tmp_path/'block.svg'], check=True, cwd=root)
    assert (tmp_path/'block.svg').read_text(encoding='utf-8')==(root/'README_files'/'block.svg').read_text(encoding='utf-8')
