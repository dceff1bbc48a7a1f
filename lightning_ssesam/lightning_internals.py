"""Every private name of Lightning that the project uses, each with the file it stands in, and a check that it is there.

Paths of Lightning's files are relative to ``lightning/``. No other file of the project uses a private name of
Lightning, or replaces a method of its loops.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial, reduce
from inspect import getattr_static
from typing import Any

import lightning.fabric.utilities.data as fabric_data
import lightning.pytorch as pl
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.overrides import distributed
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException

_TESTED = "2.5 to 2.6"
_BELOW = "2.7"

_FIT = "pytorch/loops/fit_loop.py"
_EPOCH = "pytorch/loops/training_epoch_loop.py"
_PROGRESS = "pytorch/loops/progress.py"
_LOADERS = "pytorch/utilities/combined_loader.py"
_LOGGER = "pytorch/trainer/connectors/logger_connector/logger_connector.py"

FIRST_ITERATOR = "trainer.fit_loop._load_combined_loader_states", _FIT
"""The name that Lightning calls right before it makes the first iterator."""

STEP = {
    "trainer.fit_loop._skip_backward": _FIT,
    "trainer._logger_connector": "pytorch/trainer/trainer.py",
    "trainer._logger_connector._progress_bar_metrics": _LOGGER,
    "trainer.fit_loop.epoch_loop.automatic_optimization.run": "pytorch/loops/optimization/automatic.py",
    "trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step": _PROGRESS,
    "trainer.fit_loop.epoch_loop.manual_optimization.run": "pytorch/loops/optimization/manual.py",
    "trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total.completed": _PROGRESS,
    "distributed.prepare_for_backward": "pytorch/overrides/distributed.py",
}
"""Names that a training step needs, each with its file."""

EXACT_RESUME = {
    FIRST_ITERATOR[0]: FIRST_ITERATOR[1],
    "trainer.fit_loop._combined_loader": _FIT,
    "trainer.fit_loop._combined_loader_states_to_load": _FIT,
    "trainer.fit_loop._data_fetcher": _FIT,
    "trainer.fit_loop.setup_data": _FIT,
    "trainer.fit_loop.restarted_mid_epoch": _FIT,
    "trainer.fit_loop.restarted_on_epoch_end": _FIT,
    "trainer.fit_loop._restarting": _FIT,
    "trainer.fit_loop.epoch_progress.current.processed": _PROGRESS,
    "trainer.fit_loop.epoch_loop._batches_that_stepped": _EPOCH,
    "trainer.fit_loop.epoch_loop._should_check_val_fx": _EPOCH,
    "trainer.fit_loop.epoch_loop.batch_progress.total.ready": _PROGRESS,
    "trainer.fit_loop.epoch_loop.restarted_on_train_batch_end": _EPOCH,
    "trainer.fit_loop.epoch_loop.val_loop.increment_progress_to_evaluation_end": "pytorch/loops/evaluation_loop.py",
    "CombinedLoader._state_dicts": _LOADERS,
    "CombinedLoader._load_state_dicts": _LOADERS,
    "data._set_sampler_epoch": "fabric/utilities/data.py",
}
"""Names that exact resume needs as well."""


def preflight(trainer: pl.Trainer, names: Mapping[str, str], way_out: str = "") -> None:
    """Raise MisconfigurationException if this version of Lightning lacks a name, before a run uses one of them.

    Args:
        trainer: The Trainer of the run.
        names: Names, each with its file: :data:`STEP` or :data:`EXACT_RESUME`.
        way_out: Another way out than to install a tested version.
    """
    roots = {"trainer": trainer, "CombinedLoader": CombinedLoader, "data": fabric_data, "distributed": distributed}
    for path, file in names.items():
        root, *attributes = path.split(".")
        try:
            reduce(getattr, attributes, roots[root])
        except AttributeError:
            raise missing(path, file, way_out) from None


def missing(path: str, file: str, way_out: str = "") -> MisconfigurationException:
    """Return the error for a name that this version of Lightning does not have, or does not use any more."""
    return MisconfigurationException(
        f"lightning-ssesam was tested with Lightning {_TESTED}, but Lightning {pl.__version__} has no `{path}` in"
        f" lightning/{file}, or does not use it. Install `lightning<{_BELOW}`{way_out}."
    )


class Replacements:
    """Attributes of objects of Lightning that are replaced while a run lasts."""

    def __init__(self) -> None:
        self._undo_steps: list[Callable[[], None]] = []

    def replace(self, owner: object, name: str, value: Any) -> None:
        """Replace an attribute of one object; its class stays as it is."""
        own = vars(owner)
        undo = partial(setattr, owner, name, own[name]) if name in own else partial(delattr, owner, name)
        self._undo_steps.append(undo)
        setattr(owner, name, value)

    def follow(self, owner: object, name: str, function: Callable[[], None]) -> None:
        """Call a function after every call of a method."""
        method = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            output = method(*args, **kwargs)
            function()
            return output

        self.replace(owner, name, call)

    def precede(self, owner: object, name: str, function: Callable[[], None]) -> None:
        """Call a function before every call of a method."""
        method = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            function()
            return method(*args, **kwargs)

        self.replace(owner, name, call)

    def undo(self) -> None:
        """Put back what was replaced."""
        while self._undo_steps:
            self._undo_steps.pop()()


# The training step.


def skips_backward(trainer: pl.Trainer) -> bool:
    """Return whether this epoch only forwards, as StochasticWeightAveraging's last one does for batch norm."""
    return trainer.fit_loop._skip_backward


def replace_step(replacements: Replacements, trainer: pl.Trainer, by_hand: Callable[[], Any]) -> None:
    """Let Lightning's loop for automatic optimization run each training step in its loop for manual optimization.

    This is the one seam. Lightning asks ``automatic_optimization`` at 22 places, and only the dispatch of the step
    (pytorch/loops/training_epoch_loop.py), ``manual_backward`` and DDP's preparations must hear "no". All of them lie
    within the step. So the module says yes, and everything else works as under automatic optimization.

    Args:
        replacements: Keeps what is replaced.
        trainer: The Trainer of the run.
        by_hand: Returns a context in which the module's ``automatic_optimization`` is False.
    """
    loops = trainer.fit_loop.epoch_loop

    def run(optimizer: Any, batch_idx: int, kwargs: Any) -> Any:
        with by_hand():
            return loops.manual_optimization.run(kwargs)

    replacements.replace(loops.automatic_optimization, "run", run)


def count_step(trainer: pl.Trainer) -> None:
    """Count an update that is skipped as a step, as Lightning does if a GradScaler skips it."""
    progress = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
    progress.increment_ready()
    progress.increment_completed()


def share_step_count(trainer: pl.Trainer) -> None:
    """Make the automatic and the manual step counter one. ``global_step`` reads one of them, checkpoints hold both."""
    loop = trainer.fit_loop.epoch_loop
    automatic, manual = loop.automatic_optimization.optim_progress.optimizer, loop.manual_optimization
    counts = automatic.step, manual.optim_step_progress
    automatic.step = manual.optim_step_progress = max(counts, key=lambda count: count.total.completed)


def share_saved_step_count(checkpoint: dict[str, Any]) -> None:
    """Let a checkpoint's manual step counter count the steps that were made by automatic optimization."""
    loops = checkpoint.get("loops", {}).get("fit_loop", {})
    automatic = loops.get("epoch_loop.automatic_optimization.optim_progress")
    manual = loops.get("epoch_loop.manual_optimization.optim_step_progress")
    if automatic and manual and manual["total"]["completed"] == 0:
        loops["epoch_loop.manual_optimization.optim_step_progress"] = automatic["optimizer"]["step"]


def show_on_bar(trainer: pl.Trainer, name: str, value: float) -> None:
    """Put a value among the Trainer's ``progress_bar_metrics``."""
    trainer._logger_connector._progress_bar_metrics[name] = value


@contextmanager
def watching_progress(trainer: pl.Trainer) -> Iterator[set[str]]:
    """Yield the names of the Trainer's counters that are read meanwhile: ``current_epoch`` and ``global_step``.

    Both are properties of its class, which are replaced meanwhile. A module's counters ask its Trainer.
    """
    read: set[str] = set()
    names = ("current_epoch", "global_step")
    originals = {name: getattr_static(type(trainer), name) for name in names}

    def watched(name: str) -> property:
        def get(asked: pl.Trainer) -> int:
            if asked is trainer:
                read.add(name)
            return int(originals[name].__get__(asked))

        return property(get)

    owners = {name: next(kind for kind in type(trainer).__mro__ if name in vars(kind)) for name in names}
    for name, owner in owners.items():
        setattr(owner, name, watched(name))
    try:
        yield read
    finally:
        for name, owner in owners.items():
            setattr(owner, name, originals[name])


# Checkpoints.


def hyperparameters(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hyperparameters of a checkpoint's model, without the entries that say what makes the model.

    Lightning begins the names of those with an underscore, in pytorch/core/saving.py and pytorch/cli.py.
    """
    found = checkpoint.get("hyper_parameters")
    values = dict(found) if isinstance(found, Mapping) else {}
    return {str(name): value for name, value in values.items() if not str(name).startswith("_")}


# Exact resume.


def precede_iterator(replacements: Replacements, trainer: pl.Trainer, function: Callable[[], None]) -> None:
    """Call a function when the loaders have their states, right before the run's first iterator is made."""
    replacements.follow(trainer.fit_loop, "_load_combined_loader_states", function)


def forget_loader(trainer: pl.Trainer) -> None:
    """Let Lightning make the training loader anew when it asks for it next."""
    loop: Any = trainer.fit_loop
    loop._combined_loader = None


def loaders(trainer: pl.Trainer) -> list[Any]:
    """Return the training loaders; none before they are made."""
    loader: Any = trainer.fit_loop._combined_loader
    return [] if loader is None else loader.flattened


def loader_states(trainer: pl.Trainer) -> list[Any]:
    """Return the states of the stateful loaders."""
    combined: Any = trainer.fit_loop._combined_loader
    # Lightning asks each loader for its protocol, which takes long for a call after every batch.
    has_state = any(hasattr(loader, "state_dict") for loader in loaders(trainer))
    return combined._state_dicts() if has_state else []


def load_loader_states(trainer: pl.Trainer, states: list[Any]) -> None:
    """Set the states of the stateful loaders, so that Lightning does not set them again."""
    loop: Any = trainer.fit_loop
    loop._combined_loader._load_state_dicts(states)
    loop._combined_loader_states_to_load = []


def end_finished_epoch(trainer: pl.Trainer) -> None:
    """Let a resumed run begin the next epoch if its epoch was finished.

    If the number of steps is limited, Lightning takes every resumed epoch for an unfinished one, and ends it again.
    """
    loop: Any = trainer.fit_loop
    epoch = loop.epoch_progress.current
    # A limit of steps ends an epoch in its middle, too.
    if epoch.ready == epoch.started == epoch.processed and loop.epoch_loop.batch_progress.is_last_batch:
        # Its property `restarting` would keep it.
        loop._restarting = loop.epoch_loop.restarting = False


def set_epoch_of_samplers(trainer: pl.Trainer) -> None:
    """Tell the samplers the epoch. Lightning does so only after it has made the iterator."""
    progress: Any = trainer.fit_loop.epoch_progress.current
    for loader in loaders(trainer):
        fabric_data._set_sampler_epoch(loader, progress.processed)


def loaders_are_unlimited(trainer: pl.Trainer) -> bool:
    """Return whether the Trainer uses all batches of every loader."""
    combined: Any = trainer.fit_loop._combined_loader
    limits = combined.limits or [None] * len(combined.flattened)
    pairs = zip(limits, combined.flattened, strict=True)
    return all(limit in (None, float("inf"), sized_len(loader)) for limit, loader in pairs)


def validation_is_due(trainer: pl.Trainer) -> bool:
    """Return whether a validation follows the current batch."""
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def correct_logged_step(trainer: pl.Trainer) -> None:
    """Set the step of logged rows to the number of updates. Lightning may count one too many when it resumes."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
