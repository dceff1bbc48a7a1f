"""What became of each test image: which are right, which classes are confused, and how sure the errors are."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from lightning_ssesam.calibration import GroupCalibrationError
from lightning_ssesam.experiments.runs import FEW_IMAGES, Run
from lightning_ssesam.metrics import _GroupMetric, _predicted
from lightning_ssesam.split import ClassSplit

MOST_PAIRS = 1000
"""Pairs of classes that a run keeps at most. With up to 32 classes it keeps all."""

MOST_MISTAKES = 24
"""Wrong test images of the tail that a run keeps at most."""

DIAGRAMS = ("head", "tail", "all")
"""Groups whose reliability a run keeps."""


class Predictions(_GroupMetric):
    """Keeps the prediction for each test image. It has no value, so nothing is logged."""

    def __init__(self, split: ClassSplit, **kwargs: Any) -> None:
        super().__init__(split, **kwargs)
        # The other metrics of the test have checked each batch.
        self.calibration = GroupCalibrationError(split, validate_args=False, ignore_index=self.ignore_index)
        self.predicted: list[Tensor] = []
        self.has_images = True

    @override
    def update(self, preds: Tensor, target: Tensor) -> None:
        # The parts of an image, such as its pixels, are no images.
        self.has_images &= target.ndim == 1
        if self.has_images:
            self.calibration.update(preds, target)
            self.predicted.append(_predicted(preds))

    @override
    def _count(self, predicted: Tensor, target: Tensor) -> None:
        pass

    @override
    def _classes_of_values(self) -> dict[str, Tensor]:
        return {}

    @override
    def _values(self) -> dict[str, Tensor]:
        return {}

    def write_to(self, run: Run, in_order: bool) -> None:
        """Write what a run keeps of the predictions, or nothing if the batches had no images.

        Args:
            run: Run of the predictions.
            in_order: Whether the images come in the same order in every run.
        """
        if not self.has_images or not self.predicted:
            return
        run.calibration = {group: float(value) for group, value in self.calibration.compute().items()}
        for group in DIAGRAMS:
            columns = (values.tolist() for values in self.calibration.reliability(group))
            run.reliability[group] = [list(row) for row in zip(*columns, strict=True)]
        metric = self.calibration
        states = (metric.targets, self.predicted, metric.confidences)
        targets, predicted, confidences = (torch.cat(parts).cpu().numpy() for parts in states)
        targets = targets.astype(int)
        run.confused_pairs = _confused_pairs(targets, predicted, self.num_classes)
        if in_order:
            run.test_hits = _hits_by_class(targets, predicted == targets, self.num_classes)
            run.tail_mistakes = _tail_mistakes(targets, predicted, confidences, self.split.tail.numpy())


def _hits_by_class(targets: np.ndarray, hits: np.ndarray, classes: int) -> list[str]:
    """Return the digits of the images of each class, in their order: 1 where it was classified right."""
    order = np.argsort(targets, kind="stable")[int((targets < 0).sum()) :]
    ends = np.bincount(targets[order], minlength=classes).cumsum()
    digits = "".join("1" if hit else "0" for hit in hits[order].tolist())
    return [digits[start:end] for start, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True)]


def _confused_pairs(targets: np.ndarray, predicted: np.ndarray, classes: int) -> list[list[int]]:
    """Return true class, predicted class and number of images of the first pairs that are confused."""
    # A prediction of -1 had a score that is not a number.
    is_error = (targets >= 0) & (predicted >= 0) & (predicted != targets)
    codes, counts = np.unique(targets[is_error] * classes + predicted[is_error], return_counts=True)
    tested = np.bincount(targets[targets >= 0], minlength=classes)
    order = order_of_pairs(codes // classes, counts, tested)[:MOST_PAIRS]
    columns = (codes[order] // classes, codes[order] % classes, counts[order])
    return [list(row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def order_of_pairs(true: np.ndarray, counts: np.ndarray, tested: np.ndarray) -> np.ndarray:
    """Return the order of pairs of classes by what the error costs the true class, the largest share first.

    Pairs whose true class has few test images come last: there, a single image is a large share.

    Args:
        true: True class of each pair ``(P,)``.
        counts: Number of images of each pair ``(P,)``, or its mean over runs.
        tested: Number of test images of each class ``(C,)``.
    """
    images = np.maximum(tested[true], 1)
    return np.lexsort((-counts, -counts / images, images < FEW_IMAGES))


def _tail_mistakes(
    targets: np.ndarray, predicted: np.ndarray, confidences: np.ndarray, is_tail: np.ndarray
) -> list[list[float]]:
    """Return position, true class, predicted class and probability of the surest errors on tail classes."""
    places = np.flatnonzero((targets >= 0) & is_tail[targets] & (predicted >= 0) & (predicted != targets))
    places = places[np.argsort(-confidences[places], kind="stable")][:MOST_MISTAKES]
    return [[int(k), int(targets[k]), int(predicted[k]), float(confidences[k])] for k in places]
