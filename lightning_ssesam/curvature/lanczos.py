"""Eigenvalues, trace and spectral density of a symmetric matrix that is known by its products with vectors."""

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

# All relative to the largest absolute eigenvalue. The error of a smaller eigenvalue is measured against this size ...
_SMALLEST = 1e-3
# ... and products that are less symmetric than this cause a warning.
_SYMMETRIC = 1e-3
# Vectors of the basis that are stored together. Larger blocks make fewer calls, and waste more memory in the last one.
_BLOCK = 8


class Matrix(Protocol):
    """A symmetric matrix ``(P, P)``: a :class:`Hessian`, or a tensor.

    It is known by its products with a vector ``(P,)``, or several ``(P, K)``, of its ``dtype`` on its ``device``.
    """

    shape: Any
    dtype: torch.dtype
    device: torch.device

    def __matmul__(self, vectors: Tensor, /) -> Tensor: ...


class Lanczos:
    """The symmetric Lanczos iteration with full reorthogonalization (Golub and Van Loan, section 10.3).

    After m steps it has an orthonormal basis Q ``(P, m)`` in which the matrix is tridiagonal. It keeps all m vectors,
    where SciPy's ``eigsh`` restarts to save memory. In return, every product serves both ends of the spectrum and its
    density, and the iteration can stop as soon as both ends are known.
    """

    def __init__(self, matrix: Matrix, start: Tensor) -> None:
        self._matrix = matrix
        self._blocks: list[Tensor] = []
        # The diagonal of the tridiagonal matrix; its sum is the trace within the space of the basis.
        self.diagonal: list[float] = []
        self._off_diagonal: list[float] = []
        self._next: Tensor | None = start / norm(start)
        # Largest abs(u . Hv - v . Hu) of two successive vectors of the basis; of a symmetric matrix, rounding alone.
        self.asymmetry = 0.0

    @property
    def steps(self) -> int:
        """Number of products that were made."""
        return len(self.diagonal)

    @property
    def is_exhausted(self) -> bool:
        """Whether the basis spans all that the start vector can reach. The Ritz values are then eigenvalues."""
        return self._next is None

    def step(self) -> None:
        """Make one product, and extend the basis. Raise ``NonFiniteError`` if the product is not finite."""
        assert self._next is not None
        last = self._filled()[-1][-1] if self.steps else None
        row = self.steps % _BLOCK
        if row == 0:
            self._blocks.append(self._next.new_empty(_BLOCK, len(self._next)))
        self._blocks[-1][row] = self._next
        product = self._matrix @ self._next
        self.diagonal.append(dot(product, self._next))
        length = norm(product)
        if not math.isfinite(length):
            raise NonFiniteError("A product with the matrix is infinite or not a number.", product.new_tensor(length))
        if last is not None:
            self.asymmetry = max(self.asymmetry, abs(dot(product, last) - self._off_diagonal[-1]))
        # Rounding leaves parts of the basis in the product; removing them twice is enough (Parlett).
        product = self.project_out(self.project_out(product))
        remainder = norm(product)
        self._off_diagonal.append(remainder)
        scale = max(map(abs, self.diagonal + self._off_diagonal))
        is_full = self.steps == self._matrix.shape[0] or remainder <= 10 * torch.finfo(product.dtype).eps * scale
        self._next = None if is_full else product / remainder

    def ritz(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the Ritz values ascending ``(m,)``, their vectors in the basis ``(m, m)`` and their residual norms.

        The distance from a Ritz value to the nearest eigenvalue is at most its residual norm.
        """
        from scipy.linalg import eigh_tridiagonal

        values, vectors = eigh_tridiagonal(self.diagonal, self._off_diagonal[:-1])
        return values, vectors, self._off_diagonal[-1] * np.abs(vectors[-1])

    def combine(self, coefficients: np.ndarray) -> Tensor:
        """Return the vector ``(P,)`` that has these coefficients ``(m,)`` in the basis."""
        parts = torch.split(torch.from_numpy(coefficients).to(self._blocks[0]), _BLOCK)
        vector = torch.zeros_like(self._blocks[0][0])
        for part, block in zip(parts, self._filled(), strict=True):
            vector += part @ block
        return vector

    def project_out(self, vectors: Tensor) -> Tensor:
        """Return a vector ``(P,)``, or several ``(P, K)``, without the components in the space of the basis."""
        for block in self._filled():
            vectors = vectors - block.T @ (block @ vectors)
        return vectors

    def quadrature(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the nodes and the weights of the Gaussian quadrature of the spectrum, each ``(m,)``."""
        values, vectors, _ = self.ritz()
        return values, vectors[0] ** 2

    def _filled(self) -> list[Tensor]:
        """Return the vectors of the basis in blocks ``(K, P)``."""
        last = (self.steps - 1) % _BLOCK + 1
        return [*self._blocks[:-1], self._blocks[-1][:last]]


@dataclass(frozen=True)
class Eigenvalues:
    """The two ends of a spectrum.

    Attributes:
        largest: Largest eigenvalue.
        smallest: Smallest eigenvalue. It is negative if the function has a direction of negative curvature.
        errors: Bounds on the errors of ``smallest`` and ``largest``: the norms of their residuals, without the rounding
            of the products.
        iterations: Number of products that the search took.
        converged: Whether both errors are within the tolerance.
        vectors: Eigenvectors of ``smallest`` and ``largest``, of unit length, each ``(P,)``.
    """

    largest: float
    smallest: float
    errors: tuple[float, float]
    iterations: int
    converged: bool
    vectors: tuple[Tensor, Tensor]

    @property
    def ratio(self) -> float:
        """abs(smallest) / largest. Rangwani et al. (NeurIPS 2022, arXiv:2212.13827) tell saddles from minima by it.

        It is large at a saddle, where ``smallest`` is negative. It is infinite if ``largest`` is not positive.
        """
        return abs(self.smallest) / self.largest if self.largest > 0 else math.inf


@dataclass(frozen=True)
class SpectralDensity:
    """Distribution of the eigenvalues, by stochastic Lanczos quadrature (Ghorbani et al., ICML 2019, section 2).

    Attributes:
        nodes: Ritz values of each probe, ``(m,)``.
        weights: Shares of the distribution that the nodes of each probe stand for, ``(m,)``, with sum 1.
    """

    nodes: list[np.ndarray]
    weights: list[np.ndarray]

    def __call__(self, grid: np.ndarray, width: float) -> np.ndarray:
        """Return the density at the points of a grid ``(G,)``, smoothed by a Gaussian of this standard deviation."""
        check_positive("width", width)
        total = np.zeros(len(grid))
        for nodes, weights in zip(self.nodes, self.weights, strict=True):
            bells = np.exp(-0.5 * ((grid[:, None] - nodes) / width) ** 2) / (width * math.sqrt(2 * math.pi))
            total += bells @ weights
        return np.asarray(total / len(self.nodes))

    def share_below(self, value: float) -> float:
        """Return the share of the eigenvalues below ``value``, in [0, 1]."""
        pairs = zip(self.nodes, self.weights, strict=True)
        return float(np.mean([weights[nodes < value].sum() for nodes, weights in pairs]))


@dataclass(frozen=True)
class Trace:
    """Estimate of the trace of a matrix.

    Attributes:
        value: The estimate, without bias.
        standard_error: Standard error of the estimate: 0 if it is exact, NaN from a single sample.
    """

    value: float
    standard_error: float


def dot(first: Tensor, second: Tensor) -> float:
    """Return the inner product of two vectors ``(P,)``, as exactly for millions of entries as for few.

    On a CPU, ``torch.dot`` and ``norm`` add up entry after entry. In float32 that is off by 0.04 % at 11 million.
    """
    return float((first * second).sum())


def norm(vector: Tensor) -> float:
    """Return the length of a vector ``(P,)``, as exactly as :func:`dot`."""
    return math.sqrt(dot(vector, vector))


def random_vectors(matrix: Matrix, number: int, seed: int, signs: bool = False) -> Tensor:
    """Return independent vectors ``(number, P)``, Gaussian or of random signs, the same on every device."""
    # Signs must not depend on the start vector of an iteration with the same seed: the estimate would be biased.
    generator = torch.Generator().manual_seed(seed + 1_000_003 if signs else seed)
    size = (number, matrix.shape[0])
    if signs:
        values = torch.randint(2, size, generator=generator, dtype=torch.int8) * 2 - 1
    else:
        values = torch.randn(size, generator=generator, dtype=torch.float32)
    return values.to(matrix.device, matrix.dtype)


def find_ends(
    matrix: Matrix, tolerance: float = 0.01, max_iterations: int = 200, seed: int = 0, progress: str | None = None
) -> tuple[Eigenvalues, Lanczos]:
    """Find the ends of the spectrum as :func:`extreme_eigenvalues` does, and return the iteration too."""
    check_positive("tolerance", tolerance)
    check_integer("max_iterations", max_iterations, minimum=1)
    iteration = Lanczos(matrix, random_vectors(matrix, 1, seed)[0])
    with tqdm(desc=progress, unit="product", leave=False, disable=progress is None) as bar:
        for _ in range(max_iterations):
            iteration.step()
            values, vectors, residuals = iteration.ritz()
            ends, errors, size = values[[0, -1]], residuals[[0, -1]], np.abs(values).max()
            is_accurate = bool((errors <= tolerance * np.maximum(np.abs(ends), _SMALLEST * size)).all())
            bar.update()
            bar.set_postfix_str(f"{ends[0]:.4g} ± {errors[0]:.1g} to {ends[1]:.4g} ± {errors[1]:.1g}")
            # In the first steps, residuals are also small if the start vector is nearly an eigenvector of the bulk.
            if iteration.is_exhausted or (is_accurate and iteration.steps > 4):
                break
    if iteration.asymmetry > _SYMMETRIC * size:
        rank_zero_warn(
            f"The products are not those of a symmetric matrix: they differ by {iteration.asymmetry:.2g}, and the"
            f" largest absolute eigenvalue is {size:.2g}. The cause is rounding at a loss near 0 (use float64), data"
            " that changes from pass to pass, or a layer with wrong second derivatives."
        )
    smallest, largest = ends.tolist()
    bounds = float(errors[0]), float(errors[1])
    eigenvectors = iteration.combine(vectors[:, 0]), iteration.combine(vectors[:, -1])
    return Eigenvalues(largest, smallest, bounds, iteration.steps, is_accurate, eigenvectors), iteration


def extreme_eigenvalues(
    matrix: Matrix, tolerance: float = 0.01, max_iterations: int = 200, seed: int = 0, progress: str | None = None
) -> Eigenvalues:
    """Find the largest and the smallest eigenvalue, with their eigenvectors.

    Args:
        matrix: A symmetric matrix ``(P, P)``: a :class:`Hessian`, or a tensor.
        tolerance: Relative error at which the search stops, a finite number > 0. It bounds the error of each of the two
            eigenvalues relative to its absolute value. If one end is smaller than a thousandth of the other, its error
            is measured relative to that thousandth, because a relative error means little near 0.
        max_iterations: Maximum number of products, an integer >= 1; as many vectors ``(P,)`` are held in memory.
        seed: Seed of the start vector.
        progress: Title of a progress display; no display by default.

    Raises:
        ArgumentError: If an argument is out of range.
        NonFiniteError: If a product is infinite or not a number.

    Example:
        >>> ends = extreme_eigenvalues(torch.diag(torch.tensor([4.0, 1.0, 0.5, -1.0])), tolerance=1e-6)
        >>> round(ends.largest, 4), round(ends.smallest, 4), round(ends.ratio, 4)
        (4.0, -1.0, 0.25)
    """
    return find_ends(matrix, tolerance, max_iterations, seed, progress)[0]


def spectral_density(
    matrix: Matrix, probes: int = 4, steps: int = 40, seed: int = 0, progress: str | None = None
) -> SpectralDensity:
    """Estimate the distribution of the eigenvalues by stochastic Lanczos quadrature.

    The errors that it raises are those of :func:`extreme_eigenvalues`.

    Args:
        matrix: A symmetric matrix ``(P, P)``: a :class:`Hessian`, or a tensor.
        probes: Number of random start vectors, an integer >= 1. The error falls with its square root.
        steps: Number of products for each, an integer >= 1. The quadrature is exact for polynomials of degree
            ``2 * steps - 1``.
        seed: Seed of the start vectors.
        progress: Title of a progress display; no display by default.
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
            quadratures.append(iteration.quadrature())
    return SpectralDensity([nodes for nodes, _ in quadratures], [weights for _, weights in quadratures])


def estimate_trace(matrix: Matrix, samples: int = 10, seed: int = 0, known: Lanczos | None = None) -> Trace:
    r"""Estimate the trace by Hutchinson's method; it is exact within the space that an iteration has explored.

    With the basis Q of the iteration, :math:`\mathrm{tr} H = \mathrm{tr}(Q^T H Q) + \mathrm{tr}((I-QQ^T) H (I-QQ^T))`.
    The first part is known. The second is estimated with vectors of random signs. It has far smaller variance, because
    the large eigenvalues are gone (Meyer et al., "Hutch++", SOSA 2021; here on a Krylov basis). The errors that it
    raises are those of :func:`extreme_eigenvalues`.

    Args:
        matrix: A symmetric matrix ``(P, P)``: a :class:`Hessian`, or a tensor.
        samples: Number of random vectors, an integer >= 1. They share the passes over the data.
        seed: Seed of the vectors.
        known: Iteration on the same matrix; Hutchinson's method alone by default.

    Example:
        >>> estimate_trace(torch.diag(torch.tensor([4.0, 1.0, -1.0])))
        Trace(value=4.0, standard_error=0.0)
    """
    check_integer("samples", samples, minimum=1)
    vectors, explored = random_vectors(matrix, samples, seed, signs=True).T, 0.0
    if known is not None:
        explored = math.fsum(known.diagonal)
        if known.is_exhausted and known.steps == matrix.shape[0]:
            return Trace(explored, 0.0)
        vectors = known.project_out(vectors)
    values = ((matrix @ vectors) * vectors).double().sum(0)
    if not bool(values.isfinite().all()):
        raise NonFiniteError("A product with the matrix is infinite or not a number.", values.sum())
    error = float(values.std()) / math.sqrt(samples) if samples > 1 else math.nan
    return Trace(explored + float(values.mean()), error)
