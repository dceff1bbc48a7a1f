"""What a step changes and has to put back: weights, buffers, random state."""

from typing import Any

import torch
from torch import Tensor

Buffers = dict[str, Tensor | None]


class Snapshot:
    """Copies of tensors, to be written back bit for bit. The storage is used again by the next ``save``."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._copies: list[Tensor] = []

    @torch.no_grad()
    def save(self, tensors: list[Tensor]) -> None:
        """Copy the tensors."""
        self.forget()
        if [_layout(t) for t in tensors] != [_layout(c) for c in self._copies]:
            self._copies = [torch.empty_like(t) for t in tensors]
        if tensors:
            torch._foreach_copy_(self._copies, tensors)
        self._tensors = tensors

    @torch.no_grad()
    def restore(self) -> None:
        """Write the copies back, if there are any since the last :meth:`forget`."""
        if self._tensors:
            torch._foreach_copy_(self._tensors, self._copies)
            torch.clear_autocast_cache()

    def copies(self) -> dict[tuple[int, torch.Size], Tensor]:
        """Return clones of the copies, by the memory of their originals."""
        pairs = zip(self._tensors, self._copies, strict=True) if self._tensors else ()
        return {(t.data_ptr(), t.shape): copy.clone() for t, copy in pairs}

    def differs(self) -> bool:
        """Whether a tensor has another value than when it was saved."""
        return not all(torch.equal(t, c) for t, c in zip(self._tensors, self._copies, strict=True))

    def forget(self) -> None:
        """Have nothing to write back; keep the storage."""
        self._tensors = []


class BufferSnapshot:
    """The same for buffers, which a layer may also replace by other tensors."""

    def __init__(self) -> None:
        self._values = Snapshot()
        self._bindings: list[tuple[Buffers, Buffers]] = []

    def save(self, buffers: list[Buffers]) -> None:
        """Copy what is in the dictionaries."""
        self._values.save([t for of in buffers for t in of.values() if t is not None and not _overlaps_itself(t)])
        self._bindings = [(of, dict(of)) for of in buffers]

    def restore(self) -> None:
        """Put the buffers back, and their values."""
        for of, saved in self._bindings:
            of.update(saved)
        self._values.restore()

    def copies(self) -> dict[tuple[int, torch.Size], Tensor]:
        """Return clones of the copies, by the memory of their originals."""
        return self._values.copies()

    def differs(self) -> bool:
        """Whether a buffer is another tensor, or has another value, than when it was saved."""
        rebound = any(of[name] is not t for of, saved in self._bindings for name, t in saved.items())
        return rebound or self._values.differs()

    def any(self) -> bool:
        """Whether there is any buffer."""
        return any(t is not None for _, saved in self._bindings for t in saved.values())

    def forget(self) -> None:
        """Have nothing to put back; keep the storage."""
        self._values.forget()
        self._bindings = []


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _overlaps_itself(tensor: Tensor) -> bool:
    # An expanded buffer cannot be written to, by a layer or by us.
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def torch_random_state(device: torch.device) -> list[Tensor]:
    """Return the state of torch's random number generators, of the CPU and of a GPU that is in use."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def set_torch_random_state(states: list[Tensor], device: torch.device) -> None:
    """Put back what :func:`torch_random_state` returned."""
    torch.set_rng_state(states[0])
    if device.type == "cuda" and len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)
