"""A ready classifier, and networks for it."""

from lightning_ssesam.models.backbones import (
    BackboneFactory,
    CIFARResNet,
    NormalizedLinear,
    SmallConvNet,
    timm_model,
    torchvision_resnet,
)
from lightning_ssesam.models.classifier import LongTailClassifier

__all__ = [
    "BackboneFactory",
    "CIFARResNet",
    "LongTailClassifier",
    "NormalizedLinear",
    "SmallConvNet",
    "timm_model",
    "torchvision_resnet",
]
