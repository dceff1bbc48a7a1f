"""Published sharpness-aware methods, each as terms, an ascent, and what is made of the sum."""

from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_ssesam._validation import (
    check_below_one,
    check_choice,
    check_fraction,
    check_positive,
    check_radius,
)
from lightning_ssesam.ascent import Adaptive, Ascent, Friendly, InverseNorm, Momentum, Noise
from lightning_ssesam.objectives import SAM
from lightning_ssesam.targets import IGNORE_INDEX
from lightning_ssesam.tensors import quotient
from lightning_ssesam.terms import PARTLY_PERTURBED, InnerProducts, Objective, Term, filled, partly_perturbed


class ASAM(SAM):
    r"""Adaptive SAM (Kwon et al., ICML 2021, arXiv:2102.11600, algorithm 1).

    Term :math:`(1/N, \rho)` with :math:`T = |w| + \eta` on weights, and 1 on biases. Two passes. The authors use rho
    0.5 on CIFAR-10 and 1.0 on CIFAR-100, with eta 0.01.

    Args:
        rho: Radius of the perturbation in units of the scaled weights, a finite number >= 0.
        eta: Constant that is added to the size of the weights, a finite number >= 0.
        biases: ``"plain"`` has T = 1 on biases, ``"adaptive"`` treats them as weights.
        ignore_index: Target that does not count, any integer.
        ascent: Other parts of the ascent, such as its direction.

    Raises:
        ArgumentError: If an argument is out of range, or ``ascent`` has a scale.
    """

    def __init__(
        self,
        rho: float = 0.5,
        eta: float = 0.01,
        biases: Literal["plain", "adaptive"] = "plain",
        ignore_index: int = IGNORE_INDEX,
        *,
        ascent: Ascent | None = None,
    ) -> None:
        super().__init__(rho, ignore_index, ascent=ascent)
        self.eta = check_radius("eta", eta)
        self.biases = check_choice("biases", biases, ("plain", "adaptive"))
        self.make_ascent()

    @override
    def make_ascent(self) -> Ascent:
        return filled(self, scale=Adaptive(self.eta, self.biases))


class FriendlySAM(SAM):
    r"""Friendly SAM (Li et al., CVPR 2024, arXiv:2403.12350).

    Term :math:`(1/N, \rho)` with the direction :math:`d = g - \sigma m`, m the running mean of earlier gradients. Two
    passes. The authors use rho 0.2, sigma 1 and a decay of 0.95 for ResNet-18 on CIFAR-100.

    Args:
        rho: Radius of the perturbation, a finite number >= 0.
        sigma: Share of the mean that is subtracted, a finite number >= 0.
        decay: Weight of the earlier steps in the mean (lambda), in [0, 1).
        ignore_index: Target that does not count, any integer.
        ascent: Other parts of the ascent, such as its scale.

    Raises:
        ArgumentError: If an argument is out of range, or ``ascent`` has a direction.
    """

    def __init__(
        self,
        rho: float = 0.1,
        sigma: float = 1.0,
        decay: float = 0.9,
        ignore_index: int = IGNORE_INDEX,
        *,
        ascent: Ascent | None = None,
    ) -> None:
        super().__init__(rho, ignore_index, ascent=ascent)
        self.sigma = check_radius("sigma", sigma)
        self.decay = check_below_one("decay", decay)
        self.make_ascent()

    @override
    def make_ascent(self) -> Ascent:
        return filled(self, direction=Friendly(self.sigma, self.decay))


class GSAM(SAM):
    r"""Surrogate gap SAM (Zhuang et al., ICLR 2022, arXiv:2203.08065, algorithm 1).

    Term :math:`(1/N, \rho)`. The optimizer receives :math:`G - \alpha (g - \frac{\langle g, G \rangle}{\|G\|^2} G)`:
    less of the clean gradient's part across G, so that the loss at the weights falls less than that at the ascended
    weights. Two passes, and one more copy of the gradient. Their radius follows the learning rate: see
    :class:`~lightning_ssesam.RadiusSchedule`. For ViT-B/32 on ImageNet they use rho from 0.6 to 0.1 and alpha 0.6.

    Args:
        rho: Radius of the perturbation, a finite number >= 0.
        alpha: Factor of the part that is taken away, a finite number >= 0.
        ignore_index: Target that does not count, any integer.
        ascent: Where the perturbation takes the weights.

    Raises:
        ArgumentError: If an argument is out of range.
    """

    needs_clean_gradient = True

    def __init__(
        self, rho: float = 0.05, alpha: float = 0.4, ignore_index: int = IGNORE_INDEX, *, ascent: Ascent | None = None
    ) -> None:
        super().__init__(rho, ignore_index, ascent=ascent)
        self.alpha = check_radius("alpha", alpha)

    @override
    def combine(self, clean: list[Tensor], gradient: list[Tensor], inner: InnerProducts) -> list[Tensor]:
        across, along = inner(clean, gradient).sum(), inner(gradient, gradient).sum()
        torch._foreach_mul_(gradient, 1 + self.alpha * quotient(across, along))
        torch._foreach_add_(gradient, clean, alpha=-self.alpha)
        return gradient


class PGN(SAM):
    r"""Penalized gradient norm (Zhao et al., ICML 2022, arXiv:2202.03599, algorithm 1).

    Terms :math:`((1 - \alpha)/N, 0)` and :math:`(\alpha/N, \rho)`. Two passes, since one clean gradient serves both.
    The authors use rho 0.1 and alpha 0.8 for WRN-28-10 and ViT-S/16 on CIFAR.

    Args:
        rho: Radius of the perturbation, a finite number >= 0.
        alpha: Share of the perturbed gradient, a finite number > 0. With 1 it is SAM. Above 1, the clean gradient
            counts negatively.
        ignore_index: Target that does not count, any integer.
        ascent: Where the perturbation takes the weights.

    Raises:
        ArgumentError: If an argument is out of range.
    """

    term_names: tuple[str, ...] = PARTLY_PERTURBED

    def __init__(
        self, rho: float = 0.1, alpha: float = 0.8, ignore_index: int = IGNORE_INDEX, *, ascent: Ascent | None = None
    ) -> None:
        super().__init__(rho, ignore_index, ascent=ascent)
        self.alpha = check_positive("alpha", alpha)

    @override
    def terms(self, targets: Tensor) -> tuple[Term, ...]:
        return partly_perturbed(self._mean_weights(targets), self.alpha, self.rho, self.make_ascent())


class WSAM(SAM):
    r"""Weighted SAM (Yue et al., KDD 2023, arXiv:2305.15817), in the form in which the optimizer gets one gradient.

    Terms :math:`((1 - b)/N, 0)` and :math:`(b/N, \rho)` with :math:`b = \gamma / (1 - \gamma)`: the sharpness
    :math:`L(w + e) - L(w)` counts b times. Two passes. The authors find gamma from 0.8 to 0.95 stable, and their code
    has rho 0.05 and gamma 0.9; with 0.5 it is SAM. The default of their code takes the second part past the optimizer
    (``decouple=True``), which this is not.

    Args:
        rho: Radius of the perturbation, a finite number >= 0.
        gamma: Weight of the sharpness, in (0, 1). Above 0.5, the clean gradient counts negatively.
        ignore_index: Target that does not count, any integer.
        ascent: Where the perturbation takes the weights.

    Raises:
        ArgumentError: If an argument is out of range.
    """

    term_names: tuple[str, ...] = PARTLY_PERTURBED

    def __init__(
        self, rho: float = 0.01, gamma: float = 0.9, ignore_index: int = IGNORE_INDEX, *, ascent: Ascent | None = None
    ) -> None:
        super().__init__(rho, ignore_index, ascent=ascent)
        self.gamma = check_fraction("gamma", gamma)

    @override
    def terms(self, targets: Tensor) -> tuple[Term, ...]:
        gamma = check_fraction("gamma", self.gamma)
        return partly_perturbed(self._mean_weights(targets), gamma / (1 - gamma), self.rho, self.make_ascent())


class LESAM(Objective):
    r"""Loss-equated SAM (arXiv:2605.10183): a radius for which the loss rises by the same amount in every step.

    Term :math:`(1/N, r)` with :math:`r = \min(\sigma / \|g\|, \rho_{max})`. Two passes. The defaults are those of the
    authors' class; for ResNet-18 on CIFAR-100 they use sigma 0.35, which rises over the first ten epochs, and no limit.

    Args:
        sigma: Rise of the loss to first order, a finite number >= 0. With 0 nothing is perturbed.
        rho_max: Largest radius, a finite number >= 0.
        ignore_index: Target that does not count, any integer.
        ascent: Other parts of the ascent, such as its scale.

    Raises:
        ArgumentError: If an argument is out of range, or ``ascent`` has a radius.
    """

    term_names = ("all",)
    radius_names = ("sigma", "rho_max")

    def __init__(
        self,
        sigma: float = 0.1,
        rho_max: float = 0.05,
        ignore_index: int = IGNORE_INDEX,
        *,
        ascent: Ascent | None = None,
    ) -> None:
        super().__init__(ignore_index=ignore_index, ascent=ascent)
        self.sigma = check_radius("sigma", sigma)
        self.rho_max = check_radius("rho_max", rho_max)
        self.make_ascent()

    @override
    def make_ascent(self) -> Ascent:
        is_off = 0 in (check_radius("sigma", self.sigma), check_radius("rho_max", self.rho_max))
        return filled(self, radius=InverseNorm(1.0, 1.0) if is_off else InverseNorm(self.sigma, self.rho_max))

    @override
    def terms(self, targets: Tensor) -> tuple[Term, ...]:
        rho = 0.0 if self.sigma == 0 else self.rho_max
        return (Term(self._mean_weights(targets), rho, self.make_ascent()),)


class MomentumSAM(SAM):
    r"""Momentum-SAM (Becker et al., 2024, arXiv:2401.12033, algorithm 1): SAM for the price of plain training.

    Term :math:`(1/N, \rho)` at :math:`w - \rho \, v / \|v\|`, with v the optimizer's momentum. One pass, at the
    perturbed weights: ``train/loss``, batch norm's statistics and what ``sample_losses`` logs are those of this pass.
    The first step of a training has no momentum and is a plain one. The authors use rho 3 on CIFAR-100 and 0.3 on
    ImageNet (SGD).

    Args:
        rho: Radius of the perturbation, a finite number >= 0.
        ignore_index: Target that does not count, any integer.
        ascent: Other parts of the ascent, such as its scale.

    Raises:
        ArgumentError: If an argument is out of range, or ``ascent`` has a direction.
        MisconfigurationException: When training starts, if the optimizer has no momentum.
    """

    def __init__(self, rho: float = 0.3, ignore_index: int = IGNORE_INDEX, *, ascent: Ascent | None = None) -> None:
        super().__init__(rho, ignore_index, ascent=ascent)
        self.make_ascent()

    @override
    def make_ascent(self) -> Ascent:
        return filled(self, direction=Momentum())


class RandomSAM(SAM):
    r"""A step in a random direction before the gradient is taken: :math:`w + \rho \, z / \|z\|`, z normal.

    Term :math:`(1/N, \rho)`. One pass, at the perturbed weights, as for :class:`MomentumSAM`. It is the control for the
    others: what noise of the same length does. Gaussian neighborhood minimization (Li et al., NeurIPS 2024,
    arXiv:2410.21042) does not normalise: its radius is about :math:`\rho \sqrt P / 3` with P parameters, and its
    authors use 0.005 for that rho on CIFAR-100-LT (prompts of a pretrained ViT-B/16).

    Args:
        rho: Radius of the perturbation, a finite number >= 0.
        ignore_index: Target that does not count, any integer.
        ascent: Other parts of the ascent, such as its scale.

    Raises:
        ArgumentError: If an argument is out of range, or ``ascent`` has a direction.
    """

    def __init__(self, rho: float = 1.0, ignore_index: int = IGNORE_INDEX, *, ascent: Ascent | None = None) -> None:
        super().__init__(rho, ignore_index, ascent=ascent)
        self.make_ascent()

    @override
    def make_ascent(self) -> Ascent:
        return filled(self, direction=Noise())
