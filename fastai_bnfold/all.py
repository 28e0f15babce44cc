"Everything a notebook needs: `from fastai_bnfold.all import *`"
from .errors import *
from .fold import Affine, BNFolder, FoldPlan, FoldReport, Row
from .learner import FoldBN # and Learner.fold_bn, Learner.unfold_bn
from .stats import adapt, correct, reestimate # Learner.adapt_bn, correct_bn, uncorrect_bn, reestimate_bn
from .stats import restore # Learner.restore_bn
from .stats.shift import BNShift # and Learner.bn_shift
from .deploy import deploy # Learner.deploy
from .deploy.serve import Deployed
from .integer.aware import QuantAware # and Learner.integer_net, Learner.remove_quant
from .integer import export # IntegerNet.export, IntegerNet.follow_engine
from .integer.fixed_point import FixedPointBN, fixed_point_bn
from .integer.net import IntegerNet
from .integer.steps import FixedPointError

__all__ = ['BNFolder', 'BNShift', 'FoldBN', 'FoldReport', 'FoldPlan', 'Row', 'Affine', 'FoldError', 'StatisticsError', 'TraceError', 'VerificationError',
           'FoldedError', 'NoDataError', 'DeployError', 'Deployed', 'FixedPointBN', 'FixedPointError', 'IntegerNet', 'QuantAware', 'fixed_point_bn']
