"""A random choice of samples from each group, in batches."""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from lightning_ssesam._validation import check_integer
from lightning_ssesam.curvature.measure import group_masks
from lightning_ssesam.data.labels import labels_of
from lightning_ssesam.split import ClassSplit, as_labels


def choose_samples(
    dataset: Any,
    collate: Callable[[list[Any]], Any],
    split: ClassSplit,
    groups: Sequence[str],
    samples: int,
    batch_size: int = 256,
    seed: int = 0,
    labels: Tensor | None = None,
) -> dict[str, list[Any]]:
    """Choose samples of each group at random, and return them in batches, for :func:`measure_curvature`.

    They come in the order of the data set, which augments each of them once. The random state is left as it is.

    Args:
        dataset: Map-style data set.
        collate: Function that makes a batch of a list of samples, such as ``DataLoader.collate_fn``.
        split: Classes of head, tail, many, medium and few.
        groups: Names of groups, see :func:`measure_curvature`.
        samples: Number of samples of each group, an integer >= 1; all of them if there are fewer. Every sample of
            multi-label data belongs to each group.
        batch_size: Number of samples in a batch, an integer >= 1; the last batch may have fewer.
        seed: Seed of the choice and of augmentations, an integer >= 0.
        labels: Label of every sample, ``(N,)``. By default the ``targets``, ``labels`` or ``samples`` of the data set,
            or the second tensor of a ``TensorDataset``.

    Raises:
        ArgumentError: If an argument is out of range, the labels are not known, or a label is no class of the split.
    """
    check_integer("samples", samples, minimum=1)
    check_integer("batch_size", batch_size, minimum=1)
    masks = group_masks(split, groups)
    if split.multi_label:
        # Every sample has a loss for each label.
        return _choose(
            dataset, collate, {group: torch.arange(len(dataset)) for group in masks}, samples, batch_size, seed
        )
    labels = as_labels(labels_of(dataset) if labels is None else labels, num_classes=split.num_classes)
    members = {
        group: (classes[labels.clamp(min=0)] & (labels >= 0)).nonzero().flatten() for group, classes in masks.items()
    }
    return _choose(dataset, collate, members, samples, batch_size, seed)


def _choose(
    dataset: Any,
    collate: Callable[[list[Any]], Any],
    members_of_groups: Mapping[str, Tensor],
    samples: int,
    batch_size: int,
    seed: int,
) -> dict[str, list[Any]]:
    """Choose among the members of each group, and return them in batches."""
    chosen, generator = {}, torch.Generator().manual_seed(check_integer("seed", seed, minimum=0))
    with isolate_rng():
        for group, members in members_of_groups.items():
            order = torch.randperm(len(members), generator=generator)[:samples]
            # NumPy takes seeds of 32 bits only.
            for set_seed in (random.seed, np.random.seed, torch.manual_seed):
                set_seed(seed % 2**32)
            subset = Subset(dataset, members[order].sort().values.tolist())
            chosen[group] = list(DataLoader(subset, batch_size, collate_fn=collate))
    return chosen
