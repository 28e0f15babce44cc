"Folding a fastai `Learner`: `fold_bn`, `unfold_bn`, the callback `FoldBN`"
from .fold import * # Learner.fold_bn, Learner.unfold_bn, Learner.latency_bn
from . import refuse # a folded Learner is not trained, and gets no numbers of another model
from .callback import FoldBN
from . import export # an exported Learner loads without this package, or it is said
