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

__all__ = [
    "BackboneFactory",
    "CIFARResNet",
    "LongTailClassifier",
    "NormalizedLinear",
    "SmallConvNet",
    "TimmModel",
    "TorchvisionResNet",
]
