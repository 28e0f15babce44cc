"Everything a notebook needs: `from fastai_bnfold.all import *`"
from .affine import Affine, FoldError, StatisticsError, TraceError, VerificationError, FoldedError, NoDataError
from .report import FoldReport, Row
from .plan import FoldPlan
from .folder import BNFolder
from .learner import FoldBN

__all__ = ['BNFolder', 'FoldBN', 'FoldReport', 'FoldPlan', 'Row', 'Affine', 'FoldError', 'StatisticsError', 'TraceError', 'VerificationError',
           'FoldedError', 'NoDataError']
