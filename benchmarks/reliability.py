"""What happens in the cases in which folding could go wrong: the counts of the tests that try to make it.

    python benchmarks/reliability.py [--faults 70] [--out benchmarks/results/reliability.json]

Runs the catalogue of hard cases, random graphs, fault injection, the state machine over a Learner and the others, and prints one table.
"""
import json, os, sys
from collections import Counter
from pathlib import Path
import pytest
from fastcore.script import call_parse
from fastai_bnfold.lab.command import machine
from fastai_bnfold.fold.report import text_table

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

@call_parse
def main(
    faults:int=70, # Faults for each of the models (half as many again on copies and plans)
    out:str='benchmarks/results/reliability.json' # Where the figures go
):
    "How often is it wrong?"
    os.environ['FAULTS'] = str(faults)
    res = Results()
    pytest.main(['-q', '--no-header', '-W', 'ignore', '--rootdir', str(tests.parent), '-c', str(tests.parent/'pyproject.toml'),
                 *(str(tests/f'test_{n}.py') for n in ('hard_cases','faults','state_machine','learner_cases','distributed')),
                 str(tests/'test_property.py')+'::test_folded_equals_unfolded', *(str(tests/'test_cli.py')+f'::test_{n}' for n in ('an_archive_cannot_write_elsewhere','a_bomb_is_refused','weights_are_loaded_without_unpickling'))], plugins=[res])
    rows = counts(res.tests)
    skipped = sorted(k for k,(o,_) in res.tests.items() if o=='skipped')
    Path(out).write_text(json.dumps(dict(machine=machine(), rows=rows, skipped=skipped), indent=1))
    print(text_table(['tried','how many','outcome','wrong'], rows))
    if skipped: print('skipped:', ', '.join(skipped))
