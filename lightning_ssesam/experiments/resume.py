"""The folder of a training that `lightning-ssesam fit` begins, resumes or evaluates. No file of it is overwritten."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import chain, count
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from typing_extensions import override

from lightning_ssesam.errors import ArgumentError
from lightning_ssesam.experiments.files import held, locked

_CONFIG, _METRICS = "config.yaml", "metrics.csv"
# Seconds that a command waits until another one has made its folder.
_PATIENCE = 30
# Checkpoints that an error names.
_NAMED = 3


class SaveConfig(SaveConfigCallback):
    """Saves the configuration as config.yaml or, in the folder of an earlier run, as config-1.yaml and so on."""

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called when a run starts: choose a name that no file has, and save."""
        if not self.already_saved and (folder := trainer.log_dir) is not None:
            self.config_filename = _unused(folder, _CONFIG)
        super().setup(trainer, pl_module, stage)


@contextmanager
def folder_of_run(trainer: pl.Trainer, command: str, options: Mapping[str, Any]) -> Iterator[str | None]:
    """Keep other trainings out of the folder of a run until the block ends. Yield the checkpoint to load.

    Metrics of an earlier run in the folder, which CSVLogger would delete, get another name.
    Loggers number their folders: the first number that no folder has. Of runs that start at the same time, each waits
    until the one before it has made its folder.

    Args:
        trainer: Trainer that has not run yet.
        command: Name of the command, ``"fit"``, ``"validate"`` or ``"test"``.
        options: Options of the command, not instantiated.

    Raises:
        ArgumentError: If another training is at work in the folder.
        MisconfigurationException: If ``validate`` or ``test`` has no checkpoint or finds none as ``last``, if ``best``
            is asked for, or if ``last`` is asked for in a folder that is always new.
    """
    logger = next(iter(trainer.loggers), None)
    is_refused = command != "fit" and options.get("ckpt_path") is None
    is_numbered = isinstance(logger, CSVLogger | TensorBoardLogger) and "://" not in logger.root_dir
    if is_refused or not is_numbered or not trainer.is_global_zero:
        checkpoint = _checkpoint_to_load(trainer, command, options)
        if command == "fit" and (folder := trainer.log_dir) is not None and "://" not in folder:
            _make(folder)
        _keep_metrics(trainer)
        yield checkpoint
        return
    assert isinstance(logger, CSVLogger | TensorBoardLogger)
    _make(logger.root_dir)
    lock = os.path.join(logger.root_dir, ".lock")
    # To choose the number of a folder, and to make it, takes a moment.
    with held(lock, _PATIENCE, lambda: f"Another command has kept {lock!r} for {_PATIENCE} s. End it first."):
        checkpoint = _checkpoint_to_load(trainer, command, options)
        os.makedirs(logger.log_dir, exist_ok=True)
    is_alone = locked(Path(logger.log_dir), "version of the logger", beside=True) if command == "fit" else nullcontext()
    with is_alone:
        _keep_metrics(trainer)
        yield checkpoint


def _make(folder: str) -> None:
    """Make the folder of a run, or refuse it in a sentence that names it."""
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise ArgumentError(f"Cannot make the folder {folder!r} of the run: {error.strerror}.") from error


def _checkpoint_to_load(trainer: pl.Trainer, command: str, options: Mapping[str, Any]) -> str | None:
    """Return the checkpoint to load. ``last`` is the newest one if Lightning's ModelCheckpoint has saved none so."""
    folder, checkpoint = trainer.log_dir, options.get("ckpt_path")
    if checkpoint is None and command != "fit":
        raise MisconfigurationException(f"`{command}` needs a checkpoint: give --ckpt_path PATH{_suggested(folder)}.")
    if checkpoint == "best":
        known = "only the program that has trained knows which checkpoint is best"
        raise MisconfigurationException(f"`--ckpt_path best`: {known}. Give its path{_suggested(folder)}.")
    if checkpoint == "last" and (folder is not None or command != "fit"):
        place = trainer.default_root_dir if folder is None else folder
        checkpoint = _last_checkpoint(trainer, command, place, options["trainer"].get("logger"))
    return checkpoint


def _last_checkpoint(trainer: pl.Trainer, command: str, folder: str, logger: Any) -> str:
    """Return a path, or ``"last"`` if ``fit`` finds the checkpoint by itself, or there is none yet."""
    place = getattr(trainer.checkpoint_callback, "dirpath", None) or os.path.join(folder, "checkpoints")
    if saved := _checkpoints(place):
        last = [path for path in saved if os.path.basename(path).startswith("last")]
        return "last" if last and command == "fit" else (last or saved)[-1]
    # Loggers number their folders by themselves unless they are told a version.
    chosen = {} if logger in (None, True) else logger
    is_numbered = isinstance(chosen, dict) and chosen.get("init_args", {}).get("version") is None
    if is_numbered and (others := _checkpoints(os.path.join(os.path.dirname(folder), "*", "checkpoints"))):
        new = f"`--ckpt_path last` looks for a checkpoint in the folder of this training, but {folder!r} is new."
        raise MisconfigurationException(
            f"{new} Give the path, such as --ckpt_path {others[-1]!r}, or set the version of the logger for all runs."
        )
    if command != "fit":
        # Lightning would evaluate an untrained network.
        raise MisconfigurationException(f"`{command} --ckpt_path last`: there is no checkpoint in {place!r}.")
    return "last"


def _suggested(folder: str | None) -> str:
    """Return the end of a sentence that names the newest checkpoints of the run's folder and of those beside it."""
    near = [] if folder is None else [folder, os.path.join(os.path.dirname(folder), "*")]
    found = _checkpoints(*(os.path.join(place, "checkpoints") for place in near))[-_NAMED:]
    return f", such as {', '.join(os.path.relpath(path) for path in reversed(found))}" if found else ""


def _checkpoints(*folders: str) -> list[str]:
    """Return the paths of the checkpoints in folders, the newest last."""
    if not folders:
        return []
    files = get_filesystem(folders[0])
    found = {str(path) for folder in folders for path in files.glob(os.path.join(folder, "*.ckpt"))}
    return sorted(found, key=files.modified)


@rank_zero_only
def _keep_metrics(trainer: pl.Trainer) -> None:
    """Rename the metrics of earlier runs in the folder. Nothing is left for CSVLogger to delete."""
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger) and os.path.isfile(path := os.path.join(logger.log_dir, _METRICS)):
            os.rename(path, os.path.join(logger.log_dir, _unused(logger.log_dir, _METRICS)))


def _unused(folder: str, name: str) -> str:
    """Return a name that no file in a folder has: the given one, or the first with a number such as config-1.yaml."""
    files, (stem, suffix) = get_filesystem(folder), os.path.splitext(name)
    names = chain([name], (f"{stem}-{number}{suffix}" for number in count(1)))
    return next(name for name in names if not files.exists(os.path.join(folder, name)))
