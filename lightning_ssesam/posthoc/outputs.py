"""What a network makes of its samples, computed once: logits, targets and the features before the last layer."""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ssesam._validation import bad_argument
from lightning_ssesam.errors import ArgumentError
from lightning_ssesam.targets import IGNORE_INDEX
from lightning_ssesam.weights import last_linear


@dataclass(frozen=True)
class Outputs:
    """Outputs of a network for some samples, on the CPU.

    Attributes:
        logits: Logits, ``(N, C)``, float32 at least.
        targets: Classes of the samples, ``(N,)``, int64.
        features: Inputs of the last linear layer, ``(N, D)``; None if the logits are not the outputs of that layer.
        mirrored: Outputs for the mirror images; None if they were not asked for.
    """

    logits: Tensor
    targets: Tensor
    features: Tensor | None = None
    mirrored: "Outputs | None" = None


def collect_outputs(
    network: nn.Module,
    batches: Iterable[Any],
    *,
    mirror: bool = False,
    ignore_index: int = IGNORE_INDEX,
    move: Callable[[Any], Any] | None = None,
) -> Outputs:
    """Forward all batches once, in evaluation mode, and keep the outputs.

    The network is as before afterwards. Samples whose target is ignored are left out.

    Args:
        network: Network from inputs ``(N, ...)`` to logits ``(N, C)``, such as a module or its backbone.
        batches: Batches, pairs of inputs and class indices ``(N,)``, such as a loader without augmentation.
        mirror: Whether to forward the mirror images ``inputs.flip(-1)``, too.
        ignore_index: Target that does not count, any integer.
        move: Function that moves a batch to the device of the network; by default a copy to that of its parameters.

    Raises:
        ArgumentError: If a batch is no such pair, the logits are not ``(N, C)``, or there is no sample.
    """
    parts: list[tuple[Tensor, Tensor, Tensor | None]] = []
    mirrored: list[tuple[Tensor, Tensor, Tensor | None]] = []
    with _evaluated(network), _Capture(network) as capture:
        for batch in batches:
            inputs, targets = _pair(batch if move is None else move(batch), network if move is None else None)
            counts = targets != ignore_index
            for kept, given in ((parts, inputs), *(((mirrored, inputs.flip(-1)),) if mirror else ())):
                logits, features = capture.run(given, len(targets))
                kept.append((logits[counts].cpu(), targets[counts].cpu(), _rows(features, counts)))
    if not sum(len(targets) for _, targets, _ in parts):
        raise bad_argument("batches", "at least one sample whose target counts", got_text="none")
    return _joined(parts, _joined(mirrored) if mirror else None)


def classifier_of(network: nn.Module) -> nn.Module:
    """Return the last linear layer of a network, if a correction can change it.

    Args:
        network: Network from inputs to logits.

    Raises:
        ArgumentError: If there is none, or its weights are no plain matrix of its own.
    """
    if (found := last_linear(network)) is None:
        raise ArgumentError(f"{type(network).__name__} has no linear layer, which this correction would change.")
    path, layer = found
    weight = layer._parameters.get("weight")
    if weight is None or weight.ndim != 2:
        raise ArgumentError(f"The weights of the last linear layer `{path}` are computed. Only a plain matrix works.")
    users = [name for name, other in network.named_modules() if any(p is weight for p in other._parameters.values())]
    if len(users) > 1:
        raise ArgumentError(f"The last linear layer shares its weights: {' and '.join(map(repr, users))} have them.")
    return layer


class _Capture:
    """Runs a network, and keeps what its last linear layer gets."""

    def __init__(self, network: nn.Module) -> None:
        # A compiled network would not call hooks that are new.
        self.network: nn.Module = getattr(network, "_orig_mod", network)
        found = last_linear(self.network)
        self._layer = None if found is None else found[1]
        self._calls: list[tuple[Any, Any]] = []
        self._handles: list[Any] = []

    def __enter__(self) -> "_Capture":
        if self._layer is not None:
            self._handles.append(self._layer.register_forward_hook(self._keep))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _keep(self, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self._calls.append((inputs[0] if inputs else None, output))

    def run(self, inputs: Tensor, number: int) -> tuple[Tensor, Tensor | None]:
        """Return the logits and the features of a batch; no features if the logits are made of something else."""
        self._calls.clear()
        logits = self.network(inputs)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != number:
            found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise bad_argument("network", f"one with logits ({number}, C) for {number} samples", got_text=str(found))
        is_direct = len(self._calls) == 1 and isinstance(self._calls[0][0], Tensor)
        if not is_direct or self._calls[0][0].ndim != 2 or not torch.equal(self._calls[0][1], logits):
            return _float(logits), None
        return _float(logits), _float(self._calls[0][0])


@contextmanager
def _evaluated(network: nn.Module) -> Iterator[None]:
    """Put a network into evaluation mode, without gradients, and every layer back into its own mode."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _float(values: Tensor) -> Tensor:
    return values.detach().to(torch.promote_types(values.dtype, torch.float32))


def _rows(features: Tensor | None, counts: Tensor) -> Tensor | None:
    return None if features is None else features[counts].cpu()


def _pair(batch: Any, network: nn.Module | None) -> tuple[Tensor, Tensor]:
    """Return inputs and targets of a batch, on the device of a network if there is one."""
    is_pair = isinstance(batch, tuple | list) and len(batch) == 2
    inputs, targets = batch if is_pair else (None, None)
    if not isinstance(inputs, Tensor) or not isinstance(targets, Tensor):
        raise bad_argument("batches", "pairs of two tensors, inputs and class indices", got_text=type(batch).__name__)
    if targets.ndim != 1 or targets.is_floating_point():
        found = f"targets {tuple(targets.shape)} of {targets.dtype}"
        raise bad_argument("batches", "pairs of inputs and class indices (N,)", got_text=found)
    first = None if network is None else next(iter(network.parameters()), None)
    return (inputs, targets) if first is None else (inputs.to(first.device), targets.to(first.device))


def _joined(parts: list[tuple[Tensor, Tensor, Tensor | None]], mirrored: Outputs | None = None) -> Outputs:
    logits, targets, features = zip(*parts, strict=True)
    known = [part for part in features if part is not None]
    together = torch.cat(known) if len(known) == len(features) else None
    return Outputs(torch.cat(logits), torch.cat(targets).long(), together, mirrored)


def with_layer(outputs: Outputs, layer: nn.Module) -> Outputs:
    """Return the outputs that a network would have with another last linear layer.

    Raises:
        ArgumentError: If the features are not known.
    """
    features = check_features(outputs)
    layer = copy.deepcopy(layer).to(features)
    mirrored = None if outputs.mirrored is None else with_layer(outputs.mirrored, layer)
    with torch.no_grad():
        return Outputs(layer(features), outputs.targets, features, mirrored)


def check_features(outputs: Outputs) -> Tensor:
    """Return the features of outputs, or raise ``ArgumentError`` if they are not known."""
    if outputs.features is None:
        raise ArgumentError("The logits of the network are not the outputs of its last linear layer, which this needs.")
    return outputs.features
