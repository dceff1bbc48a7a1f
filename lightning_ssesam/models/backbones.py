"""Small networks for small images."""

from typing import Literal, Protocol, runtime_checkable

from torch import Tensor, nn
from typing_extensions import override

from lightning_ssesam._validation import bad_argument, check_choice, check_integer


@runtime_checkable
class BackboneFactory(Protocol):
    """Makes a network for a number of classes: a class such as :class:`SmallConvNet`, or a function."""

    def __call__(self, num_classes: int) -> nn.Module:
        """Return a network from inputs ``(N, ...)`` to logits ``(N, num_classes)``."""


class SmallConvNet(nn.Module):
    """Three convolutions, two of them with stride 2, then mean pooling and a linear classifier.

    Args:
        num_classes: C, an integer >= 1.
        in_channels: Channels of the images, an integer >= 1.
        width: Channels of the first layer, a multiple of 8; the others have twice as many.
        norm: ``"group"``, with which the training takes cheaper, split passes, or ``"batch"``.

    Shape:
        Images ``(N, in_channels, H, W)`` to logits ``(N, C)``.

    Raises:
        ValueError: If an argument is out of range.

    """

    def __init__(
        self, num_classes: int, in_channels: int = 1, width: int = 32, norm: Literal["group", "batch"] = "group"
    ) -> None:
        super().__init__()
        check_integer("num_classes", num_classes, minimum=1)
        check_integer("in_channels", in_channels, minimum=1)
        if check_integer("width", width, minimum=8) % 8:
            raise bad_argument("width", "a multiple of 8", width)
        check_choice("norm", norm, ("group", "batch"))
        channels = [in_channels, width, 2 * width, 2 * width]
        layers: list[nn.Module] = []
        for inputs, outputs, stride in zip(channels[:-1], channels[1:], (1, 2, 2), strict=True):
            layers += [
                nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False),
                nn.GroupNorm(8, outputs) if norm == "group" else nn.BatchNorm2d(outputs),
                nn.ReLU(),
            ]
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(2 * width, num_classes)

    @override
    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(images))
        return logits
