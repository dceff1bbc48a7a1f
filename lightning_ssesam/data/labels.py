"""The labels of a data set, found without loading a sample."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from lightning_ssesam._validation import bad_argument
from lightning_ssesam.split import as_labels


def labels_of(dataset: Any) -> Tensor:
    """Return the labels ``(N,)``, int64, of a map-style data set, without loading a sample.

    They are its attribute ``targets`` or ``labels``, the second entries of its ``samples``, the second tensor of a
    ``TensorDataset``, or those of the samples that a ``Subset`` selects.

    Raises:
        ArgumentError: If none of these exists, or it does not hold one class index for each sample.
    """
    labels = as_labels(_kept_labels(dataset), f"labels of {type(dataset).__name__}")
    if len(labels) != len(dataset):
        raise bad_argument(
            f"labels of {type(dataset).__name__}", f"one for each of {len(dataset)} samples", got_text=str(len(labels))
        )
    return labels


def _kept_labels(dataset: Any) -> Any:
    if isinstance(dataset, Subset):
        return labels_of(dataset.dataset)[torch.as_tensor(dataset.indices, dtype=torch.int64)]
    if isinstance(dataset, TensorDataset) and len(dataset.tensors) > 1:
        return dataset.tensors[1]
    for name in ("targets", "labels"):
        if getattr(dataset, name, None) is not None:
            return getattr(dataset, name)
    if getattr(dataset, "samples", None) is not None:
        return [sample[1] for sample in dataset.samples]
    expected = "a data set with `targets`, `labels` or `samples`; else pass its labels"
    raise bad_argument("dataset", expected, got_text=type(dataset).__name__)
