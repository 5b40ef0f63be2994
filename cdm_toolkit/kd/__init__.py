"""Cross-tokenizer distillation losses: one object per method, for any training loop.

>>> from cdm_toolkit import kd
>>> list(kd.methods())  # doctest: +NORMALIZE_WHITESPACE
['alm', 'byte-marginal', 'cdm', 'exact', 'gold', 'likelihood', 'min-ed', 'prefix', 'sampled-reverse-kl', 'simct',
 'spelling', 'uld', 'x-token', 'jsd', 'kl', 'reverse-kl']
"""

from cdm_toolkit.kd.alm import ALM
from cdm_toolkit.kd.batch import AlignedBatch, AlignedTeacherBatch
from cdm_toolkit.kd.byte_marginal import ByteMarginal
from cdm_toolkit.kd.cdm import CDM
from cdm_toolkit.kd.divergences import kd_sums
from cdm_toolkit.kd.exact_match import ExactMatch
from cdm_toolkit.kd.gold import GOLD
from cdm_toolkit.kd.jsd import JSD
from cdm_toolkit.kd.kl import KL
from cdm_toolkit.kd.likelihood import Likelihood
from cdm_toolkit.kd.method import Method, Teacher, find_method, methods
from cdm_toolkit.kd.min_ed import MinED
from cdm_toolkit.kd.objective import Objective, ObjectiveOutput, weighted_loss
from cdm_toolkit.kd.pair import TokenizerPair, collate
from cdm_toolkit.kd.prefix import Prefix
from cdm_toolkit.kd.reverse_kl import ReverseKL
from cdm_toolkit.kd.sampled_reverse_kl import SampledReverseKL
from cdm_toolkit.kd.settings import MethodSettings, setting
from cdm_toolkit.kd.simct import SimCT
from cdm_toolkit.kd.spelling import Spelling
from cdm_toolkit.kd.types import (
    KDSums,
    LogprobRequest,
    LossOutput,
    LossSums,
    SignalRequest,
    StudentLogits,
    TeacherSignal,
    TopK,
)
from cdm_toolkit.kd.uld import ULD
from cdm_toolkit.kd.x_token import XToken

__all__ = [
    "ALM",
    "CDM",
    "GOLD",
    "JSD",
    "KL",
    "ULD",
    "AlignedBatch",
    "AlignedTeacherBatch",
    "ByteMarginal",
    "ExactMatch",
    "KDSums",
    "Likelihood",
    "LogprobRequest",
    "LossOutput",
    "LossSums",
    "Method",
    "MethodSettings",
    "MinED",
    "Objective",
    "ObjectiveOutput",
    "Prefix",
    "ReverseKL",
    "SampledReverseKL",
    "SignalRequest",
    "SimCT",
    "Spelling",
    "StudentLogits",
    "Teacher",
    "TeacherSignal",
    "TokenizerPair",
    "TopK",
    "XToken",
    "collate",
    "find_method",
    "kd_sums",
    "methods",
    "setting",
    "weighted_loss",
]
