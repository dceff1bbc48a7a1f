"""Stronger transforms of training images, and several views of an image."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_ssesam._validation import bad_argument, check_integer, check_share
from lightning_ssesam.data.image_input import ImageInput

CIFAR100_MEAN = (0.5071, 0.4867, 0.4408)
CIFAR100_STD = (0.2675, 0.2565, 0.2761)


class _ImageTransform:
    """Base of transforms from a PIL image to a normalised tensor. Its steps are run one after the other."""

    steps: list[Callable[[Any], Any]]

    def __init__(self, image_size: int, mean: Sequence[float], std: Sequence[float]) -> None:
        self.input = ImageInput(check_integer("image_size", image_size, minimum=1), mean=tuple(mean), std=tuple(std))

    def __call__(self, image: Any) -> Tensor:
        for transform in self.steps:
            image = transform(image)
        made: Tensor = image
        return made


class AutoAugmentCutout(_ImageTransform):
    """Shifts, mirror images, AutoAugment's policy for CIFAR, and Cutout: training images of PaCo, BCL and NCL.

    A training image gets a border of an eighth of its size, a random crop and a random mirror image. Then a random pair
    of operations of the policy (Cubuk et al., "AutoAugment", CVPR 2019) changes it. At last, a square around a random
    pixel becomes black (DeVries and Taylor, "Cutout", 2017). It is cut off at the border.

    Args:
        image_size: Height and width of the images, an integer >= 1.
        cutout: Height and width of the square, an integer >= 0; 0 for none.
        mean: Mean of each channel, which is subtracted; by default that of CIFAR-100.
        std: Standard deviation of each channel, by which is divided; by default that of CIFAR-100.

    Raises:
        ArgumentError: If an argument is out of range.
    """

    def __init__(
        self,
        image_size: int = 32,
        cutout: int = 16,
        mean: Sequence[float] = CIFAR100_MEAN,
        std: Sequence[float] = CIFAR100_STD,
    ) -> None:
        from torchvision.transforms import v2

        super().__init__(image_size, mean, std)
        self.cutout = check_integer("cutout", cutout, minimum=0)
        *to_floats, normalize = self.input.to_tensor()
        changes = [v2.RandomCrop(image_size, padding=image_size // 8), v2.RandomHorizontalFlip()]
        policy = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)
        self.steps = [*self.input.resizing(), *changes, policy, *to_floats, self._cut_out, normalize]

    def _cut_out(self, image: Tensor) -> Tensor:
        """Make a square of an image ``(C, H, W)`` black. It has the pixels from -size/2 to size/2 - 1 of its centre."""
        if self.cutout == 0:
            return image
        rows, columns = (_interval(size, self.cutout) for size in image.shape[-2:])
        image = image.clone()
        image[:, rows, columns] = 0.0
        return image


def _interval(size: int, length: int) -> slice:
    start = int(torch.randint(size, ())) - length // 2
    return slice(max(start, 0), max(start + length, 0))


class SimAugment(_ImageTransform):
    """Random crops, mirror images, colours and blur: views for contrastive losses, as in SimCLR, MoCo v2 and BCL.

    See Chen et al., "A Simple Framework for Contrastive Learning", ICML 2020, and Zhu et al., CVPR 2022. With the
    probability 0.8 colours change, with 0.2 the image becomes grey.

    Args:
        image_size: Height and width of the images, an integer >= 1.
        smallest_crop: Share of the image's area that a crop has at least, in (0, 1]; 0.2 for CIFAR, 0.08 for ImageNet.
        blur: Probability of a Gaussian blur, in [0, 1]. The published code has none for ImageNet-LT.
        mean: Mean of each channel, which is subtracted; by default that of CIFAR-100.
        std: Standard deviation of each channel, by which is divided; by default that of CIFAR-100.

    Raises:
        ArgumentError: If an argument is out of range.
    """

    def __init__(
        self,
        image_size: int = 32,
        smallest_crop: float = 0.2,
        blur: float = 0.0,
        mean: Sequence[float] = CIFAR100_MEAN,
        std: Sequence[float] = CIFAR100_STD,
    ) -> None:
        from torchvision.transforms import v2

        super().__init__(image_size, mean, std)
        self.smallest_crop, self.blur = check_share("smallest_crop", smallest_crop), check_share("blur", blur)
        if smallest_crop == 0:
            raise bad_argument("smallest_crop", "a number in (0, 1]", smallest_crop)
        # An odd number near a tenth of the size, as in SimCLR.
        kernel = image_size // 20 * 2 + 1
        self.steps = [
            v2.RandomResizedCrop(image_size, scale=(smallest_crop, 1.0)),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(p=0.2),
            v2.RandomApply([v2.GaussianBlur(kernel, (0.1, 2.0))], p=self.blur),
            *self.input.to_tensor(),
        ]


class SeveralViews:
    """Several views of each image: one for each transform, stacked ``(V, C, H, W)``.

    It is a ``train_transform`` for :class:`~lightning_ssesam.models.ContrastiveBranch`, which classifies the first view
    and contrasts the others.

    Args:
        transforms: Transforms from a PIL image to tensors ``(C, H, W)`` of one shape, at least two.

    Raises:
        ArgumentError: If there are fewer than two, or one is no function.

    Example:
        >>> from PIL import Image
        >>> SeveralViews([AutoAugmentCutout(), SimAugment(), SimAugment()])(Image.new("RGB", (32, 32))).shape
        torch.Size([3, 3, 32, 32])
    """

    def __init__(self, transforms: list[Callable[[Any], Any]]) -> None:
        is_list = isinstance(transforms, Sequence) and len(transforms) > 1
        if not is_list or not all(callable(transform) for transform in transforms):
            raise bad_argument("transforms", "a list of at least two transforms", transforms)
        self.transforms = list(transforms)

    def __call__(self, image: Any) -> Tensor:
        """Return the views of a PIL image, ``(V, C, H, W)``."""
        return torch.stack([transform(image) for transform in self.transforms])
