"""A callback that measures the curvature of the groups' losses while a model trains."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_ssesam._validation import bad_argument, check_integer
from lightning_ssesam.curvature import CurvatureSettings, choose_samples, group_masks, measure_curvature
from lightning_ssesam.curvature.hessian import SampleLosses
from lightning_ssesam.curvature.measure import check_batches
from lightning_ssesam.data.labels import labels_of
from lightning_ssesam.errors import NonFiniteError
from lightning_ssesam.objectives import Objective
from lightning_ssesam.processes import Processes
from lightning_ssesam.split import ClassSplit

Batches = Iterable[Any] | Mapping[str, Iterable[Any]]


@dataclass(frozen=True)
class _MonitorSettings(CurvatureSettings):
    """The settings with the defaults of the monitor, which measures less, and so more often."""

    tolerance: float = 0.05
    max_iterations: int = 100
    trace_samples: int = 0
    probes: int = 0


class CurvatureMonitor(Callback):
    """Measures and logs the curvature of each group's loss while a model trains.

    It measures every few epochs, and right before and right after the first update of another stage
    (:class:`~lightning_ssesam.StageSwitch`). The :meth:`~lightning_ssesam.curvature.Curvature.numbers` go to every
    logger of the Trainer, as ``curvature/tail/smallest`` and so on, and into :attr:`history`.

    The training is the same with and without the callback, bit for bit. If the loss is not finite, a warning replaces
    the measurement. In several processes each measures the same. Sharded models are refused.

    Args:
        every_n_epochs: Number of epochs from one measurement to the next, an integer >= 1.
        groups: Names of groups, see :func:`~lightning_ssesam.curvature.measure_curvature`.
        samples: Number of training samples of each group, an integer >= 1; all if it has fewer. They are chosen at
            random and loaded once, when training starts.
        batch_size: Number of samples that are forwarded at a time, an integer >= 1.
        batches: Data to measure on instead, see :func:`~lightning_ssesam.curvature.measure_curvature`.
        split: Head and tail classes; by default those of the module's objective.
        sample_losses: Function of ``(module, batch)`` for losses ``(N,)``; by default ``module.sample_losses(batch)``.
        seed: Seed of the choice of samples and of all random vectors, an integer >= 0.
        progress: Whether to show a progress display.
        **settings: Fields of :class:`~lightning_ssesam.curvature.CurvatureSettings`. Here ``tolerance`` is 0.05,
            ``max_iterations`` 100, ``trace_samples`` 0 and ``probes`` 0 by default.

    Attributes:
        history: Measurements, one dictionary for each time and group: ``step`` (number of optimizer steps), ``epoch``
            (number of epochs that the weights have seen, with fractions), ``stage``, ``when`` (``"epoch"``, or
            ``"before"`` or ``"after"`` the first update of a stage), ``group`` and the numbers. Kept in checkpoints.

    Raises:
        ArgumentError: If an argument is out of range.
        MisconfigurationException: When training starts, if there is no split or no ``sample_losses``, the model is
            sharded, or the labels of the training set are unknown and ``batches`` is not given.
    """

    def __init__(
        self,
        every_n_epochs: int = 10,
        groups: Sequence[str] = ("head", "tail"),
        samples: int = 512,
        batch_size: int = 256,
        batches: Batches | None = None,
        split: ClassSplit | None = None,
        sample_losses: SampleLosses | None = None,
        seed: int = 0,
        progress: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.every_n_epochs = check_integer("every_n_epochs", every_n_epochs, minimum=1)
        self.samples = check_integer("samples", samples, minimum=1)
        self.batch_size = check_integer("batch_size", batch_size, minimum=1)
        if isinstance(batches, Iterator):
            raise bad_argument("batches", "an iterable that can be iterated again and again", batches)
        self.groups, self.batches, self.split = groups, batches, split
        self.sample_losses, self.progress = sample_losses, progress
        self.settings = _MonitorSettings(seed=seed, **settings)
        self.history: list[dict[str, Any]] = []
        self._data: Batches | None = None
        # The weights that were measured last (the step, and a sum of each parameter), and their numbers by group.
        self._measured: tuple[Any, dict[str, dict[str, float]]] | None = None
        # The stage, 0 before the first update, and the step of a switch that is not measured yet, -1 for none.
        self._stage, self._switched_at = 0, -1

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called when a run starts, before a checkpoint is loaded: forget earlier runs, and refuse sharded models."""
        if stage != "fit":
            return
        if Processes(trainer.strategy).is_sharded:
            problem = "CurvatureMonitor does not support models that are sharded over processes."
            advice = "Train without it, and measure checkpoints with `lightning-ssesam curvature`."
            raise MisconfigurationException(f"{problem} {advice}")
        # Lightning calls no `teardown` for a run that was interrupted.
        self._data = self._measured = None
        if trainer.global_step == 0:
            self.history, self._stage, self._switched_at = [], 0, -1

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when the data loaders are ready: choose the samples."""
        split = self._find_split(pl_module)
        if self.sample_losses is None and not callable(getattr(pl_module, "sample_losses", None)):
            problem = f"the loss of each sample, but `{type(pl_module).__name__}` has no method `sample_losses`"
            advice = "Use SharpnessAwareMixin, or give `sample_losses`."
            raise MisconfigurationException(f"CurvatureMonitor needs {problem}. {advice}")
        check_batches(self.batches, group_masks(split, self.groups))
        self._data = self._choose(trainer.train_dataloader, split) if self.batches is None else self.batches

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Called before every update: measure if it is the first of a stage."""
        stage = _current_stage(pl_module)
        if self._stage not in (0, stage):
            self._record(trainer, pl_module, "before")
            self._switched_at = trainer.global_step
        self._stage = stage

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Called after every batch: measure if it made the first update of a stage."""
        if 0 <= self._switched_at < trainer.global_step:
            self._switched_at = -1
            self._record(trainer, pl_module, "after")

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called after every epoch: measure after every ``every_n_epochs``-th."""
        if (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._record(trainer, pl_module, "epoch")

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called when a run ends: free the samples."""
        self._data = self._measured = None

    def __getstate__(self) -> dict[str, Any]:
        # Neither data nor `log` and `log_dict`: the Trainer attaches these, and they refer to the last module.
        kept = {name: value for name, value in vars(self).items() if name not in ("log", "log_dict")}
        return {**kept, "_data": None, "_measured": None}

    @property
    @override
    def state_key(self) -> str:
        """Key of the state in checkpoints. It tells apart monitors of different groups."""
        return type(self).__qualname__ + repr({"groups": list(self.groups)})

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the history, the stage (0 before the first update) and the step of a switch to measure (-1: none)."""
        return {"history": list(self.history), "stage": self._stage, "switched_at": self._switched_at}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state that :meth:`state_dict` returned."""
        self.history = list(state_dict["history"])
        self._stage, self._switched_at = state_dict["stage"], state_dict["switched_at"]

    def _record(self, trainer: Trainer, pl_module: LightningModule, when: str) -> None:
        step = trainer.global_step
        # A switch right after the end of an epoch sees the same weights; they are measured once. The step alone does
        # not identify them, because weight averaging changes the weights between two steps.
        weights = step, [p.detach().sum().item() for p in pl_module.parameters()]
        if self._measured is None or self._measured[0] != weights:
            try:
                self._measured = weights, self._measure(trainer, pl_module)
            except NonFiniteError as error:
                rank_zero_warn(f"CurvatureMonitor measures nothing at step {step}. {error}")
                return
        time = {"step": step, "epoch": _epochs(trainer, when), "stage": _current_stage(pl_module), "when": when}
        for group, numbers in self._measured[1].items():
            self.history.append({**time, "group": group, **numbers})
            logged = {f"curvature/{group}/{name}": value for name, value in numbers.items()}
            for logger in trainer.loggers:
                logger.log_metrics(logged, step=step)

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, dict[str, float]]:
        assert self._data is not None
        split = self._find_split(pl_module)
        options = {**vars(self.settings), "progress": self.progress and trainer.is_global_zero}
        measured = measure_curvature(pl_module, self._data, split, self.groups, self.sample_losses, **options)
        # The eigenvectors, which are as large as the model, are not kept.
        return {group: curvature.numbers() for group, curvature in measured.items()}

    def _find_split(self, pl_module: LightningModule) -> ClassSplit:
        split = self.split or getattr(getattr(pl_module, "objective", None), "split", None)
        if not isinstance(split, ClassSplit):
            advice = "Give it `split=...`, or train with an objective that has a split."
            raise MisconfigurationException(f"CurvatureMonitor needs to know which classes are head and tail. {advice}")
        return split

    def _choose(self, loader: Any, split: ClassSplit) -> dict[str, list[Any]]:
        try:
            if not isinstance(loader, DataLoader):
                raise ValueError(f"The training data is a {type(loader).__name__}, not a DataLoader.")
            labels = None if split.multi_label else labels_of(loader.dataset)
        except (TypeError, ValueError) as error:
            problem = f"CurvatureMonitor cannot find the classes of the training samples. {error}"
            raise MisconfigurationException(f"{problem} Give it `batches=...` to measure on.") from error
        options = self.samples, self.batch_size, self.settings.seed, labels
        return choose_samples(loader.dataset, loader.collate_fn, split, self.groups, *options)


def _current_stage(pl_module: LightningModule) -> int:
    objective = getattr(pl_module, "objective", None)
    return objective.stage if isinstance(objective, Objective) else 1


def _epochs(trainer: Trainer, when: str) -> float:
    """Return the number of epochs that the weights have seen, with fractions."""
    if when == "epoch":
        return trainer.current_epoch + 1.0
    ready = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    # Before an update, the weights have not seen its batches yet.
    waiting = (ready - 1) % trainer.accumulate_grad_batches + 1 if when == "before" else 0
    return trainer.current_epoch + (ready - waiting) / trainer.num_training_batches
