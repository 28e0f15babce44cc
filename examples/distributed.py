"""Train on several processes, fold on all of them, validate over all of them.

    accelerate launch --num_processes 2 --multi_gpu examples/distributed.py                                                # two GPUs
    ACCELERATE_USE_CPU=1 accelerate launch --num_processes 2 --multi_gpu examples/distributed.py                           # two processes on the CPU (gloo)

Inside fastai's `distrib_ctx`, `fold_bn` folds the same model on each process and validates over all; if folding fails on one, none is folded and each raises an error.
On GPUs the batch norms are `SyncBatchNorm`. On the CPU they are not: PyTorch's `DistributedDataParallel` refuses "SyncBatchNorm layers" there.
"""
import json
from pathlib import Path
from fastai.vision.all import *
from fastai.distributed import *
from fastcore.script import call_parse
from fastai_bnfold.all import *
from fastai_bnfold.lab.data import digits_dls

gpu = torch.cuda.is_available()
if not gpu:
    @patch
    def _broadcast(self:DistributedDL, t, rank): # fastai's own goes through CUDA, whatever the backend
        t = LongTensor(t); torch.distributed.broadcast(t, rank)
        return t.tolist()

@call_parse
def main(
    epochs:int=2,
    out:str='out/distributed', # Folder for the folded weights and a report of each process
    fail_on:int=-1             # Give this process a batch that does not fit, to see what happens
):
    "Train a ResNet-18 on the digits and fold it"
    rank,out = rank_distrib(),Path(out); out.mkdir(parents=True, exist_ok=True)
    def tell(**d): (out/f'{rank}.json').write_text(json.dumps(dict(n_processes=num_distrib(), **d)))
    set_seed(rank)             # each process its own chances
    learn = Learner(digits_dls(size=32, bs=32), resnet18(num_classes=10), metrics=accuracy)
    with learn.distrib_ctx(sync_bn=gpu):
        learn.fit_one_cycle(epochs, 3e-3)
        before = {k:v.clone() for k,v in learn.model.state_dict().items()}
        try: rep = learn.fold_bn(xb=torch.zeros(2) if rank==fail_on else None, latency=0)
        except FoldError as e:
            same = all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items())
            tell(error=f'{type(e).__name__}: {e}', unchanged=same)
            print(f'process {rank}: {e}'); return
    torch.save(learn.model.state_dict(), out/f'{rank}.pth')
    tell(n_folded=rep.n_folded, n_items=rep.n_items, n_changed=rep.n_changed, before=rep.metrics_before, after=rep.metrics_after)
    if not rank: print(rep)
    learn.unfold_bn()
