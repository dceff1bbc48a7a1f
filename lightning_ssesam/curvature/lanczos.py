"""The Lanczos iteration, and what it tells of a symmetric matrix that can only be multiplied with."""

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from tqdm.auto import tqdm

from lightning_ssesam._validation import check_integer, check_positive
from lightning_ssesam.errors import NonFiniteError

# An eigenvalue smaller than this, relative to the largest absolute one, is found as exactly as one of this size.
_SMALLEST = 1e-3

# By how much products may fail to be symmetric, relative to the largest absolute eigenvalue.
_SYMMETRIC = 1e-3

_BLOCK = 8

_APART = 1_000_003


class SymmetricMatrix(Protocol):
    """A symmetric matrix ``(P, P)`` of which only products are known: a :class:`Hessian`, or a tensor."""

    @property
    def shape(self) -> Any:
        """``(P, P)``."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the vectors."""

    @property
    def device(self) -> torch.device:
        """Of the vectors."""

    def __matmul__(self, vectors: Tensor, /) -> Tensor:
        """Return the product with ``(P,)`` or ``(P, K)``."""


class Lanczos:
    """The symmetric Lanczos iteration with full reorthogonalization (Golub and Van Loan, section 10.3).

    After m steps there is an orthonormal basis Q of ``(P, m)`` in which the matrix is tridiagonal. SciPy's ``eigsh``
    restarts to save memory; here every product counts for both ends of the spectrum and for its density, and the
    iteration can stop as soon as both ends are known. Memory: m vectors.

    Args:
        matrix: The symmetric matrix.
        start: First vector ``(P,)``, normalized here.

    Attributes:
        asymmetry: The largest abs(u . Hv - v . Hu) of two successive vectors of the basis, rounding if the matrix is
            what it should be.

    """

    def __init__(self, matrix: SymmetricMatrix, start: Tensor) -> None:
        self._matrix = matrix
        self._blocks: list[Tensor] = []
        self._diagonal: list[float] = []
        self._beside: list[float] = []
        self._next: Tensor | None = start / norm(start)
        self.asymmetry = 0.0

    @property
    def steps(self) -> int:
        """How many products were made."""
        return len(self._diagonal)

    @property
    def is_exhausted(self) -> bool:
        """Whether the basis holds all that the start vector can reach: its Ritz values are eigenvalues."""
        return self._next is None

    def step(self) -> None:
        """Make one product.

        Raises:
            NonFiniteError: If it is infinite or not a number.

        """
        assert self._next is not None
        last = self._filled()[-1][-1] if self.steps else None
        self._keep(self._next)
        product = self._matrix @ self._next
        self._diagonal.append(dot(product, self._next))
        before = norm(product)
        if not math.isfinite(before):
            raise NonFiniteError("A product with the matrix is infinite or not a number.", product.new_tensor(before))
        if last is not None:
            self.asymmetry = max(self.asymmetry, abs(dot(product, last) - self._beside[-1]))
        # Twice is enough (Parlett).
        for _ in range(2):
            for block in self._filled():
                product = product - block.T @ (block @ product)
        left = norm(product)
        self._beside.append(left)
        scale = max(map(abs, self._diagonal + self._beside))
        full = self.steps == self._matrix.shape[0] or left <= 10 * torch.finfo(product.dtype).eps * scale
        self._next = None if full else product / left

    def ritz(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return Ritz values ascending ``(m,)``, their vectors in the basis ``(m, m)``, and the norms of the residuals.

        Within the norm of its residual of each Ritz value there is an eigenvalue.
        """
        from scipy.linalg import eigh_tridiagonal

        values, vectors = eigh_tridiagonal(self._diagonal, self._beside[:-1])
        return values, vectors, self._beside[-1] * np.abs(vectors[-1])

    def combine(self, coefficients: np.ndarray) -> Tensor:
        """Return the vector ``(P,)`` with these coefficients ``(m,)`` in the basis."""
        vector, start = torch.zeros_like(self._blocks[0][0]), 0
        for block in self._filled():
            part = torch.from_numpy(coefficients[start : start + len(block)]).to(block)
            vector += part @ block
            start += len(block)
        return vector

    def project_out(self, vectors: Tensor) -> Tensor:
        """Return the vectors ``(P, K)`` without their parts in the basis."""
        for block in self._filled():
            vectors = vectors - block.T @ (block @ vectors)
        return vectors

    @property
    def basis_trace(self) -> float:
        """The trace of the matrix within the basis."""
        return math.fsum(self._diagonal)

    def _keep(self, vector: Tensor) -> None:
        place = self.steps % _BLOCK
        if place == 0:
            self._blocks.append(vector.new_empty(_BLOCK, len(vector)))
        self._blocks[-1][place] = vector

    def _filled(self) -> list[Tensor]:
        last = (self.steps - 1) % _BLOCK + 1
        return [*self._blocks[:-1], self._blocks[-1][:last]]


@dataclass(frozen=True)
class Eigenvalues:
    """The two ends of a spectrum.

    Attributes:
        largest: The largest eigenvalue.
        smallest: The smallest eigenvalue, negative where the function has a direction of negative curvature.
        errors: Bounds on the errors of ``smallest`` and ``largest``: the norms of their residuals, within which there
            is an eigenvalue. Rounding of the products is not in them.
        iterations: How many products it took.
        converged: Whether both are within the tolerance.
        vectors: Their eigenvectors of unit length, of ``smallest`` and ``largest``, each ``(P,)``.

    """

    largest: float
    smallest: float
    errors: tuple[float, float]
    iterations: int
    converged: bool
    vectors: tuple[Tensor, Tensor]

    @property
    def ratio(self) -> float:
        """abs(smallest) / largest, by which Rangwani et al. (NeurIPS 2022, arXiv:2212.13827) tell saddles from minima.

        Large at a saddle, where ``smallest`` is negative. Infinite where ``largest`` is not positive.
        """
        return abs(self.smallest) / self.largest if self.largest > 0 else math.inf


@dataclass(frozen=True)
class SpectralDensity:
    """Eigenvalues as a distribution, by stochastic Lanczos quadrature (Ghorbani et al., ICML 2019, section 2).

    Attributes:
        nodes: Of each probe its Ritz values, ``(m,)``.
        weights: Of each probe how much of the distribution each stands for, ``(m,)``, summing to 1.

    """

    nodes: list[np.ndarray]
    weights: list[np.ndarray]

    def __call__(self, grid: np.ndarray, width: float) -> np.ndarray:
        """Return the density at the points of a grid ``(G,)``, smoothed with a Gaussian of this standard deviation."""
        check_positive("width", width)
        total = np.zeros(len(grid))
        for nodes, weights in zip(self.nodes, self.weights, strict=True):
            bells = np.exp(-0.5 * ((grid[:, None] - nodes) / width) ** 2) / (width * math.sqrt(2 * math.pi))
            total += bells @ weights
        smoothed: np.ndarray = total / len(self.nodes)
        return smoothed

    def share_below(self, value: float) -> float:
        """Return the share of the eigenvalues below ``value``, in [0, 1]."""
        pairs = zip(self.nodes, self.weights, strict=True)
        return float(np.mean([weights[nodes < value].sum() for nodes, weights in pairs]))


@dataclass(frozen=True)
class Trace:
    """The trace of a matrix, estimated.

    Attributes:
        value: The estimate, without bias.
        standard_error: Its standard error, 0 where it is exact; NaN from a single sample.

    """

    value: float
    standard_error: float


def dot(first: Tensor, second: Tensor) -> float:
    """Return the inner product of two vectors ``(P,)``, as exact for millions of entries as for few.

    ``torch.dot`` and ``norm`` add up one after the other on a CPU, which in float32 is off by 0.04 % at 11 million.
    """
    return float((first * second).sum())


def norm(vector: Tensor) -> float:
    """Return the length of a vector ``(P,)``, as exactly as :func:`dot`."""
    return math.sqrt(dot(vector, vector))


def random_vectors(matrix: SymmetricMatrix, number: int, seed: int, signs: bool = False) -> Tensor:
    """Return independent vectors ``(number, P)``, Gaussian or of random signs, the same on every device."""
    # Signs that depend on an iteration's start vector, whose seed is the same, would bias what it leaves to estimate.
    generator = torch.Generator().manual_seed(seed + _APART if signs else seed)
    size = (number, matrix.shape[0])
    if signs:
        values = torch.randint(2, size, generator=generator, dtype=torch.int8) * 2 - 1
    else:
        values = torch.randn(size, generator=generator, dtype=torch.float32)
    return values.to(matrix.device, matrix.dtype)


def find_ends(
    matrix: SymmetricMatrix,
    tolerance: float = 0.01,
    max_iterations: int = 200,
    seed: int = 0,
    progress: str | None = None,
) -> tuple[Eigenvalues, Lanczos]:
    """Find the ends of the spectrum, see :func:`extreme_eigenvalues`; return the iteration as well, for other uses."""
    check_positive("tolerance", tolerance)
    check_integer("max_iterations", max_iterations, minimum=1)
    iteration = Lanczos(matrix, random_vectors(matrix, 1, seed)[0])
    with tqdm(desc=progress, unit="product", leave=False, disable=progress is None) as bar:
        while True:
            iteration.step()
            values, vectors, residuals = iteration.ritz()
            floor = _SMALLEST * np.abs(values).max()
            good = bool((residuals[[0, -1]] <= tolerance * np.maximum(np.abs(values[[0, -1]]), floor)).all())
            bar.update()
            bar.set_postfix_str(f"{values[0]:.4g} ± {residuals[0]:.1g} to {values[-1]:.4g} ± {residuals[-1]:.1g}")
            # At first a small residual may mean that the start vector has not got anywhere yet.
            if iteration.is_exhausted or (good and iteration.steps > 4) or iteration.steps >= max_iterations:
                break
    if iteration.asymmetry > _SYMMETRIC * np.abs(values).max():
        rank_zero_warn(
            f"The products are not those of a symmetric matrix, by {iteration.asymmetry:.2g} where the largest absolute"
            f" eigenvalue is {np.abs(values).max():.2g}: rounding at a loss of nearly 0 (take float64), data that is"
            " another in every pass, or a layer whose second derivatives are wrong."
        )
    ends = Eigenvalues(
        largest=float(values[-1]),
        smallest=float(values[0]),
        errors=(float(residuals[0]), float(residuals[-1])),
        iterations=iteration.steps,
        converged=good,
        vectors=(iteration.combine(vectors[:, 0]), iteration.combine(vectors[:, -1])),
    )
    return ends, iteration


def extreme_eigenvalues(
    matrix: SymmetricMatrix,
    tolerance: float = 0.01,
    max_iterations: int = 200,
    seed: int = 0,
    progress: str | None = None,
) -> Eigenvalues:
    """Find the largest and the smallest eigenvalue, with their eigenvectors.

    Args:
        matrix: A symmetric matrix ``(P, P)``: a :class:`Hessian`, or a tensor.
        tolerance: Goes on until the bound on the error of each of the two is at most this, a number > 0, relative to
            its absolute value; where that is less than a thousandth of the larger one's, relative to this thousandth.
        max_iterations: Most products, an integer >= 1; as many vectors ``(P,)`` are held in memory.
        seed: Of the start vector.
        progress: What the progress display is called; none by default.

    Raises:
        ValueError: If an argument is out of range.
        NonFiniteError: If a product is infinite or not a number.

    Example:
        >>> ends = extreme_eigenvalues(torch.diag(torch.tensor([4.0, 1.0, 0.5, -1.0])), tolerance=1e-6)
        >>> round(ends.largest, 4), round(ends.smallest, 4), round(ends.ratio, 4)
        (4.0, -1.0, 0.25)

    """
    return find_ends(matrix, tolerance, max_iterations, seed, progress)[0]


def spectral_density(
    matrix: SymmetricMatrix, probes: int = 4, steps: int = 40, seed: int = 0, progress: str | None = None
) -> SpectralDensity:
    """Estimate the distribution of the eigenvalues by stochastic Lanczos quadrature.

    Args:
        matrix: A symmetric matrix ``(P, P)``: a :class:`Hessian`, or a tensor.
        probes: Random start vectors, an integer >= 1; the error falls with the square root of their number.
        steps: Products for each, an integer >= 1: the quadrature is exact for polynomials of degree ``2 * steps - 1``.
        seed: Of the start vectors.
        progress: What the progress display is called; none by default.

    """
    check_integer("probes", probes, minimum=1)
    check_integer("steps", steps, minimum=1)
    quadratures = []
    with tqdm(total=probes * steps, desc=progress, unit="product", leave=False, disable=progress is None) as bar:
        for number in range(probes):
            iteration = Lanczos(matrix, random_vectors(matrix, 1, seed + number)[0])
            while iteration.steps < steps and not iteration.is_exhausted:
                iteration.step()
                bar.update()
            quadratures.append(quadrature(iteration))
    return SpectralDensity([nodes for nodes, _ in quadratures], [weights for _, weights in quadratures])


def quadrature(iteration: Lanczos) -> tuple[np.ndarray, np.ndarray]:
    """Return the nodes and weights of the Gaussian quadrature that an iteration has found."""
    values, vectors, _ = iteration.ritz()
    return values, vectors[0] ** 2


def estimate_trace(matrix: SymmetricMatrix, samples: int = 10, seed: int = 0, known: Lanczos | None = None) -> Trace:
    r"""Estimate the trace by Hutchinson's method, exactly within the space that an iteration has explored.

    With the basis Q of the iteration, :math:`\mathrm{tr} H = \mathrm{tr}(Q^T H Q) + \mathrm{tr}((I-QQ^T) H (I-QQ^T))`;
    the first part is known, the second is estimated with vectors of random signs, and has far smaller variance, as the
    large eigenvalues are gone (Meyer et al., "Hutch++", SOSA 2021, on a Krylov basis).

    Args:
        matrix: A symmetric matrix ``(P, P)``: a :class:`Hessian`, or a tensor.
        samples: Random vectors, an integer >= 1. They share the passes over the data.
        seed: Of the vectors.
        known: The iteration; Hutchinson's method alone by default.

    Example:
        >>> estimate_trace(torch.diag(torch.tensor([4.0, 1.0, -1.0])))
        Trace(value=4.0, standard_error=0.0)

    """
    check_integer("samples", samples, minimum=1)
    vectors = random_vectors(matrix, samples, seed, signs=True).T
    if known is not None:
        if known.is_exhausted and known.steps == matrix.shape[0]:
            return Trace(known.basis_trace, 0.0)
        vectors = known.project_out(vectors)
    values = ((matrix @ vectors) * vectors).double().sum(0)
    if not bool(values.isfinite().all()):
        raise NonFiniteError("A product with the matrix is infinite or not a number.", values.sum())
    error = float(values.std()) / math.sqrt(samples) if samples > 1 else math.nan
    return Trace((0.0 if known is None else known.basis_trace) + float(values.mean()), error)
