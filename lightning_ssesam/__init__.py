"""Class-imbalanced, sharpness-aware training for PyTorch Lightning."""

from lightning_ssesam._version import __version__ as __version__
from lightning_ssesam.ascent import (
    Adaptive,
    Ascent,
    Direction,
    Friendly,
    Gradient,
    InverseNorm,
    Momentum,
    Noise,
    Norms,
    PACBayesRadius,
    Radius,
    Scale,
)
from lightning_ssesam.average_precision import GroupAveragePrecision, LabelAveragePrecision
from lightning_ssesam.calibration import GroupCalibrationError
from lightning_ssesam.callbacks import (
    CorrectAfterTraining,
    CurvatureMonitor,
    DeferredReweighting,
    MixingOff,
    RadiusSchedule,
    StageSwitch,
)
from lightning_ssesam.class_objectives import CCSAM, FocalSAM
from lightning_ssesam.data import DigitsLT
from lightning_ssesam.metrics import HeadTailAccuracy, HeadTailConfusion, ManyMediumFewAccuracy
from lightning_ssesam.mixin import SharpnessAwareMixin
from lightning_ssesam.models import LongTailClassifier
from lightning_ssesam.objectives import ERM, SAM, SSESAM, ImbSAM, Objective, Term
from lightning_ssesam.split import ClassSplit
from lightning_ssesam.staged import Staged
from lightning_ssesam.step_options import StepOptions
from lightning_ssesam.variants import (
    ASAM,
    GSAM,
    LESAM,
    PGN,
    WSAM,
    FriendlySAM,
    MomentumSAM,
    RandomSAM,
)

__all__ = [
    "ASAM",
    "CCSAM",
    "ERM",
    "GSAM",
    "LESAM",
    "PGN",
    "SAM",
    "SSESAM",
    "WSAM",
    "Adaptive",
    "Ascent",
    "ClassSplit",
    "CorrectAfterTraining",
    "CurvatureMonitor",
    "DeferredReweighting",
    "DigitsLT",
    "Direction",
    "FocalSAM",
    "Friendly",
    "FriendlySAM",
    "Gradient",
    "GroupAveragePrecision",
    "GroupCalibrationError",
    "HeadTailAccuracy",
    "HeadTailConfusion",
    "ImbSAM",
    "InverseNorm",
    "LabelAveragePrecision",
    "LongTailClassifier",
    "ManyMediumFewAccuracy",
    "MixingOff",
    "Momentum",
    "MomentumSAM",
    "Noise",
    "Norms",
    "Objective",
    "PACBayesRadius",
    "Radius",
    "RadiusSchedule",
    "RandomSAM",
    "Scale",
    "SharpnessAwareMixin",
    "StageSwitch",
    "Staged",
    "StepOptions",
    "Term",
]
