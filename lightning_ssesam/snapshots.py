"""What a step changes and has to put back: weights, buffers, random state."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from typing_extensions import override

from lightning_ssesam.layers import Buffers, Contents


class Snapshot:
    """Copies of tensors, to be written back bit for bit. The next ``save`` uses the same memory again."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._copies: list[Tensor] = []
        self._originals: list[Tensor] = []
        self._dtypes: list[torch.dtype] = []
        self._kinds: list[tuple[list[Tensor], list[Tensor]]] = []

    @torch.no_grad()
    def save(self, tensors: list[Tensor]) -> None:
        """Copy the tensors."""
        self.forget()
        are_same = tensors is self._originals or list(map(id, tensors)) == list(map(id, self._originals))
        dtypes = [t.dtype for t in tensors]
        if not (dtypes == self._dtypes and (are_same or self._has_room_for(tensors))):
            self._copies, self._dtypes, are_same = [torch.empty_like(t) for t in tensors], dtypes, False
        if not are_same:
            self._originals, self._kinds = tensors, _by_kind(tensors, self._copies)
        for originals, copies in self._kinds:
            torch._foreach_copy_(copies, originals)
        self._tensors = tensors

    def _has_room_for(self, tensors: list[Tensor]) -> bool:
        """Return whether the copies can hold the values of other tensors of the same dtypes."""
        return all(t.shape == c.shape and t.device == c.device for t, c in zip(tensors, self._copies, strict=True))

    @torch.no_grad()
    def restore(self) -> None:
        """Write the copies back, if there are any since the last :meth:`forget`."""
        if self._tensors:
            for originals, copies in self._kinds:
                torch._foreach_copy_(originals, copies)
            torch.clear_autocast_cache()

    @property
    def memory(self) -> list[Tensor]:
        """The copies themselves."""
        return self._copies

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self._tensors, self._copies if self._tensors else (), strict=True)

    def copies(self) -> dict[tuple[int, torch.Size], Tensor]:
        """Return clones of the copies, by the memory of their originals."""
        return {(t.data_ptr(), t.shape): copy.clone() for t, copy in self._pairs()}

    def differs(self) -> bool:
        """Return whether a tensor has another value than when it was saved."""
        return not all(torch.equal(t, c) for t, c in self._pairs())

    def forget(self) -> None:
        """Discard the saved values but keep the allocated memory."""
        self._tensors = []


def _by_kind(tensors: list[Tensor], copies: list[Tensor]) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Return tensors and their copies, those of each dtype and device together."""
    # On a GPU torch copies a list at once (ForeachBinaryOpList.cu), but one by one if its dtypes or devices differ.
    kinds: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], list[Tensor]]] = {}
    for tensor, copy in zip(tensors, copies, strict=True):
        originals, copies_of_kind = kinds.setdefault((tensor.dtype, tensor.device), ([], []))
        originals.append(tensor)
        copies_of_kind.append(copy)
    return list(kinds.values())


class BufferSnapshot(Snapshot):
    """Snapshot of buffers. A layer may replace a buffer by a new tensor, so bindings are restored as well as values."""

    def __init__(self) -> None:
        super().__init__()
        # What was found of the buffers, as long as the names are bound to the same tensors.
        self._bound: Contents | None = None
        self._bindings: list[tuple[Buffers, Buffers]] = []
        self._writable: list[Tensor] = []
        self._is_saved = False
        self._versions: list[int] = []

    def save_buffers(self, buffers: list[Buffers]) -> None:
        """Copy the tensors in the dictionaries, and note which tensor each name is bound to."""
        if self._bound is None or not self._bound.are_in(buffers):
            found = [t for names in buffers for t in names.values() if t is not None]
            # Lazy modules make their buffers in the first forward.
            made = [t for t in found if not is_lazy(t)]
            self._bound = Contents(buffers) if len(made) == len(found) else None
            self._bindings = [(names, dict(names.items())) for names in buffers]
            self._writable = [t for t in made if t.is_contiguous() or not overlaps_itself(t)]
        self.save(self._writable)
        self._is_saved, self._versions = True, [t._version for t in self._tensors]

    @override
    def restore(self) -> None:
        if self._is_saved and not self._has_same_names():
            for names, saved in self._bindings:
                rebind(names, saved)
        super().restore()
        self._versions = [t._version for t in self._tensors]

    def has_moved(self) -> bool:
        """Return whether a buffer is another tensor than when it was saved, or was written to. Looks at no values."""
        return self._is_rebound() or [t._version for t in self._tensors] != self._versions

    @override
    def differs(self) -> bool:
        return self._is_rebound() or super().differs()

    def _has_same_names(self) -> bool:
        """Return whether the names are those that were saved, and bound to the same tensors."""
        return self._bound is not None and self._bound.are_in([names for names, _ in self._bindings])

    def _is_rebound(self) -> bool:
        if not self._is_saved or self._has_same_names():
            return False
        return any(names[name] is not t for names, saved in self._bindings for name, t in saved.items())

    @override
    def forget(self) -> None:
        super().forget()
        self._is_saved = False


def rebind(names: Buffers, saved: Buffers) -> None:
    """Bind names to the tensors that they had. The buffers of TorchScript are no dictionary, and have no `update`."""
    for name, tensor in saved.items():
        if name not in names or names[name] is not tensor:
            names[name] = tensor


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
