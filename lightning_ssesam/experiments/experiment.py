"""One training of a comparison or a search: its recipe, and how a run is made from it."""

import copy
import math
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from lightning_ssesam import _version
from lightning_ssesam._validation import bad_argument
from lightning_ssesam.callbacks import StageSwitch
from lightning_ssesam.data import LongTailDataModule
from lightning_ssesam.data.labels import names_of_classes
from lightning_ssesam.errors import ArgumentError
from lightning_ssesam.experiments.console import limited_threads, quiet
from lightning_ssesam.experiments.fingerprint import (
    ascent_settings,
    callback_settings,
    data_factory,
    data_settings,
    digest,
    files_of,
    trainer_settings,
    without_addresses,
)
from lightning_ssesam.experiments.logs import TrainingLog, opened
from lightning_ssesam.experiments.network_check import check_network, problems_of_parts
from lightning_ssesam.experiments.recipe import Recipe
from lightning_ssesam.experiments.recorder import (
    MEASURING,
    Recorder,
    training_accuracy,
)
from lightning_ssesam.experiments.refusals import find_argument_error
from lightning_ssesam.experiments.runs import CONFUSIONS, GROUPS, Run
from lightning_ssesam.experiments.sources import sources_of
from lightning_ssesam.experiments.switches import needs_switch, problem_of
from lightning_ssesam.experiments.unfinished import Unfinished
from lightning_ssesam.factories import check_made
from lightning_ssesam.models import LongTailClassifier
from lightning_ssesam.objectives import Objective
from lightning_ssesam.split import ClassSplit
from lightning_ssesam.trainer_calls import of_first_loader


@contextmanager
def about_method(name: str) -> Iterator[None]:
    """Let an ``ArgumentError`` say which method it is about. jsonargparse wraps those of classes."""
    try:
        yield
    except Exception as error:
        if (found := find_argument_error(error)) is None:
            raise
        raise ArgumentError(f"The method {name!r}: {found}") from error


@dataclass(frozen=True)
class Experiment(Recipe):
    """Recipe for training one method. It can be sent to another process if its parts can be pickled.

    Args:
        method: Name of the method.
        objective: Makes the objective, without a split.
        callbacks: Callbacks, copied for every run.
        gamma: Fraction of the training after which an objective with two stages is switched, in (0, 1).
        **recipe: Fields of :class:`~lightning_ssesam.experiments.recipe.Recipe`, such as ``data`` and ``epochs``.
    """

    method: str
    objective: Callable[[], Objective]
    callbacks: Sequence[Callback] = ()
    gamma: float = 0.7

    def make_objective(self) -> Objective:
        """Return the objective of a run."""
        with about_method(self.method):
            made = self.objective()
        return check_made("objective", made, Objective)

    def make_model(self, data: LongTailDataModule) -> LongTailClassifier:
        """Return a module to train on ``data``."""
        arguments = {"many_above": data.many_above, "few_below": data.few_below, "in_channels": data.in_channels}
        return LongTailClassifier(
            data.class_counts,
            self.backbone,
            self.make_objective(),
            loss=None if self.loss is None else check_made("loss", self.loss(), nn.Module),
            optimizer=self.optimizer,
            scheduler=partial(CosineAnnealingLR, T_max=self.epochs),
            **{**arguments, **self.model_arguments},
        )

    def check_network(self, data: LongTailDataModule) -> None:
        """Try network and loss on a training sample, see :func:`~network_check.check_network`."""
        with torch.random.fork_rng(devices=[]):
            model = self.make_model(data)
        with limited_threads(self.threads):
            check_network(model, data)

    def _checked_data(self) -> LongTailDataModule:
        """Return the data module. The command has checked its files, and tells other processes by this."""
        data = self.make_data()
        data._files_checked = True
        return data

    def make_split(self, data: LongTailDataModule) -> ClassSplit:
        """Return the class split of the modules trained on ``data``. The random state does not change."""
        with torch.random.fork_rng(devices=[]):
            return self.make_model(data).split

    def make_callbacks(self, model: LongTailClassifier) -> list[Callback]:
        """Return the callbacks of one run. An objective with two stages gets a :class:`StageSwitch`."""
        callbacks = [copy.deepcopy(callback) for callback in self.callbacks]
        if self.is_switched_at_gamma(model.objective):
            callbacks.append(StageSwitch(at=self.gamma))
        return callbacks

    def is_switched_at_gamma(self, objective: Objective) -> bool:
        """Return whether stage 2 begins at ``gamma``, because no :class:`StageSwitch` is among the callbacks."""
        return needs_switch(objective, self.callbacks)

    def make_trainer(self, callbacks: list[Callback], device: int | None = None) -> pl.Trainer:
        """Return a Trainer without output, on one device: on GPU number ``device`` if it is given."""
        given = self.trainer or {}
        outputs = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        devices = 1 if device is None or given.get("accelerator") == "cpu" else [device]
        defaults: dict[str, Any] = {**dict.fromkeys(outputs, False), "num_sanity_val_steps": 0, "devices": devices}
        return pl.Trainer(max_epochs=self.epochs, callbacks=callbacks, **{**defaults, **given})

    def _plain_trainer(self) -> pl.Trainer:
        with quiet():
            return self.make_trainer([])

    def check(self, split: ClassSplit, data: LongTailDataModule | None = None) -> LongTailClassifier:
        """Build every part, and return the module. The random state does not change.

        Args:
            split: Class split, whose class counts the data must have.
            data: Data module of the experiment. By default one is made.

        Raises:
            ArgumentError: If a part cannot be built.
        """
        data = self.make_data() if data is None else data
        with torch.random.fork_rng(devices=[]):
            model = self.make_model(data)
        if list(data.class_counts) != split.class_counts.tolist():
            expected = "methods on data with the same training samples per class"
            raise bad_argument("methods", expected, got_text=f"other class counts for {self.method!r}")
        optimizer = self.optimizer(model.parameters())
        problems = [
            problem_of(model.objective, self.callbacks),
            *problems_of_parts(model, optimizer, self._plain_trainer).values(),
        ]
        if problem := next(filter(None, problems), ""):
            raise ArgumentError(f"The method {self.method!r} cannot be trained. {problem}")
        return model

    def fingerprint(
        self, split: ClassSplit, contents: str | None = None, data: LongTailDataModule | None = None
    ) -> str:
        """Return a text that identifies the training: settings, code and data, but not the seed.

        What only speed depends on does not count, such as the processes of a loader and the device.

        Args:
            split: Class split that the classes must have.
            contents: Fingerprint of the data module. By default the module is asked for it.
            data: Data module of the experiment, perhaps with another sampler. By default one is made.

        Raises:
            ArgumentError: If a part cannot be built.
        """
        data = self.make_data() if data is None else data
        model = self.check(split, data)
        factories = (self.data, self.backbone, self.loss, self.objective, self.optimizer)
        # The samples first: a file may have another path before it is downloaded.
        parts: dict[str, Any] = {"contents": data.fingerprint() if contents is None else contents}
        parts |= {
            "version": _version.__version__,
            "data": [type(data).__qualname__, data_settings(vars(data)), data_factory(self.data)],
            "counts": split.class_counts,
            "tail": model.split.tail,
            "model": model,
            "loss": [vars(model.loss), dict(model.loss.named_buffers())],
            "objective": repr(model.objective),
            "optimizer": without_addresses(repr(self.optimizer(model.parameters()))),
            "made_by": [(part, files_of(part)) for part in (self.backbone, self.loss)],
            "callbacks": callback_settings(self.callbacks),
            "settings": [self.epochs, self.gamma, self.model_arguments, trainer_settings(self.trainer or {})],
            "code": sources_of([*factories, data, model, *self.callbacks, self.trainer]),
        }
        ascents = model.objective.ascents()
        if not all(ascent.is_plain for ascent in ascents):
            # The `repr` of a user's class need not show its values.
            parts["ascents"] = [ascent_settings(ascent) for ascent in ascents]
        return digest(parts)

    def fit(
        self,
        seed: int,
        callbacks: Sequence[Callback] = (),
        device: int | None = None,
        unfinished: Unfinished | None = None,
    ) -> tuple[pl.Trainer, LongTailClassifier, LongTailDataModule]:
        """Train once, with further callbacks. Return the Trainer, the module and its data.

        A training that was cut off goes on from the checkpoint in its folder ``unfinished``.
        """
        pl.seed_everything(seed, verbose=False)
        data = self._checked_data()
        model = self.make_model(data)
        trainer = self.make_trainer([*callbacks, *self.make_callbacks(model)], device)
        keeps = unfinished is not None and model.step_options.exact_resume
        trainer.fit(model, datamodule=data, ckpt_path=unfinished.resume(trainer) if unfinished and keeps else None)
        return trainer, model, data

    def run(
        self,
        seed: int,
        device: int | None = None,
        unfinished: Unfinished | None = None,
        log: TrainingLog | None = None,
    ) -> Run:
        """Train and test once, then measure the accuracy on the training images.

        Args:
            seed: Seed of the training.
            device: Number of the GPU.
            unfinished: Folder of the training while it is under way.
            log: Log of the training.
        """
        run = Run(self.method, seed, interruptions=unfinished.begin() if unfinished else 0)
        recorder = Recorder(run)
        with quiet(), limited_threads(self.threads), opened(log, unfinished) as logging:
            trainer, model, data = self.fit(seed, [*logging, recorder], device, unfinished)
            tested = of_first_loader(trainer.test(model, datamodule=data, verbose=False)[0])
        run.accuracy = {group: tested[f"test/acc_{group}"] for group in GROUPS}
        run.confusion = {name: tested[f"test/{name}"] for name in CONFUSIONS}
        # Pad the curves of a run that stopped early with NaN.
        for curve in run.curves.values():
            curve += [math.nan] * (self.epochs - len(curve))
        best_epoch = np.argmax(np.nan_to_num(run.curves["all"], nan=-1.0))
        run.best = {group: curve[best_epoch] for group, curve in run.curves.items()}
        device_used = trainer.strategy.root_device
        name = torch.cuda.get_device_name(device_used) if device_used.type == "cuda" else platform.processor()
        run.device = name or platform.machine()
        run.seconds = recorder.seconds
        run.class_names = names_of_classes(data)
        with quiet(), limited_threads(self.threads):
            measuring = replace(self, trainer={**(self.trainer or {}), **MEASURING})
            run.train_accuracy = training_accuracy(measuring.make_trainer([], device), model, data, recorder)
        return run
