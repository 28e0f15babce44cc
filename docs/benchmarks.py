"Pages of the benchmarks: the command, the figures and a plot, from `benchmarks/results/*.json` and the scripts' own words"
import ast, json
from functools import partial
from pathlib import Path
import matplotlib
matplotlib.use('svg')
import matplotlib.pyplot as plt

root = Path(__file__).parent.parent
results = root/'benchmarks'/'results'
GREY,BLUE,RED,GREEN,ORANGE = '#9aa5b1','#2f80ed','#eb5757','#27ae60','#f2994a'
plt.rcParams |= {'svg.fonttype': 'none', 'font.size': 10, 'axes.spines.top': False, 'axes.spines.right': False, 'svg.hashsalt': 'bnfold'}

# Result → its title, and the command where it is not `benchmarks/NAME.py`
TITLES = dict(imagenette='The published experiment', fold='Time to fold', zoo='The zoo', planning='Is planning linear?', clamp='Clamps with bounds per channel',
    deploy='Deployment', serving='Serving', pipelines='Odd image files', reliability='Reliability', small_batch='Trained in small batches',
    small_batch_alternatives='Small batches: what else?', shift='Another place', fixed_point='Fixed point',
    aware='Trained for few bits', integer='Integers in engines', precision='int8 and bfloat16', sweep='Which networks fold')
NOTEBOOKS = dict(imagenette='01_imagenette', zoo='02_zoo', clamp='02_zoo', small_batch='04_small_batches', small_batch_alternatives='04_small_batches',
    fixed_point='05_fixed_point', aware='05_fixed_point', integer='05_fixed_point', deploy='06_deploy', serving='06_deploy', shift='07_shifted_data')

def table(head, rows):
    "A table in Markdown"
    lines = [head, ['---']*len(head), *rows]
    return '\n'.join('| '+' | '.join(str(cell).replace('|', '\\|') for cell in line)+' |' for line in lines)

def words_of(name):
    "What a script says of itself, and its command"
    if name=='imagenette': return 'VGG16 with batch norm and ResNet-50, five epochs on ImageNette, folded, validated again.', 'python nbs/run.py nbs/tutorials/01_imagenette.ipynb'
    text = ast.get_docstring(ast.parse((root/'benchmarks'/f'{name}.py').read_text(encoding='utf-8')))
    first = text.splitlines()[0].split(': python ')[0]
    return first, next(line[line.index('python benchmarks/'):] for line in text.splitlines() if 'python benchmarks/' in line)

def machine_in(data):
    "The first description of a machine in the figures, in words"
    if not isinstance(data, dict): return ''
    if 'machine' in data:
        machine = data['machine']
        return f'{machine["threads"]} threads of a shared {machine["processor"]} CPU, torch {machine["torch"]}, Python {machine["python"]}.'
    return next(filter(None, map(machine_in, data.values())), f'torch {data["torch"]}.' if 'torch' in data else '')

def grouped(ax, names, series, colours, width=.8):
    "Bars side by side: `series` has a list of values for each label"
    each = width/len(series)
    for i,((label,values),colour) in enumerate(zip(series.items(), colours)):
        at = [place-width/2+each*(i+.5) for place in range(len(names))]
        ax.bar(at, [value or 0 for value in values], each*.95, label=label, color=colour)
    ax.set_xticks(range(len(names)), names, rotation=30, ha='right')
    ax.legend(frameon=False, fontsize=9, loc='upper left', bbox_to_anchor=(1,1))

def imagenette(data, ax):
    networks = data['networks']
    series = {when: [1e3*net[f'latency_{when}'] for net in networks.values()] for when in ('before','after')}
    grouped(ax, list(networks), series, [GREY,BLUE])
    ax.set_ylabel('latency of one image, ms')
    rows = [[name, f'{net["params_before"]:,}', f'{net["params_before"]-net["params_after"]:,}', f'{net["metrics_before"]["accuracy"]:.6f}',
             f'{net["metrics_after"]["accuracy"]:.6f}', f'{net["n_changed"]} of {net["n_items"]:,}', f'{net["speedup"]:.3f}'] for name,net in networks.items()]
    return table(['network','parameters','removed','accuracy','folded','predictions changed','times as fast'], rows)

def number(value, form): return '' if value is None else format(value, form)

def fold(data, ax):
    networks = data['networks']
    tools = [tool for tool,row in next(iter(networks.values()))['rows'].items() if 'fold_in_forwards' in row]
    series = {tool: [net['rows'][tool]['fold_in_forwards'] for net in networks.values()] for tool in tools}
    grouped(ax, list(networks), series, [BLUE,GREEN,GREY,ORANGE])
    ax.set_ylabel('time to fold, in forward passes')
    rows = [[name, tool, number(row.get('fold_in_forwards'), '.1f'), number(row.get('max_err'), '.1e'), number(row.get('bn_left'), 'd'),
             number(row.get('latency_ms'), '.1f'), number(row.get('speedup'), '.3f')] for name,net in networks.items() for tool,row in net['rows'].items()]
    return table(['network','','time to fold, forward passes','largest error','BNs left','latency, ms','times as fast'], rows)

def cell(result):
    "BNs that still run, and the error"
    if result.get('wrong'): return f'**wrong**: error {result["max_err"]:.1g}'
    return result['error'] if 'error' in result else f'{result["left"]} ({result["max_err"]:.0e})'

def n_folded(network, tool):
    result = network[tool]
    return 0 if 'left' not in result or result.get('wrong') else network['live']-result['left']

def zoo(data, ax):
    models,tools = data['models'],data['tools']
    totals = [sum(n_folded(network, tool) for network in models.values()) for tool in tools]
    ax.barh(tools, totals, color=[BLUE]+[GREY]*(len(tools)-1))
    ax.bar_label(ax.containers[0], [f'{total:,}' for total in totals], padding=3)
    ax.axvline(sum(network['live'] for network in models.values()), color=RED, ls=':', label='all batch norms that run')
    ax.invert_yaxis()
    ax.set_xlabel(f'batch norms folded, in {len(models)} networks')
    ax.legend(frameon=False, fontsize=9)
    rows = [[name, network['live'], *[cell(network[tool]) for tool in tools]] for name,network in models.items()]
    return 'BNs that still run after folding, and the largest error of the outputs:\n\n'+table(['network','BNs',*tools], rows)

def planning(data, ax):
    kinds = dict.fromkeys(row['kind'] for row in data['rows'])
    for kind in kinds:
        mine = [row for row in data['rows'] if row['kind']==kind]
        ax.plot([row['nodes'] for row in mine], [row['seconds'] for row in mine], 'o-', label=kind)
    ax.set(xscale='log', yscale='log', xlabel='nodes of the program', ylabel='seconds for a plan')
    ax.legend(frameon=False, fontsize=9, loc='upper left', bbox_to_anchor=(1,1))
    return table(['network','nodes','BNs','folded','seconds'], [[row['name'], row['nodes'], row['bns'], row['folded'], f'{row["seconds"]:.3f}'] for row in data['rows']])

def clamp(data, ax):
    networks = data['networks']
    labels = list(next(iter(networks.values())))
    series = {label: [net[label].get('speedup', 0) for net in networks.values()] for label in labels}
    grouped(ax, list(networks), series, [GREY,GREEN,BLUE,ORANGE,RED])
    ax.set_ylabel('times as fast')
    rows = [[shape, op, f'{row["us"]:.1f}', f'{row["of_bn_relu"]:.2f}'] for shape,ops in data['ops'].items() for op,row in ops.items()]
    return table(['values','operation','µs','of BN and ReLU'], rows)

def deploy(data, ax):
    networks = data['latency']['networks']
    shown = [('eager','folded'),('ONNX Runtime','unfolded'),('ONNX Runtime','folded'),('OpenVINO','unfolded'),('OpenVINO','folded')]
    def speed(net, which): return next((row.get('speedup') for row in net['rows'] if (row['engine'],row['model'])==which), None)
    series = {f'{engine}, {model}'.replace('eager', 'PyTorch'): [speed(net, (engine,model)) for net in networks.values()] for engine,model in shown}
    grouped(ax, list(networks), series, [GREY,'#a9cbf7',BLUE,'#b7e4c7',GREEN])
    ax.axhline(1, color='#555', lw=.8)
    ax.set_ylabel('times as fast as unfolded PyTorch')
    rows = [[name, row['engine'], row['model'], f'{row["latency_ms"]:.1f}', f'{row["speedup"]:.2f}'] for name,net in networks.items() for row in net['rows'] if 'speedup' in row]
    parity = [row for row in data['parity']['rows'] if 'n_changed' in row]
    return (f'Parity ({data["parity"]["data"]}): {len(parity)} of {len(data["parity"]["rows"])} Learners and backends; {sum(row["n_changed"] for row in parity)} of '
            f'{sum(row["n_items"] for row in parity):,} predictions changed; outputs at most {max(row["max_err"] for row in parity):.0e} apart.\n\n'
            + table(['network','engine','model','latency of one item, ms','times as fast'], rows))

def serving(data, ax):
    rows = data['server']
    series = {'server': [row['server_per_second'] for row in rows], 'a loop': [row['loop_per_second'] for row in rows]}
    grouped(ax, [f'{row["uploads_per_request"]} uploads a request' for row in rows], series, [BLUE,GREY])
    ax.set_ylabel('images a second')
    return table(['backend','threads','requests','right','wrong','errors'], [[row[key] for key in ('backend','threads','requests','right','wrong','error')] for row in data['threads']])

def pipelines(data, ax):
    images,tables = data['images'],data['tables']
    names = dict.fromkeys(row['pipeline'] for row in images['rows'])
    def wrong(name): return sum(len(row['wrong']) for row in images['rows'] if row['pipeline']==name)
    def files(name): return sum(row['files'] for row in images['rows'] if row['pipeline']==name)
    ax.barh(list(names), [files(name) for name in names], color=BLUE, label='as `learn.predict`')
    ax.barh(list(names), [wrong(name) for name in names], color=RED, label='otherwise')
    ax.invert_yaxis()
    ax.set_xlabel('files')
    ax.legend(frameon=False, fontsize=9, loc='upper left', bbox_to_anchor=(1,1))
    return (f'Images: {images["items"]:,} predictions, {images["wrong"]} wrong. Rows of tables: {tables["items"]:,}, {tables["wrong"]} wrong.\n\n'
            + table(['pipeline','files','wrong'], [[name, files(name), wrong(name)] for name in names])+'\n\n'
            + table(['table','rows','wrong'], [[row['table'], row['items'], len(row['wrong'])] for row in tables['rows']]))

def reliability(data, ax):
    rows = data['rows']
    ax.barh([row[0] for row in rows], [row[1] for row in rows], color=GREEN)
    ax.bar_label(ax.containers[0], [f'{row[1]:,}, {row[3]} wrong' for row in rows], padding=3)
    ax.set_xscale('log')
    ax.margins(x=.3)
    ax.invert_yaxis()
    ax.set_xlabel('tried')
    return table(['tried','how many','outcome','wrong'], rows)

def small_batch(data, ax):
    names = {'standard': 'standard', 'population, batches of 64': 'reestimate_bn()', 'population, α': '… and correct_bn()', 'population, α per layer': '… and correct_bn(per_layer=True)'}
    networks = data['networks'].values()
    sizes = sorted({net['bs'] for net in networks})
    def mean(key, bs, what):
        values = [net['results'][key][what] for net in networks if net['bs']==bs]
        return sum(values)/len(values)
    for key,label in names.items(): ax.plot([str(bs) for bs in sizes], [100*mean(key, bs, 'accuracy') for bs in sizes], 'o-', label=label)
    ax.set(xlabel='batch size of the training', ylabel='accuracy, %')
    ax.legend(frameon=False, fontsize=9)
    rows = [[label, *[f'{100*mean(key, bs, "accuracy"):.2f} % / {mean(key, bs, "loss"):.3f}' for bs in sizes]] for key,label in names.items()]
    return 'Validation accuracy and loss (means over the seeds):\n\n'+table(['inference', *[f'batches of {bs}' for bs in sizes]], rows)

def small_batch_alternatives(data, ax):
    found = data['results']
    ax.barh(list(found), [100*row['accuracy'] for row in found.values()], color=BLUE)
    ax.set_xlim(left=60)
    ax.invert_yaxis()
    ax.set_xlabel('accuracy, %')
    return table(['inference','accuracy, %','loss'], [[name, f'{100*row["accuracy"]:.2f}', f'{row["loss"]:.3f}'] for name,row in found.items()])

def shift(data, ax):
    networks = data['networks']
    places = list(next(iter(networks.values()))['misuse'])
    first = next(iter(networks.values()))['misuse']
    series = {'statistics of the training': [100*first[p]['trained'] for p in places], 'of the items themselves': [100*first[p]['items'] for p in places]}
    grouped(ax, places, series, [GREY,BLUE])
    ax.set_ylabel(f'accuracy of {next(iter(networks))}, %')
    rows = [[name, f'{100*net["validation"]["accuracy"]:.1f}', *[f'{100*net["misuse"][p]["trained"]:.1f} / {100*net["misuse"][p]["items"]:.1f}' if p in net['misuse'] else '' for p in places]]
            for name,net in networks.items() if 'misuse' in net]
    return 'Accuracy, %: with the statistics of the training / with those of a few unlabelled items:\n\n'+table(['network','at home',*places], rows)

def fixed_point(data, ax):
    bits = ['2','4','8']
    for name,net in data['networks'].items():
        for b in bits: ax.plot([layer['n'] for layer in net[b]['layers'].values()], '.-', lw=.8, label=f'{name}, {b} bits')
    ax.set(xlabel='batch norm', ylabel='smallest shift n')
    ax.legend(frameon=False, fontsize=9, loc='upper left', bbox_to_anchor=(1,1))
    def span(values): return f'{min(values)} to {max(values)}'
    def line(name, b):
        layers = data['networks'][name][b]['layers'].values()
        return [name, b, span([layer['n'] for layer in layers]), span([layer['plain']['n'] for layer in layers]), span([layer['bits_A'] for layer in layers]),
                f'{data["networks"][name][b]["accuracy"]:.3f}', f'{data["networks"][name]["float"]["accuracy"]:.3f}']
    return table(['network','bits','smallest n','n, plain rounding','bits of A','accuracy','float'], [line(name, b) for name in data['networks'] for b in bits])

def aware(data, ax):
    networks = {name: net for name,net in data.items() if name!='machine'}
    def figures(net):
        after = {f'{bits} bits, after': found['accuracy'] for bits,found in net['after'].items()}
        return {'float': net['float']} | after | {f'{bits} bits, aware': found['integer'] for bits,found in net['aware'].items()}
    columns = list(dict.fromkeys(column for net in networks.values() for column in figures(net)))
    series = {column: [100*figures(net).get(column, 0) for net in networks.values()] for column in columns}
    grouped(ax, list(networks), series, [GREY,'#f7c6c6',ORANGE,RED,BLUE,GREEN])
    ax.set_ylabel('accuracy, %')
    rows = [[name, *[f'{100*figures(net)[column]:.2f}' if column in figures(net) else '' for column in columns]] for name,net in networks.items()]
    def others(found): return [found['changed_float32'], found['changed_float64'], found['file']['changed'], found['file']['values_that_differ']]
    same = [[f'{name}, {bits} bits', *others(found)] for name,net in networks.items() for bits,found in net['aware'].items()]
    return (table(['accuracy, %',*columns], rows)+'\n\nPredictions that are others than those of the integer network, of 3,925; the last column counts values in its file:\n\n'
            +table(['','trained, in float32','trained, in float64','file in ONNX Runtime','values with other integers'], same))

def integer(data, ax):
    latency = data['latency']['latency']
    ax.barh(list(latency), [found['times_as_fast'] for found in latency.values()], color=BLUE)
    ax.invert_yaxis()
    ax.set_xlabel('times as fast as float32 in ONNX Runtime: ResNet-18, 64 pixels, one image, one thread')
    rows = [[name, f'{found["ms"]:.2f}', f'{found["times_as_fast"]:.2f}', f'{found["cpu_times_as_fast"]:.2f}'] for name,found in latency.items()]
    def family(name, net): return [name, f'{net["bns_on_integers"]} of {net["n_bn"]}', sum(net['kinds'].values())-len(net['real']), len(net['real']), f'{net["values_that_differ"]} of {net["values"]}']
    families = table(['network, 4 bits','BNs on integers','layers on integers','in floating point','values in the file with other integers'],
                     [family(name, net) for name,net in data['coverage'].items()])
    return table(['file, engine','ms','times as fast','by time of the processor'], rows)+'\n\nWhich networks, with random weights and statistics:\n\n'+families

def precision(data, ax):
    networks = data['latency']
    rows = [[name, row['engine'], row['precision'], row['bns'], f'{row["ms"]:.1f}', f'{row["times_as_fast"]:.2f}'] for name,net in networks.items() for row in net['rows']]
    def best(net, engine, precision):
        return next((row['times_as_fast'] for row in net['rows'] if (row['engine'],row['precision'],row['bns'])==(engine,precision,'folded')), 0)
    kinds = [('onnx','int8'),('openvino','int8'),('openvino','bf16')]
    grouped(ax, list(networks), {f'{precision}, {engine}': [best(net, engine, precision) for net in networks.values()] for engine,precision in kinds}, [BLUE,ORANGE,GREEN])
    ax.set_ylabel('times as fast as float32')
    return table(['network','engine','precision','BNs','ms','times as fast'], rows)

def by_library(rows):
    "Library → its rows in which BNs could be counted"
    groups = {}
    for row in rows:
        if 'bns' in row: groups.setdefault(row['library'], []).append(row)
    return groups

def folded_line(library, rows):
    "Networks, BNs, and the longest time of a fold, of a library"
    slowest = max(rows, key=lambda row: row['fold_s'])
    return [library, len(rows), f'{sum(row["gone"] for row in rows):,} of {sum(row["bns"] for row in rows):,}', f'{slowest["fold_s"]:.1f} ({slowest["name"]})']

def sweep_cell(row):
    "What became of a network"
    if row is None: return ''
    if 'bns' not in row: return row['outcome']
    words = '' if row['outcome']=='right' else f'**{row["outcome"]}**, '
    return f'{words}{row["gone"]} of {row["bns"]}, {row["fold_s"]:.1f} s'

def sweep(data, ax):
    rows = data['rows']
    groups = by_library([row for row in rows if row['stage']=='modules'])
    names = sorted(groups, key=lambda name: -len(groups[name]))
    gone,bns = ([sum(row[key] for row in groups[name]) for name in names] for key in ('gone','bns'))
    ax.barh(names, bns, color=RED, label='stay')
    ax.barh(names, gone, color=BLUE, label='folded')
    ax.bar_label(ax.containers[0], [f'{part:,} of {whole:,}' for part,whole in zip(gone, bns)], padding=3)
    ax.margins(x=.15)
    ax.invert_yaxis()
    ax.set_xlabel('batch norms, in modules')
    ax.legend(frameon=False, fontsize=9)
    return '\n\n'.join([*map(partial(outcomes_of, data), ('modules','graph')), table(['library','networks','BNs folded','longest fold, s'], [folded_line(name, groups[name]) for name in names]),
        '## Why batch norms stay', why_they_stay(data), '## Network by network', networks_table(rows)])

def outcomes_of(data, stage):
    "Judged networks in a sentence"
    total = data['totals'][stage]
    outcomes = ', '.join(f'{n} {word}' for word,n in sorted(total['outcomes'].items(), key=lambda item: -item[1]) if word not in ('unjudged','refused'))
    refused = total['outcomes'].get('refused', 0)
    return (f'As {dict(modules="modules", graph="exported graphs")[stage]}: {total["judged"]} of {total["networks"]} networks could be judged ({outcomes}; '
            f'{refused} refused in a sentence; the others do not run here, or have no batch norm that runs); {total["gone"]:,} of {total["bns"]:,} BNs folded.')

# Kind of reason → is there an exact fold?
EXACT_FOLD = {
    'read elsewhere': 'None that pays: somebody else needs the value as it is (before the BN of a pre-activation block, say), so it would have to be computed twice.',
    'no rule': 'None: no map of a channel commutes with what follows (SiLU, softmax, `sin`).',
    'zero padding': 'None with the same convolution: the shift would have to reach the zeros around the image, so that the pixels at the border would need a bias of their own.',
    'shared weight': 'None with one weight: the calls of the layer have different BNs behind them. A weight for each call would take more memory than the BNs take time.',
    'computed weight': 'Not in modules, where the weight is made anew at every call (its sign, a sum over experts), and its numbers have no other place; a mask is no obstacle. In an exported graph what is made of parameters alone is a constant, and folds.',
    'shared activation': 'In an exported graph, where each call can get bounds of its own; in modules with an activation for each call.',
    'input or output': 'None: there is no layer on that side.',
    'sum': 'None: what is added to it has no BN, and would have to be scaled too.',
    'product': 'None: two values that depend on the data are multiplied, and a shift of one of them would change the scale of the other.',
    'negative scale': 'Only with positive γ: a maximum of what is turned over is a minimum.',
    'differs by position': 'None per channel: the map is another one at other positions.',
    'no place for a bias': 'Not in modules: the layer has no bias, and its class none to be given.',
    'does more': 'Not by a rule: its `forward` does more than to normalize.',
    'bare function': 'In an exported graph: there a clamp can get bounds per channel.',
    'statistics of the batch': 'None: what it does depends on the batch.',
    'proof failed': 'The fold was planned, and rejected by its proof.'}

def meaning_of(kind):
    "What is said of both sides of a reason"
    return ' '.join(dict.fromkeys(EXACT_FOLD.get(side, '') for side in kind.split(' / '))).strip()

def why_they_stay(data):
    "The commonest reasons"
    rows = [[kind, found['bns'], found['networks'], meaning_of(kind), found['example']] for kind,found in list(data['reasons']['modules'].items())[:10]]
    return table(['reason: backward / forward','BNs','networks','is there an exact fold?','for example'], rows)

def networks_table(rows):
    "Every network, as modules and as a graph"
    found = {}
    for row in rows: found.setdefault((row['library'], row['family'], row['name']), {})[row['stage']] = row
    return table(['library','family','network','modules','graph'], [[*key, sweep_cell(stages.get('modules')), sweep_cell(stages.get('graph'))] for key,stages in found.items()])

PAGES = dict(imagenette=imagenette, fold=fold, zoo=zoo, planning=planning, clamp=clamp, deploy=deploy, serving=serving, pipelines=pipelines,
    reliability=reliability, small_batch=small_batch, small_batch_alternatives=small_batch_alternatives, shift=shift, fixed_point=fixed_point,
    aware=aware, integer=integer, precision=precision, sweep=sweep)

def plot(name, data, folder):
    "The plot of a benchmark, beside its page; its table, and the words that show the plot"
    fig,ax = plt.subplots(figsize=(9,3.8), layout='constrained')
    found = PAGES[name](data, ax)
    fig.savefig(folder/f'{name}.svg', metadata={'Date': None})
    plt.close(fig)
    image = f':alt: {TITLES[name]}: the figures of the table below as a plot\n:class: plot'
    return found, f'```{{image}} {name}.svg\n{image}\n```'

def leaves(data, path=()):
    "Path and value of every figure, for results that have no page of their own yet"
    if isinstance(data, list): data = dict(enumerate(data))
    if not isinstance(data, dict): return [['/'.join(map(str, path)), data]]
    return [leaf for key,value in data.items() if key!='machine' for leaf in leaves(value, (*path,key))]

def page(name, folder):
    "The page of one benchmark"
    data = json.loads((results/f'{name}.json').read_text(encoding='utf-8'))
    about,command = words_of(name)
    found,image = plot(name, data, folder) if name in PAGES else (table(['figure','value'], leaves(data)[:200]), '')
    title = TITLES.get(name, name)
    more = f'More in the notebook [{NOTEBOOKS[name]}](/nbs/tutorials/{NOTEBOOKS[name]}.ipynb).\n' if name in NOTEBOOKS else ''
    return f'''# {title}

{about}

```bash
{command}
```

{image}

{found}

{machine_in(data)} The figures: `benchmarks/results/{name}.json`. {more}'''

def names():
    "Results with a page of their own in their order, then the others"
    found = [path.stem for path in sorted(results.glob('*.json'))]
    return [*[name for name in PAGES if name in found], *[name for name in found if name not in PAGES]]

def write_all(folder):
    "A page for every file of results"
    folder.mkdir(parents=True, exist_ok=True)
    for name in names(): (folder/f'{name}.md').write_text(page(name, folder), encoding='utf-8')

def totals():
    "What tools fold in all networks of the zoo: for the page that compares them"
    data = json.loads((results/'zoo.json').read_text(encoding='utf-8'))
    models,tools = data['models'].values(),data['tools']
    def count(test, tool): return sum(bool(test(network[tool])) for network in models)
    rows = [['BNs folded'] + [f'{sum(n_folded(network, tool) for network in models):,}' for tool in tools],
            ['networks in which it fails'] + [count(lambda result: 'error' in result, tool) for tool in tools],
            ['networks whose outputs become wrong'] + [count(lambda result: result.get('wrong'), tool) for tool in tools]]
    return table([f'in {len(models)} networks, {sum(network["live"] for network in models):,} BNs', *tools], rows)
