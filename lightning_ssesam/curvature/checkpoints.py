"""Model and data of a checkpoint. They live in ``lightning_ssesam.experiments``."""

from lightning_ssesam.experiments.checkpoints import find_config, load_checkpoint

__all__ = ["find_config", "load_checkpoint"]
