"""What a step changes and has to put back: weights, buffers, random state."""

import operator
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from typing_extensions import override

Buffers = dict[str, Tensor | None]


class Snapshot:
    """Copies of tensors, to be written back bit for bit. The next ``save`` uses the same memory again."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._copies: list[Tensor] = []
        self._originals: list[Tensor] = []

    @torch.no_grad()
    def save(self, tensors: list[Tensor]) -> None:
        """Copy the tensors."""
        self.forget()
        if not self._has_room_for(tensors):
            self._copies = [torch.empty_like(t) for t in tensors]
        self._originals = tensors
        if tensors:
            torch._foreach_copy_(self._copies, tensors)
        self._tensors = tensors

    def _has_room_for(self, tensors: list[Tensor]) -> bool:
        """Return whether the copies can hold the values of these tensors; most often they are the ones of before."""
        if len(tensors) != len(self._copies) or any(t.dtype is not c.dtype for t, c in self._pairs(tensors)):
            return False
        are_same = all(map(operator.is_, tensors, self._originals))
        return are_same or all(t.shape == c.shape and t.device == c.device for t, c in self._pairs(tensors))

    def _pairs(self, tensors: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(tensors, self._copies, strict=True)

    @torch.no_grad()
    def restore(self) -> None:
        """Write the copies back, if there are any since the last :meth:`forget`."""
        if self._tensors:
            torch._foreach_copy_(self._tensors, self._copies)
            torch.clear_autocast_cache()

    @property
    def memory(self) -> list[Tensor]:
        """The copies themselves."""
        return self._copies

    def copies(self) -> dict[tuple[int, torch.Size], Tensor]:
        """Return clones of the copies, by the memory of their originals."""
        pairs = self._pairs(self._tensors) if self._tensors else ()
        return {(t.data_ptr(), t.shape): copy.clone() for t, copy in pairs}

    def differs(self) -> bool:
        """Return whether a tensor has another value than when it was saved."""
        return not all(torch.equal(t, c) for t, c in self._pairs(self._tensors))

    def forget(self) -> None:
        """Discard the saved values but keep the allocated memory."""
        self._tensors = []


class BufferSnapshot(Snapshot):
    """Snapshot of buffers. A layer may replace a buffer by a new tensor, so bindings are restored as well as values."""

    def __init__(self) -> None:
        super().__init__()
        self._bindings: list[tuple[Buffers, Buffers]] = []
        self._versions: list[int] = []

    def save_buffers(self, buffers: list[Buffers]) -> None:
        """Copy the tensors in the dictionaries, and note which tensor each name is bound to."""
        tensors = [t for names in buffers for t in names.values() if t is not None]
        try:
            tensors = [t for t in tensors if t.is_contiguous() or not overlaps_itself(t)]
        except ValueError:
            # Lazy modules make their buffers in the first forward.
            tensors = [t for t in tensors if not is_lazy(t) and not overlaps_itself(t)]
        self.save(tensors)
        self._versions = [t._version for t in self._tensors]
        self._bindings = [(names, dict(names.items())) for names in buffers]

    @override
    def restore(self) -> None:
        for names, saved in self._bindings:
            rebind(names, saved)
        super().restore()
        self._versions = [t._version for t in self._tensors]

    def has_moved(self) -> bool:
        """Return whether a buffer is another tensor than when it was saved, or was written to. Looks at no values."""
        return self._is_rebound() or any(t._version != v for t, v in zip(self._tensors, self._versions, strict=True))

    @override
    def differs(self) -> bool:
        return self._is_rebound() or super().differs()

    def _is_rebound(self) -> bool:
        return any(names[name] is not t for names, saved in self._bindings for name, t in saved.items())

    @override
    def forget(self) -> None:
        super().forget()
        self._bindings = []


def rebind(names: Buffers, saved: Buffers) -> None:
    """Bind names to the tensors that they had. The buffers of TorchScript are no dictionary, and have no `update`."""
    for name, tensor in saved.items():
        if name not in names or names[name] is not tensor:
            names[name] = tensor


def buffers_of(modules: Iterable[nn.Module]) -> list[Buffers]:
    """Return the dictionaries in which modules keep their own buffers."""
    # `named_buffers` gives no access to the bindings, which a layer may change and a restore has to undo.
    return [module._buffers for module in modules if module._buffers]


def overlaps_itself(tensor: Tensor) -> bool:
    """Return whether elements of a tensor share memory."""
    # An expanded buffer cannot be written to, neither by a layer nor by a restore.
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def torch_random_state(device: torch.device) -> list[Tensor]:
    """Return the state of torch's random number generators: of the CPU, and of the GPU if ``device`` is one.

    While a CUDA graph is captured, that of the GPU cannot be read and is left out: what is captured draws nothing.
    """
    has_own = device.type == "cuda" and not torch.cuda.is_current_stream_capturing()
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if has_own else [])]


def set_torch_random_state(states: list[Tensor], device: torch.device) -> None:
    """Put back the state that :func:`torch_random_state` returned."""
    torch.set_rng_state(states[0])
    if device.type == "cuda" and len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)
