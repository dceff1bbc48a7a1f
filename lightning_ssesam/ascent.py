r"""Where a perturbation takes the weights: :math:`e = r \, T^2 d / \|T d\|`, each part of it a value.

The direction d, the elementwise scale T, the radius r and the choice of parameters can each be replaced by themselves.
With the gradient for d and 1 for T, it is SAM's perturbation (Foret et al., ICLR 2021, eq. 2).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_ssesam._validation import (
    bad_argument,
    check_below_one,
    check_choice,
    check_flag,
    check_positive,
    check_radius,
    check_real,
)
from lightning_ssesam.tensors import Gradients
from lightning_ssesam.weights import SELECTIONS, Weights

State = dict[str, Any]
"""What a direction keeps from step to step: tensors, numbers, and lists with a tensor for each parameter, by name."""


class _Part:
    """A part of an ascent. Checkpoints may hold it in a hyperparameter, also with ``weights_only=True``."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        torch.serialization.add_safe_globals([cls])


class Direction(_Part, ABC):
    """Direction d of a perturbation. Its length does not matter, only :attr:`Ascent.radius` does.

    Subclass it for a direction of your own. It is a pure function: what it keeps from step to step is the ``state``
    that it returns, which the engine stores for each term and Lightning's checkpoints contain.
    """

    needs_gradient: ClassVar[bool] = True
    """Whether it looks at the gradient. Without, a term needs no backward pass at the unperturbed weights."""
    keeps_state: ClassVar[bool] = False
    """Whether it returns a state that depends on the gradients of earlier steps."""

    @abstractmethod
    def find(self, gradient: Gradients, weights: Weights, state: State) -> tuple[Gradients, State]:
        """Return the direction, and the state for the next step. Change neither argument in place.

        Args:
            gradient: Gradient of the term's loss at the unperturbed weights: for each parameter a tensor of its shape,
                or None for 0. It does not contain the factors of a GradScaler or of accumulation.
            weights: The parameters that move, in the order of the gradient.
            state: The state that the last perturbed step of this term has returned; empty in the first one. Lists
                have None for a parameter that was not among those of the last step.
        """


@dataclass(frozen=True)
class Gradient(Direction):
    """The gradient of the term, as in SAM."""

    @override
    def find(self, gradient: Gradients, weights: Weights, state: State) -> tuple[Gradients, State]:
        return gradient, state


@dataclass(frozen=True)
class Friendly(Direction):
    r"""The part of the gradient that is new: :math:`d = g - \sigma m`.

    m is the running mean of the gradients of the earlier steps, :math:`m \leftarrow \lambda m + (1 - \lambda) g`, and
    begins with the first one (Li et al., "Friendly Sharpness-Aware Minimization", CVPR 2024, arXiv:2403.12350). A
    parameter that was frozen begins anew.

    Args:
        sigma: Share of the mean that is subtracted, a finite number >= 0.
        decay: Weight of the earlier steps in the mean (lambda), in [0, 1).
    """

    sigma: float = 1.0
    decay: float = 0.9
    keeps_state: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_radius("sigma", self.sigma)
        check_below_one("decay", self.decay)

    @override
    def find(self, gradient: Gradients, weights: Weights, state: State) -> tuple[Gradients, State]:
        steps = state.get("steps", torch.zeros((), device=weights.device))
        direction: Gradients = []
        means = []
        for p, g, mean in zip(weights.values, gradient, state.get("mean", [None] * len(gradient)), strict=True):
            at_least_single = torch.promote_types(p.dtype, torch.float32)
            new = torch.zeros_like(p, dtype=at_least_single) if g is None else g.to(at_least_single)
            if mean is None:
                direction.append(new)
                means.append(new.clone())
            else:
                direction.append(new - self.sigma * mean)
                means.append(torch.where(steps == 0, new, mean + (1 - self.decay) * (new - mean)))
        return direction, {"mean": means, "steps": steps + 1}


@dataclass(frozen=True)
class Momentum(Direction):
    """Against the optimizer's momentum, which is there before any pass, so that the step makes one pass only.

    The momentum is the ``momentum_buffer`` of SGD or the ``exp_avg`` of Adam and its kin, both of which point uphill.
    So the perturbation looks ahead to where the optimizer is about to go (Becker et al., "Momentum-SAM",
    arXiv:2401.12033, algorithm 1). The first step of a training has no momentum, and is a plain one.

    Raises:
        ArgumentError: If the optimizer has no momentum.
    """

    needs_gradient: ClassVar[bool] = False

    @override
    def find(self, gradient: Gradients, weights: Weights, state: State) -> tuple[Gradients, State]:
        return [None if v is None else -v for v in weights.momentum()], state


@dataclass(frozen=True)
class Noise(Direction):
    """Normally distributed noise, drawn anew in every step, so that the step makes one pass only.

    It has a generator of its own, so that the samples, their order and dropout are those of a training without it. The
    seed is ``torch.initial_seed()`` at the first step, the same for all processes. Each term draws noise of its own.
    """

    needs_gradient: ClassVar[bool] = False

    @override
    def find(self, gradient: Gradients, weights: Weights, state: State) -> tuple[Gradients, State]:
        seed, draws = state.get("seed", weights.seed), state.get("draws", 0)
        # Each shard of a parameter gets noise of its own, and what several processes hold gets the same in all.
        generators = {
            shard: torch.Generator(weights.device).manual_seed((seed + 1_000_003 * draws + 7_919 * shard) % 2**63)
            for shard in set(weights.shards)
        }
        noise: Gradients = [
            torch.randn(p.shape, generator=generators[shard], device=p.device, dtype=p.dtype)
            for p, shard in zip(weights.values, weights.shards, strict=True)
        ]
        return noise, {"seed": seed, "draws": draws + 1}


class Scale(_Part, ABC):
    """Elementwise scale T of a perturbation. Subclass it for a scale of your own."""

    @abstractmethod
    def factors(self, weights: Weights) -> Sequence[Tensor | None]:
        """Return the factors >= 0 of each parameter, of its shape; None for 1."""


@dataclass(frozen=True)
class Adaptive(Scale):
    r"""The size of the weights: :math:`T = |w| + \eta` (Kwon et al., "ASAM", ICML 2021, arXiv:2102.11600).

    A parameter that is exactly 0 does not move if eta is 0.

    Args:
        eta: Constant that is added to the sizes, a finite number >= 0.
        biases: ``"plain"`` has T = 1 for biases, as the authors' code does; ``"adaptive"`` treats them as weights. A
            bias is a parameter with ``bias`` in its own name.
    """

    eta: float = 0.01
    biases: Literal["plain", "adaptive"] = "plain"

    def __post_init__(self) -> None:
        check_radius("eta", self.eta)
        check_choice("biases", self.biases, ("plain", "adaptive"))

    @override
    def factors(self, weights: Weights) -> Sequence[Tensor | None]:
        plain = weights.are_biases if self.biases == "plain" else [False] * len(weights.values)
        sizes = [p.abs() for p in weights.values]
        # In half precision, T d would lose digits or become 0.
        at_least_single = [torch.promote_types(size.dtype, torch.float32) for size in sizes]
        return [
            None if is_plain else size.to(dtype) + self.eta
            for size, dtype, is_plain in zip(sizes, at_least_single, plain, strict=True)
        ]


@dataclass(frozen=True, eq=False)
class Norms:
    r"""What a radius may depend on.

    Attributes:
        direction: :math:`\|T d\|` over all parameters that move, a scalar; with ``per_tensor``, that of each, ``(P,)``.
        rho: Radius of the term.
        size: Number of elements of the parameters that move.
    """

    direction: Tensor
    rho: float
    size: int
    _weights: Callable[[], Tensor]

    @cached_property
    def weights(self) -> Tensor:
        r""":math:`\|w\|` over all parameters that move, a scalar."""
        return self._weights()


class Radius(_Part, ABC):
    """Radius that depends on norms. Subclass it for a radius of your own, or use any function of :class:`Norms`."""

    per_tensor: bool = False
    """Whether each parameter tensor is moved by itself: :math:`e_p = r_p T^2 d_p / \\|T d_p\\|`."""

    @abstractmethod
    def __call__(self, norms: Norms) -> Tensor:
        """Return the radius >= 0, of the shape of ``norms.direction``."""


@dataclass(frozen=True)
class InverseNorm(Radius):
    r"""Radius :math:`\min(\sigma / \|T d\|, \rho_{max})`: the rise of the loss is the same in every step.

    LE-SAM (arXiv:2605.10183).

    Args:
        sigma: Rise of the loss to first order, a finite number > 0.
        rho_max: Largest radius, a finite number > 0.
    """

    sigma: float
    rho_max: float

    def __post_init__(self) -> None:
        check_positive("sigma", self.sigma)
        check_positive("rho_max", self.rho_max)

    @override
    def __call__(self, norms: Norms) -> Tensor:
        return (self.sigma / norms.direction).clamp(max=self.rho_max)


@dataclass(frozen=True)
class PACBayesRadius(Radius):
    r"""Radius that balances the two sides of a PAC-Bayesian bound: larger for small gradients and small classes.

    .. math:: r = \sqrt P \, \mathrm{clip}\left(C \left(\frac{\|w\|}{2 \|T d\|}\right)^{1/2} P^{-1/4} (n - 1)^{-1/4},
        \rho_{min}, \rho_{max}\right)

    with P the number of elements that move. Without limits it is that of CC-SAM (Zhou et al., CVPR 2023), with limits
    that of the release of GKP+GSA (arXiv:2603.21217).

    Args:
        factor: C, a finite number > 0.
        samples: n, the number of training samples, a finite number > 1.
        rho_min: Lower limit, a finite number >= 0.
        rho_max: Upper limit, a number >= ``rho_min``; infinite for none.
        per_tensor: Whether each parameter tensor has a radius and a norm of its own, as in CC-SAM.
        share: Factor between the loss of the term and the mean loss that the radius belongs to, a number or scalar
            tensor > 0. :math:`\|T d\|` is divided by it.
    """

    factor: float
    samples: float
    rho_min: float = 0.0
    rho_max: float = math.inf
    per_tensor: bool = False
    share: float | Tensor = field(default=1.0, compare=False)

    def __post_init__(self) -> None:
        check_positive("factor", self.factor)
        check_radius("rho_min", self.rho_min)
        check_real("a finite number > 1", lambda x: 1 < x < math.inf, "samples", self.samples)
        check_real(f"a number >= rho_min = {self.rho_min}", lambda x: x >= self.rho_min, "rho_max", self.rho_max)
        check_flag("per_tensor", self.per_tensor)
        if not isinstance(self.share, Tensor):
            check_positive("share", self.share)

    @override
    def __call__(self, norms: Norms) -> Tensor:
        mean_norm = norms.direction / self.share
        root = (norms.weights / (2 * mean_norm)).sqrt() * norms.size**-0.25 * (self.samples - 1) ** -0.25
        clipped: Tensor = (self.factor * root).clamp(self.rho_min, self.rho_max)
        return math.sqrt(norms.size) * clipped


@dataclass(frozen=True, repr=False)
class Ascent:
    r"""Where a perturbation takes the weights: :math:`e = r \, T^2 d / \|T d\|`, and 0 where the norm is 0.

    An argument of the objectives, and a field of :class:`~lightning_ssesam.Term`.

    Args:
        direction: Direction d: :class:`Gradient` (SAM), :class:`Friendly`, :class:`Momentum`, :class:`Noise`.
        scale: Elementwise scale T: :class:`Adaptive` (ASAM); None for 1.
        radius: Radius r as a function of :class:`Norms`: :class:`InverseNorm`, :class:`PACBayesRadius`; None for the
            ``rho`` of the term. A term of ``rho`` 0 is not perturbed in any case.
        only: Parameters that move. ``"norm"`` are those of normalization layers (SAM-ON, arXiv:2306.04226),
            ``"classifier"`` those of the last linear layer, ``"no_bias_no_norm"`` all but biases and normalization
            layers. A function gets the name and the parameter and returns whether it moves. None for all.

    Raises:
        ArgumentError: If an argument is of another kind; in the first step, if ``only`` finds no parameter.

    Example:
        >>> Ascent(scale=Adaptive(eta=0.01), only="no_bias_no_norm")
        Ascent(scale=Adaptive(eta=0.01, biases='plain'), only='no_bias_no_norm')
    """

    direction: Direction = Gradient()
    scale: Scale | None = None
    radius: Radius | Callable[[Norms], Tensor] | None = None
    only: Literal["norm", "classifier", "no_bias_no_norm"] | Callable[[str, Tensor], bool] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.direction, Direction):
            raise bad_argument("direction", "a Direction, such as Friendly()", self.direction)
        if self.scale is not None and not isinstance(self.scale, Scale):
            raise bad_argument("scale", "a Scale, such as Adaptive(), or None", self.scale)
        if self.radius is not None and (not callable(self.radius) or isinstance(self.radius, type)):
            raise bad_argument("radius", "a function of norms, such as InverseNorm(0.04, 0.1), or None", self.radius)
        is_name = isinstance(self.only, str) and self.only in SELECTIONS
        if self.only is not None and not is_name and (isinstance(self.only, str | type) or not callable(self.only)):
            names = ", ".join(map(repr, SELECTIONS))
            raise bad_argument("only", f"one of {names}, a function of a name and a parameter, or None", self.only)

    @property
    def is_plain(self) -> bool:
        """Whether it is that of SAM."""
        return self is PLAIN or (
            type(self.direction) is Gradient and self.scale is None and self.radius is None and self.only is None
        )

    def __repr__(self) -> str:
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return f"Ascent({', '.join(f'{name}={value!r}' for name, value in given.items())})"


PLAIN = Ascent()
"""The ascent of SAM."""

torch.serialization.add_safe_globals([Ascent])
