"""How long an update takes on many GPUs, from the bandwidth and the latency of what connects them; and tail samples."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, comb, log, log2

NVLINK_STEP, NETWORK_STEP = 3.4, 14.0
"""Microseconds of a step of NCCL's Ring/Simple within a machine and between machines."""

# The model by which NCCL chooses how to communicate, with its constants (NVIDIA/nccl, src/graph/tuning.cc, of 2024):
# microseconds to start; latency of a step within a machine and between machines, as multiples of those of Ring/Simple;
# part of the bandwidth that is used.
_WAYS = {
    "Ring/Simple": (8.4, 1.0, 1.0, 1.0),
    "Ring/LL128": (14.0, 1.9 / NVLINK_STEP, 4.0 / NETWORK_STEP, 0.92),
    "Ring/LL": (6.6, 0.6 / NVLINK_STEP, 2.7 / NETWORK_STEP, 0.25),
    "Tree/Simple": (0.0, 28.0 / NVLINK_STEP, 28.0 / NETWORK_STEP, 0.92),
    "Tree/LL128": (14.0, 1.25 / NVLINK_STEP, 8.5 / NETWORK_STEP, 0.92 * 7 / 9),
    "Tree/LL": (6.8, 0.6 / NVLINK_STEP, 5.0 / NETWORK_STEP, 0.92 / 3.8),
}

BUCKET = 25 * 2**20
"""Bytes of a bucket of DDP (``bucket_cap_mb=25``)."""

TARGETS = 8 * 128.0
"""Bytes of the targets of a GPU: class indices of a batch of 128."""


@dataclass(frozen=True)
class Cluster:
    """Machines with GPUs, and what connects them.

    Args:
        per_node: Number of GPUs of a machine.
        intra_bandwidth: Bandwidth of a GPU to others of its machine, in GB/s, in one direction.
        inter_bandwidth: Bandwidth of a GPU to other machines, in GB/s, in one direction.
        efficiency: Part of both that collectives reach, above 0 and at most 1.
        intra_latency: Latency of a step of a ring within a machine, in microseconds.
        inter_latency: Latency of a step of a ring between machines, in microseconds.
    """

    per_node: int = 8
    intra_bandwidth: float = 450.0
    inter_bandwidth: float = 50.0
    efficiency: float = 0.8
    intra_latency: float = NVLINK_STEP
    inter_latency: float = NETWORK_STEP

    def all_reduce(self, nbytes: float, gpus: int) -> float:
        """Return the milliseconds in which a sum of tensors of so many bytes reaches all GPUs."""
        nodes, within = self._nodes(gpus), min(gpus, self.per_node)
        if gpus == 1:
            return 0.0
        times = []
        for way, (start, intra, inter, share) in _WAYS.items():
            if way.startswith("Ring"):
                between = 2 * nodes if nodes > 1 else 0
                steps, traffic = (2 * (gpus - 1) - between, between), 2 * (gpus - 1) / gpus
            else:
                steps, traffic = (2 * (within - 1), 2 * int(log2(nodes))), 2.0
            times.append(self._time(start, intra, inter, steps, traffic * nbytes / share, nodes))
        return min(times)

    def all_gather(self, nbytes: float, gpus: int) -> float:
        """Return the milliseconds in which all GPUs get a whole tensor of which each has a part, or divide a sum."""
        nodes, steps = self._nodes(gpus), (gpus - self._nodes(gpus), self._nodes(gpus) - 1)
        rings = [values for way, values in _WAYS.items() if way.startswith("Ring")]
        traffic = nbytes * (gpus - 1) / gpus
        times = (self._time(a, b, c, steps, traffic / share, nodes) for a, b, c, share in rings)
        return min(times) if gpus > 1 else 0.0

    def _nodes(self, gpus: int) -> int:
        return ceil(gpus / self.per_node)

    def _time(
        self, start: float, intra: float, inter: float, steps: tuple[int, int], traffic: float, nodes: int
    ) -> float:
        # A ring enters and leaves each machine by all of its network cards.
        slowest = (
            self.intra_bandwidth if nodes == 1 else min(self.intra_bandwidth, self.per_node * self.inter_bandwidth)
        )
        latency = start + steps[0] * intra * self.intra_latency + steps[1] * inter * self.inter_latency
        return latency / 1e3 + traffic / (slowest * self.efficiency * 1e6)


@dataclass(frozen=True)
class Network:
    """A network and its plain step on one GPU.

    Args:
        name: Its name.
        parameters: Number of its parameters, in float32.
        plain_ms: Milliseconds of a forward and a backward pass over the batch of a GPU. A backward takes two thirds.
        mixes: Whether samples mix (batch norm), so that all passes are full.
        parts: Number of parts that FSDP2 gathers one after the other.
        batch: Number of images of a GPU.
    """

    name: str
    parameters: int
    plain_ms: float
    mixes: bool
    parts: int
    batch: int = 128

    @property
    def nbytes(self) -> int:
        """Bytes of the parameters, or of their gradient."""
        return 4 * self.parameters


@dataclass(frozen=True)
class Method:
    """A method: for each of its terms whether it is perturbed, and whether it has the tail, the head or all samples."""

    name: str
    terms: tuple[tuple[bool, str], ...]

    @property
    def ascents(self) -> int:
        """Number of perturbed terms."""
        return sum(is_perturbed for is_perturbed, _ in self.terms)


METHODS = (
    Method("ERM", ((False, "all"),)),
    Method("SAM", ((True, "all"),)),
    Method("ImbSAM", ((False, "head"), (True, "tail"))),
    Method("SSE-SAM stage 1", ((True, "head"), (True, "tail"))),
    Method("SSE-SAM stage 2", ((False, "head"), (True, "tail"))),
)
PLAIN = METHODS[0]


def passes_ms(
    network: Network, method: Method, tail_share: float, is_split: bool, gpus: int = 1
) -> tuple[list[float], list[float]]:
    """Return the milliseconds of the forward passes and of the backward passes of an update.

    The order of the backward passes is that of the terms, then that of the perturbed terms. If only the tail is
    perturbed, all wait for the GPU that has drawn most tail samples.
    """
    shares = {"all": 1.0, "tail": tail_share, "head": 1 - tail_share}
    whole = network.mixes or not is_split
    clean = [1.0 if whole else shares[samples] for _, samples in method.terms]
    if not whole and [samples for is_perturbed, samples in method.terms if is_perturbed] == ["tail"]:
        shares["tail"] = most_tail(tail_share, network.batch, gpus) / network.batch
    perturbed = [1.0 if whole else shares[samples] for is_perturbed, samples in method.terms if is_perturbed]
    third = network.plain_ms / 3
    return [third, *(third * share for share in perturbed)], [2 * third * share for share in (*clean, *perturbed)]


def exposed(cluster: Cluster, nbytes: float, gpus: int, backward_ms: float) -> float:
    """Return the milliseconds by which the exchange of a gradient outlasts the backward pass that finds it.

    The gradient goes in buckets, each as soon as the backward has filled it and the one before has arrived. Without
    overlap, the backward pass counts as 0 ms: all buckets are there at its end.
    """
    buckets, done = ceil(nbytes / BUCKET), 0.0
    for number in range(buckets):
        size = min(BUCKET, nbytes - number * BUCKET)
        filled = min((number + 1) * BUCKET, nbytes) / nbytes * backward_ms
        done = max(done, filled) + cluster.all_reduce(size, gpus)
    return done - backward_ms


def update_ms(
    cluster: Cluster,
    network: Network,
    method: Method,
    gpus: int,
    ascent: str = "global",
    overlaps: bool = False,
    interval: int = 1,
    tail_share: float = 0.2,
) -> float:
    """Return the milliseconds of an update under DDP, on average over an interval.

    Args:
        cluster: The machines.
        network: The network.
        method: The method.
        gpus: Number of GPUs.
        ascent: ``"global"`` or ``"local"``.
        overlaps: Whether each exchange of a gradient overlaps with the backward pass that finds it. Those of this
            project do not.
        interval: Number of updates from one perturbed update to the next.
        tail_share: Share of tail samples in a batch.
    """
    if interval > 1:
        parts = (update_ms(cluster, network, one, gpus, ascent, overlaps, 1, tail_share) for one in (PLAIN, method))
        plain, perturbed = parts
        return ((interval - 1) * plain + perturbed) / interval
    forwards, backwards = passes_ms(network, method, tail_share, True, gpus)
    found = [ms for ms, (is_perturbed, _) in zip(backwards, method.terms, strict=False) if is_perturbed]
    # Two small all-gathers bring the targets; with one process there are none.
    targets = 2 * cluster.all_gather(TARGETS * gpus, gpus) if ascent == "global" else 0.0
    exchanged = [*(found if ascent == "global" else []), backwards[-1]]
    waits = sum(exposed(cluster, network.nbytes, gpus, ms if overlaps else 0.0) for ms in exchanged)
    return sum(forwards) + sum(backwards) + targets + waits


def sharded_update_ms(cluster: Cluster, network: Network, method: Method, gpus: int, tail_share: float = 0.2) -> float:
    """Return the milliseconds of an update under FSDP2, whose passes are full and communicate while they compute."""
    forwards, backwards = passes_ms(network, method, tail_share, False, gpus)
    once = network.parts * cluster.all_gather(network.nbytes / network.parts, gpus)
    total = 2 * cluster.all_gather(TARGETS * gpus, gpus) + method.ascents * cluster.all_reduce(
        4.0 * network.parts, gpus
    )
    return total + sum(max(ms, once) for ms in forwards) + sum(max(ms, 2 * once) for ms in backwards)


def no_tail(share: float, samples: int) -> float:
    r"""Return the probability that a batch has no tail sample, :math:`(1 - s)^n`.

    Args:
        share: Share s of tail samples in the training data, from 0 to 1.
        samples: Number n of samples in the batch. They are few compared to the training data.
    """
    return float((1 - share) ** samples)


def fewer_than(count: int, share: float, samples: int) -> float:
    """Return the probability that a batch has fewer than so many tail samples: the binomial distribution."""
    return float(sum(comb(samples, k) * share**k * (1 - share) ** (samples - k) for k in range(count)))


def most_tail(share: float, samples: int, gpus: int) -> float:
    r"""Return the mean number of tail samples in the batch that has most, :math:`\sum_k 1 - F(k)^P`."""
    return sum(1 - fewer_than(k + 1, share, samples) ** gpus for k in range(samples))


def some_without_tail(share: float, samples: int, gpus: int) -> float:
    r"""Return the probability that at least one of so many processes has no tail sample, :math:`1 - (1 - p)^P`."""
    return float(1 - (1 - no_tail(share, samples)) ** gpus)


def least_batch(share: float, probability: float = 0.01) -> int:
    """Return the smallest batch of a process that has no tail sample with at most this probability."""
    return ceil(log(probability) / log(1 - share))


def steps_of_epoch(images: int, batch: int, gpus: Sequence[int]) -> list[float]:
    """Return the number of updates in an epoch for each number of GPUs."""
    return [images / (batch * number) for number in gpus]
