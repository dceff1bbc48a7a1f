"""Objectives: from the targets of a batch to weighted, perturbed terms."""

from abc import ABC, abstractmethod
from numbers import Real
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from lightning_ssesam._validation import bad_argument, check_choice, check_integer, check_positive, check_radius
from lightning_ssesam.split import ClassSplit
from lightning_ssesam.targets import IGNORE_INDEX, at_least_one, check_class_indices, fill_ignored, find_ignored


class Term(NamedTuple):
    r"""One summand of an objective: weighted samples and the radius of their perturbation.

    The loss of a term is :math:`L_a(w) = \sum_i a_i l_i(w)`. The term contributes the gradient of this loss at
    :math:`w + \rho \, g / \|g\|` with :math:`g = \nabla L_a(w)`, or at :math:`w` if ``rho`` or :math:`g` is 0.

    Args:
        weights: Sample weights a >= 0, of the shape of the per-sample losses: ``(N,)`` or dense ``(N, ...)``.
        rho: Radius >= 0 of the perturbation in the space of all trainable parameters together.
    """

    weights: Tensor
    rho: float


class Objective(ABC):
    """Turns the targets of a batch into terms. The optimizer receives the sum of the terms' gradients.

    Subclass it and implement :meth:`terms` for your own method. A checkpoint may hold any objective as a
    hyperparameter: subclasses are registered for ``torch.load(weights_only=True)`` when they are defined.

    Args:
        split: Head and tail classes, for objectives that treat them differently. Can be set later with :meth:`bind`.
        ignore_index: Target that does not count, any integer. Its positions have weight 0 and are not part of N.

    Example:
        >>> class TwiceTheTail(Objective):
        ...     needs_split = True
        ...     term_names = ("all",)
        ...
        ...     def terms(self, targets):
        ...         weights = (1 + self.split.tail_on(targets.device)[targets].double()) / len(targets)
        ...         return (Term(weights, rho=0.05),)
        >>> objective = TwiceTheTail(ClassSplit([100, 5], tail=[1]))
        >>> objective.terms(torch.tensor([0, 1]))
        (Term(weights=tensor([0.5000, 1.0000], dtype=torch.float64), rho=0.05),)
    """

    num_stages: int = 1
    """Number of stages; ``stage`` counts from 1 to this."""

    needs_split: bool = False
    """Whether :meth:`terms` needs to know head and tail."""

    term_names: tuple[str, ...] = ()
    """Names of the terms in logs, in their order. If there is another number of terms, logs number them."""

    ignore_index: int = IGNORE_INDEX
    """Target that does not count. :meth:`find_ignored` finds its positions."""

    radius_names: tuple[str, ...] = ("rho", "head_rho", "tail_rho")
    """Names of the attributes that are radii. An objective has those of them that exist."""

    _stage: int = 1
    _split: ClassSplit | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        torch.serialization.add_safe_globals([cls])

    def __init__(self, split: ClassSplit | None = None, ignore_index: int = IGNORE_INDEX) -> None:
        # The default stays an attribute of the class: texts that identify a training are those of earlier versions.
        if check_integer("ignore_index", ignore_index) != IGNORE_INDEX:
            self.ignore_index = int(ignore_index)
        if split is not None:
            self.bind(split)

    @property
    def stage(self) -> int:
        """The current stage of the training, 1 at first. :meth:`terms` may depend on it."""
        return self._stage

    @stage.setter
    def stage(self, stage: int) -> None:
        if stage not in range(1, self.num_stages + 1):
            raise bad_argument("stage", f"an integer from 1 to {self.num_stages}", stage)
        self._stage = int(stage)

    @property
    def split(self) -> ClassSplit | None:
        """The split this objective was built with or bound to."""
        return self._split

    def bind(self, split: ClassSplit) -> None:
        """Set the head and tail classes. Raise ``ArgumentError`` if the objective cannot use this split."""
        if not isinstance(split, ClassSplit):
            raise bad_argument("split", "a ClassSplit", split)
        self._check_split(split)
        self._split = split

    def _check_split(self, split: ClassSplit) -> None:
        """Raise ``ArgumentError`` if the objective cannot use ``split``. By default it can use any."""
        return

    @property
    def radius_values(self) -> dict[str, float]:
        """The radii by name: the attributes among :attr:`radius_names` that are numbers."""
        found = {name: getattr(self, name, None) for name in self.radius_names}
        return {name: float(value) for name, value in found.items() if isinstance(value, Real)}

    def set_radius(self, name: str, value: float) -> None:
        """Set a radius, from the next step on.

        Args:
            name: Name of a radius that the objective has, such as ``"rho"``.
            value: Radius, a finite number >= 0.

        Raises:
            ArgumentError: If the objective has no such radius, or the value is out of range.
        """
        if name not in self.radius_values:
            expected = f"a radius of {type(self).__name__} ({', '.join(self.radius_values) or 'it has none'})"
            raise bad_argument("name", expected, name)
        setattr(self, name, check_radius(name, value))

    def check_ready(self) -> None:
        """Raise ``RuntimeError`` if :meth:`terms` needs a split and there is none yet."""
        if self.needs_split and self._split is None:
            name = type(self).__name__
            raise RuntimeError(
                f"{name} does not know which classes are tail: build it with `{name}(split=...)`, or call"
                " `bind(split)` before it is used."
            )

    def find_ignored(self, targets: Tensor) -> Tensor | None:
        """Return which positions do not count, because their target is ``ignore_index``.

        Args:
            targets: Targets of a batch, as :meth:`terms` takes them.

        Returns:
            A mask of the shape of the losses, bool; None if the targets are on the CPU and all of them count. It does
            not wait for the device.
        """
        return find_ignored(targets, self.ignore_index)

    @abstractmethod
    def terms(self, targets: Tensor) -> tuple[Term, ...]:
        """Return the terms of a batch. Ignored positions have weight 0.

        Args:
            targets: Class indices ``(N,)`` or dense ``(N, ...)``, any integer dtype; or class probabilities
                ``(N, C)`` or ``(N, C, ...)``, any floating dtype. They are on the CPU if they are known there, which
                saves a wait for the device; otherwise on the device. Class indices may be ``ignore_index``. If
                some batches of an update have class indices and others probabilities, all come as probabilities.
                An ignored index is then a row of ``-inf``.
        """

    def _mean_weights(self, targets: Tensor) -> Tensor:
        """Return 1/N for every position that counts, and 0 for the ignored ones."""
        _check_tensor(targets)
        shape = targets.shape[:1] + targets.shape[2:] if targets.is_floating_point() else targets.shape
        ignored = self.find_ignored(targets)
        if ignored is None:
            return torch.full(shape, 1 / max(shape.numel(), 1), dtype=_weight_dtype(targets), device=targets.device)
        counts = (~ignored).to(_weight_dtype(targets))
        return counts / at_least_one(counts.sum())

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in vars(self).items() if not name.startswith("_"))
        return f"{type(self).__name__}({fields})"


class ERM(Objective):
    """Empirical risk minimization: the plain mean loss, no perturbation.

    Args:
        ignore_index: Target that does not count, any integer.
    """

    term_names = ("all",)

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
    """

    term_names = ("all",)

    def __init__(self, rho: float = 0.05, ignore_index: int = IGNORE_INDEX) -> None:
        super().__init__(ignore_index=ignore_index)
        self.rho = check_radius("rho", rho)

    @override
    def terms(self, targets: Tensor) -> tuple[Term, ...]:
        return (Term(self._mean_weights(targets), self.rho),)


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
        _check_tensor(targets)
        tail = self._split.tail_on(targets.device)
        dtype = _weight_dtype(targets)
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
        _check_probabilities(probabilities, ignored)
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
    ) -> None:
        super().__init__(split, ignore_index)
        self.rho = check_radius("rho", rho)
        self.tail_weight = check_positive("tail_weight", tail_weight)
        self.reduction = check_choice("reduction", reduction, ("batch", "group"))

    @override
    def terms(self, targets: Tensor) -> tuple[Term, ...]:
        head, tail, number = self._masses(targets)
        if self.reduction == "group":
            head, tail, number = _over_group(head), _over_group(tail), 1
        return Term(head / number, 0.0), Term(self.tail_weight * (tail / number), self.rho)


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
    ) -> None:
        super().__init__(split, ignore_index)
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
            return (Term(self._mean_weights(targets), self.head_rho),)
        head, tail, number = self._masses(targets)
        head_rho = self.head_rho if self.stage == 1 else 0.0
        return Term(head / number, head_rho), Term(tail / number, self.tail_rho)


def _weight_dtype(targets: Tensor) -> torch.dtype:
    # 1/N rounded to float32 puts float64 losses off by 1e-9, so weights are as exact as the device allows and take
    # the losses' dtype only when they meet them.
    return torch.float32 if targets.device.type == "mps" else torch.float64


def _check_tensor(targets: Tensor) -> None:
    if not isinstance(targets, Tensor) or targets.is_complex():
        raise bad_argument("targets", "a tensor of class indices or class probabilities", targets)


def _check_probabilities(probabilities: Tensor, ignored: Tensor | None) -> None:
    if probabilities.device.type != "cpu" or probabilities.numel() == 0:
        return
    # Probabilities in half precision add up to 1 within a hundredth.
    is_valid = (probabilities >= 0).all(-1) & ((probabilities.sum(-1) - 1).abs() < 1e-2)
    if not bool((is_valid if ignored is None else is_valid | ignored).all()):
        raise bad_argument("targets", "class probabilities that add up to 1", got_text="some that do not")


def _number(mass: Tensor, ignored: Tensor | None) -> Tensor | int:
    return at_least_one(mass.numel() if ignored is None else (~ignored).sum())


def _over_group(mass: Tensor) -> Tensor:
    total = mass.sum()
    return mass / torch.where(total > 0, total, torch.ones_like(total))
