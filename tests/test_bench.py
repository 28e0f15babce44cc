"`bnfold bench`: every engine runs or says why not; the command"
import json
import pytest, torch
from torch import nn
from fastai_bnfold.all import *
from fastai_bnfold.lab.bench import bench
from fastai_bnfold.lab.cli import main
from fastai_bnfold.lab.engines import engines
from fastai_bnfold.lab.models import example, find_model, subnormal_share, warm_up
from fastai_bnfold.lab.tools import tools
from test_cli import bnfold

def net(): return nn.Sequential(nn.Conv2d(3,8,3,bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8,8,3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8,4))

@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU'))])
def test_every_engine(device):
    m = warm_up(net(), 16).to(device)
    rows = bench(m, tuple(o.to(device) for o in example(m, 2, 16)), seconds=.5, threads=1)
    for r in rows: assert ('latency_ms' in r and r['per_second']==pytest.approx(2e3/r['latency_ms'])) ^ ('error' in r), r
    by = {(r['engine'],r['model']): r for r in rows}
    assert set(by) == {(e,w) for e,(_,cuda) in engines.items() if cuda in (None, device=='cuda') for w in ('unfolded','folded')} | {('eager',t) for t in tools}
    bad = {k:r['error'] for k,r in by.items() if 'error' in r}
    assert all('not installed' in e or 'changes nothing' in e for e in bad.values()), bad
    assert all(r['max_err']<(1e-2 if 'fp16' in e else 1e-5) for (e,w),r in by.items() if w!='limit: BNs deleted' and 'max_err' in r)
    assert by['eager','limit: BNs deleted']['max_err']>1e-3 and by['eager','unfolded']['speedup']==1 and 'over_limit' in by['eager','folded'] and 'over_unfolded' in by['torch.compile','folded']

def test_subnormal_numbers_are_found():
    m = net().eval()
    m[0].weight.data *= 1e-38; m[1] = nn.Identity()
    assert subnormal_share(m, example(m, 1, 16))>.1 and subnormal_share(warm_up(net(), 16), example(m, 1, 16))==0

def test_models_of_all_kinds(tmp_path):
    from fastai.vision.all import Learner, load_learner, xresnet18
    from fastai_bnfold.lab.data import digits_dls
    learn = Learner(digits_dls(16), net()); learn.export(tmp_path/'l.pkl')
    assert find_model(str(tmp_path/'l.pkl'))[1] and type(find_model('xresnet18')[0]).__name__=='XResNet' and not find_model('resnet18')[1]
    with pytest.raises(DeployError, match='Unknown model'): find_model('resnet5')
    with pytest.raises(DeployError, match='cannot be loaded'): find_model(str(tmp_path/'none.pkl'))
    with pytest.raises(DeployError, match='No example input'): example(nn.Linear(2,2))

def test_command(tmp_path):
    out = bnfold('bench', 'resnet18', '--batch', '1,2', '--size', 32, '--threads', 1, '--seconds', 1, '--only', 'eager;ONNX Runtime;limit: BNs deleted', '--out', tmp_path)
    assert out.returncode==0, out.stderr
    res = json.loads((tmp_path/'bench.json').read_text())['models']['resnet18']
    assert [(r['engine'],r['model'],r['batch']) for r in res['rows']]==[(e,m,b) for b in (1,2) for e,m in (('eager','unfolded'),('eager','folded'),('ONNX Runtime','unfolded'),('ONNX Runtime','folded'),('eager','limit: BNs deleted'))]
    assert (tmp_path/'resnet18.png').stat().st_size>5000 and 'warmed-up' in out.stdout and 'folded/unfolded' in out.stdout

@pytest.mark.parametrize('args,words', [(['resnet5'], ['Unknown model','timm']), (['resnet18','--batch','1,x'], ["'1,x'",'numbers']), (['resnet18','--only','tensorrt'], ["'tensorrt'",'OpenVINO']),
                                        (['resnet18','--device','tpu'], ["'tpu'",'cpu'])], ids=lambda a: a[-1])
def test_bad_input(args, words, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr('sys.argv', ['bnfold','bench',*args,'--out',str(tmp_path)])
    with pytest.raises(SystemExit) as e: main()
    err = capsys.readouterr().err
    assert e.value.code==2 and err.count('\n')==1 and all(w in err for w in words), err
