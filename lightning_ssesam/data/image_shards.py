"""Images in tar shards, which are read from beginning to end: for data sets of many millions of files."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from lightning_ssesam._validation import bad_argument, check_integer
from lightning_ssesam.class_order import check_class_names
from lightning_ssesam.data.contents import hash_files
from lightning_ssesam.data.images import ImageDataModule
from lightning_ssesam.data.reading import MAX_PIXELS
from lightning_ssesam.data.samplers import rank_and_processes
from lightning_ssesam.data.shard_index import Shard, read_index
from lightning_ssesam.data.shard_stream import Division, ShardImages, ShardLoader, Shuffling


class ImageShardsLT(ImageDataModule):
    """A long-tailed data set in tar shards, read by webdataset (extra ``streaming``).

    A shard is a tar file. A sample in it is a picture and a ``.cls`` file of the same name with the label, an integer.
    An index beside the shards, ``index.json``, has their class counts; :func:`~lightning_ssesam.data.index_shards` and
    :func:`~lightning_ssesam.data.write_shards` write it. No list of samples is held in memory.

    In each epoch the shards come in a new order, and the samples go through a buffer from which one is drawn at random.
    The order depends on ``seed``, the epoch, and the numbers of processes and workers. Every sample comes once in an
    epoch. Several processes that train together get equally many samples each; if the number cannot be divided, the
    first ones of the epoch come again. A run resumes exactly in the middle of an epoch, too, if those numbers and
    ``batch_size`` are the same. The samples before its position are read again, but not decoded.

    Batches are pairs of images ``(N, 3, image_size, image_size)``, float32, and class indices ``(N,)``, int64.

    Args:
        train: Pattern of the training shards, such as ``"shards/train-{000000..000146}.tar"`` or ``"shards/train-*"``.
        test: Pattern of the test shards.
        val: Pattern of the validation shards; without one the test set validates.
        image_size: Height and width of the images, an integer >= 1.
        num_classes: C, an integer >= 1; by default the largest training label + 1.
        class_names: Names of the classes, length C.
        buffer: Samples that are held in memory by each loading process to draw from, an integer >= 1.
        batch_size: Samples in a training batch, an integer >= 1.
        num_workers: Workers that load samples, an integer >= 0, and at most one for each shard; 0 loads them in the
            training process.
        seed: Seed of the order, an integer >= 0.
        max_pixels: Pixels of the largest image that is read, an integer >= 1, or None for no limit.
        **kwargs: See :class:`~lightning_ssesam.data.ImageDataModule`. A ``sampler`` and ``in_memory`` are refused,
            because samples are not drawn by their number.

    Raises:
        ArgumentError: If a shard is not there or is not as it was indexed, or a class has no training image; while
            samples are read, if one is damaged. The message names shard and sample.
        ModuleNotFoundError: If webdataset is not installed.
    """

    def __init__(
        self,
        train: str | Path,
        test: str | Path,
        val: str | Path | None = None,
        image_size: int = 224,
        num_classes: int | None = None,
        class_names: list[str] | None = None,
        buffer: int = 1000,
        batch_size: int = 64,
        num_workers: int = 4,
        *,
        seed: int = 0,
        max_pixels: int | None = MAX_PIXELS,
        **kwargs: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, **kwargs)
        _check_package()
        for name, given in {"sampler": self.sampler, "in_memory": self.in_memory or None}.items():
            if given is not None:
                raise bad_argument(name, "left out for shards, whose samples come in the order of the files", given)
        self.max_pixels = None if max_pixels is None else check_integer("max_pixels", max_pixels, minimum=1)
        self.image_size = check_integer("image_size", image_size, minimum=1)
        self.buffer, self.seed = check_integer("buffer", buffer, minimum=1), check_integer("seed", seed, minimum=0)
        patterns = {"train": train, "test": test} if val is None else {"train": train, "val": val, "test": test}
        self.val_is_test = val is None
        self._shards = {name: read_index(pattern) for name, pattern in patterns.items()}
        self.class_counts = _count(self._shards, num_classes)
        self.in_channels = self.count_channels()
        if class_names is not None:
            self.class_names = check_class_names(class_names, self.num_classes)

    @override
    def fingerprint(self) -> str:
        """Return a text that changes with the name, the size or the time of change of a shard."""
        return " ".join(
            hash_files([shard.path for shard in shards], str(Path(shards[0].path).parent))
            for _, shards in sorted(self._shards.items())
        )

    @override
    def make_sets(self) -> dict[str, Dataset[Any]]:
        """Return the sets, which read their shards when a loader asks."""
        transforms = dict(zip(("train", "test"), self.transforms(int(self.image_size or 0)), strict=True))
        return {
            name: ShardImages(
                shards,
                self.num_classes,
                transforms["train" if name == "train" else "test"],
                self.max_pixels,
                Shuffling(self.seed, self.buffer) if name == "train" else None,
            )
            for name, shards in self._shards.items()
        }

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training batches, in a new order in every epoch."""
        return self._loader("train", batch_size=self.batch_size)

    @override
    def _loader(self, name: str, **options: Any) -> DataLoader[Any]:
        images = self._set(name)
        assert isinstance(images, ShardImages)
        shares = self.trainer and self.trainer.distributed_sampler_kwargs
        rank, processes = (shares["rank"], shares["num_replicas"]) if shares else rank_and_processes() or (0, 1)
        # More of them would read the same shards.
        workers = min(self.num_workers, len(images.shards))
        options = {"num_workers": workers, "pin_memory": torch.cuda.is_available(), **options}
        part = images.divided(Division(rank, processes, options["batch_size"]))
        # Workers that stay would hold the random state with which they began, which no checkpoint has.
        return ShardLoader(part, **options)


def _check_package() -> None:
    try:
        import webdataset  # noqa: F401
    except ModuleNotFoundError as error:
        needs = "ImageShardsLT needs webdataset. Install it: pip install 'lightning-ssesam[streaming]'"
        raise ModuleNotFoundError(needs, name="webdataset") from error


def _count(shards: Mapping[str, Sequence[Shard]], num_classes: int | None) -> list[int]:
    """Return the training images of each class. Every class must have one, and no set a class of its own."""
    counts = {name: sum((Counter(shard.counts) for shard in found), Counter[int]()) for name, found in shards.items()}
    train = counts["train"]
    classes = (
        max(train, default=-1) + 1 if num_classes is None else check_integer("num_classes", num_classes, minimum=1)
    )
    if missing := [label for label in range(classes) if not train[label]]:
        got = f"none of {len(missing)} of them, such as class {missing[0]}"
        raise bad_argument("train", f"shards with images of every class in [0, {classes})", got_text=got)
    for name, found in counts.items():
        if not found or max(found) >= classes:
            got = f"the label {max(found)}" if found else "no image"
            raise bad_argument(name, f"shards with images whose labels are in [0, {classes})", got_text=got)
    return [train[label] for label in range(classes)]
