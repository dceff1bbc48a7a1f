"""Names of the classes that options take: for the help, the completion of shells, and the guess at a wrong name."""

import importlib
import inspect
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from functools import cache

# By the last part of an option's name: the module with the classes, and the base that they derive from.
_SOURCES = {
    "data": ("lightning_ssesam.data", "LongTailDataModule"),
    "backbone": ("lightning_ssesam.models", ""),
    "objective": ("lightning_ssesam", "Objective"),
    # Those within a Staged.
    "objectives": ("lightning_ssesam", "Objective"),
    "direction": ("lightning_ssesam", "Direction"),
    "scale": ("lightning_ssesam", "Scale"),
    "radius": ("lightning_ssesam", "Radius"),
    "loss": ("lightning_ssesam.losses", "LongTailLoss"),
    "optimizer": ("torch.optim", "Optimizer"),
    "scheduler": ("torch.optim.lr_scheduler", "LRScheduler"),
    "callbacks": ("lightning_ssesam.callbacks", "Callback"),
    "logger": ("lightning.pytorch.loggers", "Logger"),
}
# The first names are for guesses alone: the options take classes of Lightning, too.
_LIGHTNING = {"callbacks": ("lightning.pytorch.callbacks", "Callback")}
# Names of papers and other libraries for objectives of this package, in small letters and without other characters.
_OBJECTIVES = {
    "vanilla": "ERM",
    "plain": "ERM",
    "sgd": "ERM",
    "adaptivesam": "ASAM",
    "fsam": "FriendlySAM",
    "msam": "MomentumSAM",
    "gnm": "RandomSAM",
    "gradientnorm": "PGN",
    "penalizinggradientnorm": "PGN",
    "weightedsam": "WSAM",
    "surrogategapsam": "GSAM",
    "lossequatedsam": "LESAM",
    "classconditionalsam": "CCSAM",
    "imbalancedsam": "ImbSAM",
}
# What a name that is no objective stands for.
_SETTINGS = {
    "looksam": "SAM with the step options `interval` and `reuse`",
    "samon": "SAM with `ascent: {only: norm}`",
    "latesam": "Staged with the objectives ERM and SAM",
}
_NO_CHOICE = {
    *("ImageDataModule", "ImageFileModule", "ImageInput"),
    *("BackboneFactory", "ContrastiveBranch", "LogitCorrection", "LongTailClassifier", "MultiLabelLoss"),
    "NormalizedLinear",
}


@cache
def known_classes(option: str) -> tuple[str, ...]:
    """Return the names of the classes that an option is mostly given, such as ``model.loss``. None for other options.

    They are used as help, and need no path if they are of this package.
    """
    model, _, kind = option.rpartition(".")
    names = _classes(*_SOURCES[kind]) if takes_class(option) else ()
    if kind == "loss" and not model:
        # A comparison takes no losses of multi-label data.
        names = tuple(name for name in names if name not in _classes("lightning_ssesam.losses", "MultiLabelLoss"))
    return names


def takes_class(option: str) -> bool:
    """Return whether an option, such as ``model.loss``, takes a class."""
    # `--logger` is that of a comparison, which takes one of a few words.
    return option.rpartition(".")[2] in _SOURCES and option != "logger"


def guess_class(option: str, name: str) -> str:
    """Return a sentence with the class that was probably meant, or an empty text."""
    module, _, last = name.rpartition(".")
    if module:
        with_prefix = closest(last, _public_names(module))
        return did_you_mean(f"{module}.{with_prefix}" if with_prefix else None)
    kind = option.rpartition(".")[2]
    if kind in ("objective", "objectives"):
        return guess_objective(name, known_classes(kind))
    names = known_classes(option) + (_classes(*_LIGHTNING[kind]) if kind in _LIGHTNING else ())
    return did_you_mean(closest(name, names))


def guess_objective(name: str, names: Sequence[str]) -> str:
    """Return a sentence with the objective that was probably meant, or an empty text.

    Hyphens and capitals do not count, and names that papers and other libraries use are known, too.

    Args:
        name: What was given.
        names: Names that can be given.
    """
    plain = "".join(filter(str.isalnum, name)).lower()
    if plain in _SETTINGS:
        return f" {name} is {_SETTINGS[plain]}."
    exact = {known.lower(): known for known in names}
    return did_you_mean(exact.get(plain) or _OBJECTIVES.get(plain) or closest(plain, names))


def did_you_mean(name: str | None) -> str:
    """Return a sentence that suggests a name, with a space before it, or an empty text without a name."""
    return f" Did you mean {name!r}?" if name else ""


def closest(name: str, names: Iterable[str]) -> str | None:
    """Return the most similar of the names, or None. Capitals do not count, and a name may be the start of another."""
    lowered = {known.lower(): known for known in names}
    starts = [known for known in lowered if len(name) > 2 and known.startswith(name.lower())]
    found = get_close_matches(name.lower(), lowered, 1, 0.6) or sorted(starts, key=len)
    return lowered[found[0]] if found else None


def _classes(module: str, base: str) -> tuple[str, ...]:
    """Return the public classes of a module that derive from a base, without the base."""
    parent = importlib.import_module(module)
    bases = (getattr(parent, base),) if hasattr(parent, base) else _imported_base(base)
    found = []
    for name in getattr(parent, "__all__", None) or sorted(vars(parent)):
        value = getattr(parent, name)
        is_class = inspect.isclass(value) and issubclass(value, bases) and value not in bases
        if is_class and not inspect.isabstract(value) and name not in _NO_CHOICE and name[0] != "_":
            found.append(name)
    return tuple(found)


def _imported_base(name: str) -> tuple[type, ...]:
    from lightning.pytorch.callbacks import Callback
    from torch import nn

    return (Callback,) if name == "Callback" else (nn.Module,)


def _public_names(module: str) -> list[str]:
    try:
        return [name for name in dir(importlib.import_module(module)) if name[0] != "_"]
    except Exception:
        # A guess must not fail, whatever the module does.
        return []
