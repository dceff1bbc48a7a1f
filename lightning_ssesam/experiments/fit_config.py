"""From a comparison's configuration and the name of a method to the configuration with which ``fit`` trains it."""

import pydoc
from collections.abc import Mapping, Sequence
from dataclasses import fields
from inspect import signature
from pathlib import Path
from typing import Any

import yaml

from lightning_ssesam._validation import bad_argument, check_integer
from lightning_ssesam.data import LongTailDataModule
from lightning_ssesam.errors import ArgumentError
from lightning_ssesam.experiments.class_names import guess_objective
from lightning_ssesam.experiments.command_parser import instantiate, names_class
from lightning_ssesam.experiments.compare import compare
from lightning_ssesam.experiments.experiment import Experiment
from lightning_ssesam.experiments.files import write_text
from lightning_ssesam.experiments.methods import DEFAULT_METHODS, METHODS, RADII, unknown_methods
from lightning_ssesam.experiments.parser_messages import cut
from lightning_ssesam.experiments.recipe import Recipe, default_optimizer
from lightning_ssesam.experiments.runs import Run
from lightning_ssesam.experiments.trust import check_functions
from lightning_ssesam.factories import returned_type

_PARAMETERS = signature(compare).parameters
_PARTS = ("data", "backbone", "optimizer", "loss")
# `fit` has options of these names, too.
_SHARED = {"data", "model", "trainer", "config", "recipe"}


def is_comparison(content: Any) -> bool:
    """Return whether the content of a YAML file is a comparison: it has an option that ``fit`` does not have."""
    names = (_PARAMETERS.keys() | {field.name for field in fields(Recipe)}) - _SHARED
    return isinstance(content, Mapping) and not names.isdisjoint(content)


def method_names(comparison: Mapping[str, Any]) -> list[str]:
    """Return the names of a comparison's methods, which are :data:`DEFAULT_METHODS` if it names none."""
    methods = comparison.get("methods") or DEFAULT_METHODS
    if not isinstance(methods, str | Sequence | Mapping):
        raise bad_argument("methods", "names, or a mapping from names to options", methods)
    return [str(name).strip() for name in (methods.split(",") if isinstance(methods, str) else methods)]


def fit_config(comparison: Mapping[str, Any], method: str, seed: int = 0) -> dict[str, Any]:
    """Return the configuration with which `lightning-ssesam fit` trains a method exactly as `compare` does.

    Args:
        comparison: Options of ``compare``, as in its YAML file. The defaults are those of the command.
        method: Name of one of the comparison's methods.
        seed: Seed of the run, an integer >= 0.

    Returns:
        A configuration of texts, numbers, lists and dictionaries, to be written as YAML.

    Raises:
        ArgumentError: If there is no such method, or an option cannot be used.
    """
    if not comparison.get("methods"):
        if method not in METHODS:
            error = bad_argument("method", f"one of {', '.join(METHODS)}", cut(method))
            raise ArgumentError(f"{error}{guess_objective(method, METHODS)}")
        comparison = {**comparison, "methods": [method]}
    names = method_names(comparison)
    if method not in names:
        raise bad_argument("method", f"one of {cut(', '.join(map(repr, names)))}", cut(method))
    shared, experiment = _parse(_with_objectives(comparison), method)
    options = shared["methods"][method]
    parts = {name: shared.get(name) if options.get(name) is None else options[name] for name in _PARTS}
    data = _with_sampler(parts.pop("data"), options.get("sampler"))
    callbacks = list(options.get("callbacks") or [])
    if experiment.is_switched_at_gamma(experiment.objective()):
        callbacks.append({"class_path": "lightning_ssesam.StageSwitch", "init_args": {"at": shared["gamma"]}})
    trainer = {"max_epochs": shared["epochs"], "devices": 1, "num_sanity_val_steps": 0, **(shared.get("trainer") or {})}
    return {
        "seed_everything": check_integer("seed", seed, minimum=0),
        "data": data,
        "model": {
            **parts,
            "objective": options["objective"],
            "scheduler": cosine(shared["epochs"]),
            "tail_fraction": shared.get("tail_fraction"),
            "tail_below": shared.get("tail_below"),
            **thresholds(data),
            **(experiment.model or {}),
        },
        "trainer": {**trainer, "callbacks": callbacks},
    }


def write_fit_configs(runs: Sequence[Run], comparison: str) -> list[Path]:
    """Write a config.yaml beside the weights of each method, for `lightning-ssesam test` and `curvature`.

    Args:
        runs: Runs of a comparison on the command line. Those without weights need none.
        comparison: Options of the comparison, as YAML.

    Returns:
        The paths of the configurations.
    """
    folders = {Path(run.weights).parent: run.method for run in runs if run.weights}
    for folder, method in folders.items():
        text = yaml.safe_dump(fit_config(yaml.safe_load(comparison), method), sort_keys=False, allow_unicode=True)
        write_text(folder / "config.yaml", text)
    return [folder / "config.yaml" for folder in folders]


def _with_sampler(data: Any, sampler: Any) -> Any:
    """Return a data module by class path, with another sampler if there is one."""
    return data if sampler is None else {**data, "init_args": {**(data.get("init_args") or {}), "sampler": sampler}}


def built_in(name: str, comparison: Mapping[str, Any]) -> dict[str, Any]:
    """Return the objective of a built-in method by class path, with the radii of a comparison."""
    chosen = {
        argument: comparison.get(option, _PARAMETERS[option].default)
        for option, argument in RADII.get(name, {}).items()
    }
    return {"class_path": f"lightning_ssesam.{name}", "init_args": chosen}


def cosine(epochs: int) -> dict[str, Any]:
    """Return the scheduler of ``compare``, by class path."""
    return {"class_path": "torch.optim.lr_scheduler.CosineAnnealingLR", "init_args": {"T_max": epochs}}


def thresholds(data: Any) -> dict[str, int]:
    """Return ``many_above`` and ``few_below`` of a data module that is given by class path, without making it."""
    path, arguments = data, dict[str, Any]()
    if isinstance(data, Mapping):
        path, arguments = data.get("class_path"), data.get("init_args") or {}
    found = _data_class(str(path))
    return {name: arguments.get(name, getattr(found, name)) for name in ("many_above", "few_below")}


def _data_class(path: str) -> type[LongTailDataModule]:
    """Return the class of a data module by its path, or by its name as jsonargparse does."""
    found = returned_type(pydoc.locate(path)) if "." in path else None
    waiting: list[type[LongTailDataModule]] = [LongTailDataModule]
    while found is None and waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        found = kind if kind.__name__ == path else None
    return found if found is not None and issubclass(found, LongTailDataModule) else LongTailDataModule


def _with_objectives(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """Return a comparison whose built-in methods have their objectives, as if they had been written there."""
    if isinstance(comparison.get("methods"), Mapping):
        return dict(comparison)
    names = method_names(comparison)
    if wrong := [name for name in names if name not in METHODS]:
        raise unknown_methods(wrong, ", ".join(wrong))
    return {**comparison, "methods": {name: {"objective": built_in(name, comparison)} for name in names}}


def _parse(comparison: Mapping[str, Any], method: str) -> tuple[dict[str, Any], Experiment]:
    """Return the options of a comparison as ``compare`` reads them, as texts, and the experiment of a method."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(compare, as_group=False, skip={"config"})
    parser.set_defaults(optimizer=default_optimizer())
    parser.set_defaults({name: None for name in _PARTS[:3] if names_class(comparison.get(name, {}))})
    try:
        chosen = parser.parse_object(dict(comparison))
    except Exception as error:
        raise ArgumentError(f"The comparison cannot be used: {' '.join(str(error).split())}") from error
    check_functions(chosen.as_dict())
    made = instantiate(parser, chosen)
    recipe = Recipe(**{field.name: made[field.name] for field in fields(Recipe)})
    return yaml.safe_load(parser.dump(chosen)), made.methods[method].experiment(method, recipe, made.gamma)
