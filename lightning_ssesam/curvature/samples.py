"""Some samples of each group, kept in batches."""

import random
from collections.abc import Callable, Sequence
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
    """Choose some samples of each group at random, and load them once, for :func:`measure_curvature`.

    A sample that the data set augments at random is kept as it came. The random state is left as it is.

    Args:
        dataset: A map-style data set.
        collate: Makes a batch of a list of samples, such as ``DataLoader.collate_fn``.
        split: Which classes are head, tail, many, medium and few.
        groups: As in :func:`measure_curvature`.
        samples: How many of each group, an integer >= 1; all of them if there are fewer.
        batch_size: Samples in a batch, an integer >= 1; the last one may have fewer.
        seed: Of the choice and of augmentations, an integer >= 0.
        labels: The label of every sample, ``(N,)``; by default the data set's ``targets``, ``labels`` or ``samples``,
            or the second tensor of a ``TensorDataset``.

    Returns:
        The batches of each group, in the order of the data set.

    Raises:
        ValueError: If an argument is out of range, the labels are not known, or a label is no class of the split.

    """
    for name, value in {"samples": samples, "batch_size": batch_size}.items():
        check_integer(name, value, minimum=1)
    masks = group_masks(split, groups)
    labels = as_labels(labels_of(dataset) if labels is None else labels, num_classes=split.num_classes)
    chosen = {}
    generator = torch.Generator().manual_seed(check_integer("seed", seed, minimum=0))
    with isolate_rng():
        for group, classes in masks.items():
            members = classes[labels].nonzero().flatten()
            order = torch.randperm(len(members), generator=generator)[:samples]
            for set_seed in (random.seed, np.random.seed, torch.manual_seed):
                set_seed(seed % 2**32)
            subset = Subset(dataset, members[order].sort().values.tolist())
            chosen[group] = list(DataLoader(subset, batch_size, collate_fn=collate))
    return chosen
