"""How the code reads, beside fastcore and fastai as they are installed: is it half way from what it was to fastcore?

    python benchmarks/style.py [--by-module] [--functions] [--check] [--root .]

What is counted, in all modules of a package but `_modidx.py` and `_nbdev.py`. These definitions give the figures of
2026-11-25 for commit c518fd6 (`git archive c518fd6 | tar x -C FOLDER`, then `--root FOLDER`), and those of fastcore,
except that its closures counted nowhere then (5.7 complex functions per 1,000 lines).

- A *line* is one with code or docstring on it. Blank lines and lines of comment alone count nowhere.
- *Characters per line in functions*: the mean over the lines from `def` to the end, without indentation. Closures and
  methods are functions.
- *Lines over 120, over 160*: the whole line, with its indentation and the comment behind it.
- *Names of one letter*: `uses` are all names that are read or written. `bindings` are arguments, and what is assigned
  in functions, lambdas and comprehensions, each time it is bound; `self` and `cls` are none. `_` counts nowhere.
- *Complexity*: 1, and 1 for each if, elif, ternary, for, while, except and case, for and if of a comprehension, and
  operand of and/or after the first. A lambda is part of its function, a function within a function counts for itself.
- *Cells*: the notebooks of `nbs/`, tutorials apart; lines that are neither blank nor directives. An example is a cell
  that is shown and not exported (no `hide`, `echo: false`, `default_exp`, `nbdev_export`).
- *Pictures*: PNG and SVG outputs in `nbs/fold/*.ipynb`.
- *Private names*: `from .module import _name`, anywhere in the package.
- *Cycles*: groups of modules that import each other at module level. That importing a module runs the `__init__.py`
  above it does not count.
"""
import argparse, ast, io, json, subprocess, sys, tokenize
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, median

name = 'fastai_bnfold'
left_out = ('_modidx.py','_nbdev.py')
no_code = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
Function = (ast.FunctionDef, ast.AsyncFunctionDef)
Comprehension = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
Branch = (ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.match_case)
# fastcore's notebooks are not installed: measured in its repository, 2026-11-25
fastcore_cells = dict(median=6, longest=51, examples=.84)

# Modules

def code_lines(text):
    "Numbers of the lines with code or docstring on them"
    numbers = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in no_code: numbers.update(range(token.start[0], token.end[0]+1))
    lines = text.split('\n')
    return {i for i in numbers if lines[i-1].strip()}

class Module:
    "A module: its text, its lines, its syntax tree"
    def __init__(self, path, package):
        self.path,self.is_init = path,path.stem=='__init__'
        parts = path.relative_to(package.parent).with_suffix('').parts
        self.name = '.'.join(parts[:-1] if self.is_init else parts)
        text = path.read_text(encoding='utf-8')
        try: self.tree = ast.parse(text)
        except SyntaxError as e: raise SystemExit(f"{path}:{e.lineno}: {e.msg}. Is a merge under way?")
        self.lines,self.code = text.split('\n'),code_lines(text)
        self.nodes = list(ast.walk(self.tree))
        self.functions = self.of_type(Function)

    def of_type(self, types): return [node for node in self.nodes if isinstance(node, types)]
    def around(self, node):
        "Name of the innermost function around `node`"
        outer = [function for function in self.functions if function.lineno<=node.lineno<=function.end_lineno]
        return max(outer, key=lambda function: function.lineno).name if outer else '(module)'

def modules_of(
    package:Path # Folder of a package
)->list:         # Its modules, generated indices apart
    return [Module(path, package) for path in sorted(package.rglob('*.py')) if path.name not in left_out]

def installed(package):
    "Modules of an installed package, which is not imported"
    spec = find_spec(package)
    if spec is None: raise SystemExit(f"{package} is not installed; it is what is compared with: pip install {package}")
    return modules_of(Path(spec.origin).parent)

def flat(lists):
    "What is in all of them"
    res = []
    for part in lists: res.extend(part)
    return res

def percent(flags):
    flags = list(flags)
    return 100*mean(flags) if flags else 0.

# How it reads. Everything takes a list of modules.

def n_lines(modules): return sum(len(module.code) for module in modules)
def per_1000(n, modules): return 1000*n/max(1, n_lines(modules))

def lengths_in_functions(module):
    "Lengths of the lines of all functions, without indentation; each line once"
    inside = set()
    for function in module.functions: inside.update(range(function.lineno, function.end_lineno+1))
    return [len(module.lines[i-1].strip()) for i in inside & module.code]

def chars_per_line(modules):
    chars = flat(map(lengths_in_functions, modules))
    return mean(chars) if chars else 0.

def lengths(module): return [len(module.lines[i-1].rstrip()) for i in module.code]
def lines_over(modules, limit): return percent(length>limit for length in flat(map(lengths, modules)))
def lines_over_120(modules): return lines_over(modules, 120)
def lines_over_160(modules): return lines_over(modules, 160)

def bound_name(node):
    "The name that a node of the tree binds; `None` if it binds none"
    if isinstance(node, ast.arg): return node.arg
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store): return node.id
    if isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)): return node.name

def bindings(module):
    "Names bound in functions, lambdas and comprehensions, once for each time"
    inside = {}
    for scope in module.of_type((*Function, ast.Lambda, *Comprehension)):
        inside.update((id(node), bound_name(node)) for node in ast.walk(scope))
    return [bound for bound in inside.values() if bound not in (None,'_','self','cls')]

def uses(module): return [node.id for node in module.of_type(ast.Name) if node.id!='_']
def one_letter_uses(modules): return percent(len(used)==1 for used in flat(map(uses, modules)))
def one_letter_bindings(modules): return percent(len(bound)==1 for bound in flat(map(bindings, modules)))

def ways(node):
    "By how many ways through a function `node` adds to them"
    if isinstance(node, Branch): return 1
    if isinstance(node, ast.BoolOp): return len(node.values)-1
    if isinstance(node, ast.comprehension): return 1+len(node.ifs)
    return 0

def complexity(node):
    "Cyclomatic complexity, without the functions and classes that are defined inside"
    def below(node):
        inner = [child for child in ast.iter_child_nodes(node) if not isinstance(child, (*Function, ast.ClassDef))]
        return sum(ways(child)+below(child) for child in inner)
    return 1+below(node)

def complex_functions(module): return [function for function in module.functions if complexity(function)>10]
def several_for(module): return [node for node in module.of_type(Comprehension) if len(node.generators)>1]
def complex_per_1000(modules): return per_1000(len(flat(map(complex_functions, modules))), modules)
def several_for_per_1000(modules): return per_1000(len(flat(map(several_for, modules))), modules)

# Who imports whom

def imported_from(module, node):
    "Name of the module or package that `from … import` names"
    if not node.level: return node.module
    parts = module.name.split('.')
    up = node.level-module.is_init
    return '.'.join([*parts[:len(parts)-up], *filter(None, [node.module])])

def private_names(module):
    "Private names imported from another module of the package"
    package = module.name.split('.')[0]
    nodes = [node for node in module.of_type(ast.ImportFrom) if imported_from(module, node).split('.')[0]==package]
    names = flat([alias.name for alias in node.names] for node in nodes)
    return [private for private in names if private.startswith('_') and not private.startswith('__')]

def is_type_checking(node): return isinstance(node, ast.If) and ast.unparse(node.test).endswith('TYPE_CHECKING')

def imports_at_once(node):
    "Import statements that run when the module is imported"
    if isinstance(node, (ast.Import, ast.ImportFrom)): return [node]
    if isinstance(node, (*Function, ast.expr)) or is_type_checking(node): return []
    return flat(map(imports_at_once, ast.iter_child_nodes(node)))

def imported(module, node, names):
    "Those of the modules `names` that an import statement names"
    if isinstance(node, ast.Import): return {alias.name for alias in node.names} & names
    origin = imported_from(module, node)
    found = {f'{origin}.{alias.name}' for alias in node.names} & names # `from . import module`
    if len(found)<len(node.names): found |= {origin} & names
    return found

def reached(start, edges):
    "All that can be reached from `start`, which is among them if it is on a cycle"
    seen,todo = set(),[start]
    while todo:
        new = edges[todo.pop()]-seen
        seen |= new
        todo.extend(new)
    return seen

def imports(module, names):
    "Those of the modules `names` that `module` imports while it is imported"
    found = set()
    for node in imports_at_once(module.tree): found |= imported(module, node, names)
    return found-{module.name}

def cycles(modules):
    "Groups of modules that import each other"
    names = {module.name for module in modules}
    edges = {module.name: imports(module, names) for module in modules}
    reach = {start: reached(start, edges) for start in names}
    def group_of(start): return frozenset(end for end in reach[start] if start in reach[end])
    groups = set(map(group_of, names))-{frozenset()}
    return sorted(map(sorted, groups))

def n_private(modules): return len(flat(map(private_names, modules)))
def n_cycles(modules): return len(cycles(modules))

probe = """
import json, sys
import torch
def packages(): return {name.split('.')[0] for name in sys.modules}
before = packages()
import NAME.fold
print(json.dumps(sorted(packages()-before-sys.stdlib_module_names-{'NAME'})))
""".replace('NAME', name)

def pulled_in(root):
    "Packages that `import fastai_bnfold.fold` imports beside torch, in a process of its own"
    run = subprocess.run([sys.executable, '-c', probe], cwd=root, capture_output=True, text=True)
    if run.returncode: raise SystemExit(f"import {name}.fold failed:\n{run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])

# Notebooks

def code_cells(path):
    "Code cells of a notebook"
    try: cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    except json.JSONDecodeError as e: raise SystemExit(f"{path}:{e.lineno}: {e.msg}. Is a merge under way?")
    return [cell for cell in cells if cell['cell_type']=='code']

def source(cell): return ''.join(cell['source']).split('\n')
def directives(cell): return [line.strip()[2:].strip() for line in source(cell) if line.strip().startswith('#|')]
def cell_lines(cell): return sum(bool(line.strip()) and not line.strip().startswith('#|') for line in source(cell))
def is_exported(cell): return any(directive.startswith('export') for directive in directives(cell))

def is_example(cell):
    "Is it shown, and not part of the package?"
    if is_exported(cell) or 'nbdev_export' in ''.join(cell['source']): return False
    return not any(directive.startswith(('hide','echo: false','default_exp')) for directive in directives(cell))

def is_picture(output):
    data = output.get('data', {})
    return 'image/png' in data or 'image/svg+xml' in data or '<svg' in ''.join(data.get('text/html', []))

def n_pictures(paths):
    outputs = flat(cell['outputs'] for cell in flat(map(code_cells, paths)))
    return sum(map(is_picture, outputs))

# The table

@dataclass(frozen=True)
class Row:
    "One measure: here, there, then, and how far it should be"
    what:str
    here:float
    old:float=None      # Here on 2026-11-25; `None`: was not measured
    fastcore:float=None
    fastai:float=None
    bar:float=None      # What is asked for, where half way to fastcore is not it
    more:bool=False     # Is more better?
    @property
    def half_way(self): return (self.old+self.fastcore)/2 if self.bar is None else self.bar
    @property
    def ok(self): return self.here>=self.half_way if self.more else self.here<=self.half_way
    def texts(self):
        asked = ('≥ ' if self.more else '≤ ')+shown(self.half_way)
        here = map(shown, (self.old, self.here))
        there = map(shown, (self.fastcore, self.fastai))
        return [self.what, *here, asked, *there, 'ok' if self.ok else 'no']

@dataclass(frozen=True)
class Measure:
    "What is measured of the sources of a package"
    what:str
    short:str       # Head of its column
    of:callable     # From a list of modules to the figure
    old:float=None  # Here on 2026-11-25
    bar:float=None  # As in `Row`

measures = [
    Measure('characters per line in functions', 'chars', chars_per_line, 61),
    Measure('lines over 120, %', '>120', lines_over_120, 11.9),
    Measure('lines over 160, %', '>160', lines_over_160, 3.3),
    Measure('names of one letter, % of uses', 'uses', one_letter_uses, 37),
    Measure('names of one letter, % of bindings', 'bindings', one_letter_bindings, 53), # This script on c518fd6
    Measure('complexity > 10, per 1,000 lines', 'complex', complex_per_1000, 13.1),
    Measure('several `for`, per 1,000 lines', 'several', several_for_per_1000, 6.5),
]
measures_across = [
    Measure('private names imported', 'private', n_private, 9),
    Measure('cycles of imports', 'cycles', n_cycles, bar=0),
]

def rows_of_sources(measures, here, fastcore, fastai):
    def row(measure):
        figures = [measure.of(modules) for modules in (fastcore, fastai)]
        return Row(measure.what, measure.of(here), measure.old, *figures, bar=measure.bar)
    return list(map(row, measures))

def rows_of_notebooks(folder):
    "How the notebooks show what they export"
    paths = [path for path in folder.rglob('*.ipynb') if not {'tutorials','.ipynb_checkpoints'} & set(path.parts)]
    cells = flat(map(code_cells, paths))
    exported = [cell_lines(cell) for cell in cells if is_exported(cell)]
    if not exported: return []
    examples = sum(cell_lines(cell) for cell in cells if is_example(cell))/sum(exported)
    return [Row(f'exported cell, median lines (of {len(exported)})', median(exported), 30, fastcore_cells['median']),
            Row('exported cell, longest', max(exported), 141, fastcore_cells['longest']),
            Row('lines of example per exported line', examples, .17, fastcore_cells['examples'], more=True),
            Row('pictures in nbs/fold', n_pictures((folder/'fold').glob('*.ipynb')), 0, bar=1, more=True)]

def row_of_fold(packages):
    "Does the fold need torch alone?"
    return Row(f'fastai, fastcore imported by {name}.fold', len({'fastai','fastcore'} & set(packages)), bar=0)

def shown(value):
    if value is None: return ''
    if isinstance(value, int) or not value: return f'{value:.0f}'
    return f'{value:.2f}' if value<1 else f'{value:.1f}'

def text_table(header, rows):
    "An aligned table; the first column to the left"
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    def line(cells):
        _,*others = [cell.rjust(width) for cell,width in zip(cells, widths)]
        return '  '.join([cells[0].ljust(widths[0]), *others]).rstrip()
    return '\n'.join(map(line, [header, *rows]))

def table(rows):
    "All measures, beside those of the others"
    others = [f'{package} {version(package)}' for package in ('fastcore','fastai')]
    header = ['', '2026-11-25', 'here', 'half way', *others, '']
    return text_table(header, [row.texts() for row in rows])

def table_by_module(modules):
    "The measures of each module, the one with the longest lines first"
    rows = [(module, [measure.of([module]) for measure in measures]) for module in modules if module.code]
    rows.sort(key=lambda row: -row[1][0])
    texts = [[module.name, str(len(module.code)), *map(shown, values)] for module,values in rows]
    return text_table(['module','lines',*[measure.short for measure in measures]], texts)

def places(modules, root):
    "Where the complex functions, the comprehensions with several `for` and the private names are"
    res = []
    for module in modules:
        path = module.path.relative_to(root)
        for function in complex_functions(module):
            res.append(f'{path}:{function.lineno} {function.name}: complexity {complexity(function)}')
        for node in several_for(module):
            res.append(f'{path}:{node.lineno} {module.around(node)}: {len(node.generators)} `for`')
        for private in private_names(module):
            res.append(f'{path}: imports {private}')
    return '\n'.join(res)

def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--root', type=Path, default=Path(__file__).resolve().parent.parent, help='the repository')
    parser.add_argument('--by-module', action='store_true', help='the measures for each module of this package, too')
    parser.add_argument('--functions', action='store_true', help='list complex functions, several `for`, private names')
    parser.add_argument('--check', action='store_true', help='exit with 1 if a row is not ok')
    return parser.parse_args()

def rows_of_text(root, here):
    "The rows of the table for which nothing is imported"
    packages = here,installed('fastcore'),installed('fastai')
    return [*rows_of_sources(measures, *packages),
            *rows_of_notebooks(root/'nbs'),
            *rows_of_sources(measures_across, *packages)]

def main():
    args = arguments()
    root = args.root.resolve()
    here = modules_of(root/name)
    rows = rows_of_text(root, here)
    notes = [f'cycle: {", ".join(cycle)}' for cycle in cycles(here)]
    if (root/name/'fold').is_dir():
        extra = pulled_in(root)
        rows.append(row_of_fold(extra))
        notes.append(f'import {name}.fold imports, beside torch: {", ".join(extra) or "nothing"}')
    print(table(rows), *notes, sep='\n')
    if args.by_module: print('', table_by_module(here), sep='\n')
    if args.functions: print('', places(here, root), sep='\n')
    if args.check and not all(row.ok for row in rows): sys.exit(1)

if __name__=='__main__': main()
