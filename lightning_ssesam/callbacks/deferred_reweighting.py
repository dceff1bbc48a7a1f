"""A callback that weighs the classes late in the training."""

from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_ssesam._validation import check_beta
from lightning_ssesam.callbacks.needs import unfit
from lightning_ssesam.callbacks.switch import Switch
from lightning_ssesam.losses import class_balanced_weights
from lightning_ssesam.split import ClassSplit


class DeferredReweighting(Switch):
    """Weighs the classes by :func:`~lightning_ssesam.losses.class_balanced_weights` from a point of the training on.

    With ``LDAMLoss`` this is LDAM-DRW (Cao et al., NeurIPS 2019). Their code divides a batch's loss by the sum of its
    weights; here the weights have mean 1 over the classes.

    It sets ``weight`` of the module's ``loss``, which may be any of ``lightning_ssesam.losses`` or
    ``torch.nn.CrossEntropyLoss``. The new weight stays when the training ends, and in a run that is resumed after the
    switch. A training from scratch begins with the loss's own weight again. One object can serve any number of runs.

    Args:
        at: Share of the training's optimizer steps after which the classes are weighed, in (0, 1). It is 0.8 unless
            ``epoch`` or ``step`` is given, as published (epoch 160 of 200).
        epoch: Epoch from whose first batch on they are weighed, counted from 0, an integer >= 1.
        step: Number of optimizer steps after which they are weighed, an integer >= 1.
        beta: Parameter of the effective number of samples (Cui et al., CVPR 2019), in [0, 1).

    Raises:
        ArgumentError: If an argument is out of range, or more than one of ``at``, ``epoch`` and ``step`` is given.
        MisconfigurationException: When training starts, if the module has no ``split``, or no ``loss`` with a
            ``weight``, or ``at`` is used and the number of steps cannot be known.
    """

    default_at: ClassVar[float] = 0.8
    begins = missing = "class-balanced weights"

    def __init__(
        self, at: float | None = None, *, epoch: int | None = None, step: int | None = None, beta: float = 0.9999
    ) -> None:
        super().__init__(at, epoch=epoch, step=step)
        self.beta = check_beta(beta)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called when a run starts, before a checkpoint is loaded: put the loss's own weight back, and note it."""
        super().setup(trainer, pl_module, stage)
        # It must be noted now, because loading a checkpoint overwrites a weight that is a buffer. Some modules create
        # the loss in `configure_model`, which runs later. Its weight is noted in `on_train_start`.
        if stage == "fit" and isinstance(getattr(pl_module, "loss", None), nn.Module):
            self.apply(pl_module, switched=False)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called when a run ends: leave nothing in a loss that has its own weight."""
        if stage == "fit" and not _OwnWeight.kept_in(_loss(pl_module)).is_replaced:
            del pl_module.loss._own_weight  # type: ignore[union-attr]

    @override
    def concerns(self, pl_module: LightningModule) -> bool:
        """Return True. Raise ``MisconfigurationException`` if the module has no split or no loss with a weight."""
        return all((_split(pl_module), _loss(pl_module)))

    @override
    def apply(self, pl_module: LightningModule, switched: bool) -> None:
        loss = _loss(pl_module)
        own_weight = _OwnWeight.kept_in(loss)
        if switched and not own_weight.is_replaced:
            like = next(pl_module.parameters())
            own_weight.replace(loss, class_balanced_weights(_split(pl_module), self.beta).to(like.device, like.dtype))
        elif own_weight.is_replaced and not switched:
            own_weight.restore(loss)


class _OwnWeight:
    """The weight that a loss had before a callback replaced it, None for no weight.

    It is kept in the loss as ``_own_weight``, not in the callback: another callback may train the module or a copy of
    it next, and has to begin with this weight.
    """

    def __init__(self, weight: Tensor | None) -> None:
        # A clone, because a checkpoint is loaded into a buffer in place.
        self.weight = None if weight is None else weight.detach().clone()
        self.is_replaced = False
        self._was_buffer = False
        self._hook: RemovableHandle | None = None

    @staticmethod
    def kept_in(loss: nn.Module) -> "_OwnWeight":
        """Return what is kept in the loss; note its weight if there is nothing yet."""
        if "_own_weight" not in vars(loss):
            loss._own_weight = _OwnWeight(loss.weight)  # type: ignore[assignment,arg-type]
        own_weight: _OwnWeight = vars(loss)["_own_weight"]
        return own_weight

    def replace(self, loss: nn.Module, weight: Tensor) -> None:
        """Give the loss another weight."""
        self.is_replaced = True
        if self.weight is not None:
            loss.weight = weight
            return
        # An assignment would make a buffer of the weight, since losses register `weight` as a buffer of value None. The
        # checkpoint would then not fit a module from before the switch, and callbacks that average weights, which pair
        # the buffers of two copies of a module, would find one buffer too many. So it becomes a plain attribute ...
        self._was_buffer = "weight" in loss._buffers
        loss._buffers.pop("weight", None)
        vars(loss)["weight"] = weight
        # ... and, since the module does not move plain attributes with it, every forward moves it.
        self._hook = loss.register_forward_pre_hook(_move_weight_to_logits)

    def restore(self, loss: nn.Module) -> None:
        """Give the loss its own weight back."""
        self.is_replaced = False
        if self.weight is not None:
            loss.weight = self.weight.clone()
            return
        assert self._hook is not None
        self._hook.remove()
        del vars(loss)["weight"]
        place: dict[str, Any] = loss._buffers if self._was_buffer else vars(loss)
        place["weight"] = None


def _move_weight_to_logits(loss: nn.Module, inputs: tuple[Any, ...]) -> None:
    weight = loss.weight
    if isinstance(weight, Tensor) and inputs and weight.device != inputs[0].device:
        vars(loss)["weight"] = weight.to(inputs[0].device)


def _loss(pl_module: LightningModule) -> nn.Module:
    loss = getattr(pl_module, "loss", None)
    if not isinstance(loss, nn.Module) or isinstance(getattr(loss, "weight", False), nn.Parameter | bool):
        need = "DeferredReweighting needs a module whose `loss` has class weights in `weight`, such as `LDAMLoss()`"
        raise unfit(pl_module, "loss", need)
    return loss


def _split(pl_module: LightningModule) -> ClassSplit:
    split = getattr(pl_module, "split", None)
    if not isinstance(split, ClassSplit):
        raise unfit(pl_module, "split", "DeferredReweighting needs a module with a ClassSplit as its `split`")
    return split
