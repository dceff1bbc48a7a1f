"""The options of a training step: types, texts and checks in one place."""

from dataclasses import dataclass
from typing import Literal

import torch

from lightning_ssesam._validation import bad_argument, check_choice, check_flag, check_integer, check_radius
from lightning_ssesam.errors import ArgumentError


@dataclass(frozen=True)
class StepOptions:
    """How :class:`~lightning_ssesam.SharpnessAwareMixin` makes a training step.

    Set it as ``self.step_options`` in the module, or as a class attribute. It cannot be changed in place: replace it,
    for example with :func:`dataclasses.replace`.

    Args:
        passes: Which samples each pass forwards. ``"full"`` forwards the whole batch in every pass, which is exact for
            every model. ``"split"`` forwards only the samples that a term weighs: the same numbers for less work, if
            no layer mixes samples. ``"auto"`` (default) is ``"split"`` where that is exact, and ``"full"`` elsewhere.
            That is, if the model has batch norm in training mode, is compiled or sharded, or if a measurement before
            the first step shows that samples mix or that a forward moves something (docs/batches_and_modules.md).
        batch_norm_statistics: Statistics that batch norm in training mode uses. ``"batch"`` (default) takes those of
            the whole batch, which is exact. ``"group"`` requires ``passes="split"``: the gradient is that of plain
            training, plus the change that each perturbation makes, computed with the statistics of the perturbed
            samples alone. It is cheaper and gives slightly different numbers (docs/performance.md). An update takes
            full passes if a term has a single sample in a batch, or samples belong to several terms;
            ``train/full_passes`` logs the share of such updates in an epoch.
        interval: Number of updates from one perturbed update to the next, an integer >= 1. The first perturbed update
            is number ``interval``; the others are plain steps on the sum of the terms. Counted by ``global_step``.
        reuse: Factor alpha of LookSAM (Liu et al., CVPR 2022, arXiv:2203.02714), a finite number >= 0; None for plain
            steps between perturbed updates. Each of these steps adds the part of the last perturbed gradient that lies
            across the clean one, alpha times as long as the clean gradient, tensor by tensor. The first update is a
            perturbed one. Needs ``interval`` > 1.
        processes: Samples that a perturbation is computed from, if several processes share a batch. ``"global"``
            (default) takes the samples of all processes, as a single process would. ``"local"`` takes those of each
            process, which saves communication (Foret et al., ICLR 2021, section 4.1).
        on_nonfinite: Reaction to a loss or gradient that is infinite or NaN. ``"ignore"`` (default) passes it to the
            optimizer, as automatic optimization does. ``"skip"`` makes no update; the step counts, and
            ``skipped_updates`` and ``train/skipped_updates`` count the skips. ``"raise"`` raises
            :class:`~lightning_ssesam.engine.NonFiniteError`. Weights, buffers, random state and optimizer stay those
            from before the step. On an accelerator, ``"skip"`` and ``"raise"`` synchronise once a step. With
            ``precision="16-mixed"`` this option is not used, because the GradScaler skips such steps.
        log_sharpness: Whether to log more about each term: the norm of its gradient as ``train/grad_norm_{term}``, the
            rise of its loss under its perturbation as ``train/sharpness_{term}``, and the norm of the final gradient
            before clipping as ``train/grad_norm``. The terms are ``all``, or ``head`` and ``tail``. Between perturbed
            updates (``interval``) a logger repeats the last values. With ``batch_norm_statistics="group"``, terms that
            are not perturbed have no values.
        exact_resume: Whether checkpoints store the random state and the position in the data, so that a resumed run
            equals an uninterrupted one bit for bit (docs/trainer.md). Without it, runs resume as Lightning does.
        cuda_graphs: Whether to record the passes of an update as a CUDA graph and replay it: the same numbers in less
            time. Needs a GPU, full passes, and no random numbers (docs/performance.md).
        log_loss: Whether to log ``train/loss``, the mean loss at the unperturbed weights, also on the bar. What
            ``sample_losses`` logs is logged anyway.

    Raises:
        ArgumentError: If a value is out of range, ``"group"`` is combined with other passes than ``"split"``, or
            ``cuda_graphs`` with ``"split"``.

    Example:
        >>> StepOptions(passes="split", interval=2).interval
        2
    """

    passes: Literal["auto", "full", "split"] = "auto"
    batch_norm_statistics: Literal["batch", "group"] = "batch"
    interval: int = 1
    reuse: float | None = None
    processes: Literal["global", "local"] = "global"
    on_nonfinite: Literal["ignore", "skip", "raise"] = "ignore"
    log_sharpness: bool = False
    exact_resume: bool = True
    log_loss: bool = True
    cuda_graphs: bool = False

    def __post_init__(self) -> None:
        check_choice("passes", self.passes, ("auto", "full", "split"))
        check_choice("batch_norm_statistics", self.batch_norm_statistics, ("batch", "group"))
        check_integer("interval", self.interval, minimum=1)
        check_choice("processes", self.processes, ("global", "local"))
        check_choice("on_nonfinite", self.on_nonfinite, ("ignore", "skip", "raise"))
        check_flag("log_sharpness", self.log_sharpness)
        check_flag("exact_resume", self.exact_resume)
        check_flag("log_loss", self.log_loss)
        check_flag("cuda_graphs", self.cuda_graphs)
        if self.reuse is not None:
            check_radius("reuse", self.reuse)
            if self.interval == 1:
                raise bad_argument("interval", "an integer >= 2 with `reuse`, which acts between perturbed updates", 1)
        if self.batch_norm_statistics == "group" and self.passes != "split":
            raise ArgumentError(
                f"`batch_norm_statistics='group'` requires `passes='split'`, but `passes` is {self.passes!r}."
            )
        if self.cuda_graphs and self.passes == "split":
            expected = "'auto' or 'full' with `cuda_graphs=True`, which replays whole batches"
            raise bad_argument("passes", expected, "split")

    def perturbs(self, step_idx: int, can_reuse: bool) -> bool:
        """Return whether the update after ``step_idx`` others is a perturbed one.

        Args:
            step_idx: Number of updates so far, an integer >= 0.
            can_reuse: Whether a perturbed update has left something to reuse.
        """
        if self.reuse is None:
            return (step_idx + 1) % self.interval == 0
        return step_idx % self.interval == 0 or not can_reuse


# So that a checkpoint that holds the options as a hyperparameter loads with ``weights_only=True``.
torch.serialization.add_safe_globals([StepOptions])
