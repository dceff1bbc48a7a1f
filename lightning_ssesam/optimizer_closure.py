"""What an optimizer gets to call in its step, by which an optimizer that cannot be served is told from the others."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from lightning_ssesam.tensors import local_part, set_gradients


class OptimizerClosure:
    """The closure of one optimizer step. The gradient is there before the step, so a call just returns the loss.

    An optimizer that wants the gradient at other weights moves the weights, or frees their gradient, before it calls.

    Args:
        loss: Loss of the update; None if all of its batches are skipped.
        parameters: Parameters that the optimizer may move.
        is_first: Whether this is the first step of a run. Its weights are copied, so that a refusal puts them back.
    """

    def __init__(self, loss: Tensor | None, parameters: Sequence[Tensor], is_first: bool) -> None:
        self._loss = loss
        self._parameters = [p for p in parameters if p.grad is not None]
        self._versions = [p._version for p in self._parameters]
        self._copies = [local_part(p).clone() for p in self._parameters] if is_first else []
        self._places = [local_part(p).data_ptr() for p in self._parameters] if is_first else []
        # Watches only the first step, because it costs time for each operation.
        self._writes = _Writes(self._places) if is_first else None
        self._has_run = False

    def __call__(self) -> Tensor | None:
        """Return the loss.

        Raises:
            MisconfigurationException: If the optimizer has moved the weights since the gradient was taken.
        """
        self._has_run = True
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        has_moved = [p._version for p in self._parameters] != self._versions or len(gradients) < len(self._parameters)
        if not has_moved and True in [g.requires_grad for g in gradients]:
            raise self._refusal("differentiates the gradient (`create_graph=True`)")
        # Some write into `p.data`, which the version does not tell.
        if (
            has_moved
            or (self._writes is not None and self._writes.found)
            or any(local_part(p).data_ptr() != place for p, place in zip(self._parameters, self._places, strict=False))
        ):
            raise self._refusal("moves the weights and then asks for their gradient again")
        return self._loss

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Watch an optimizer's step. If the optimizer is refused, leave no gradient, and the first weights of a run.

        Raises:
            MisconfigurationException: If the optimizer differentiates the gradient, or has not called the closure.
        """
        try:
            try:
                with self._writes or nullcontext():
                    yield
            except RuntimeError as error:
                if "grad_fn" not in str(error):
                    raise
                raise self._refusal("differentiates the gradient (`create_graph=True`)") from error
            if not self._has_run:
                raise MisconfigurationException(
                    "The optimizer has made no step with its closure. If you override `optimizer_step`, call"
                    " `optimizer.step(closure=optimizer_closure)`. An optimizer must call the closure in its `step`."
                )
        except MisconfigurationException:
            with torch.no_grad():
                for p, copy in zip(self._parameters, self._copies, strict=False):
                    local_part(p).copy_(copy)
            set_gradients(self._parameters, None)
            raise

    def _refusal(self, what: str) -> MisconfigurationException:
        return MisconfigurationException(
            f"The optimizer {what}, which SharpnessAwareMixin cannot serve. Use an optimizer that takes one gradient a"
            " step, such as SGD or AdamW; for SAM, set `self.objective = SAM(rho)` and give the base optimizer alone."
        )


class _Writes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Finds operations that write in place to one of some places in memory."""

    def __init__(self, places: list[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # A tensor without memory, such as a meta tensor, is at 0.
        self._places = set(places) - {0}
        self.found = False

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.found and args and func.__name__.partition(".")[0].endswith("_"):
            written = args[0] if isinstance(args[0], list | tuple) else [args[0]]
            self.found = any(isinstance(t, Tensor) and local_part(t).data_ptr() in self._places for t in written)
        return func(*args, **(kwargs or {}))
