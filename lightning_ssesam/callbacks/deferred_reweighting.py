"""Class weights that come late in the training."""

from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from typing_extensions import override

from lightning_ssesam.callbacks.switch import Switch
from lightning_ssesam.losses import check_beta, class_balanced_weights
from lightning_ssesam.split import ClassSplit


class DeferredReweighting(Switch):
    """Weighs the classes by :func:`~lightning_ssesam.losses.class_balanced_weights` from a point of the training on.

    With ``LDAMLoss`` this is LDAM-DRW (Cao et al., NeurIPS 2019), whose code divides a batch's loss by the sum of its
    weights; here the weights have mean 1 over the classes. It sets ``weight`` of the module's ``loss``, any of
    ``lightning_ssesam.losses`` or ``torch.nn.CrossEntropyLoss``; when the run ends, the loss is as it was before. A
    run that is resumed after the switch goes on with the weights. One object serves any number of runs.

    Args:
        at: Share of the training's optimizer steps after which the classes are weighed, in (0, 1); 0.8 unless
            ``epoch`` or ``step`` is given, as published (epoch 160 of 200).
        epoch: They are from the first batch of this epoch on, counted from 0; an integer >= 1.
        step: They are after this many optimizer steps; an integer >= 1.
        beta: Of the effective number of samples (Cui et al., CVPR 2019), in [0, 1).

    Raises:
        ValueError: If an argument is out of range, or more than one of ``at``, ``epoch`` and ``step`` is given.
        MisconfigurationException: When training starts, if the module has no ``split``, or no ``loss`` with a
            ``weight``, or ``at`` is used and the number of steps cannot be known.

    """

    default_at: ClassVar[float] = 0.8
    begins: ClassVar[str] = "class-balanced weights"
    missing: ClassVar[str] = "class-balanced weights"

    def __init__(
        self, at: float | None = None, *, epoch: int | None = None, step: int | None = None, beta: float = 0.9999
    ) -> None:
        super().__init__(at, epoch=epoch, step=step)
        self.beta = check_beta(beta)
        self._before: Tensor | None = None
        self._is_applied = False

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called when a run starts, before a checkpoint is loaded: note the weight that the loss has."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            weight: Any = _loss(pl_module).weight
            self._before, self._is_applied = None if weight is None else weight.detach().clone(), False

    @override
    def concerns(self, pl_module: pl.LightningModule) -> bool:
        """Return that it does, if the module has what it takes."""
        return isinstance(_loss(pl_module), nn.Module) and isinstance(_split(pl_module), ClassSplit)

    @override
    def apply(self, pl_module: pl.LightningModule, switched: bool) -> None:
        """Set the weight of the loss."""
        if switched == self._is_applied:
            return
        loss, weight = _loss(pl_module), self._before
        if switched:
            # In single precision at least, which autocast takes too.
            weight = class_balanced_weights(_split(pl_module), self.beta).to(torch.get_default_dtype())
        device = pl_module.device
        # A weight that was none before is none for a checkpoint, which has to fit modules before the switch.
        persistent = "weight" in loss.state_dict() and self._before is not None
        loss.register_buffer("weight", None if weight is None else weight.to(device), persistent=persistent)
        self._is_applied = switched

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called when a run has ended: leave the loss as it was."""
        if stage == "fit":
            self.apply(pl_module, switched=False)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Called when a run is broken off: leave the loss as it was."""
        if self._is_applied:
            self.apply(pl_module, switched=False)


def _loss(pl_module: pl.LightningModule) -> nn.Module:
    loss = getattr(pl_module, "loss", None)
    if not isinstance(loss, nn.Module) or not hasattr(loss, "weight"):
        raise MisconfigurationException(
            "DeferredReweighting needs a module whose `loss` has a `weight`, such as `LDAMLoss()`, but"
            f" `{type(pl_module).__name__}.loss` is {loss!r}."
        )
    return loss


def _split(pl_module: pl.LightningModule) -> ClassSplit:
    split = getattr(pl_module, "split", None)
    if not isinstance(split, ClassSplit):
        raise MisconfigurationException(
            "DeferredReweighting needs a module with the class counts in `split`, a ClassSplit, but"
            f" `{type(pl_module).__name__}.split` is {split!r}."
        )
    return split
