"ImageNette at 64 px: float, after-training and aware integer networks"
import sys, io, json, time, copy, os, numpy as np, torch, warnings; warnings.filterwarnings('ignore')
from PIL import Image
from torch import nn
import torch.nn.functional as F
from torchvision.models import resnet18, mobilenet_v2
from fastai_bnfold.integer.aware import *
from fastai_bnfold.integer.net import *
from fastai_bnfold.integer.layout import *
dev = 'cuda' if torch.cuda.is_available() else 'cpu'
torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True; torch.backends.cudnn.benchmark=True
T0=time.time(); LIMIT=float(os.environ.get('LIMIT','480')); SMOKE=os.environ.get('SMOKE'); OUT=os.environ.get('OUT','/tmp/i/out'); os.makedirs(OUT,exist_ok=True)
def load(s, z):
    b=z[f'b_{s}'].tobytes(); at=np.concatenate([[0],np.cumsum(z[f'n_{s}'])]); k=len(at)-1
    if SMOKE: k=200
    X=np.stack([np.asarray(Image.open(io.BytesIO(b[at[i]:at[i+1]]))) for i in range(k)])
    return torch.from_numpy(X).permute(0,3,1,2).contiguous().to(dev), torch.from_numpy(z[f'y_{s}'][:k]).long().to(dev)
z=np.load('.gpu/data.npz'); xt,yt=load('train',z); xv,yv=load('val',z); print('data',time.time()-T0,flush=True)
mean=torch.tensor([.485,.456,.406],device=dev).view(1,3,1,1); std=torch.tensor([.229,.224,.225],device=dev).view(1,3,1,1)
def norm(x): return (x.float()/255-mean)/std
def aug(x):
    n=len(x); s=.08+.0*0
    scale=torch.empty(n,device=dev).uniform_(.6,1.); flip=(torch.rand(n,device=dev)<.5).float()*2-1
    tx,ty=[(torch.rand(n,device=dev)*2-1)*(1-scale) for _ in range(2)]
    th=torch.zeros(n,2,3,device=dev); th[:,0,0]=scale*flip; th[:,1,1]=scale; th[:,0,2]=tx; th[:,1,2]=ty
    return F.grid_sample(x, F.affine_grid(th,(n,3,64,64),align_corners=False), align_corners=False, padding_mode='reflection')
def net(name):
    if name=='resnet18':
        m=resnet18(num_classes=10); m.conv1=nn.Conv2d(3,64,3,1,1,bias=False); return m
    m=mobilenet_v2(num_classes=10); m.features[0][0].stride=(1,1); return m
def predict(m, f=None):
    m.eval(); torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    with torch.no_grad(): return torch.cat([(f or m)(norm(xv[i:i+256])).float() for i in range(0,len(xv),256)])
def acc(o): return (o.argmax(1)==yv).float().mean().item()
def train(m, epochs, lr, steps=(), bs=128, ls=.1):
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    ids={id(p) for p in steps}
    opt=torch.optim.AdamW([dict(params=[p for p in m.parameters() if p.requires_grad and id(p) not in ids],weight_decay=.02),dict(params=list(steps),weight_decay=0.)],lr=lr)
    total=epochs*(len(xt)//bs); sched=torch.optim.lr_scheduler.OneCycleLR(opt,[lr,lr],total_steps=total+1,pct_start=.25)
    for e in range(epochs):
        m.train(); perm=torch.randperm(len(xt),device=dev)
        for i in range(0,len(xt)-bs+1,bs):
            idx=perm[i:i+bs]; x=aug(norm(xt[idx]))
            with torch.autocast(dev,dtype=torch.bfloat16): out=m(x)
            loss=F.cross_entropy(out.float(),yt[idx],label_smoothing=ls); opt.zero_grad(set_to_none=True); loss.backward(); opt.step(); sched.step()
    return loss.item()
def record(**kw):
    kw['t']=round(time.time()-T0,1); print(json.dumps(kw),flush=True); open(f'{OUT}/results.jsonl','a').write(json.dumps(kw)+'\n')
E=(1,1,1) if SMOKE else (30,3,6)
torch.manual_seed(1); cal=[norm(xt[torch.randperm(len(xt),device=dev)[:64]]) for _ in range(2)]
cal=[F.interpolate(c,size=64,mode='bilinear') if c.shape[-1]!=64 else c for c in cal]
import traceback
def one(name, seed):
    torch.manual_seed(seed); m=net(name).to(dev).to(memory_format=torch.channels_last)
    train(m,E[0],4e-3); of=predict(m); fa=acc(of); record(net=name,seed=seed,what='float',acc=fa)
    if seed==0 and name!='resnet18': torch.save({k:(v.half() if v.is_floating_point() and v.ndim>1 else v) for k,v in m.state_dict().items()}, f'{OUT}/{name}_float.pt')
    m.eval()
    for bits,first in ((8,None),(4,8)):
        n=IntegerNet(m,cal,bits,first_bits=first); o=predict(m,n); record(net=name,seed=seed,what='after',bits=bits,acc=acc(o),changed=int((o.argmax(1)!=of.argmax(1)).sum()),kinds=n.layers().kind.value_counts().to_dict()); del n
    for bits,epochs,lr in ((4,E[1],1e-3),(2,E[2],2e-3)):
        if time.time()-T0>LIMIT: break
        q=copy.deepcopy(m); qm=QuantModel(q,cal,Bits(bits,bits,8,8))
        start=acc(predict(q)); train(q,epochs,lr,qm.parameters(),ls=.05); oq=predict(q); learned=qm.learned(); 
        qm.remove(); n=IntegerNet(q.eval(),cal,bits,first_bits=8,learned=learned); oi=predict(q,n)
        record(net=name,seed=seed,what='aware',bits=bits,epochs=epochs,before=start,acc=acc(oq),integer=acc(oi),changed=int((oq.argmax(1)!=oi.argmax(1)).sum()),max_diff=float((oq-oi).abs().max()/oi.abs().max()),changed_to_float=int((oi.argmax(1)!=of.argmax(1)).sum()))
        if seed==0 and bits==4: torch.save(dict(state={k:(v.half() if v.is_floating_point() and v.ndim>1 else v) for k,v in q.state_dict().items()},scales=learned.scales,weights={k:(w.to(torch.int8),s) for k,(w,s) in learned.weights.items()}) , f'{OUT}/{name}_q{bits}.pt') if name!='resnet18' else None
for seed in (0,1):
    for name in ('resnet18','mobilenet_v2'):
        if time.time()-T0>LIMIT: break
        try: one(name,seed)
        except Exception: traceback.print_exc()
