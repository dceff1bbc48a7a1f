"""What a reader must know before believing a table: diverged runs, few images, trainings that are too short."""

import math
import statistics
from collections.abc import Sequence
from functools import partial

import numpy as np

from lightning_ssesam.experiments.intervals import FEW_IMAGES, classes_of
from lightning_ssesam.experiments.runs import GROUPS, Run, by_method, number_of_seeds

FITTED = 0.8
"""Training accuracy below which a method is said not to be trained yet: the mean over classes, so that a tail that is
not learned shows. It is not 1, because wrong labels and random crops can keep a good training from 1: a fifth of wrong
labels, as web searches give, leaves 0.8."""

ONE_SEED = "A single seed has no interval: it cannot tell a difference from chance."

# More classes than this are counted, not named.
_MAX_NAMES = 8


def remarks(runs: Sequence[Run]) -> list[str]:
    """Return what must be said beside the results, a sentence or two each. Most important remarks come first."""
    found = [f"Diverged, with a loss that is not finite: {diverged}"] if (diverged := diverged_runs(runs)) else []
    return [*found, *_not_fitted(runs), *about_images(runs), *_one_seed(runs), *_interrupted(runs)]


def _interrupted(runs: Sequence[Run]) -> list[str]:
    """Return which trainings were cut off. They are as good as the others."""
    names = [_name_with_interruptions(run) for run in runs if run.interruptions]
    more = f", and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    cut_off = f"Cut off and then made to the end, with the same numbers: {', '.join(names[:_MAX_NAMES])}{more}."
    return [cut_off] if names else []


def _name_with_interruptions(run: Run) -> str:
    times = f" ({run.interruptions} times)" if run.interruptions > 1 else ""
    return f"{run.method} with seed {run.seed}{times}"


def diverged_runs(runs: Sequence[Run]) -> str:
    """Return the names of the runs whose loss was not finite at the end."""
    return ", ".join(f"{run.method} with seed {run.seed}" for run in runs if run.diverged)


def divergence(runs: Sequence[Run]) -> str:
    """Return how many of a method's runs diverged, such as ``" (1 of 5 diverged)"``, or nothing if none did."""
    number = sum(run.diverged for run in runs)
    return f" ({number} of {len(runs)} diverged)" if number else ""


def numbers_of_images(runs: Sequence[Run], name: str) -> np.ndarray | None:
    """Return the smallest number of images of each class ``(C,)`` over the runs, or None if it is not known.

    Args:
        runs: Runs of a comparison.
        name: ``"val_images"`` or ``"test_images"``.
    """
    known = [numbers for run in runs if (numbers := getattr(run, name))]
    return np.min(known, 0) if known and len({len(numbers) for numbers in known}) == 1 else None


def describe_images(runs: Sequence[Run]) -> str:
    """Return how many images of each class validate and test, or nothing if it is not known."""
    names = {"val_images": "validation", "test_images": "test"}
    parts = []
    for name, purpose in names.items():
        if (numbers := numbers_of_images(runs, name)) is not None:
            least, most = int(numbers.min()), int(numbers.max())
            parts.append(f"{least:,} for {purpose}" if least == most else f"{least:,} to {most:,} for {purpose}")
    return f"Images of each class: {', '.join(parts)}" if parts else ""


def name_of_class(runs: Sequence[Run], number: int) -> str:
    """Return the name of a class, or its number if it has none."""
    return runs[0].class_names[number] if runs[0].class_names else str(number)


def _not_fitted(runs: Sequence[Run]) -> list[str]:
    found = []
    for method, method_runs in by_method(runs).items():
        # A longer training does not help a run that diverged.
        values = [run.train_accuracy.get("all", math.nan) for run in method_runs if not run.diverged]
        mean = statistics.mean(values) if values else math.nan
        if mean < FITTED:
            # What is rounded up to the limit would look fitted.
            found.append(f"{method} {min(100 * mean, 100 * FITTED - 0.1):.1f} %")
    if not found:
        return []
    return [f"The training set is not fitted yet ({', '.join(found)}): train longer before you compare."]


def _one_seed(runs: Sequence[Run]) -> list[str]:
    return [ONE_SEED] if number_of_seeds(runs) == 1 and len(by_method(runs)) > 1 else []


def about_images(runs: Sequence[Run]) -> list[str]:
    """Return what must be said of the numbers of validation and test images. They are known before the training."""
    tested, validated = (numbers_of_images(runs, name) for name in ("test_images", "val_images"))
    named = partial(named_classes, runs[0].class_names, file="classes.csv")
    found = []
    if tested is not None:
        if small := named(tested, (tested > 0) & (tested < FEW_IMAGES)):
            effect = "In such a class, a single image moves the accuracy by more than 10 points."
            found.append(f"Fewer than {FEW_IMAGES} test images: {small}. {effect}")
        if absent := named(tested, tested == 0):
            found.append(f"No test images: {absent}. What is not tested counts in no group, not even in all.")
        found += _empty_groups(runs, tested)
    if validated is not None and not validated.any():
        found.append("No class has validation images, so there is no best epoch.")
    elif validated is not None:
        if absent := named(validated, validated == 0):
            found.append(f"No validation images: {absent}. The best epoch is chosen without them.")
        small = named(validated, (validated > 0) & (validated < FEW_IMAGES))
        if small and (tested is None or not np.array_equal(tested, validated)):
            found.append(
                f"Fewer than {FEW_IMAGES} validation images: {small}. The best epoch is chosen by chance there."
            )
    return found


def _empty_groups(runs: Sequence[Run], tested: np.ndarray) -> list[str]:
    found = []
    for group in GROUPS if runs[0].groups else ():
        classes = classes_of(runs[0], group)
        if not classes.any():
            found.append(f"No class belongs to the group {group}, so its accuracy is nan.")
        elif not tested[classes].any():
            found.append(f"No class of the group {group} has test images, so its accuracy is nan.")
    return found


def named_classes(names: Sequence[str], numbers: np.ndarray, chosen: np.ndarray, file: str = "") -> str:
    """Return the chosen classes with their numbers of images, the smallest number first.

    Args:
        names: Name of each class, or nothing.
        numbers: Number of images of each class ``(C,)``.
        chosen: Mask of the chosen classes ``(C,)``.
        file: Name of a file that has all classes, if there is one.
    """
    classes = sorted(np.flatnonzero(chosen).tolist(), key=lambda number: numbers[number])
    texts = []
    for number in classes[:_MAX_NAMES]:
        name = repr(names[number]) if names else f"class {number}"
        texts.append(f"{name} ({numbers[number]})" if numbers[number] else name)
    if len(classes) > _MAX_NAMES:
        texts.append(f"and {len(classes) - _MAX_NAMES:,} more{f', in {file}' if file else ''}")
    return ", ".join(texts)
