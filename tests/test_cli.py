"The command `bnfold`"
import json, os, subprocess, sys, tarfile
import pytest, torch
from PIL import Image

def bnfold(*args, **env):
    return subprocess.run([sys.executable, '-c', 'from fastai_bnfold.lab.cli import main; import sys; sys.argv[0]="bnfold"; main()', *map(str, args)],
                          capture_output=True, text=True, env={**os.environ, 'MPLBACKEND':'agg', **env})

def images(p, train='train'):
    for d,n in ((train,6),('val',4)):
        for c in range(2):
            (p/d/f'c{c}').mkdir(parents=True)
            for i in range(n): Image.new('RGB', (20,20), (100*c+40, 10*i, 7)).save(p/d/f'c{c}'/f'{i}.jpg')
    return p

def fails(out, *words):
    assert out.returncode==2, out.stderr
    lines = out.stderr.strip().splitlines()
    assert len(lines)==1 and lines[0].startswith('bnfold: ') and all(w in lines[0] for w in words), out.stderr

def test_reproduce_digits(tmp_path):
    out = bnfold('reproduce', '--data', 'digits', '--arch', 'resnet18', '--epochs', 1, '--latency-size', 64, '--seconds', 1, '--out', tmp_path)
    assert out.returncode==0, out.stderr
    res = json.loads((tmp_path/'results.json').read_text())
    r = res['networks']['resnet18']
    assert r['n_folded']==r['n_bn']==20 and r['n_changed']==0 and r['n_items']==360 and len(r['history'])==1
    assert r['metrics_before']['accuracy']==r['metrics_after']['accuracy'] and r['latency_before']>0
    assert (tmp_path/'results.png').stat().st_size>5000
    for w in ('article','measured','parameters removed','4,800','0 of 360'): assert w in out.stdout

@pytest.mark.parametrize('ext', ['folder','tar','tgz'])
def test_reproduce_path(tmp_path, ext):
    src = images(tmp_path/'data')
    if ext!='folder':
        with tarfile.open(f'{src}.{ext}', 'w:gz' if ext=='tgz' else 'w') as t: t.add(src, 'data' if ext=='tgz' else '.')
        src = f'{src}.{ext}'
    out = bnfold('reproduce', '--data', src, '--arch', 'resnet18', '--epochs', 1, '--size', 32, '--bs', 4, '--latency-size', 32, '--seconds', 1, '--out', tmp_path/'o', '--weights', tmp_path/'w')
    assert out.returncode==0, out.stderr
    again = bnfold('reproduce', '--data', src, '--arch', 'resnet18', '--epochs', 1, '--size', 32, '--bs', 4, '--latency-size', 32, '--seconds', 1, '--out', tmp_path/'o2', '--weights', tmp_path/'w')
    a,b = (json.loads((tmp_path/o/'results.json').read_text())['networks']['resnet18'] for o in ('o','o2'))
    assert a['metrics_before']['accuracy']==b['metrics_before']['accuracy'] and a['history']==b['history'] # the weights were used again

def test_help_explains_the_commands(monkeypatch, capsys):
    from fastai_bnfold.lab.cli import main
    monkeypatch.setattr(sys, 'argv', ['bnfold','--help'])
    main()
    out = capsys.readouterr().out
    assert all(words in out for words in ('reproduce','Train networks','bench','Latency and throughput'))

@pytest.mark.parametrize('args,words', [(['reproduce','--epochs','five'],['epochs','five','--help']), (['bench'],['models']), (['reproduce','--no-such-option'],['no-such-option'])])
def test_bad_options_are_one_line(args, words, monkeypatch, capsys):
    from fastai_bnfold.lab.cli import main
    monkeypatch.setattr(sys, 'argv', ['bnfold',*args])
    with pytest.raises(SystemExit) as stop: main()
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code==2 and len(lines)==1 and all(word in lines[0] for word in ['bnfold: ',*words])

def test_bad_input(tmp_path):
    fails(bnfold('reproduce', '--data', 'imagenet'), "unknown data 'imagenet'", 'digits')
    fails(bnfold('reproduce', '--data', tmp_path/'none'), 'no file or folder', 'none')
    fails(bnfold('reproduce', '--data', images(tmp_path/'d', train='training')), 'no train/', 'training')
    with tarfile.open(tmp_path/'d.tar', 'w') as t: t.add(tmp_path/'d', 'd')
    fails(bnfold('reproduce', '--data', tmp_path/'d.tar'), 'no train/')
    (tmp_path/'broken.tgz').write_bytes(b'not an archive')
    fails(bnfold('reproduce', '--data', tmp_path/'broken.tgz'), 'cannot be unpacked')
    fails(bnfold('reproduce', '--data', 'digits', '--arch', 'resnet51'), "unknown network 'resnet51'")
    fails(bnfold('fold'), 'usage')
    fails(bnfold('reproduce', '--data', 'imagenette', IMAGENETTE=str(tmp_path/'gone')), 'no file or folder')

def _member(name, **kw):
    i = tarfile.TarInfo(name)
    for k,v in kw.items(): setattr(i, k, v)
    return i
def _link(name, target, kind): return _member(name, type=kind, linkname=target)
evil = {
    'a path that leads out': [_member('../../evil.txt')],
    'an absolute path': [_member('/tmp/evil.txt')],
    'a link to elsewhere': [_link('train', '/etc', tarfile.SYMTYPE)],
    'a file through a link': [_link('train', '..', tarfile.SYMTYPE), _member('train/evil.txt')],
    'a link inside': [_member('train/a.txt'), _link('train/b.txt', 'a.txt', tarfile.SYMTYPE)],
    'a hard link': [_link('train/x', '../../evil', tarfile.LNKTYPE)],
    'a device': [_member('train/x', type=tarfile.CHRTYPE)],
    'a pipe': [_member('train/x', type=tarfile.FIFOTYPE)],
}
@pytest.mark.parametrize('name', evil)
def test_an_archive_cannot_write_elsewhere(name, tmp_path):
    "Refused before anything is unpacked"
    from fastai_bnfold.lab.data import DataError, find_images
    (to := tmp_path/'a'/'b').mkdir(parents=True)
    with tarfile.open(tmp_path/'evil.tar', 'w') as t:
        for i in evil[name]: t.addfile(i)
    with pytest.raises(DataError, match='cannot be unpacked'): find_images(str(tmp_path/'evil.tar'), to)
    assert not list(to.iterdir()) and sorted(p.name for p in tmp_path.iterdir())==['a','evil.tar']

@pytest.mark.parametrize('kind', ['one file','many files','sparse'])
def test_a_bomb_is_refused(kind, tmp_path):
    "Archives of some kB that would fill the disk"
    from fastai_bnfold.lab.data import DataError, find_images
    class Zeros:
        def __init__(self, n): self.n = n
        def read(self, k): k = min(k, self.n); self.n -= k; return bytes(k)
    (to := tmp_path/'to').mkdir()
    with tarfile.open(tmp_path/'bomb.tgz', 'w:gz') as t:
        if kind=='one file': i = _member('train/a', size=2**29); t.addfile(i, Zeros(i.size))
        elif kind=='many files':
            for k in range(2**17): t.addfile(_member(f'train/{k}'))
        else:
            i = _member('train/a'); i.pax_headers = {'GNU.sparse.major': '0', 'GNU.sparse.size': str(2**50), 'GNU.sparse.map': '0,0', 'GNU.sparse.numblocks': '1'}; t.addfile(i)
    assert (tmp_path/'bomb.tgz').stat().st_size<2e6
    with pytest.raises(DataError, match='more room'): find_images(str(tmp_path/'bomb.tgz'), to)
    assert not list(to.iterdir())

def test_the_command_refuses_an_evil_archive(tmp_path):
    with tarfile.open(tmp_path/'evil.tar', 'w') as t: t.addfile(_member('../../evil.txt'))
    fails(bnfold('reproduce', '--data', tmp_path/'evil.tar'), 'cannot be unpacked')

def test_weights_are_loaded_without_unpickling(tmp_path):
    "A weight file that would run code is refused by PyTorch's safe loader"
    from fastai_bnfold.lab.data import get_dls
    from fastai_bnfold.lab.training import train
    class Evil:
        def __reduce__(self): return (open, (str(tmp_path/'ran'), 'w'))
    dls = get_dls('digits', size=32)
    torch.save({'x': Evil()}, tmp_path/'resnet18.pth'); (tmp_path/'resnet18.csv').write_text('epoch\n')
    with pytest.raises(Exception): train('resnet18', dls, 1, weights=tmp_path)
    assert not (tmp_path/'ran').exists()

def test_help():
    out = bnfold('--help'); assert out.returncode==0 and 'reproduce' in out.stdout
    out = bnfold('reproduce', '--help'); assert out.returncode==0 and '--latency-size' in out.stdout
