"""The documentation site: built, its links followed, and looked at in headless Chromium.

Skipped where the generator is not installed (`pip install '.[docs]'`); what needs a browser is skipped where there is none. `make docs-test` runs it.
"""
import ast, os, re, shutil, subprocess, sys, threading
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag
import pytest
from filelock import FileLock

root = Path(__file__).parent.parent
for package in ('sphinx','myst_nb','furo','latex2mathml'): pytest.importorskip(package)

@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The built site; `BNFOLD_SITE` names one that is there already"
    if os.environ.get('BNFOLD_SITE'): return Path(os.environ['BNFOLD_SITE'])
    base = tmp_path_factory.getbasetemp()
    out = (base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base)/'site' # processes share it
    with FileLock(f'{out}.lock'):
        if not (out/'html').exists(): build(out)
    return out/'html'

def build(out):
    out.mkdir(exist_ok=True)
    res = subprocess.run([sys.executable, root/'docs'/'build.py', '--out', out/'html', '--work', out/'work'], capture_output=True, text=True, cwd=out)
    assert res.returncode==0, res.stderr[-3000:]

class Page(HTMLParser):
    "Links, names and pictures of a page"
    def __init__(self, path):
        super().__init__()
        self.links,self.names,self.pictures = set(),set(),[]
        self.text = path.read_text(encoding='utf-8')
        self.feed(self.text)
    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if attrs.get('id'): self.names.add(attrs['id'])
        if tag=='img': self.pictures.append(attrs)
        self.links |= {attrs[key] for key in ('href','src') if attrs.get(key)}

@pytest.fixture(scope='module')
def pages(site): return {path: Page(path) for path in site.rglob('*.html')}

def is_local(link): return not re.match(r'[a-z]+:|//', link)

def test_no_broken_link(site, pages):
    broken = []
    for path,page in pages.items():
        for link in filter(is_local, page.links):
            to,name = urldefrag(unquote(link))
            target = (path.parent/to.split('?')[0]).resolve() if to else path
            found = target.exists() and (not name or target not in pages or name in pages[target].names)
            if not found: broken.append((str(path.relative_to(site)), link))
    assert broken==[]

def test_nothing_is_fetched_from_elsewhere(pages):
    "Scripts, styles and pictures come from the site itself"
    outside = {src for page in pages.values() for src in re.findall(r'<(?:script|img|link)[^>]+?(?:src|href)="(https?:[^"]+)"', page.text)}
    assert outside==set()

def test_pages_are_small(site):
    assert [path for path in site.rglob('*') if path.is_file() and path.stat().st_size>5e6]==[]

def test_no_directives(pages):
    assert [path for path,page in pages.items() if re.search(r'#\|\s*(</span>)?\s*(export|hide|default_exp|echo)', page.text)]==[]

def test_every_picture_has_words(site, pages):
    bare = [(str(path.relative_to(site)), picture['src']) for path,page in pages.items() for picture in page.pictures
            if not picture.get('alt') or picture['alt'].startswith('_images')]
    assert bare==[]

def test_every_notebook_and_result_has_a_page(site):
    notebooks = [path.relative_to(root).with_suffix('.html') for path in (root/'nbs').rglob('*.ipynb')
                 if path.name!='index.ipynb' and '.ipynb_checkpoints' not in path.parts]
    results = [Path('benchmarks')/f'{path.stem}.html' for path in (root/'benchmarks'/'results').glob('*.json')]
    assert [page for page in [*notebooks, *results] if not (site/page).exists()]==[]

def test_api_has_the_public_names(pages, site):
    names = next(ast.literal_eval(node.value) for node in ast.parse((root/'fastai_bnfold'/'all.py').read_text()).body if isinstance(node, ast.Assign))
    text = ''.join(page.text for path,page in pages.items() if path.parent==site/'api')
    missing = [name for name in [*names, 'Learner.fold_bn', 'Learner.deploy', 'BNFolder.fold_graph'] if f'>{name}<' not in text]
    assert missing==[]

# In a browser

class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args): pass

@pytest.fixture(scope='module')
def address(site):
    "The site on a server of this machine"
    server = ThreadingHTTPServer(('127.0.0.1',0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()
    server.server_close()

@pytest.fixture(scope='module')
def browser():
    "Chromium: the one of the system, or Playwright's own"
    playwright = pytest.importorskip('playwright.sync_api')
    path = shutil.which('chromium') or shutil.which('google-chrome')
    with playwright.sync_playwright() as p:
        try: found = p.chromium.launch(executable_path=path, args=['--no-sandbox'])
        except playwright.Error: pytest.skip('no Chromium: `playwright install chromium`, or a package of your system')
        yield found
        found.close()

LOOK = ['index.html','start/ten_minutes.html','start/which.html','guides/stays.html','compared.html','benchmarks/zoo.html','benchmarks/deploy.html',
        'nbs/tutorials/02_zoo.html','nbs/tutorials/06_deploy.html','nbs/fold/00_affine.html','nbs/fold/07_report.html','nbs/fold/08_plan.html','api/fold.html','api/learner.html']

def opened(browser, url, width, dark=False):
    "A page, and what went wrong on it"
    page = browser.new_page(viewport=dict(width=width, height=900), color_scheme='dark' if dark else 'light')
    page.trouble = []
    page.on('console', lambda message: page.trouble.append(message.text) if message.type=='error' else None)
    page.on('pageerror', lambda error: page.trouble.append(str(error)))
    page.on('requestfailed', lambda request: page.trouble.append(request.url))
    page.on('response', lambda response: page.trouble.append(f'{response.status} {response.url}') if response.status>=400 and 'favicon' not in response.url else None)
    page.goto(url)
    return page

@pytest.mark.parametrize('name', LOOK)
def test_page_in_a_browser(browser, address, name):
    "No error on the console, pictures loaded, no horizontal scroll on a telephone and on a screen"
    page = opened(browser, f'{address}/{name}', 390)
    wide = []
    for width in (390,1280):
        page.set_viewport_size(dict(width=width, height=900))
        wide.append(page.evaluate('document.documentElement.scrollWidth'))
    unloaded = page.evaluate('Array.from(document.images).filter(i => { i.loading = "eager"; return i.complete && !i.naturalWidth }).map(i => i.src)')
    trouble = page.trouble
    page.close()
    assert (trouble, unloaded)==([],[])
    assert wide[0]<=390 and wide[1]<=1280

def test_search(browser, address):
    page = opened(browser, f'{address}/search.html?q=reestimate_bn', 1280)
    page.wait_for_selector('ul.search li a')
    found = page.eval_on_selector_all('ul.search li a', 'links => links.map(a => a.href)')
    trouble = page.trouble
    page.close()
    assert any('statistics' in link or 'stats' in link for link in found) and trouble==[]

def test_search_from_disk(browser, site):
    page = opened(browser, f'{(site/"search.html").as_uri()}?q=zoo', 1280)
    page.wait_for_selector('ul.search li a')
    trouble = page.trouble
    page.close()
    assert trouble==[]

def test_start_page_is_quick_from_disk(browser, site):
    page = opened(browser, (site/'index.html').as_uri(), 1280)
    took = page.evaluate('performance.getEntriesByType("navigation")[0].loadEventEnd')
    page.close()
    assert 0<took<1000 or os.getloadavg()[0]>2*os.cpu_count() # a busy machine says nothing

@pytest.mark.parametrize('dark', [False,True], ids=['light','dark'])
def test_report_can_be_read(browser, address, dark):
    "The table of a report: its text stands out from what is behind it"
    page = opened(browser, f'{address}/nbs/fold/07_report.html', 1280, dark)
    pairs = page.evaluate('''() => Array.from(document.querySelectorAll('.cell_output table td')).slice(0, 20).map(cell => {
        let behind = cell
        while (behind && ['rgba(0, 0, 0, 0)','transparent'].includes(getComputedStyle(behind).backgroundColor)) behind = behind.parentElement
        return [getComputedStyle(cell).color, behind ? getComputedStyle(behind).backgroundColor : 'rgb(255, 255, 255)'] })''')
    page.close()
    def light(colour): return sum(float(n)*w for n,w in zip(re.findall(r'[\d.]+', colour), (.2126,.7152,.0722)))
    assert pairs and all(abs(light(text)-light(behind))>90 for text,behind in pairs)
