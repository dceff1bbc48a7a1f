"""The Hessian of a group's mean loss, as something to multiply with."""

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from lightning_ssesam._validation import bad_argument, check_choice
from lightning_ssesam.batches import find_targets, pick_samples
from lightning_ssesam.errors import NonFiniteError
from lightning_ssesam.objectives import _check_class_indices

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

SampleLosses = Callable[[Any, Any], Tensor]

# Two passes over the same samples differ by rounding alone.
_SAME_LOSS = 1e-3


class _Sums(NamedTuple):
    """What a pass over the data adds up."""

    weight: float
    loss: Tensor
    gradient: Tensor | None
    products: Tensor | None


class Hessian:
    r"""The Hessian of the mean loss over a group of classes, :math:`H = \nabla^2 \sum_i a_i l_i(w) / \sum_i a_i`.

    ``hessian @ v`` goes through the batches once, at the cost of a forward and two backwards for each (reverse over
    reverse, which every differentiable layer supports), and another backward for every further column of ``v``. Only
    the group's samples are forwarded, and memory does not grow with the number of batches. The model is evaluated in
    evaluation mode, in full precision, on copies of its weights; it is left as it is, its ``.grad`` and the random
    state included.

    Args:
        model: The model, with the weights :math:`w`. Parameters that require a gradient span the space, of dimension P.
        batches: Any iterable of batches, such as a ``DataLoader``, that can be gone through again and again and gives
            the same samples every time (random numbers are seeded alike for every pass).
        sample_losses: Called with ``(model, batch)``, returns the losses ``(N,)``, or dense ``(N, ...)`` like the
            targets; ``model.sample_losses(batch)`` by default.
        classes: The classes of the group, a boolean mask ``(C,)``; every sample by default. :math:`a_i` is 1 for a
            sample of these classes and 0 for others; a sample with class probabilities counts with its mass on them.
        dtype: Floating type to compute in, such as ``torch.float64``; that of the weights by default, float32 at least.
        batch_norm: ``"eval"`` (default) normalizes by the running statistics; ``"batch"`` by those of each batch, all
            of which is then forwarded.

    Raises:
        ValueError: If an argument is out of range; at the first pass, if the group has no samples, the losses are not
            one for each target, or a later pass sees other samples.
        NonFiniteError: At the first pass, if the loss or its gradient is infinite or not a number.

    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        sample_losses: SampleLosses | None = None,
        classes: Tensor | Sequence[bool] | None = None,
        dtype: torch.dtype | None = None,
        batch_norm: Literal["eval", "batch"] = "eval",
    ) -> None:
        if sample_losses is None and not callable(getattr(model, "sample_losses", None)):
            expected = "a function of the model and a batch, as the model has no `sample_losses` of its own"
            raise bad_argument("sample_losses", expected, sample_losses)
        if isinstance(batches, Iterator) or not isinstance(batches, Iterable):
            raise bad_argument("batches", "an iterable that can be gone through again and again", batches)
        self.model, self.batches = model, batches
        self.sample_losses = sample_losses or _own_sample_losses
        self.classes = None if classes is None else torch.as_tensor(classes).cpu()
        if self.classes is not None and (self.classes.dtype != torch.bool or self.classes.ndim != 1):
            raise bad_argument("classes", "a boolean mask (C,)", classes)
        self.batch_norm = check_choice("batch_norm", batch_norm, ("eval", "batch"))
        trained = [p for p in model.parameters() if p.requires_grad]
        if not trained:
            raise bad_argument("model", "one with parameters that require a gradient", got_text="one without")
        if dtype is not None and not dtype.is_floating_point:
            raise bad_argument("dtype", "a floating type", dtype)
        self.dtype = dtype or torch.promote_types(trained[0].dtype, torch.float32)
        self.device = trained[0].device
        self._sizes = [p.shape for p in trained]
        self._first: _Sums | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """``(P, P)``, where P is the number of trained parameters."""
        size = sum(shape.numel() for shape in self._sizes)
        return size, size

    @property
    def weight(self) -> float:
        r"""The number of samples in the group, :math:`\sum_i a_i`."""
        return self._survey().weight

    def loss(self, at: Tensor | None = None) -> float:
        """Return the mean loss of the group.

        Args:
            at: Added to the weights, ``(P,)``.

        """
        sums = self._survey() if at is None else self._pass(at)
        return float(sums.loss) / sums.weight

    def gradient(self) -> Tensor:
        """Return the gradient of the mean loss, ``(P,)``."""
        sums = self._survey()
        assert sums.gradient is not None
        return sums.gradient / sums.weight

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """Return the product with a vector ``(P,)`` or with each column of ``(P, K)``, in the shape of ``vectors``."""
        first = self._survey()
        columns = vectors.to(self.device, self.dtype).reshape(self.shape[0], -1)
        sums = self._pass(vectors=columns.T)
        assert sums.products is not None
        if not _are_close(sums, first):
            expected = "an iterable that gives the same samples every time"
            got = f"a loss of {float(sums.loss) / sums.weight:.6g} after {float(first.loss) / first.weight:.6g}"
            raise bad_argument("batches", expected, got_text=got)
        return (sums.products.T / sums.weight).reshape(vectors.shape)

    def linear_operator(self) -> "LinearOperator":
        """Return it for SciPy, such as ``scipy.sparse.linalg.eigsh``, with products in ``dtype`` on its device."""
        from scipy.sparse.linalg import LinearOperator

        def product(vectors: np.ndarray) -> np.ndarray:
            columns: np.ndarray = (self @ torch.from_numpy(np.ascontiguousarray(vectors))).cpu().numpy()
            return columns

        dtype = np.dtype(str(self.dtype).removeprefix("torch."))
        return LinearOperator(self.shape, matvec=product, matmat=product, rmatvec=product, dtype=dtype)

    def _survey(self) -> _Sums:
        """Return the sums at the weights themselves, found in the first pass."""
        if self._first is None:
            first = self._pass(gradient=True)
            assert first.gradient is not None
            if not bool(first.loss.isfinite() & first.gradient.isfinite().all()):
                raise NonFiniteError("The loss or its gradient is infinite or not a number.", first.loss / first.weight)
            self._first = first
        return self._first

    def _pass(self, at: Tensor | None = None, gradient: bool = False, vectors: Tensor | None = None) -> _Sums:
        """Go through the data once.

        Args:
            at: Added to the weights, ``(P,)``.
            gradient: Whether to add up the gradients.
            vectors: Add up the products with these, ``(K, P)``.

        """
        wrapped = _Losses(self.model, self.sample_losses)
        with self._evaluating(), torch.set_grad_enabled(gradient or vectors is not None):
            values, trained = self._copies(wrapped, at)
            add_up = partial(self._add_up, trained=trained, gradient=gradient, vectors=vectors)
            # Around the backward passes too, as they may forward again (activation checkpointing).
            sums: _Sums = functional_call(wrapped, values, (add_up,))
        return sums

    def _add_up(
        self, call: Callable[[Any], Tensor], trained: list[Tensor], gradient: bool, vectors: Tensor | None
    ) -> _Sums:
        weight = 0.0
        loss = torch.zeros((), dtype=torch.float64, device=self._exact_device)
        total = torch.zeros(self.shape[0], dtype=self.dtype, device=self.device) if gradient else None
        products = None if vectors is None else torch.zeros_like(vectors)
        for batch in self.batches:
            weighted, mass = self._weighted_loss(call, batch)
            weight += mass
            if weighted is None:
                continue
            loss += weighted.detach().to(loss)
            if total is not None:
                total += _flat(torch.autograd.grad(weighted, trained, allow_unused=True), trained)
            if vectors is not None and products is not None:
                _add_products(products, weighted, trained, vectors)
            # Else the next batch would be forwarded beside this one's graph.
            del weighted
        if weight == 0:
            raise bad_argument("batches", "data with samples of the group's classes", got_text="none of them")
        return _Sums(weight, loss, total, products)

    @property
    def _exact_device(self) -> torch.device:
        return torch.device("cpu") if self.device.type == "mps" else self.device

    def _weighted_loss(self, call: Callable[[Any], Tensor], batch: Any) -> tuple[Tensor | None, float]:
        """Return the sum of the group's losses in a batch, and their weight; None where it has none of them."""
        targets, mass = self._mass(batch)
        if targets is not None and mass is not None:
            rows = mass.unsqueeze(-1).flatten(1).any(1).nonzero().flatten()
            if not len(rows):
                return None, 0.0
            if len(rows) < len(mass) and not self._mixes_samples:
                select = getattr(self.model, "select_samples", None) or partial(pick_samples, size=len(targets))
                batch, mass = select(batch, index=rows), mass[rows]
        losses = call(_cast(move_data_to_device(batch, self.device), self.dtype))
        if losses.ndim == 0 or (mass is not None and losses.shape != mass.shape):
            expected = "unreduced" if mass is None else f"unreduced, of the shape {tuple(mass.shape)} of the targets"
            raise bad_argument("sample_losses", expected, got_text=f"losses of shape {tuple(losses.shape)}")
        if mass is None:
            return losses.sum(), float(losses.numel())
        return (losses * mass.to(losses)).sum(), float(mass.sum())

    def _mass(self, batch: Any) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Return the targets and how much of each sample is the group's."""
        if self.classes is None:
            return None, None
        find = getattr(self.model, "sample_targets", None) or partial(find_targets, owner=type(self.model).__name__)
        targets = find(batch).detach().cpu()
        if targets.is_floating_point():
            return targets, targets.double().movedim(1, -1) @ self.classes.double()
        _check_class_indices(targets, len(self.classes))
        return targets, self.classes[targets.long()].double()

    @property
    def _mixes_samples(self) -> bool:
        return any(isinstance(layer, _BatchNorm) and _is_of_batch(layer) for layer in self.model.modules())

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Put the model into evaluation mode and whatever else a pass needs; put everything back."""
        modes = {layer: layer.training for layer in self.model.modules()}
        with ExitStack() as stack:
            # Modes are put back one by one: a module may have been in evaluation mode in part.
            stack.callback(_set_modes, modes)
            stack.enter_context(getattr(self.model, "measuring", nullcontext)())
            stack.enter_context(isolate_rng())
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.autocast(self.device.type, enabled=False))
            # Neither fused attention nor compiled code has second derivatives; passes without derivatives do as others.
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
            torch.backends.mha.set_fastpath_enabled(False)
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(_TwiceDifferentiable())
            # What a forward makes anew, such as an initial state, goes with the copies.
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(self.dtype)
            for seed in (random.seed, np.random.seed, torch.manual_seed):
                seed(0)
            # Without `eval()`, which may be overridden to change weights (LoRA merges them).
            for layer in modes:
                layer.training = self.batch_norm == "batch" and isinstance(layer, _BatchNorm)
            yield

    @torch.no_grad()
    def _copies(self, wrapped: nn.Module, at: Tensor | None) -> tuple[dict[str, Tensor], list[Tensor]]:
        values = {name: _cast(buffer.clone(), self.dtype) for name, buffer in wrapped.named_buffers()}
        trained = []
        for name, parameter in wrapped.named_parameters():
            values[name] = _cast(parameter.detach().clone(), self.dtype)
            # `sample_losses` may be a module with parameters of its own.
            if parameter.requires_grad and name.startswith("model."):
                trained.append(values[name])
        if at is not None:
            parts = torch.split(at.to(trained[0]), [t.numel() for t in trained])
            for copy, part in zip(trained, parts, strict=True):
                copy += part.view_as(copy)
        for copy in trained:
            copy.requires_grad_()
        return values, trained


class _Losses(nn.Module):
    """A module of a function that uses a model, so that the model's weights can be exchanged while something runs."""

    def __init__(self, model: nn.Module, sample_losses: SampleLosses) -> None:
        super().__init__()
        self.model, self.sample_losses = model, sample_losses

    def forward(self, run: Callable[[Callable[[Any], Tensor]], _Sums]) -> _Sums:
        return run(partial(self.sample_losses, self.model))


class _TwiceDifferentiable(TorchFunctionMode):
    """Takes weight norm by its definition, as the second derivatives of PyTorch's fused operation are wrong."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._weight_norm:
            direction, length, dim = args
            return direction * (length / torch.norm_except_dim(direction, 2, dim))
        return func(*args, **(kwargs or {}))


def _set_modes(modes: dict[nn.Module, bool]) -> None:
    for layer, mode in modes.items():
        layer.training = mode


def _own_sample_losses(model: Any, batch: Any) -> Tensor:
    losses: Tensor = model.sample_losses(batch)
    return losses


def _is_of_batch(layer: _BatchNorm) -> bool:
    return layer.training or layer.running_mean is None


def _cast(values: Any, dtype: torch.dtype) -> Any:
    return apply_to_collection(values, Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t)


def _flat(parts: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor:
    return torch.cat(
        [(torch.zeros_like(p) if part is None else part).reshape(-1) for part, p in zip(parts, like, strict=True)]
    )


def _add_products(products: Tensor, loss: Tensor, trained: list[Tensor], vectors: Tensor) -> None:
    """Add to the rows of ``products`` those of the Hessian of ``loss`` with the rows of ``vectors``."""
    gradient = torch.autograd.grad(loss, trained, create_graph=True, allow_unused=True)
    curved = [position for position, part in enumerate(gradient) if part is not None and part.requires_grad]
    if not curved:
        return
    sizes = [t.numel() for t in trained]
    for number, vector in enumerate(vectors):
        parts = torch.split(vector, sizes)
        rows = torch.autograd.grad(
            [gradient[position] for position in curved],
            trained,
            [parts[position].view_as(trained[position]) for position in curved],
            retain_graph=number + 1 < len(vectors),
            allow_unused=True,
        )
        products[number] += _flat(rows, trained)


def _are_close(sums: _Sums, first: _Sums) -> bool:
    """Whether two passes may have seen the same samples, in any order."""
    slack = _SAME_LOSS * first.loss.abs() + 1e-12
    return math.isclose(sums.weight, first.weight) and bool((sums.loss - first.loss).abs() <= slack)
