"""A ready classifier, and small networks for it."""

from lightning_ssesam.models.backbones import SmallConvNet
from lightning_ssesam.models.classifier import LongTailClassifier

__all__ = ["LongTailClassifier", "SmallConvNet"]
