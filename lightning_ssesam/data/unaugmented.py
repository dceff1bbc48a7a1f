"""The training images as test images: each once, in order, without augmentation."""

import copy
from typing import Any

from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from lightning_ssesam.data.long_tailed import LongTailed


def unaugmented(train: Any, test: Any) -> Any:
    """Return a loader that yields the images of a training loader once, in order, treated as test images.

    They get the transform of the test set if both sets are of the same class and have a ``transform``. Otherwise they
    are as in training. What is no ``DataLoader`` of a map-style data set is returned as it is.

    Args:
        train: Loader of the training batches.
        test: Loader of the test batches, whose batch size, collate function and transform are taken over.
    """
    if not isinstance(train, DataLoader) or isinstance(train.dataset, IterableDataset):
        return train
    pattern = test if isinstance(test, DataLoader) and test.batch_size else train
    batch_size: int | None = pattern.batch_size or 1
    if train.batch_sampler is None:
        # The elements of the data set are batches.
        pattern, batch_size = train, None
    return DataLoader(
        _plain(train.dataset, getattr(test, "dataset", None)),
        batch_size=batch_size,
        collate_fn=pattern.collate_fn,
        num_workers=train.num_workers,
        pin_memory=train.pin_memory,
    )


def _plain(dataset: Any, test: Any) -> Dataset[Any]:
    """Return a training set with the transform of the test set, if that is known to fit."""
    while isinstance(test, Subset | LongTailed):
        test = test.dataset
    plain: Dataset[Any] = copy.copy(dataset)
    if isinstance(dataset, Subset | LongTailed):
        plain.dataset = _plain(dataset.dataset, test)  # type: ignore[attr-defined]
    elif type(dataset) is type(test) and hasattr(dataset, "transform"):
        plain.transform = test.transform  # type: ignore[attr-defined]
    return plain
