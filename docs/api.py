"Pages of the API, from the modules' own text: signatures with their docments, docstrings; nothing is imported"
import ast, re
from pathlib import Path

root = Path(__file__).parent.parent
package = root/'fastai_bnfold'

def is_public(name): return not name.startswith('_')

def header(node, lines):
    "A definition up to its body: signature and docments, as they are written"
    first,body = node.lineno-1,node.body[0]
    if body.lineno-1>first: return '\n'.join(lines[first:body.lineno-1])
    return lines[first].encode()[:body.col_offset].decode().rstrip()

def dedent(text):
    "A method's header at the margin"
    indent = len(text)-len(text.lstrip())
    return '\n'.join(line[indent:] for line in text.splitlines())

def fields(node, lines):
    "The fields of a dataclass, with their comments"
    found = [lines[o.lineno-1].strip() for o in node.body if isinstance(o, ast.AnnAssign) and is_public(o.target.id)]
    return '\n'.join(f'    {line}' for line in found)

def label(module, name):
    "The target of a name; small and capital letters are the same there"
    return f'{module}.{"class." if name[0].isupper() and "." not in name else ""}{name}'

def entry(name, code, text, level):
    "One name: a heading, the code, the words"
    words = f'\n{text}\n' if text else ''
    return f'{"#"*level} {name}\n\n```python\n{code}\n```\n{words}'

def owner(node):
    "Of a function with `@patch`: the class it becomes a method of"
    if not any(isinstance(o, ast.Name) and o.id=='patch' for o in node.decorator_list): return ''
    return ast.unparse(node.args.args[0].annotation)

def function_entry(node, lines, prefix=''):
    name = '.'.join(filter(None, [prefix or owner(node), node.name]))
    return name, entry(name, dedent(header(node, lines)), ast.get_docstring(node), 4 if prefix else 3)

def class_entries(node, lines):
    "A class, how it is made, and its public methods"
    methods = [o for o in node.body if isinstance(o, ast.FunctionDef)]
    code = [f'class {node.name}({", ".join(ast.unparse(o) for o in node.bases)})'.replace('()', '')]
    code += [fields(node, lines)] if fields(node, lines) else []
    code += [header(o, lines) for o in methods if o.name=='__init__']
    yield node.name, entry(node.name, '\n'.join(code), ast.get_docstring(node), 3)
    for method in methods:
        if is_public(method.name) and ast.get_docstring(method): yield function_entry(method, lines, node.name)

def entries(path):
    "Name → its part of the page, in the order of the module"
    text = path.read_text(encoding='utf-8')
    lines,found = text.splitlines(),{}
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef) and is_public(node.name): found |= dict(class_entries(node, lines))
        elif isinstance(node, ast.FunctionDef) and is_public(node.name) and ast.get_docstring(node):
            name,page = function_entry(node, lines)
            found[name] = page
    return {name: page for name,page in found.items() if not any(part.startswith('_') for part in name.split('.'))}

def module_of(notebook):
    "The module that a notebook exports to, or None"
    words = next((line.split() for cell in notebook.cells for line in cell.source.splitlines()[:1] if line.startswith('#| default_exp')), None)
    return words and words[2]

def room_page(title, about, modules):
    "The page of a room, and name → target. `modules`: name → (page of its notebook, what it says of itself)"
    parts,labels = [f'# {title}\n\n{about}\n'],{}
    for module,(page,words) in modules.items():
        found = entries(package/f'{module.replace(".", "/")}.py')
        fresh = {name: text for name,text in found.items() if name not in labels}
        if not fresh: continue
        labels |= {name: label(module, name) for name in fresh}
        parts.append(f'## fastai_bnfold.{module}\n\n{words} ([the notebook]({page}))\n')
        parts += [f'({labels[name]})=\n{text}' for name,text in fresh.items()]
    return '\n'.join(parts), labels

def public_names():
    "What `from fastai_bnfold.all import *` gives"
    nodes = ast.parse((package/'all.py').read_text(encoding='utf-8')).body
    return next(ast.literal_eval(node.value) for node in nodes if isinstance(node, ast.Assign) and node.targets[0].id=='__all__')

def words_of(name, target, text):
    "The first line of a name's docstring, on the pages"
    found = re.search(rf'^\({re.escape(target)}\)=\n#+ {re.escape(name)}\n\n```python\n.*?^```\n\n?([^\n]*)', text, re.M|re.S)
    return found[1] if found else ''
