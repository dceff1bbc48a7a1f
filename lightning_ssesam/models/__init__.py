"""A ready classifier, and networks for it."""

from lightning_ssesam.models.backbones import (
    BackboneFactory,
    CIFARResNet,
    NormalizedLinear,
    SmallConvNet,
    TimmModel,
    TorchvisionResNet,
)
from lightning_ssesam.models.classifier import LongTailClassifier
from lightning_ssesam.models.contrast import ContrastiveBranch
from lightning_ssesam.models.correction import LogitCorrection
from lightning_ssesam.models.schedules import WarmupLR

__all__ = [
    "BackboneFactory",
    "CIFARResNet",
    "ContrastiveBranch",
    "LogitCorrection",
    "LongTailClassifier",
    "NormalizedLinear",
    "SmallConvNet",
    "TimmModel",
    "TorchvisionResNet",
    "WarmupLR",
]
