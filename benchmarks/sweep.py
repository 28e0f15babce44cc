"""Every architecture there is: networks that nobody here wrote, folded as modules and as graphs, and judged in float64: python benchmarks/sweep.py

    pip install fastai_bnfold[sweep]     # the libraries whose networks are folded; one that is missing is skipped
    python benchmarks/sweep.py --out sweep.jsonl [--stage modules] [--only timm/resnet] [--redo crash]
    python benchmarks/sweep.py --out sweep.jsonl --summary benchmarks/results/sweep.json

The smallest network of each family, at a small input, with random weights and BN statistics (negative, zero and tiny γ too); with trained ones, and tones to hear, where a package carries them. One process a network, with a limit of processor time; what is done is in `--out`, a line a network, and is not done again.
A fold is judged from outside: the outputs of the folded network in float32, and of the same steps in float64, are compared with those of the unfolded one in float64, on the input and on two items.
A BN that stays because its fold could not be proved, though the fold, done without proof in float64, is right, is a false alarm. Times are processor time on one thread. The networks are in `benchmarks/sweep_networks.py`."""
import gc, hashlib, json, math, multiprocessing, os, resource, signal, time, traceback, warnings
from collections import Counter
from pathlib import Path
import torch
from fastcore.script import call_parse
from fastai_bnfold.errors import FoldError
from fastai_bnfold.fold import BNFolder
from fastai_bnfold.fold.apply import exact_of_all, swaps_for
from fastai_bnfold.fold.folder import Fold, in_float64
from fastai_bnfold.fold.inputs import as_args, map_tensors, run
from fastai_bnfold.fold.report import text_table
from fastai_bnfold.fold.testing import randomize_bn
from fastai_bnfold.fold.verify import amplification, channel_err
from fastai_bnfold.lab.command import machine
from sweep_networks import networks

# One network

class Unjudged(Exception): "The network itself does not run here, or has no BN"

def seconds_of(f):
    "Processor seconds, and the result"
    begin = time.process_time()
    result = f()
    return time.process_time()-begin, result

def built(net):
    "The network, in eval mode; its statistics are drawn, if they are not trained ones"
    torch.manual_seed(0)
    try: model = net.build()
    except Exception as e: raise Unjudged(f'cannot be built: {type(e).__name__}: {e}'[:200])
    return (model if net.trained else randomize_bn(model)).eval()

def first_legal(model, candidates):
    "The first input that the network takes"
    error = None
    for make in candidates:
        torch.manual_seed(0)
        args = as_args(make())
        try: run(model, args)
        except Exception as e: error = e
        else: return args
    raise Unjudged(f'does not run: {type(error).__name__}: {error}'[:200])

def other_batch(args):
    "Two items, of other values"
    generator = torch.Generator().manual_seed(1)
    def other(x):
        more = torch.cat([x]*2)[:2] if x.ndim else x
        return more+.1*torch.randn(more.shape, generator=generator, dtype=more.dtype) if more.is_floating_point() else more
    return map_tensors(other, args)

class Judge:
    "Outputs of the unfolded network in float64 on two inputs, and how far float32 itself is from them"
    def __init__(self, net, model, args):
        self.double = built(net).double() # (not every network can be copied)
        self.inputs,self.exact,self.own = [],[],[]
        for x in (args, other_batch(args)):
            try: exact,plain = run(self.double, in_float64(x)),run(model, x)
            except Exception: continue # it takes no other batch size
            if not all(o.isfinite().all() for o in exact): continue
            self.inputs.append(x)
            self.exact.append(exact)
            self.own.append(channel_err(exact, plain))
        if not self.inputs: raise Unjudged('has no finite outputs in float64')
    @property
    def allowed(self): return max(1e-4, 30*max(self.own))
    def error(self, folded): return max(channel_err(exact, run(folded, x)) for x,exact in zip(self.inputs, self.exact))
    def error64(self): return max(channel_err(exact, run(self.double, in_float64(x))) for x,exact in zip(self.inputs, self.exact))
    def allowed64(self):
        "Some networks amplify rounding so much that it shows in float64"
        return max(1e-9, 30*amplification(self.double, [(in_float64(x), exact) for x,exact in zip(self.inputs, self.exact)]))

def folded64(fold, judge):
    "The same steps in float64: the error, and what is allowed"
    allowed = judge.allowed64()
    gone = {node for step in fold.applied for node in step.links}
    exact = exact_of_all(fold.program, fold.applied, gone)
    swaps = swaps_for(judge.double, fold.program, fold.applied, {name: torch.nn.Parameter(x, False) for name,x in exact.items()}, torch.float64)
    swaps.redo()
    try: return dict(error64=judge.error64(), allowed64=allowed)
    finally: swaps.undo()

def kinds_of(report):
    "Kind → how many BNs stay for it, and one of the reasons"
    kept = [row for row in report.kept if row.live and row.is_bn]
    examples = {row.kind: f'{row.bn}: {row.reason}'[:300] for row in reversed(kept)}
    return {kind: dict(n=n, example=examples[kind]) for kind,n in Counter(row.kind for row in kept).items()}

def counts(report):
    live = [row for row in report.rows if row.live and row.is_bn]
    return dict(bns=len(live), gone=sum(row.folded for row in live), kinds=kinds_of(report), notes=report.notes, max_err=report.max_err)

def time_of(model, args): return min(seconds_of(lambda: run(model, args))[0] for _ in range(3))

def as_modules(net, model, args):
    "Fold a copy, and judge it; the same steps in float64, too"
    judge,row = Judge(net, model, args),dict(forward_s=time_of(model, args))
    row['fold_s'],fold = seconds_of(lambda: Fold(BNFolder(), model, args))
    more,report = seconds_of(fold.run)
    row['fold_s'] += more
    row |= counts(report) | dict(error=judge.error(fold.target), allowed=judge.allowed) | folded64(fold, judge)
    if 'proof failed' in row['kinds']: row['unproved_is_right'] = unproved_is_right(judge, args)
    return row

def unproved_is_right(judge, args):
    "Where BNs stay because their folds were not proved: are they right all the same?"
    allowed = judge.allowed64()
    BNFolder(verify=False).fold(judge.double, in_float64(args), inplace=True)
    return judge.error64()<=allowed

def as_graph(net, model, args):
    "Export, fold the graph, and judge it"
    judge,folder = Judge(net, model, args),BNFolder()
    try:
        with torch.no_grad(): program = torch.export.export(model, args)
    except Exception as e: raise Unjudged(f'cannot be exported: {type(e).__name__}: {e}'[:200])
    judge.inputs,judge.exact = judge.inputs[:1],judge.exact[:1] # its shapes are fixed
    row = dict(forward_s=time_of(program.module(), args))
    row['fold_s'],folded = seconds_of(lambda: folder.fold_graph(program))
    row |= counts(folder.report) | dict(error=judge.error(folded.module()), allowed=judge.allowed, merged=len(folder.report.merged))
    if 'proof failed' in row['kinds']: row['unproved_is_right'] = judge.error(BNFolder(verify=False).fold_graph(program).module())<=judge.allowed
    return row

def outcome_of(row):
    "One word"
    if row['error']>row['allowed'] or row.get('error64', 0)>row.get('allowed64', 0): return 'wrong'
    return 'false alarm' if row.get('unproved_is_right') else 'right'

def one(net, stage):
    "The row of one network"
    torch.set_num_threads(1)
    warnings.filterwarnings('ignore')
    try:
        model = built(net)
        args = first_legal(model, net.inputs)
        row = (as_graph if stage=='graph' else as_modules)(net, model, args)
        if not row['bns']: raise Unjudged('has no BN that runs')
        return row | dict(outcome=outcome_of(row))
    except Unjudged as e: return dict(outcome='unjudged', why=str(e))
    except FoldError as e: return dict(outcome='crash' if 'should not' in str(e) else 'refused', why=str(e)[:500], trace=traceback.format_exc()[-1500:])
    except Exception as e: return dict(outcome='crash', why=f'{type(e).__name__}: {e}'[:500], trace=traceback.format_exc()[-1500:])

# All of them

def in_child(net, stage, limit):
    "`one`, in a process of its own, which is ended after `limit` seconds of processor time"
    context = multiprocessing.get_context('fork')
    receiver,sender = context.Pipe(False)
    def work():
        resource.setrlimit(resource.RLIMIT_CPU, (int(resource_used()+limit)+1,)*2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        sender.send(one(net, stage))
    child = context.Process(target=work)
    child.start()
    sender.close()
    try: return receiver.recv() if receiver.poll(20*limit) else dict(outcome='slow', why=f'not done after {20*limit} s')
    except EOFError:
        child.join()
        if child.exitcode in (-signal.SIGXCPU, -signal.SIGKILL): return dict(outcome='slow', why=f'not done after {limit} s of processor time')
        return dict(outcome='crash', why=f'the process died ({child.exitcode})')
    finally:
        child.kill()
        child.join()

def resource_used(): return sum(resource.getrusage(resource.RUSAGE_SELF)[:2])

def place(name):
    "A number from 0 to 1 for a name, the same everywhere"
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)/16**8

def rows_in(path):
    "The last row of every network and stage"
    if not Path(path).exists(): return {}
    rows = map(json.loads, Path(path).read_text(encoding='utf-8').splitlines())
    return {(row['library'], row['name'], row['stage']): row for row in rows}

def wanted(only, part):
    "The networks, in an order by chance"
    chosen = [net for net in networks(only) if only in f'{net.library}/{net.family}/{net.name}' and place(net.name)<part]
    return sorted(chosen, key=lambda net: place(net.name))

# Figures

JUDGED = ('right','wrong','crash','slow','false alarm')
def is_too_slow(row): return row['fold_s']>max(2, 25*row['forward_s'])

def totals(rows):
    "The figures of some networks"
    folded = [row for row in rows if 'bns' in row]
    found = Counter(row['outcome'] for row in rows)
    return dict(networks=len(rows), judged=sum(found[outcome] for outcome in JUDGED), outcomes=dict(found), bns=sum(row['bns'] for row in folded), gone=sum(row['gone'] for row in folded),
        seconds=round(sum(row['fold_s'] for row in folded), 2), slow=sum(map(is_too_slow, folded)))

def families(rows):
    "Library and family → its figures"
    groups = {}
    for row in rows: groups.setdefault((row['library'], row['family']), []).append(row)
    return groups

def reasons(rows):
    "Kind of reason → how many BNs stay for it in how many networks, and an example: the most frequent first"
    found = {}
    for row in rows:
        for kind,kept in row.get('kinds', {}).items():
            entry = found.setdefault(kind, dict(bns=0, networks=0, example=f"{row['name']}: {kept['example']}"))
            entry['bns'] += kept['n']
            entry['networks'] += 1
    return dict(sorted(found.items(), key=lambda item: -item[1]['bns']))

def short(row):
    "What the results keep of a row"
    kept = {key: row[key] for key in ('library','family','name','stage','outcome','bns','gone','forward_s','fold_s','error','error64','why') if key in row}
    return {key: rounded(value) for key,value in kept.items()}

def rounded(value):
    "Three digits of a number, the beginning of a text"
    if isinstance(value, str): return value[:160]
    if isinstance(value, int): return value
    return float(f'{value:.3g}') if math.isfinite(value) else str(value) # (JSON knows no infinity)

def summarize(rows, out):
    "Write the figures, and print them"
    stages = {stage: [row for row in rows if row['stage']==stage] for stage in ('modules','graph')}
    data = dict(machine=machine(), totals={stage: totals(some) for stage,some in stages.items()}, reasons={stage: reasons(some) for stage,some in stages.items()}, rows=sorted(map(short, rows), key=lambda row: (row['library'], row['family'].lower(), row['name'], row['stage'])))
    Path(out).write_text(json.dumps(data, indent=1)+'\n', encoding='utf-8')
    figures = [[library, family, row['name'], row['stage'], row['outcome'], f"{row.get('gone', '')} of {row.get('bns', '')}", f"{row.get('fold_s', 0):.2f}"]
               for (library,family),some in sorted(families(rows).items()) for row in some if row['outcome']!='unjudged']
    print(text_table(['library','family','network','as','outcome','BNs gone','seconds'], figures, left=5))
    for stage,found in data['reasons'].items():
        print(f'\n{stage}: {data["totals"][stage]}')
        print(text_table(['why BNs stay','BNs','networks'], [[kind, entry['bns'], entry['networks']] for kind,entry in list(found.items())[:10]]))

@call_parse
def main(
    out:str='sweep.jsonl',      # A line a network; what is there is not done again
    only:str='',                # Only networks whose `library/family/name` contains this
    stage:str='modules,graph',  # What to fold
    redo:str='',                # Do those of these outcomes again (`crash,slow`; `all`)
    part:float=1.,              # So large a part of all, by chance
    limit:float=60,             # Seconds of processor time for a network
    summary:str=''              # Instead: write the figures of `out` here, and print tables
):
    "Fold hundreds of networks"
    warnings.filterwarnings('ignore')
    if summary: return summarize(list(rows_in(out).values()), summary)
    done = {key for key,row in rows_in(out).items() if row['outcome'] not in redo.split(',') and redo!='all'}
    chosen = wanted(only, part)
    gc.freeze() # (processes share what was imported)
    for net in chosen:
        for what in stage.split(','):
            if (net.library, net.name, what) in done: continue
            row = dict(library=net.library, family=net.family, name=net.name, stage=what) | in_child(net, what, limit)
            with Path(out).open('a', encoding='utf-8') as file: file.write(json.dumps(row)+'\n')
            print(f"{net.library:14} {net.name:32} {what:8} {row['outcome']:12} {row.get('gone','')}/{row.get('bns','')} {row.get('why','')[:100]}", flush=True)
