"""The weights that a comparison keeps: a checkpoint of each finished run."""

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightning_ssesam.experiments.files import make_folder, remove_unfinished, replaced, set_aside
from lightning_ssesam.experiments.runs import file_stem


class WeightStore:
    """A folder with a folder of checkpoints for every method, and for its settings.

    Args:
        folder: Path of the folder. It is made if it does not exist.

    Raises:
        ArgumentError: If the folder cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        make_folder(folder)
        for unfinished in folder.glob("*/"):
            remove_unfinished(unfinished)

    def path(self, method: str, seed: int, fingerprint: str) -> Path:
        """Return the absolute path of the checkpoint of a run, ``METHOD-.../seed-0.ckpt``."""
        return _path(self.folder, method, seed, fingerprint)


def set_weights_aside(folder: Path, method: str, seed: int, fingerprint: str) -> None:
    """Rename the checkpoint of a run in a folder of weights, if there are both."""
    set_aside(_path(folder, method, seed, fingerprint))


def _path(folder: Path, method: str, seed: int, fingerprint: str) -> Path:
    return folder / f"{file_stem(method)}-{fingerprint[:12]}" / f"seed-{seed}.ckpt"


class KeepWeights(Callback):
    """Saves the weights at the end of a training: all of them, or nothing if the program ends before.

    Args:
        path: Path of the checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called after ``on_train_end``, in which a callback may have put other weights into the module."""
        self.path.parent.mkdir(exist_ok=True)
        with replaced(self.path) as unfinished:
            # Without the states of optimizers and callbacks, which only a training would load.
            trainer.save_checkpoint(unfinished, weights_only=True)
