"""A callback that turns MixUp and CutMix off for the last epochs."""

import copy
import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from numbers import Integral, Real
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_ssesam._validation import bad_argument, check_integer
from lightning_ssesam.callbacks.mixers import Mixer, loaders_in, mixers_in, mixers_of, named_mixers
from lightning_ssesam.errors import ArgumentError

_EPOCHS = "a number of epochs >= 1, or a share of the epochs strictly between 0 and 1"


class MixingOff(Callback):
    """Turns MixUp and CutMix off for the last epochs of a training, which then sees plain images.

    He et al. (arXiv:1909.09148) end a training with plain images, because the test images are plain. YOLOX
    (arXiv:2107.08430) does so in the last 15 epochs.

    It finds what mixes by itself: ``MixUp`` and ``CutMix`` of torchvision, alone or in other transforms, and objects
    with a flag ``mixup_enabled``, such as timm's ``Mixup``. It looks at what the module and the data module hold and
    their hooks use, and at the collate function of the training loader. Anything else is named by ``mixing``.

    Epochs begin mixed or plain, never in between, also in the workers of a loader. A run that is resumed in the plain
    epochs stays there, even if it has become longer. After the training, mixing is on again. One object can serve any
    number of runs.

    Args:
        for_last: Number of plain epochs at the end, an integer >= 1, or their share of the epochs, in (0, 1), rounded
            up. It is 10 unless ``epoch`` is given.
        epoch: First plain epoch, counted from 0, an integer >= 1; instead of ``for_last``.
        mixing: What mixes, if it is not found by itself: a transform, the name of an attribute of the module or the
            data module such as ``"mix"`` or ``"augment.mix"``, or a list of these. A transform and a function return
            what they are given while mixing is off. An attribute that is a flag or a number, such as ``use_mixup`` or
            ``mixup_alpha``, is False or 0.

    Raises:
        ArgumentError: If an argument is out of range, or both ``for_last`` and ``epoch`` are given.
        MisconfigurationException: When training starts, if nothing that mixes is found, all epochs would be plain, the
            number of epochs is not known, or the workers of a loader have a transform that was not given.

    Example:
        >>> [MixingOff(for_last=0.1).first_plain_epoch(epochs) for epochs in (200, 25, 2)]
        [180, 22, 1]
    """

    def __init__(self, for_last: int | float | None = None, *, epoch: int | None = None, mixing: Any = None) -> None:
        super().__init__()
        if for_last is not None and epoch is not None:
            got = f"for_last={for_last!r}, epoch={epoch!r}"
            raise ArgumentError(f"Expected at most one of the arguments `for_last` and `epoch`, but got {got}.")
        self.epoch = None if epoch is None else check_integer("epoch", epoch, minimum=1)
        self.for_last = None if epoch is not None else _check_for_last(10 if for_last is None else for_last)
        self.mixing = mixing
        for part in _as_list(mixing):
            if not isinstance(part, str) and not mixers_of(part):
                expected = "a transform that is a torch.nn.Module or has a flag `mixup_enabled`, or an attribute's name"
                raise bad_argument("mixing", expected, part)
        self._is_off = False
        self._plain_from: int | None = None
        self._mixers: dict[tuple[int, str], Mixer] = {}

    def first_plain_epoch(self, epochs: int) -> int:
        """Return the first plain epoch of a training of so many epochs, counted from 0."""
        if self.epoch is not None:
            return self.epoch
        assert self.for_last is not None
        # The share is taken as the decimal number that the user wrote: as floats, 0.07 * 100 is 7.000000000000001.
        is_share = isinstance(self.for_last, float)
        return epochs - (math.ceil(Fraction(repr(self.for_last)) * epochs) if is_share else int(self.for_last))

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called when a run starts, before a checkpoint is loaded: forget an earlier run."""
        if stage == "fit":
            self._release()
            if trainer.global_step == 0:
                self._is_off = False

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when callback states are loaded: find what mixes, and turn it off if the run is resumed so."""
        # Not left to the start of the training: the workers of the loader start before, with copies of what mixes.
        roots = [pl_module, getattr(trainer, "datamodule", None)]
        if self.mixing is None:
            self._add(mixer for root in roots for mixer in mixers_in(root))
        for part in _as_list(self.mixing):
            mixers = named_mixers(roots, part) if isinstance(part, str) else mixers_of(part)
            if not mixers:
                where = f"{type(pl_module).__name__} and its data module have no such attribute that can be turned off"
                raise MisconfigurationException(f"MixingOff(mixing={part!r}) cannot find what mixes: {where}.")
            self._add(mixers)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when loaders and counters are ready: look at the loaders, and find the first plain epoch."""
        if self.mixing is None:
            self._look_at_loaders(trainer)
        if not self._mixers:
            raise MisconfigurationException(
                "MixingOff finds nothing that mixes: no MixUp or CutMix of torchvision, and no object with a flag"
                f" `mixup_enabled`, in {type(pl_module).__name__}, its data module and the collate function of its"
                " loader. Make it once and keep it in an attribute, or name it: MixingOff(mixing=...)."
            )
        self._plain_from = self._find_first_plain_epoch(trainer)
        self._update(trainer, trainer.current_epoch)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called before the workers of a loader start with an epoch: turn mixing off if the epoch is to be plain."""
        self._update(trainer, trainer.current_epoch)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Called after every batch: after the last one of an epoch, turn mixing off if the next one is to be plain."""
        # Not left to the next epoch: a checkpoint that is saved between the two must have it.
        if trainer.is_last_batch or batch_idx + 1 == trainer.num_training_batches:
            self._update(trainer, trainer.current_epoch + 1)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when training ends: warn if no epoch was plain."""
        is_short = trainer.fast_dev_run  # type: ignore[attr-defined]
        if not self._is_off and not is_short:
            set_for = f"which MixingOff had set for epoch {self._plain_from}"
            rank_zero_warn(f"The training ended in epoch {trainer.current_epoch} without plain epochs, {set_for}.")

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Called when a run is interrupted: turn mixing on again."""
        self._release()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called when a run ends: turn mixing on again."""
        self._release()

    def __getstate__(self) -> dict[str, Any]:
        # `log` and `log_dict` are attached by the Trainer and refer to the last module, and so do the mixers.
        kept = {name: value for name, value in vars(self).items() if name not in ("log", "log_dict")}
        return {**kept, "_mixers": {}}

    def __deepcopy__(self, memo: dict[int, Any]) -> "MixingOff":
        # A copy of what mixes would not be what the training uses.
        return copy.copy(self)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return whether the next batch is plain."""
        return {"is_off": self._is_off}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state that :meth:`state_dict` returned."""
        self._is_off = bool(state_dict["is_off"])
        self._apply()

    def _add(self, mixers: Iterable[Mixer]) -> None:
        for mixer in mixers:
            self._mixers.setdefault(mixer.key, mixer)
        self._apply()

    def _apply(self) -> None:
        for mixer in self._mixers.values():
            mixer.turn(off=self._is_off)

    def _release(self) -> None:
        for mixer in self._mixers.values():
            mixer.turn(off=False)
        self._mixers = {}

    def _look_at_loaders(self, trainer: Trainer) -> None:
        for loader in loaders_in(trainer.train_dataloader):
            new = [mixer for mixer in mixers_in(getattr(loader, "collate_fn", None)) if mixer.key not in self._mixers]
            has_workers = getattr(loader, "num_workers", 0) > 0
            if new and has_workers:
                raise MisconfigurationException(
                    f"The workers of the training loader have started with a {type(new[0].owner).__name__} that"
                    " MixingOff could not turn off before. Give it the object, MixingOff(mixing=...), keep the object"
                    " in an attribute of the module or of the data module, or mix in `on_after_batch_transfer`."
                )
            self._add(new)

    def _find_first_plain_epoch(self, trainer: Trainer) -> int:
        epochs = float(trainer.max_epochs or math.inf) if trainer.max_epochs != -1 else math.inf
        if trainer.max_steps != -1 and trainer.num_training_batches != math.inf:
            updates = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
            epochs = min(epochs, math.ceil(trainer.max_steps / max(1, updates)))
        if self.epoch is not None:
            return self.epoch
        if epochs == math.inf:
            problem = f"MixingOff(for_last={self.for_last}) needs the number of epochs, which is not known"
            raise MisconfigurationException(f"{problem}. Set `max_epochs`, or use MixingOff(epoch=...).")
        first = self.first_plain_epoch(int(epochs))
        if first < 1 and not trainer.fast_dev_run and not self._is_off:  # type: ignore[attr-defined]
            problem = f"MixingOff(for_last={self.for_last}) leaves no epoch to mix in a training of {epochs:g} epochs"
            raise MisconfigurationException(f"{problem}. Train longer, or choose a smaller `for_last`.")
        return max(1, first)

    def _update(self, trainer: Trainer, epoch: int) -> None:
        """Turn mixing off if an epoch is to be plain."""
        if self._is_off or self._plain_from is None or epoch < self._plain_from:
            return
        self._is_off = True
        self._apply()
        for loader in loaders_in(trainer.train_dataloader):
            if isinstance(loader, DataLoader) and loader.persistent_workers:
                # Its workers keep copies of what mixes. Without its iterator, the loader starts others for the next
                # epoch (torch/utils/data/dataloader.py, `__iter__`).
                loader._iterator = None
        rank_zero_info(f"MixingOff: no mixing from step {trainer.global_step} (epoch {epoch}).")


def _check_for_last(value: Any) -> int | float:
    if isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1:
        return int(value)
    # A command line that tries floats first makes one of a number of epochs. 1.0 could be all of them, as a share.
    if isinstance(value, float) and value.is_integer() and value > 1:
        return int(value)
    if isinstance(value, Real) and 0 < float(value) < 1:
        return float(value)
    raise bad_argument("for_last", _EPOCHS, value)


def _as_list(mixing: Any) -> Sequence[Any]:
    if mixing is None:
        return []
    return mixing if isinstance(mixing, list | tuple) else [mixing]
