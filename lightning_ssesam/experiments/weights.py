"""The weights that a comparison keeps: a checkpoint of each finished run, and a copy of the best one."""

import math
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightning_ssesam._validation import bad_argument
from lightning_ssesam.experiments.files import make_folder, remove_unfinished, replaced, set_aside
from lightning_ssesam.experiments.runs import Run, by_method, file_stem


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


def copy_best(runs: Sequence[Run], folder: Path) -> Run | None:
    """Copy the checkpoint and the config.yaml of the best run to a folder, as weights.ckpt and config.yaml.

    Args:
        runs: Runs of a comparison.
        folder: Folder of the copies. It is made if it does not exist.

    Returns:
        The best run, see :func:`find_best`; None if there is none, or if it has no weights.

    Raises:
        ArgumentError: If the folder cannot be made.
    """
    best = find_best(runs)
    if best is None or not best.weights:
        return None
    make_folder(folder)
    remove_unfinished(folder)
    kept = Path(best.weights)
    # The configuration first: it must not be newer than the weights.
    for source, name in ((kept.with_name("config.yaml"), "config.yaml"), (kept, "weights.ckpt")):
        with replaced(folder / name) as unfinished:
            shutil.copyfile(source, unfinished)
    return best


def find_best(runs: Sequence[Run]) -> Run | None:
    """Return the best run on the validation images, after the last epoch: the best one of the best method.

    A method counts by the mean of its runs. Of equal ones, the first wins. Test images decide nothing.

    Args:
        runs: Runs of a comparison.

    Returns:
        The run; None if no method has a validation accuracy in all of its runs.
    """
    scores = {name: [_validation_accuracy(run) for run in made] for name, made in by_method(runs).items()}
    means = {name: sum(values) / len(values) for name, values in scores.items() if all(map(math.isfinite, values))}
    if not means:
        return None
    method = max(means, key=means.__getitem__)
    return max((run for run in runs if run.method == method), key=_validation_accuracy)


def _validation_accuracy(run: Run) -> float:
    """Return the mean recall of all classes on the validation images; NaN if the run diverged, or there are none."""
    curve = run.curves.get("all", [])
    return curve[-1] if curve and not run.diverged else math.nan


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
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called before the training: refuse a machine on which the weights could not be kept."""
        if not (folder := self.path.parent.parent).is_dir():
            expected = "False where machines that train do not share the output folder"
            raise bad_argument("keep_weights", expected, got_text=f"True, and {platform.node()} has no {str(folder)!r}")

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called after ``on_train_end``, in which a callback may have put other weights into the module."""
        self.path.parent.mkdir(exist_ok=True)
        with replaced(self.path) as unfinished:
            # Without the states of optimizers and callbacks, which only a training would load.
            trainer.save_checkpoint(unfinished, weights_only=True)
