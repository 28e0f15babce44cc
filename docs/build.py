"""The documentation site, from the notebooks, `docs/`, the code and the figures in `benchmarks/results/`.

    python docs/build.py [--out _docs] [--work _proc]

Nothing is executed and nothing is fetched: the notebooks are committed with their outputs.
"""
import re, shutil, sys
from argparse import ArgumentParser
from collections import Counter
from pathlib import Path
import nbformat
from sphinx.cmd.build import build_main
import api, benchmarks

root = Path(__file__).parent.parent
FENCE = re.compile(r'(^```.*?^```$|^~~~.*?^~~~$)', re.M|re.S)
NOISE = ('<progress','<style>')

def rooms():
    "Room → what is in it, in the order of the table in CONTRIBUTING.md; rooms that are not there follow"
    rows = re.findall(r'^\| `(\w+)/`.*?\| (.*?) \|', (root/'CONTRIBUTING.md').read_text(encoding='utf-8'), re.M)
    folders = sorted(p.name for p in (root/'nbs').iterdir() if p.is_dir() and p.name!='tutorials' and list(p.glob('*.ipynb')))
    return {name: dict(rows).get(name, '') for name in [*dict(rows), *folders] if name in folders}

def read(path): return nbformat.read(path, 4)

def title_of(notebook):
    "The heading of a notebook, and the sentence below it"
    text = next(cell.source for cell in notebook.cells if cell.cell_type=='markdown')
    words = re.search(r'^> (.*)$', text, re.M)
    return re.search(r'^# (.*)$', text, re.M)[1], words[1] if words else ''

def noisy(output):
    "Progress bars and their styles say nothing on a page"
    html = output.get('data', {}).get('text/html', '')
    return output.get('name')=='stderr' or any(tag in html for tag in NOISE)

def clean_code(cell, about):
    "Without directives and noise, and with words for the pictures; False for a cell that nobody should see"
    if cell.source.startswith(('#| hide','#| default_exp')): return False
    cell.source = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M).strip()
    cell.outputs = [o for o in cell.outputs if not noisy(o)]
    if any('image/png' in o.get('data', {}) for o in cell.outputs): cell.metadata['mystnb'] = {'image': {'alt': about}}
    return bool(cell.source)

def words_for(text, before):
    "What a picture after this text shows: the text's last sentence"
    plain = re.sub(r'[`*_$#>\\\[\]]', '', FENCE.sub('', text)).strip().splitlines()
    return plain[-1].strip(' :.')[:200] if plain else before

def clean(notebook, link):
    "A notebook as people should read it"
    about,kept = '',[]
    for cell in notebook.cells:
        if cell.cell_type=='markdown':
            about = words_for(cell.source, about)
            cell.source = link(cell.source)
            kept.append(cell)
        elif clean_code(cell, about): kept.append(cell)
    notebook.cells = kept
    notebook.metadata['language_info'] = dict(name='python', pygments_lexer='ipython3')
    return notebook

def told_apart(name):
    "Is this more than a word of the language?"
    return name[0].isupper() or '_' in name

def linker(labels):
    "A function that makes links of the names and notebooks in backticks; `labels`: pairs of a name and its target"
    count = Counter(name.split('.')[-1] for name,_ in labels)
    targets = {name.split('.')[-1]: label for name,label in labels if count[name.split('.')[-1]]==1 and told_apart(name.split('.')[-1])}
    targets |= {name: label for name,label in labels if '.' in name}
    targets |= {f'learn.{name[8:]}': label for name,label in labels if name.startswith('Learner.')}
    def target(match):
        word = match[1]
        if re.fullmatch(r'nbs/\w+/[\w/]+\.ipynb', word) and (root/word).exists(): return f'[`{word}`](/{word})'
        name = targets.get(word.split('(')[0])
        return f'[`{word}`](#{name})' if name else match[0]
    def in_text(text): return re.sub(r'(?<![`\[\w])`([\w./]+(?:\([^`\n]*\))?)`(?![`\]\w])', target, text)
    def in_line(line): return line if line.startswith('#') else in_text(line)
    def link(text):
        parts = FENCE.split(text) # every second one is code
        parts[::2] = ['\n'.join(map(in_line, part.split('\n'))) for part in parts[::2]]
        return ''.join(parts)
    return link

def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding='utf-8')

def contents(pages, caption=''):
    "A list of pages for the side bar; `pages` may have wildcards"
    options = ':maxdepth: 1\n:glob:\n' + (f':caption: {caption}\n' if caption else '')
    return f'```{{toctree}}\n{options}\n'+'\n'.join(pages)+'\n```\n'

def api_pages():
    "Room → its page, and pairs of a name and its target"
    notebooks = {p.relative_to(root): read(p) for p in sorted((root/'nbs').rglob('*.ipynb'))}
    modules = {api.module_of(nb): (f'/{p}', title_of(nb)[1]) for p,nb in notebooks.items() if api.module_of(nb)}
    groups = {room: {m: v for m,v in modules.items() if m.startswith(f'{room}.')} for room in rooms()}
    groups['errors and timing'] = {m: v for m,v in modules.items() if '.' not in m}
    pages,labels = {},[]
    for room,found in groups.items():
        pages[room.replace(' ', '_')],new = api.room_page(room, rooms().get(room, ''), found)
        labels += new.items()
    return pages, labels

def write_api(work, pages, labels, link):
    "A page for every room, and what people call on the first one"
    for room,page in pages.items(): write(work/'api'/f'{room}.md', link(page))
    first = dict(reversed(labels)) # a name in two rooms is that of the first
    called = [name for name in api.public_names() if name in first]
    methods = [name for name,_ in labels if name.startswith('Learner.')]
    text = '\n'.join(pages.values())
    def line(name, shown): return f'| [`{shown}`](#{first[name]}) | {link(api.words_of(name, first[name], text))} |'
    rows = [line(name, name.replace('Learner.', 'learn.')) for name in [*methods, *called]]
    about = 'What `from fastai_bnfold.all import *` gives; below, every public name by room, in the order of the notebooks.'
    table = '\n'.join(['| | |','| --- | --- |',*rows])
    write(work/'api'/'index.md', f'# API\n\n{about}\n\n{table}\n\n{contents(pages)}')

def write_notebooks(work, link):
    for path in sorted((root/'nbs').rglob('*.ipynb')):
        if path.name=='index.ipynb' or '.ipynb_checkpoints' in path.parts: continue
        out = work/path.relative_to(root)
        out.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(clean(read(path), link), out)

def write_rooms(work):
    "What is in a room, and its notebooks in reading order"
    for room,about in rooms().items():
        inner = [f'{p.name}/*' for p in sorted((root/'nbs'/room).iterdir()) if p.is_dir() and list(p.glob('*.ipynb'))]
        write(work/'nbs'/room/'index.md', f'# {room}/\n\n{about}\n\n{contents(["[0-9]*", *inner])}')
    pages = [f'{room}/index' for room in rooms()] + ['[0-9]*']
    about = 'The library is written as notebooks: idea, code, what it gives. In reading order:'
    write(work/'nbs'/'index.md', f'# Essays\n\n{about}\n\n{contents(pages)}')

def move_up(text, depth):
    "Links that leave `docs/`: there it is a folder of the repository, here it is the top"
    return re.sub(r'\]\(((?:\.\./)*)', lambda m: '](' + (m[1][3:] if m[1].count('../')>depth else m[1]), text)

def write_pages(work, link):
    "What is written by hand"
    for path in sorted((root/'docs').rglob('*.md')):
        name = path.relative_to(root/'docs')
        text = move_up(path.read_text(encoding='utf-8'), len(name.parts)-1)
        text = text.replace('<!-- totals of the zoo -->', benchmarks.totals())
        if name.name=='benchmarks.md': text += '\n'+contents(f'benchmarks/{result}' for result in benchmarks.names())
        write(work/name, link(text))
    for name in ('CONTRIBUTING.md','CHANGELOG.md'): write(work/name, link((root/name).read_text(encoding='utf-8').replace('](docs/', '](')))
    shutil.copytree(root/'docs'/'_static', work/'_static')
    shutil.copytree(root/'README_files', work/'README_files')
    shutil.copy(root/'docs'/'conf.py', work)

def main():
    "Write the sources of the site, and build it; any warning is an error"
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--out', type=Path, default=root/'_docs')
    parser.add_argument('--work', type=Path, default=root/'_proc')
    args = parser.parse_args()
    shutil.rmtree(args.work, ignore_errors=True)
    pages,labels = api_pages()
    link = linker(labels)
    write_api(args.work, pages, labels, link)
    write_notebooks(args.work, link)
    write_rooms(args.work)
    benchmarks.write_all(args.work/'benchmarks')
    write_pages(args.work, link)
    site = args.work/'site'/'html' # MyST-NB writes beside it, too
    failed = build_main(['-q', '-W', '--keep-going', '-j', '2', '-d', str(args.work/'.doctrees'), str(args.work), str(site)])
    if failed: sys.exit(failed)
    shutil.rmtree(args.out, ignore_errors=True)
    shutil.move(site, args.out)

if __name__=='__main__': main()
