"""The import path of checkpoints; see :mod:`lightning_ssesam.experiments.checkpoints`."""

from lightning_ssesam.experiments.checkpoints import find_config, load_checkpoint

__all__ = ["find_config", "load_checkpoint"]
