"""Files of others. A checkpoint is data: it must not run code. A configuration is code, of the kinds asked for."""

import os
import pydoc
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_ssesam._validation import bad_argument
from lightning_ssesam.ascent import Ascent, Radius
from lightning_ssesam.errors import ArgumentError
from lightning_ssesam.experiments.recipe import KINDS
from lightning_ssesam.factories import check_factory, returned_type
from lightning_ssesam.lightning_internals import hyperparameters
from lightning_ssesam.models.saved_parts import load_content, unsafe
from lightning_ssesam.weights import SELECTIONS

OPTION = "--trust_checkpoint"
_WAY_OUT = f"add `{OPTION} true`"
_ASCENT = {field.name for field in fields(Ascent)}
_SAVED_PATHS = {"best_model_path", "last_model_path", "kth_best_model_path"}
_PLAIN, _ANY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


@rank_zero_only
def say(text: str) -> None:
    """Write a line to the standard error, in the first process only."""
    print(text, file=sys.stderr, flush=True)


def read_checkpoint(path: str | Path, trust: bool = False) -> dict[str, Any]:
    """Return the content of a checkpoint, a file of this machine.

    Args:
        path: Path of the file.
        trust: Permission to make whatever the file has been pickled from, which can run any code.

    Raises:
        ArgumentError: If the file cannot be read, is no checkpoint, or holds more than plain data and ``trust`` is
            False.
    """
    kind = "`lightning-ssesam fit`"
    # A path, because a text could be the address of another machine.
    content = load_content(Path(path), not trust, _WAY_OUT, kind)
    for name in ("epoch", "global_step"):
        if not isinstance(content.get(name, 0), int):
            raise ArgumentError(f"{str(path)!r} is no checkpoint of {kind}: its `{name}` is {content[name]!r}.")
    return content


def guard_loading(trainer: pl.Trainer, trust: bool) -> None:
    """Let a Trainer load plain data alone, whatever its strategy, and whatever file it chooses.

    Without ``weights_only``, Lightning 2.5 unpickles everything. FSDP, ModelParallel and DeepSpeed unpickle parts of
    their files by other ways than torch.load.
    """
    strategy: Any = trainer.strategy
    strategy.load_checkpoint = partial(_load, trainer, strategy.load_checkpoint, trust)


def _load(trainer: pl.Trainer, load: Any, trust: bool, checkpoint_path: str | Path, *args: Any, **kwargs: Any) -> Any:
    if not trust:
        check_plain(checkpoint_path)
    try:
        with _only_plain_data(not trust):
            content = load(checkpoint_path, *args, **kwargs)
    except Exception as error:
        if (refusal := unsafe(checkpoint_path, error, _WAY_OUT)) is None:
            raise
        raise refusal from error
    if trainer.state.fn == TrainerFn.FITTING:
        _check_state(checkpoint_path, content)
    if trust or not isinstance(content, Mapping):
        return content
    if hyperparameters(content):
        say(
            f"The hyperparameters in {str(checkpoint_path)!r} are not used: the configuration decides. With"
            f" `{OPTION} true` they change the model's configuration, which may run code."
        )
    folders = [os.path.dirname(checkpoint_path), *(getattr(c, "dirpath", None) for c in trainer.checkpoint_callbacks)]
    _forget_other_files(content, [Path(os.path.realpath(folder)) for folder in folders if folder is not None])
    return content


def _check_state(path: str | Path, content: Any) -> None:
    """Refuse a checkpoint of weights alone, from which no training can go on.

    FSDP and DeepSpeed load the weights themselves, and return a content without them. It is not checked.
    """
    if isinstance(content, Mapping) and "state_dict" in content and "optimizer_states" not in content:
        found = f"Cannot load the checkpoint {str(path)!r}: it holds weights only, no state of a training"
        files = "Corrected checkpoints and those of `compare --keep_weights` are such files."
        raise ArgumentError(f"{found}, so `fit` cannot go on from it. {files}")


def _forget_other_files(content: Mapping[str, Any], folders: Sequence[Path]) -> None:
    """Take out of the callbacks' states the paths that are no checkpoints within the run's folders.

    ModelCheckpoint (callbacks/model_checkpoint.py) takes its earlier checkpoints from there. It deletes them with all
    they contain: at any address such as ``local:///home``, and through ``..`` outside its folder.
    """

    def is_kept(path: Any) -> bool:
        if not isinstance(path, str) or "::" in path or "://" in path or ".." in Path(path).parts:
            return False
        real = Path(os.path.realpath(path))
        is_within = any(real.is_relative_to(folder) for folder in folders)
        return is_within and real.is_file() and real.suffix == ModelCheckpoint.FILE_EXTENSION

    callbacks = content.get("callbacks")
    for state in callbacks.values() if isinstance(callbacks, Mapping) else ():
        if isinstance(state, dict):
            state.update({name: "" for name in _SAVED_PATHS & state.keys() if not is_kept(state[name])})
            if isinstance(saved := state.get("best_k_models"), Mapping):
                state["best_k_models"] = {path: score for path, score in saved.items() if is_kept(path)}


def check_plain(path: str | Path) -> None:
    """Refuse a checkpoint of this machine that holds more than plain data, or that is a folder."""
    if os.path.isdir(path):
        found = f"The checkpoint {str(path)!r} is a folder, which may hold a sharded model. Loading it may run code."
        raise ArgumentError(f"{found} If you trust whoever made it, add `{OPTION} true`. Otherwise give a file.")
    if os.path.isfile(path):
        read_checkpoint(path)


@contextmanager
def _only_plain_data(is_forced: bool) -> Iterator[None]:
    """Force all calls of torch.load to ``weights_only=True``, or allow them all objects."""
    before = {name: os.environ.pop(name, None) for name in (_PLAIN, _ANY)}
    os.environ[_PLAIN if is_forced else _ANY] = "1"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", f"Environment variable {_ANY} detected")
            yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def check_functions(config: Any) -> None:
    """Refuse a configuration in which a function makes a part that it does not promise to make.

    jsonargparse checks classes, and functions without arguments. It calls functions with arguments unchecked.

    Args:
        config: Configuration before anything of it is made, of mappings and sequences.

    Raises:
        ArgumentError: If there is such a function.
    """
    if isinstance(config, Mapping):
        if config.keys() == _ASCENT:
            _check_ascent(config["radius"], config["only"])
        for name, value in config.items():
            if name in KINDS and isinstance(value, Mapping) and isinstance(value.get("class_path"), str):
                _check_function(name, value["class_path"], KINDS[name])
            check_functions(value)
    elif isinstance(config, Sequence) and not isinstance(config, str):
        for value in config:
            check_functions(value)


def _check_function(name: str, class_path: str, kind: type) -> None:
    function = pydoc.locate(class_path)
    if function is None or isinstance(function, type):
        return
    if returned_type(function) is None:
        expected = f"a class, or a function whose annotation says that it returns a {kind.__name__}"
        raise bad_argument(name, expected, got_text=f"{class_path}, which has no such annotation")
    check_factory(name, function, kind)


def _check_ascent(radius: Any, only: Any) -> None:
    """Check what chooses the radius and the parameters of an ascent: a function, or by class path what makes one."""
    if path := _class_path(radius):
        _check_function("radius", path, Radius)
    path = _class_path(only)
    # The class of a function that has arguments of its own.
    made = returned_type(pydoc.locate(path)) if path else None
    function = made and made.__call__ if path else only
    if not isinstance(only, str | None) and returned_type(function) is not bool:
        names = ", ".join(map(repr, SELECTIONS))
        expected = f"one of {names}, or a function whose annotation says that it returns a bool"
        called = path or f"{only.__module__}.{getattr(only, '__qualname__', type(only).__qualname__)}"
        raise bad_argument("only", expected, got_text=f"{called}, which has no such annotation")


def _class_path(value: Any) -> str | None:
    return str(value["class_path"]) if isinstance(value, Mapping) and "class_path" in value else None
