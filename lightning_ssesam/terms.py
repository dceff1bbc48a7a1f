"""Terms, and what an objective is: it turns the targets of a batch into weighted, perturbed terms."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_ssesam._validation import bad_argument, check_integer, check_radius
from lightning_ssesam.ascent import PLAIN, Ascent
from lightning_ssesam.split import ClassSplit
from lightning_ssesam.targets import IGNORE_INDEX, at_least_one, find_ignored, label_indices

InnerProducts = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]


class Term(NamedTuple):
    r"""One summand of an objective: weighted samples, the radius of their perturbation, and its ascent.

    The loss of a term is :math:`L_a(w) = \sum_i a_i l_i(w)`. The term contributes the gradient of this loss at
    :math:`w + \rho \, g / \|g\|` with :math:`g = \nabla L_a(w)`, or at :math:`w` if ``rho`` or :math:`g` is 0. Another
    ascent takes the weights elsewhere.

    Args:
        weights: Sample weights a, of the shape of the per-sample losses: ``(N,)`` or dense ``(N, ...)``. They are >= 0;
            those of a term of radius 0 may be negative.
        rho: Radius >= 0 of the perturbation in the space of all trainable parameters together. With 0 there is none.
        ascent: Where the perturbation takes the weights; by default as in SAM.
    """

    weights: Tensor
    rho: float
    ascent: Ascent = PLAIN


PARTLY_PERTURBED = "clean", "perturbed"
"""Names of the terms of :func:`partly_perturbed`."""


def partly_perturbed(weights: Tensor, share: Tensor | float, rho: float, ascent: Ascent) -> tuple[Term, Term]:
    """Return the terms of a loss of which a share, perhaps another one for each sample, is perturbed."""
    return Term((1 - share) * weights, 0.0), Term(share * weights, rho, ascent)


def is_perturbed(terms: Sequence[Term]) -> bool:
    """Return whether a term has a radius."""
    return any(term.rho > 0 for term in terms)


def unperturbed(terms: Sequence[Term]) -> list[Term]:
    """Return the terms with the radius 0."""
    return [term._replace(rho=0.0) for term in terms]


class Objective(ABC):
    """Turns the targets of a batch into terms. The optimizer receives the sum of the terms' gradients.

    Subclass it and implement :meth:`terms` for your own method. A checkpoint may hold any objective as a
    hyperparameter: subclasses are registered for ``torch.load(weights_only=True)`` when they are defined.

    Args:
        split: Head and tail classes, for objectives that treat them differently. Can be set later with :meth:`bind`.
        ignore_index: Target that does not count, any integer. Its positions have weight 0 and are not part of N.
        ascent: Ascent of the perturbed terms, for objectives that have any; that of SAM by default.

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
        (Term(weights=tensor([0.5000, 1.0000], dtype=torch.float64), rho=0.05, ascent=Ascent()),)
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

    ascent: Ascent = PLAIN
    """The ascent that the objective was built with. :meth:`make_ascent` returns the one that its terms have."""

    state_prefix: str = ""
    """Text that tells the states of this objective's terms from those of other objectives in the same training."""

    needs_clean_gradient: bool = False
    """Whether :meth:`combine` makes the gradient for the optimizer. It costs one copy of the gradient."""

    _stage: int = 1
    _split: ClassSplit | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        torch.serialization.add_safe_globals([cls])

    def __init__(
        self, split: ClassSplit | None = None, ignore_index: int = IGNORE_INDEX, ascent: Ascent | None = None
    ) -> None:
        # Defaults stay attributes of the class: texts that identify a training are those of earlier versions.
        if ascent is not None:
            if not isinstance(ascent, Ascent):
                raise bad_argument("ascent", "an Ascent, such as Ascent(scale=Adaptive()), or None", ascent)
            self.ascent = ascent
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
        return find_ignored(self.positions(targets), self.ignore_index)

    def positions(self, targets: Tensor) -> Tensor:
        """Return targets in the form that says which losses there are, and of which classes.

        Multi-label targets become the label of each loss, see :func:`~lightning_ssesam.targets.label_indices`. All
        other targets are returned as they are. The training step calls it once for each batch, so that :meth:`terms`
        finds the class of each loss in its targets.

        Args:
            targets: Targets of a batch, as :meth:`terms` takes them.

        Raises:
            ArgumentError: If the split is one of multi-label data, and the targets are not 0, 1 or ``ignore_index``.
        """
        if self._split is None or not self._split.multi_label:
            return targets
        check_tensor(targets)
        return label_indices(targets, self._split.num_classes, self.ignore_index)

    def make_ascent(self) -> Ascent:
        """Return the ascent of the perturbed terms."""
        return self.ascent

    def ascents(self) -> tuple[Ascent, ...]:
        """Return all ascents that its terms may have, to be checked before training."""
        return (self.make_ascent(),)

    def combine(self, clean: list[Tensor], gradient: list[Tensor], inner: InnerProducts) -> list[Tensor]:
        """Return the gradient for the optimizer, if :attr:`needs_clean_gradient` is set. By default it is the sum.

        Called in every update that is perturbed. No gradient contains the factors of a GradScaler or of accumulation.

        Args:
            clean: Gradient of all terms together at the unperturbed weights: a tensor for each parameter.
            gradient: Sum of the terms' gradients, each at its ascended weights. May be changed in place.
            inner: Returns the inner products of two such lists, tensor by tensor, ``(P,)``. With sharded parameters
                the lists hold the parts of this process, and the inner products are those of whole tensors.
        """
        return gradient

    @abstractmethod
    def terms(self, targets: Tensor) -> tuple[Term, ...]:
        """Return the terms of a batch. Ignored positions have weight 0.

        Args:
            targets: Class indices ``(N,)`` or dense ``(N, ...)``, any integer dtype; or class probabilities
                ``(N, C)`` or ``(N, C, ...)``, any floating dtype. They are on the CPU if they are known there, which
                saves a wait for the device; otherwise on the device. Class indices may be ``ignore_index``. If
                some batches of an update have class indices and others probabilities, all come as probabilities.
                An ignored index is then a row of ``-inf``. If the split has ``multi_label``, they are ``(N, C)``: 0,
                1 or ``ignore_index`` for each label, or what :meth:`positions` makes of these in a training step.
        """

    def _mean_weights(self, targets: Tensor) -> Tensor:
        """Return 1/N for every position that counts, and 0 for the ignored ones."""
        check_tensor(targets)
        targets = self.positions(targets)
        shape = targets.shape[:1] + targets.shape[2:] if targets.is_floating_point() else targets.shape
        ignored = self.find_ignored(targets)
        if ignored is None:
            return torch.full(shape, 1 / max(shape.numel(), 1), dtype=weight_dtype(targets), device=targets.device)
        counts = (~ignored).to(weight_dtype(targets))
        return counts / at_least_one(counts.sum())

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in vars(self).items() if not name.startswith("_"))
        return f"{type(self).__name__}({fields})"


def weight_dtype(targets: Tensor) -> torch.dtype:
    """Return the dtype of the weights of samples."""
    # 1/N rounded to float32 puts float64 losses off by 1e-9, so weights are as exact as the device allows and take
    # the losses' dtype only when they meet them.
    return torch.float32 if targets.device.type == "mps" else torch.float64


def check_tensor(targets: Any) -> None:
    """Raise ``ArgumentError`` if targets are no tensor of real numbers."""
    if not isinstance(targets, Tensor) or targets.is_complex():
        raise bad_argument("targets", "a tensor of class indices or class probabilities", targets)


def filled(objective: Objective, **parts: Any) -> Ascent:
    """Return the ascent that an objective was given, with the parts that are the objective's own.

    It raises ``ArgumentError`` if the ascent has one of these parts already.
    """
    for name in parts:
        if getattr(objective.ascent, name) != getattr(Ascent(), name):
            expected = f"an Ascent without `{name}`, which {type(objective).__name__} sets"
            raise bad_argument("ascent", expected, objective.ascent)
    return replace(objective.ascent, **parts)
