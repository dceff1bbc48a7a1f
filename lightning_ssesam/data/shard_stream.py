"""The samples of tar shards as a stream that knows its position, and a loader that goes on from there."""

import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from typing_extensions import override

from lightning_ssesam.data.images import Transform
from lightning_ssesam.data.reading import MAX_PIXELS, image_endings, read_image, shown
from lightning_ssesam.data.shard_index import Shard, read_label
from lightning_ssesam.data.shard_plan import Span, find_spans, share_of_process, share_of_worker
from lightning_ssesam.errors import ArgumentError


class Shuffling(NamedTuple):
    """How samples are shuffled: the seed of the draws, and how many samples each worker holds to draw from."""

    seed: int
    buffer: int


class Division(NamedTuple):
    """How an epoch is divided: the rank of this process, the number of processes, and the size of its batches."""

    rank: int = 0
    processes: int = 1
    batch_size: int = 1


class ShardImages(IterableDataset[tuple[Any, Any]]):
    """Pairs of a transformed image and its label, from shards, each once in an epoch.

    Attributes:
        class_counts: Images of each class in the shards, length C.

    Args:
        shards: Shards of the set, in order.
        num_classes: C.
        transform: Transform from a PIL image in RGB to an element of a batch.
        max_pixels: Pixels of the largest image that is read; None for no limit.
        shuffling: How the samples are shuffled; None for the order of the shards.
        division: Which part of the epoch this process has.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        num_classes: int,
        transform: Transform,
        max_pixels: int | None = MAX_PIXELS,
        shuffling: Shuffling | None = None,
        division: Division | None = None,
    ) -> None:
        self.shards, self.num_classes, self.transform = shards, num_classes, transform
        self.max_pixels, self.shuffling, self.division = max_pixels, shuffling, division or Division()
        self.class_counts = [sum(shard.counts.get(label, 0) for shard in shards) for label in range(num_classes)]
        self._epoch, self._done = 0, 0

    def divided(self, division: Division) -> "ShardImages":
        """Return the part of a process."""
        return ShardImages(self.shards, self.num_classes, self.transform, self.max_pixels, self.shuffling, division)

    def begin(self, epoch: int, batches: int) -> None:
        """Set what the next iterators yield: an epoch, counted from 0, without its first batches."""
        self._epoch, self._done = epoch, batches

    def __len__(self) -> int:
        start, stop = self._share()
        return stop - start

    def _share(self) -> tuple[int, int]:
        samples = sum(shard.number for shard in self.shards)
        return share_of_process(samples, self.division.rank, self.division.processes)

    @override
    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        info = get_worker_info()
        number, workers = (0, 1) if info is None else (info.id, info.num_workers)
        # Not in a generator, which would look for the position later.
        epoch, done = self._epoch, self._done
        # The loader begins with its first worker, so that one takes the turn that comes next.
        worker = (number + done) % workers
        start, stop = share_of_worker(len(self), self.division.batch_size, worker, workers)
        left_out = len(range(worker, done, workers)) * self.division.batch_size
        first = self._share()[0]
        return self._samples(epoch, worker, (first + start, first + stop), left_out)

    def _samples(self, epoch: int, worker: int, share: tuple[int, int], left_out: int) -> Iterator[tuple[Any, Any]]:
        draws = None
        shards = list(self.shards)
        if self.shuffling is not None:
            # All processes have the shards in the same order.
            random.Random(f"{self.shuffling.seed} {epoch}").shuffle(shards)
            draws = random.Random(f"{self.shuffling.seed} {epoch} {self.division.rank} {worker}")
        samples: Iterator[Any] = chain.from_iterable(map(read_span, find_spans(shards, *share)))
        if draws is not None and self.shuffling is not None:
            from webdataset.filters import shuffle

            samples = shuffle(self.shuffling.buffer, initial=self.shuffling.buffer, rng=draws)(samples)
        seeds = random.Random(f"{self.shuffling} {epoch} {self.division.rank} {worker} seeds")
        for number, sample in enumerate(samples):
            seed = seeds.getrandbits(64)
            if number >= left_out:
                if draws is not None and get_worker_info() is not None:
                    _set_seed(seed)
                yield self._decoded(sample)

    def _decoded(self, sample: Mapping[str, Any]) -> tuple[Any, Any]:
        place = f"{shown(sample['__url__'])}: {sample['__key__']}"
        pictures = [name for name in sample if f".{name}" in image_endings()]
        if len(pictures) != 1 or "cls" not in sample:
            found = ", ".join(sorted(name for name in sample if not name.startswith("__"))) or "nothing"
            raise ArgumentError(f"Expected {place} to be one picture with a .cls file, but got {found}.")
        label = read_label(sample["cls"], place)
        if label >= self.num_classes:
            raise ArgumentError(f"Expected the label of {place} to be in [0, {self.num_classes}), but got {label}.")
        return self.transform(read_image(place, self.max_pixels, sample[pictures[0]])), label


def read_span(span: Span) -> Iterator[Mapping[str, Any]]:
    """Yield samples of a shard as webdataset has them: the content of each file by its ending.

    Raises:
        ArgumentError: If the shard is damaged, or has another number of samples than its index says.
    """
    from webdataset.tariterators import group_by_keys, tar_file_expander

    shard, number, last = span.shard, 0, ""
    try:
        with open(shard.path, "rb") as stream:
            for sample in group_by_keys(tar_file_expander([{"url": shard.path, "stream": stream}])):
                last = f", behind the sample {sample['__key__']}"
                number += 1
                if span.start < number <= span.stop:
                    yield sample
                # Behind the last one, the shard has to end.
                if number == span.stop < shard.number:
                    return
    except Exception as error:
        # webdataset and tarfile raise almost any kind of exception for a damaged file.
        text = " ".join(str(error).split())[:200] or type(error).__name__
        expected = f"Expected {shown(shard.path)} to be a whole tar file"
        raise ArgumentError(f"{expected}, but got an error{last}: {text}") from error
    if number != shard.number:
        expected = f"Expected {shown(shard.path)} to have {shard.number} samples, as its index says"
        raise ArgumentError(f"{expected}, but got {number}. If it is whole, index it again.")


def _set_seed(seed: int) -> None:
    """Seed what transforms draw from, in a worker. So the draws of a sample do not depend on those before it."""
    # Not `torch.manual_seed`, which would also keep a call for each CUDA device.
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


class _Position:
    """Where a loader is: the epoch, its batches that were handed out, and those that the next iterator leaves out."""

    def __init__(self) -> None:
        self.epoch, self.batches, self.left_out = 0, 0, 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iterator, which begins anew if that is not the epoch of a loaded position."""
        if epoch != self.epoch:
            self.epoch, self.left_out = epoch, 0


class ShardLoader(DataLoader[Any]):
    """A loader of shards that a Trainer tells the epoch, and that goes on from its position in the middle of one."""

    dataset: ShardImages

    def __init__(self, dataset: ShardImages, **options: Any) -> None:
        super().__init__(dataset, **options)
        self._position = _Position()
        # Lightning tells it to samplers, not to loaders: `_set_sampler_epoch` in lightning/fabric/utilities/data.py. A
        # method of the loader would make a circle of references. Workers of loaders in circles end by a timeout.
        self.sampler.set_epoch = self._position.set_epoch  # type: ignore[attr-defined]

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the next epoch, counted from 0, on which the order depends."""
        self._position.set_epoch(epoch)

    @override
    def __iter__(self) -> Any:
        position = self._position
        position.batches, position.left_out = position.left_out, 0
        self.dataset.begin(position.epoch, position.batches)
        return _count(super().__iter__(), position)

    def state_dict(self) -> dict[str, Any]:
        """Return the position: the epoch and its batches that were handed out, and how the epoch is divided."""
        return {"epoch": self._position.epoch, "batches": self._position.batches, **self._division()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next iterator go on from a position. With another division of the epoch, it begins the epoch anew."""
        here, epoch, batches = self._division(), int(state["epoch"]), int(state["batches"])
        if changed := [name for name, value in here.items() if state.get(name) != value]:
            before, now = ({name: source.get(name) for name in changed} for source in (state, here))
            rank_zero_warn(
                f"The shards are read with {now}, and were read with {before} when the checkpoint was written. So the"
                " samples of this epoch come in another order, and some of them may come twice."
            )
            batches = 0
        elif batches >= len(self):
            epoch, batches = epoch + 1, 0
        self._position.epoch, self._position.left_out, self._position.batches = epoch, batches, batches

    def _division(self) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "batch_size": self.batch_size,
            "processes": self.dataset.division.processes,
        }


def _count(batches: Iterator[Any], position: _Position) -> Iterator[Any]:
    for batch in batches:
        position.batches += 1
        yield batch
