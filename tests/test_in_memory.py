"""Small images in memory: the batches are those of the transforms, whatever reads them, wherever they lie."""

import contextlib
import copy
import itertools
import pickle
import re
import runpy
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import STRICT, KillAt, Killed, Model, assert_same_bits, planned_runs, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.connectors.logger_connector import _LoggerConnector
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection
from PIL import Image
from test_image_data import folders, image_list, write_cifar
from test_performance import BlockingCopies, Meta, Watched
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from lightning_ssesam import ERM, SSESAM, LongTailClassifier, mixin
from lightning_ssesam.cli import main
from lightning_ssesam.compare import Method
from lightning_ssesam.curvature.samples import choose_samples
from lightning_ssesam.data import (
    CIFAR10LT,
    CIFAR100LT,
    ClassBalancedSampler,
    ImageDataModule,
    ImageFolderLT,
    ImageListLT,
    LongTailed,
    ProgressivelyBalancedSampler,
    in_memory,
)
from lightning_ssesam.data.images import IMAGENET_MEAN, IMAGENET_STD, batch_transforms, default_transforms
from lightning_ssesam.data.in_memory import BatchTransform, InMemoryImages, SampleBatch
from lightning_ssesam.data.labels import labels_of
from lightning_ssesam.data.unaugmented import unaugmented
from lightning_ssesam.experiments.recipe import Recipe
from lightning_ssesam.models import SmallConvNet

pytestmark = STRICT


@pytest.fixture
def without_values(monkeypatch):
    """The device of `Meta` has no autocast, and Lightning moves the results to the host when a run ends."""
    monkeypatch.setattr(mixin, "between_forwards", lambda *args: contextlib.nullcontext())
    monkeypatch.setattr(_ResultCollection, "cpu", lambda self: self)
    monkeypatch.setattr(_LoggerConnector, "teardown", lambda self: None)


def noise_folder(root="images", size=(20, 13), test=True, **counts):
    """Images of noise, in folders for training and test; the test has none of the last class."""
    draws = np.random.default_rng(0)
    for part in ("train", "test"):
        for name, count in list(counts.items())[: len(counts) - (part == "test")]:
            folder = Path(root, part, name)
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = draws.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


def everything(loader):
    return [torch.cat(parts) for parts in zip(*loader, strict=True)]


def noise_set(number=30, size=8, padding=None):
    images = torch.randint(256, (number, 3, size, size), dtype=torch.uint8)
    return InMemoryImages(images, torch.arange(number) % 3, BatchTransform(IMAGENET_MEAN, IMAGENET_STD, padding))


def both(make, **options):
    """The data module with transforms, and the one in memory."""
    return make(**options), make(**options, in_memory=True)


def refused(make, *parts):
    with pytest.raises(ValueError, match=r"^Expected argument .*, but got .*\.$") as caught:
        make()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    return message


# The same images as with the transforms -------------------------------------------------------------------------------


def of_cifar(module, monkeypatch, **options):
    write_cifar(monkeypatch, "data", module, 12 if module is CIFAR10LT else 4)
    return partial(module, imbalance_factor=3, **options)


def of_folder(size, monkeypatch):
    noise_folder(a=20, b=9, c=3)
    return partial(ImageFolderLT, "images", image_size=size)


def of_divided_folder(_, monkeypatch):
    folders("images", a=20, b=9, c=3)
    # Chosen by the images: 8.
    return partial(ImageFolderLT, "images", imbalance_factor=4)


def of_lists(size, monkeypatch):
    files = {name: image_list(counts, name) for name, counts in (("train", [9, 5]), ("val", [2, 0]), ("test", [3, 2]))}
    return partial(ImageListLT, **files, root="images", image_size=size, num_workers=0)


KINDS = {
    "CIFAR-10": (of_cifar, CIFAR10LT),
    "CIFAR-100": (of_cifar, CIFAR100LT),
    "CIFAR-10, validation": (partial(of_cifar, val_per_class=2), CIFAR10LT),
    **{f"folder {size}": (of_folder, size) for size in (1, 7, 16, 64)},
    "divided folder": (of_divided_folder, None),
    "lists": (of_lists, 8),
}


@pytest.mark.parametrize("kind", KINDS)
def test_as_with_transforms(kind, monkeypatch):
    make, argument = KINDS[kind]
    plain, fast = both(make(argument, monkeypatch=monkeypatch), batch_size=7)
    for name in ("val", "test"):
        expected, found = (everything(getattr(data, f"{name}_dataloader")()) for data in (plain, fast))
        # To the last bit.
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
        assert (found[0].dtype, found[1].dtype) == (torch.float32, torch.int64)
        assert found[0].is_contiguous()
    # The training set in the same order, so that samplers and shuffles draw the same samples.
    sets = [data.train_dataloader().dataset for data in (plain, fast)]
    assert torch.equal(labels_of(sets[0]), labels_of(sets[1]))
    assert torch.bincount(sets[1].targets).tolist() == fast.class_counts
    assert (fast.val_is_test, fast.in_channels) == (plain.val_is_test, plain.in_channels)
    # No more of the training images than are needed.
    assert len(sets[1].images) == sum(fast.class_counts)
    expected, found = [], []
    for data, labels in ((plain, expected), (fast, found)):
        torch.manual_seed(5)
        labels += [batch[1].tolist() for batch in data.train_dataloader()]
    assert found == expected
    assert len(found[-1]) == sum(fast.class_counts) % 7 or 7


def all_draws(padding):
    places = range(2 * padding + 1)
    return torch.tensor(list(itertools.product(places, places, (0, 1)))).T


@pytest.mark.parametrize("size", [1, 7, 8, 20, 32, 64])
def test_training_images_of_given_draws(size, monkeypatch):
    """Every crop and mirror of an image, as torchvision makes it of the PIL image."""
    padding = size // 8
    _, to_train, _ = batch_transforms(size)
    assert to_train.padding == padding
    draws = all_draws(padding)[:, :: 7 if size == 64 else 1]
    image = Image.fromarray(np.random.default_rng(size).integers(0, 256, (size, size, 3), dtype=np.uint8))
    others = torch.randint(256, (3, 3, size, size), dtype=torch.uint8)
    images = torch.cat([others, functional.pil_to_tensor(image)[None], others])
    monkeypatch.setattr(BatchTransform, "_draw", lambda self, number: tuple(draws))
    found = to_train(images, torch.full((draws.shape[1],), 3))
    expected = []
    for top, left, is_mirrored in draws.T.tolist():
        moved = functional.crop(functional.pad(image, [padding] * 4), top, left, size, size)
        moved = functional.to_image(functional.horizontal_flip(moved) if is_mirrored else moved)
        scaled = functional.to_dtype(moved, torch.float32, scale=True)
        expected.append(functional.normalize(scaled, list(IMAGENET_MEAN), list(IMAGENET_STD)))
    assert torch.equal(found, torch.stack(expected))


@pytest.mark.parametrize("size", [16, 9])
def test_draws_have_the_distribution_of_the_transforms(size):
    """Every place and mirror, equally often: those that the transforms reach, and no others."""
    image = torch.randint(256, (1, 3, size, size), dtype=torch.uint8)
    images = InMemoryImages(image, torch.zeros(1, dtype=torch.long), batch_transforms(size)[1])
    combinations = 2 * (2 * (size // 8) + 1) ** 2
    torch.manual_seed(1)
    seen = [row.tobytes() for _ in range(100) for row in images.__getitems__([0] * combinations).images.numpy()]
    counts = Counter(seen)
    assert len(counts) == combinations
    statistic = sum((count - 100) ** 2 / 100 for count in counts.values()) / (combinations - 1)
    assert abs(statistic - 1) < 4 * (2 / (combinations - 1)) ** 0.5
    # Neighbours in a batch are drawn independently.
    names = {row: number for number, row in enumerate(counts)}
    pairs = Counter((names[a] % 5, names[b] % 5) for a, b in itertools.pairwise(seen))
    shares = Counter(names[row] % 5 for row in seen)
    expected = {(a, b): shares[a] * shares[b] / len(seen) for a in range(5) for b in range(5)}
    dependence = sum((pairs[key] - value) ** 2 / value for key, value in expected.items()) / 16
    assert dependence < 1 + 4 * (2 / 16) ** 0.5
    to_train, _ = default_transforms(size)
    pil = functional.to_pil_image(image[0])
    assert {to_train(pil).numpy().tobytes() for _ in range(12 * combinations)} == set(counts)


def test_training_images_are_those_that_the_transforms_make():
    """Of one image of a data module, after many draws; validation and test images are not moved."""
    noise_folder(a=9, b=3)
    plain, fast = both(partial(ImageFolderLT, "images"), image_size=8)
    sets = [data.train_dataloader().dataset for data in (plain, fast)]
    reached = {sets[0][3][0].numpy().tobytes() for _ in range(300)}
    found = Counter(row.tobytes() for row in sets[1].__getitems__([3] * 900).images.numpy())
    assert set(found) == reached
    assert len(reached) == 18
    assert min(found.values()) > 20


def test_cifar_has_its_own_statistics(monkeypatch):
    write_cifar(monkeypatch, "data", CIFAR100LT, 4)
    data = CIFAR100LT(imbalance_factor=2, val_per_class=1, in_memory=True)
    data.setup("fit")
    mean, std = CIFAR100LT._mean, CIFAR100LT._std
    plain = BatchTransform(mean, std)
    expected = {"train": BatchTransform(mean, std, 4), "val": plain, "test": plain}
    assert {name: images.transform for name, images in data._sets.items()} == expected


def test_draws_differ_from_batch_to_batch_and_follow_the_seed():
    images = noise_set(padding=4)
    torch.manual_seed(3)
    first, second = (images.__getitems__([0, 1, 2]).images for _ in range(2))
    torch.manual_seed(3)
    with torch.device("meta"):
        # Whatever the default device is.
        assert torch.equal(images.__getitems__([0, 1, 2]).images, first)
    assert not torch.equal(first, second)


def test_evaluation_draws_nothing():
    images = noise_set()
    before = torch.get_rng_state()
    images.__getitems__([1, 2])
    assert torch.equal(torch.get_rng_state(), before)


def test_indices():
    images = noise_set()
    expected = images.__getitems__(list(range(30)))
    for indices in ([-1, -30, 29], [torch.tensor(3), torch.tensor(-3)], torch.tensor([0, -2]), []):
        found = images.__getitems__(indices)
        places = [int(index) % 30 for index in indices]
        assert torch.equal(found.images, expected.images[places])
        assert torch.equal(found.labels, expected.labels[places])
    for wrong in (30, -31):
        with pytest.raises(IndexError):
            images.__getitems__([0, wrong])
        with pytest.raises(IndexError):
            images[wrong]
    # Old-style iteration ends at the last one.
    assert [label for _, label in images] == expected.labels.tolist()
    image, label = images[-1]
    assert torch.equal(image, expected.images[29])
    assert (label, type(label)) == (2, int)


# Whatever reads them --------------------------------------------------------------------------------------------------

WRAPPERS = {
    "Subset": lambda images: Subset(images, list(range(0, 30, 2))),
    "Subset of a Subset": lambda images: Subset(Subset(images, range(29)), [5, 3, 28]),
    "random_split": lambda images: torch.utils.data.random_split(images, [20, 10])[0],
    "LongTailed": lambda images: LongTailed(images, 5),
    "LongTailed of a Subset": lambda images: LongTailed(Subset(images, range(21)), 3),
    "ConcatDataset": lambda images: ConcatDataset([images, images]),
}


@pytest.mark.parametrize("collate", [None, in_memory.collate])
@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers(name, collate):
    torch.manual_seed(2)
    images = noise_set()
    torch.manual_seed(4)
    wrapped = WRAPPERS[name](images)
    torch.manual_seed(4)
    whole = images.__getitems__(range(30))
    expected = WRAPPERS[name](TensorDataset(whole.images, whole.labels))
    for found, batch in zip(DataLoader(wrapped, 4, collate_fn=collate), DataLoader(expected, 4), strict=True):
        assert torch.equal(found[0], batch[0])
        assert torch.equal(found[1], batch[1])
        assert found[1].dtype == torch.int64


def test_batch_is_a_list_of_samples():
    batch = SampleBatch(torch.rand(4, 3, 2, 2), torch.tensor([1, 0, 2, 2]))
    assert len(batch) == 4
    assert [int(label) for _, label in batch] == [1, 0, 2, 2]
    assert torch.equal(batch[2][0], batch.images[2])
    assert in_memory.collate(batch)[0] is batch.images


@pytest.mark.parametrize("sampler", [ClassBalancedSampler, partial(ProgressivelyBalancedSampler, num_epochs=3)])
def test_samplers(sampler):
    noise_folder(a=20, b=9, c=3)
    plain, fast = both(partial(ImageFolderLT, "images"), image_size=8, batch_size=5, sampler=sampler)
    loaders = [data.train_dataloader() for data in (plain, fast)]
    for epoch in range(2):
        for loader in loaders:
            loader.sampler.set_epoch(epoch)
        labels = [[batch[1].tolist() for batch in loader] for loader in loaders]
        assert labels[0] == labels[1]


def test_curvature_and_training_accuracy_read_them():
    noise_folder(a=20, b=9, c=3)
    plain, fast = both(partial(ImageFolderLT, "images"), image_size=8, batch_size=5)
    # The accuracy on the training images is that of images which are neither moved nor mirrored.
    expected, found = (
        everything(unaugmented(data.train_dataloader(), data.test_dataloader())) for data in (plain, fast)
    )
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    loader = fast.train_dataloader()
    chosen = choose_samples(loader.dataset, loader.collate_fn, fast.split(tail_below=5), ["head", "tail"], 3)
    assert [(len(images), labels.tolist()) for images, labels in chosen["tail"]] == [(3, [2, 2, 2])]


# Where they lie -------------------------------------------------------------------------------------------------------


def test_decoding_leaves_the_random_state_alone_and_workers_do_not_matter():
    noise_folder(a=20, b=9)
    before = torch.get_rng_state()
    made = [ImageFolderLT("images", image_size=8, in_memory=True, num_workers=number) for number in (0, 1)]
    for data in made:
        data.setup("fit")
        loaders = [getattr(data, f"{name}_dataloader")() for name in ("train", "val", "test")]
        # Whole batches, as they are made.
        assert {(loader.num_workers, loader.collate_fn) for loader in loaders} == {(0, in_memory.collate)}
    assert torch.equal(torch.get_rng_state(), before)
    for name, images in made[0]._sets.items():
        assert torch.equal(images.images, made[1]._sets[name].images)
    # Lists are read by four processes by default.
    lists = ImageListLT(image_list([2, 1], "train"), image_list([1, 1], "test"), None, "images", in_memory=True)
    assert lists.num_workers == 4
    assert [len(labels) for _, labels in lists.train_dataloader()] == [3]


def test_only_the_sets_of_a_stage_are_decoded():
    noise_folder(a=20, b=9)
    data = ImageFolderLT("images", image_size=8, in_memory=True)
    for stage, used in (("test", {"test"}), ("validate", {"val", "test"}), ("fit", {"train", "val", "test"})):
        data.setup(stage)
        if stage != "fit":
            getattr(data, "val_dataloader" if stage == "validate" else "test_dataloader")()
        assert {name for name, images in data._sets.items() if isinstance(images, InMemoryImages)} == used


def test_data_module_is_pickled_and_copied():
    noise_folder(a=6, b=3)
    data = ImageFolderLT("images", image_size=8, in_memory=True)
    fresh = pickle.loads(pickle.dumps(data))
    expected = everything(data.test_dataloader())
    for copied in (fresh, pickle.loads(pickle.dumps(data)), copy.deepcopy(data)):
        assert torch.equal(everything(copied.test_dataloader())[0], expected[0])


def test_place_of_the_images(monkeypatch):
    images, free = noise_set(padding=1), {"meta": 0, "cpu": 0}
    monkeypatch.setattr(in_memory, "_free_memory", lambda device: free[device.type])
    host, device = torch.device("cpu"), torch.device("meta")
    assert images.placed(host) is images
    assert images.placed(device).images.device == host
    # A quarter of the free memory, and no less.
    free["meta"] = 4 * images.images.nbytes - 1
    assert images.placed(device).images.device == host
    free["meta"] += 1
    placed = images.placed(device)
    assert placed.images.device == device
    assert placed.placed(device) is placed
    with BlockingCopies() as copies:
        batch = placed.__getitems__([3, 5])
    assert not copies.found
    assert (batch.images.shape, batch.images.device, batch.images.dtype) == ((2, 3, 8, 8), device, torch.float32)
    assert batch.labels.tolist() == [0, 2]
    # Another process, and a Trainer on the CPU, get what lies on the host. This device has nothing to copy.
    for use in (pickle.dumps, lambda images: images.placed(host)):
        with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
            use(placed)
    # Only CUDA devices tell what is free.
    monkeypatch.undo()
    assert all(in_memory._free_memory(torch.device(name)) == 0 for name in ("cpu", "meta", "mps"))


@pytest.mark.usefixtures("without_values")
@pytest.mark.parametrize("has_room", [True, False])
def test_no_step_waits_for_images_on_the_device(has_room, monkeypatch):
    noise_folder(a=20, b=9)
    monkeypatch.setattr(in_memory, "_free_memory", lambda device: 10**9 * has_room)
    data = ImageFolderLT("images", image_size=8, batch_size=10, val_fraction=0, in_memory=True)
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    model = Watched(net, SSESAM(data.split(tail_below=10)), "split")
    pinned, plain_loader = [], ImageFolderLT._loader

    def loader(self, name, **options):
        # As on a machine with a GPU, whose loaders pin the batches of the host.
        with monkeypatch.context() as there:
            there.setattr(torch.cuda, "is_available", lambda: True)
            made = plain_loader(self, name, **options)
        pinned.append(made.pin_memory)
        made.pin_memory = False
        return made

    monkeypatch.setattr(ImageFolderLT, "_loader", loader)
    run = trainer(strategy=Meta(), accelerator="auto", limit_val_batches=0)
    run.fit(model, datamodule=data)
    assert run.global_step == 3
    assert data._sets["train"].images.device.type == ("meta" if has_room else "cpu")
    assert data._sets["train"].targets.device.type == "cpu"
    assert pinned == [not has_room]


# Trainings ------------------------------------------------------------------------------------------------------------


def network(channels=3, classes=3):
    torch.manual_seed(6)
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * 64, 16), nn.Dropout(0.2), nn.Linear(16, classes))


def run_of(data, loader=None, ckpt_path=None, callbacks=(), **options):
    torch.manual_seed(7 if ckpt_path is None else 70)
    model = Model(network(), SSESAM(data.split(tail_below=5)))
    run = trainer(max_epochs=3, callbacks=list(callbacks), enable_checkpointing=True, **options)
    source = {"datamodule": data} if loader is None else {"train_dataloaders": loader}
    with pytest.MonkeyPatch.context() as there:
        there.setattr(
            Model, "validation_step", lambda self, batch, index: self.log("v", batch[0].mean()), raising=False
        )
        try:
            run.fit(model, **source, ckpt_path=ckpt_path)
        except Killed:
            return None
    return model


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.filterwarnings("ignore:.*stateful")
@pytest.mark.parametrize("is_stateful", [False, True])
def test_killed_training_resumes_bit_for_bit(is_stateful):
    """At the end of an epoch; with torchdata's loader also in the middle of one."""
    noise_folder(a=20, b=9, c=4)

    def make():
        data = ImageFolderLT("images", image_size=8, batch_size=8, val_fraction=0, in_memory=True)
        if not is_stateful:
            return data, None
        loader = data.train_dataloader()
        torch.manual_seed(8)
        return data, StatefulDataLoader(loader.dataset, 8, shuffle=True, collate_fn=loader.collate_fn)

    uninterrupted = run_of(*make())
    assert uninterrupted.trainer.global_step == 15
    every = {"every_n_train_steps": 1} if is_stateful else {"every_n_epochs": 1, "save_on_train_epoch_end": True}
    saving = ModelCheckpoint("saved", "{step}", save_top_k=-1, **every)
    assert run_of(*make(), callbacks=[saving, KillAt(12)]) is None
    files = sorted(Path("saved").iterdir())
    assert len(files) == (12 if is_stateful else 2)
    for file in files:
        assert_same_bits(run_of(*make(), ckpt_path=file).state_dict().values(), uninterrupted.state_dict().values())


def test_validation_before_the_training_and_after():
    """What a validation makes under inference mode is used by the training that follows, and the other way round."""
    in_memory._statistics.cache_clear()
    noise_folder(a=20, b=9, c=3)
    data = ImageFolderLT("images", image_size=8, batch_size=8, in_memory=True)
    model = LongTailClassifier(
        data.class_counts, partial(SmallConvNet, in_channels=3), SSESAM(head_rho=0.05, tail_rho=0.1), tail_below=5
    )
    run = trainer(max_epochs=1, num_sanity_val_steps=2)
    run.validate(model, datamodule=data, verbose=False)
    run.fit(model, datamodule=data)
    assert all(value.isfinite().all() for value in model.parameters())
    assert not any(value.is_inference() for value in in_memory._statistics(IMAGENET_MEAN, IMAGENET_STD, model.device))


# Options --------------------------------------------------------------------------------------------------------------


def test_on_the_command_line(monkeypatch, tmp_path):
    write_cifar(monkeypatch, "data", CIFAR10LT, 8)
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", lambda *_, **__: None)
    seen = []
    monkeypatch.setattr(CIFAR10LT, "teardown", lambda self, stage: seen.append(self._sets["train"]))
    main(
        [
            *("fit", "--data=CIFAR10LT", "--data.in_memory=true", "--data.imbalance_factor=2", "--model.objective=ERM"),
            *("--model.backbone=CIFARResNet", "--model.backbone.depth=8", "--model.tail_fraction=0.2"),
            *("--trainer.accelerator=cpu", "--trainer.max_epochs=1", "--trainer.enable_progress_bar=false"),
            "--trainer.limit_train_batches=1",
        ]
    )
    assert isinstance(seen[0], InMemoryImages)
    config = yaml.safe_load(Path("lightning_logs/version_0/config.yaml").read_text())["data"]["init_args"]
    assert config["in_memory"] is True


def test_option_of_compare(monkeypatch):
    noise_folder("photos", a=20, b=9, c=4)
    options = "--data=ImageFolderLT --data.root=photos --data.image_size=8 --data.in_memory=true --tail_below=5"
    task, *_ = planned_runs(monkeypatch, [*options.split(), "--seeds=1"])
    assert task.experiment.make_data().in_memory is True


def test_fingerprint():
    noise_folder(a=20, b=9, c=4)
    make = partial(ImageFolderLT, "images", image_size=8)

    def fingerprint(factory):
        method = Method(ERM, data=factory, backbone=partial(SmallConvNet, in_channels=3))
        return method.experiment("name", Recipe(), 0.7).fingerprint(make().split(tail_below=5))

    plain = fingerprint(make)
    assert fingerprint(partial(make, in_memory=False)) == plain
    fast = fingerprint(partial(make, in_memory=True))
    # Other numbers are drawn.
    assert fast != plain
    assert fingerprint(partial(make, in_memory=True, num_workers=3)) == fast


class Own(ImageDataModule):
    """A data module of somebody's own, whose samples are those of the arguments."""

    class_counts = (4,)

    def __init__(self, make_one, number=4, **options):
        super().__init__(**options)
        self.make_one, self.number = make_one, number

    def make_sets(self):
        one = self.make_one(self)
        return dict.fromkeys(("train", "val", "test"), one if isinstance(one, IterableDataset) else [one] * self.number)


def grey(size=8, mode="RGB"):
    return Image.new(mode, (size, size), "grey")


def test_own_data_module():
    data = Own(lambda own: (own.transforms(8)[0](grey(20)), torch.tensor(2)), in_memory=True)
    plain = Own(lambda own: (own.transforms(8)[1](grey(20)), torch.tensor(2)))
    found, expected = (everything(each.val_dataloader()) for each in (data, plain))
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    # A set without samples is one without batches.
    data = Own(lambda own: (own.transforms(8)[0](grey()), 2), number=0, in_memory=True)
    assert list(data.val_dataloader()) == []


class Endless(IterableDataset):
    def __iter__(self):
        return iter(())


def raw(own):
    own.transforms(8)
    return Endless()


@pytest.mark.parametrize(
    ("make_one", "parts"),
    [
        (lambda own: (torch.zeros(3, 8, 8, dtype=torch.uint8), 0), ["do not get their transforms from `transforms`"]),
        (lambda own: (own.transforms(8)[0](grey()).float(), 0), ["(3, 8, 8), uint8", "(3, 8, 8), torch.float32"]),
        (lambda own: (own.transforms(8)[0](grey(mode="L")), 0), ["with (1, 8, 8), torch.uint8"]),
        (lambda own: (own.transforms(8, resize=False)[0](grey(9)), 0), ["with (3, 9, 9), torch.uint8"]),
        (lambda own: own.transforms(8)[0](grey()), ["a sample with Tensor"]),
        (lambda own: {"image": own.transforms(8)[0](grey())}, ["a sample with dict"]),
        (lambda own: (own.transforms(8)[0](grey()), 0, "name"), ["a sample with tuple"]),
        (lambda own: (grey(), own.transforms(8)[0](grey())), ["a sample with tuple"]),
        (
            lambda own: (own.transforms(65)[0](grey()), 0),
            ["`image_size` to be at most 64", "65 (0.0 MiB for an image)"],
        ),
        (raw, ["a data set without a length", "Endless"]),
    ],
)
def test_samples_that_cannot_be_kept_are_refused(make_one, parts):
    data = Own(make_one, in_memory=True)
    # Not only the first time.
    for use in (lambda: data.setup("fit"), lambda: data.setup("fit"), data.train_dataloader, data.test_dataloader):
        refused(use, *parts)


def test_own_loaders_cannot_have_images_in_memory():
    class OwnLoaders(ImageDataModule):
        def train_dataloader(self):
            return [(torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.long))]

    for stage in ("fit", "test"):
        refused(lambda stage=stage: OwnLoaders(in_memory=True).setup(stage), "False for OwnLoaders", "`transforms`")
        OwnLoaders().setup(stage)


MODULES = {
    "CIFAR10LT": CIFAR10LT,
    "CIFAR100LT": CIFAR100LT,
    "ImageFolderLT": partial(ImageFolderLT, "images"),
    "ImageListLT": partial(ImageListLT, "train.txt", "train.txt", root="images/train"),
}


@pytest.mark.parametrize("name", MODULES)
def test_refusals(name):
    noise_folder(a=6, b=3)
    Path("train.txt").write_text("a/0.png 0\nb/0.png 1\n")
    make = partial(MODULES[name], in_memory=True)
    for option in ("train_transform", "test_transform"):
        own = v2.PILToTensor()
        refused(lambda option=option, own=own: make(**{option: own}), f"`{option}`", "None with in_memory=True")
    for wrong in ("yes", 1, None):
        refused(lambda wrong=wrong: MODULES[name](in_memory=wrong), "`in_memory` to be True or False")
    if name.startswith("Image"):
        make(image_size=64)
        number, size = (9, "1.3") if name == "ImageFolderLT" else (2, "0.3")
        message = refused(lambda: make(image_size=224), "`image_size` to be at most 64 with in_memory=True")
        assert f"but got 224 ({size} MiB for {number} training images)." in message
        MODULES[name](image_size=224)


def test_bad_file_is_found_before_training():
    noise_folder(a=6, b=3)
    good = Path("images/test/a/0.png").read_bytes()
    # Damage that the check of headers and ends does not see.
    Path("images/test/a/0.png").write_bytes(good[:60] + b"damage" + good[66:])
    data = ImageFolderLT("images", image_size=8, in_memory=True)
    data.prepare_data()
    with pytest.raises(ValueError, match=r"Expected images/test/a/0.png to be an image that can be read"):
        data.setup("fit")


def test_benchmark(monkeypatch, capsys):
    script = Path(__file__).parents[1] / "benchmarks" / "loader.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--rounds=1", "--number=20", "--image-size=8"])
    runpy.run_path(str(script), run_name="__main__")
    rates = re.findall(r"^\| (\w+) \| (\S+) \| ([\d,]+) \|", capsys.readouterr().out, re.MULTILINE)
    found = {row[:2]: int(row[2].replace(",", "")) for row in rates}
    assert len(found) == 4
    # Ten times as many, on a machine that does something else, too.
    assert found["train", "in_memory=True"] > 4 * found["train", "transforms"]


def test_processes_of_the_same_seed_draw_differently(monkeypatch):
    """Lightning seeds all processes alike."""
    images = torch.arange(256, dtype=torch.uint8).expand(3, 3, 16, 256)[..., :16].repeat(4, 1, 1, 1)
    transform, index = BatchTransform((0.0,) * 3, (1.0,) * 3, 2), torch.arange(12)

    def draw(rank):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: rank is not None)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
        torch.manual_seed(3)
        return [transform(images, index) for _ in range(2)]

    found = [draw(rank) for rank in (None, 0, 1)]
    pairs = [(a, b) for number, a in enumerate(found) for b in found[number + 1 :]]
    assert not any(torch.equal(a, b) for first, second in pairs for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(draw(1), found[2], strict=True))
    assert not torch.equal(*found[2])
