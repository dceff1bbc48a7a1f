"""The parameters that an ascent moves: their names, their roles, and the values of this process."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from lightning_ssesam._validation import bad_argument
from lightning_ssesam.tensors import Gradients, local_part, shard_of

SELECTIONS = ("norm", "classifier", "no_bias_no_norm")
"""Names of the selections of parameters."""

# Names of what normalization layers scale and shift by.
_GAINS = {"weight", "bias", "scale", "shift", "gain", "gamma", "beta"}
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
        are_classifier: Whether each one belongs to the last linear layer.
        optimizer: The optimizer, if it is known.
        seed: Seed of what is drawn.
        shards: Number of the part of each that this process holds; 0 for a whole parameter.
    """

    names: tuple[str, ...]
    parameters: list[Tensor]
    values: list[Tensor]
    are_biases: tuple[bool, ...]
    are_norms: tuple[bool, ...]
    are_classifier: tuple[bool, ...]
    shards: tuple[int, ...]
    optimizer: Optimizer | None = None
    seed: int = 0

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
            ArgumentError: If it contains none, or its function fails.
        """
        found = [number for number in range(len(self.names)) if self._is_in(only, number)]
        if not found:
            expected = f"a selection of at least one of the {len(self.names)} parameters that are trained"
            raise bad_argument("only", expected, got_text=_shown(only))
        return found

    def _is_in(self, only: str | Callable[[str, Tensor], bool] | None, number: int) -> bool:
        name, parameter = self.names[number], self.parameters[number]
        if callable(only):
            try:
                return bool(only(name, parameter))
            except Exception as error:
                expected = "a function that takes a name and a parameter, and returns whether it moves"
                got = f"{_shown(only)}, which raised {type(error).__name__} ({error}) for {name!r}"
                raise bad_argument("only", expected, got_text=got) from error
        if only == "classifier":
            return self.are_classifier[number]
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
            are_classifier=tuple(self.are_classifier[i] for i in indices),
            shards=tuple(self.shards[i] for i in indices),
        )


class Names:
    """Names and roles of a model's parameters, found once.

    Args:
        modules: The model's modules. The first one is the model itself.
        others: Further parameters, which the model may not have. They are named by their numbers.
    """

    def __init__(self, modules: Sequence[nn.Module], others: Sequence[Tensor] = ()) -> None:
        # With the parameters, because Python gives the `id` of one that is gone to another.
        self._named: dict[int, tuple[str, Tensor]] = {}
        self._norms: set[int] = set()
        linear: list[set[int]] = []
        convolutions: list[set[int]] = []
        model = modules[0] if modules else nn.Module()
        for path, layer in model.named_modules():
            own = {name: p for name, p in layer._parameters.items() if p is not None}
            for name, p in own.items():
                self._named.setdefault(id(p), (_plain_name(f"{path}.{name}" if path else name), p))
            if _is_norm(layer, own):
                # With those below, which a parametrization has in place of its own.
                self._norms |= {id(p) for p in layer.parameters()}
            if _is_linear(layer):
                linear.append({id(p) for p in layer.parameters()})
            elif isinstance(layer, _CONVOLUTIONS) and all(size == 1 for size in layer.kernel_size):
                convolutions.append({id(p) for p in layer.parameters()})
        for number, p in enumerate(others):
            self._named.setdefault(id(p), (f"parameters.{number}", p))
        self._classifiers = (*reversed(linear), *reversed(convolutions))

    def knows(self, parameters: Iterable[Tensor]) -> bool:
        """Return whether each of the parameters has a name."""
        return all(id(p) in self._named for p in parameters)

    def weights(self, parameters: list[Tensor], optimizer: Optimizer | None = None, seed: int = 0) -> Weights:
        """Return parameters, each of which it knows, with their names."""
        ids = [id(p) for p in parameters]
        names = tuple(self._named[i][0] for i in ids)
        # A frozen layer, such as a teacher's, is not the classifier that is trained.
        classifier = next((layer for layer in self._classifiers if not layer.isdisjoint(ids)), set())
        return Weights(
            names,
            parameters,
            [local_part(p).detach() for p in parameters],
            tuple("bias" in name.rpartition(".")[2] for name in names),
            tuple(i in self._norms for i in ids),
            tuple(i in classifier for i in ids),
            tuple(map(shard_of, parameters)),
            optimizer,
            seed,
        )


def last_linear(model: nn.Module) -> tuple[str, nn.Module] | None:
    """Return the last linear layer of a model, its classifier, with its path; None if there is none."""
    linear = [(path, layer) for path, layer in model.named_modules() if _is_linear(layer)]
    return linear[-1] if linear else None


def _shown(only: Any) -> str:
    """Return a selection as a message shows it: a function by its name."""
    return f"{only.__module__}.{only.__qualname__}" if hasattr(only, "__qualname__") else repr(only)


def _plain_name(name: str) -> str:
    # torch.compile wraps a module, and a name should not tell.
    return name.replace("_orig_mod.", "")


def _is_norm(layer: nn.Module, parameters: Mapping[str, Tensor]) -> bool:
    """Return whether a layer normalizes: one of torch's, or one that says so and scales and shifts by vectors."""
    if isinstance(layer, _NormBase | nn.LayerNorm | nn.GroupNorm | nn.RMSNorm):
        return True
    is_named_so = "norm" in type(layer).__name__.lower() and not layer._modules and parameters.keys() <= _GAINS
    return is_named_so and all(sum(n > 1 for n in p.shape) <= 1 for p in parameters.values())


def _is_linear(layer: nn.Module) -> bool:
    """Return whether a layer is linear: one of torch's, or one that says so and has a matrix."""
    weight = layer._parameters.get("weight")
    is_named_so = "linear" in type(layer).__name__.lower() and not layer._modules
    return isinstance(layer, nn.Linear) or (is_named_so and weight is not None and weight.ndim == 2)


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
