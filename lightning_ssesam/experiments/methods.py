"""The methods of a comparison: how each one differs from the others."""

import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Sampler

from lightning_ssesam._validation import bad_argument
from lightning_ssesam.class_objectives import CCSAM, FocalSAM
from lightning_ssesam.data import LongTailDataModule
from lightning_ssesam.errors import ArgumentError
from lightning_ssesam.experiments.class_names import guess_objective
from lightning_ssesam.experiments.experiment import Experiment, about_method
from lightning_ssesam.experiments.parser_messages import cut
from lightning_ssesam.experiments.recipe import Recipe, check_factories
from lightning_ssesam.models import BackboneFactory
from lightning_ssesam.objectives import ERM, SAM, SSESAM, ImbSAM, Objective
from lightning_ssesam.variants import ASAM, GSAM, LESAM, PGN, WSAM, FriendlySAM, MomentumSAM, RandomSAM

DEFAULT_METHODS = ("ERM", "SAM", "ImbSAM", "SSESAM")
"""The methods of a comparison that names none."""

RADII: dict[str, dict[str, str]] = {
    "ERM": {},
    "SAM": {"sam_rho": "rho"},
    "ImbSAM": {"imbsam_rho": "rho"},
    "SSESAM": {"head_rho": "head_rho", "tail_rho": "tail_rho"},
}
"""For some of :data:`METHODS`, the argument of the objective for each option that is a radius. The radii of the other
methods are those that their objectives have by default."""

_CLASSES: tuple[type[Objective], ...] = (
    *(ERM, SAM, ImbSAM, SSESAM),
    *(ASAM, FriendlySAM, GSAM, WSAM, PGN, LESAM, FocalSAM, CCSAM, MomentumSAM, RandomSAM),
)
_OBJECTIVES: dict[str, Callable[..., Objective]] = {kind.__name__: kind for kind in _CLASSES}

METHODS = tuple(_OBJECTIVES)
"""Names of the methods that need no other options. Each is the name of its objective."""

OWN_SCALE = tuple(kind for kind in _CLASSES if kind.__name__ not in RADII)
"""Objectives whose radii are no options, because each has a scale of its own."""

# These must be the same for all methods, because their accuracies are computed by them.
_GROUPINGS = ("tail_below", "tail_fraction", "many_above", "few_below")
_LONGEST_NAME = 200
# Invisible characters that Persian, Hindi and emoji are written with.
_JOINERS = "\u200c\u200d"


@dataclass
class Method:
    """Options in which one method differs from the others. Those that are not given are the comparison's.

    Args:
        objective: Objective by class path, with its arguments.
        loss: Loss by class path, with its arguments.
        backbone: Network by class path, with its arguments.
        optimizer: Optimizer by class path, with its arguments.
        data: Data module by class path, with its arguments. Class counts must be equal.
        sampler: Sampler by class path, such as ClassBalancedSampler; replaces that of the data module.
        callbacks: Further callbacks. An objective with two stages gets StageSwitch(at=gamma) if none is
            among them; one with more needs a StageSwitch.
        model: Further arguments of LongTailClassifier, such as step_options.
    """

    objective: Callable[[], Objective] = ERM
    loss: Callable[[], nn.Module] | None = None
    backbone: BackboneFactory | None = None
    optimizer: Callable[[Iterable[Any]], Optimizer] | None = None
    data: Callable[[], LongTailDataModule] | None = None
    sampler: Callable[[Tensor], Sampler[int]] | None = None
    callbacks: list[Callback] = field(default_factory=list)
    model: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_factories(vars(self))

    def experiment(self, name: str, recipe: Recipe, gamma: float) -> Experiment:
        """Return the experiment that trains this method with the options of a comparison."""
        shared, model = recipe.model or {}, self.model
        if all(isinstance(arguments.get("step_options"), Mapping) for arguments in (shared, model)):
            # A method may change some step options and keep the others of the comparison.
            model = {**model, "step_options": {**shared["step_options"], **model["step_options"]}}
        parts = {part: getattr(self, part) for part in ("loss", "backbone", "optimizer", "data")}
        given = {part: value for part, value in parts.items() if value is not None}
        options = {**vars(recipe), **given, "model": {**shared, **model}}
        if self.sampler is not None:
            options["data"] = WithSampler(options["data"], self.sampler)
        with about_method(name):
            return Experiment(name, self.objective, callbacks=self.callbacks, gamma=gamma, **options)


# Without a `repr`, the fingerprint of an experiment looks at the parts.
@dataclass(frozen=True, repr=False)
class WithSampler:
    """Makes a data module, and replaces its sampler. It can be sent to another process if its parts can be pickled.

    Args:
        data: Makes the data module.
        sampler: Makes the sampler of the training set from its labels ``(N,)``.
    """

    data: Callable[[], LongTailDataModule]
    sampler: Callable[[Tensor], Sampler[int]]

    def __call__(self) -> LongTailDataModule:
        """Return the data module."""
        data = self.data()
        data.sampler = self.sampler
        return data


def make_methods(methods: str | Sequence[str] | dict[str, Method], radii: Mapping[str, float]) -> dict[str, Method]:
    """Return the methods of a comparison or a search.

    Args:
        methods: Names of :data:`METHODS`, or methods by names of the user's own.
        radii: Radii of the methods that are given by name: ``sam_rho``, ``imbsam_rho``, ``head_rho``, ``tail_rho``.

    Raises:
        ArgumentError: If there is no such method, or a name cannot be used.
    """
    if isinstance(methods, dict) and methods:
        for name, method in methods.items():
            _check_method_name(name)
            if wrong := sorted(method.model.keys() & _GROUPINGS):
                expected = f"methods on the same groups of classes (no {'/'.join(_GROUPINGS)})"
                raise bad_argument("methods", expected, got_text=f"{', '.join(wrong)} for {name!r}")
        return methods
    names = [name.strip() for name in methods.split(",")] if isinstance(methods, str) else list(methods)
    if not names or len(set(names)) < len(names) or not set(names) <= set(METHODS):
        raise unknown_methods(names, methods)
    arguments = {name: {argument: radii[option] for option, argument in RADII.get(name, {}).items()} for name in names}
    return {name: Method(partial(_OBJECTIVES[name], **arguments[name])) for name in names}


def unknown_methods(names: Iterable[Any], given: Any) -> ArgumentError:
    """Return the error for names of which some are not in :data:`METHODS`, or for a name that is there twice."""
    guess = next((guess_objective(name, METHODS) for name in map(str, names) if name not in METHODS), "")
    expected = f"some of {', '.join(METHODS)}, each once"
    return ArgumentError(f"{bad_argument('methods', expected, got_text=cut(repr(given), 120))}{guess}")


def _check_method_name(name: Any) -> None:
    is_text = isinstance(name, str) and 0 < len(name) <= _LONGEST_NAME and not name.isspace()
    # Control characters, invisible ones that reorder a line, halves of characters, and ends of lines and paragraphs.
    if not is_text or any(
        unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp") and letter not in _JOINERS for letter in name
    ):
        limits = f"a line of 1 to {_LONGEST_NAME} characters, without control characters"
        how = "" if isinstance(name, str) else " (quote it, if it is meant as a name)"
        raise bad_argument("methods", f"methods whose names are text: {limits}", got_text=f"{_short(name)}{how}")


def _short(name: Any) -> str:
    text = ascii(name)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"
