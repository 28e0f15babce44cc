"""What else could mend a network trained in batches of two? Compared on one network of `small_batch.py`, whose weights must be there.

    python benchmarks/small_batch_alternatives.py [--data imagenette] [--weights FOLDER] [--run 2/0] [--out benchmarks/results/small_batch_alternatives.json]

- The training mode itself, each item with random others: what all the label-free methods below try to match.
- The map `s·x + t` of every BN that is nearest to the training mode's output, by least squares, layer after layer, in one batch.
- γ and β of every BN by gradient descent: towards the mean prediction of the training mode (no labels), or on the loss (with labels).
- A share α per BN, chosen by the same two criteria (`correct_bn(per_layer=True)` uses the loss).

All but the first start from `reestimate_bn()`, and use training data only.
"""
import itertools, json
from pathlib import Path
from fastai.vision.all import *
import copy # fastai has a `copy` of its own
from fastcore.script import call_parse
from fastai_bnfold.all import *
from fastai_bnfold.stats.batch import batch_norms
from fastai_bnfold.stats.item import ItemStatistics
from fastai_bnfold.lab.command import machine
from fastai_bnfold.fold.report import text_table
from small_batch import small_images, trained

def normalized(m, x, group):
    "What the BN `m` does in training mode with batches of `group`: the batch is cut into pieces that each have statistics of their own"
    f = x.float().unflatten(0, (-1,group))
    v,mean = torch.var_mean(f, (1,3,4), correction=0, keepdim=True)
    return ((f-mean)*(v+m.eps).rsqrt()).flatten(0,1)*m.weight.view(1,-1,1,1) + m.bias.view(1,-1,1,1)

def in_training_mode(model, group):
    "A copy of the model that does so"
    model = copy.deepcopy(model).eval()
    for m in batch_norms(model).values(): m.register_forward_hook(lambda m, a, o: normalized(m, a[0], group).to(o.dtype))
    return model

def least_squares(model, x, group):
    "A copy in which every BN is the map of its input that is nearest to its output in training mode"
    model,new = copy.deepcopy(model).eval(),{}
    def fit(m, args, out):
        t,s = args[0].float().chunk(2) # the training mode's stream, and the one at test time
        y,dims = normalized(m, t, group),(0,2,3)
        ms,my = s.mean(dims, keepdim=True),y.mean(dims, keepdim=True)
        a = ((s-ms)*(y-my)).mean(dims, keepdim=True)/(s.var(dims, correction=0, keepdim=True)+1e-8)
        new[m] = a.flatten(),(my-a*ms).flatten()
        return torch.cat([y, a*s+my-a*ms]).to(out.dtype)
    hooks = [m.register_forward_hook(fit) for m in batch_norms(model).values()]
    with torch.no_grad(): model(torch.cat([x,x]))
    for h in hooks: h.remove()
    for m,(a,b) in new.items(): m.running_mean.zero_(); m.running_var.fill_(1-m.eps); m.weight.data.copy_(a); m.bias.data.copy_(b)
    return model

def descend(params, loss, batches, lr):
    "Adam, with a learning rate that falls to zero"
    opt = torch.optim.Adam(params, lr=lr)
    sched = torch.optim.lr_scheduler.CosineAnnealingLR(opt, len(batches))
    for x,y in progress_bar(batches, leave=False):
        opt.zero_grad(); loss(x, y).backward(); opt.step(); sched.step()

@call_parse
def main(
    data:str='imagenette',         # As in `small_batch.py`
    weights:str='out/small_batch', # As in `small_batch.py`
    run:str='2/0',                 # Batch size/seed
    steps:int=40,                  # Of gradient descent, 64 items each
    every:int=4,                   # Validate on every so many-th image
    out:str='benchmarks/results/small_batch_alternatives.json' # Where the figures go
):
    "Compare other ways to better inference"
    group,seed = map(int, run.split('/'))
    learn = trained(small_images(data, Path(weights)/'images'), group, seed, weights)
    some = list(range(0, len(learn.dls.valid_ds), every))
    dl = learn.dls.valid.new(get_idxs=lambda: some, n=len(some), bs=64)
    amp,res = lambda: torch.autocast('cpu', torch.bfloat16),{}
    with no_random(): batches = [tuple(o.as_subclass(Tensor) for o in b) for b in itertools.islice(learn.dls.train.new(bs=64, shuffle=True, drop_last=True), steps)]
    def validate(name, model):
        old,learn.model = learn.model,model
        with learn.no_bar(), learn.no_logging(): res[name] = dict(zip(('loss','accuracy'), learn.validate(dl=dl)))
        learn.model = old; print(name, res[name], flush=True)
    validate('standard', learn.model)
    teacher = in_training_mode(learn.model, group)
    xs,ys = (torch.cat([o.as_subclass(Tensor) for o in part]) for part in zip(*dl))
    def ensemble(k):
        "Mean prediction of the training mode over `k` draws of the other items, on the validation set"
        p,n = 0,len(xs)//group*group
        for i in range(k):
            r = torch.randperm(len(xs), generator=torch.Generator().manual_seed(i))[:n]
            with torch.no_grad(), amp(): q = torch.cat([teacher(b).float().softmax(1) for b in xs[r].split(64*group)])
            p = p + torch.zeros(len(xs), q.shape[1]).index_copy(0, r, q)
        return dict(loss=F.nll_loss((p/p.sum(1, keepdim=True).clamp_min(1e-8)).clamp_min(1e-8).log(), ys).item(), accuracy=(p.argmax(1)==ys).float().mean().item())
    for k in (1,4): res[f'training mode, mean over {k} draw{"s"*(k>1)} of the other items'] = ensemble(k); print(res, flush=True)
    with learn.no_bar(): learn.reestimate_bn()
    validate('population', learn.model)
    with amp(): validate('population, least squares', least_squares(learn.model, torch.cat([x for x,_ in batches[:8]]), group))
    def soft(x):
        "The training mode's mean prediction over three draws of the other items"
        with torch.no_grad(), amp(): return sum(teacher(x[r]).float()[r.argsort()].softmax(1) for r in (torch.randperm(len(x)) for _ in range(3)))/3
    criteria = {'the loss': lambda z,x,y: F.cross_entropy(z, y), 'the training mode': lambda z,x,y: F.cross_entropy(z, soft(x))}
    for name,criterion in criteria.items():
        def loss(x, y):
            with amp(): z = model(x)
            return criterion(z.float(), x, y)
        model = copy.deepcopy(learn.model).eval().requires_grad_(False)
        params = [p.requires_grad_() for m in batch_norms(model).values() for p in (m.weight, m.bias)]
        descend(params, loss, batches, 3e-3)
        validate(f'population, γ and β by {name}', model)
        model = copy.deepcopy(learn.model).eval().requires_grad_(False)
        logits = [torch.tensor(-3., requires_grad=True) for _ in batch_norms(model)]
        hooks = [ItemStatistics(0.) for _ in logits]
        for m,h in zip(batch_norms(model).values(), hooks): m.register_forward_pre_hook(h, with_kwargs=True)
        def loss_alpha(x, y):
            for h,l in zip(hooks, logits): h.alpha = l.sigmoid()
            return loss(x, y)
        descend(logits, loss_alpha, batches, .15)
        for h in hooks: h.alpha = h.alpha.item()
        validate(f'population, α per layer by {name}', model)
    Path(out).write_text(json.dumps(dict(machine=machine(), run=run, steps=steps, n_valid=len(some), results=res), indent=1))
    print(text_table(['', 'accuracy', 'loss'], [[k, f"{100*r['accuracy']:.2f} %", f"{r['loss']:.3f}"] for k,r in res.items()]))
