"The sweep over networks of other libraries: a small part of it, and its judge"
import json, sys
from pathlib import Path
import pytest, torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent/'benchmarks'))
import sweep
from sweep_networks import Net, networks

everywhere = [net for library in ('timm','torchvision') for net in networks(f'{library}/')] # installed wherever the tests run
tenth = [net for net in everywhere if sweep.place(net.name)<.1 and net.family!='detection'] # (detectors take minutes, and which boxes they choose is a matter of rounding)
few = [net for net in tenth if sweep.place(net.name)<.01]

right = 'right','slow' # how long it takes is for quiet machines

def small_net():
    return nn.Sequential(nn.Conv2d(3,8,3,padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8,8,1), nn.BatchNorm2d(8))
def net(build=small_net, name='small'): return Net('here', 'here', name, build, [lambda: torch.randn(1,3,8,8)])

@pytest.mark.parametrize('chosen', tenth, ids=lambda chosen: chosen.name)
def test_a_network_of_another_library_folds_right(chosen):
    row = sweep.one(chosen, 'modules')
    assert row['outcome'] in right, row

@pytest.mark.parametrize('chosen', few, ids=lambda chosen: chosen.name)
def test_its_graph_folds_right(chosen):
    row = sweep.one(chosen, 'graph')
    assert row['outcome'] in right, row

def test_the_part_is_the_same_everywhere(): assert round(sweep.place('resnet18'), 4)==.3326
def test_names_are_unique(): assert len(everywhere)==len({(net.library, net.name) for net in everywhere})

@pytest.mark.parametrize('stage', ['modules','graph'])
def test_a_right_fold(stage):
    row = sweep.one(net(), stage)
    assert (row['outcome'], row['gone'], row['bns'])==('right', 2, 2)

def test_a_wrong_fold_is_seen(monkeypatch):
    "The judge does not trust the proof: here a fold is spoilt after it"
    def spoilt(fold):
        report = run(fold)
        with torch.no_grad(): fold.target[0].bias[3] += .01
        return report
    run = sweep.Fold.run
    monkeypatch.setattr(sweep.Fold, 'run', spoilt)
    assert sweep.one(net(), 'modules')['outcome']=='wrong'

def test_a_false_alarm_is_seen(monkeypatch):
    "A proof that rejects all there is"
    monkeypatch.setattr(sweep.Fold, '_is_close', lambda fold: False)
    assert sweep.one(net(), 'modules')['outcome']=='false alarm'

def test_what_cannot_be_built_is_not_judged():
    def broken(): raise ValueError('no such network')
    row = sweep.one(net(broken), 'modules')
    assert row['outcome']=='unjudged' and 'no such network' in row['why']
def test_a_network_without_BN_is_not_judged(): assert sweep.one(net(lambda: nn.Conv2d(3,4,1)), 'modules')['outcome']=='unjudged'
def test_the_first_legal_input_is_taken():
    tried = [lambda: torch.randn(1,5,8,8), lambda: torch.randn(1,3,8,8)]
    assert sweep.first_legal(small_net().eval(), tried)[0].shape==(1,3,8,8)

def test_a_network_that_takes_too_long_is_ended():
    def endless():
        while True: pass
    assert sweep.in_child(net(endless), 'modules', .1)['outcome']=='slow'

def test_a_crash_is_a_row(monkeypatch):
    def crash(*args): raise ZeroDivisionError('oh')
    monkeypatch.setattr(sweep, 'as_modules', crash)
    assert sweep.one(net(), 'modules')['outcome']=='crash'

class Holds(nn.Module):
    "A tensor that was computed from a parameter, which `deepcopy` refuses"
    def __init__(self):
        super().__init__()
        self.net,self.scale = small_net(),2*nn.Parameter(torch.ones(1))
    def forward(self, x): return self.net(x)*self.scale

def test_a_model_that_holds_a_computed_tensor_is_copied():
    model = Holds().eval()
    folder = sweep.BNFolder()
    folded = folder.fold(model, torch.randn(1,3,8,8))
    assert folder.report.n_folded==2 and not model.scale.is_leaf
    assert folded.scale is not model.scale and torch.equal(folded.scale, model.scale)

def test_a_line_is_done_once(tmp_path):
    out = tmp_path/'sweep.jsonl'
    for outcome in ('crash','right'):
        with out.open('a') as file: file.write(json.dumps(dict(library='a', name='b', stage='modules', outcome=outcome))+'\n')
    [row] = sweep.rows_in(out).values()
    assert row['outcome']=='right'

class Edges(nn.Module):
    "Nodes, picked by edges that are data, between a BN and a layer"
    def __init__(self, pick):
        super().__init__()
        self.pick,self.layer,self.bn,self.head = pick,nn.Linear(6,8),nn.BatchNorm1d(8),nn.Linear(8,4)
    def forward(self, x, ends): return self.head(self.pick(self.bn(self.layer(x).sin()), ends)).sin()

PICKS = {'index_select': lambda x, ends: x.index_select(-2, ends), 'index': lambda x, ends: x[ends],
         'gather': lambda x, ends: x.gather(0, ends[:,None].expand(-1, 8)), 'take_along_dim': lambda x, ends: x.take_along_dim(ends[:,None], 0)}
ends = torch.tensor([1,0,3,3,2])

@pytest.mark.parametrize('pick', PICKS)
def test_a_map_per_feature_passes_what_picks_nodes(pick):
    model = sweep.randomize_bn(Edges(PICKS[pick])).double().eval()
    folder,args = sweep.BNFolder(),(torch.randn(4,6).double(), ends)
    folded = folder.fold(model, args)
    assert folder.report.n_folded==1
    other = torch.randn(4,6).double(),ends.flip(0)
    with torch.no_grad(): torch.testing.assert_close(folded(*other), model(*other), rtol=1e-10, atol=1e-12)

def test_a_map_per_feature_stops_where_features_are_picked():
    model = sweep.randomize_bn(Edges(lambda x, ends: x[:,ends.repeat(2)[:8]])).double().eval()
    folder = sweep.BNFolder()
    folder.fold(model, (torch.randn(4,6).double(), ends))
    assert folder.report.rows[0].kind.endswith('index from the data')

def test_trained_statistics_are_used():
    plain = Net('here', 'here', 'small', small_net, [], trained=True)
    assert not any(bn.running_mean.any() for bn in sweep.built(plain) if isinstance(bn, nn.BatchNorm2d))
    assert all(bn.running_mean.any() for bn in sweep.built(net()) if isinstance(bn, nn.BatchNorm2d))
