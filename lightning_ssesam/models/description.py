"""What a checkpoint says of a classifier's parts: classes by name, out of a fixed list, and plain values.

Whoever writes a checkpoint can name no other class or function, so loading it runs no code of theirs.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ssesam import ascent, class_objectives, losses, objectives, staged, step_options, variants
from lightning_ssesam._validation import bad_argument
from lightning_ssesam.errors import ArgumentError
from lightning_ssesam.factories import inner_function
from lightning_ssesam.models import backbones, contrast, schedules

_OWN = (
    *(ascent, objectives, variants, class_objectives, staged, step_options),
    *(losses, losses.contrastive, losses.multi_label, backbones, contrast, schedules),
)
_TORCHVISION = "torchvision.models."
# The class split gives them, and torch's losses do not keep the last two, which are deprecated.
_NOT_KEPT = {"self", "split", "counts", "size_average", "reduce"}
# Arguments that would download weights or read a file. The checkpoint has the weights.
_NO_FILES = {"weights": None, "weights_backbone": None, "pretrained": False}
_FILE_OPTIONS = {"checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}


class _Unknown(Exception):
    """Something that is neither plain nor in the list, by its name."""


def describe(value: Any) -> Any:
    """Return a part of a classifier as plain values, from which :func:`restore` makes it again.

    Args:
        value: Plain value, a list or a mapping of such, an object or a factory of a class in the list. The list has the
            objectives, ascents, losses and networks of this package, the losses, optimizers and schedulers of torch,
            and the networks of torchvision.

    Returns:
        The description; ``{"unknown": name}`` for everything else.
    """
    try:
        return _describe(value)
    except _Unknown as unknown:
        return {"unknown": str(unknown)}


def restore(description: Any) -> Any:
    """Return the part that :func:`describe` has described.

    Args:
        description: Description, perhaps of a file that somebody else has written.

    Raises:
        ArgumentError: If it names something that is not in the list, or is no description.
    """
    if isinstance(description, list):
        return [restore(value) for value in description]
    if not isinstance(description, Mapping):
        return description
    if "items" in description:
        return _restored(description["items"])
    kind = "class" if "class" in description else "factory"
    made = _find(description.get(kind))
    arguments = _restored(description.get("arguments", {}))
    if isinstance(options := arguments.get("options"), Mapping):
        arguments["options"] = {name: value for name, value in options.items() if name not in _FILE_OPTIONS}
    if not isinstance(made, type) or issubclass(made, nn.Sequential):
        arguments = {name: _NO_FILES.get(name, value) for name, value in arguments.items()}
    if kind == "factory":
        return partial(made, **arguments) if arguments else made
    try:
        return made(**arguments)
    except Exception as error:
        raise ArgumentError(f"The checkpoint describes a {description[kind]} that cannot be made: {error}") from error


def _restored(descriptions: Any) -> dict[str, Any]:
    if not isinstance(descriptions, Mapping):
        raise bad_argument("checkpoint", "one whose descriptions have named parts", descriptions)
    return {str(name): restore(value) for name, value in descriptions.items()}


def unknown_name(description: Any) -> str | None:
    """Return the name of a part that was neither plain nor in the list, and None for the others."""
    return str(description["unknown"]) if isinstance(description, Mapping) and "unknown" in description else None


def _describe(value: Any) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is Tensor:
        return value.detach().cpu().clone()
    if isinstance(value, list | tuple):
        return [_describe(part) for part in value]
    if isinstance(value, dict):
        return {"items": {str(name): _describe(part) for name, part in value.items()}}
    if isinstance(value, partial) or inspect.isclass(value) or inspect.isroutine(value):
        return _describe_factory(value)
    kind, name = type(value), _name_of(type(value))
    arguments = {
        given: _describe(_kept(value, given)) for given in parameters_of(kind) if not _is_default(value, given)
    }
    return {"class": name, "arguments": arguments}


def _describe_factory(factory: Any) -> dict[str, Any]:
    keywords: dict[str, Any] = {}
    while isinstance(factory, partial):
        keywords = {**factory.keywords, **keywords}
        # The factories of the command line call a function with the class.
        given = next((argument for argument in factory.args if inspect.isclass(argument)), None)
        if given is None and factory.args:
            raise _Unknown(_qualified(inner_function(factory)))
        factory = given or factory.func
    arguments = {name: _describe(value) for name, value in keywords.items()}
    return {"factory": _name_of(factory), "arguments": arguments}


def _is_default(value: Any, name: str) -> bool:
    """Return whether an object has the default of its class, which it does not keep itself."""
    default = getattr(type(value), name, property)
    return name not in vars(value) and default is not property and not isinstance(default, property)


def _kept(value: Any, name: str) -> Any:
    """Return an argument that an object keeps."""
    kept = getattr(value, "_arguments", {})
    if name not in kept and not hasattr(value, name):
        raise _Unknown(_qualified(type(value)))
    return kept[name] if name in kept else getattr(value, name)


def parameters_of(kind: type) -> Iterator[str]:
    """Yield the names of the arguments of a class, with those that it hands on to its bases by ``**kwargs``."""
    for base in kind.__mro__:
        if "__init__" in vars(base):
            parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
            named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
            yield from (name for name in named if name not in _NOT_KEPT)
            if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters):
                return


def _name_of(made: Any) -> str:
    """Return the name of a class or function in the list."""
    for name, listed in _listed().items():
        if listed is made:
            return name
    if getattr(made, "__module__", "").startswith(_TORCHVISION):
        name = f"{_TORCHVISION}{made.__name__}"
        if _builder(name) is made:
            return name
    raise _Unknown(_qualified(made))


def _find(name: Any) -> Callable[..., Any]:
    """Return the class or function of a name, or raise ArgumentError if the list does not have it."""
    found = (_listed().get(name) or _builder(name)) if isinstance(name, str) else None
    if found is None:
        expected = "a class of lightning-ssesam, torch or torchvision that it may name"
        raise bad_argument("checkpoint", expected, got_text=f"{name!r}, which it describes")
    return found


def _builder(name: str) -> Callable[..., Any] | None:
    if not name.startswith(_TORCHVISION):
        return None
    from torchvision import models

    try:
        builder: Callable[..., Any] = models.get_model_builder(name.removeprefix(_TORCHVISION))
    except ValueError:
        return None
    # Those of other modules, such as networks for detection, download weights without being told.
    return builder if name.removeprefix(_TORCHVISION) in models.list_models(module=models) else None


@cache
def _listed() -> dict[str, type]:
    """Return the classes that a checkpoint may name."""
    own = {kind.__name__: kind for module in _OWN for kind in _classes(module) if kind.__module__ == module.__name__}
    sources = ((torch.optim, ""), (torch.optim.lr_scheduler, "lr_scheduler."))
    optimizers = {
        f"torch.optim.{prefix}{kind.__name__}": kind
        for module, prefix in sources
        for kind in _classes(module)
        if issubclass(kind, torch.optim.Optimizer | torch.optim.lr_scheduler.LRScheduler)
    }
    of_torch = {f"torch.nn.{name}": getattr(nn, name) for name in nn.modules.loss.__all__}
    return {**own, **optimizers, **of_torch}


def _classes(module: ModuleType) -> list[type]:
    return [value for name, value in vars(module).items() if isinstance(value, type) and name[0] != "_"]


def _qualified(value: Any) -> str:
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"
