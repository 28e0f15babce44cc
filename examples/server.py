"""A web server for a deployed model of images: uploads in, predictions out.

    pip install starlette uvicorn python-multipart
    python examples/server.py DEPLOYED [--port 8000] [--threads 1]
    curl -F file=@cat.jpg -F file=@dog.jpg http://127.0.0.1:8000/predict

An upload that is no image has an "error" in the place of its prediction; the others are not touched by it.
Predictions run in threads, which share one model: as many at once as there are processors.
"""
import argparse, os
import uvicorn
from anyio import CapacityLimiter, to_thread
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route
from fastai_bnfold.deploy.serve import Deployed
from fastai_bnfold.errors import DeployError

max_files = 64

def as_dict(outcome):
    "A prediction, or what was wrong with its item, for JSON"
    return {'error': str(outcome)} if isinstance(outcome, DeployError) else outcome.to_dict()

def make_app(model:Deployed, at_once:int=os.cpu_count()) -> Starlette:
    "The application: `POST /predict` with files, `GET /` says what the model is"
    limiter = []
    async def predict(request):
        if not limiter: limiter.append(CapacityLimiter(at_once))
        async with request.form(max_files=max_files) as form:
            uploads = [file for file in form.getlist('file') if hasattr(file, 'file')]
            if not uploads: return JSONResponse({'error': "Send images as files of the field 'file'."}, 400)
            run = lambda: model.predict(uploads, on_error='return')
            outcomes = await to_thread.run_sync(run, limiter=limiter[0])
        return JSONResponse([{'name': file.filename} | as_dict(o) for file,o in zip(uploads, outcomes)])
    def about(request):
        return JSONResponse({'name': model.card['name'], 'classes': model.vocab, 'parity': model.card['parity']})
    return Starlette(routes=[Route('/predict', predict, methods=['POST']), Route('/', about)])

if __name__=='__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('deployed')
    parser.add_argument('--host', default='127.0.0.1')
    parser.add_argument('--port', type=int, default=8000)
    parser.add_argument('--threads', type=int, default=1, help='of one prediction')
    args = parser.parse_args()
    uvicorn.run(make_app(Deployed(args.deployed, args.threads)), host=args.host, port=args.port, log_level='warning')
