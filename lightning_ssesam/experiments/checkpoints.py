"""From a checkpoint of ``lightning-ssesam fit`` to its model and data."""

from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.cli import LightningArgumentParser
from torch import nn

from lightning_ssesam.data import LongTailDataModule
from lightning_ssesam.errors import ArgumentError
from lightning_ssesam.experiments.command_parser import instantiate, link_data_to_model
from lightning_ssesam.experiments.trust import check_functions, read_checkpoint
from lightning_ssesam.models import LongTailClassifier
from lightning_ssesam.models.description import unknown_name
from lightning_ssesam.models.saved_parts import name_of_class, saved_content


def find_config(checkpoint: Path) -> Path:
    """Return the configuration that ``fit`` has saved for a checkpoint: in the folder above its own, or in its own.

    It is config.yaml. Where several trainings share a folder, it is the newest of config.yaml, config-1.yaml and so on
    that is not newer than the checkpoint.

    Raises:
        ArgumentError: If there is no such checkpoint, or no config.yaml.
    """
    if checkpoint.is_dir():
        found = f"The checkpoint {str(checkpoint)!r} is a folder."
        remedy = "make one file of it: `python -m lightning.pytorch.utilities.consolidate_checkpoint FOLDER`"
        raise ArgumentError(f"{found} If a sharded model was saved in it, {remedy}.")
    if not checkpoint.is_file():
        raise ArgumentError(f"No such checkpoint: {str(checkpoint)!r}.")
    for folder in checkpoint.absolute().parents[1::-1]:
        if (first := folder / "config.yaml").is_file():
            saved = [first, *folder.glob("config-*.yaml")]
            # A training saves its configuration before its first checkpoint.
            earlier = [path for path in saved if path.stat().st_mtime <= checkpoint.stat().st_mtime]
            return max(earlier, key=lambda path: path.stat().st_mtime, default=first)
    places = f"in the folder of {str(checkpoint)!r} or in the one above"
    raise ArgumentError(f"No config.yaml {places}. Give the configuration of its training as `config`.")


def load_checkpoint(
    checkpoint: Path, config: Path, trust: bool = False
) -> tuple[LongTailClassifier, LongTailDataModule]:
    """Return the model of a checkpoint, with its weights, and the data module that it was trained on.

    Args:
        checkpoint: File that ``lightning-ssesam fit`` has saved.
        config: Configuration of that training. Its ``model`` and ``data`` are used.
        trust: Permission for the checkpoint to hold more than plain data, and so to run any code.

    Raises:
        ArgumentError: If one of them cannot be read, or they do not belong together.
    """
    content = read_checkpoint(checkpoint, trust)
    state = dict(content["state_dict"])
    model, data = _build(config)
    model.on_load_checkpoint(content)
    if differences := _differences(state, model):
        more = f", and {len(differences) - 1} more" if len(differences) > 1 else ""
        refusal = f"The checkpoint {str(checkpoint)!r} does not fit the model in {str(config)!r}"
        raise ArgumentError(f"{refusal}: {differences[0]}{more}.")
    model.load_state_dict(state)
    return model, data


def load_classifier(
    checkpoint: Path, config: Path | None = None, trust: bool = False
) -> tuple[LongTailClassifier, LongTailDataModule | None]:
    """Return the model of a checkpoint, by what the checkpoint says, and no data module if that is enough.

    Args:
        checkpoint: File that ``lightning-ssesam fit`` or ``compare`` has saved.
        config: Configuration of that training. By default it is looked for if the checkpoint does not say what its
            network is, or how a picture becomes an input.
        trust: Permission for the checkpoint to hold more than plain data, and so to run any code.

    Raises:
        ArgumentError: If one of them cannot be read, or they do not belong together.
    """
    if config is None and checkpoint.is_file():
        saved = saved_content(read_checkpoint(checkpoint, trust))
        if saved["made_by"] not in ("", name_of_class(LongTailClassifier)):
            found = f"{str(checkpoint)!r} was saved by {saved['made_by']}, which may compute logits in its own way"
            raise ArgumentError(f"{found}. Load it by that class in Python, and call `predict_step`.")
        has_network = unknown_name(saved["arguments"].get("backbone", {"unknown": ""})) is None
        if has_network and saved["image_input"] is not None:
            return LongTailClassifier.load_from_checkpoint(checkpoint, weights_only=not trust), None
    return load_checkpoint(checkpoint, config or find_config(checkpoint), trust)


def _build(config: Path) -> tuple[LongTailClassifier, LongTailDataModule]:
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(LongTailClassifier, "model")
    parser.add_lightning_class_args(LongTailDataModule, "data", subclass_mode=True)
    link_data_to_model(parser)
    refusal = f"{str(config)!r} is no configuration of `lightning-ssesam fit`, with `model` and `data`"
    try:
        content = yaml.safe_load(config.read_text())
        parts = {name: content[name] for name in ("model", "data")}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError) as error:
        raise ArgumentError(f"{refusal}.") from error
    try:
        chosen = parser.parse_object(parts)
    except Exception as error:
        raise ArgumentError(f"{refusal}: {' '.join(str(error).split())}") from error
    check_functions(chosen.as_dict())
    built = instantiate(parser, chosen)
    return built.model, built.data


def _differences(state: dict[str, Any], model: nn.Module) -> list[str]:
    expected = model.state_dict()
    differences = [f"it lacks `{name}`" for name in expected if name not in state]
    differences += [f"the model has no `{name}`" for name in state if name not in expected]
    for name in expected:
        found, wanted = (tuple(getattr(values.get(name), "shape", ())) for values in (state, expected))
        if name in state and found != wanted:
            differences.append(f"`{name}` has shape {found} instead of {wanted}")
    return differences
