"Execute notebooks in place: python nbs/run.py NOTEBOOK..."
import sys
from pathlib import Path
import nbformat
from nbclient import NotebookClient

for p in map(Path, sys.argv[1:]):
    nb = nbformat.read(p, 4)
    NotebookClient(nb, timeout=4*3600, kernel_name='python3', resources={'metadata': {'path': str(p.parent)}}).execute()
    for c in nb.cells: # warnings name paths of the machine that ran the notebook
        if c.cell_type=='code': c.outputs = [o for o in c.outputs if o.get('name')!='stderr']
    nbformat.write(nb, p)
    print(p, flush=True)
