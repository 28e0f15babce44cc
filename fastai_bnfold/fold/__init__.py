"Fold batch norms into their neighbours: everything here needs torch alone"
from ..errors import *
from .affine import Affine, Clamp
from .report import FoldReport, Row
from .plan import FoldPlan
from .folder import BNFolder
from .graph import * # BNFolder.fold_graph
from . import draw # FoldPlan.plot
from .testing import randomize_bn, rule_holds
