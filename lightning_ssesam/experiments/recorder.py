"""What a run keeps of its training and its test: curves, numbers of images, and every image that was classified."""

import copy
import math
import time
from contextlib import suppress
from inspect import signature
from typing import Any, Literal, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler
from typing_extensions import override

from lightning_ssesam.data import LongTailDataModule
from lightning_ssesam.data.labels import labels_of, names_of_classes
from lightning_ssesam.data.unaugmented import unaugmented
from lightning_ssesam.experiments.predictions import Predictions
from lightning_ssesam.experiments.runs import GROUPS, Run
from lightning_ssesam.metrics import HeadTailAccuracy
from lightning_ssesam.models import LongTailClassifier
from lightning_ssesam.split import ClassSplit
from lightning_ssesam.trainer_calls import of_first_loader

MEASURING: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "profiler": None,
    "fast_dev_run": False,
    "limit_test_batches": None,
}
"""Arguments of the Trainer that measures the training accuracy: it writes nothing, and leaves nothing out."""


def expected_images(data: LongTailDataModule, split: ClassSplit) -> Run:
    """Return a run without results that has the numbers of images and the groups, as far as they are known."""
    return Run(
        "",
        0,
        class_recalls=[math.nan] * split.num_classes,
        groups=_groups_of(split),
        class_names=names_of_classes(data),
        val_images=count_images(data, "val"),
        test_images=count_images(data, "test"),
    )


def count_images(data: LongTailDataModule, stage: Literal["val", "test"]) -> list[int]:
    """Return the number of images of each class on which a run is validated or tested; nothing if it is not known.

    With several loaders, the first one counts. No image is loaded.
    """
    # Loaders of a user's own may need their Trainer, and their data sets may have no labels.
    with suppress(Exception):
        data.setup("fit")
        loaders = data.val_dataloader() if stage == "val" else data.test_dataloader()
        dataset = (loaders[0] if isinstance(loaders, list) else loaders).dataset
        if isinstance(dataset, IterableDataset):
            # A stream may know how many samples it has of each class, but not their order.
            return list(dataset.class_counts)  # type: ignore[attr-defined]
        labels = labels_of(dataset)
        known = labels[(labels >= 0) & (labels < data.num_classes)]
        return known.bincount(minlength=data.num_classes).tolist()
    return []


def _groups_of(split: ClassSplit) -> dict[str, str]:
    return {group: _digits(getattr(split, group)) for group in GROUPS if group != "all"}


class Recorder(Callback):
    """Records network, optimizer, validation curves, divergence, and what becomes of each test image in a run.

    Checkpoints hold what it has recorded, so that a training that goes on from one ends with the same run.

    Attributes:
        train_loader: Loader of the training batches, after the training.
        train_batches: Number of training batches in an epoch, infinite if it is not known.
        test_loader: Loader of the first test set, after the test.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.train_loader: Any = None
        self.train_batches: float = 0
        self.test_loader: Any = None
        self._predictions: Predictions | None = None
        self._validated: Tensor | None = None
        # The Trainer forgets what was logged when it goes on from a checkpoint.
        self._logged: dict[str, float] = {}
        self._start, self._before = time.perf_counter(), 0.0
        run.curves.update({group: [] for group in GROUPS})

    @property
    def seconds(self) -> float:
        """Duration of the run so far, in all the processes that it was made in."""
        return self._before + time.perf_counter() - self._start

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return what is recorded in the training, as plain values and tensors."""
        curves = {group: list(curve) for group, curve in self.run.curves.items()}
        recorded = {"curves": curves, "optimizer": self.run.optimizer, "seconds": self.seconds}
        return {**recorded, "logged": self._logged, "validated": self._validated}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.run.curves.update(state_dict["curves"])
        self.run.optimizer = state_dict["optimizer"]
        self._before = state_dict["seconds"]
        self._logged, self._validated = state_dict["logged"], state_dict["validated"]

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called before the first epoch: record the optimizer, before a schedule moves its rate."""
        self.run.optimizer = self.run.optimizer or ", ".join(map(describe_optimizer, trainer.optimizers))

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called before the module resets its metrics: keep the numbers of images, without waiting for the device."""
        if not trainer.sanity_checking:
            self._validated = _accuracy_of(pl_module, "val").total.clone()

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called after validation: record the accuracies. They are NaN until the first validation."""
        metrics = of_first_loader(trainer.callback_metrics)
        names = {"train/loss", *(f"val/acc_{group}" for group in GROUPS)}
        self._logged |= {name: float(metrics[name]) for name in names & metrics.keys()}
        for group, curve in self.run.curves.items():
            curve.append(self._logged.get(f"val/acc_{group}", math.nan))

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        loss = trainer.callback_metrics.get("train/loss", self._logged.get("train/loss"))
        # Without the option `log_loss` there is no loss to look at.
        self.run.diverged = not (weights_are_finite(pl_module) if loss is None else math.isfinite(loss))
        parameters = list(pl_module.parameters())
        self.run.parameters = sum(parameter.numel() for parameter in parameters)
        self.run.trained_parameters = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        split = _accuracy_of(pl_module, "val").split
        self.run.groups = _groups_of(split)
        self.run.val_images = [0] * split.num_classes if self._validated is None else self._validated.tolist()
        self.train_loader, self.train_batches = trainer.train_dataloader, trainer.num_training_batches

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        accuracy = _accuracy_of(pl_module, "test")
        self._predictions = Predictions(accuracy.split, ignore_index=accuracy.ignore_index).to(pl_module.device)
        cast("LongTailClassifier", pl_module).test_metrics.append(self._predictions)

    @override
    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called before the module resets its metrics: record recalls, numbers of images and predictions."""
        assert self._predictions is not None
        accuracy = _accuracy_of(pl_module, "test")
        self.run.class_recalls = accuracy.class_recalls().tolist()
        self.run.test_images = accuracy.total.tolist()
        loaders = trainer.test_dataloaders
        self.test_loader = loaders[0] if isinstance(loaders, list | tuple) else loaders
        self._predictions.write_to(self.run, _is_sequential(self.test_loader))
        # The module is as it was.
        cast("LongTailClassifier", pl_module).test_metrics.pop(-1)


def weights_are_finite(module: pl.LightningModule) -> bool:
    """Return whether no parameter is infinite or not a number."""
    return all(bool(parameter.isfinite().all()) for parameter in module.parameters())


def describe_optimizer(optimizer: Optimizer) -> str:
    """Return an optimizer as text, with its learning rate, and its other settings that are not the defaults."""
    arguments = signature(type(optimizer)).parameters
    defaults = {"lr": None, **{name: argument.default for name, argument in arguments.items()}}
    groups, texts = optimizer.param_groups, []
    for name, default in defaults.items():
        # A scheduler that has begun keeps the rate under another name.
        values = [group.get(f"initial_{name}", group.get(name)) for group in groups]
        if name in groups[0] and name != "params" and (name == "lr" or values != [default] * len(values)):
            texts.append(f"{name}={' and '.join(dict.fromkeys(map(_as_text, values)))}")
    return f"{type(optimizer).__name__}({', '.join(texts)})"


def _as_text(value: Any) -> str:
    return f"{float(value):g}" if isinstance(value, float | Tensor) else str(value)


def _digits(mask: Tensor) -> str:
    return "".join("1" if value else "0" for value in mask.tolist())


def _accuracy_of(module: pl.LightningModule, stage: str) -> HeadTailAccuracy:
    return cast("HeadTailAccuracy", getattr(module, f"{stage}_metrics")[0])


def _is_sequential(loader: Any) -> bool:
    """Return whether a loader is known to yield its images in the same order every time."""
    batches = getattr(loader, "batch_sampler", None)
    return type(batches) is BatchSampler and isinstance(batches.sampler, SequentialSampler)


def training_accuracy(
    trainer: pl.Trainer, model: LongTailClassifier, data: LongTailDataModule, recorder: Recorder
) -> dict[str, float]:
    """Return the accuracy of each group on the training images, each of which is classified once, in their order.

    Images are transformed as those of the test set, if both sets are of the same class and have a ``transform``.
    Otherwise they are as in training. The random state does not change.

    Args:
        trainer: Trainer that is used for nothing else.
        model: Trained module.
        data: Data module of its training. Its hooks move the batches.
        recorder: Recorder of its training and test.

    Returns:
        The accuracies, or nothing after a warning if they cannot be measured.
    """
    loader = unaugmented(recorder.train_loader, recorder.test_loader)
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        if not math.isfinite(recorder.train_batches):
            return {}
        trainer.limit_test_batches = int(recorder.train_batches)
    source = copy.copy(data)
    # The data sets are there already.
    source.prepare_data = source.setup = source.teardown = _do_nothing  # type: ignore[method-assign]
    source.test_dataloader = lambda: loader  # type: ignore[method-assign]
    device, before = trainer.strategy.root_device, model.trainer
    devices = [device] if device.type == "cuda" else []
    try:
        with isolate_rng(include_cuda=False), torch.random.fork_rng(devices):
            measured = of_first_loader(trainer.test(model, datamodule=source, verbose=False)[0])
        return {group: measured[f"test/acc_{group}"] for group in GROUPS}
    except Exception as error:
        # The results of hours are not lost for this number.
        rank_zero_warn(f"The training accuracy of {recorder.run.method!r} was not measured: {error}")
        return {}
    finally:
        model.trainer = before


def _do_nothing(stage: str = "") -> None:
    pass
