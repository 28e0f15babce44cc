"""What happens in the cases in which folding could go wrong: the counts of the tests that try to make it, and what users do.

    python benchmarks/reliability.py [--part tests,workflows] [--faults 70] [--out benchmarks/results/reliability.json]

Tests: the catalogue of hard cases, random graphs, fault injection, the state machine over a Learner and the others, in one table.
Workflows: each of `workflows.py` in a process of its own, with a time limit. Right is what ends as it should, refused what has to be
refused and is, with a sentence for the user; what is left is wrong: other results, a traceback that is none of ours, no answer in time.
"""
import json, multiprocessing, os, sys, time
from collections import Counter
from pathlib import Path
import pytest
from fastcore.script import call_parse
from fastai_bnfold.lab.command import machine
from fastai_bnfold.fold.report import text_table

fork = multiprocessing.get_context('fork') # the imports are done once
tests = Path(__file__).parent.parent/'tests'
sys.path.insert(0, str(tests))

class Results:
    "Outcome and recorded properties of every test"
    def __init__(self): self.tests = {}
    def pytest_runtest_logreport(self, report):
        if report.when=='call' or report.failed or report.skipped: self.tests[report.nodeid] = report.outcome,dict(report.user_properties)

def counts(results):
    "Rows of the table: what was tried, how often, what came of it, and how many were wrong"
    def of(word): return {k:v for k,v in results.items() if word in k}
    def failed(rs): return sum(o=='failed' for o,_ in rs.values())
    def total(rs, key): return sum(p.get(key, 0) for _,p in rs.values())
    from test_property import n_graphs
    hard = of('test_hard_case[')
    fates = Counter(p.get('fate', 'wrong') for _,p in hard.values())
    pytorch = {k:v for k,v in hard.items() if '[pytorch ' in k}
    faults,machine_ = of('test_faults.py'),of('test_state_machine.py')
    return [['hard cases, on a copy and in place', len(hard), ', '.join(f'{n} {f}' for f,n in sorted(fates.items())), failed(hard)],
            ['of these, public reports about other tools', len(pytorch), ', '.join(f'{n} {f}' for f,n in sorted(Counter(p.get('fate', 'wrong') for _,p in pytorch.values()).items())), failed(pytorch)],
            ['random graphs, float64', n_graphs, 'folded = unfolded', failed(of('test_folded_equals_unfolded'))],
            ['injected faults: an exception at any line of a fold', total(faults, 'faults'), 'model and Learner bit-identical to before', failed(faults)],
            ['states of a Learner (fit, fold, unfold, save, load, export, predict, validate in any order)', total(machine_, 'checks'), "predictions are the unfolded model's; unfolded bit for bit", failed(machine_)],
            ['kinds of Learners (precision, callbacks, inputs, metrics, data)', len(of('test_learner_cases.py')), 'same metrics; as before after an error', failed(of('test_learner_cases.py'))],
            ['two processes on the CPU', len(of('test_distributed.py')), 'the same folded model; no process waits; no SyncBatchNorm there (PyTorch)', failed(of('test_distributed.py'))],
            ['hostile archives and files', len(of('test_an_archive')|of('test_a_bomb')|of('test_weights_are')), 'refused, nothing written or run', failed(of('test_an_archive')|of('test_a_bomb')|of('test_weights_are'))]]

def run_tests(faults):
    "Rows of the table, and what was skipped"
    os.environ['FAULTS'] = str(faults)
    res = Results()
    files = [str(tests/f'test_{name}.py') for name in ('hard_cases','faults','state_machine','learner_cases','distributed')]
    some = [str(tests/'test_cli.py')+f'::test_{name}' for name in ('an_archive_cannot_write_elsewhere','a_bomb_is_refused','weights_are_loaded_without_unpickling')]
    pytest.main(['-q', '--no-header', '-W', 'ignore', '--rootdir', str(tests.parent), '-c', str(tests.parent/'pyproject.toml'),
                 *files, str(tests/'test_property.py')+'::test_folded_equals_unfolded', *some], plugins=[res])
    return counts(res.tests), sorted(k for k,(outcome,_) in res.tests.items() if outcome=='skipped')

def in_child(name, connection):
    "Run a workflow, and send what came of it"
    import workflows
    connection.send(workflows.run(name))
    connection.close()
    os._exit(0) # whatever the engines' threads are doing

def one(name, limit):
    "A workflow in a process of its own"
    began,(mine,its) = time.time(),fork.Pipe()
    process = fork.Process(target=in_child, args=(name,its))
    process.start()
    its.close()
    try: found = mine.recv() if mine.poll(limit) else dict(outcome='hang', said=f'no answer in {limit} seconds')
    except EOFError: found = dict(outcome='crash', said='the process ended without a word')
    process.kill()
    process.join()
    return dict(name=name) | found | dict(seconds=round(time.time()-began, 1))

def run_workflows(limit, only):
    "All of them (or those with a word in their names), with what the user does"
    import workflows
    rows = []
    for name,f in workflows.workflows.items():
        if only and only not in name: continue
        rows.append(one(name, limit) | dict(what=f.__doc__))
        print(f"{rows[-1]['outcome']:9} {rows[-1]['seconds']:5}s {name}: {f.__doc__}", *[rows[-1]['said']]*(rows[-1]['outcome'] not in ('right','refused')), flush=True)
    return rows

def as_row(found):
    "The workflows as a row of the table"
    fates = Counter(row['outcome'] for row in found)
    good = fates['right'],fates['refused']
    words = f'{good[0]} right, {good[1]} refused or warned of with a sentence that says why'
    return ['workflows of fastai users, from the callback to a web service', len(found), words, len(found)-sum(good)]

@call_parse
def main(
    part:str='tests,workflows', # What to run; what is left out stays as it was
    faults:int=70,              # Faults for each of the models (half as many again on copies and plans)
    limit:int=240,              # Seconds for a workflow
    only:str='',                # Workflows with this in their names alone, and nothing is written
    out:str='benchmarks/results/reliability.json' # Where the figures go
):
    "How often is it wrong?"
    out = Path(out)
    res = json.loads(out.read_text()) if out.exists() else dict(rows=[], skipped=[], workflows=[])
    if 'tests' in part: res['rows'],res['skipped'] = run_tests(faults)
    if 'workflows' in part: res['workflows'] = run_workflows(limit, only)
    if only: return
    res['rows'] = [row for row in res['rows'] if 'workflows' not in row[0]]
    if res.get('workflows'): res['rows'].append(as_row(res['workflows']))
    out.write_text(json.dumps(res | dict(machine=machine()), indent=1, ensure_ascii=False))
    print(text_table(['tried','how many','outcome','wrong'], res['rows']))
    if res['skipped']: print('skipped:', ', '.join(res['skipped']))
