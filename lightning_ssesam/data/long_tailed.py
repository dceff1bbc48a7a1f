"""Any labelled data set, made long-tailed."""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from lightning_ssesam._validation import bad_argument, check_integer
from lightning_ssesam.data.labels import labels_of
from lightning_ssesam.data.profiles import Profile, largest_max_count, long_tailed_counts, long_tailed_indices
from lightning_ssesam.split import ClassSplit, count_labels

Sample = TypeVar("Sample", covariant=True)


class LongTailed(Dataset[Sample]):
    """A long-tailed subset of a map-style data set, chosen at random.

    The classes get the sizes of :func:`~lightning_ssesam.data.long_tailed_counts`, the largest class of the data set
    first. Among classes of equal size the lower class index comes first. For a balanced data set this is the protocol
    of Cao et al., "LDAM", NeurIPS 2019.

    Attributes:
        class_counts: Samples of each class, length C.
        indices: Indices of the chosen samples in the data set, shape ``(N,)``, int64, ascending.
        targets: Labels of the chosen samples, shape ``(N,)``, int64.

    Args:
        dataset: Map-style data set with an attribute ``targets``, ``labels`` or ``samples`` (pairs of which the second
            is the label), a ``TensorDataset`` whose second tensor has the labels, or a ``Subset`` of these.
        imbalance_factor: Largest over smallest class size, or its inverse; > 0.
        profile: ``"exponential"`` or ``"step"``.
        seed: Seed that chooses the samples, an integer >= 0.
        max_count: Samples of the largest class, an integer >= 1; by default the most for which every class has enough.
        labels: Label of every sample of ``dataset``, if it has none of these attributes or a transform changes them.

    Raises:
        ArgumentError: If the labels cannot be found, or a class has too few samples.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> balanced = TensorDataset(torch.randn(30, 8), torch.arange(30) % 3)
        >>> LongTailed(balanced, imbalance_factor=5).class_counts
        [10, 4, 2]
    """

    def __init__(
        self,
        dataset: Dataset[Sample],
        imbalance_factor: float,
        profile: Profile = "exponential",
        seed: int = 0,
        max_count: int | None = None,
        labels: Sequence[int] | Tensor | None = None,
    ) -> None:
        found = labels_of(dataset, labels)
        self.dataset = dataset
        self.class_counts = _class_counts(found, imbalance_factor, profile, max_count)
        generator = torch.Generator().manual_seed(check_integer("seed", seed, minimum=0))
        self.indices = long_tailed_indices(found, self.class_counts, generator)
        self.targets = found[self.indices]

    @property
    def num_classes(self) -> int:
        """C, the number of classes."""
        return len(self.class_counts)

    def split(self, **kwargs: Any) -> ClassSplit:
        """Return the :class:`~lightning_ssesam.ClassSplit`, made with the arguments of ``ClassSplit.from_counts``."""
        return ClassSplit.from_counts(self.class_counts, **kwargs)

    @override
    def __getitem__(self, index: int) -> Sample:
        return self.dataset[int(self.indices[index])]

    def __len__(self) -> int:
        return len(self.indices)


def _class_counts(labels: Tensor, imbalance_factor: float, profile: Profile, max_count: int | None) -> list[int]:
    sizes = count_labels(labels)
    order = sizes.argsort(descending=True, stable=True)
    largest = largest_max_count(sizes[order].tolist(), imbalance_factor, profile)
    if max_count is None:
        max_count = largest
    elif check_integer("max_count", max_count, minimum=1) > largest:
        raise bad_argument("max_count", f"at most {largest}, for which every class has enough samples", max_count)
    counts = torch.empty_like(sizes)
    counts[order] = torch.tensor(long_tailed_counts(len(sizes), max_count, imbalance_factor, profile))
    return [int(count) for count in counts]
