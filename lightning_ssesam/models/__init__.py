"""A ready classifier, and small networks for it."""

from lightning_ssesam.models.backbones import BackboneFactory, SmallConvNet
from lightning_ssesam.models.classifier import LongTailClassifier

__all__ = ["BackboneFactory", "LongTailClassifier", "SmallConvNet"]
