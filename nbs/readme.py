"README.md from nbs/index.ipynb: python nbs/readme.py [FOLDER]. Of a cell that begins with `#| echo: false` only the output is shown"
import re, sys
from pathlib import Path
import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config

here,out = Path(__file__).parent, Path(sys.argv[1] if len(sys.argv)>1 else Path(__file__).parent.parent)
nb = nbformat.read(here/'index.ipynb', 4)
nb.metadata['language_info'] = {'name': 'python'}
for c in (c for c in nb.cells if c.cell_type=='code'):
    if c.source.startswith('#| echo: false'): c.metadata['tags'] = ['hide']
    c.outputs = [o for o in c.outputs if 'class="fastprogress"' not in o.get('data', {}).get('text/html', '')]
    for o in c.outputs:
        d = o.get('data', {})
        if 'text/html' in d: # tables stay, as they are; progress bars and their styles say nothing on a page
            o.data = {'text/markdown': re.sub(r'\s*\n\s*', '', d['text/html']) if '<table' in d['text/html'] and '<progress' not in d['text/html'] else ''}
        elif 'text/markdown' in d: o.data = {'text/markdown': d['text/markdown']}

cfg = Config({'TagRemovePreprocessor': {'enabled': True, 'remove_input_tags': ('hide',)}})
body,res = MarkdownExporter(config=cfg).from_notebook_node(nb, resources={'unique_key': 'README', 'output_files_dir': 'README_files'})
body = body.replace('](../', '](') # README.md is one folder up
(out/'README.md').write_text(re.sub(r'\s*\n(\s*\n)+', '\n\n', body.strip())+'\n')
for name,data in res['outputs'].items():
    (out/name).parent.mkdir(exist_ok=True)
    (out/name).write_bytes(data)
