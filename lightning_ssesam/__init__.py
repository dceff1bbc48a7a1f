"""Class-imbalanced, sharpness-aware training for PyTorch Lightning."""

from lightning_ssesam._version import __version__ as __version__
from lightning_ssesam.callbacks import CurvatureMonitor, DeferredReweighting, RadiusSchedule, StageSwitch
from lightning_ssesam.data import DigitsLT
from lightning_ssesam.metrics import HeadTailAccuracy, HeadTailConfusion, ManyMediumFewAccuracy
from lightning_ssesam.mixin import SharpnessAwareMixin
from lightning_ssesam.models import LongTailClassifier
from lightning_ssesam.objectives import ERM, SAM, SSESAM, ImbSAM, Objective, Term
from lightning_ssesam.split import ClassSplit
from lightning_ssesam.staged import Staged
from lightning_ssesam.step_options import StepOptions

__all__ = [
    "ERM",
    "SAM",
    "SSESAM",
    "ClassSplit",
    "CurvatureMonitor",
    "DeferredReweighting",
    "DigitsLT",
    "HeadTailAccuracy",
    "HeadTailConfusion",
    "ImbSAM",
    "LongTailClassifier",
    "ManyMediumFewAccuracy",
    "Objective",
    "RadiusSchedule",
    "SharpnessAwareMixin",
    "StageSwitch",
    "Staged",
    "StepOptions",
    "Term",
]
