"""Small images in memory, decoded once. Whole batches are shifted, mirrored and normalised where the images lie."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate
from typing_extensions import override

from lightning_ssesam._validation import bad_argument

# Images that are decoded at a time.
_CHUNK = 256
# Share of a device's free memory that the images of a set may take. The training needs the rest.
_SHARE = 0.25


@dataclass(frozen=True)
class BatchTransform:
    """Makes normalised batches of decoded images, as the usual transforms do one image at a time.

    Args:
        mean: Mean of each channel, which is subtracted from values in [0, 1].
        std: Standard deviation of each channel, by which is divided.
        padding: Pixels by which images are shifted at most, an integer >= 0. Half of the images are mirrored. None for
            the images as they are.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    padding: int | None = None

    def __call__(self, images: Tensor, index: Tensor) -> Tensor:
        """Return the images ``(B, 3, H, W)``, float32, on the device of the decoded ones.

        Args:
            images: Decoded images ``(N, 3, H, W)``, uint8.
            index: Positions of the images ``(B,)``, int64, in [0, N), on the CPU.
        """
        if self.padding is None:
            pixels = images.index_select(0, to_device(index, images.device))
        else:
            draws = self._draw(len(index))
            # One copy for all of them.
            index, *placed = to_device(torch.stack([index, *draws]), images.device)
            pixels = _moved(images.index_select(0, index), placed, self.padding)
        mean, std = _statistics(self.mean, self.std, images.device)
        # The operations of torchvision's `ToDtype` and `Normalize`, so that not even the last bit differs.
        return pixels.to(torch.float32).mul_(1 / 255).sub_(mean).div_(std)

    def _draw(self, number: int) -> tuple[Tensor, ...]:
        """Return the row and the column where each padded image is cropped, and 1 if it is mirrored, else 0."""
        places, generator = 2 * (self.padding or 0) + 1, _own_generator()
        top, left = torch.randint(places, (2, number), device="cpu", generator=generator)
        return top, left, torch.randint(2, (number,), device="cpu", generator=generator)


def _own_generator() -> torch.Generator | None:
    """Return a generator for the next draws of this process; None, for torch's own, if there is no other process.

    Several processes often have the same seed, and would shift and mirror their images in the same way.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    seed = int(torch.randint(2**48, (), device="cpu"))
    return torch.Generator().manual_seed(seed + torch.distributed.get_rank())


def _moved(images: Tensor, draws: Sequence[Tensor], padding: int) -> Tensor:
    """Pad images with black, crop each at its place, and mirror some.

    One flat index for both is several times as fast as a crop and a mirror, or as an index for each dimension.
    """
    (number, channels, height, width), (top, left, is_mirrored) = images.shape, draws
    padded = images.new_zeros(number, channels, height + 2 * padding, width + 2 * padding)
    padded[:, :, padding : padding + height, padding : padding + width] = images
    rows, columns = (torch.arange(size, device=images.device) for size in (height, width))
    columns = torch.where(is_mirrored.bool()[:, None], columns.flip(0), columns) + left[:, None]
    places = (top[:, None] + rows)[:, :, None] * padded.shape[3] + columns[:, None, :]
    index = places.view(number, 1, -1).expand(-1, channels, -1)
    return padded.flatten(2).gather(2, index).view_as(images)


@lru_cache(maxsize=16)
def _statistics(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    # A validation must not make them for the training that follows.
    with torch.inference_mode(False):
        made, made_std = (
            torch.tensor(values, dtype=torch.float32, device="cpu").view(-1, 1, 1) for values in (mean, std)
        )
        return to_device(made, device), to_device(made_std, device)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy values from the host to a device, without a wait."""
    return pinned(values, device).to(device, non_blocking=True)


def pinned(values: Tensor, device: torch.device) -> Tensor:
    """Return values that lie on the host so that they are copied to a device without a wait."""
    return values.pin_memory() if device.type == "cuda" else values


class SampleBatch(Sequence[tuple[Tensor, Tensor]]):
    """A batch that is made already. For whoever reads single samples, it is a list of images and labels.

    So any ``collate_fn`` of a loader can read it, and :func:`collate` takes it as it is.

    Args:
        images: Images ``(B, 3, H, W)``.
        labels: Labels ``(B,)``.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    @override
    def __getitem__(self, index: Any) -> Any:
        return self.images[index], self.labels[index]

    @override
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.images, self.labels, strict=True)

    @override
    def __len__(self) -> int:
        return len(self.labels)


def collate(samples: Any) -> Any:
    """Return images and labels of a batch that is made already, and the usual batch of single samples."""
    return [samples.images, samples.labels] if isinstance(samples, SampleBatch) else default_collate(samples)


class InMemoryImages(Dataset[tuple[Tensor, Any]]):
    """Decoded images with their labels. A loader gets a whole batch at once, in a list of samples for any other reader.

    Attributes:
        images: Images ``(N, 3, H, W)``, uint8, on the host or on the device that trains.
        targets: Labels ``(N,)`` or ``(N, C)``, int64, on the host, so that Lightning moves them and no step waits to
            see them.
        transform: Transform of the batches.
    """

    def __init__(self, images: Tensor, targets: Tensor, transform: BatchTransform) -> None:
        self.images, self.targets, self.transform = images, targets, transform

    def placed(self, device: torch.device) -> "InMemoryImages":
        """Return the images for a training on a device: there if it has room, else on the host."""
        if device == self.images.device:
            return self
        place = device if self.images.nbytes <= _SHARE * _free_memory(device) else torch.device("cpu")
        return InMemoryImages(self.images.to(place), self.targets, self.transform)

    def __getitems__(self, indices: Sequence[int]) -> SampleBatch:
        """Return the samples at these indices."""
        index = torch.as_tensor(indices, dtype=torch.int64, device="cpu")
        # Indices out of range are found here, on the host.
        labels = self.targets[index]
        return SampleBatch(self.transform(self.images, index % len(self)), pinned(labels, self.images.device))

    @override
    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        ((image, label),) = self.__getitems__([index])
        return image, label if label.ndim else int(label)

    def __len__(self) -> int:
        return len(self.targets)

    def __getstate__(self) -> dict[str, Any]:
        # Another process may have no such device.
        return {**vars(self), "images": self.images.cpu()}


def _free_memory(device: torch.device) -> int:
    """Return the free bytes of a device that has memory of its own, else 0."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else 0


def decode(dataset: Any, image_size: int, transform: BatchTransform, num_workers: int = 0) -> InMemoryImages:
    """Read every sample of a data set once, in order. The random state does not change.

    Args:
        dataset: Map-style data set of pairs of an image ``(3, H, W)``, uint8, and a class index.
        image_size: Height and width of the images.
        transform: Transform of the batches.
        num_workers: Processes that read samples, an integer >= 0; 0 reads them in this process.

    Raises:
        ArgumentError: If a sample is no such pair, or the data set has no length.
    """
    if isinstance(dataset, IterableDataset):
        raise bad_argument(
            "in_memory", "False for a data set without a length", got_text=f"True and {type(dataset).__name__}"
        )
    # A loader draws a seed for its processes.
    options: dict[str, Any] = {"num_workers": num_workers, "generator": torch.Generator()}
    chunks = DataLoader(dataset, _CHUNK, collate_fn=partial(_stack, image_size=image_size), **options)
    images = torch.empty(len(dataset), 3, image_size, image_size, dtype=torch.uint8, device="cpu")
    targets, start = list[Tensor](), 0
    for pixels, labels in chunks:
        images[start : start + len(labels)] = pixels
        targets.append(labels)
        start += len(labels)
    found = torch.cat(targets) if targets else torch.empty(0, dtype=torch.int64, device="cpu")
    return InMemoryImages(images, found, transform)


def _stack(samples: Sequence[Any], image_size: int) -> tuple[Tensor, Tensor]:
    """Return images and labels of a list of samples."""
    shape = (3, image_size, image_size)
    for sample in samples:
        image = sample[0] if isinstance(sample, tuple | list) and len(sample) == 2 else None
        if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.shape != shape:
            got = f"{tuple(image.shape)}, {image.dtype}" if isinstance(image, Tensor) else type(sample).__name__
            expected = f"False for samples other than pairs of an image {shape}, uint8, and a class index"
            raise bad_argument("in_memory", expected, got_text=f"True and a sample with {got}")
    return torch.stack([image for image, _ in samples]), torch.stack(
        [torch.as_tensor(label).long() for _, label in samples]
    )
