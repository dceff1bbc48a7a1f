"""Millions of texts without millions of Python objects."""

import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import torch
from torch import Tensor
from typing_extensions import override

# Texts whose bounds are numbers of Python at a time.
_PART = 2**16


class PackedTexts(Sequence[str]):
    """Texts in one buffer, such as the paths of the images of a data set.

    A list of texts takes about 100 bytes a text beside its characters. A forked worker of a loader copies all of them,
    because Python counts references inside the objects. Here a text takes its characters and 16 bytes. Workers share
    them: pages are not copied, and a worker that is spawned maps the same memory.

    Args:
        buffer: Bytes of the texts, uint8.
        starts: Place of the first byte of each text, ``(N,)``, int64.
        ends: Place behind the last byte of each text, ``(N,)``, int64.
    """

    def __init__(self, buffer: Tensor, starts: Tensor, ends: Tensor) -> None:
        self._buffer, self._starts, self._ends = buffer, starts, ends

    @classmethod
    def pack(cls, texts: Iterable[str]) -> "PackedTexts":
        """Return texts as they are, in one buffer. File names that are not UTF-8 are kept.

        Args:
            texts: Texts, taken one by one.
        """
        content, ends = bytearray(), array("q", [0])
        for text in texts:
            content += os.fsencode(text)
            ends.append(len(content))
        bounds = torch.frombuffer(ends, dtype=torch.int64)
        buffer = torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
        return cls(buffer, bounds[:-1], bounds[1:])

    def take(self, indices: Tensor) -> "PackedTexts":
        """Return some of the texts, which stay in the same buffer.

        Args:
            indices: Indices of the texts, ``(M,)``, int64.
        """
        return PackedTexts(self._buffer, self._starts[indices], self._ends[indices])

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...

    @override
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return self.take(torch.arange(len(self))[index])
        return os.fsdecode(self._buffer[int(self._starts[index]) : int(self._ends[index])].numpy().tobytes())

    @override
    def __iter__(self) -> Iterator[str]:
        content = self._buffer.numpy().data
        # In parts, because a list of all bounds would be as large as the texts.
        for starts, ends in zip(torch.split(self._starts, _PART), torch.split(self._ends, _PART), strict=True):
            for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
                yield os.fsdecode(bytes(content[start:end]))
