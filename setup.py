"Hand the metadata in `settings.ini` to setuptools"
import os, re
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup, find_packages

here = Path(__file__).parent
cfg = ConfigParser(delimiters=['='])
cfg.read(here/'settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']

source = cfg['git_url'] or os.environ.get('GIT_URL', '') # CI knows where it runs
urls = {'Source': source, 'Documentation': cfg['doc_url']}
urls |= {'Changelog': f'{source}/blob/main/CHANGELOG.md'} if source else {}

def readme():
    "Away from the repository, its relative links and pictures are there"
    text = (here/'README.md').read_text(encoding='utf-8')
    return re.sub(r'\]\((?!https?:|#)([^)]+)\)', lambda m: f']({source}/{"raw" if m[1].endswith((".svg",".png")) else "blob"}/main/{m[1]})', text) if source else text

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], author=cfg['author'],
    license=cfg['license'], keywords=cfg['keywords'].split(), classifiers=cfg['classifiers'].splitlines(),
    project_urls={name: url for name,url in urls.items() if url}, python_requires='>='+cfg['min_python'],
    long_description=readme(), long_description_content_type='text/markdown',
    packages=find_packages(include=[cfg['lib_path'], cfg['lib_path']+'.*']),
    package_data={cfg['lib_name']: ['py.typed']},
    install_requires=cfg['requirements'].split(),
    extras_require={k.removesuffix('_requirements'): v.split() for k,v in cfg.items() if k.endswith('_requirements')},
    entry_points={'console_scripts': [cfg['console_scripts']],
                  'nbdev': [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"]})
