"""Corrections of a classifier after its training, as functions of tensors and of networks."""

from lightning_ssesam.posthoc.choosing import TauChoice, group_recalls
from lightning_ssesam.posthoc.functional import (
    BalancedTraining,
    fit_scales,
    fit_temperature,
    logit_shift,
    retrained,
    tau_normalized,
)
from lightning_ssesam.posthoc.methods import METHODS, Correction, Evidence, find_correction
from lightning_ssesam.posthoc.outputs import Outputs, collect_outputs

__all__ = [
    "METHODS",
    "BalancedTraining",
    "Correction",
    "Evidence",
    "Outputs",
    "TauChoice",
    "collect_outputs",
    "find_correction",
    "fit_scales",
    "fit_temperature",
    "group_recalls",
    "logit_shift",
    "retrained",
    "tau_normalized",
]
