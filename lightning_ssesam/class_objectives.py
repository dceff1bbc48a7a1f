"""Objectives that treat each class by its number of training samples."""

from dataclasses import replace

import torch
from torch import Tensor
from typing_extensions import override

from lightning_ssesam._validation import bad_argument, check_positive, check_radius
from lightning_ssesam.ascent import Ascent, PACBayesRadius
from lightning_ssesam.split import ClassSplit
from lightning_ssesam.targets import IGNORE_INDEX, check_class_indices, check_probabilities, fill_ignored
from lightning_ssesam.terms import (
    PARTLY_PERTURBED,
    Objective,
    Term,
    check_tensor,
    filled,
    partly_perturbed,
    weight_dtype,
)


class _ClassObjective(Objective):
    """Shared by the objectives that treat each class by its number of training samples."""

    needs_split = True

    def _class_means(self, targets: Tensor, values: Tensor) -> Tensor:
        """Return the mean of the classes' values ``(C,)`` for each loss, ``(N, ...)``; 0 where it is ignored."""
        self.check_ready()
        assert self._split is not None
        check_tensor(targets)
        targets = self.positions(targets)
        values = values.to(targets.device, weight_dtype(targets))
        if targets.is_floating_point():
            return self._class_masses(targets) @ values
        check_class_indices(targets, self._split.num_classes, self.ignore_index)
        ignored = self.find_ignored(targets)
        return fill_ignored(values[fill_ignored(targets.long(), ignored)], ignored)

    def _class_masses(self, targets: Tensor) -> Tensor:
        """Return how much of each sample belongs to each class, ``(N, ..., C)``; 0 where the target is ignored."""
        self.check_ready()
        assert self._split is not None
        check_tensor(targets)
        num_classes, dtype = self._split.num_classes, weight_dtype(targets)
        ignored = self.find_ignored(targets)
        if not targets.is_floating_point():
            check_class_indices(targets, num_classes, self.ignore_index)
            masses = torch.nn.functional.one_hot(fill_ignored(targets.long(), ignored), num_classes).to(dtype)
            return masses if ignored is None else masses.masked_fill(ignored.unsqueeze(-1), 0)
        if targets.ndim < 2 or targets.shape[1] != num_classes:
            expected = f"class indices of an integer dtype, or class probabilities of shape (N, {num_classes})"
            raise bad_argument("targets", expected, got_text=f"shape {tuple(targets.shape)} of {targets.dtype}")
        masses = fill_ignored(targets, ignored).movedim(1, -1).to(dtype)
        check_probabilities(masses, ignored)
        return masses


class FocalSAM(_ClassObjective):
    r"""Focal-SAM (Li et al., ICML 2025, arXiv:2505.01660): the smaller a class, the more its sharpness counts.

    Terms :math:`((1 - c_y)/N, 0)` and :math:`(c_y/N, \rho)` with :math:`c_y = \lambda (1 - n_y/n)^\gamma`, the training
    samples :math:`n_y` of a class and n of all, the sum of the class counts. Two forwards and three backwards, as every
    sample belongs to both terms. For ResNet-32 the authors use rho 0.2, gamma 3.0 and sharpness 0.5 on CIFAR-10-LT, and
    0.3, 3.2 and 0.8 on CIFAR-100-LT.

    Args:
        split: Class split, for its numbers of training samples. Can be bound later.
        rho: Radius of the perturbation, a finite number >= 0.
        gamma: Exponent by which large classes count less, a finite number >= 0.
        sharpness: Largest share lambda of the perturbed loss, a finite number >= 0. Above 1, as in the authors' setting
            for iNaturalist, the clean loss of small classes counts negatively.
        ignore_index: Target that does not count, any integer.
        ascent: Where the perturbation takes the weights.

    Raises:
        ArgumentError: If an argument is out of range.
    """

    term_names: tuple[str, ...] = PARTLY_PERTURBED

    def __init__(
        self,
        split: ClassSplit | None = None,
        rho: float = 0.1,
        gamma: float = 3.0,
        sharpness: float = 0.8,
        ignore_index: int = IGNORE_INDEX,
        *,
        ascent: Ascent | None = None,
    ) -> None:
        super().__init__(split, ignore_index, ascent)
        self.rho = check_radius("rho", rho)
        self.gamma = check_radius("gamma", gamma)
        self.sharpness = check_radius("sharpness", sharpness)

    @override
    def terms(self, targets: Tensor) -> tuple[Term, ...]:
        self.check_ready()
        assert self._split is not None
        counts = self._split.class_counts.double()
        shares = self._class_means(targets, self.sharpness * (1 - counts / counts.sum()) ** self.gamma)
        return partly_perturbed(self._mean_weights(targets), shares, self.rho, self.make_ascent())


class CCSAM(_ClassObjective):
    r"""Class-conditional SAM (Zhou et al., CVPR 2023), stage 1: each class perturbs the classifier by itself.

    Terms :math:`((1 - f)/N, 0)` on all samples, and for each class c of the batch :math:`(f/N, r_c)` on its samples.
    Only the last linear layer moves, each of its tensors p by :math:`r_{c,p} \, u(h_p)`, with h the gradient of the
    class's mean loss and :math:`r_{c,p} = r M^{1/4} (\|W\| / 2 \|h_p\|)^{1/2} (n_c - 1)^{-1/4}`; M and :math:`\|W\|`
    are the number and the norm of the layer's weights. With C classes in the batch, it makes 1 + C forwards and 2 C
    backwards; with split passes 2 C of each, of a class's samples alone, so that a step costs two plain ones. Logs
    number the terms by the place of their class in the batch. The authors use share 0.5 on CIFAR-100-LT and 0.3 on
    CIFAR-10-LT; the radius of their release is 1e-6, which is next to nothing. A split with ``multi_label`` is refused,
    because no sample belongs to one class.

    Args:
        split: Class split, for its numbers of training samples. Can be bound later.
        radius: Factor r of the radii, a finite number >= 0.
        share: Share f of the perturbed loss, in (0, 1].
        ignore_index: Target that does not count, any integer.
        ascent: The scale of the ascent, or other parameters than the classifier's (``only``).

    Raises:
        ArgumentError: If an argument is out of range, or ``ascent`` has a direction with a state, or a radius.
    """

    radius_names = ("radius",)

    def __init__(
        self,
        split: ClassSplit | None = None,
        radius: float = 0.002,
        share: float = 0.5,
        ignore_index: int = IGNORE_INDEX,
        *,
        ascent: Ascent | None = None,
    ) -> None:
        super().__init__(split, ignore_index, ascent)
        self.radius = check_radius("radius", radius)
        if not 0 < check_positive("share", share) <= 1:
            raise bad_argument("share", "a number in (0, 1]", share)
        self.share = float(share)
        if self.ascent.direction.keeps_state:
            expected = "an Ascent whose direction keeps no state, because the terms are other ones in each batch"
            raise bad_argument("ascent", expected, self.ascent)
        self.make_ascent()

    @override
    def _check_split(self, split: ClassSplit) -> None:
        if split.multi_label:
            expected = "a ClassSplit without `multi_label`, as CCSAM perturbs for the samples of one class at a time"
            got = f"{split}; FocalSAM and the objectives of head and tail can use it"
            raise bad_argument("split", expected, got_text=got)

    @override
    def make_ascent(self) -> Ascent:
        return self._ascent(PACBayesRadius(max(self.radius, 1e-300), 2, per_tensor=True))

    def _ascent(self, radius: PACBayesRadius) -> Ascent:
        ascent = filled(self, radius=radius)
        return replace(ascent, only="classifier") if ascent.only is None else ascent

    @override
    def terms(self, targets: Tensor) -> tuple[Term, ...]:
        masses, mean = self._class_masses(targets), self._mean_weights(targets)
        assert self._split is not None
        counts, factor = self._split.class_counts.tolist(), check_radius("radius", self.radius)
        totals = (masses.flatten(0, -2) * mean.flatten().unsqueeze(-1)).sum(0).tolist()
        terms = [Term((1 - self.share) * mean, 0.0)]
        for number in [number for number, total in enumerate(totals) if total > 0]:
            weights = self.share * mean * masses[..., number]
            if factor == 0:
                terms.append(Term(weights, 0.0))
                continue
            # A class of a single sample would have an infinite radius.
            radius = PACBayesRadius(factor, max(counts[number], 2), per_tensor=True, share=self.share * totals[number])
            terms.append(Term(weights, factor, self._ascent(radius)))
        return tuple(terms)
