"""How the strength tau of a correction is chosen on validation data."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_ssesam._validation import bad_argument, check_choice, check_increasing, check_radius, check_share
from lightning_ssesam.errors import ArgumentError
from lightning_ssesam.metrics import HeadTailAccuracy, ManyMediumFewAccuracy
from lightning_ssesam.posthoc.outputs import Outputs
from lightning_ssesam.split import ClassSplit

CRITERIA = ("recall", "tail")
GROUPS = ("head", "tail", "many", "medium", "few", "all")

DEFAULT_TAUS = tuple(number / 10 for number in range(21))
"""0, 0.1, ..., 2, as in the code of Kang et al., ICLR 2020."""


@dataclass(frozen=True)
class TauChoice:
    """The values of tau that are tried on validation data, and what makes one the best.

    Args:
        taus: Values of tau, strictly increasing finite numbers >= 0. A single one is taken as it is.
        criterion: ``"recall"`` for the highest mean of the recalls of all classes (balanced accuracy); ``"tail"`` for
            the highest mean recall of the tail, among the values with which the head loses at most ``head_drop``. Of
            equal values, the smallest tau is taken.
        head_drop: Fall of the head's mean recall that ``"tail"`` allows, a number in [0, 1].

    Raises:
        ArgumentError: If an argument is out of range.
    """

    taus: Sequence[float] = DEFAULT_TAUS
    criterion: str = "recall"
    head_drop: float = 0.05

    def __post_init__(self) -> None:
        check_increasing("taus", self.taus, check_radius, "finite numbers >= 0")
        check_choice("criterion", self.criterion, CRITERIA)
        check_share("head_drop", self.head_drop)

    def best(self, recalls: Callable[[float], Mapping[str, float]], before: Mapping[str, float]) -> float:
        """Return the best tau.

        Args:
            recalls: Function that returns the recalls of the groups with a tau, see :func:`group_recalls`.
            before: Recalls without a correction.

        Raises:
            ArgumentError: If there is nothing to choose by: the validation data has no sample of the tail or the head.
        """
        if len(self.taus) == 1:
            return float(self.taus[0])
        scores = [self.score(recalls(tau), before) for tau in self.taus]
        return float(self.taus[max(range(len(scores)), key=scores.__getitem__)])

    def score(self, recalls: Mapping[str, float], before: Mapping[str, float]) -> float:
        """Return how good recalls are, as a number that grows. Too great a loss of the head comes last.

        Args:
            recalls: Recalls of the groups with a correction.
            before: Recalls without.

        Raises:
            ArgumentError: If a recall that is needed is not known.
        """
        needed = ("all",) if self.criterion == "recall" else ("head", "tail")
        for group in needed:
            if math.isnan(recalls[group]):
                found = f"{self.criterion!r}, for which the validation data has no sample of the group {group!r}"
                raise bad_argument("criterion", "one that the validation data can decide", got_text=found)
        if self.criterion == "recall":
            return recalls["all"]
        loss = before["head"] - recalls["head"]
        # The slack makes up for rounding, as recalls are in float32.
        return recalls["tail"] if loss <= self.head_drop + 1e-6 else -loss


def scores_of(outputs: Outputs) -> Tensor:
    """Return what decides the predicted class, ``(N, C)``: logits, or the mean probabilities over mirror images."""
    return outputs.logits if outputs.mirrored is None else probabilities_of(outputs)


def probabilities_of(outputs: Outputs) -> Tensor:
    """Return the class probabilities, ``(N, C)``; with mirror images their mean."""
    probabilities = outputs.logits.softmax(1)
    return probabilities if outputs.mirrored is None else (probabilities + outputs.mirrored.logits.softmax(1)) / 2


def group_recalls(outputs: Outputs, split: ClassSplit) -> dict[str, float]:
    """Return the mean recall over the classes of each group, in [0, 1]; NaN for a group without samples.

    Args:
        outputs: Outputs of a network.
        split: Class split.

    Returns:
        A dictionary with the keys ``"head"``, ``"tail"``, ``"many"``, ``"medium"``, ``"few"`` and ``"all"``.
    """
    scores, found = scores_of(outputs), dict[str, float]()
    if scores.shape[1] != split.num_classes:
        raise ArgumentError(f"The network has {scores.shape[1]} logits, but the split has {split.num_classes} classes.")
    for metric in (HeadTailAccuracy(split), ManyMediumFewAccuracy(split)):
        metric.update(scores, outputs.targets)
        found |= {name: float(value) for name, value in metric.compute().items()}
    return {group: found[group] for group in GROUPS}


def mean_nll(outputs: Outputs) -> float:
    """Return the mean negative log-likelihood of the targets."""
    logits = outputs.logits.double()
    return float(torch.nn.functional.cross_entropy(logits, outputs.targets))
