"""The base of all data modules: class counts, data sets, loaders."""

from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from typing_extensions import override

from lightning_ssesam._validation import check_integer
from lightning_ssesam.data.contents import hash_attributes
from lightning_ssesam.data.image_input import ImageInput
from lightning_ssesam.data.labels import labels_of
from lightning_ssesam.data.samplers import ClassSampler
from lightning_ssesam.factories import check_factory, check_made
from lightning_ssesam.split import ClassSplit

_EVALUATION_BATCH = 256


class LongTailDataModule(pl.LightningDataModule):
    """A data module that knows its class counts as soon as it is built.

    A subclass sets ``class_counts`` in ``__init__`` and overrides :meth:`make_sets`, or the loaders themselves.

    A data set that is long-tailed and downloaded has no files yet when ``__init__`` runs, but the objective, the loss
    and the metrics need the counts then. So write the published counts into the subclass, or ship a list of labels
    with it. Override ``prepare_data`` to download, and read the files in :meth:`make_sets`.

    Attributes:
        class_counts: Training samples of each class, length C.
        many_above: Classes with more training samples than this are many-shot.
        few_below: Classes with fewer training samples than this are few-shot.
        val_is_test: Whether the test set validates, because there is no validation set.
        division: Way in which the samples were divided into sets, in words; empty if it is not known.
        in_channels: Channels of the images, for the network; None if unknown. A subclass of images should set it.
        image_size: Height and width of the images in a batch; None if unknown.
        class_names: Name of each class, length C; empty if unknown. A subclass that knows them should set it.
        image_input: Way from a picture to an input, known after ``setup``. Checkpoints keep it, for predictions. None
            if there are no images, or the test images have a transform of their own.
        multi_label: Whether a sample may have any number of labels. Targets are then integers 0 and 1 for each label,
            ``(N, C)``, and a class count is the number of training samples with the label, >= 0.
        num_samples: Training samples of multi-label data; None if unknown.

    Args:
        batch_size: Samples in a training batch, an integer >= 1.
        num_workers: Processes that load samples, an integer >= 0; 0 loads them in the training process.
        sampler: Class or function that makes the sampler of the training set from its labels ``(N,)``, such as
            ``ClassBalancedSampler``. By default the training set is shuffled.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> class Points(LongTailDataModule):
        ...     def __init__(self, **kwargs):
        ...         super().__init__(**kwargs)
        ...         self.class_counts = [6, 2]
        ...
        ...     def make_sets(self):
        ...         labels = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1])
        ...         train = TensorDataset(torch.randn(8, 2), labels)
        ...         return {"train": train, "val": train, "test": train}
        >>> data = Points(batch_size=4)
        >>> data.split(tail_below=5).tail.tolist(), len(data.train_dataloader())
        ([False, True], 2)
    """

    class_counts: list[int]
    many_above: int = 100
    few_below: int = 20
    val_is_test: bool = False
    division: str = ""
    in_channels: int | None = None
    image_size: int | None = None
    class_names: Sequence[str] = ()
    image_input: ImageInput | None = None
    multi_label: bool = False
    num_samples: int | None = None
    # Whether `check_files` has nothing to do any more, because it has passed.
    _files_checked: bool = False

    def __init__(
        self, batch_size: int = 32, num_workers: int = 0, sampler: Callable[[Tensor], Sampler[int]] | None = None
    ) -> None:
        super().__init__()
        self.batch_size = check_integer("batch_size", batch_size, minimum=1)
        self.num_workers = check_integer("num_workers", num_workers, minimum=0)
        if sampler is not None:
            check_factory("sampler", sampler, Sampler)
        self.sampler = sampler
        self._sets: dict[str, Dataset[Any]] = {}

    @property
    def num_classes(self) -> int:
        """C, the number of classes."""
        return len(self.class_counts)

    def split(self, **kwargs: Any) -> ClassSplit:
        """Return the :class:`~lightning_ssesam.ClassSplit` of the training set.

        Args:
            **kwargs: Arguments of ``ClassSplit.from_counts``. The thresholds are those of the data set by default.
        """
        known: dict[str, Any] = {"many_above": self.many_above, "few_below": self.few_below}
        if self.multi_label:
            known |= {"multi_label": True, "num_samples": self.num_samples}
        return ClassSplit.from_counts(self.class_counts, **{**known, **kwargs})

    def make_sets(self) -> dict[str, Dataset[Any]]:
        """Return the data sets ``"train"``, ``"test"`` and, unless ``val_is_test``, ``"val"``."""
        return {}

    def check_files(self) -> None:
        """Check the files of all data sets, so that a bad one is found before training. By default does nothing.

        ``compare`` and ``sweep`` call it once, before the first training.

        Raises:
            ArgumentError: If a file is bad. The message says how many are.
        """

    def fingerprint(self) -> str:
        """Return a text that changes when the samples change, so that ``compare`` makes its runs again.

        By default it comes from the attributes of the module and of its data sets: the values of arrays and tensors,
        and the sizes and the times of change of files that are named there. Override it if your samples come from
        elsewhere, such as a database, or if making the data sets takes long. Settings and code need not be part of it.
        """
        with torch.random.fork_rng(devices=[]):
            if not self._sets:
                self.prepare_data()
                self.setup("fit")
        return hash_attributes(self)

    @override
    def setup(self, stage: str) -> None:
        """Called when a run starts: makes the data sets, once."""
        if not self._sets:
            self._sets = self.make_sets()

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training batches, shuffled or drawn by the sampler."""
        if self.sampler is None:
            return self._loader("train", batch_size=self.batch_size, shuffle=True)
        sampler = check_made("sampler", self.sampler(labels_of(self._set("train"))), Sampler)
        shares = self.trainer and self.trainer.distributed_sampler_kwargs
        if isinstance(sampler, ClassSampler) and shares:
            sampler.share(**shares)
        return self._loader("train", batch_size=self.batch_size, sampler=sampler)

    @override
    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Return the validation set, in batches of up to 256."""
        # A subclass that overrides the loaders may have no validation data.
        if type(self).make_sets is LongTailDataModule.make_sets:
            return []
        return self._loader("test" if self.val_is_test else "val", batch_size=_EVALUATION_BATCH)

    @override
    def test_dataloader(self) -> DataLoader[Any]:
        """Return the test set, in batches of up to 256."""
        return self._loader("test", batch_size=_EVALUATION_BATCH)

    def _loader(self, name: str, **options: Any) -> DataLoader[Any]:
        options = {"num_workers": self.num_workers, "pin_memory": torch.cuda.is_available(), **options}
        # Processes that stay would hold random states, which no checkpoint has.
        stay = self._workers_stay(name) and options["num_workers"] > 0
        return DataLoader(self._set(name), persistent_workers=stay, **options)

    def _workers_stay(self, name: str) -> bool:
        """Return whether the processes that load a set stay from epoch to epoch."""
        return False

    def _set(self, name: str) -> Dataset[Any]:
        # Outside a Trainer, nobody calls these hooks.
        if not self._sets:
            self.prepare_data()
            self.setup("fit")
        if name not in self._sets:
            raise NotImplementedError(
                f"Expected {type(self).__name__} to override `make_sets`, whose sets include {name!r}, or"
                f" `{name}_dataloader`, but its sets are {sorted(self._sets)}."
            )
        return self._sets[name]
