"""The Hessian of a group's mean loss, known by its products with vectors."""

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
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

from lightning_ssesam._validation import bad_argument, check_choice, check_flag
from lightning_ssesam.batches import find_targets, losses_of
from lightning_ssesam.class_order import in_class_order
from lightning_ssesam.curvature.settings import BATCH_NORM, check_dtype
from lightning_ssesam.errors import NonFiniteError
from lightning_ssesam.mixin import SharpnessAwareMixin
from lightning_ssesam.selection import SelectionError, pick_samples
from lightning_ssesam.targets import IGNORE_INDEX, check_class_indices, fill_ignored, find_ignored, label_indices

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

SampleLosses = Callable[[Any, Any], Tensor]


class _Sums(NamedTuple):
    """Sums over the samples of a group, from one pass over the data."""

    weight: float
    loss: Tensor
    gradient: Tensor | None
    products: Tensor | None


class Hessian:
    r"""The Hessian of the mean loss over a group of classes, :math:`H = \nabla^2 \sum_i a_i l_i(w) / \sum_i a_i`.

    Its ``shape`` is ``(P, P)``. ``hessian @ v`` goes through the batches once. It costs a forward and two backwards for
    each batch, and another backward for every further column of ``v``. Every layer must be twice differentiable. Only
    the group's samples are forwarded, and memory does not grow with the number of batches.

    Passes run on copies of the weights, in evaluation mode and in full precision. The model, its ``.grad`` and the
    random state are left as they are.

    Args:
        model: Model with the weights :math:`w`. Its P parameters that require a gradient span the space.
        batches: Any iterable of batches, such as a ``DataLoader``, that can be iterated again and again and yields the
            same samples every time. Every pass starts with the same random seed.
        sample_losses: Function of ``(model, batch)`` that returns the losses ``(N,)``, or dense ``(N, ...)`` like the
            targets. By default ``model.sample_losses(batch)``.
        classes: Classes of the group, a boolean mask ``(C,)``; every sample by default. :math:`a_i` is 1 for a sample
            of these classes and 0 for others. A sample with class probabilities counts with its mass on them.
        dtype: Floating type to compute in, see :class:`CurvatureSettings`.
        batch_norm: Statistics that batch norm uses, see :class:`CurvatureSettings`.
        multi_label: Flag of multi-label targets ``(N, C)``. :math:`a_i` is then 1 for the losses of the group's labels.

    Raises:
        ArgumentError: If an argument is out of range. At the first pass, if the group has no samples or the losses are
            not one for each target. At a later pass, if it sees other samples.
        NonFiniteError: At the first pass, if the loss or its gradient is infinite or not a number.

    Example:
        The loss :math:`2 w_0^2 - w_1^2` has a saddle.

        >>> def sample_losses(model, batch):
        ...     return (2 * model.weight[0, 0] ** 2 - model.weight[0, 1] ** 2).expand(len(batch))
        >>> model = nn.Linear(2, 1, bias=False)
        >>> Hessian(model, [torch.zeros(3, 1)], sample_losses) @ torch.eye(2)
        tensor([[ 4.,  0.],
                [ 0., -2.]])
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        sample_losses: SampleLosses | None = None,
        classes: Tensor | Sequence[bool] | None = None,
        dtype: str | torch.dtype | None = None,
        batch_norm: Literal["eval", "batch"] = "eval",
        multi_label: bool = False,
    ) -> None:
        if sample_losses is None and not callable(getattr(model, "sample_losses", None)):
            expected = "a function of the model and a batch, because the model has no method `sample_losses`"
            raise bad_argument("sample_losses", expected, sample_losses)
        if isinstance(batches, Iterator) or not isinstance(batches, Iterable):
            raise bad_argument("batches", "an iterable that can be iterated again and again", batches)
        self.model, self.batches = model, batches
        self._batch_idx = 0
        self.sample_losses = sample_losses or (lambda model, batch: losses_of(model, batch, self._batch_idx))
        self.classes = None if classes is None else torch.as_tensor(in_class_order("classes", classes)).cpu()
        if self.classes is not None and (self.classes.dtype != torch.bool or self.classes.ndim != 1):
            raise bad_argument("classes", "a boolean mask (C,)", classes)
        self.batch_norm = check_choice("batch_norm", batch_norm, BATCH_NORM)
        self.multi_label = check_flag("multi_label", multi_label)
        trained = [p for p in model.parameters() if p.requires_grad]
        if not trained:
            raise bad_argument("model", "one with parameters that require a gradient", got_text="one without")
        self.dtype = check_dtype(dtype) or torch.promote_types(trained[0].dtype, torch.float32)
        self.device = trained[0].device
        size = sum(p.numel() for p in trained)
        self.shape = (size, size)

    @property
    def weight(self) -> float:
        r"""The number of samples in the group, :math:`\sum_i a_i`."""
        return self._at_weights.weight

    def loss(self, at: Tensor | None = None) -> float:
        """Return the mean loss of the group, at the weights or at an offset ``(P,)`` from them."""
        sums = self._at_weights if at is None else self._pass(at)
        return float(sums.loss) / sums.weight

    def gradient(self) -> Tensor:
        """Return the gradient of the mean loss, ``(P,)``."""
        sums = self._at_weights
        assert sums.gradient is not None
        return sums.gradient / sums.weight

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """Return the product with a vector ``(P,)`` or with each column of ``(P, K)``, in the shape of ``vectors``."""
        first = self._at_weights
        columns = vectors.to(self.device, self.dtype).reshape(self.shape[0], -1)
        sums = self._pass(vectors=columns.T)
        assert sums.products is not None
        # The same samples may come in another order; the sums then differ by rounding alone.
        is_close = (sums.loss - first.loss).abs() <= 1e-3 * first.loss.abs() + 1e-12
        if not (is_close and math.isclose(sums.weight, first.weight)):
            expected = "an iterable that gives the same samples every time"
            got = f"a loss of {float(sums.loss) / sums.weight:.6g} after {float(first.loss) / first.weight:.6g}"
            raise bad_argument("batches", expected, got_text=got)
        return (sums.products.T / sums.weight).reshape(vectors.shape)

    def linear_operator(self) -> "LinearOperator":
        """Return an operator for SciPy, such as for ``scipy.sparse.linalg.eigsh``. Products are made in ``dtype``."""
        from scipy.sparse.linalg import LinearOperator

        def product(vectors: np.ndarray) -> np.ndarray:
            return (self @ torch.from_numpy(np.ascontiguousarray(vectors))).cpu().numpy()

        dtype = np.dtype(str(self.dtype).removeprefix("torch."))
        return LinearOperator(self.shape, matvec=product, matmat=product, rmatvec=product, dtype=dtype)

    @cached_property
    def _at_weights(self) -> _Sums:
        """The sums at the weights themselves, from the first pass."""
        sums = self._pass(gradient=True)
        assert sums.gradient is not None
        if not bool(sums.loss.isfinite() & sums.gradient.isfinite().all()):
            raise NonFiniteError("The loss or its gradient is infinite or not a number.", sums.loss / sums.weight)
        return sums

    def _pass(self, offset: Tensor | None = None, gradient: bool = False, vectors: Tensor | None = None) -> _Sums:
        """Go through the data once, at an offset ``(P,)`` from the weights. Vectors to multiply with are ``(K, P)``."""
        wrapped = _Losses(self.model, self.sample_losses)
        with self._evaluating(), torch.set_grad_enabled(gradient or vectors is not None):
            values, trained = self._copies(wrapped, offset)
            add_up = partial(self._add_up, trained=trained, gradient=gradient, vectors=vectors)
            # The copies also stand in during the backward passes, which may forward again (activation checkpointing).
            sums: _Sums = functional_call(wrapped, values, (add_up,))
        return sums

    def _add_up(
        self, call: Callable[[Any], Tensor], trained: list[Tensor], gradient: bool, vectors: Tensor | None
    ) -> _Sums:
        weight = 0.0
        # "mps" has no float64.
        exact_device = torch.device("cpu") if self.device.type == "mps" else self.device
        loss = torch.zeros((), dtype=torch.float64, device=exact_device)
        total = torch.zeros(self.shape[0], dtype=self.dtype, device=self.device) if gradient else None
        products = None if vectors is None else torch.zeros_like(vectors)
        for number, batch in enumerate(self.batches):
            self._batch_idx = number
            weighted, mass = self._weighted_loss(call, batch)
            weight += mass
            if weighted is None:
                continue
            loss += weighted.detach().to(loss)
            if total is not None:
                parts = torch.autograd.grad(weighted, trained, materialize_grads=True)
                total += torch.cat([part.reshape(-1) for part in parts])
            if vectors is not None and products is not None:
                _add_products(products, weighted, trained, vectors)
            # Free this batch's graph before the next forward pass.
            del weighted
        if weight == 0:
            raise bad_argument("batches", "data with samples of the group's classes", got_text="none of them")
        return _Sums(weight, loss, total, products)

    def _weighted_loss(self, call: Callable[[Any], Tensor], batch: Any) -> tuple[Tensor | None, float]:
        """Return the sum of the group's losses in a batch, and their weight. The sum is None if there are none."""
        mass = None
        if self.classes is not None:
            ignore_index = getattr(getattr(self.model, "objective", None), "ignore_index", IGNORE_INDEX)
            targets = self._targets(batch)
            if self.multi_label:
                targets = label_indices(targets, len(self.classes), ignore_index)
            mass = _mass(targets, self.classes, ignore_index)
            rows = mass.unsqueeze(-1).flatten(1).any(1).nonzero().flatten()
            if not len(rows):
                return None, 0.0
            norms = [layer for layer in self.model.modules() if isinstance(layer, _BatchNorm)]
            mixes_samples = any(norm.training or norm.running_mean is None for norm in norms)
            if len(rows) < len(mass) and not mixes_samples:
                batch, mass = self._select(batch, mass, rows)
        losses = call(_cast(move_data_to_device(batch, self.device), self.dtype))
        if losses.ndim == 0 or (mass is not None and losses.shape != mass.shape):
            expected = "unreduced" if mass is None else f"unreduced, of the shape {tuple(mass.shape)} of the targets"
            raise bad_argument("sample_losses", expected, got_text=f"losses of shape {tuple(losses.shape)}")
        if mass is None:
            return losses.sum(), float(losses.numel())
        return (losses * mass.to(losses)).sum(), float(mass.sum())

    def _targets(self, batch: Any) -> Tensor:
        find = getattr(self.model, "sample_targets", None)
        targets: Tensor = find(batch) if callable(find) else find_targets(batch, type(self.model).__name__)
        return targets.detach().cpu()

    def _select(self, batch: Any, mass: Tensor, rows: Tensor) -> tuple[Any, Tensor]:
        """Return the samples at some rows and their mass; all samples, if the batch cannot be split."""
        owner, select = type(self.model).__name__, getattr(self.model, "select_samples", None)
        try:
            chosen = select(batch, rows) if callable(select) else pick_samples(batch, rows, len(mass), owner)
        except SelectionError:
            # The others weigh nothing. They only cost time.
            return batch, mass
        if (found := len(self._targets(chosen))) != len(rows):
            expected = f"a method of `{owner}` that returns the {len(rows)} samples that it is asked for"
            raise bad_argument("select_samples", expected, got_text=f"a batch of {found} targets")
        return chosen, mass[rows]

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Prepare the model and the settings of torch for a pass, and put everything back after it."""
        # So that a module with `SharpnessAwareMixin` logs nothing. It is asked by name, because a module wrapped by
        # `torch.compile` hands its attributes on but has another type.
        measuring: Any = getattr(self.model, "measuring", None)
        with isolate_rng(), torch.inference_mode(False), torch.enable_grad(), ExitStack() as stack:
            if getattr(measuring, "__func__", None) is SharpnessAwareMixin.measuring:
                stack.enter_context(measuring())
            stack.enter_context(torch.autocast(self.device.type, enabled=False))
            # Fused attention and compiled code have no second derivatives. They are switched off in all passes, so that
            # passes with and without derivatives give the same losses.
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
            torch.backends.mha.set_fastpath_enabled(False)
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(_TwiceDifferentiable())
            # Tensors that a forward creates, such as an initial state, get the dtype of the copies.
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(self.dtype)
            for seed in (random.seed, np.random.seed, torch.manual_seed):
                seed(0)
            # `eval()` is not called, because an override may change weights (LoRA merges them).
            for layer in self.model.modules():
                stack.callback(setattr, layer, "training", layer.training)
                layer.training = self.batch_norm == "batch" and isinstance(layer, _BatchNorm)
            yield

    @torch.no_grad()
    def _copies(self, wrapped: nn.Module, offset: Tensor | None) -> tuple[dict[str, Tensor], list[Tensor]]:
        tensors = dict(wrapped.named_buffers()) | dict(wrapped.named_parameters())
        values = {name: _cast(tensor.detach().clone(), self.dtype) for name, tensor in tensors.items()}
        # `sample_losses` may be a module too, and its parameters are not the model's.
        names = [name for name, p in wrapped.named_parameters() if p.requires_grad and name.startswith("model.")]
        trained = [values[name] for name in names]
        if offset is not None:
            parts = torch.split(offset.to(trained[0]), [t.numel() for t in trained])
            for copy, part in zip(trained, parts, strict=True):
                copy += part.view_as(copy)
        for copy in trained:
            copy.requires_grad_()
        return values, trained


class _Losses(nn.Module):
    """Makes one module of a model and its losses, so that ``functional_call`` can exchange the weights of both."""

    def __init__(self, model: nn.Module, sample_losses: SampleLosses) -> None:
        super().__init__()
        self.model, self.sample_losses = model, sample_losses

    def forward(self, run: Callable[[Callable[[Any], Tensor]], _Sums]) -> _Sums:
        return run(partial(self.sample_losses, self.model))


_RECURRENT = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)


class _TwiceDifferentiable(TorchFunctionMode):
    """Replaces operations of PyTorch that have no second derivatives, or wrong ones.

    Weight norm is computed by its definition, because the fused operation has wrong ones. Recurrent layers are computed
    without cuDNN, which has none, and no first ones in evaluation mode either. All other layers keep it.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _RECURRENT:
            with torch.backends.cudnn.flags(enabled=False):
                return func(*args, **(kwargs or {}))
        if func is torch._weight_norm:
            direction, length, dim = args
            return direction * (length / torch.norm_except_dim(direction, 2, dim))
        return func(*args, **(kwargs or {}))


def _mass(targets: Tensor, classes: Tensor, ignore_index: int) -> Tensor:
    """Return the mass of each sample on some classes, ``(C,)``; 0 for ignored ones."""
    if targets.is_floating_point():
        return targets.double().movedim(1, -1) @ classes.double()
    check_class_indices(targets, len(classes), ignore_index)
    ignored = find_ignored(targets, ignore_index)
    return fill_ignored(classes[fill_ignored(targets.long(), ignored)].double(), ignored)


def _cast(values: Any, dtype: torch.dtype) -> Any:
    return apply_to_collection(values, Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t)


def _add_products(products: Tensor, loss: Tensor, trained: list[Tensor], vectors: Tensor) -> None:
    """Add to each row of ``products`` the product of the Hessian of ``loss`` with that row of ``vectors``."""
    gradient = torch.autograd.grad(loss, trained, create_graph=True, allow_unused=True)
    # Of a parameter in which the loss is linear, or which it does not use, the gradient has no derivative.
    curved = [position for position, part in enumerate(gradient) if part is not None and part.requires_grad]
    if not curved:
        return
    slopes, sizes = [gradient[position] for position in curved], [t.numel() for t in trained]
    for number, vector in enumerate(vectors):
        parts, is_last = torch.split(vector, sizes), number + 1 == len(vectors)
        along = [parts[position].view_as(trained[position]) for position in curved]
        rows = torch.autograd.grad(slopes, trained, along, retain_graph=not is_last, materialize_grads=True)
        products[number] += torch.cat([row.reshape(-1) for row in rows])
