"""The shipped recipes: each is what its paper says, and is built by the command line and trained on tiny images."""

import csv
import math
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers import STRICT
from lightning.pytorch import Trainer
from test_image_data import save_image, write_cifar

import lightning_ssesam.models
from lightning_ssesam.cli import main
from lightning_ssesam.data import CIFAR100LT

pytestmark = STRICT


CONFIGS = Path(lightning_ssesam.__file__).parent / "configs"


def config_path(name):
    return CONFIGS / f"{name}.yaml"


@pytest.fixture(autouse=True)
def _own_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning-ssesam"])


def write_lists(prefix, names=("train", "val", "test")):
    for name in names:
        counts = {"train": (4, 2, 2)}.get(name, (1, 1, 1))
        lines = [f"{name}/{label}/{n}.png {label}" for label, count in enumerate(counts) for n in range(count)]
        for number, line in enumerate(lines):
            save_image(f"images/{line.split()[0]}", number, size=(12, 10))
        Path(f"{prefix}_{name}.txt").write_text("\n".join(lines))


def write_tiny_imagenet(root="tiny", per_class=4):
    for number, wnid in enumerate(("n02", "n01", "n03")):
        for n in range(per_class):
            save_image(f"{root}/train/{wnid}/images/{wnid}_{n}.JPEG", 20 * number + n, size=(8, 8))
        Path(root, "train", wnid, f"{wnid}_boxes.txt").write_text("0 0 1 1")
        save_image(f"{root}/val/images/val_{number}.JPEG", 100 + number, size=(8, 8))
    lines = [f"val_{number}.JPEG\t{wnid}\t0\t0\t1\t1\n" for number, wnid in enumerate(("n02", "n01", "n03"))]
    Path(root, "val", "val_annotations.txt").write_text("".join(lines))
    Path(root, "words.txt").write_text("n01\tgoldfish, Carassius auratus\nn02\tcrane\nn03\tcrane, bird\n")


def write_folder():
    for part, counts in {"train": (9, 2), "test": (1, 1), "val": (1, 1)}.items():
        for label, count in enumerate(counts):
            for n in range(count):
                save_image(f"images/{part}/{label}/{n}.png", 10 * label + n)


LISTS = ["root=images", "train=lists_train.txt", "test=lists_test.txt", "image_size=16", "batch_size=2"]
TINY_VIT = "{img_size: 16, patch_size: 8, depth: 1, embed_dim: 12, num_heads: 3}"
SMALL = {
    "imagenet_lt": [*LISTS, "val=lists_val.txt"],
    "places_lt": [*LISTS, "val=lists_val.txt"],
    "inaturalist18": LISTS,
    "tiny_imagenet_lt": ["root=tiny", "imbalance_factor=2", "image_size=16", "batch_size=2"],
    "cifar100_lt_augmented": ["imbalance_factor=2", "batch_size=2", "download=false"],
    "cifar100_lt_bcl": ["imbalance_factor=2", "batch_size=2", "download=false"],
    "finetune_timm": ["root=images", "image_size=16", "batch_size=2"],
}
NETWORKS = {
    "cifar100_lt_augmented": ["depth=8"],
    "cifar100_lt_bcl": ["depth=8"],
    "finetune_timm": ["pretrained=false", "name=vit_tiny_patch16_224", f"options={TINY_VIT}"],
}
WRITERS = {
    "tiny_imagenet_lt": lambda _: write_tiny_imagenet(),
    "cifar100_lt_augmented": lambda monkeypatch: write_cifar(monkeypatch, "data", CIFAR100LT, 2, 1),
    "finetune_timm": lambda _: write_folder(),
}
WRITERS["cifar100_lt_bcl"] = WRITERS["cifar100_lt_augmented"]


def options_of(name, monkeypatch, data="--data.", backbone="--model.backbone.", model="--model."):
    """Write tiny images for a configuration, and return the options that make it quick."""
    WRITERS.get(name, lambda _: write_lists("lists"))(monkeypatch)
    if name == "finetune_timm":
        pytest.importorskip("peft")
    tail = [] if name == "finetune_timm" else [f"{model}tail_below={2 if 'cifar' in name else 3}"]
    small = [f"{data}{option}" for option in [*SMALL[name], "num_workers=0"]]
    return [*small, *tail, *(f"{backbone}{option}" for option in NETWORKS.get(name, []))]


# Networks that take long, in the place of which a small one is trained. They are built below.
LARGE = {"imagenet_lt", "places_lt", "inaturalist18", "tiny_imagenet_lt"}
SMALL_NET = {"class_path": "SmallConvNet", "init_args": {"width": 8}}


@pytest.mark.parametrize("name", SMALL)
def test_recipe_is_trained(name, monkeypatch):
    """Four updates, the last one in the second stage, if the objective has one."""
    options = options_of(name, monkeypatch)
    quick = ["max_epochs=1", "accelerator=cpu", "limit_train_batches=4", "enable_progress_bar=false", "precision=32"]
    quick += ["limit_val_batches=1", "logger=CSVLogger", "logger.save_dir=.", "log_every_n_steps=1"]
    quick += ["num_sanity_val_steps=0", "enable_model_summary=false"]
    seen = []
    monkeypatch.setattr(Trainer, "save_checkpoint", lambda trainer, *_: seen.append(trainer.lightning_module))
    if name in LARGE:
        options += ["--model.backbone=SmallConvNet", "--model.backbone.width=8"]
    main(["fit", "--config", name, *options, *(f"--trainer.{option}" for option in quick)])
    (rows,) = (list(csv.DictReader(path.open())) for path in Path("lightning_logs").rglob("metrics.csv"))
    losses = [float(row["train/loss"]) for row in rows if row["train/loss"]]
    assert len(losses) == 4
    assert all(0 <= loss < math.inf for loss in losses)
    assert seen[-1].trainer.global_step == 4
    if "finetune" not in name:
        assert [float(row["stage"]) for row in rows if row["stage"]] == [1, 1, 1, 2]
    assert torch.tensor([float(row["val/acc_all"]) for row in rows if row["val/acc_all"]]).isfinite().all()


def shrunk(value, changes, network):
    """A configuration with other values, wherever in it their names are, and another network of timm."""
    if isinstance(value, list):
        return [shrunk(item, changes, network) for item in value]
    if not isinstance(value, dict):
        return value
    new = {key: changes[key] if key in changes else shrunk(item, changes, network) for key, item in value.items()}
    return {**new, "init_args": {**new["init_args"], **network}} if "TimmModel" in str(new.get("class_path")) else new


TRAINED = {
    "imagenet_lt": "SSE-SAM + logit adjustment",
    "tiny_imagenet_lt": "SSE-SAM",
    "cifar100_lt_augmented": "BCL + SSE-SAM",
    "finetune_timm": "LoRA + SSE-SAM",
}


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.usefixtures("no_pictures")
def test_comparison_is_trained(name, monkeypatch):
    """One method makes four updates, all are read; data, optimizer and epochs are those of the recipe for ``fit``."""
    options = [option.split("=", 1) for option in options_of(name, monkeypatch, "", "", "")]
    changes = {key: yaml.safe_load(value) for key, value in options}
    shipped = yaml.safe_load(config_path(f"compare_{name}").read_text())
    recipe = yaml.safe_load(config_path(name).read_text())
    assert shipped["data"] == recipe["data"]
    assert shipped["optimizer"] == recipe["model"]["optimizer"]
    assert shipped["epochs"] == recipe["trainer"]["max_epochs"]
    trainer = {"limit_train_batches": 4, "limit_val_batches": 1, "accelerator": "cpu"}
    network = {key: changes.pop(key) for key in ("name", "pretrained", "options") if key in changes}
    small = shrunk({**shipped, "epochs": 1, "seeds": 1, "trainer": trainer}, changes, network)
    if "imagenet" in name:
        small["backbone"] = SMALL_NET
    Path("small.yaml").write_text(yaml.safe_dump(small))
    assert TRAINED[name] in shipped["methods"]
    main(["compare", "--config=small.yaml", "--jobs=1", "--output=out", f"--methods={TRAINED[name]}"])
    with Path("out/results.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row["method"] == TRAINED[name]
    assert float(row["all"]) >= 0


# Epochs, images of a batch, rate, weight decay, arguments of the scheduler, parameters of the network in millions.
PUBLISHED = {
    "imagenet_lt": (90, 512, 0.2, 5e-4, {"T_max": 90}, 25.03),
    "places_lt": (30, 128, 0.02, 5e-4, {"T_max": 30}, 60.19),
    "inaturalist18": (90, 512, 0.2, 1e-4, {"T_max": 90}, 25.56),
    "tiny_imagenet_lt": (120, 128, 0.1, 2e-4, {"milestones": [90], "gamma": 0.1}, 11.68),
    "cifar100_lt_augmented": (400, 128, 0.1, 5e-4, {"total": 400, "warmup": 10}, 0.47),
    "cifar100_lt_bcl": (200, 256, 0.15, 5e-4, {"total": 200, "warmup": 5, "milestones": [160, 180]}, 0.47),
    "finetune_timm": (10, 128, 0.01, 5e-4, {"T_max": 10}, None),
}


@pytest.mark.parametrize("name", SMALL)
def test_recipe_is_what_its_paper_says(name):
    """The numbers of the papers, and networks of the usual size for 1000 classes, on the meta device."""
    epochs, batch, rate, decay, schedule, millions = PUBLISHED[name]
    recipe = yaml.safe_load(config_path(name).read_text())
    model = recipe["model"]
    assert recipe["trainer"]["max_epochs"] == epochs
    assert recipe["data"]["init_args"]["batch_size"] == batch
    assert model["optimizer"]["init_args"] == {"lr": rate, "momentum": 0.9, "weight_decay": decay}
    assert model["scheduler"]["init_args"] == schedule
    if millions is not None:
        arguments = {**model["backbone"]["init_args"], "num_classes": 1000}
        kind = getattr(lightning_ssesam.models, model["backbone"]["class_path"].rpartition(".")[2])
        arguments.pop("weights", None)
        with torch.device("meta"):
            size = sum(p.numel() for p in kind(**arguments).parameters())
        assert size / 1e6 == pytest.approx(millions, abs=0.07)


def test_every_shipped_configuration_is_trained_somewhere():
    """A new one needs a test."""
    comparisons = {f"compare_{name}" for name in ("cifar100_lt", "cifar10_lt", "family", "folder")}
    shipped = {path.stem for path in CONFIGS.glob("*.yaml")}
    assert shipped - comparisons - {"digits_lt", "cifar100_lt"} == {*SMALL, *(f"compare_{name}" for name in TRAINED)}
