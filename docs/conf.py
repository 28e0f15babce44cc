"Settings of the site; `docs/build.py` writes its sources"
from docutils.nodes import SkipNode
from latex2mathml.converter import convert

project = 'fastai_bnfold'
author = copyright = 'The fastai_bnfold developers'
extensions = ['myst_nb']
html_theme = 'furo'
html_title = 'fastai_bnfold'
html_static_path = ['_static']
html_favicon = '_static/icon.svg'
html_css_files = ['site.css']
html_js_files = ['site.js']
html_show_sphinx = False
html_copy_source = html_show_sourcelink = False
exclude_patterns = ['.doctrees','site']
templates_path = []
myst_enable_extensions = ['dollarmath','colon_fence']
myst_heading_anchors = 3
myst_links_external_new_tab = False
nb_execution_mode = 'off'
nb_merge_streams = True
nb_output_stderr = 'remove'
suppress_warnings = ['mystnb.unknown_mime_type','misc.highlighting_failure']
pygments_style = 'friendly'
pygments_dark_style = 'github-dark'

def inline(self, node):
    "A formula as MathML, which browsers draw without scripts or fonts of ours"
    self.body.append(convert(node.astext()))
    raise SkipNode

def block(self, node):
    self.body.append(f'<div class="math">{convert(node.astext(), display="block")}</div>')
    raise SkipNode

def setup(app):
    app.add_html_math_renderer('mathml', (inline, None), (block, None))
    app.config.html_math_renderer = 'mathml'
    return dict(parallel_read_safe=True, parallel_write_safe=True)
