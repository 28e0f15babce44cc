"The command `bnfold`"
import json, os, subprocess, sys, tarfile
import pytest
from PIL import Image

def bnfold(*args, **env):
    return subprocess.run([sys.executable, '-c', 'from fastai_bnfold.experiments import main; import sys; sys.argv[0]="bnfold"; main()', *map(str, args)],
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

def test_an_archive_cannot_write_elsewhere(tmp_path):
    with tarfile.open(tmp_path/'evil.tar', 'w') as t:
        i = tarfile.TarInfo('../../evil.txt'); i.size = 0; t.addfile(i)
    fails(bnfold('reproduce', '--data', tmp_path/'evil.tar'), 'cannot be unpacked')

def test_help():
    out = bnfold('--help'); assert out.returncode==0 and 'reproduce' in out.stdout
    out = bnfold('reproduce', '--help'); assert out.returncode==0 and '--latency-size' in out.stdout
