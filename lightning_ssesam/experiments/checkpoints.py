"""From a checkpoint of ``lightning-ssesam fit`` to its model and data."""

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch.cli import LightningArgumentParser
from torch import nn

from lightning_ssesam._validation import bad_argument
from lightning_ssesam.data import LongTailDataModule
from lightning_ssesam.models import LongTailClassifier


def find_config(checkpoint: Path) -> Path:
    """Return the config.yaml that ``fit`` has saved for a checkpoint: in the folder above its own, or in its own.

    Raises:
        ValueError: If there is neither a checkpoint nor a config.yaml.

    """
    if checkpoint.is_dir():
        expected = (
            "files; `python -m lightning.pytorch.utilities.consolidate_checkpoint FOLDER` makes one of the folder of a"
            " model that was divided among processes"
        )
        raise bad_argument("checkpoints", expected, str(checkpoint))
    if not checkpoint.is_file():
        raise bad_argument("checkpoints", "files that are there", str(checkpoint))
    for folder in checkpoint.absolute().parents[1::-1]:
        if (folder / "config.yaml").is_file():
            return folder / "config.yaml"
    expected = f"the configuration of the training, as there is no config.yaml next to {str(checkpoint)!r} or above"
    raise bad_argument("config", expected, None)


def load_checkpoint(checkpoint: Path, config: Path) -> tuple[LongTailClassifier, LongTailDataModule]:
    """Return the model of a checkpoint, with its weights, and the data module that it was trained on.

    Args:
        checkpoint: What ``lightning-ssesam fit`` has saved.
        config: The configuration of that training, of which ``model`` and ``data`` are used.

    Raises:
        ValueError: If they are not what they should be, or do not go together.

    """
    state = _load_state(checkpoint)
    model, data = _build(config)
    if differences := _differences(state, model):
        expected = f"weights of the model in {str(config)!r}"
        more = f" and {len(differences) - 1} more" if len(differences) > 1 else ""
        raise bad_argument("checkpoints", expected, got_text=f"{str(checkpoint)!r}, {differences[0]}{more}")
    model.load_state_dict(state)
    return model, data


def _build(config: Path) -> tuple[LongTailClassifier, LongTailDataModule]:
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(LongTailClassifier, "model")
    parser.add_lightning_class_args(LongTailDataModule, "data", subclass_mode=True)
    parser.link_arguments("data.class_counts", "model.class_counts", apply_on="instantiate")
    expected = "a configuration of `lightning-ssesam fit`, with `model` and `data`"
    try:
        content = yaml.safe_load(config.read_text())
        parts = {name: content[name] for name in ("model", "data")}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError) as error:
        raise bad_argument("config", expected, str(config)) from error
    try:
        chosen = parser.parse_object(parts)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise bad_argument("config", expected, got_text=f"{str(config)!r} ({reason})") from error
    # The later name; versions that have it warn of the earlier one.
    built = (getattr(parser, "instantiate", None) or parser.instantiate_classes)(chosen)
    return built.model, built.data


def _load_state(checkpoint: Path) -> dict[str, Any]:
    expected = "checkpoints of `lightning-ssesam fit`"
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
        state = content["state_dict"]
    except (RuntimeError, OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise bad_argument("checkpoints", expected, str(checkpoint)) from error
    except pickle.UnpicklingError as error:
        refused = re.search(r"Unsupported \w+: GLOBAL (\S+)", str(error))
        reason = f", which holds a {refused[1]} that may not be safe to load" if refused else ""
        raise bad_argument("checkpoints", expected, got_text=repr(str(checkpoint)) + reason) from error
    return dict(state)


def _differences(state: dict[str, Any], model: nn.Module) -> list[str]:
    own = model.state_dict()
    return [
        *(f"which lacks `{name}`" for name in own if name not in state),
        *(f"which has `{name}` besides" for name in state if name not in own),
        *(
            f"where `{name}` has shape {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
            for name in own
            if name in state and getattr(own[name], "shape", None) != getattr(state[name], "shape", None)
        ),
    ]
