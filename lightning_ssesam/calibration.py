"""Calibration of groups of classes: how far the probability of a prediction is from the share that is right."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_calibration_error
from torchmetrics.utilities import dim_zero_cat
from typing_extensions import override

from lightning_ssesam._validation import bad_argument, check_choice, check_integer
from lightning_ssesam.metrics import _GroupMetric, _predicted
from lightning_ssesam.split import ClassSplit
from lightning_ssesam.targets import IGNORE_INDEX, ignored_mask

Norm = Literal["l1", "l2", "max"]


class Reliability(NamedTuple):
    """Confidence and accuracy of the samples of a group, in bins of equal width: what a reliability diagram shows.

    Attributes:
        samples: Number of samples in each bin ``(B,)``, int64.
        confidence: Mean confidence of each bin ``(B,)`` in [0, 1]; NaN for a bin without samples.
        accuracy: Share of each bin that is predicted right ``(B,)`` in [0, 1]; NaN for a bin without samples.
    """

    samples: Tensor
    confidence: Tensor
    accuracy: Tensor


class GroupCalibrationError(_GroupMetric):
    """Expected calibration error (ECE) of each group of classes, and of all (Guo et al., ICML 2017).

    The confidence of a prediction is its probability. Samples are sorted into bins of confidence. The error is the mean
    over bins of the distance between confidence and accuracy, weighted by the number of samples. Each value is
    torchmetrics' ``CalibrationError`` of the samples whose class belongs to the group. So every sample counts the same,
    unlike in :class:`~lightning_ssesam.HeadTailAccuracy`, where every class does. A group without samples, or with a
    score that is NaN, is NaN.

    The metric keeps two numbers of each sample until it is reset.

    Args:
        split: Class split, with all groups.
        n_bins: Number of bins, an integer >= 1.
        norm: ``"l1"`` for the ECE, ``"l2"`` for the root of the mean square, ``"max"`` for the largest distance.
        validate_args: Whether to check shapes and ranges of every batch; costs a synchronisation on a GPU.
        ignore_index: Target that does not count, any integer.
        **kwargs: See :class:`torchmetrics.Metric`.

    Returns:
        A dictionary of scalars in [0, 1] ``{"head", "tail", "many", "medium", "few", "all"}``, from ``forward`` and
        ``compute``.

    Raises:
        ArgumentError: If an argument is of the wrong kind or out of range; from ``update``, if predictions are class
            indices, which have no confidence.

    Example:
        >>> metric = GroupCalibrationError(ClassSplit([100, 5], tail=[1]))
        >>> metric.update(torch.tensor([[0.8, 0.2], [0.8, 0.2], [0.3, 0.7]]), torch.tensor([0, 1, 1]))
        >>> {name: round(metric.compute()[name].item(), 2) for name in ("head", "tail", "all")}
        {'head': 0.2, 'tail': 0.55, 'all': 0.3}
    """

    higher_is_better = False
    log_prefix = "ece_"
    plot_lower_bound: float = 0.0
    plot_upper_bound: float = 1.0
    plot = Metric._plot

    confidences: list[Tensor]
    hits: list[Tensor]
    targets: list[Tensor]

    def __init__(
        self,
        split: ClassSplit,
        n_bins: int = 15,
        norm: Norm = "l1",
        validate_args: bool = True,
        ignore_index: int = IGNORE_INDEX,
        **kwargs: Any,
    ) -> None:
        super().__init__(split, validate_args, ignore_index, **kwargs)
        self.n_bins = check_integer("n_bins", n_bins, minimum=1)
        self.norm = check_choice("norm", norm, ("l1", "l2", "max"))
        for name in ("confidences", "hits", "targets"):
            self.add_state(name, [], dist_reduce_fx="cat")

    @override
    def update(self, preds: Tensor, target: Tensor) -> None:
        """Keep confidence and hit of each sample of a batch.

        Args:
            preds: Logits or probabilities ``(N, C, ...)`` of any floating dtype. They count as probabilities if no one
                is negative and those of every sample add up to 1.
            target: Class indices ``(N, ...)``, an integer dtype, each in ``[0, C)`` or ``ignore_index``, which does not
                count.

        Raises:
            ArgumentError: If ``preds`` are class indices; if ``validate_args`` is set and shapes, dtypes or class
                indices do not fit.
        """
        if not preds.is_floating_point():
            raise bad_argument("preds", "scores, such as logits: class indices have no confidence", preds.dtype)
        super().update(preds, target)
        ignored = ignored_mask(target, self.ignore_index)
        # One dtype for all three: a process without samples gathers empty states of it.
        kept = (top_probabilities(preds), _predicted(preds) == target, target.masked_fill(ignored, -1))
        for state, values in zip((self.confidences, self.hits, self.targets), kept, strict=True):
            state.append(values.flatten().to(torch.float32))

    @override
    def _count(self, predicted: Tensor, target: Tensor) -> None:
        pass

    @override
    def _classes_of_values(self) -> dict[str, Tensor]:
        split = self.split
        groups = {name: getattr(split, name) for name in ("head", "tail", "many", "medium", "few")}
        return {**groups, "all": torch.ones(split.num_classes, dtype=torch.bool)}

    @override
    def _values(self) -> dict[str, Tensor]:
        """Return the error of each group."""
        return {name: self._error(*self._samples_of(name)) for name in self._classes_of_values()}

    def _error(self, confidences: Tensor, hits: Tensor) -> Tensor:
        if not len(hits) or bool(confidences.isnan().any()):
            return confidences.new_tensor(torch.nan)
        # The confidence of a prediction is the probability of the event that it is right.
        error: Tensor = binary_calibration_error(confidences, hits.long(), self.n_bins, self.norm, validate_args=False)
        return error.to(confidences)

    def reliability(self, group: str) -> Reliability:
        """Return confidence and accuracy of a group in bins of confidence, as counted in this process.

        Args:
            group: ``"head"``, ``"tail"``, ``"many"``, ``"medium"``, ``"few"`` or ``"all"``.

        Raises:
            ArgumentError: If there is no such group.
        """
        check_choice("group", group, self._classes_of_values())
        # A weighted `bincount` on a GPU is not deterministic.
        confidences, hits = (values.cpu() for values in self._samples_of(group))
        # As torchmetrics does, but a confidence of 1 belongs to the last bin.
        bins = torch.bucketize(confidences, torch.linspace(0, 1, self.n_bins + 1), right=True) - 1
        bins = bins.clamp(max=self.n_bins - 1)
        samples = bins.bincount(minlength=self.n_bins)
        return Reliability(samples, *(bins.bincount(values, self.n_bins) / samples for values in (confidences, hits)))

    def _samples_of(self, group: str) -> tuple[Tensor, Tensor]:
        """Return confidences and hits of the samples whose class belongs to a group."""
        confidences, hits, targets = (
            _joined(state, self.total) for state in (self.confidences, self.hits, self.targets)
        )
        # The last place is that of ignored targets, -1.
        mask = torch.cat([self._classes_of_values()[group], torch.zeros(1, dtype=torch.bool)]).to(targets.device)
        chosen = mask[targets.long()]
        return confidences[chosen], hits[chosen]


def top_probabilities(scores: Tensor) -> Tensor:
    """Return the probability of the predicted class ``(N, ...)``, float32, in [0, 1]; NaN where a score is NaN.

    Args:
        scores: Logits or probabilities ``(N, C, ...)``. They count as probabilities if no one is negative and those of
            every sample add up to 1.
    """
    scores = scores.float()
    # Not asked from the host, which would wait for the device. Sums of bfloat16 are 1 to within a hundredth.
    is_share = (scores >= 0).all() & ((scores.sum(1) - 1).abs() < 0.01).all()
    return torch.where(is_share, scores, scores.softmax(1)).amax(1).clamp(max=1)


def _joined(parts: list[Tensor] | Tensor, like: Tensor) -> Tensor:
    """Return the values of a state, also if nothing was counted."""
    return dim_zero_cat(parts) if len(parts) else torch.empty(0, device=like.device)
