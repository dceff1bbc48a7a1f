"""Steps that are recorded once and replayed: the calls of a step take no time on the host any more. Needs torch only.

A recording reads and writes the memory that it was made with. So what goes into a step is copied into tensors of the
recording's, what comes out is copied out of them, and weights, buffers and gradients stay where they are. What Python
code does in a step is not done again; :class:`~lightning_ssesam.graph_guard.Guard` knows what it depends on.
"""

import warnings
from collections.abc import Callable, Container, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_ssesam.ascent_states import AscentStates
from lightning_ssesam.errors import CaptureError
from lightning_ssesam.forward_state import generators_before
from lightning_ssesam.graph_guard import Guard
from lightning_ssesam.tensors import Gradients, gradients_of, set_gradients
from lightning_ssesam.trees import mapped, others_of, signature, tensors_of

# Steps that are made as usual before one is recorded: they make what has to be there, such as scratch memory, and show
# whether a step can be recorded. The number is the one of torch's examples.
WARM_UP = 3
# Recordings that are kept at a time: stages, plain steps between perturbed ones, a last batch that is smaller.
_MOST = 8
# Replays that are worth a recording, which takes as long as several steps.
_WORTH = 20
# Steps in a row that nobody could record or replay, until that is worth a message.
_PATIENCE = 100


class Recorder(Protocol):
    """Records what a function does on a device."""

    def apart(self, is_strict: bool) -> AbstractContextManager[None]:
        """Return a context in which a step is made as usual, where recordings are made. Strict ones refuse to wait."""

    def record(self, function: Callable[[Any], Any], inputs: Any) -> tuple[Any, Callable[[], None]]:
        """Record a function of some inputs, without an effect. Return its result, and a function that replays it."""


class CUDARecorder(Recorder):
    """Records CUDA graphs, all of them in the same memory.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    @override
    @contextmanager
    def apart(self, is_strict: bool) -> Iterator[None]:
        # Nodes that accumulate gradients belong to the stream of their first use, which must be the recorded one.
        outside, mode = torch.cuda.current_stream(self._device), torch.cuda.get_sync_debug_mode()
        self._stream.wait_stream(outside)
        if is_strict:
            with warnings.catch_warnings():
                # Torch says that the mode does not find every wait.
                warnings.simplefilter("ignore")
                torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            outside.wait_stream(self._stream)

    @override
    def record(self, function: Callable[[Any], Any], inputs: Any) -> tuple[Any, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on meanwhile, such as the one that pins the next batch.
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            result = function(inputs)
        return result, graph.replay


RECORDERS: dict[str, Callable[[torch.device], Recorder]] = {"cuda": CUDARecorder}
"""What records on which type of device."""


class Scene(NamedTuple):
    """What a step depends on and changes, beside its inputs.

    Args:
        parameters: Parameters that get a gradient.
        modules: All modules of the model.
        states: What ascents keep from step to step.
        others: Further objects that it reads numbers from, such as the objective.
        tensors: Further tensors that it reads, such as the optimizer's momentum.
        scratch: Memory that it writes to, and that a recording keeps.
        hidden: Names of attributes that it does not depend on.
    """

    parameters: list[Tensor]
    modules: list[nn.Module]
    states: AscentStates
    others: Sequence[Any] = ()
    tensors: Sequence[Tensor | None] = ()
    scratch: Sequence[list[Tensor]] = ()
    hidden: Container[str] = ()

    @property
    def device(self) -> torch.device:
        """The device of the first parameter."""
        return self.parameters[0].device

    def change(self, before: "Scene") -> str | None:
        """Return what another scene of the same training had otherwise, in words; None if nothing."""
        if self.modules != before.modules or list(map(id, self.parameters)) != list(map(id, before.parameters)):
            return "the list of layers or of trained parameters"
        if list(map(_place, self.tensors)) != list(map(_place, before.tensors)):
            return "the memory of the optimizer's momentum"
        return None


@dataclass(eq=False)
class _Recording:
    """One recorded step, with the memory that it reads and writes."""

    replay: Callable[[], None]
    guard: Guard
    inputs: list[Tensor]
    states_before: list[Tensor]
    states_after: dict[str, Any]
    result: Any
    gradients: Gradients
    scene: "Scene"
    # Things that the signature knows by their place in memory, so that no others take it.
    kept: list[Any]
    # Number of the step that used it last.
    last_use: int = 0


class StepGraphs:
    """Records the steps of a training, one recording for each kind of step, and replays them.

    Attributes:
        note: Why steps are not replayed, if that has been found out just now.
    """

    def __init__(self) -> None:
        self.release()

    def release(self) -> None:
        """Free all recordings."""
        self._recordings: dict[Hashable, _Recording] = {}
        self._recorder: Recorder | None = None
        self._seen: dict[Hashable, int] = {}
        self._steps, self._steps_in_vain, self._replays, self._changes, self._last_change = 0, 0, 0, 0, ""
        self.note: str | None = None

    def run(self, function: Callable[[Any], Any], inputs: Any, kind: Hashable, scene: Scene) -> Any:
        """Make a step: as usual at first, later by a replay.

        Args:
            function: Called with the inputs, or with copies of them. Leaves the gradients in ``.grad``. It is recorded.
            inputs: Tensors in tuples, lists, mappings and dataclasses.
            kind: What a step depends on beside the values of tensors, hashable.
            scene: What else it depends on.

        Returns:
            What the function has returned; after a replay, copies of its tensors.

        Raises:
            CaptureError: If the step cannot be recorded.
        """
        key = kind, signature(inputs), signature(scene.states.held)
        self._steps += 1
        recording = self._recordings.get(key)
        if recording is not None and (change := self._change(recording, scene)) is not None:
            self._forget(change)
            recording = None
        if recording is not None:
            return self._replay(recording, inputs, scene)
        count = self._seen[key] = self._seen.get(key, 0) + 1
        if count <= WARM_UP or self._changes > _MOST or not self._has_room():
            self._count_in_vain()
            with nullcontext() if count > WARM_UP else self._warming_up(scene, is_strict=count == WARM_UP):
                return function(inputs)
        return self._replay(self._record(function, inputs, key, scene), inputs, scene)

    @contextmanager
    def _warming_up(self, scene: Scene, is_strict: bool) -> Iterator[None]:
        """Find out in a step that is made as usual whether it can be recorded."""
        before = generators_before(scene.modules, scene.device)
        try:
            with self._recorder_on(scene.device).apart(is_strict):
                yield
        except RuntimeError as error:
            if is_strict and "synchroniz" in str(error):
                raise CaptureError(f"a step waits for the device ({error})") from error
            raise
        if before.used_generators():
            raise CaptureError("a step draws random numbers (dropout), and a replay would draw the same ones again")

    def _record(self, function: Callable[[Any], Any], inputs: Any, key: Hashable, scene: Scene) -> _Recording:
        """Record a step on copies of its inputs."""
        copies, held, before = mapped(lambda t: t.detach().clone(), inputs), scene.states.held, scene.states.copy()
        states = [t.clone() for t in tensors_of(held)]
        _rebind(held, states)
        seen = scene.modules, scene.others, scene.hidden
        guard, strict = Guard(*seen), Guard(*seen, is_strict=True)
        torch.clear_autocast_cache()
        try:
            result, replay = self._recorder_on(scene.device).record(function, copies)
        except RuntimeError as error:
            raise CaptureError(f"a step cannot be recorded ({_first_line(error)})") from error
        finally:
            # Low-precision copies of the weights that lie in the memory of the recording.
            torch.clear_autocast_cache()
        if (change := strict.change()) is not None:
            raise CaptureError(f"a step changes {change}, which a replay would not do")
        recording = _Recording(
            replay,
            guard,
            tensors_of(copies),
            states,
            scene.states.held,
            result,
            gradients_of(scene.parameters),
            scene,
            list(others_of(inputs)),
        )
        scene.states.become(before)
        # Those of an earlier stage take memory in vain.
        self._recordings = {k: r for k, r in self._recordings.items() if self._change(r, scene) is None}
        self._recordings[key] = recording
        return recording

    def _has_room(self) -> bool:
        """Return whether there may be one recording more. One that was not used lately makes room."""
        if len(self._recordings) < _MOST:
            return True
        key, oldest = min(self._recordings.items(), key=lambda item: item[1].last_use)
        if self._steps - oldest.last_use < _PATIENCE:
            return False
        del self._recordings[key]
        return True

    @torch.no_grad()
    def _replay(self, recording: _Recording, inputs: Any, scene: Scene) -> Any:
        """Replay a step with other inputs."""
        self._steps_in_vain, self._replays, recording.last_use = 0, self._replays + 1, self._steps
        held = scene.states.held
        sources = [*tensors_of(inputs), *tensors_of(held)]
        if sources:
            torch._foreach_copy_([*recording.inputs, *recording.states_before], sources, non_blocking=True)
        # The states before the step must not lie in memory that the step writes to.
        _rebind(held, recording.states_before)
        recording.replay()
        scene.states.hold(mapped(lambda t: t, recording.states_after))
        set_gradients(scene.parameters, recording.gradients)
        return mapped(torch.clone, recording.result)

    def _change(self, recording: _Recording, scene: Scene) -> str | None:
        return scene.change(recording.scene) or recording.guard.change()

    def _forget(self, change: str) -> None:
        """Throw all recordings away, since something has changed."""
        self._recordings, self._seen = {}, {}
        # Torch frees the memory that recordings share with the last of them, unless a state lies in it.
        self._recorder = None
        self._changes = 1 if self._replays >= _WORTH else self._changes + 1
        self._replays, self._last_change = 0, change

    def _count_in_vain(self) -> None:
        self._steps_in_vain += 1
        if self._steps_in_vain == _PATIENCE:
            self.note = "no two steps are alike, so that none is replayed"
            if self._last_change:
                self.note = f"{self._last_change} changes again and again. If no step reads it, keep it in a callback"
        if len(self._seen) > 10 * _PATIENCE:
            self._seen = {}

    def _recorder_on(self, device: torch.device) -> Recorder:
        if self._recorder is None:
            self._recorder = RECORDERS[device.type](device)
        return self._recorder


def _first_line(error: BaseException) -> str:
    """Return the first line of the error that others have followed, since a failed recording fails again as it ends."""
    while isinstance(error.__context__, RuntimeError):
        error = error.__context__
    return str(error).partition("\n")[0]


def _place(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _rebind(held: dict[str, Any], tensors: list[Tensor]) -> None:
    """Replace the tensors in states, in place."""
    following = iter(tensors)
    for state in held.values():
        state.update(mapped(lambda _: next(following), state))
