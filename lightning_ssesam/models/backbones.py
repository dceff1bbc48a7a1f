"""Networks for small images, and larger ones by name. All raise ``ArgumentError`` if an argument is out of range.

A network of images is an ``nn.Sequential``, whose parts run in the order in which ``__init__`` sets them. It keeps its
arguments, from which a checkpoint makes it again.
"""

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_ssesam._validation import bad_argument, check_choice, check_integer, check_positive
from lightning_ssesam.models.finetuning import Trainable, rest, train_only

Norm = Literal["batch", "group"]


@runtime_checkable
class BackboneFactory(Protocol):
    """A class such as :class:`SmallConvNet`, or a function, that makes a network for a number of classes."""

    def __call__(self, num_classes: int) -> nn.Module:
        """Return a network from inputs ``(N, ...)`` to logits ``(N, num_classes)``."""


def make_backbone(factory: BackboneFactory, num_classes: int, in_channels: int | None = None) -> nn.Module:
    """Return the network that a factory makes.

    If the factory has an argument ``in_channels``, it gets the channels of the data, unless it was given a number
    already. The default of a class counts as not given.

    Args:
        factory: Class or function that makes the network.
        num_classes: C, an integer >= 1.
        in_channels: Channels of the images, an integer >= 1; None if unknown.

    Raises:
        ArgumentError: If the factory was given another number of channels than the data has.
    """
    if in_channels is None:
        return factory(num_classes=num_classes)
    check_integer("in_channels", in_channels, minimum=1)
    given = factory.keywords.get("in_channels") if isinstance(factory, partial) else None
    accepts, default = _channels_argument(factory)
    if given is None and not accepts:
        return factory(num_classes=num_classes)
    if given not in (None, default, in_channels):
        raise bad_argument("in_channels", f"{in_channels}, the channels of the images in the data", given)
    return factory(num_classes=num_classes, in_channels=in_channels)  # type: ignore[call-arg]


def _channels_argument(factory: Any) -> tuple[bool, Any]:
    """Return whether a factory has an argument ``in_channels``, and its default."""
    while isinstance(factory, partial):
        # The factories of the command line call a function with the class.
        factory = next((argument for argument in factory.args if inspect.isclass(argument)), factory.func)
    try:
        found = inspect.signature(factory).parameters.get("in_channels")
    except (TypeError, ValueError):
        # Of some built-in functions.
        return False, None
    if found is None or found.kind is inspect.Parameter.POSITIONAL_ONLY:
        return False, None
    return True, None if found.default is inspect.Parameter.empty else found.default


def _check_channels(in_channels: int | None, default: int) -> int:
    return default if in_channels is None else check_integer("in_channels", in_channels, minimum=1)


class SmallConvNet(nn.Sequential):
    """Three convolutions, two of them with stride 2, then mean pooling and a linear classifier.

    It maps images ``(N, in_channels, H, W)`` to logits ``(N, C)``.

    Args:
        num_classes: C, an integer >= 1.
        in_channels: Channels of the images, an integer >= 1; by default those of the data, or 1 if they are unknown.
        width: Channels of the first layer, a multiple of 8; the others have twice as many.
        norm: ``"group"``, which allows the cheaper split passes, or ``"batch"``.
    """

    def __init__(self, num_classes: int, in_channels: int | None = None, width: int = 32, norm: Norm = "group") -> None:
        super().__init__()
        self._arguments = {"num_classes": num_classes, "in_channels": in_channels, "width": width, "norm": norm}
        check_integer("num_classes", num_classes, minimum=1)
        inputs = _check_channels(in_channels, default=1)
        if check_integer("width", width, minimum=8) % 8:
            raise bad_argument("width", "a multiple of 8", width)
        check_choice("norm", norm, ("group", "batch"))
        channels = [inputs, width, 2 * width, 2 * width]
        layers: list[nn.Module] = []
        for before, outputs, stride in zip(channels[:-1], channels[1:], (1, 2, 2), strict=True):
            layers += [_conv(before, outputs, stride), _norm(norm, outputs), nn.ReLU()]
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(2 * width, num_classes)


class NormalizedLinear(nn.Linear):
    """A linear classifier without bias on normalized features and weights, whose logits are cosines.

    It maps features ``(N, D)`` to logits ``(N, C)`` in [-1, 1]. LDAM expects it (Cao et al., NeurIPS 2019): the loss
    multiplies the cosines by its scale.

    Args:
        in_features: D, an integer >= 1.
        out_features: C, an integer >= 1.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        check_integer("in_features", in_features, minimum=1)
        check_integer("out_features", out_features, minimum=1)
        super().__init__(in_features, out_features, bias=False)
        # Only the directions matter, and the directions of normal vectors are uniform.
        nn.init.normal_(self.weight)

    @override
    def forward(self, features: Tensor) -> Tensor:
        return F.linear(_directions(features), _directions(self.weight))


def _directions(vectors: Tensor) -> Tensor:
    # The usual 1e-12 is 0 in float16, and a vector of zeros would be divided by 0.
    return F.normalize(vectors, eps=max(1e-12, torch.finfo(vectors.dtype).tiny))


class CIFARResNet(nn.Sequential):
    """ResNet-20, 32, 44, 56 or 110 for images of 32x32 pixels (He et al., CVPR 2016, section 4.2).

    It maps images ``(N, in_channels, H, W)`` to logits ``(N, C)``, in three stages of 16, 32 and 64 channels. Shortcuts
    have no parameters: at the beginning of a stage they take every second pixel and fill the new channels with 0
    (option A of the paper).

    Args:
        num_classes: C, an integer >= 1.
        depth: Number of layers with weights, 6n + 2 with n >= 1; LDAM and its successors use 32.
        in_channels: Channels of the images, an integer >= 1; by default those of the data, or 3 if they are unknown.
        norm: ``"batch"`` as in the paper, or ``"group"``, which allows the cheaper split passes.
        normalized: Whether the classifier is a :class:`NormalizedLinear`, as ``LDAMLoss`` expects.
    """

    def __init__(
        self,
        num_classes: int,
        depth: int = 32,
        in_channels: int | None = None,
        norm: Norm = "batch",
        normalized: bool = False,
    ) -> None:
        super().__init__()
        self._arguments = {
            "num_classes": num_classes,
            "depth": depth,
            "in_channels": in_channels,
            "norm": norm,
            "normalized": normalized,
        }
        check_integer("num_classes", num_classes, minimum=1)
        inputs = _check_channels(in_channels, default=3)
        check_choice("norm", norm, ("batch", "group"))
        if (check_integer("depth", depth, minimum=8) - 2) % 6:
            raise bad_argument("depth", "6n + 2, such as 20, 32 or 56", depth)
        layers: list[nn.Module] = [_conv(inputs, 16, 1), _norm(norm, 16), nn.ReLU()]
        channels = 16
        for width in (16, 32, 64):
            for _ in range((depth - 2) // 6):
                layers.append(_Block(channels, width, norm))
                channels = width
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = NormalizedLinear(64, num_classes) if normalized else nn.Linear(64, num_classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear) and not isinstance(layer, NormalizedLinear):
                nn.init.kaiming_normal_(layer.weight)


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, norm: Norm) -> None:
        super().__init__()
        self.stride = 1 if inputs == outputs else 2
        self.added = outputs - inputs
        self.residual = nn.Sequential(
            _conv(inputs, outputs, self.stride),
            _norm(norm, outputs),
            nn.ReLU(),
            _conv(outputs, outputs, 1),
            _norm(norm, outputs),
        )

    @override
    def forward(self, x: Tensor) -> Tensor:
        half = self.added // 2
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.added - half))
        return F.relu(self.residual(x) + shortcut)


def _conv(inputs: int, outputs: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False)


def _norm(norm: Norm, channels: int) -> nn.Module:
    return nn.GroupNorm(8, channels) if norm == "group" else nn.BatchNorm2d(channels)


class TorchvisionResNet(nn.Sequential):
    """A torchvision ResNet from images ``(N, 3, H, W)`` to logits ``(N, C)``, by default with a stem for small images.

    Args:
        num_classes: C, an integer >= 1.
        arch: Name of a ResNet in ``torchvision.models``, such as ``"resnet18"``, ``"resnet34"``, ``"wide_resnet50_2"``.
        stem: ``"cifar"``, a 3x3 convolution of stride 1 without pooling, for images of 32x32 pixels, or
            ``"imagenet"``, the stem of torchvision.
        norm: ``"batch"``, or ``"group"``, which allows the cheaper split passes.
        normalized: Whether the classifier is a :class:`NormalizedLinear`, as ``LDAMLoss`` expects.
        weights: Name of pretrained weights in torchvision, such as ``"DEFAULT"``, for all layers but the classifier.
            They need ``stem="imagenet"`` and ``norm="batch"``.
    """

    def __init__(
        self,
        num_classes: int,
        arch: str = "resnet34",
        stem: Literal["cifar", "imagenet"] = "cifar",
        norm: Norm = "batch",
        normalized: bool = False,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        self._arguments = {
            "num_classes": num_classes,
            "arch": arch,
            "stem": stem,
            "norm": norm,
            "normalized": normalized,
            "weights": weights,
        }
        from torchvision import models

        check_integer("num_classes", num_classes, minimum=1)
        check_choice("stem", stem, ("cifar", "imagenet"))
        check_choice("norm", norm, ("batch", "group"))
        check_choice("arch", arch, [name for name in models.list_models(module=models) if "resne" in name])
        if weights is not None and (stem, norm) != ("imagenet", "batch"):
            raise bad_argument("weights", "None where stem and norm are not 'imagenet' and 'batch'", weights)
        if weights is not None:
            check_choice("weights", weights.rpartition(".")[2], list(models.get_model_weights(arch).__members__))
        options = {"norm_layer": partial(nn.GroupNorm, 32)} if norm == "group" else {}
        net = models.get_model(arch, weights=weights, **options)
        if stem == "cifar":
            net.conv1 = _conv(3, net.conv1.out_channels, 1)
            nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
            net.maxpool = nn.Identity()
        net.fc = (NormalizedLinear if normalized else nn.Linear)(net.fc.in_features, num_classes)
        self.net = net


class TimmModel(nn.Sequential):
    """A model of timm (``pip install timm``) by its name, from images ``(N, in_channels, H, W)`` to logits ``(N, C)``.

    Args:
        num_classes: C, an integer >= 1.
        name: Name of the model, as in ``timm.list_models()``.
        pretrained: Whether to start from timm's pretrained weights, which it downloads.
        in_channels: Channels of the images, an integer >= 1; by default those of the data, or 3 if they are unknown.
        options: Further arguments of ``timm.create_model``.
        trainable: What is trained. ``"all"``; ``"classifier"``, which freezes the rest (a linear probe); or
            ``"lora"``, which freezes the rest and adds adapters of low rank (Hu et al., ICLR 2022; needs
            ``pip install peft``). What is frozen stays in evaluation mode, with the statistics of its batch norms.
        lora_rank: Rank of the adapters, an integer >= 1.
        lora_alpha: Number that, divided by the rank, is the factor on the adapters; finite, > 0.
        lora_layers: Ends of the names of the linear layers and convolutions that get adapters, such as ``["qkv"]``; by
            default all linear layers but the classifier.

    Raises:
        ModuleNotFoundError: If timm is not installed, or peft for ``"lora"``.
        ArgumentError: If timm has no model of that name, or an argument is out of range.
    """

    def __init__(
        self,
        num_classes: int,
        name: str,
        pretrained: bool = False,
        in_channels: int | None = None,
        options: dict[str, Any] | None = None,
        trainable: Trainable = "all",
        lora_rank: int = 8,
        lora_alpha: float = 16.0,
        lora_layers: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self._arguments = {
            "num_classes": num_classes,
            "name": name,
            "pretrained": pretrained,
            "in_channels": in_channels,
            "options": options,
            "trainable": trainable,
            "lora_rank": lora_rank,
            "lora_alpha": lora_alpha,
            "lora_layers": lora_layers,
        }
        check_choice("trainable", trainable, ("all", "classifier", "lora"))
        adapters = check_integer("lora_rank", lora_rank, minimum=1), check_positive("lora_alpha", lora_alpha)
        try:
            import timm
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("`TimmModel` needs timm: pip install timm", name=error.name) from error

        check_integer("num_classes", num_classes, minimum=1)
        inputs = _check_channels(in_channels, default=3)
        if not timm.is_model(name):
            raise bad_argument("name", "a model of timm (see timm.list_models())", name)
        net: Any = timm.create_model(
            name, pretrained=pretrained, num_classes=num_classes, in_chans=inputs, **(options or {})
        )
        found = net.get_classifier()
        train_only(net, found if isinstance(found, tuple) else (found,), trainable, *adapters, lora_layers)
        self.net = net
        self.train()

    @override
    def train(self, mode: bool = True) -> "TimmModel":
        """Set the mode of what is trained; what ``trainable`` has frozen stays in evaluation mode."""
        super().train(mode)
        if self._arguments["trainable"] != "all":
            rest(self.net)
        return self
