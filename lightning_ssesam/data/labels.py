"""The labels of a data set, found without loading a sample."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from lightning_ssesam._validation import bad_argument
from lightning_ssesam.split import as_labels


def labels_of(dataset: Any, labels: Any = None) -> Tensor:
    """Return the labels ``(N,)``, int64, of a map-style data set, without loading a sample.

    They are ``labels``, if given, or those that the data set has, as :class:`~lightning_ssesam.data.LongTailed` says.

    Raises:
        ArgumentError: If there are none, or not one class index for each sample.
    """
    name = f"labels of {type(dataset).__name__}" if labels is None else "labels"
    values = as_labels(_kept_labels(dataset) if labels is None else labels, name)
    if len(values) != len(dataset):
        raise bad_argument(name, f"one for each of {len(dataset)} samples", got_text=str(len(values)))
    return values


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


def names_of_classes(data: Any) -> list[str]:
    """Return the names of the classes, or nothing if the data module has no ``class_names``, one for each class."""
    names: Any = getattr(data, "class_names", None)
    counts = getattr(data, "class_counts", ())
    has_names = isinstance(names, list | tuple) and len(names) == len(counts) == len(set(map(str, names)))
    return [str(name) for name in names] if has_names else []
