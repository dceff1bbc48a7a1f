"""CIFAR-10 and CIFAR-100, made long-tailed as in the literature."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, Subset
from typing_extensions import override

from lightning_ssesam._validation import bad_argument, check_integer
from lightning_ssesam.data.images import ImageDataModule
from lightning_ssesam.data.labels import labels_of
from lightning_ssesam.data.long_tailed import LongTailed
from lightning_ssesam.data.profiles import Profile, hold_out, long_tailed_counts

# In the order of the labels.
_NAMES_10 = "airplane automobile bird cat deer dog frog horse ship truck"
_NAMES_100 = (
    "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly "
    "camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup "
    "dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower "
    "leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid "
    "otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray "
    "road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar "
    "sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle "
    "wardrobe whale willow_tree wolf woman worm"
)


class CIFAR10LT(ImageDataModule):
    """Long-tailed CIFAR-10 by the protocol of Cao et al., "LDAM", NeurIPS 2019; downloaded by torchvision.

    Class 0 keeps most training images, and the balanced test set of 10,000 is also the validation set, as published.
    Batches are pairs of images ``(N, 3, 32, 32)``, float32, and class indices ``(N,)``, int64.

    Args:
        root: Folder that holds the files, or receives them.
        imbalance_factor: Largest over smallest class size, or its inverse; > 0.
        profile: ``"exponential"`` or ``"step"``; see :func:`~lightning_ssesam.data.long_tailed_counts`.
        batch_size: Samples in a training batch, an integer >= 1.
        val_per_class: Training images of each class that are held out for validation before the others are made
            long-tailed, an integer >= 0. With 0 the test set validates.
        seed: Seed that chooses the images, an integer >= 0.
        download: Whether to download missing files.
        **kwargs: See :class:`~lightning_ssesam.data.images.ImageDataModule`. By default training images are padded with
            4 pixels, cropped at random and flipped at random.

    Raises:
        ArgumentError: From ``setup``, if the files are missing.
    """

    _dataset = "CIFAR10"
    _num_classes = 10
    _train_per_class = 5000
    _mean = (0.4914, 0.4822, 0.4465)
    _std = (0.2023, 0.1994, 0.2010)
    class_names = tuple(_NAMES_10.split())

    def __init__(
        self,
        root: str | Path = "data",
        imbalance_factor: float = 100.0,
        profile: Profile = "exponential",
        batch_size: int = 64,
        *,
        val_per_class: int = 0,
        seed: int = 0,
        download: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, **kwargs)
        if check_integer("val_per_class", val_per_class, minimum=0) >= self._train_per_class:
            expected = f"less than the {self._train_per_class} images of a class"
            raise bad_argument("val_per_class", expected, val_per_class)
        self.root, self.download = Path(root), download
        self.in_channels, self.image_size = self.count_channels(), 32
        self.imbalance_factor, self.profile = imbalance_factor, profile
        self.val_per_class, self.val_is_test = val_per_class, val_per_class == 0
        self.seed = check_integer("seed", seed, minimum=0)
        largest = self._train_per_class - val_per_class
        self.class_counts = long_tailed_counts(self._num_classes, largest, imbalance_factor, profile)

    @override
    def prepare_data(self) -> None:
        """Called in one process when a run starts: downloads missing files."""
        if self.download:
            from torchvision import datasets

            getattr(datasets, self._dataset)(self.root, train=False, download=True)

    @override
    def fingerprint(self) -> str:
        """Return the same text always, since the published samples do not change."""
        return "" if type(self).make_sets is CIFAR10LT.make_sets else super().fingerprint()

    @override
    def make_sets(self) -> dict[str, Dataset[Any]]:
        """Read the files, hold out the validation images, and make the other training images long-tailed."""
        train, test = self._read(train=True), self._read(train=False)
        train.transform, test.transform = self.transforms(32, mean=self._mean, std=self._std, resize=False)
        generator = torch.Generator().manual_seed(self.seed)
        held_out, others = hold_out(labels_of(train), [self.val_per_class] * self._num_classes, generator)
        kept = Subset(train, others.tolist())
        sets = {"test": test, "train": LongTailed(kept, self.imbalance_factor, self.profile, self.seed)}
        if not self.val_is_test:
            # The copy shares the arrays and has the transform of the test images.
            plain = copy.copy(train)
            plain.transform = test.transform
            sets["val"] = Subset(plain, held_out.tolist())
        return sets

    def _read(self, train: bool) -> Any:
        from torchvision import datasets

        try:
            return getattr(datasets, self._dataset)(self.root, train=train)
        except RuntimeError as error:
            expected = f"a folder with the files of {self._dataset}, or any with download=True"
            raise bad_argument("root", expected, str(self.root)) from error


class CIFAR100LT(CIFAR10LT):
    """Long-tailed CIFAR-100; as :class:`CIFAR10LT`, with 500 training images of each of 100 classes."""

    _dataset = "CIFAR100"
    _num_classes = 100
    _train_per_class = 500
    _mean = (0.5071, 0.4867, 0.4408)
    _std = (0.2675, 0.2565, 0.2761)
    class_names = tuple(_NAMES_100.split())
