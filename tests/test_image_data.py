"""Data sets of image files, on tiny files that the tests write."""

import ast
import hashlib
import os
import pickle
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import STRICT
from PIL import Image
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler
from torchvision import datasets
from torchvision.transforms import v2

import lightning_ssesam.data
from lightning_ssesam.cli import main
from lightning_ssesam.data import (
    CIFAR10LT,
    CIFAR100LT,
    ClassBalancedSampler,
    DigitsLT,
    ImageFolderLT,
    ImageList,
    ImageListLT,
    ProgressivelyBalancedSampler,
)
from lightning_ssesam.data.images import IMAGENET_MEAN, IMAGENET_STD, default_transforms, read_image

pytestmark = STRICT


def everything(loader):
    return [torch.cat(parts) for parts in zip(*loader, strict=True)]


def rows(images):
    return [image.numpy().tobytes() for image in images]


def save_image(path, value=0, size=(8, 8), mode="RGB"):
    """One image, different for every value."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = {"RGB": (value % 256, value // 256, 7), "L": value % 256}[mode]
    Image.new(mode, size, colour).save(path)


def fails(make, *parts):
    """One sentence that has all the parts."""
    with pytest.raises(ValueError, match=r"[^\n]+") as caught:
        make()
    message = str(caught.value)
    for part in parts:
        assert str(part) in message
    assert "\n" not in message
    assert message.endswith(".")
    assert message.count("Expected") == 1


# CIFAR ----------------------------------------------------------------------------------------------------------------


def write_cifar(monkeypatch, folder, module, per_class, test_per_class=3):
    """Write small files as CIFAR's; each image starts with its number and is otherwise of the colour of its class."""
    kind, classes = getattr(datasets, module._dataset), module._num_classes
    base = Path(folder) / kind.base_folder
    base.mkdir(parents=True)
    generator = np.random.default_rng(0)

    def write(names, each, first):
        labels = generator.permutation(np.repeat(np.arange(classes), each))
        data = np.repeat(labels[:, None].astype(np.uint8), 3072, axis=1)
        data[:, 0], data[:, 1] = divmod(np.arange(first, first + len(labels)), 256)
        listed = []
        key = "labels" if classes == 10 else "fine_labels"
        for name, part in zip(names, np.array_split(np.arange(len(labels)), len(names)), strict=True):
            content = pickle.dumps({"data": data[part], key: labels[part].tolist()})
            (base / name).write_bytes(content)
            listed.append([name, hashlib.md5(content).hexdigest()])
        return listed

    train = write([name for name, _ in kind.train_list], per_class, 0)
    test = write([name for name, _ in kind.test_list], test_per_class, 30_000)
    names = pickle.dumps({kind.meta["key"]: [f"class {k}" for k in range(classes)]})
    (base / kind.meta["filename"]).write_bytes(names)
    monkeypatch.setattr(kind, "train_list", train)
    monkeypatch.setattr(kind, "test_list", test)
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": hashlib.md5(names).hexdigest()})
    monkeypatch.setattr(module, "_train_per_class", per_class)


def numbers(loader):
    """The labels, and the numbers of the images."""
    images, labels = everything(loader)
    first, second = images.flatten(1)[:, :2].long().unbind(1)
    assert torch.equal(images[:, 1, 5, 5].long(), labels), "an image has the label of another"
    return labels, (first * 256 + second).tolist()


RAW = {"train_transform": v2.PILToTensor(), "test_transform": v2.PILToTensor()}


@pytest.mark.parametrize(("module", "total", "largest"), [(CIFAR10LT, 12_406, 5000), (CIFAR100LT, 10_847, 500)])
@pytest.mark.parametrize("factor", [100, 0.01])
def test_published_counts_are_known_without_files(module, total, largest, factor):
    data = module("nowhere", factor)
    assert sum(data.class_counts) == total
    assert (data.class_counts[0], data.class_counts[-1]) == (largest, largest // 100)
    assert data.val_is_test
    assert data.split(tail_fraction=0.2).num_classes == data.num_classes
    held_out = module("nowhere", factor, val_per_class=100)
    assert (held_out.class_counts[0], held_out.val_is_test) == (largest - 100, False)
    assert module("nowhere", factor, "step").class_counts.count(largest) == data.num_classes // 2
    assert not Path("nowhere").exists()


@pytest.mark.parametrize(("module", "per_class"), [(CIFAR10LT, 20), (CIFAR100LT, 5)])
@pytest.mark.parametrize("val_per_class", [0, 2])
def test_cifar(module, per_class, val_per_class, monkeypatch):
    write_cifar(monkeypatch, "data", module, per_class)
    # Nothing is fetched where the files are already there.
    monkeypatch.setattr(
        "torchvision.datasets.cifar.download_and_extract_archive", lambda *_, **__: pytest.fail("fetched")
    )
    data = module(imbalance_factor=3, val_per_class=val_per_class, batch_size=16, seed=1, **RAW)
    classes = data.num_classes
    train, number = numbers(data.train_dataloader())
    test, test_numbers = numbers(data.test_dataloader())
    val, val_numbers = numbers(data.val_dataloader())
    assert torch.bincount(train).tolist() == data.class_counts
    assert data.class_counts[0] == per_class - val_per_class
    assert torch.bincount(test).tolist() == [3] * classes
    assert len(set(number)) == len(number)
    assert min(test_numbers) >= 30_000
    if val_per_class:
        assert torch.bincount(val).tolist() == [val_per_class] * classes
        assert not set(val_numbers) & set(number)
        assert max(val_numbers) < 30_000
    else:
        assert val_numbers == test_numbers
    assert len(next(iter(data.train_dataloader()))[0]) == 16
    seeds = [numbers(module(imbalance_factor=3, seed=seed, **RAW).train_dataloader())[1] for seed in (1, 1, 2)]
    assert set(seeds[0]) == set(seeds[1]) != set(seeds[2])


def test_cifar_validates_with_the_transform_of_the_test(monkeypatch):
    write_cifar(monkeypatch, "data", CIFAR10LT, 8)
    data = CIFAR10LT(imbalance_factor=2, val_per_class=2)
    loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    shown = [everything(loader) for loader in loaders]
    again = [everything(loader)[0] for loader in (data.val_dataloader(), data.test_dataloader())]
    assert torch.equal(shown[1][0], again[0])
    assert torch.equal(shown[2][0], again[1])
    for images, labels in shown[1:]:
        assert (images.shape[1:], images.dtype, labels.dtype) == ((3, 32, 32), torch.float32, torch.int64)
        expected = (labels[:, None] / 255 - torch.tensor([0.4914, 0.4822, 0.4465])) / torch.tensor(
            [0.2023, 0.1994, 0.201]
        )
        torch.testing.assert_close(images[:, :, 9, 9], expected)
    images, labels = shown[0]
    black = (-torch.tensor([0.4914, 0.4822, 0.4465]) / torch.tensor([0.2023, 0.1994, 0.201]))[:, None]
    borders = (images[:, :, 0, 16:17].isclose(black).all(1).flatten() & (labels > 0)).double().mean()
    assert 0.1 < borders < 0.9, "training images are not moved"


def test_cifar_that_is_not_there_names_the_folder():
    data = CIFAR10LT("elsewhere", download=False)
    data.prepare_data()
    fails(lambda: data.setup("fit"), "`root` to be a folder with the files of CIFAR10", "but got 'elsewhere'")
    fails(data.train_dataloader, "elsewhere")


def test_cifar_is_downloaded_by_torchvision(monkeypatch):
    calls = []
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", lambda *a, **_: calls.append(a))
    with pytest.raises(RuntimeError, match="not found or corrupted"):
        CIFAR100LT("here").prepare_data()
    assert calls == [("https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", Path("here"))]


# Lists ----------------------------------------------------------------------------------------------------------------


def write_list(name, lines, content=None):
    Path(name).write_bytes(content if content is not None else "".join(f"{line}\n" for line in lines).encode())
    return name


def image_list(counts, name, folder="images", first=0):
    """Write a list with these numbers of images of each class, in random order."""
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    labels = [labels[i] for i in torch.randperm(len(labels), generator=torch.Generator().manual_seed(len(labels)))]
    for number in range(len(labels)):
        save_image(f"{folder}/{name} {number}.png", first + number)
    return write_list(f"{name}.txt", [f"{name} {number}.png {label}" for number, label in enumerate(labels)])


def value_of(image):
    red, green, _ = image.getpixel((3, 3))
    return red + 256 * green


def test_list_of_every_kind_of_line():
    paths = ["a.png", "b c  d.png", "ünï/日本.png", "tab.png", "last 5.png", "/" + str(Path("e.png").resolve())[1:]]
    for number, path in enumerate(paths):
        save_image(Path("root") / path, number)
    lines = [f"{paths[0]} 0\r\n", "\n", f"{paths[1]} 3\n", " \t\r\n", f"{paths[2]}   1  \n"]
    lines += [f"{paths[3]}\t2\n", f"{paths[4]} 00\r\n", f"{paths[5]} 4"]
    for bom in (b"", b"\xef\xbb\xbf"):
        images = ImageList(write_list("list.txt", [], bom + "".join(lines).encode()), "root")
        assert images.num_classes == 5
        assert images.targets.tolist() == [0, 3, 1, 2, 0, 4]
        assert [images.path(index) for index in range(6)] == [str(Path("root") / path) for path in paths[:5]] + [
            paths[5]
        ]
        assert [(value_of(image), label) for image, label in images] == list(enumerate([0, 3, 1, 2, 0, 4]))
        assert value_of(images[-2][0]) == 4


def test_list_file_names_that_are_not_utf_8():
    save_image("plain.png", 9)
    name = b"caf\xe9.png"
    Path("plain.png").rename(Path(name.decode("utf-8", "surrogateescape")))
    assert value_of(ImageList(write_list("list.txt", [], name + b" 0\n"))[0][0]) == 9


@pytest.mark.parametrize(
    ("content", "options", "parts"),
    [
        (b"a.png 0\n\nb.png\n", {}, ["list.txt, line 3: ", "a path and a label, but got 'b.png'"]),
        (b"a.png 0\nb.png x1\n", {}, ["list.txt, line 2: ", "an integer in [0, 2147483648), but got 'x1'"]),
        (b"a.png 1.0\n", {}, ["line 1: ", "a label that is an integer", "but got '1.0'"]),
        (b"a.png 1_0\n", {}, ["line 1: ", "but got '1_0'"]),
        (b"a.png 0\na.png -1\n", {}, ["line 2: ", "but got '-1'"]),
        (b"a.png 0\r\n\r\na.png 3\r\n", {"num_classes": 3}, ["line 3: ", "in [0, 3), but got '3'"]),
        (b"a.png 99999999999\n", {}, ["line 1: ", "but got '99999999999'"]),
        (b"a.png " + b"9" * 5000, {}, ["line 1: "]),
        (b"  7\n", {}, ["line 1: ", "a path and a label, but got '7'"]),
        (b"", {}, ["list.txt: ", "lines of a path and a label, but got a file without any"]),
        (b"\xef\xbb\xbf\r\n \n", {}, ["list.txt: ", "but got a file without any"]),
        (b"a.png 0\n", {"num_classes": 0}, ["`num_classes` to be an integer >= 1, but got 0"]),
    ],
)
def test_bad_list(content, options, parts):
    fails(lambda: ImageList(write_list("list.txt", [], content), **options), *parts)


def test_missing_list():
    fails(lambda: ImageList("none.txt"), "none.txt: ", "but got No such file or directory")
    Path("folder").mkdir()
    fails(lambda: ImageList("folder"), "folder: ", "but got Is a directory")


@pytest.mark.parametrize("broken", ["missing", "text", "cut", "folder"])
def test_bad_image_of_a_list(broken):
    save_image("root/good.png", 1)
    if broken == "text":
        Path("root/bad one.png").write_text("no image")
    elif broken == "cut":
        Image.effect_noise((99, 99), 50).save("root/bad one.png")
        Path("root/bad one.png").write_bytes(Path("root/bad one.png").read_bytes()[:3000])
    elif broken == "folder":
        Path("root/bad one.png").mkdir()
    images = ImageList(write_list("list.txt", ["", "good.png 0", "", "bad one.png 1", "good.png 1"]), "root")
    assert images[0][1] == 0
    parts = ["list.txt, line 4: Expected root/bad one.png to be an image that can be read, but got "]
    fails(lambda: images[1], *parts)
    if broken == "cut":
        with pytest.raises(ValueError, match=r"list.txt, line 4: Expected root/bad one.png"):
            list(DataLoader(images, batch_size=None, num_workers=1))


def test_list_that_changes_is_noticed():
    save_image("a.png")
    images = ImageList(write_list("list.txt", ["a.png 0", "a.png 1"]))
    write_list("list.txt", ["a.png 0", "a.png 2"])
    assert images[0][1] == 0
    fails(lambda: images[1], "list.txt, line 2: ", "when the file was scanned")


def test_list_data_module():
    counts = [6, 1, 3]
    files = {"train": image_list(counts, "train"), "test": image_list([2, 0, 2], "test", first=300)}
    files["val"] = image_list([1, 1, 1], "val", first=600)
    data = ImageListLT(**files, root="images", batch_size=4, num_workers=0, image_size=8, **RAW)
    assert (data.class_counts, data.val_is_test) == (counts, False)
    for name, expected, first in (("train", counts, 0), ("test", [2, 0, 2], 300), ("val", [1, 1, 1], 600)):
        images, labels = everything(getattr(data, f"{name}_dataloader")())
        assert torch.bincount(labels, minlength=3).tolist() == expected
        assert sorted((images[:, 0, 3, 3].long() + 256 * images[:, 1, 3, 3].long()).tolist()) == list(
            range(first, first + sum(expected))
        )
    images, labels = next(iter(ImageListLT(**files, root="images", image_size=8, num_workers=0).train_dataloader()))
    assert (images.shape, images.dtype, labels.dtype) == ((10, 3, 8, 8), torch.float32, torch.int64)
    assert isinstance(data.train_dataloader().sampler, RandomSampler)
    for loader in (data.val_dataloader(), data.test_dataloader()):
        assert isinstance(loader.sampler, SequentialSampler)
        assert loader.batch_size == 256
    del files["val"]
    alone = ImageListLT(**files, root="images", num_workers=0, image_size=8, **RAW)
    assert alone.val_is_test
    assert rows(everything(alone.val_dataloader())[0]) == rows(everything(alone.test_dataloader())[0])


@pytest.mark.parametrize(
    ("train", "test", "parts"),
    [
        (
            ["a.png 0", "a.png 2"],
            ["a.png 0"],
            ["train.txt: ", "in [0, 3), but got none of 1 of them, such as class 1."],
        ),
        (["a.png 2000000000"], ["a.png 0"], ["train.txt: ", "none of 2000000000 of them, such as class 0."]),
        (["a.png 0", "a.png 1"], ["", "a.png 2"], ["test.txt, line 2: ", "in [0, 2), but got '2'"]),
        (["gone.png 0"], ["a.png 0"], ["train.txt, line 1: Expected images/gone.png to be an image"]),
        (["a.png 0"], ["gone.png 0"], ["test.txt, line 1: Expected images/gone.png to be an image"]),
    ],
)
def test_bad_lists_are_found_before_training(train, test, parts):
    save_image("images/a.png")
    files = {"train": write_list("train.txt", train), "test": write_list("test.txt", test)}
    fails(lambda: ImageListLT(**files, root="images").setup("fit"), *parts)


def test_more_classes_than_the_training_list_has():
    save_image("a.png")
    file = write_list("train.txt", ["a.png 0", "a.png 1"])
    fails(lambda: ImageListLT(file, file, num_classes=4), "train.txt: ", "[0, 4), but got none of 2", "as class 2.")


def test_first_image_is_tried_without_random_numbers():
    save_image("a.png")
    data = ImageListLT(write_list("a.txt", ["a.png 0"]), "a.txt", num_workers=0)
    before = torch.get_rng_state()
    data.setup("fit")
    assert torch.equal(before, torch.get_rng_state())


def test_list_with_ten_thousand_classes():
    counts = [1 + (k % 7 == 0) for k in range(10_000)]
    file = write_list("train.txt", [f"{k}/{i}.jpg {k}" for k, count in enumerate(counts) for i in range(count)])
    data = ImageListLT(file, write_list("test.txt", ["0/0.jpg 9999"]))
    assert data.class_counts == counts
    assert data.split(tail_fraction=0.5).num_classes == 10_000


def test_memory_of_a_long_list():
    lines = 200_000
    file = write_list("list.txt", [f"folder/name of a file {i}.jpg {i % 100}" for i in range(lines)])
    ImageList(write_list("short.txt", ["a 0"]))
    tracemalloc.start()
    images = ImageList(file)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert images.path(lines - 1) == f"./folder/name of a file {lines - 1}.jpg"
    assert held < 14 * lines
    assert peak < 30 * lines


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_list_in_other_processes(method):
    file = image_list([9, 5, 2], "train")
    images = ImageList(file, "images", transform=v2.PILToTensor())
    expected = everything(DataLoader(images, batch_size=5))
    loaded = everything(DataLoader(images, batch_size=5, num_workers=1, multiprocessing_context=method))
    assert torch.equal(loaded[0], expected[0])
    assert torch.equal(loaded[1], expected[1])
    copy = pickle.loads(pickle.dumps(ImageList(file, "images")))
    assert [value_of(image) for image, _ in copy] == list(range(16))


# Folders --------------------------------------------------------------------------------------------------------------


def folders(root, first=0, **counts):
    """As many images in each folder, all different; grey ones among them."""
    number = first
    for name, count in counts.items():
        for index in range(count):
            suffix, mode = ("png", "RGB") if index != 1 or number > 255 else ("bmp", "L")
            save_image(f"{root}/{name}/{index}.{suffix}", number, mode=mode)
            number += 1


def parts_of(data):
    """The labels and the images of each set."""
    loaders = {name: getattr(data, f"{name}_dataloader")() for name in ("train", "val", "test")}
    return {
        name: (labels.tolist(), rows(images))
        for name, (images, labels) in ((name, everything(loader)) for name, loader in loaders.items())
    }


def counts_of(parts, classes):
    return {name: [labels.count(k) for k in range(classes)] for name, (labels, _) in parts.items()}


def test_one_folder_for_each_class():
    folders("root", cat=20, ant=10, bee=1, dog=5, eel=2)
    data = ImageFolderLT("root", image_size=8, batch_size=7, **RAW)
    assert data.class_names == ["ant", "bee", "cat", "dog", "eel"]
    parts = parts_of(data)
    assert counts_of(parts, 5) == {"train": [7, 1, 14, 3, 2], "val": [1, 0, 2, 1, 0], "test": [2, 0, 4, 1, 0]}
    assert data.class_counts == [7, 1, 14, 3, 2]
    assert not data.val_is_test
    images = [image for _, part in parts.values() for image in part]
    assert len(images) == len(set(images)) == 38
    again, other = (parts_of(ImageFolderLT("root", image_size=8, seed=seed, **RAW)) for seed in (0, 1))
    assert again["test"] == parts["test"]
    assert set(again["train"][1]) == set(parts["train"][1])
    assert set(other["test"][1]) != set(parts["test"][1])


def test_every_class_keeps_an_image_to_train_on():
    folders("root", a=10, b=2, c=1)
    parts = parts_of(ImageFolderLT("root", val_fraction=0.45, test_fraction=0.5, image_size=8, **RAW))
    assert counts_of(parts, 3) == {"train": [1, 1, 1], "val": [4, 0, 0], "test": [5, 1, 0]}


def test_folders_for_train_and_test():
    folders("root/train", a=20, b=10)
    folders("root/test", 100, a=3)
    data = ImageFolderLT("root", image_size=8, **RAW)
    parts = parts_of(data)
    assert counts_of(parts, 2) == {"train": [18, 9], "val": [2, 1], "test": [3, 0]}
    assert (data.class_counts, data.val_is_test) == ([18, 9], False)
    whole = ImageFolderLT("root", val_fraction=0, image_size=8, **RAW)
    assert (whole.class_counts, whole.val_is_test) == ([20, 10], True)
    assert parts_of(whole)["val"] == parts_of(whole)["test"]
    folders("root/val", 200, b=4)
    three = ImageFolderLT("root", image_size=8, **RAW)
    assert counts_of(parts_of(three), 2) == {"train": [20, 10], "val": [0, 4], "test": [3, 0]}
    assert (three.class_names, three.val_is_test) == (["a", "b"], False)


def test_folder_made_long_tailed():
    folders("root", a=20, b=4, c=20)
    data = ImageFolderLT("root", imbalance_factor=6, val_fraction=0, image_size=8, **RAW)
    parts = parts_of(data)
    assert data.val_is_test
    assert data.class_counts == [16, 2, 6]
    assert counts_of(parts, 3)["train"] == [16, 2, 6]
    assert not set(parts["train"][1]) & set(parts["test"][1])
    step = ImageFolderLT("root", 4, "step", 0, image_size=8)
    assert step.class_counts == [15, 3, 15]


def test_grey_images_and_the_default_transforms():
    folders("root", a=8, b=8)
    data = ImageFolderLT("root", image_size=8, val_fraction=0)
    images, labels = everything(data.train_dataloader())
    assert (images.shape[1:], images.dtype, labels.dtype) == ((3, 8, 8), torch.float32, torch.int64)
    raw = ImageFolderLT("root", image_size=8, val_fraction=0, test_transform=v2.PILToTensor())
    shown, pixels = everything(data.test_dataloader())[0], everything(raw.test_dataloader())[0]
    normal = (pixels / 255 - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(IMAGENET_STD)[:, None, None]
    torch.testing.assert_close(shown, normal)


@pytest.mark.parametrize("broken", ["text", "cut"])
def test_bad_image_of_a_folder(broken):
    folders("root", a=1, b=1)
    Image.effect_noise((99, 99), 50).save("root/a/0.png")
    content = b"no image" if broken == "text" else Path("root/a/0.png").read_bytes()[:3000]
    Path("root/a/0.png").write_bytes(content)
    folders("root", b=9)
    data = ImageFolderLT("root", image_size=8)
    fails(lambda: list(data.train_dataloader()), "Expected root/a/0.png to be an image that can be read, but got ")


@pytest.mark.parametrize(
    ("made", "options", "parts"),
    [
        ({}, {}, ["`root` to be a folder with folders of images", "root"]),
        ({"root/train": {"a": 2}}, {}, ["a folder with `train` and `test`", "root with only train"]),
        ({"root/train": {"a": 2}, "root/val": {"a": 2}}, {}, ["root with only train, val"]),
        (
            {"root/train": {"a": 9}, "root/test": {"a": 1, "b": 1}},
            {},
            ["whose test classes are among its training classes, but got root with b only in test"],
        ),
        ({"root": {"a": 3, "b": 3}}, {"test_fraction": 0}, ["`test_fraction` to be a number strictly between 0 and 1"]),
        ({"root": {"a": 3}}, {"val_fraction": 1}, ["`val_fraction` to be a number strictly between 0 and 1"]),
        ({"root": {"a": 3}}, {"val_fraction": 0.8}, ["`val_fraction` to be less than 1 - test_fraction = 0.8"]),
        ({"root": {"a": 2}}, {}, ["`test_fraction` to be large enough to hold out an image"]),
        ({"root": {"a": 4}}, {}, ["`val_fraction` to be large enough to hold out an image"]),
        ({"root": {"a": 9, "b": 9}}, {"imbalance_factor": 50}, ["`imbalance_factor` to be at most max_count = 6"]),
        ({"root": {"a": 9}}, {"image_size": 0}, ["`image_size` to be an integer >= 1, but got 0"]),
    ],
)
def test_bad_folder(made, options, parts):
    for root, counts in made.items():
        folders(root, **counts)
    fails(lambda: ImageFolderLT("root", **options), *parts)


def test_folders_without_images():
    folders("root", a=9)
    Path("root/b").mkdir()
    fails(lambda: ImageFolderLT("root"), "`root` to be a folder with images of every class", "classes b")
    folders("other/train", a=9)
    Path("other/test/a").mkdir(parents=True)
    fails(lambda: ImageFolderLT("other"), "`root` to be a folder with images in test")


# Paths below a data set, of which nothing is a class or an image.
HIDDEN = [
    ".ipynb_checkpoints/0-checkpoint.png",
    "__MACOSX/a/0.png",
    "__macosx/0.png",
    "@eaDir/0.png",
    "#recycle/0.png",
    "$RECYCLE.BIN/0.png",
    "System Volume Information/0.png",
    ".git/0.png",
    "a/.ipynb_checkpoints/0-checkpoint.png",
    "a/@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg",
    "a/__MACOSX/deep/er/0.png",
    "a/._0.png",
    "a/.hidden.png",
    "a/deep/.thumbnails/0.png",
    "b/.AppleDouble/0.png",
]


def write_hidden(root):
    for number, path in enumerate(HIDDEN):
        save_image(f"{root}/{path}", 200 + number)
    for name in (".DS_Store", "Thumbs.db", "a/.DS_Store", "a/Thumbs.db", "a/desktop.ini", "b/Thumbs.db"):
        Path(root, name).write_text("no image")


@pytest.mark.parametrize("root", ["root", ".cache/root"])
def test_hidden_folders_and_files_are_ignored(root):
    """The data set itself may lie in a hidden folder, and folders within a class may not be hidden."""
    folders(root, a=10, b=10)
    save_image(f"{root}/b/deep/x..y.png", 20)
    expected = parts_of(ImageFolderLT(root, image_size=8, **RAW))
    assert counts_of(expected, 2) == {"train": [7, 8], "val": [1, 1], "test": [2, 2]}
    write_hidden(root)
    data = ImageFolderLT(root, image_size=8, **RAW)
    assert (data.class_names, data.class_counts) == (["a", "b"], [7, 8])
    parts = parts_of(data)
    assert {name: sorted(images) for name, (_, images) in parts.items()} == {
        name: sorted(images) for name, (_, images) in expected.items()
    }


def test_hidden_folders_beside_train_and_test_are_ignored():
    folders("root/train", a=10, b=10)
    folders("root/test", 100, a=3, b=3)
    for folder in ("root", "root/train", "root/test"):
        write_hidden(folder) if folder != "root" else save_image("root/.ipynb_checkpoints/a/0.png")
    save_image("root/__MACOSX/test/a/._0.png")
    data = ImageFolderLT("root", image_size=8, **RAW)
    assert data.class_names == ["a", "b"]
    assert counts_of(parts_of(data), 2) == {"train": [9, 9], "val": [1, 1], "test": [3, 3]}


@pytest.mark.parametrize(
    ("paths", "parts"),
    [
        (
            [".ipynb_checkpoints/0.png", "@eaDir/1.png"],
            ["`root` to be a folder with folders of images, but got root with only hidden folders: .ipynb_checkpoints"],
        ),
        (
            ["a/0.png", "b/._0.png", "c/@eaDir/0.png"],
            ["`root` to be a folder with images of every class, but got root with none for the classes b, c"],
        ),
        (["train/a/0.png", "test/.ipynb_checkpoints/0.png"], ["`root` to be a folder with folders of images"]),
        (["train/a/0.png", "test/a/._0.png"], ["`root` to be a folder with images in test, but got root with none"]),
    ],
)
def test_nothing_but_hidden_files_gets_one_error(paths, parts):
    for path in paths:
        save_image(Path("root", path))
    fails(lambda: ImageFolderLT("root"), *parts)


def test_hidden_files_of_a_list_are_skipped():
    """As `find` writes them. Folders above an absolute path's file count only if no data set can lie in them."""
    base = Path(".cache").resolve()
    kept = ["a/0.png", "./b/1.png", "../x/2.png", f"{base}/3.png", "a/deep.er/4..png", "my_eaDir/5.png"]
    hidden = [f"{base}/._6.png", f"{base}/@eaDir/7.png", f"{base}/.ipynb_checkpoints/8.png", "./._9.png", *HIDDEN]
    write_list("list.txt", [f"{path} {k % 2}" for k, path in enumerate([*hidden, *kept])])
    images = ImageList("list.txt", "root")
    assert [images.path(k) for k in range(len(images))] == [os.path.join("root", path) for path in kept]
    assert images.targets.tolist() == [k % 2 for k in range(len(hidden), len(hidden) + len(kept))]
    write_list("list.txt", [f"{path} 0" for path in hidden])
    fails(lambda: ImageList("list.txt"), "list.txt: ", "a file without any (lines of hidden files do not count)")


# All of them ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [8, 64, 65, 224])
def test_default_transforms(size):
    train, test = default_transforms(size)
    wide = Image.new("RGB", (300, 200), (255, 0, 0))
    # A green stripe at the left edge.
    wide.paste((0, 255, 0), (0, 0, 60, 200))
    for transform in (train, test):
        image = transform(wide)
        assert (image.shape, image.dtype) == ((3, size, size), torch.float32)
        highest = ((1 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)).tolist()
        assert image[0].max().item() == pytest.approx(highest[0], abs=1e-4)
    green = (1 - IMAGENET_MEAN[1]) / IMAGENET_STD[1]
    at_left = abs(test(wide)[1, size // 2, 0].item() - green) < 0.2
    assert at_left == (size <= 64), "small images are shown whole, others lose their edges"
    if size <= 64:
        images = torch.stack([train(wide) for _ in range(200)])
        at_left_half = (images[:, 1, size // 2, : size // 2].amax(1) > 0.5 * green).double().mean()
        assert 0.3 < at_left_half < 0.7, "half of the images are flipped"
        black = (0 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
        padded = images[:, :, 0, size // 2].isclose(black, atol=1e-5).all(1).double().mean()
        assert 0.1 < padded < 0.9, "images are moved"


@pytest.mark.parametrize("make", [DigitsLT, lambda **kw: ImageFolderLT("root", image_size=8, **kw)])
def test_sampler_gets_the_training_labels(make):
    folders("root", a=30, b=12, c=6)
    seen = []

    def sampler(labels):
        seen.append(labels)
        return ClassBalancedSampler(labels, num_samples=600)

    data = make(sampler=sampler)
    _, labels = everything(data.train_dataloader())
    assert torch.bincount(seen[0]).tolist() == data.class_counts
    expected = 600 / data.num_classes
    assert len(labels) == 600
    assert (torch.bincount(labels) - expected).abs().max() < 5 * expected**0.5
    assert torch.bincount(everything(data.test_dataloader())[1]).sum() < 600
    assert isinstance(make().train_dataloader().sampler, RandomSampler)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "`batch_size` to be an integer >= 1, but got 0"),
        ({"num_workers": -1}, "`num_workers` to be an integer >= 0, but got -1"),
        ({"seed": -1}, "`seed` to be an integer >= 0, but got -1"),
        ({"val_per_class": -1}, "`val_per_class` to be an integer >= 0, but got -1"),
        ({"val_per_class": 5000}, "`val_per_class` to be less than the 5000 images of a class, but got 5000"),
        ({"val_per_class": 4950}, "`imbalance_factor` to be at most max_count = 50"),
        ({"sampler": "class"}, "`sampler` to be a class or a function that makes it, but got 'class'"),
    ],
)
def test_bad_arguments(options, message):
    fails(lambda: CIFAR10LT(**options), message)


@pytest.mark.parametrize("workers", [0, 1])
def test_loaders(workers):
    folders("root", a=9, b=9)
    data = ImageFolderLT("root", image_size=8, num_workers=workers)
    for name in ("train", "val", "test"):
        loader = getattr(data, f"{name}_dataloader")()
        # Those of small images keep them in memory.
        assert (loader.num_workers, loader.persistent_workers) == (workers, workers > 0)
        large = getattr(ImageFolderLT("root", image_size=80, num_workers=workers), f"{name}_dataloader")()
        assert (large.num_workers, large.persistent_workers) == (workers, False)
        assert loader.pin_memory == torch.cuda.is_available()


def imported_at_once(path):
    """The packages that a file imports outside its functions."""
    nodes = list(ast.parse(path.read_text()).body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            yield from (name.name.partition(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.partition(".")[0]
        elif not isinstance(node, ast.FunctionDef | ast.Lambda):
            nodes += ast.iter_child_nodes(node)


def test_nothing_heavy_is_imported_at_once():
    # Looked up in the text, as torchmetrics imports torchvision where it finds it.
    files = list(Path(lightning_ssesam.data.__file__).parent.glob("*.py"))
    assert "torch" in {name for file in files for name in imported_at_once(file)}
    for file in files:
        assert not {"torchvision", "sklearn", "PIL", "matplotlib"} & set(imported_at_once(file)), file


def test_command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning-ssesam"])
    folders("root", a=30, b=12, c=9)
    options = ["--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    main(
        [
            "fit",
            "--data=ImageFolderLT",
            "--data.root=root",
            "--data.image_size=8",
            "--data.imbalance_factor=4",
            "--data.sampler=ProgressivelyBalancedSampler",
            "--data.sampler.num_epochs=7",
            "--data.test_transform=torchvision.transforms.v2.Compose",
            "--data.test_transform.transforms=[{class_path: torchvision.transforms.v2.ToImage},"
            "{class_path: torchvision.transforms.v2.ToDtype, init_args: {dtype: torch.float32, scale: true}}]",
            "--model.backbone=SmallConvNet",
            "--model.backbone.in_channels=3",
            "--model.objective=ERM",
            *options,
        ]
    )
    config = yaml.safe_load(Path("lightning_logs/version_0/config.yaml").read_text())["data"]["init_args"]
    name = ProgressivelyBalancedSampler.__name__
    assert config["sampler"]["class_path"].endswith(f".{name}")
    assert config["sampler"]["init_args"]["num_epochs"] == 7
    assert (config["imbalance_factor"], config["root"]) == (4, "root")


# Options that a data module hands on to its base: batch_size, num_workers, and whether it has transforms.
HANDED_ON = {
    "DigitsLT": (32, 0, False),
    "CIFAR10LT": (64, 0, True),
    "CIFAR100LT": (64, 0, True),
    "ImageFolderLT": (32, 0, True),
    "ImageListLT": (64, 4, True),
}


@pytest.mark.parametrize("name", HANDED_ON)
def test_options_of_the_base_on_the_command_line(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lightning-ssesam"])
    with pytest.raises(SystemExit):
        main(["fit", f"--data.help={name}"])
    printed = " ".join(capsys.readouterr().out.split())
    batch_size, num_workers, has_transforms = HANDED_ON[name]
    expected = {
        "batch_size": f"Samples in a training batch, an integer >= 1. (type: int, default: {batch_size})",
        "num_workers": f"an integer >= 0; 0 loads them in the training process. (type: int, default: {num_workers})",
        "sampler": "Class or function that makes the sampler of the training set",
    }
    if has_transforms:
        expected["train_transform"] = "by default random crops and flips, and normalisation. (type: "
        expected["test_transform"] = "by default the centre of the image, normalised. (type: "
        expected["in_memory"] = "Flag that keeps the decoded images in memory, for images of up to 64x64 pixels"
    for option, text in expected.items():
        assert f"--data.{option} " in printed
        assert text in printed, option


def test_options_of_a_data_module_are_named():
    # A third number of DigitsLT has been the size of a batch, and must not become a seed unnoticed.
    for make in (lambda: DigitsLT(50.0, "step", 32), lambda: CIFAR10LT("data", 100.0, "step", 64, 4)):
        with pytest.raises(TypeError, match="positional arguments"):
            make()


def test_a_list_that_is_gone_is_named_once(tmp_path):
    write(tmp_path / "a.png")
    (tmp_path / "list.txt").write_text("a.png 0\na.png 1\n")
    images = ImageList(tmp_path / "list.txt", tmp_path)
    (tmp_path / "list.txt").write_text("b.png 5\nb.png 6\n")
    with pytest.raises(ValueError, match="line 2: Expected the line") as caught:
        images[1]
    assert str(caught.value).count("line 2") == 1
    (tmp_path / "list.txt").unlink()
    with pytest.raises(ValueError, match=r"list\.txt: Expected a text file"):
        images[0]


@pytest.mark.parametrize("names", [("train", "valid"), ("train", "test", "valid")])
def test_folders_of_sets_are_not_classes(tmp_path, names):
    for name in names:
        for label in "ab":
            (tmp_path / name / label).mkdir(parents=True)
            write(tmp_path / name / label / "a.png")
    with pytest.raises(ValueError, match=r"argument `root` .*valid"):
        ImageFolderLT(tmp_path)


def test_sixteen_bits_are_refused(tmp_path):
    Image.fromarray(np.full((4, 4), 30000, np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="more than 8 bits"):
        read_image(str(tmp_path / "a.png"))


def write(path):
    Image.new("RGB", (4, 4)).save(path)


def test_seed_chooses_which_of_a_folder_are_kept():
    folders("images", a=30, b=30)
    kept = [
        rows(
            everything(
                ImageFolderLT(
                    "images", imbalance_factor=4, seed=seed, image_size=8, train_transform=v2.PILToTensor()
                ).train_dataloader()
            )[0]
        )
        for seed in (0, 0, 1)
    ]
    assert sorted(kept[0]) == sorted(kept[1]) != sorted(kept[2])


def test_large_images_are_cropped_at_random_and_whole_at_the_test():
    to_train, to_test = default_transforms(70)
    image = Image.new("RGB", (80, 80))
    image.paste((255, 255, 255), (40, 0, 80, 80))
    torch.manual_seed(0)
    white = [(to_train(image)[0] > 0).float().mean().item() for _ in range(20)]
    # Parts of any size and place: from nearly all black to nearly all white.
    assert max(white) - min(white) > 0.5
    assert to_train(image).shape == to_test(image).shape == (3, 70, 70)
    assert (to_test(image)[0] > 0).float().mean().item() == pytest.approx(0.5, abs=0.02)


def test_more_classes_than_a_label_can_have():
    fails(lambda: ImageList("none.txt", num_classes=2**40), "`num_classes`", 2**31, 2**40)


def test_missing_set_is_named():
    class Incomplete(lightning_ssesam.data.LongTailDataModule):
        def make_sets(self):
            return {"train": [], "test": []}

    with pytest.raises(NotImplementedError, match=r"'val', or `val_dataloader`, but its sets are \['test', 'train'\]"):
        Incomplete().val_dataloader()
