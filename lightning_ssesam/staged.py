"""Objectives one after the other: one for each stage of a training."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_ssesam._validation import bad_argument, check_integer
from lightning_ssesam.ascent import Ascent
from lightning_ssesam.split import ClassSplit
from lightning_ssesam.targets import IGNORE_INDEX
from lightning_ssesam.terms import InnerProducts, Objective, Term


class Staged(Objective):
    """Trains on one objective after the other: the first one in stage 1, the second one in stage 2, and so on.

    ``Staged([ERM(), SAM(0.1)])`` is SAM that starts late (Zhou et al., arXiv:2410.10373): until the switch it costs no
    more than plain training. :class:`~lightning_ssesam.StageSwitch` moves from stage to stage. An objective that has
    stages counts as that many: ``Staged([ERM(), SSESAM()])`` has three.

    An attribute such as ``tail_weight`` is that of the current objective; ``objectives`` leads to the others. A radius
    is found whichever of them has it. If either is set, as in ``staged.rho = 0.2``, all that have it get it. What
    ascents remember is kept for each objective by itself.

    Attributes:
        objectives: The objectives in their order, a tuple. They are shallow copies of those that were given.

    Args:
        objectives: Objectives, at least one. Those of a ``Staged`` take its place.
        split: Head and tail classes for all of them. By default that of the objectives which have one. Can be bound
            later.
        ignore_index: Target that does not count, any integer, for all of them.

    Raises:
        ArgumentError: If an argument is out of range, an objective cannot use the split, or the objectives have
            different splits or ignore different targets.

    Example:
        >>> from lightning_ssesam import ERM, SAM
        >>> objective = Staged([ERM(), SAM(rho=0.1)])
        >>> objective.num_stages, objective.radius_values
        (2, {'rho': 0.1})
        >>> objective.stage = 2
        >>> objective.terms(torch.tensor([0, 1]))[0].rho
        0.1
    """

    objectives: tuple[Objective, ...]

    def __init__(
        self, objectives: Sequence[Objective], split: ClassSplit | None = None, ignore_index: int = IGNORE_INDEX
    ) -> None:
        # Copies: an objective is changed by its stage, and may be given to several `Staged`.
        self.objectives = tuple(copy.copy(objective) for objective in _flat(objectives))
        self.ignore_index = _common_index(self.objectives, ignore_index)
        self.stage = 1
        super().__init__(_common_split(self.objectives) if split is None else split)

    @property
    def current(self) -> Objective:
        """The objective of the current stage."""
        return self._find(self._stage)[0]

    def _find(self, stage: int) -> tuple[Objective, int]:
        """Return the objective of a stage, and its own stage."""
        for objective in self.objectives[:-1]:
            if stage <= objective.num_stages:
                return objective, stage
            stage -= objective.num_stages
        return self.objectives[-1], stage

    # Stages.

    @property
    def num_stages(self) -> int:  # type: ignore[override]
        """Number of stages of all objectives together."""
        return sum(objective.num_stages for objective in self.objectives)

    @property
    def stage(self) -> int:
        """The current stage of the training, 1 at first. Setting it sets the stage of its objective."""
        return self._stage

    @stage.setter
    def stage(self, stage: int) -> None:
        if stage not in range(1, self.num_stages + 1):
            raise bad_argument("stage", f"an integer from 1 to {self.num_stages}", stage)
        self._stage = int(stage)
        objective, own_stage = self._find(self._stage)
        objective.stage = own_stage

    # What all objectives have.

    @property
    def needs_split(self) -> bool:  # type: ignore[override]
        """Whether any of the objectives needs to know head and tail."""
        return any(objective.needs_split for objective in self.objectives)

    @override
    def bind(self, split: ClassSplit) -> None:
        """Set the head and tail classes of all objectives. Raise ``ArgumentError`` if one cannot use this split."""
        super().bind(split)
        for objective in self.objectives:
            objective.bind(split)

    @override
    def _check_split(self, split: ClassSplit) -> None:
        for objective in self.objectives:
            objective._check_split(split)

    @override
    def check_ready(self) -> None:
        """Raise ``RuntimeError`` if one of the objectives needs a split and there is none yet."""
        for objective in self.objectives:
            objective.check_ready()

    @property
    def ignore_index(self) -> int:
        """Target that does not count. Setting it sets that of all objectives."""
        return self.current.ignore_index

    @ignore_index.setter
    def ignore_index(self, ignore_index: int) -> None:
        checked = check_integer("ignore_index", ignore_index)
        for objective in self.objectives:
            if objective.ignore_index != checked:
                objective.ignore_index = checked

    @property
    def radius_names(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the radii of all objectives."""
        return tuple(self.radius_values)

    @property
    @override
    def radius_values(self) -> dict[str, float]:
        """The radii of all objectives by name. If several have one of a name, the current objective's counts first."""
        found: dict[str, float] = {}
        for objective in self.objectives:
            found = {**found, **objective.radius_values, **found}
        return {**found, **self.current.radius_values}

    @override
    def set_radius(self, name: str, value: float) -> None:
        """Set a radius in every objective that has it, as :meth:`Objective.set_radius` does."""
        owners = [objective for objective in self.objectives if name in objective.radius_values]
        for objective in owners:
            objective.set_radius(name, value)
        if not owners:
            super().set_radius(name, value)

    # What the current objective has.

    @property
    def term_names(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the current objective's terms in logs."""
        return self.current.term_names

    @override
    def find_ignored(self, targets: Tensor) -> Tensor | None:
        """Return which positions do not count, as the current objective finds them."""
        return self.current.find_ignored(targets)

    @override
    def positions(self, targets: Tensor) -> Tensor:
        """Return targets in the form that the current objective makes of them."""
        return self.current.positions(targets)

    @override
    def terms(self, targets: Tensor) -> tuple[Term, ...]:
        """Return the current objective's terms of a batch."""
        return self.current.terms(targets)

    @property
    def state_prefix(self) -> str:  # type: ignore[override]
        """The number of the current objective, so that objectives share no states of ascents."""
        return f"{self.objectives.index(self.current)}/"

    @property
    def needs_clean_gradient(self) -> bool:  # type: ignore[override]
        """Whether the current objective makes the gradient for the optimizer."""
        return self.current.needs_clean_gradient

    @override
    def combine(self, clean: list[Tensor], gradient: list[Tensor], inner: InnerProducts) -> list[Tensor]:
        """Return the gradient for the optimizer, as the current objective does."""
        return self.current.combine(clean, gradient, inner)

    @property
    def ascent(self) -> Ascent:  # type: ignore[override]
        """The ascent that the current objective was built with."""
        return self.current.ascent

    @override
    def make_ascent(self) -> Ascent:
        """Return the ascent of the current objective's terms."""
        return self.current.make_ascent()

    @override
    def ascents(self) -> tuple[Ascent, ...]:
        """Return all ascents that the terms of any objective may have."""
        return tuple(ascent for objective in self.objectives for ascent in objective.ascents())

    def __getattr__(self, name: str) -> Any:
        # An object that is being unpickled has nothing yet.
        if not name.startswith("_") and "objectives" in vars(self):
            radii = self.radius_values
            return radii[name] if name in radii else getattr(self.current, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @override
    def __setattr__(self, name: str, value: Any) -> None:
        if "objectives" not in vars(self) or name.startswith("_") or hasattr(type(self), name):
            super().__setattr__(name, value)
        elif name in self.radius_values:
            self.set_radius(name, value)
        elif owners := [objective for objective in self.objectives if name in vars(objective)]:
            for objective in owners:
                setattr(objective, name, value)
        else:
            super().__setattr__(name, value)

    @override
    def __repr__(self) -> str:
        return f"{type(self).__name__}([{', '.join(map(repr, self.objectives))}])"


def _flat(objectives: Any) -> list[Objective]:
    """Return the objectives, with those of a ``Staged`` in its place."""
    is_list = isinstance(objectives, Sequence) and len(objectives) > 0
    if not is_list or not all(isinstance(objective, Objective) for objective in objectives):
        raise bad_argument("objectives", "a list of at least one Objective, such as [ERM(), SAM()]", objectives)
    return [part for each in objectives for part in (each.objectives if isinstance(each, Staged) else [each])]


def _common_index(objectives: Sequence[Objective], ignore_index: int) -> int:
    """Return the target that all objectives ignore: the one that is not the default, if there is one."""
    given = [check_integer("ignore_index", ignore_index), *(objective.ignore_index for objective in objectives)]
    found = list(dict.fromkeys(index for index in given if index != IGNORE_INDEX))
    if len(found) > 1:
        raise bad_argument("ignore_index", "the same for all objectives", got_text=" and ".join(map(str, found)))
    return found[0] if found else IGNORE_INDEX


def _common_split(objectives: Sequence[Objective]) -> ClassSplit | None:
    """Return the split that the objectives were built with, if any was."""
    splits = [objective.split for objective in objectives if objective.split is not None]
    for split in splits[1:]:
        same = torch.equal(split.class_counts, splits[0].class_counts) and torch.equal(split.tail, splits[0].tail)
        same &= split.multi_label == splits[0].multi_label
        if not same:
            raise bad_argument("split", "the same for all objectives", got_text=f"{splits[0]} and {split}")
    return splits[0] if splits else None
