"""Tiny ImageNet as it is published, made long-tailed."""

from pathlib import Path

import pytest
import torch
from helpers import STRICT
from test_image_data import RAW, fails, save_image
from test_recipes import write_tiny_imagenet

from lightning_ssesam.data import TinyImageNetLT

pytestmark = STRICT


def made(**options):
    return TinyImageNetLT("tiny", **{"imbalance_factor": 4, "image_size": 8, "batch_size": 2, **RAW, **options})


def colours(loader):
    """The first two values of each image, which is of one colour, and its label."""
    samples = [sample for batch in loader for sample in zip(*batch, strict=True)]
    return sorted((int(label), *image[:2, 4, 4].tolist()) for image, label in samples)


def test_sets_are_as_published():
    write_tiny_imagenet()
    data = made()
    # Sorted by the names of the folders, and two classes with one name.
    assert data.class_names == ["goldfish", "crane n02", "crane n03"]
    assert data.class_counts == [4, 2, 1]
    assert data.val_is_test
    assert len(data.make_sets()["train"]) == 7
    test = colours(data.test_dataloader())
    assert [label for label, *_ in test] == [0, 1, 2]
    # JPEG moves colours by a few.
    for (_, *found), expected in zip(test, (101, 100, 102), strict=True):
        assert abs(found[0] - expected) < 6
    labels = torch.cat([labels for _, labels in data.train_dataloader()])
    assert labels.bincount().tolist() == [4, 2, 1]
    assert data.image_input is None
    without = TinyImageNetLT("tiny", 4, image_size=8)
    without.setup("fit")
    assert without.image_input.image_size == 8


def test_validation_images_are_held_out():
    write_tiny_imagenet()
    data = made(val_per_class=2, imbalance_factor=2)
    sets = data.make_sets()
    assert data.class_counts == [2, 1, 1]
    assert not data.val_is_test
    train, val = ({path for path, _ in sets[name].samples} for name in ("train", "val"))
    assert len(val) == 6
    assert not train & val
    assert made().fingerprint() == made().fingerprint() != data.fingerprint()
    fails(lambda: made(val_per_class=4), "`val_per_class` to be less than the 4 images of a class", "but got 4")


def test_folders_that_are_not_as_published():
    fails(made, "`root` to be the folder of tiny-imagenet-200.zip", "has no readable folder `train`")
    Path("tiny/train").mkdir(parents=True)
    fails(made, "has no folders in `train`")
    Path("tiny/train/n01").mkdir()
    fails(made, "has no images in `train/n01`")
    save_image("tiny/train/n01/images/1.JPEG")
    fails(made, "has no readable file `val/val_annotations.txt`")
    Path("tiny/val").mkdir()
    Path("tiny/val/val_annotations.txt").write_text("val_0.JPEG\tn09\t0\t0\t1\t1\n")
    fails(made, "has the line val_0.JPEG n09", "not an image and a class of `train`")
    Path("tiny/val/val_annotations.txt").write_text("\n")
    fails(made, "has no lines in `val/val_annotations.txt`")
    Path("tiny/val/val_annotations.txt").write_text("val_0.JPEG\tn01\t0\t0\t1\t1\n")
    fails(lambda: made(imbalance_factor=1).prepare_data(), "val_0.JPEG", "No such file")


def test_names_without_words():
    write_tiny_imagenet()
    Path("tiny/words.txt").unlink()
    assert made().class_names == ["n01", "n02", "n03"]


@pytest.mark.parametrize("option", ["seed", "val_per_class"])
def test_bad_arguments(option):
    write_tiny_imagenet()
    fails(lambda: made(**{option: -1}), f"`{option}` to be an integer >= 0, but got -1")
