"""Predictions for a folder or a Parquet file of images, on as many machines as Ray has, with a model that `learn.deploy` made.

    pip install "ray[data]"
    python examples/bulk.py DEPLOYED IMAGES OUT [--workers 8] [--batch 32] [--threads 1]

DEPLOYED is the folder of the deployment, IMAGES a folder of images (searched in depth) or a Parquet file or folder with the columns
`path` (a unique name) and `bytes` (the image file). OUT gets Parquet files with `path`, `label`, `prob` and `error`: an image that cannot be
read becomes a row that says why. All three must be reachable from every machine under the same path (a shared disk); without a
cluster Ray uses the cores of this machine.

Ray does the rest: it starts a worker again that dies, and gives its batch to another; and it notes in OUT.done which images are written,
so that the same command after a crash, a power cut or Ctrl-C goes on where it stopped. The notes go when all is done.
"""
import logging, os
from pathlib import Path
import pyarrow.dataset, ray
from fastcore.script import call_parse
from ray.data.checkpoint import CheckpointConfig
from fastai_bnfold.deploy.serve import Deployed, DeployError

images = 'bmp gif jpg jpeg png tif tiff webp'.split()

class Predictor:
    "One per worker: loads the model once"
    def __init__(self, deployed, threads): self.model = Deployed(deployed, threads)
    def one(self, data):
        try: p = self.model.predict(bytes(data)); return str(p.label), float(p.probs.max()), ''
        except DeployError as e: return '', 0., str(e)
    def __call__(self, batch):
        label,prob,error = zip(*map(self.one, batch['bytes']))
        return dict(path=batch['path'], label=list(label), prob=list(prob), error=list(error))

@call_parse
def main(
    deployed:str,      # Folder that `learn.deploy` made
    source:str,        # Folder of images, or Parquet with `path` and `bytes`
    out:str,           # Folder for the predictions, as Parquet
    workers:int=None,  # Copies of the model, at most (default: as many as there are cores for)
    batch:int=16,      # Images that a worker takes at a time
    threads:int=1,     # Cores of a worker
    block:int=32       # MB of images after which progress is noted
):
    "Bulk inference with Ray Data; the same command again goes on where it stopped"
    Deployed(deployed) # a bad deployment is an error here, not in every worker
    source,out = Path(source).absolute(),Path(out).absolute()
    if not source.exists(): raise SystemExit(f"bulk: there is no '{source}'")
    table = source.is_file() or any(source.glob('*.parquet'))
    here = {} if os.environ.get('RAY_ADDRESS') else dict(num_cpus=os.cpu_count()+3, include_dashboard=False) # in Ray's books, reading, looking up what is done, and writing take a core each
    ray.init(logging_level=logging.WARNING, **here)
    workers = workers or max(1, (int(ray.cluster_resources()['CPU'])-3)//threads)
    ctx = ray.data.DataContext.get_current()
    ctx.target_max_block_size,ctx.target_min_block_size = block*2**20,block*2**19
    ctx.checkpoint_config = CheckpointConfig(id_column='path', checkpoint_path=f'{out}.done')
    data = ray.data.read_parquet(str(source), columns=['path','bytes']) if table else \
           ray.data.read_binary_files(str(source), include_paths=True, file_extensions=images)
    data = data.map_batches(Predictor, fn_constructor_args=(str(Path(deployed).absolute()), threads), batch_size=batch, compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers), num_cpus=threads)
    data.write_parquet(str(out), mode='append')
    print(f'{pyarrow.dataset.dataset(out).count_rows():,} images in {out}')
