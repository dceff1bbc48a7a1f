"""What a module keeps from step to step of a run."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_ssesam.ascent_states import AscentStates
from lightning_ssesam.batches import HostTargets, Part
from lightning_ssesam.engine import SharpnessEngine
from lightning_ssesam.graphs import StepGraphs
from lightning_ssesam.step_logs import StepLogs


class Counters:
    """Counters of the Trainer that a step reads, as they are in the present step.

    Attributes:
        current_epoch: Number of the epoch; None if no step reads it.
    """

    current_epoch: int | None

    def __init__(self) -> None:
        self.current_epoch = None


class StepState:
    """Working memory of :class:`~lightning_ssesam.SharpnessAwareMixin`. Trainer support clears it when a run ends.

    Of all this, only the number of skipped updates is copied or pickled with the module.

    Attributes:
        graphs: Recordings of the steps.
        counters: Counters of the Trainer that a step reads.
        logs: Values that the clean passes of the current step have logged.
        host_targets: Targets of the current batch, as they were on the host.
        pending: Parts that wait for their update, where batches are accumulated.
        is_clean: Whether the current pass is a clean one; None outside of the passes.
        is_by_hand: Whether a training step is making its passes, and Lightning must not optimize.
        has_seen_batch: Whether the mixin's training step was called for the current batch.
        has_updated: Whether the optimizer has made a step in this run.
        skipped_updates: Number of updates that were skipped.
        loss_on_bar: Loss that the progress bar shows next.
        outer_dtype: Default dtype outside of the training step.
        ascents_before: What ascents kept before the step that is under way, or that has failed; None if there is none.
    """

    def __init__(self, skipped_updates: int = 0) -> None:
        self.engine = SharpnessEngine()
        self.graphs = StepGraphs()
        self.counters = Counters()
        self.logs = StepLogs()
        self.host_targets = HostTargets()
        self.pending: list[Part] = []
        self.is_clean: bool | None = None
        self.is_fitting = self.is_by_hand = self.has_seen_batch = self.has_updated = False
        self.skipped_updates = skipped_updates
        self.loss_on_bar: Tensor | None = None
        self.outer_dtype = torch.get_default_dtype()
        self.ascents_before: AscentStates | None = None

    @contextmanager
    def having(self, **values: bool | None) -> Iterator[None]:
        """Set attributes for a while."""
        before = {name: getattr(self, name) for name in values}
        vars(self).update(values)
        try:
            yield
        finally:
            vars(self).update(before)

    def begin(self) -> None:
        """Called when a fit begins."""
        self.is_fitting, self.has_updated, self.pending, self.logs = True, False, [], StepLogs()
        self.engine.begin()
        self.counters = Counters()
        self.ascents_before = None

    def end(self) -> None:
        """Called when a fit has ended, or was interrupted: keep no data of it."""
        self.is_fitting, self.pending = False, []
        self.host_targets.forget()
        self.loss_on_bar = None
        self.engine.release()
        self.graphs.release()

    def __reduce__(self) -> tuple[Callable[[int], "StepState"], tuple[int]]:
        return StepState, (self.skipped_updates,)
