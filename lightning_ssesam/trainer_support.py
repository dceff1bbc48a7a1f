"""What manual optimization takes away, put back.

Every private Lightning name that the project touches is in this file; each is held by a test that compares with
automatic optimization.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_ssesam.callbacks import StageSwitch

if TYPE_CHECKING:
    from lightning_ssesam.mixin import SharpnessAwareMixin


class TrainerSupport(Callback):
    """Lets Lightning configure and step the learning-rate schedulers as under automatic optimization.

    Under manual optimization Lightning drops a scheduler's ``monitor``, ``strict`` and ``reduce_on_plateau``, and
    steps none. :class:`~lightning_ssesam.SharpnessAwareMixin` attaches this callback by itself.

    Args:
        module: The module that it serves; it leaves others alone that the same Trainer trains.

    """

    def __init__(self, module: SharpnessAwareMixin) -> None:
        self.module = module
        self._replaced: list[tuple[object, str, Any]] = []

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called before the optimizers are made: hand the schedulers to Lightning."""
        if stage != "fit" or pl_module is not self.module:
            return
        self._undo()
        for owner, name in [
            (trainer.strategy, "setup_optimizers"),
            (trainer.fit_loop.epoch_loop, "_update_learning_rates"),
        ]:
            self._replaced.append((owner, name, vars(owner).get(name)))
            setattr(owner, name, _as_if_automatic(getattr(owner, name), pl_module))
        self.module._is_supported = True

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when the module is set up and has its optimizer: refuse what cannot work."""
        if pl_module is not self.module:
            return
        self.module._check_objective()
        objective = self.module.objective
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if objective.num_stages > objective.stage and not any(isinstance(c, StageSwitch) for c in callbacks):
            rank_zero_warn(
                f"{type(objective).__name__} stays in stage {objective.stage}, since no StageSwitch is among the"
                " callbacks of the Trainer."
            )
        if isinstance(trainer.optimizers[0], torch.optim.LBFGS):
            raise MisconfigurationException(
                "LBFGS evaluates the loss several times a step, which SharpnessAwareMixin cannot serve. Use an"
                " optimizer that takes one gradient a step, such as SGD or AdamW."
            )

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Called after every batch: find out at the first one whether the mixin's step is in use."""
        if pl_module is self.module and outputs and not self.module._has_stepped:
            raise MisconfigurationException(
                f"`{type(pl_module).__name__}.training_step` takes the place of SharpnessAwareMixin's, so that nothing"
                " is trained. Remove it and define `sample_losses`, or call `super().training_step(batch, batch_idx)`."
            )

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called when the run has ended: undo what :meth:`setup` did."""
        self._undo()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Called when the run is interrupted, after which Lightning does not call :meth:`teardown`."""
        self._undo()

    def _undo(self) -> None:
        for owner, name, before in self._replaced:
            if before is None:
                delattr(owner, name)
            else:
                setattr(owner, name, before)
        self._replaced = []
        self.module._is_supported = False
        self.module._sharpness_engine.release()


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
        if not str(error).startswith("Training with multiple optimizers is only supported with manual optimization"):
            raise
        raise MisconfigurationException(
            f"`{type(pl_module).__name__}.configure_optimizers` must return one optimizer under SharpnessAwareMixin,"
            " but it returned several. Use one optimizer with several parameter groups."
        ) from None
    finally:
        pl_module.automatic_optimization = False
