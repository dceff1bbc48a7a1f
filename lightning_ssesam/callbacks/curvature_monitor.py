"""The curvature of the groups' losses while a model trains."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_ssesam._validation import bad_argument, check_integer, check_positive, check_radius
from lightning_ssesam.curvature import choose_samples, group_masks, measure_curvature
from lightning_ssesam.curvature.hessian import SampleLosses
from lightning_ssesam.curvature.measure import check_batches
from lightning_ssesam.data.labels import labels_of
from lightning_ssesam.errors import NonFiniteError
from lightning_ssesam.objectives import Objective
from lightning_ssesam.processes import Processes
from lightning_ssesam.split import ClassSplit

Batches = Iterable[Any] | Mapping[str, Iterable[Any]]


class CurvatureMonitor(Callback):
    """Measures the curvature of each group's loss while a model trains, and logs it.

    Every few epochs, and right before and right after the first update of another stage
    (:class:`~lightning_ssesam.StageSwitch`). The numbers of
    :meth:`Curvature.numbers <lightning_ssesam.curvature.Curvature.numbers>` go to every logger of the Trainer, as
    ``curvature/tail/smallest`` and so on, and into :attr:`history`. The training itself is the same, bit for bit, as
    without the callback; where its loss is not finite a warning says so. In several processes each measures the same;
    sharded models are refused.

    Args:
        every_n_epochs: Measures at the end of every so many epochs, an integer >= 1.
        groups: Which groups, see :func:`~lightning_ssesam.curvature.measure_curvature`.
        samples: How many training samples of each group are used, chosen at random once and as the data set gives them
            then; all if the group has fewer. An integer >= 1.
        batch_size: How many of them are forwarded at a time, an integer >= 1.
        batches: Data to measure on instead: any iterable of batches that can be gone through again and again, or of
            each group its own.
        split: Which classes are head and tail; by default what the module's objective was built with.
        sample_losses: Called with ``(module, batch)``, returns the losses ``(N,)``; ``module.sample_losses(batch)`` by
            default.
        rho: Distance for the sharpness, a finite number >= 0.
        tolerance: Of the eigenvalues, a number > 0.
        max_iterations: Most products with a Hessian for them, an integer >= 1.
        trace_samples: Random vectors for the trace, an integer >= 0; 0 (default) leaves it out.
        seed: Of the choice of samples and of the random vectors.
        progress: Whether to show how far a measurement is.

    Attributes:
        history: What was measured: for every time and group a dictionary with ``step`` (optimizer steps made),
            ``epoch`` (how many the weights have seen, with fractions), ``stage``, ``when`` (``"epoch"``, ``"before"``
            or ``"after"`` the first update of a stage), ``group`` and the numbers. It is in checkpoints.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: When training starts, if there is no split, no ``sample_losses``, the model is
            sharded, or the labels of the training set are not known and ``batches`` are not given.

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
        rho: float = 0.05,
        tolerance: float = 0.05,
        max_iterations: int = 100,
        trace_samples: int = 0,
        seed: int = 0,
        progress: bool = False,
    ) -> None:
        super().__init__()
        self.every_n_epochs = check_integer("every_n_epochs", every_n_epochs, minimum=1)
        self.groups = groups
        self.samples = check_integer("samples", samples, minimum=1)
        self.batch_size = check_integer("batch_size", batch_size, minimum=1)
        if isinstance(batches, Iterator):
            raise bad_argument("batches", "an iterable that can be gone through again and again", batches)
        self.batches, self.split, self.sample_losses = batches, split, sample_losses
        self.rho = check_radius("rho", rho)
        self.tolerance = check_positive("tolerance", tolerance)
        self.max_iterations = check_integer("max_iterations", max_iterations, minimum=1)
        self.trace_samples = check_integer("trace_samples", trace_samples, minimum=0)
        self.seed = check_integer("seed", seed, minimum=0)
        self.progress = progress
        self.history: list[dict[str, Any]] = []
        self._data: Batches | None = None
        self._measured: tuple[Any, dict[str, dict[str, float]]] | None = None
        self._stage: int | None = None
        self._switched_at: int | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called when a run starts, before a checkpoint is loaded: begin anew, and refuse what cannot work."""
        if stage != "fit":
            return
        if Processes(trainer.strategy).is_sharded:
            raise MisconfigurationException(
                "CurvatureMonitor cannot work with a model whose weights are divided among processes. Train without"
                " it, and measure checkpoints with `lightning-ssesam curvature`."
            )
        # An earlier run that was interrupted has not been torn down.
        self._data = self._measured = None
        if trainer.global_step == 0:
            self.history, self._stage, self._switched_at = [], None, None

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when the loaders are there: choose the samples."""
        split = self._split_of(pl_module)
        if self.sample_losses is None and not callable(getattr(pl_module, "sample_losses", None)):
            raise MisconfigurationException(
                f"CurvatureMonitor needs the losses of single samples, which `{type(pl_module).__name__}` does not"
                " tell. Use SharpnessAwareMixin, or give `sample_losses`."
            )
        check_batches(self.batches, group_masks(split, self.groups))
        self._data = self._choose(trainer.train_dataloader, split) if self.batches is None else self.batches

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Called when an update's gradient is there: measure if it is the first of a stage."""
        stage = _stage_of(pl_module)
        if self._stage not in (None, stage):
            self._record(trainer, pl_module, "before")
            self._switched_at = trainer.global_step
        self._stage = stage

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Called after every batch: measure if its update was the first of a stage."""
        if self._switched_at is not None and trainer.global_step > self._switched_at:
            self._switched_at = None
            self._record(trainer, pl_module, "after")

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called after every epoch: measure if it is time."""
        if (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._record(trainer, pl_module, "epoch")

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called when a run ends: let go of the samples."""
        self._data = self._measured = None

    def __getstate__(self) -> dict[str, Any]:
        # No data, and not what the Trainer has attached, which is the last module's.
        attached = {name: value for name, value in vars(self).items() if name not in ("log", "log_dict")}
        return {**attached, "_data": None, "_measured": None}

    @property
    @override
    def state_key(self) -> str:
        """Tells monitors of different groups apart in checkpoints."""
        return self._generate_state_key(groups=list(self.groups))

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return what was measured, and where the stages are."""
        return {"history": list(self.history), "stage": self._stage or 0, "switched_at": _or_minus(self._switched_at)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.history = list(state_dict["history"])
        self._stage = state_dict["stage"] or None
        self._switched_at = None if state_dict["switched_at"] < 0 else state_dict["switched_at"]

    def _record(self, trainer: pl.Trainer, pl_module: pl.LightningModule, when: str) -> None:
        step = trainer.global_step
        # The end of an epoch and a switch after it see the same weights; averaging changes them between two steps.
        weights = step, [p.detach().sum().item() for p in pl_module.parameters()]
        if self._measured is None or self._measured[0] != weights:
            try:
                self._measured = weights, self._measure(trainer, pl_module)
            except NonFiniteError as error:
                rank_zero_warn(f"CurvatureMonitor measures nothing at step {step}. {error}")
                return
        at = {"step": step, "epoch": _epochs(trainer, when), "stage": _stage_of(pl_module), "when": when}
        for group, numbers in self._measured[1].items():
            self.history.append({**at, "group": group, **numbers})
            logged = {f"curvature/{group}/{name}": value for name, value in numbers.items()}
            for logger in trainer.loggers:
                logger.log_metrics(logged, step=step)

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, dict[str, float]]:
        assert self._data is not None
        measured = measure_curvature(
            pl_module,
            self._data,
            self._split_of(pl_module),
            self.groups,
            self.sample_losses,
            rho=self.rho,
            tolerance=self.tolerance,
            max_iterations=self.max_iterations,
            trace_samples=self.trace_samples,
            probes=0,
            seed=self.seed,
            progress=self.progress and trainer.is_global_zero,
        )
        # Not the eigenvectors, which are as large as the model.
        return {group: curvature.numbers() for group, curvature in measured.items()}

    def _split_of(self, pl_module: pl.LightningModule) -> ClassSplit:
        split = self.split or getattr(getattr(pl_module, "objective", None), "split", None)
        if not isinstance(split, ClassSplit):
            raise MisconfigurationException(
                "CurvatureMonitor needs to know which classes are head and tail. Give it `split=...`, or train with an"
                " objective that was built with one."
            )
        return split

    def _choose(self, loader: Any, split: ClassSplit) -> dict[str, list[Any]]:
        """Return of each group some of the training set's samples, in batches."""
        try:
            if not isinstance(loader, DataLoader):
                raise ValueError(f"The training data is a {type(loader).__name__}, no DataLoader.")
            labels = labels_of(loader.dataset)
        except (TypeError, ValueError) as error:
            raise MisconfigurationException(
                f"CurvatureMonitor cannot tell of which class the training samples are. {error} Give it `batches=...`"
                " to measure on."
            ) from error
        return choose_samples(
            loader.dataset, loader.collate_fn, split, self.groups, self.samples, self.batch_size, self.seed, labels
        )


def _stage_of(pl_module: pl.LightningModule) -> int:
    objective = getattr(pl_module, "objective", None)
    return objective.stage if isinstance(objective, Objective) else 1


def _epochs(trainer: pl.Trainer, when: str) -> float:
    """Return how many epochs the weights have seen."""
    if when == "epoch":
        return trainer.current_epoch + 1.0
    batches = trainer.fit_loop.epoch_loop.batch_progress.current
    # Batches that wait for an update have not been seen by the weights yet.
    waiting = (batches.ready - 1) % trainer.accumulate_grad_batches + 1
    done = batches.ready - waiting if when == "before" else batches.ready
    return trainer.current_epoch + done / trainer.num_training_batches


def _or_minus(step: int | None) -> int:
    return -1 if step is None else step
