"""How sure the difference between two methods is: an interval over seeds and test images."""

import math
import statistics
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from lightning_ssesam.experiments.runs import FEW_IMAGES as FEW_IMAGES
from lightning_ssesam.experiments.runs import Run


class Difference(NamedTuple):
    """Difference of one method to another, over the seeds that both were run with.

    Attributes:
        mean: Mean of the differences.
        margin: Half of the width of its 95 % confidence interval; NaN for a single seed.
        doubt: Reason why the interval is not to be trusted, such as ``"few images"``; empty if there is none.
    """

    mean: float
    margin: float
    doubt: str = ""

    @property
    def is_significant(self) -> bool:
        """Whether the interval excludes 0, and there is no reason to doubt it."""
        return not self.doubt and abs(self.mean) > self.margin

    def __str__(self) -> str:
        """Return the difference in points with its margin, and a star if it is significant, or the doubt."""
        if math.isnan(self.mean):
            return "nan"
        margin = "" if math.isnan(self.margin) else f" ± {self.margin:.1f}"
        return f"{self.mean:+.1f}{margin}{'*' if self.is_significant else ''}{f' ({self.doubt})' if self.doubt else ''}"


class Part(NamedTuple):
    """A part of a mean's variance, and the degrees of freedom that it was estimated with."""

    variance: float
    degrees: float


def paired_difference(
    values: dict[int, float], others: dict[int, float], images: Sequence[Part] = (), doubt: str = ""
) -> Difference:
    """Return the difference of ``values`` to ``others``, both by seed, over the seeds that both have.

    The variance of its mean is the one over seeds, plus that of the choice of test images. The degrees of freedom of
    the sum are those of Satterthwaite (Biometrics Bulletin 2, 1946). The margin is at least that of the seeds alone.

    Args:
        values: Value of each seed.
        others: Value of each seed for the other method.
        images: Parts of the variance that come from the choice of test images.
        doubt: Reason why the difference gets no star.

    Example:
        >>> print(paired_difference({0: 4.0, 1: 6.0, 2: 5.0}, {0: 1.0, 1: 2.0, 2: 3.0}))
        +3.0 ± 2.5*
    """
    from scipy.stats import t

    differences = [values[seed] - others[seed] for seed in sorted(values.keys() & others.keys())]
    number = len(differences)
    if number < 2 or any(map(math.isnan, differences)):
        return Difference(statistics.mean(differences) if differences else math.nan, math.nan, doubt)
    seeds = Part(statistics.variance(differences) / number, number - 1)
    # Rounding leaves a tiny spread where there is none.
    doubt = doubt or ("no spread" if math.sqrt(seeds.variance) < 1e-9 else "")
    parts = [part for part in (seeds, *images) if part.variance > 0]
    if not parts:
        return Difference(statistics.mean(differences), 0.0, doubt)
    variance = sum(part.variance for part in parts)
    degrees = variance**2 / sum(part.variance**2 / part.degrees for part in parts)
    margin = float(t.ppf(0.975, degrees)) * math.sqrt(variance)
    # Two or three seeds may differ little by chance, and the degrees of freedom would be those of the images.
    alone = float(t.ppf(0.975, seeds.degrees)) * math.sqrt(seeds.variance)
    return Difference(statistics.mean(differences), max(margin, alone), doubt)


class Pair:
    """A method and the one that it is compared with.

    Args:
        runs: Runs of the method.
        others: Runs of the other method.
    """

    def __init__(self, runs: Sequence[Run], others: Sequence[Run]) -> None:
        shared = {run.seed for run in runs} & {run.seed for run in others}
        self.runs, self.others = (sorted_runs(side, shared) for side in (runs, others))
        self.diverged = [run for run in (*self.runs, *self.others) if run.diverged]

    def difference(self, group: str) -> Difference:
        """Return the difference in a group, in points of accuracy."""
        values, others = ({run.seed: 100 * run.accuracy[group] for run in side} for side in (self.runs, self.others))
        images = self._images
        if images is None or not self.runs:
            return paired_difference(values, others, doubt=self._doubt)
        variances, numbers = images
        classes = classes_of(self.runs[0], group) & (numbers > 0)
        few = "few images" if 0 < numbers[classes].sum() < FEW_IMAGES else ""
        weight = 100 / max(int(classes.sum()), 1)
        # An estimate from n images and the two that are added has n + 1 degrees of freedom.
        parts = [Part(weight**2 * v, n + 1) for v, n in zip(variances[classes], numbers[classes], strict=True)]
        return paired_difference(values, others, parts, self._doubt or few)

    @property
    def _doubt(self) -> str:
        return f"{len(self.diverged)} diverged" if self.diverged else ""

    @cached_property
    def _images(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Return, for each class, the variance of the difference over test images, and their number."""
        runs = [*self.runs, *self.others]
        if not runs or any(not run.groups or run.test_images != runs[0].test_images for run in runs):
            return None
        numbers = np.array(runs[0].test_images)
        if not len(numbers):
            return None
        if all(len(run.test_hits) == len(numbers) for run in runs):
            return paired_variances(self.runs, self.others), numbers
        return binomial_variances(self.runs, numbers) + binomial_variances(self.others, numbers), numbers


def sorted_runs(runs: Sequence[Run], seeds: set[int]) -> list[Run]:
    """Return the runs with these seeds, in the order of the seeds."""
    return sorted((run for run in runs if run.seed in seeds), key=lambda run: run.seed)


def classes_of(run: Run, group: str) -> np.ndarray:
    """Return the mask ``(C,)`` of the classes of a group, which may be ``"all"``."""
    if group == "all":
        return np.ones(len(run.class_recalls), dtype=bool)
    mask: np.ndarray = _numbers(run.groups[group]) == 1
    return mask


def paired_variances(runs: Sequence[Run], others: Sequence[Run]) -> np.ndarray:
    """Return the variance ``(C,)`` of the difference of two recalls, from what becomes of the same images.

    For each image, d is the share of seeds in which the one method is right, minus that of the other. As Agresti and
    Min (Statistics in Medicine 24, 2005) do for pairs, two images are added to each class: one counts as 0, the other
    as half +1 and half -1. So the variance of a class is not 0 where the methods agree on all of its few images.

    Args:
        runs: Runs of the one method, with their hits.
        others: Runs of the other method with the same seeds.
    """
    hits, other_hits = (np.mean([_numbers("".join(run.test_hits)) for run in side], 0) for side in (runs, others))
    difference, numbers = hits - other_hits, np.array([len(digits) for digits in runs[0].test_hits])
    classes = np.repeat(np.arange(len(numbers)), numbers)
    totals, squares = (
        np.bincount(classes, weights=values, minlength=len(numbers)) for values in (difference, difference**2)
    )
    size = numbers + 2
    variances: np.ndarray = ((squares + 1) / size - (totals / size) ** 2) / size
    return variances


def binomial_variances(runs: Sequence[Run], numbers: np.ndarray) -> np.ndarray:
    """Return the variance ``(C,)`` of a method's recalls if it is not known which images are the same.

    It is the binomial one with an image added on either side (Agresti and Coull, The American Statistician 52, 1998).
    Differences of two methods vary less, because both find the same images hard. So the sum of two is on the safe side.

    Args:
        runs: Runs of the method.
        numbers: Number of test images of each class ``(C,)``.
    """
    recalls = np.nan_to_num(np.mean([run.class_recalls for run in runs], 0))
    share = (recalls * numbers + 1) / (numbers + 2)
    variances: np.ndarray = share * (1 - share) / (numbers + 2)
    return variances


def _numbers(digits: str) -> np.ndarray:
    return np.frombuffer(digits.encode(), np.uint8).astype(float) - ord("0")
