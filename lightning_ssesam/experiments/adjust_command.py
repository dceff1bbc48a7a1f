"""The command ``lightning-ssesam adjust``: correct a checkpoint after its training."""

import copy
import os
import shutil
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.utilities.seed import isolate_rng
from torchmetrics.functional.classification import multiclass_calibration_error
from tqdm.auto import tqdm

from lightning_ssesam._validation import bad_argument, check_increasing, check_integer, check_radius
from lightning_ssesam.data import LongTailDataModule
from lightning_ssesam.data.unaugmented import unaugmented
from lightning_ssesam.errors import ArgumentError
from lightning_ssesam.experiments.checkpoints import find_config, load_checkpoint
from lightning_ssesam.experiments.class_names import closest, did_you_mean
from lightning_ssesam.experiments.console import find_device, limited_threads, quiet
from lightning_ssesam.experiments.files import make_folder, replaced, set_aside
from lightning_ssesam.experiments.trust import read_checkpoint, say
from lightning_ssesam.models import LongTailClassifier
from lightning_ssesam.posthoc import METHODS, BalancedTraining, Correction, Evidence, TauChoice, find_correction
from lightning_ssesam.posthoc.choosing import DEFAULT_TAUS, GROUPS, group_recalls, probabilities_of
from lightning_ssesam.posthoc.evaluation import classifier_outputs, first_loader, validating
from lightning_ssesam.posthoc.methods import BALANCING, KEY, balanced_already, saved_corrections
from lightning_ssesam.posthoc.outputs import Outputs
from lightning_ssesam.split import ClassSplit

BEFORE = "before"
_COLUMNS = (*GROUPS, "ECE")
# What only a training would load.
_OF_TRAINING = ("optimizer_states", "lr_schedulers", "callbacks", "loops")


def adjust(
    checkpoint: Path,
    config: Path | None = None,
    methods: str | list[str] = list(METHODS),  # noqa: B006 (never changed; the help shows it)
    tau: float | list[float] | None = None,
    criterion: Literal["recall", "tail"] = "recall",
    head_drop: float = 0.05,
    steps: int = 1000,
    lr: float = 0.2,
    device: str = "auto",
    threads: int = 1,
    seed: int = 0,
    output: Path | None = None,
    trust_checkpoint: bool = False,
) -> dict[str, dict[str, float]]:
    """Correct a checkpoint of `lightning-ssesam fit` or `compare --keep_weights` for its class sizes or its confidence.

    Tries each method: post-hoc logit adjustment, tau-normalisation, learnable weight scaling (LWS), classifier
    re-training (cRT) and temperature scaling. The strength tau and the temperature are chosen on the validation data.
    LWS and cRT are trained on the training images without augmentation, in class-balanced batches.

    Prints a table of the test data before and after each method, and says what does not help. Writes a checkpoint for
    each method. `test`, `predict` and `load_from_checkpoint` read it like any other. The checkpoint that is given stays
    as it is.

    Args:
        checkpoint: Checkpoint of a training.
        config: Configuration of the training. By default the config.yaml that fit has saved in the folder above that
            of the checkpoint. A configuration is code: take none from strangers.
        methods: Names of methods, with commas between them.
        tau: Strength of logit_adjustment and tau_norm, or a list of values to choose from. By default 0, 0.1 and so on
            to 2.
        criterion: What makes a tau the best on the validation data. recall takes the highest mean recall of all
            classes (balanced accuracy). tail takes the highest mean recall of the tail with which the head loses at
            most --head_drop.
        head_drop: Fall of the head's mean recall that --criterion tail allows, in [0, 1].
        steps: Number of optimizer steps of lws and crt.
        lr: Learning rate of lws and crt at their beginning. It falls to 0 along a cosine.
        device: Device to compute on, such as cpu or cuda:1; auto takes a GPU if there is one.
        threads: Number of CPU threads for an operation. More than one speeds up large networks only.
        seed: Seed of the draws of lws and crt and of crt's new classifier, an integer >= 0.
        output: Path of a single checkpoint to write, that of the method which is best on the validation data. By
            default there is one for each method, in the folder adjusted beside the config.yaml.
        trust_checkpoint: Permission for the checkpoint to hold more than plain data. Such a file can run any code.

    Returns:
        By ``"before"`` and by the names of the methods, numbers of the test data: recalls in [0, 1] by group, and the
        expected calibration error ``"ECE"``.

    Raises:
        ArgumentError: If an argument is out of range, the checkpoint or its configuration cannot be used, its images
            have several labels each, the data module has no validation data, or no method works.
        ModuleNotFoundError: If jsonargparse is not installed.
    """
    names = _names(methods)
    choice = TauChoice(_taus(tau), criterion, head_drop)
    training = BalancedTraining(steps=steps, lr=lr, seed=seed)
    check_integer("threads", threads, minimum=1)
    place = find_device(device)
    source = config or find_config(checkpoint)
    paths = _paths(checkpoint, None if config else source, output, names)
    with limited_threads(threads), quiet():
        content = read_checkpoint(checkpoint, trust_checkpoint)
        model, data = load_checkpoint(checkpoint, source, trust_checkpoint)
        if model.split.multi_label:
            found = f"the classifier in {str(checkpoint)!r} has several labels for an image"
            raise ArgumentError(f"Corrections are for data with one class a sample, but {found}.")
        if config is None:
            say(f"Model and data come from {str(source)!r}.")
        _warn(model, data, content, source, names)
        outputs = _SetOutputs(model.to(place), data)
        base = Evidence(
            model.backbone, model.split, outputs.of("val"), lambda: outputs.of("train"), model.loss, choice, training
        )
        rows = _Rows(model.split, base, outputs.of("test"))
        for name in names:
            if (correction := _found(name, base)) is not None:
                rows.add(correction)
                if output is None:
                    _save(model, content, correction, paths[name], checkpoint)
        if not rows.corrections:
            raise ArgumentError("None of the methods works with this checkpoint.")
        rows.conclude()
        if output is not None:
            _save(model, content, rows.corrections[rows.best()], output, checkpoint)
    written = [paths[name] for name in (rows.corrections if output is None else [rows.best()])]
    print(f"Written: {', '.join(os.path.relpath(path) for path in written)}")
    return rows.test


def _names(methods: str | list[str]) -> list[str]:
    names = [name.strip() for name in methods.split(",")] if isinstance(methods, str) else list(methods)
    if not names or len(set(names)) < len(names) or not set(names) <= set(METHODS):
        guess = next((closest(str(name), METHODS) for name in names if name not in METHODS), None)
        error = bad_argument("methods", f"some of {', '.join(METHODS)}, each once", methods)
        raise ArgumentError(f"{error}{did_you_mean(guess)}")
    return names


def _taus(tau: float | list[float] | None) -> Sequence[float]:
    if tau is None:
        return DEFAULT_TAUS
    if not isinstance(tau, list):
        return [check_radius("tau", tau)]
    return check_increasing("tau", tau, check_radius, "finite numbers >= 0")


def _paths(checkpoint: Path, config: Path | None, output: Path | None, names: Sequence[str]) -> dict[str, Path]:
    """Return where the checkpoint of each method goes, or raise ``ArgumentError`` if it cannot go there.

    By default that is the folder ``adjusted``, beside a configuration that was found, or beside the checkpoint. From
    there, the configuration is found again. A resumed training does not take the file for its newest checkpoint.
    """
    if output is None:
        folder = (config or checkpoint).absolute().parent
        folder = folder if folder.name == "adjusted" else folder / "adjusted"
        paths = {name: folder / f"{checkpoint.stem}-{name}{checkpoint.suffix}" for name in names}
    else:
        if output.suffix != checkpoint.suffix or output.is_dir():
            raise bad_argument("output", f"the path of a file that ends in {checkpoint.suffix}", str(output))
        paths = dict.fromkeys(names, output)
    make_folder(next(iter(paths.values())).parent)
    for path in paths.values():
        if path.exists() and path.samefile(checkpoint):
            raise bad_argument("output", "another file than the checkpoint, which stays as it is", str(path))
    return paths


def _warn(
    model: LongTailClassifier, data: LongTailDataModule, content: dict[str, Any], config: Path, names: Sequence[str]
) -> None:
    """Say what makes a correction or its numbers doubtful."""
    again = [name for name in names if name in BALANCING]
    if again and (phrase := _balanced_by(model, data, content, config)):
        say(
            f"This classifier is balanced already, by {phrase}. What {' and '.join(again)} would add may be too much:"
            " compare head and tail in the table."
        )
    if data.val_is_test:
        say("The validation set is the test set. What is chosen on it looks better in the table than on new images.")


def _balanced_by(model: LongTailClassifier, data: LongTailDataModule, content: dict[str, Any], config: Path) -> str:
    """Return what has made up for the class sizes before, as a phrase; an empty text for nothing."""
    earlier = [saved.get("method") for saved in saved_corrections(dict(content)) if isinstance(saved, dict)]
    if balancing := [str(method) for method in earlier if method != "temperature"]:
        return f"an earlier correction ({', '.join(balancing)})"
    if model.correction is not None and any(bool((v != v[0]).any()) for v in model.correction.buffers()):
        return "an earlier correction of its logits"
    return balanced_already(model.loss, data.sampler) or _late_weights(content, config)


def _late_weights(content: Mapping[str, Any], config: Path) -> str:
    """Return the callback that has weighed the classes late in the training; an empty text for none."""
    name = "DeferredReweighting"
    states = content.get("callbacks")
    if isinstance(states, Mapping) and name in states:
        state = states[name]
        return name if isinstance(state, Mapping) and state.get("switched_at") is not None else ""
    trainer = (yaml.safe_load(config.read_text()) or {}).get("trainer") or {}
    callbacks = trainer.get("callbacks") or []
    paths = (
        [c.get("class_path", "") for c in callbacks if isinstance(c, Mapping)] if isinstance(callbacks, list) else []
    )
    # The weights that a comparison keeps are from the end of the training, without the states of callbacks.
    return name if "callbacks" not in content and any(str(path).endswith(name) for path in paths) else ""


class _SetOutputs:
    """The outputs of a classifier for the sets of a data module, each computed when it is asked for, and kept."""

    def __init__(self, model: LongTailClassifier, data: LongTailDataModule) -> None:
        self._model, self._data = model, data
        self._trainer = _trainer_on(model.device)
        self.of = cache(self._compute)
        with validating(self._trainer, data), isolate_rng():
            data.prepare_data()
            for stage in ("fit", "test"):
                data.setup(stage)

    def _compute(self, name: str) -> Outputs:
        with validating(self._trainer, self._model, self._data), isolate_rng():
            loader = self._loader(name)
            batches = tqdm(loader, f"{name} images", leave=False, unit="batch")
            return classifier_outputs(self._model, batches, self._data)

    def _loader(self, name: str) -> Any:
        try:
            if name == "train":
                return unaugmented(first_loader(self._data.train_dataloader()), self._loader("val"))
            loader = first_loader(self._data.val_dataloader() if name == "val" else self._data.test_dataloader())
        except NotImplementedError as error:
            raise ArgumentError(str(error)) from error
        if loader is None:
            text = {"val": "validation", "test": "test"}[name]
            raise ArgumentError(f"{type(self._data).__name__} has no {text} data, which a correction needs.")
        return loader


def _trainer_on(device: torch.device) -> pl.Trainer:
    """Return a Trainer that hooks of modules can ask. It runs nothing."""
    accelerator, devices = ("cpu", 1) if device.type == "cpu" else (device.type, [device.index or 0])
    outputs = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return pl.Trainer(accelerator=accelerator, devices=devices, **dict.fromkeys(outputs, False))  # type: ignore[arg-type]


def _found(name: str, evidence: Evidence) -> Correction | None:
    """Return the correction by a method, or None after a line if it cannot work here."""
    try:
        return find_correction(name, evidence)
    except ArgumentError as error:
        say(f"{name} is left out: {error}")
        return None


class _Rows:
    """The table: printed line by line, so that an interruption loses no number that is known."""

    def __init__(self, split: ClassSplit, evidence: Evidence, test: Outputs) -> None:
        self.corrections: dict[str, Correction] = {}
        self.test: dict[str, dict[str, float]] = {}
        self._val: dict[str, dict[str, float]] = {}
        self._split, self._evidence, self._outputs = split, evidence, test
        print(
            f"Test recall in %, mean over the classes of each group, and calibration error (ECE) in %,"
            f" {len(test.targets):,} images"
        )
        print(f"{'':30}" + "".join(f"{column:>9}" for column in _COLUMNS))
        self._measure(BEFORE, None)

    def add(self, correction: Correction) -> None:
        """Measure a correction, and print its row."""
        self.corrections[correction.method] = correction
        self._measure(correction.method, correction)

    def _measure(self, name: str, correction: Correction | None) -> None:
        sets = {"test": self._outputs, "val": self._evidence.val}
        numbers = {}
        for kind, outputs in sets.items():
            corrected = outputs if correction is None else correction(outputs)
            numbers[kind] = {**group_recalls(corrected, self._split), "ECE": _calibration_error(corrected)}
        self.test[name], self._val[name] = numbers["test"], numbers["val"]
        label = BEFORE if correction is None else str(correction)
        print(f"{label:30}" + "".join(f"{100 * numbers['test'][column]:9.1f}" for column in _COLUMNS), flush=True)

    def _gain(self, rows: Mapping[str, Mapping[str, float]], name: str) -> float:
        """Return by how much a method is better than none; temperature scaling by its calibration error."""
        if name == "temperature":
            return rows[BEFORE]["ECE"] - rows[name]["ECE"]
        choice, before = self._evidence.choice, rows[BEFORE]
        return choice.score(rows[name], before) - choice.score(before, before)

    def best(self) -> str:
        """Return the best method on the validation data. Temperature scaling, which changes no class, comes last."""
        names = [name for name in self.corrections if name != "temperature"] or list(self.corrections)
        return max(names, key=lambda name: self._gain(self._val, name))

    def conclude(self) -> None:
        """Print which method is the best on the validation data, and which do not help."""
        print()
        number, best = len(self._evidence.val.targets), self.best()
        for text, rows in {f"the {number:,} validation images": self._val, "the test images": self.test}.items():
            if useless := [name for name in self.corrections if self._gain(rows, name) <= 0]:
                print(f"No gain on {text}: {', '.join(useless)}.")
        measure = {"recall": "mean recall of all classes", "tail": "recall of the tail"}[
            self._evidence.choice.criterion
        ]
        measure = "calibration error" if best == "temperature" else measure
        if self._gain(self._val, best) > 0:
            print(f"Best on the validation images, by the {measure}: {best}.")
        else:
            print(f"By the {measure} of the validation images, nothing is better than the checkpoint as it is.")


def _calibration_error(outputs: Outputs) -> float:
    probabilities = probabilities_of(outputs)
    number = probabilities.shape[1]
    return float(multiclass_calibration_error(probabilities, outputs.targets, num_classes=number, n_bins=15))


def _save(
    model: LongTailClassifier, content: Mapping[str, Any], correction: Correction, path: Path, checkpoint: Path
) -> None:
    """Write the checkpoint of a corrected classifier: all of it, or nothing. An earlier file of that name is renamed.

    The classifier itself stays as it is.
    """
    corrected = copy.deepcopy(model)
    correction.apply_to(corrected)
    saved = {name: value for name, value in content.items() if name not in _OF_TRAINING}
    saved["state_dict"] = {name: value.cpu() for name, value in corrected.state_dict().items()}
    saved[KEY] = [*saved_corrections(dict(content)), {"method": correction.method, **correction.values}]
    with replaced(path) as unfinished:
        torch.save(saved, unfinished)
        set_aside(path)
    # Then the same configuration is found for it, which is the newest one that is not newer.
    shutil.copystat(checkpoint, path)
