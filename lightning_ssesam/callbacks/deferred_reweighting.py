"""Class weights that come late in the training."""

from typing import Any, ClassVar

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from typing_extensions import override

from lightning_ssesam._validation import check_beta
from lightning_ssesam.callbacks.switch import Switch
from lightning_ssesam.losses import class_balanced_weights
from lightning_ssesam.split import ClassSplit


class DeferredReweighting(Switch):
    """Weighs the classes by :func:`~lightning_ssesam.losses.class_balanced_weights` from a point of the training on.

    With ``LDAMLoss`` this is LDAM-DRW (Cao et al., NeurIPS 2019), whose code divides a batch's loss by the sum of its
    weights; here the weights have mean 1 over the classes. It sets ``weight`` of the module's ``loss``, any of
    ``lightning_ssesam.losses`` or ``torch.nn.CrossEntropyLoss``; a training from scratch begins with the weight
    that the loss had at first. A run that is resumed after the switch goes on with the new ones. One object serves any
    number of runs.

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

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called when a run starts, before a checkpoint is loaded: begin with the weight of before any switch."""
        super().setup(trainer, pl_module, stage)
        # It may not be there yet, but in `configure_model`.
        if stage == "fit" and isinstance(getattr(pl_module, "loss", None), nn.Module):
            self.apply(pl_module, switched=False)

    @override
    def concerns(self, pl_module: pl.LightningModule) -> bool:
        """Return that it does, if the module has what it takes."""
        return all((_split(pl_module), _loss(pl_module)))

    @override
    def apply(self, pl_module: pl.LightningModule, switched: bool) -> None:
        """Set the weight of the loss."""
        loss = _loss(pl_module)
        first = _first_weight(loss)
        if switched == first.is_replaced:
            return
        # A clone, as a checkpoint is loaded into the buffer in place.
        weight = None if first.weight is None else first.weight.clone()
        if switched:
            like = next(pl_module.parameters())
            weight = class_balanced_weights(_split(pl_module), self.beta).to(like.device, like.dtype)
        if first.weight is None:
            # No buffer where there was none: a checkpoint has to fit modules before the switch, and callbacks that
            # average weights pair the buffers of two copies.
            loss._buffers.pop("weight", None)
            vars(loss)["weight"] = weight
        else:
            loss.weight = weight  # type: ignore[assignment]
        first.is_replaced = switched


def _follow_the_logits(loss: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Move the weight to where the loss is used: what is no buffer does not move with the module."""
    weight = loss.weight
    if isinstance(weight, Tensor) and inputs and weight.device != inputs[0].device:
        vars(loss)["weight"] = weight.to(inputs[0].device)


class _FirstWeight:
    """What a loss remembers of the weight that it had before any callback changed it."""

    def __init__(self, weight: Tensor | None) -> None:
        self.weight = None if weight is None else weight.detach().clone()
        self.is_replaced = False


def _first_weight(loss: nn.Module) -> _FirstWeight:
    # With the loss and not in the callback: another one may train the module next.
    if "_first_weight" not in vars(loss):
        vars(loss)["_first_weight"] = _FirstWeight(loss.weight)  # type: ignore[arg-type]
        if loss.weight is None:
            loss.register_forward_pre_hook(_follow_the_logits)
    first: _FirstWeight = vars(loss)["_first_weight"]
    return first


def _loss(pl_module: pl.LightningModule) -> nn.Module:
    loss = getattr(pl_module, "loss", None)
    if not isinstance(loss, nn.Module) or isinstance(getattr(loss, "weight", False), nn.Parameter | bool):
        raise MisconfigurationException(
            "DeferredReweighting needs a module whose `loss` has class weights in `weight`, such as `LDAMLoss()`, but"
            f" `{type(pl_module).__name__}.loss` is {loss!r}."
        )
    return loss


def _split(pl_module: pl.LightningModule) -> ClassSplit:
    split = getattr(pl_module, "split", None)
    if not isinstance(split, ClassSplit):
        raise MisconfigurationException(
            "DeferredReweighting needs a module with a ClassSplit as its `split`, but"
            f" `{type(pl_module).__name__}.split` is {split!r}."
        )
    return split
