"README.md from nbs/index.ipynb: python nbs/readme.py [FOLDER]. Cells that begin with `#| echo: false` show only their output"
import sys
from pathlib import Path
import nbformat
from nbconvert import MarkdownExporter

here,out = Path(__file__).parent, Path(sys.argv[1] if len(sys.argv)>1 else Path(__file__).parent.parent)
nb = nbformat.read(here/'index.ipynb', 4)
for c in nb.cells:
    if c.cell_type!='code': continue
    if c.source.startswith('#| echo: false'): c.transient = {'remove_source': True}
    # progress bars, and the scripts that notebooks carry for them, say nothing on a page
    c.outputs = [o for o in c.outputs if '<progress' not in o.get('data', {}).get('text/html', '') and o.output_type!='stream' or o.get('name')=='stdout']
    for o in c.outputs:
        if 'text/markdown' in o.get('data', {}): o.data = {'text/markdown': o.data['text/markdown']}
body,res = MarkdownExporter(exclude_input_prompt=True).from_notebook_node(nb, resources={'unique_key': 'README', 'output_files_dir': 'README_files'})
(out/'README.md').write_text(body.strip()+'\n')
for name,data in res['outputs'].items():
    (out/name).parent.mkdir(exist_ok=True)
    (out/name).write_bytes(data)
