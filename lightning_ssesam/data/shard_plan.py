"""Which samples of an epoch each process reads from which shards, so that every sample comes once."""

from collections.abc import Iterator, Sequence
from math import ceil
from typing import NamedTuple

from lightning_ssesam.data.shard_index import Shard


class Span(NamedTuple):
    """Samples of a shard, from ``start`` to before ``stop``, counted from 0."""

    shard: Shard
    start: int
    stop: int


def find_spans(shards: Sequence[Shard], start: int, stop: int) -> Iterator[Span]:
    """Yield where some samples of an epoch are. Behind the last sample of all shards, the first one comes again.

    Args:
        shards: Shards in the order of the epoch, with a sample at least.
        start: Number of the first sample in the epoch, >= 0.
        stop: Number behind the last sample.
    """
    total = sum(shard.number for shard in shards)
    while start < stop:
        first = start % total
        last, begin = min(first + stop - start, total), 0
        for shard in shards:
            low, high = max(first - begin, 0), min(last - begin, shard.number)
            if low < high:
                yield Span(shard, low, high)
            begin += shard.number
        start += last - first


def share_of_process(samples: int, rank: int, processes: int) -> tuple[int, int]:
    """Return the numbers of the first sample of a process, and of that behind its last one.

    Each process has equally many. If they cannot be divided, the last ones repeat the first samples of the epoch.

    Args:
        samples: Number of the samples of all processes.
        rank: Number of the process.
        processes: Number of the processes that train together.
    """
    own = ceil(samples / processes)
    return rank * own, (rank + 1) * own


def share_of_worker(samples: int, batch_size: int, worker: int, workers: int) -> tuple[int, int]:
    """Return the same for a worker of a loader, which makes every ``workers``-th batch of its process.

    Each worker has whole batches. If the last batch of the epoch is shorter, the worker whose turn it is has it.

    Args:
        samples: Number of the samples of the process.
        batch_size: Samples in a batch.
        worker: Number of the worker.
        workers: Number of the workers.
    """
    batches = ceil(samples / batch_size)
    counts = [len(range(number, batches, workers)) for number in range(workers)]
    has_last = (batches - 1) % workers
    # The short batch lies at the end of the samples, so its worker comes last.
    order = [(has_last + 1 + number) % workers for number in range(workers)]
    before = sum(counts[number] for number in order[: order.index(worker)])
    return before * batch_size, min((before + counts[worker]) * batch_size, samples)
