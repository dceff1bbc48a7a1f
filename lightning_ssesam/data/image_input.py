"""How a picture becomes the input of a network: plain values that a checkpoint keeps."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from lightning_ssesam._validation import bad_argument, check_flag, check_integer

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

SMALL = 64
"""Height and width of the largest images that are not cropped at the test, as is usual for CIFAR and Tiny ImageNet."""

# A strip of 1 x 10,000 pixels would be enlarged to 256 x 2,560,000 ones before its centre is cropped.
_LONGEST = 10


@dataclass(frozen=True)
class ImageInput:
    """The usual way from a picture to the input of a network, at the test and for predictions.

    A picture gets the channels, is resized to ``image_size`` (above 64 pixels, its centre is cropped from 8/7 of that
    size), becomes floats in [0, 1], and is normalised.

    Args:
        image_size: Height and width of the input, an integer >= 1.
        channels: 3 for colours, or 1 for grey levels.
        mean: Mean of each channel, which is subtracted, of values in [0, 1].
        std: Standard deviation of each channel, by which is divided; > 0.
        resize: Whether a picture of another size is resized, if ``image_size`` is at most 64.

    Raises:
        ArgumentError: If an argument is out of range.

    Example:
        >>> from PIL import Image
        >>> ImageInput(image_size=32).transform()(Image.new("RGB", (40, 48))).shape
        torch.Size([3, 32, 32])
    """

    image_size: int
    channels: int = 3
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    resize: bool = True

    def __post_init__(self) -> None:
        check_integer("image_size", self.image_size, minimum=1)
        check_flag("resize", self.resize)
        if self.channels not in (1, 3):
            raise bad_argument("channels", "1 or 3", self.channels)
        for name in ("mean", "std"):
            values = tuple(getattr(self, name))
            numbers = all(type(value) in (int, float) for value in values)
            if len(values) != self.channels or not numbers or (name == "std" and min(values) <= 0):
                expected = f"{self.channels} numbers{' > 0' if name == 'std' else ''}, one for each channel"
                raise bad_argument(name, expected, getattr(self, name))
            # The dataclass is frozen. A checkpoint keeps lists.
            vars(self)[name] = values

    def transform(self) -> Callable[[Any], Tensor]:
        """Return the transform from a PIL image to a tensor ``(channels, image_size, image_size)``, float32."""
        from torchvision.transforms import v2

        # A data set reads pictures as RGB.
        grey = [v2.Grayscale()] if self.channels == 1 else []
        transform: Callable[[Any], Tensor] = v2.Compose([*grey, *self.resizing(), *self.to_tensor()])
        return transform

    def resizing(self) -> list[Any]:
        """Return the transforms that give a picture its height and width."""
        from torchvision.transforms import v2

        if self.image_size > SMALL:
            larger = v2.Resize(self.image_size * 8 // 7)
            return [v2.Lambda(_without_far_ends), larger, v2.CenterCrop(self.image_size)]
        return [v2.Resize((self.image_size, self.image_size))] if self.resize else []

    def to_tensor(self) -> list[Any]:
        """Return the transforms that make a normalised tensor of a picture."""
        import torch
        from torchvision.transforms import v2

        return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(self.mean), list(self.std))]

    def as_plain(self) -> dict[str, Any]:
        """Return the arguments as numbers, flags and lists."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def _without_far_ends(image: Any) -> Any:
    """Return the centre of an image that is more than ten times as long as wide, and any other as it is."""
    from torchvision.transforms import v2

    height, width = v2.functional.get_size(image)
    longest = _LONGEST * min(height, width)
    if max(height, width) <= longest:
        return image
    return v2.functional.center_crop(image, [min(height, longest), min(width, longest)])
