"""Which weights of a pretrained network are trained: all, the classifier, or adapters of low rank."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_ssesam._validation import bad_argument
from lightning_ssesam.forward_state import mark_still

Trainable = Literal["all", "classifier", "lora"]


def train_only(
    network: nn.Module,
    classifiers: Iterable[nn.Module],
    trainable: Trainable,
    rank: int,
    alpha: float,
    layers: Sequence[str] | None,
) -> None:
    """Freeze a network but for its classifiers, in place. With ``"lora"``, add adapters to its linear layers.

    Args:
        network: Network.
        classifiers: Classifiers of the network, which are trained.
        trainable: What is trained.
        rank: Rank of the adapters, an integer >= 1.
        alpha: Factor on what an adapter adds, times the rank; > 0.
        layers: Ends of the names of the layers that get adapters; None for all linear ones but the classifiers.

    Raises:
        ArgumentError: If there is no classifier, or no layer that can get an adapter.
        ModuleNotFoundError: If adapters are asked for, and peft is not installed.
    """
    if trainable == "all":
        return
    kept = [parameter for layer in classifiers for parameter in layer.parameters()]
    if not kept:
        raise bad_argument("trainable", "'all' for a model without a classifier", trainable)
    network.requires_grad_(False)
    if trainable == "lora":
        _add_adapters(network, set(map(id, kept)), rank, alpha, layers)
    for parameter in kept:
        parameter.requires_grad_(True)
    mark_still(parameter for parameter in network.parameters() if not parameter.requires_grad)


def _add_adapters(network: nn.Module, kept: set[int], rank: int, alpha: float, layers: Sequence[str] | None) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("`trainable='lora'` needs peft: pip install peft", name=error.name) from error

    names = _names(network, nn.Linear if layers is None else (nn.Linear, nn.Conv2d), kept)
    if layers is not None:
        ends = () if isinstance(layers, str) else tuple(map(str, layers))
        names = [name for name in names if name.endswith(ends)]
    if not names:
        such = next(reversed(_names(network, (nn.Linear, nn.Conv2d), kept)), "head")
        expected = f"a list of ends of names of linear layers or convolutions, such as [{such!r}]"
        reason = "" if layers is not None else ", since the model has no linear layer but the classifier"
        raise bad_argument("lora_layers", expected + reason, layers)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=names), network)


def _names(network: nn.Module, kinds: Any, kept: set[int]) -> list[str]:
    """Return the names of the layers of some kinds, but for the classifiers."""
    return [
        name
        for name, layer in network.named_modules()
        if isinstance(layer, kinds) and not any(id(parameter) in kept for parameter in layer.parameters())
    ]


def rest(network: nn.Module) -> None:
    """Put what is frozen into evaluation mode: each module whose parameters are all frozen, with all in it.

    So the statistics of frozen batch norms do not move, and dropout in frozen parts does nothing.
    """
    for module in network.modules():
        parameters = list(module.parameters())
        is_bare_norm = isinstance(module, _BatchNorm) and not parameters
        if is_bare_norm or (parameters and not any(parameter.requires_grad for parameter in parameters)):
            module.eval()
