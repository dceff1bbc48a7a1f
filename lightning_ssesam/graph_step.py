"""The gradient of an update by a recording, and what a module must not have for that."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_ssesam.ascent import Momentum, Noise
from lightning_ssesam.batches import Part, takes_batch_idx
from lightning_ssesam.engine import MicroBatch, Outcome
from lightning_ssesam.errors import CaptureError, NonFiniteError
from lightning_ssesam.graphs import RECORDERS, Scene
from lightning_ssesam.layers import Layers, replays_by_itself
from lightning_ssesam.lightning_internals import watching_progress
from lightning_ssesam.norms import check_finite
from lightning_ssesam.plan import group_terms, plain_ratio
from lightning_ssesam.step_options import StepOptions
from lightning_ssesam.step_state import StepState
from lightning_ssesam.tensors import move, set_gradients
from lightning_ssesam.terms import Objective, Term
from lightning_ssesam.trainer_calls import callbacks_of, has_scaler
from lightning_ssesam.trees import others_of, tensors_of
from lightning_ssesam.weights import momentum_of

# What Lightning itself notes in a module changes in every step.
_HIDDEN = vars(pl.LightningModule()).keys() - vars(nn.Module()).keys()


class Input(NamedTuple):
    """What a recorded step gets of one part of the batch. Weights and mask are on the device."""

    batch: Any
    weights: list[Tensor]
    ignored: Tensor | None
    ascents: list[Any]


class GraphStep:
    """One update of a module, whose gradient comes from a recording where there is one.

    Args:
        module: The module.
        step: What the module keeps from step to step.
        layers: Its parameters and layers.
        trained: Parameters that are trained.
        checks_finite: Whether a loss or gradient that is not finite is an error.
    """

    def __init__(
        self, module: Any, step: StepState, layers: Layers, trained: list[Tensor], checks_finite: bool
    ) -> None:
        self._module, self._step, self._layers, self._checks_finite = module, step, layers, checks_finite
        self._device = module.trainer.strategy.root_device
        ascents = module.objective.ascents()
        along_momentum = any(isinstance(ascent.direction, Momentum) for ascent in ascents)
        params = [p for p in trained if p.requires_grad]
        self._scene = Scene(
            params,
            layers.modules,
            step.engine.states,
            [module.objective, *getattr(module.objective, "objectives", ()), step.counters],
            momentum_of(module.trainer.optimizers[0], params) if along_momentum else (),
            step.engine.scratch,
            _HIDDEN,
        )

    def compute(
        self,
        parts: Sequence[Part],
        terms: Sequence[Sequence[Term]],
        micro_batch: Callable[..., MicroBatch],
        compute: Callable[..., Outcome],
        kind: tuple[Any, ...],
    ) -> Outcome:
        """Leave in ``.grad`` the gradient of an update.

        Args:
            parts: Parts of the batch.
            terms: Terms of each part.
            micro_batch: Called with a part, its terms, its mask of ignored positions and the weights on the device.
            compute: Computes the gradient of micro-batches.
            kind: What the update depends on beside the values of tensors, hashable.

        Raises:
            MisconfigurationException: If the step cannot be recorded.
            NonFiniteError: If a loss or gradient is not finite.
        """
        step, counters = self._step, self._step.counters
        ignored = [self._module.objective.find_ignored(part.targets) for part in parts]
        inputs = [self._input(part, own, mask) for part, own, mask in zip(parts, terms, ignored, strict=True)]

        def batch_of(copies: Sequence[Input]) -> list[MicroBatch]:
            triples = zip(parts, terms, copies, strict=True)
            return [
                micro_batch(replace(part, batch=copy.batch), _with_ascents(own, copy), copy.ignored, copy.weights)
                for part, own, copy in triples
            ]

        def find(copies: Sequence[Input]) -> tuple[Outcome, Any]:
            # Not called for a replay, whose batch has the signature of one that was looked at here.
            self._check_batches([part.batch for part in parts])
            step.logs.clear()
            with watching_progress(self._module.trainer) as read:
                outcome = compute(batch_of(copies))
            if "global_step" in read:
                raise CaptureError("a step reads `global_step`, which would be the same in every replay")
            if "current_epoch" in read:
                counters.current_epoch = self._module.trainer.current_epoch
            return outcome, step.logs.calls

        if counters.current_epoch is not None:
            counters.current_epoch = self._module.trainer.current_epoch
        batch = batch_of(inputs)
        radii = tuple(term.rho for term in batch[0].terms)
        undo = step.engine.protect(self._layers) if self._checks_finite else None
        try:
            kind = (*kind, radii, plain_ratio(batch, group_terms(batch)))
            result: tuple[Outcome, Any] = step.graphs.run(find, inputs, kind, self._scene)
        except CaptureError as error:
            raise refusal(self._module, f"{error}. Leave `cuda_graphs` out, or change that") from error
        outcome, step.logs.calls = result
        if step.graphs.note is not None:
            rank_zero_warn(f"`cuda_graphs=True` makes every step as usual: {step.graphs.note}.")
            step.graphs.note = None
        if undo is not None:
            self._check(outcome, undo)
        return outcome

    def _check_batches(self, batches: list[Any]) -> None:
        strange = next(others_of(batches), None)
        if strange is not None:
            raise refusal(self._module, f"a batch holds a {type(strange).__name__}, whose tensors cannot be copied")
        if any(t.device.type != self._device.type for t in tensors_of(batches)):
            raise refusal(self._module, "a batch holds a tensor that is not on the GPU")

    def _input(self, part: Part, terms: Sequence[Term], ignored: Tensor | None) -> Input:
        weights = [move(term.weights, self._device) for term in terms]
        return Input(
            part.batch,
            weights,
            None if ignored is None else move(ignored, self._device),
            [term.ascent for term in terms],
        )

    def _check(self, outcome: Outcome, undo: Callable[[], None]) -> None:
        assert outcome.gradient_norm is not None
        try:
            check_finite(outcome.loss, outcome.gradient_norm)
        except NonFiniteError:
            undo()
            set_gradients(self._scene.parameters, None)
            raise


def _with_ascents(terms: Sequence[Term], given: Input) -> list[Term]:
    return [term._replace(ascent=ascent) for term, ascent in zip(terms, given.ascents, strict=True)]


def refusal(module: pl.LightningModule, reason: str) -> MisconfigurationException:
    """Return the error for a module that cannot train with ``cuda_graphs=True``."""
    return MisconfigurationException(f"`{type(module).__name__}` cannot train with `cuda_graphs=True`: {reason}.")


def check_graphs(module: pl.LightningModule, objective: Objective, options: StepOptions, trainer: pl.Trainer) -> None:
    """Refuse what cannot be recorded, as far as that is known before training."""
    device = trainer.strategy.root_device
    compiled = next((name for name, layer in module.named_modules() if replays_by_itself(layer)), None)
    if compiled is not None and device.type == "cuda":
        raise MisconfigurationException(
            f"`{type(module).__name__}.{compiled}` is compiled with CUDA graphs of its own (`mode='reduce-overhead'` or"
            " 'max-autotune'), which a second forward of the same step overwrites. Compile it in the default mode, and"
            " set `step_options = StepOptions(cuda_graphs=True)` to record the whole step."
        )
    if not options.cuda_graphs:
        return
    reason = next(_obstacles(module, objective, trainer), None)
    if reason is not None:
        raise refusal(module, reason)


def _obstacles(module: pl.LightningModule, objective: Objective, trainer: pl.Trainer) -> Iterator[str]:
    """Yield what cannot be recorded, each with a way out."""
    device = trainer.strategy.root_device
    if device.type not in RECORDERS:
        yield f"it needs an NVIDIA GPU, but the Trainer uses the device {str(device)!r}. Leave it out here"
    if trainer.world_size > 1:
        yield "it works in one process only. Train with `devices=1`, or leave it out"
    if has_scaler(trainer):
        yield "a GradScaler waits for the device in every step. Use `precision='bf16-mixed'`"
    for hook in ("on_before_backward", "on_after_backward"):
        owners = [module, *callbacks_of(trainer)]
        owner = next((o for o in owners if is_overridden(hook, o, _base_of(o))), None)
        if owner is not None:
            yield f"a replay does not call `{type(owner).__name__}.{hook}`. Use `on_before_optimizer_step`"
    if takes_batch_idx(module):
        yield "`sample_losses` has a parameter `batch_idx`, which would be the same in every replay. Remove it"
    if any(isinstance(ascent.direction, Noise) for ascent in objective.ascents()):
        yield "`Noise()` draws random numbers, and a replay would draw the same ones again. Use another direction"
    if any(p._backward_hooks for p in module.parameters()):
        yield "a replay does not call the hooks of parameters (`register_hook`). Remove them"


def _base_of(owner: Any) -> type:
    return pl.LightningModule if isinstance(owner, pl.LightningModule) else pl.Callback
