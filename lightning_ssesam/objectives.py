"""Objectives that treat head and tail apart, and those that they are compared with."""

from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_ssesam._validation import bad_argument, check_choice, check_positive, check_radius
from lightning_ssesam.ascent import Ascent
from lightning_ssesam.split import ClassSplit
from lightning_ssesam.targets import IGNORE_INDEX, at_least_one, check_class_indices, check_probabilities, fill_ignored
from lightning_ssesam.terms import Objective, Term, check_tensor, weight_dtype

__all__ = ["ERM", "SAM", "SSESAM", "ImbSAM", "Objective", "Term"]


class ERM(Objective):
    """Empirical risk minimization: the plain mean loss, no perturbation.

    Args:
        ignore_index: Target that does not count, any integer.
    """

    term_names: tuple[str, ...] = ("all",)

    def __init__(self, ignore_index: int = IGNORE_INDEX) -> None:
        super().__init__(ignore_index=ignore_index)

    @override
    def terms(self, targets: Tensor) -> tuple[Term, ...]:
        return (Term(self._mean_weights(targets), 0.0),)


class SAM(Objective):
    """Sharpness-aware minimization of the mean loss (Foret et al., ICLR 2021, arXiv:2010.01412, eq. 2 and 3).

    Args:
        rho: Radius of the perturbation, a finite number >= 0.
        ignore_index: Target that does not count, any integer.
        ascent: Where the perturbation takes the weights, see :class:`~lightning_ssesam.Ascent`.
    """

    term_names: tuple[str, ...] = ("all",)

    def __init__(self, rho: float = 0.05, ignore_index: int = IGNORE_INDEX, *, ascent: Ascent | None = None) -> None:
        super().__init__(ignore_index=ignore_index, ascent=ascent)
        self.rho = check_radius("rho", rho)

    @override
    def terms(self, targets: Tensor) -> tuple[Term, ...]:
        return (Term(self._mean_weights(targets), self.rho, self.make_ascent()),)


class _HeadTailObjective(Objective):
    """Shared by the objectives that weigh head and tail separately."""

    needs_split = True
    term_names = ("head", "tail")

    @override
    def _check_split(self, split: ClassSplit) -> None:
        num_tail = int(split.tail.sum())
        if num_tail in (0, split.num_classes):
            expected = f"a ClassSplit with both head and tail classes, as {type(self).__name__} treats them apart"
            counts = f"{int(split.class_counts.min())} to {int(split.class_counts.max())}"
            got = f"one in which {num_tail} of {split.num_classes} classes are tail (class counts from {counts})"
            choose = "choose another `tail_below`, `tail_fraction` or `tail`"
            raise bad_argument("split", expected, got_text=f"{got}; {choose}")

    def _masses(self, targets: Tensor) -> tuple[Tensor, Tensor, Tensor | int]:
        """Return how much of each sample is head and how much is tail, each in [0, 1], and N, but 1 if it is 0."""
        self.check_ready()
        assert self._split is not None
        check_tensor(targets)
        targets = self.positions(targets)
        tail = self._split.tail_on(targets.device)
        dtype = weight_dtype(targets)
        if not targets.is_floating_point():
            check_class_indices(targets, tail.numel(), self.ignore_index)
            ignored = self.find_ignored(targets)
            tail_mass = fill_ignored(tail[fill_ignored(targets.long(), ignored)].to(dtype), ignored)
            return fill_ignored(1 - tail_mass, ignored), tail_mass, _number(targets, ignored)
        if targets.ndim < 2 or targets.shape[1] != tail.numel():
            expected = f"class indices of an integer dtype, or class probabilities of shape (N, {tail.numel()})"
            raise bad_argument("targets", expected, got_text=f"shape {tuple(targets.shape)} of {targets.dtype}")
        ignored = self.find_ignored(targets)
        probabilities = fill_ignored(targets, ignored).movedim(1, -1).to(dtype)
        check_probabilities(probabilities, ignored)
        head_mass, tail_mass = probabilities @ (~tail).to(dtype), probabilities @ tail.to(dtype)
        return head_mass, tail_mass, _number(head_mass, ignored)


class ImbSAM(_HeadTailObjective):
    """Imbalanced SAM: perturbs for the tail alone (Zhou et al., ICCV 2023, arXiv:2308.07815).

    Equation (4) of docs/method.md.

    Args:
        split: Head and tail classes, both non-empty. Can be bound later.
        rho: Radius of the tail's perturbation, a finite number >= 0.
        tail_weight: Factor on the tail's loss, a finite number > 0. ImbSAM's released code uses 2.
        reduction: ``"batch"`` divides both sums by the batch size N; ``"group"`` takes the mean over the head samples
            and the mean over the tail samples, as the SSE-SAM release does for its ImbSAM baseline.
        ignore_index: Target that does not count, any integer.
        ascent: Where the perturbations take the weights, see :class:`~lightning_ssesam.Ascent`.

    Raises:
        ArgumentError: If an argument is out of range, or the split has no head or no tail.
    """

    def __init__(
        self,
        split: ClassSplit | None = None,
        rho: float = 0.05,
        tail_weight: float = 1.0,
        reduction: Literal["batch", "group"] = "batch",
        ignore_index: int = IGNORE_INDEX,
        *,
        ascent: Ascent | None = None,
    ) -> None:
        super().__init__(split, ignore_index, ascent)
        self.rho = check_radius("rho", rho)
        self.tail_weight = check_positive("tail_weight", tail_weight)
        self.reduction = check_choice("reduction", reduction, ("batch", "group"))

    @override
    def terms(self, targets: Tensor) -> tuple[Term, ...]:
        head, tail, number = self._masses(targets)
        if self.reduction == "group":
            head, tail, number = _over_group(head), _over_group(tail), 1
        return Term(head / number, 0.0), Term(self.tail_weight * (tail / number), self.rho, self.make_ascent())


class SSESAM(_HeadTailObjective):
    """Stage-wise saddle escaping SAM (Lyu et al., AAAI 2025, arXiv:2412.13715).

    In stage 1, head and tail are perturbed separately, each with its own radius; in stage 2 only the tail is.
    :class:`~lightning_ssesam.StageSwitch` moves from one to the other. Equations (5) to (7) of docs/method.md.

    Args:
        split: Head and tail classes, both non-empty. Can be bound later.
        head_rho: Radius of the head's perturbation in stage 1, a finite number >= 0.
        tail_rho: Radius of the tail's perturbation in both stages, a finite number >= 0.
        first_stage: ``"grouped"`` is stage 1 as in the published code; ``"joint"`` is the plain reading of the
            paper's abstract, one SAM perturbation of the whole batch's loss with radius ``head_rho``.
        ignore_index: Target that does not count, any integer.
        ascent: Where the perturbations take the weights, see :class:`~lightning_ssesam.Ascent`.

    Raises:
        ArgumentError: If an argument is out of range, or the split has no head or no tail.
    """

    num_stages = 2

    def __init__(
        self,
        split: ClassSplit | None = None,
        head_rho: float = 0.05,
        tail_rho: float = 0.1,
        first_stage: Literal["grouped", "joint"] = "grouped",
        ignore_index: int = IGNORE_INDEX,
        *,
        ascent: Ascent | None = None,
    ) -> None:
        super().__init__(split, ignore_index, ascent)
        self.head_rho = check_radius("head_rho", head_rho)
        self.tail_rho = check_radius("tail_rho", tail_rho)
        self.first_stage = check_choice("first_stage", first_stage, ("grouped", "joint"))

    @property
    def term_names(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the terms in logs: ``("all",)`` in a joint first stage, else ``("head", "tail")``."""
        return ("all",) if self.stage == 1 and self.first_stage == "joint" else ("head", "tail")

    @override
    def terms(self, targets: Tensor) -> tuple[Term, ...]:
        if self.stage == 1 and self.first_stage == "joint":
            self.check_ready()
            return (Term(self._mean_weights(targets), self.head_rho, self.make_ascent()),)
        head, tail, number = self._masses(targets)
        head_rho = self.head_rho if self.stage == 1 else 0.0
        ascent = self.make_ascent()
        return Term(head / number, head_rho, ascent), Term(tail / number, self.tail_rho, ascent)


def _number(mass: Tensor, ignored: Tensor | None) -> Tensor | int:
    return at_least_one(mass.numel() if ignored is None else (~ignored).sum())


def _over_group(mass: Tensor) -> Tensor:
    total = mass.sum()
    return mass / torch.where(total > 0, total, torch.ones_like(total))
