"""Batches of a step: their targets, their losses, and the objective's terms on several of them together."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from inspect import signature
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_ssesam._validation import bad_argument
from lightning_ssesam.objectives import Objective, Term
from lightning_ssesam.selection import SelectionError
from lightning_ssesam.targets import NO_CLASS, fill_ignored, ignored_mask
from lightning_ssesam.tensors import move

Gather = Callable[[Tensor], tuple[list[Tensor], int]]


@dataclass(frozen=True)
class Part:
    """A batch, or some samples of one, and its targets as ``sample_targets`` returns them. ``len`` counts samples.

    ``batch_idx`` is the number of the batch in its epoch.
    """

    batch: Any
    targets: Tensor
    batch_idx: int

    def __len__(self) -> int:
        return len(self.targets)

    def clone(self) -> "Part":
        """Clone the tensors of a part that is kept for a later update. The loader may reuse their memory."""
        batch, targets = apply_to_collection((self.batch, self.targets), Tensor, Tensor.clone)
        return Part(batch, targets, self.batch_idx)


class HostTargets:
    """The targets of the batch that was last moved to a device, as they still are on the host. Reads do not wait."""

    def __init__(self) -> None:
        self._known: tuple[Tensor, tuple[int, int], Tensor] | None = None

    def note(self, host: Tensor, moved: Tensor) -> None:
        """Remember the targets of a batch, before and after it was moved."""
        self._known = moved, _state(moved), host

    def forget(self) -> None:
        """Forget the remembered batch."""
        self._known = None

    def of(self, targets: Tensor) -> Tensor:
        """Return the host's copy if ``targets`` are the ones that were moved, unchanged since; else ``targets``."""
        if self._known is None:
            return targets
        moved, state, host = self._known
        return host if targets is moved and _state(targets) == state else targets


def _state(tensor: Tensor) -> tuple[int, int]:
    # What is written into `tensor.data` in place goes unseen.
    return tensor.data_ptr(), tensor._version


def losses_of(module: Any, batch: Any, batch_idx: int) -> Any:
    """Call ``module.sample_losses`` with a batch, and with its number if it has a parameter ``batch_idx``."""
    if takes_batch_idx(module):
        return module.sample_losses(batch, batch_idx=batch_idx)
    return module.sample_losses(batch)


def takes_batch_idx(module: Any) -> bool:
    """Return whether ``sample_losses`` of a module has a parameter ``batch_idx``."""
    method = module.sample_losses
    return _has_batch_idx(getattr(method, "__func__", method))


class SkippedPart(Exception):
    """``sample_losses`` has returned None for a part."""

    def __init__(self, part: Part) -> None:
        super().__init__()
        self.part = part


def checked_losses(losses: Any, part: Part, chosen: Part, shape: torch.Size, module: pl.LightningModule) -> Any:
    """Return the losses of some samples of a part, if they have the expected shape or no more is known than that.

    Args:
        losses: What ``sample_losses`` has returned.
        part: The part.
        chosen: The samples, or the part itself.
        shape: Expected shape of the losses of one sample.
        module: The module.

    Raises:
        SkippedPart: If there are no losses, for the part to be left out.
        SelectionError: If there are losses of other samples.
        ArgumentError: If targets are taken for class probabilities that are none.
    """
    if losses is None:
        if module.trainer.world_size > 1:
            raise skipped_by_one(type(module).__name__)
        raise SkippedPart(part)
    if not isinstance(losses, Tensor) or losses.shape == (len(chosen), *shape):
        return losses
    if chosen is not part and losses.shape[:1] != (len(chosen),):
        raise SelectionError(
            f"`sample_losses` returned losses of shape {tuple(losses.shape)} for {len(chosen)} of {len(part)} samples."
            " Something in the batch was not picked with them.",
            type(module).__name__,
        )
    if part.targets.is_floating_point() and part.targets.ndim > 1:
        raise bad_argument(
            "targets",
            f"class probabilities (N, C, ...), since they are floating, for losses of shape {tuple(losses.shape)}; for"
            " a regression, override `sample_targets` to return an integer for each loss, such as"
            " `torch.zeros(shape_of_losses, dtype=torch.long)`; for several labels a sample, give the objective a"
            " `ClassSplit(..., multi_label=True)`",
            got_text=f"shape {tuple(part.targets.shape)}",
        )
    return losses


def skipped_by_one(name: str) -> MisconfigurationException:
    """Return the error for a batch that one of several processes skips."""
    return MisconfigurationException(
        f"`{name}` skips a batch, but the other processes wait for it. With several processes, return losses of 0 from"
        " `sample_losses` instead of None."
    )


def select_part(part: Part, index: Tensor, batch: Any, module: Any) -> Part:
    """Return some samples of a part.

    Args:
        part: The part.
        index: Their numbers ``(M,)``, on the CPU.
        batch: The batch that has been picked for them.
        module: The module.

    Raises:
        SelectionError: If the batch that was picked has another number of targets.
    """
    owner = type(module).__name__
    chosen = Part(batch, module.sample_targets(batch), part.batch_idx)
    if len(chosen) != len(index):
        raise SelectionError(
            f"`{owner}.select_samples` was asked for {len(index)} samples, but `sample_targets` finds {len(chosen)}"
            " targets in the batch that it returned.",
            owner,
        )
    return chosen


@lru_cache(maxsize=16)
def _has_batch_idx(function: Callable[..., Any]) -> bool:
    return "batch_idx" in signature(function).parameters


def find_targets(batch: Any, owner: str) -> Tensor:
    """Return the second item of a pair, or ``batch["target"]``, ``batch["label"]`` or ``batch["labels"]``.

    Raises:
        MisconfigurationException: If there is none; names the class ``owner`` as the place to say where they are.
    """
    if isinstance(batch, Mapping):
        for key in ("target", "label", "labels"):
            if key in batch:
                return torch.as_tensor(batch[key])
    elif isinstance(batch, Sequence) and len(batch) == 2 and isinstance(batch[1], Tensor):
        return batch[1]
    raise MisconfigurationException(
        "Expected a batch that is a pair (inputs, targets) or a mapping with the key 'target', 'label' or"
        f" 'labels', but got {describe(batch)}. Override `sample_targets(self, batch)` in `{owner}`."
    )


def describe(batch: Any) -> str:
    """Say what a batch is, for an error message."""
    if isinstance(batch, Mapping):
        return f"a mapping with the keys {sorted(map(str, batch))}"
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return f"a {type(batch).__name__} of {len(batch)} items"
    return f"a {type(batch).__name__}"


def terms_of_union(objective: Objective, targets: Sequence[Tensor], gather: Gather | None = None) -> list[list[Term]]:
    """Return the terms of the union of several batches, cut into those of each batch.

    Args:
        objective: The objective. It is asked once, with the targets of all batches. Dense targets come flattened,
            ``(M,)`` or ``(M, C)``, unless there is only one batch in all. Multi-label targets stay ``(M, C)``.
        targets: Targets of every batch, in the forms that :meth:`Objective.terms` takes.
        gather: Called with the flattened targets of this process. Returns those of all processes, and the number of
            this one. The weights are then multiplied by the number of processes, whose gradients are averaged.
    """
    if gather is None and len(targets) == 1:
        return [list(objective.terms(targets[0]))]
    # The targets of some batches may be known on the host, those of others only on the device.
    device = next((t.device for t in targets if t.device.type != "cpu"), targets[0].device)
    flat = [move(t.movedim(1, -1).flatten(0, -2) if t.is_floating_point() else t.flatten(), device) for t in targets]
    if num_classes := max(t.shape[1] if t.ndim > 1 else 0 for t in flat):
        # Some are class indices and some class probabilities, or all are probabilities.
        flat = [one_hot(t, num_classes, objective.ignore_index) for t in flat]
    start, scale, union = 0, 1, torch.cat(flat)
    if gather is not None:
        everywhere, rank = gather(union)
        start, scale, union = sum(len(t) for t in everywhere[:rank]), len(everywhere), torch.cat(everywhere)
    if objective.split is not None and objective.split.multi_label:
        # Its shape says of which label each loss is.
        union = union.view(len(union) // objective.split.num_classes, objective.split.num_classes)
    terms = objective.terms(union)
    parts = []
    for target in targets:
        shape = target.shape[:1] + target.shape[2:] if target.is_floating_point() else target.shape
        stop = start + shape.numel()
        # Replaced and not made anew, so that a term keeps fields that an objective has added.
        weights = [scale * term.weights.flatten()[start:stop].reshape(shape) for term in terms]
        parts.append([term._replace(weights=own) for term, own in zip(terms, weights, strict=True)])
        start = stop
    return parts


def one_hot(targets: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """Return class indices ``(N,)`` as class probabilities ``(N, C)``, float64; class probabilities stay.

    The row of an ignored index is :data:`NO_CLASS` everywhere.
    """
    if targets.is_floating_point():
        return targets.double()
    ignored = ignored_mask(targets, ignore_index)
    rows_of_classes = F.one_hot(fill_ignored(targets.long(), ignored), num_classes).double()
    return fill_ignored(rows_of_classes, ignored, NO_CLASS)
