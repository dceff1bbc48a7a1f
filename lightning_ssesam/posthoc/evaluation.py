"""The outputs of a classifier for the batches of a loader, which come to it as in validation."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_ssesam.models import LongTailClassifier
from lightning_ssesam.posthoc.methods import affine
from lightning_ssesam.posthoc.outputs import Outputs, collect_outputs


def classifier_outputs(
    model: LongTailClassifier, batches: Iterable[Any], data: pl.LightningDataModule | None = None
) -> Outputs:
    """Return the outputs of a classifier for batches, with the correction that it has already.

    Its mirror images count if it has ``tta="hflip"``. The hooks of module and data module move and change the batches.

    Args:
        model: Classifier on the device to compute on, with a Trainer that is validating.
        batches: Batches, such as a loader.
        data: Data module with hooks; None for those of the classifier.

    Raises:
        ArgumentError: If a batch is no pair of inputs and class indices.
    """
    mirror = model.tta == "hflip"
    move = _mover(model, data)
    found = collect_outputs(model.backbone, batches, mirror=mirror, ignore_index=model.ignore_index, move=move)
    return found if model.correction is None else _corrected(found, model)


def _corrected(outputs: Outputs, model: LongTailClassifier) -> Outputs:
    assert model.correction is not None
    logits = affine(outputs.logits, model.correction.scale, model.correction.shift)
    mirrored = None if outputs.mirrored is None else _corrected(outputs.mirrored, model)
    return Outputs(logits, outputs.targets, outputs.features, mirrored)


@contextmanager
def validating(trainer: pl.Trainer, *parts: Any) -> Iterator[None]:
    """Let a Trainer say that it validates, so that hooks do not augment. Modules without a Trainer have this one."""
    stage, without = trainer.state.stage, [part for part in parts if not _has_trainer(part)]
    trainer.validating = True
    for part in without:
        part.trainer = trainer
    try:
        yield
    finally:
        trainer.state.stage = stage
        for part in without:
            part.trainer = None


def _has_trainer(part: Any) -> bool:
    try:
        return part.trainer is not None
    except RuntimeError:
        # A module that was never given one.
        return False


def first_loader(loaders: Any) -> Any:
    """Return the first of the loaders of validation or test, or the only one; None if there is none."""
    if isinstance(loaders, list | tuple):
        return loaders[0] if loaders else None
    return loaders


def _mover(model: LongTailClassifier, data: pl.LightningDataModule | None) -> Callable[[Any], Any]:
    """Return a function that sends a batch through the hooks that a Trainer calls for it, in this order."""

    def owner(name: str) -> Any:
        return data if data is not None and is_overridden(name, data) else model

    def move(batch: Any) -> Any:
        batch = owner("on_before_batch_transfer").on_before_batch_transfer(batch, 0)
        batch = owner("transfer_batch_to_device").transfer_batch_to_device(batch, model.device, 0)
        return owner("on_after_batch_transfer").on_after_batch_transfer(batch, 0)

    return move
