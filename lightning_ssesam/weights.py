"""The parameters that an ascent moves: their names, their roles, and the values of this process."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from lightning_ssesam._validation import bad_argument
from lightning_ssesam.tensors import Gradients, is_sharded, local_part

SELECTIONS = ("norm", "classifier", "no_bias_no_norm")
"""Names of the selections of parameters."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, eq=False)
class Weights:
    """The parameters that an ascent moves.

    Attributes:
        names: Their names in the model, as ``named_parameters`` gives them.
        parameters: The parameters, dense or sharded.
        values: The part of each that this process holds, in the same memory.
        are_biases: Whether each one is a bias.
        are_norms: Whether each one belongs to a normalization layer.
        seed: Seed of what is drawn.
        shard: Number of this process, if a parameter is sharded; else 0.
    """

    names: tuple[str, ...]
    parameters: list[Tensor]
    values: list[Tensor]
    are_biases: tuple[bool, ...]
    are_norms: tuple[bool, ...]
    classifier: str | None = None
    optimizer: Optimizer | None = None
    seed: int = 0
    shard: int = 0

    @property
    def device(self) -> torch.device:
        """The device of the first parameter."""
        return self.values[0].device

    def momentum(self) -> Gradients:
        """Return the momentum that the optimizer has for each parameter; None where it has none yet.

        Raises:
            ArgumentError: If there is no optimizer, or it never has a momentum.
        """
        return momentum_of(self.optimizer, self.parameters)

    def indices(self, only: str | Callable[[str, Tensor], bool] | None) -> list[int]:
        """Return which parameters a selection contains (see :class:`~lightning_ssesam.Ascent`).

        Raises:
            ArgumentError: If it contains none.
        """
        found = [number for number in range(len(self.names)) if self._is_in(only, number)]
        if not found:
            expected = f"a selection of at least one of the {len(self.names)} parameters that are trained"
            raise bad_argument("only", expected, only)
        return found

    def _is_in(self, only: str | Callable[[str, Tensor], bool] | None, number: int) -> bool:
        name, parameter = self.names[number], self.parameters[number]
        if callable(only):
            return bool(only(name, parameter))
        if only == "classifier":
            return self.classifier is not None and name.startswith(f"{self.classifier}.")
        if only == "no_bias_no_norm":
            return not (self.are_biases[number] or self.are_norms[number])
        return only is None or self.are_norms[number]

    def at(self, indices: Sequence[int]) -> "Weights":
        """Return the parameters at some indices."""
        if len(indices) == len(self.names):
            return self
        return replace(
            self,
            names=tuple(self.names[i] for i in indices),
            parameters=[self.parameters[i] for i in indices],
            values=[self.values[i] for i in indices],
            are_biases=tuple(self.are_biases[i] for i in indices),
            are_norms=tuple(self.are_norms[i] for i in indices),
        )


class Names:
    """Names and roles of a model's parameters, found once.

    Args:
        modules: The model's modules. The first one is the model itself.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        # With the parameters, so that no new one takes the identity of one that is gone.
        self._named: dict[int, tuple[Tensor, str]] = {}
        self._norms: set[int] = set()
        model = modules[0] if modules else nn.Module()
        for path, layer in model.named_modules():
            own = {name: p for name, p in layer._parameters.items() if p is not None}
            for name, p in own.items():
                self._named.setdefault(id(p), (p, _plain_name(f"{path}.{name}" if path else name)))
            if _is_norm(layer, own.values()):
                self._norms |= {id(p) for p in own.values()}
        self.classifier = _find_classifier(model)

    def knows(self, parameters: Iterable[Tensor]) -> bool:
        """Return whether each of the parameters has a name."""
        return all(id(p) in self._named for p in parameters)

    def weights(self, parameters: list[Tensor], optimizer: Optimizer | None = None, seed: int = 0) -> Weights:
        """Return parameters with their names. One that is not in the model is named by its number."""
        unnamed = {id(p): (p, f"parameters.{number}") for number, p in enumerate(parameters)}
        names = tuple((self._named.get(id(p)) or unnamed[id(p)])[1] for p in parameters)
        sharded = next((p for p in parameters if is_sharded(p)), None)
        return Weights(
            names,
            parameters,
            [local_part(p).detach() for p in parameters],
            tuple("bias" in name.rpartition(".")[2] for name in names),
            tuple(id(p) in self._norms for p in parameters),
            self.classifier,
            optimizer,
            seed,
            0 if sharded is None else sharded.device_mesh.get_rank(),  # type: ignore[attr-defined]
        )


def _plain_name(name: str) -> str:
    # torch.compile wraps a module, and a name should not tell.
    return name.replace("_orig_mod.", "")


def _is_norm(layer: nn.Module, parameters: Iterable[Tensor]) -> bool:
    """Return whether a layer normalizes: one of torch's, or one that says so and scales by vectors."""
    if isinstance(layer, _NormBase | nn.LayerNorm | nn.GroupNorm):
        return True
    return "norm" in type(layer).__name__.lower() and all(p.ndim <= 1 for p in parameters)


def _find_classifier(model: nn.Module) -> str | None:
    """Return the name of the last linear layer, or else of the last 1x1 convolution."""
    linear = convolution = None
    for path, layer in model.named_modules():
        weight = layer._parameters.get("weight")
        is_named_so = "linear" in type(layer).__name__.lower() and not layer._modules
        if isinstance(layer, nn.Linear) or (is_named_so and weight is not None and weight.ndim == 2):
            linear = path
        elif isinstance(layer, _CONVOLUTIONS) and all(size == 1 for size in layer.kernel_size):
            convolution = path
    found = convolution if linear is None else linear
    return None if found is None else _plain_name(f"{found}.").rstrip(".")


def momentum_of(optimizer: Optimizer | None, parameters: Sequence[Tensor]) -> Gradients:
    """Return the momentum of an optimizer for each parameter; None where it has made no step with it.

    Raises:
        ArgumentError: If there is no optimizer, or it never has a momentum.
    """
    if optimizer is None:
        raise bad_argument("optimizer", "the optimizer whose momentum is the direction of the perturbation", None)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    found: Gradients = []
    for p in parameters:
        state, group = optimizer.state.get(p, {}), groups.get(id(p), {})
        value = state.get("momentum_buffer", state.get("exp_avg"))
        if value is None and group and _lacks_momentum(state, group):
            expected = "one with a momentum (SGD with momentum > 0, Adam and its kin), which Momentum() perturbs along"
            raise bad_argument("optimizer", expected, got_text=f"{type(optimizer).__name__} without")
        found.append(None if value is None else local_part(value).detach())
    return found


def _lacks_momentum(state: Mapping[str, Any], group: Mapping[str, Any]) -> bool:
    """Return whether an optimizer will never have a momentum, as far as can be told from one of its groups."""
    if "momentum" in group:
        return not group["momentum"] and "betas" not in group
    has_stepped_without = bool(state) and not {"momentum_buffer", "exp_avg"} & state.keys()
    return has_stepped_without or "betas" not in group
