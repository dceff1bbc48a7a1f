"""What manual optimization takes away, put back.

Every private Lightning name that the project touches is in this file; each is held by a test that compares with
automatic optimization.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override


class TrainerSupport(Callback):
    """Lets Lightning configure and step the learning-rate schedulers as under automatic optimization.

    :class:`~lightning_ssesam.SharpnessAwareMixin` attaches it by itself. Under manual optimization Lightning drops a
    scheduler's ``monitor``, ``strict`` and ``reduce_on_plateau``, and steps none.
    """

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called before the optimizers are made: hand the schedulers to Lightning."""
        if stage != "fit":
            return
        self._undo(trainer)
        for owner, name in _scheduler_functions(trainer):
            setattr(owner, name, _as_if_automatic(getattr(owner, name), pl_module))

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called when the run has ended: undo what :meth:`setup` did."""
        self._undo(trainer)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Called when the run is interrupted, after which Lightning does not call :meth:`teardown`."""
        self._undo(trainer)

    @staticmethod
    def _undo(trainer: pl.Trainer) -> None:
        for owner, name in _scheduler_functions(trainer):
            vars(owner).pop(name, None)


def _scheduler_functions(trainer: pl.Trainer) -> list[tuple[object, str]]:
    return [(trainer.strategy, "setup_optimizers"), (trainer.fit_loop.epoch_loop, "_update_learning_rates")]


def _as_if_automatic(function: Callable[..., Any], pl_module: pl.LightningModule) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with _automatic(pl_module):
            return function(*args, **kwargs)

    return call


@contextmanager
def _automatic(pl_module: pl.LightningModule) -> Iterator[None]:
    pl_module.automatic_optimization = True
    try:
        yield
    except RuntimeError as error:
        if "multiple optimizers" not in str(error):
            raise
        raise MisconfigurationException(
            f"`{type(pl_module).__name__}.configure_optimizers` must return one optimizer under SharpnessAwareMixin,"
            " but it returned several. Use one optimizer with several parameter groups."
        ) from None
    finally:
        pl_module.automatic_optimization = False
