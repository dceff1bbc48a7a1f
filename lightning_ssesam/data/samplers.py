"""Samplers that draw a class first and then one of its samples."""

import math
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DistributedSampler
from typing_extensions import override

from lightning_ssesam._validation import check_integer
from lightning_ssesam.split import as_labels
from lightning_ssesam.targets import IGNORE_INDEX

# Draws that are numbers of Python at a time.
_PART = 2**16


def rank_and_processes() -> tuple[int, int] | None:
    """Return the rank of this process and the number of processes that train together; None if it trains alone."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return None


class ClassSampler(DistributedSampler[int]):
    """Draws a class by :meth:`class_probabilities`, then one of its samples, with replacement and equal chances.

    The draws depend on the seed and the epoch alone. With several processes, every process makes the same draws and
    takes every ``num_replicas``-th. Together they see what a single process would. The first draws are repeated if the
    processes could not take equally many otherwise. A Trainer calls ``set_epoch``, and does not replace the sampler,
    because it is a ``DistributedSampler``.

    Args:
        labels: Label of every training sample, shape ``(N,)``, integers >= 0 or ``ignore_index``.
        num_samples: Draws in an epoch, by all processes together, an integer >= 1; by default the number of samples
            that have a class.
        seed: Seed of the draws, an integer >= 0.
        ignore_index: Label of samples that are never drawn, any integer.
    """

    def __init__(
        self,
        labels: Sequence[int] | Tensor,
        num_samples: int | None = None,
        seed: int = 0,
        ignore_index: int = IGNORE_INDEX,
    ) -> None:
        targets = as_labels(labels, ignore_index=ignore_index)
        super().__init__(targets, num_replicas=1, rank=0, seed=check_integer("seed", seed, minimum=0))  # type: ignore[arg-type]
        labelled = (targets != ignore_index).nonzero().flatten()
        self.draws = len(labelled) if num_samples is None else check_integer("num_samples", num_samples, minimum=1)
        self.class_counts = targets[labelled].bincount()
        self._members = labelled[targets[labelled].argsort(stable=True)]
        self._shared: tuple[int, int] | None = None

    def class_probabilities(self, class_counts: Tensor, epoch: int) -> Tensor:
        """Return the probability of each class ``(C,)``, float64. Classes without a sample are never drawn.

        Args:
            class_counts: Samples of each class, shape ``(C,)``, float64.
            epoch: Epoch, counted from 0.
        """
        raise NotImplementedError(f"{type(self).__name__} has no `class_probabilities`.")

    def share(self, num_replicas: int, rank: int) -> None:
        """Set the number of processes that share the draws, and the rank of this one.

        By default both are those of ``torch.distributed``.
        """
        self._shared = (num_replicas, rank)

    @override
    def __iter__(self) -> Iterator[int]:
        self._look_up_processes()
        mine = torch.arange(self.rank, self.total_size, self.num_replicas) % self.draws
        # In parts, because millions of Python integers would take more memory than the draws.
        parts = torch.split(self._draw()[mine], _PART)
        return chain.from_iterable(part.tolist() for part in parts)

    @override
    def __len__(self) -> int:
        self._look_up_processes()
        return self.num_samples

    def _draw(self) -> Tensor:
        counts = self.class_counts.double()
        weights = self.class_probabilities(counts, self.epoch).double() * (counts > 0)
        # Derived from both numbers, so that no epoch of one seed repeats an epoch of another.
        state = np.random.SeedSequence([self.seed, self.epoch]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0]))
        class_draws, sample_draws = torch.rand(2, self.draws, dtype=torch.float64, generator=generator)
        bounds = weights.cumsum(0)
        drawn = torch.searchsorted(bounds / bounds[-1], class_draws, right=True)
        starts = self.class_counts.cumsum(0) - self.class_counts
        return self._members[starts[drawn] + (sample_draws * counts[drawn]).long()]

    def _look_up_processes(self) -> None:
        # Not in the constructor, because the process group may be made later.
        if self._shared is not None:
            self.num_replicas, self.rank = self._shared
        elif (found := rank_and_processes()) is not None:
            self.rank, self.num_replicas = found
        self.num_samples = math.ceil(self.draws / self.num_replicas)
        self.total_size = self.num_samples * self.num_replicas


class ClassBalancedSampler(ClassSampler):
    """Draws every class equally often (Kang et al., "Decoupling", ICLR 2020, with q = 0).

    The arguments are those of :class:`ClassSampler`.

    Example:
        >>> sampler = ClassBalancedSampler([0, 0, 0, 0, 0, 0, 0, 1], num_samples=1000)
        >>> 450 < sum(index == 7 for index in sampler) < 550
        True
    """

    @override
    def class_probabilities(self, class_counts: Tensor, epoch: int) -> Tensor:
        """Return the same probability for every class that has a sample."""
        present = (class_counts > 0).double()
        return present / present.sum()


class SquareRootSampler(ClassSampler):
    """Draws classes in proportion to the square root of their size (Kang et al., ICLR 2020, with q = 1/2).

    The arguments are those of :class:`ClassSampler`.
    """

    @override
    def class_probabilities(self, class_counts: Tensor, epoch: int) -> Tensor:
        """Return ``sqrt(n_j)`` over the sum of all square roots."""
        return class_counts.sqrt() / class_counts.sqrt().sum()


class ProgressivelyBalancedSampler(ClassSampler):
    """Moves from drawing samples equally often to drawing classes equally often (Kang et al., ICLR 2020, eq. 2).

    In epoch t, counted from 0, ``p_j = (1 - t / T) n_j / N + (t / T) / C``. From epoch T on it is ``1 / C``.

    Args:
        labels: Label of every training sample, shape ``(N,)``, integers >= 0.
        num_epochs: T, an integer >= 1.
        **kwargs: ``num_samples``, ``seed`` and ``ignore_index``, see :class:`ClassSampler`.
    """

    def __init__(self, labels: Sequence[int] | Tensor, num_epochs: int, **kwargs: Any) -> None:
        super().__init__(labels, **kwargs)
        self.num_epochs = check_integer("num_epochs", num_epochs, minimum=1)

    @override
    def class_probabilities(self, class_counts: Tensor, epoch: int) -> Tensor:
        """Return the mixture for the epoch."""
        progress = min(epoch / self.num_epochs, 1.0)
        present = (class_counts > 0).double()
        return (1 - progress) * class_counts / class_counts.sum() + progress * present / present.sum()
