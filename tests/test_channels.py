"""Channels of the images come from the data: in Python and in every command that makes a network."""

import inspect
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from helpers import STRICT
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset
from torchvision.transforms import v2

from lightning_ssesam import ERM, DigitsLT, LongTailClassifier
from lightning_ssesam.cli import main
from lightning_ssesam.compare import Method, compare
from lightning_ssesam.data import CIFAR10LT, ImageFolderLT, ImageListLT, LongTailDataModule
from lightning_ssesam.experiments.files import make_folder
from lightning_ssesam.models import CIFARResNet, SmallConvNet, TimmModel, TorchvisionResNet
from lightning_ssesam.models.backbones import make_backbone
from lightning_ssesam.runs import Experiment

pytestmark = STRICT


@pytest.fixture(autouse=True)
def _own_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning-ssesam"])


class Coloured(nn.Sequential):
    """A network of somebody's own."""

    def __init__(self, num_classes, in_channels=3):
        super().__init__(nn.Conv2d(in_channels, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))


class Needing(Coloured):
    def __init__(self, num_classes, in_channels):
        super().__init__(num_classes, in_channels)


class Plain(nn.Linear):
    def __init__(self, num_classes):
        super().__init__(8, num_classes)


def channels(net):
    return next(layer.in_channels for layer in net.modules() if isinstance(layer, nn.Conv2d))


def write_images(root="images", counts=(24, 9, 4), size=(10, 12)):
    for label, count in enumerate(counts):
        for k in range(count):
            path = Path(root, "abc"[label], f"{k}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", size, (60 * label, k, 7)).save(path)


def test_channels_of_the_data_modules():
    write_images()
    Path("list.txt").write_text("images/a/0.png 0\n")
    grey = v2.Compose([v2.Grayscale(), v2.PILToTensor()])
    assert (DigitsLT().in_channels, DigitsLT().image_size) == (1, 8)
    assert (CIFAR10LT().in_channels, CIFAR10LT().image_size) == (3, 32)
    for make in (partial(ImageFolderLT, "images"), partial(ImageListLT, "list.txt", "list.txt"), CIFAR10LT):
        assert make().in_channels == 3
        assert make(train_transform=grey, test_transform=grey).in_channels == 1
        assert make(test_transform=v2.PILToTensor()).in_channels == 3
        # What is no image, or fails for want of more, is unknown.
        assert make(test_transform=lambda image: torch.zeros(3)).in_channels is None
        assert make(test_transform=lambda image: image.unknown()).in_channels is None
    assert LongTailDataModule().in_channels is None
    assert LongTailDataModule().image_size is None


@pytest.mark.parametrize(
    ("factory", "of_data", "expected"),
    [
        (SmallConvNet, None, 1),
        (CIFARResNet, None, 3),
        (SmallConvNet, 3, 3),
        (CIFARResNet, 1, 1),
        (CIFARResNet, 4, 4),
        (partial(SmallConvNet, width=8), 3, 3),
        (partial(SmallConvNet, in_channels=3), 3, 3),
        (partial(SmallConvNet, in_channels=3), None, 3),
        (partial(SmallConvNet, in_channels=None), 3, 3),
        (partial(partial(SmallConvNet, width=8), norm="batch"), 3, 3),
        (partial(TimmModel, name="resnet18"), 1, 1),
        (partial(TimmModel, name="resnet18"), None, 3),
        # The command line gives every default.
        (partial(lambda kind, **kwargs: kind(**kwargs), Coloured, in_channels=3), 1, 1),
        (Coloured, 1, 1),
        (Coloured, None, 3),
        (Needing, 2, 2),
        (lambda num_classes: Coloured(num_classes), 1, 3),
        (lambda num_classes, **kwargs: Coloured(num_classes, **kwargs), 1, 3),
        (partial(TorchvisionResNet, arch="resnet18"), 1, 3),
    ],
)
def test_who_gets_the_channels(factory, of_data, expected):
    assert channels(make_backbone(factory, 5, of_data)) == expected
    model = LongTailClassifier([9, 8, 7, 2, 1], factory, in_channels=of_data)
    assert channels(model.backbone) == expected


@pytest.mark.parametrize(
    "factory",
    [
        partial(SmallConvNet, in_channels=1),
        partial(partial(CIFARResNet, in_channels=1), depth=8),
        partial(Coloured, in_channels=2),
        partial(lambda kind, **kwargs: kind(**kwargs), CIFARResNet, in_channels=1),
        partial(lambda num_classes, **kwargs: Coloured(num_classes, **kwargs), in_channels=1),
    ],
)
def test_other_channels_than_those_of_the_data(factory):
    message = r"`in_channels` to be 3, the channels of the images in the data, but got [12]\."
    with pytest.raises(ValueError, match=message):
        LongTailClassifier([9, 1], factory, in_channels=3)


def test_bad_channels():
    for wrong in (0, "3", 1.0):
        for make in (SmallConvNet, CIFARResNet, partial(TimmModel, name="resnet18")):
            with pytest.raises(ValueError, match="`in_channels` to be an integer >= 1, but got"):
                make(2, in_channels=wrong)
        with pytest.raises(ValueError, match="`in_channels` to be an integer >= 1, but got"):
            LongTailClassifier([9, 1], SmallConvNet, in_channels=wrong)
    # Networks without images do not mind.
    assert LongTailClassifier([9, 1], Plain, in_channels=3).backbone.in_features == 8
    net = nn.Linear(8, 2)
    assert LongTailClassifier([9, 1], net, in_channels=3).backbone is net


def test_weights_are_those_of_given_channels():
    """Bit for bit, by whichever way the network is made."""
    for make, number in ((SmallConvNet, 1), (CIFARResNet, 3), (CIFARResNet, 1), (SmallConvNet, 3)):
        nets = []
        for build in (
            lambda make=make, number=number: make(7, in_channels=number),
            lambda make=make, number=number: make_backbone(make, 7, number),
            lambda make=make, number=number: make_backbone(partial(make, in_channels=number), 7, number),
        ):
            torch.manual_seed(3)
            nets.append(build().state_dict())
        for other in nets[1:]:
            assert all(torch.equal(nets[0][name], other[name]) for name in nets[0])


FIT = ["--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.limit_train_batches=1"]
FIT += ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.logger=CSVLogger"]
FIT += ["--trainer.logger.save_dir=out", "--trainer.limit_val_batches=1"]


@pytest.mark.parametrize(
    ("data", "network", "expected"),
    [
        (["ImageFolderLT", "--data.root=images"], ["SmallConvNet"], 3),
        (["DigitsLT"], ["CIFARResNet", "--model.backbone.depth=8"], 1),
        (["DigitsLT"], ["nets.Coloured"], 1),
    ],
)
def test_fit_test_and_curvature(data, network, expected, monkeypatch, capsys):
    write_images()
    source = inspect.getsource(Coloured)
    Path("nets.py").write_text(f"from torch import nn\n\n\n{source}")
    monkeypatch.syspath_prepend(".")
    try:
        data, network = (
            (" --data=".join(["", data[0]]).split() + data[1:]),
            [f"--model.backbone={network[0]}", *network[1:]],
        )
        main(["fit", *data, *network, *FIT, "--model.objective=ERM"])
        folder = Path("out/lightning_logs/version_0")
        (checkpoint,) = folder.glob("checkpoints/*.ckpt")
        weights = torch.load(checkpoint, weights_only=True)["state_dict"]
        first = next(value for value in weights.values() if value.ndim == 4)
        assert first.shape[1] == expected
        config = yaml.safe_load((folder / "config.yaml").read_text())
        assert "in_channels" not in config["model"]
        (folder / "test.yaml").write_text((folder / "config.yaml").read_text())
        main(["test", f"--config={folder / 'config.yaml'}", f"--ckpt_path={checkpoint}"])
        assert "test/acc_all" in capsys.readouterr().out
        main(["curvature", str(checkpoint), "--samples=4", "--landscape=false", "--probes=0", "--groups=all"])
        assert Path("curvature/curvature.csv").exists()
    finally:
        sys.modules.pop("nets", None)


@pytest.mark.parametrize("command", ["fit", "compare", "sweep"])
def test_given_channels_that_contradict_the_data(command, capsys):
    write_images()
    name = "model.backbone" if command == "fit" else "backbone"
    options = ["--data=ImageFolderLT", "--data.root=images", f"--{name}=SmallConvNet", f"--{name}.in_channels=1"]
    with pytest.raises(SystemExit) as ended:
        main([command, *options])
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "error: Expected argument `in_channels` to be 3, the channels of the images in the data, but got 1.\n"
    )
    assert not [path for path in Path().iterdir() if path.name != "images"]


def test_compare_needs_no_other_option(monkeypatch):
    """The first command that anybody tries, with fewer epochs."""
    write_images()
    monkeypatch.setattr("lightning_ssesam.experiments.compare.write_report", lambda *_: [])
    seen = []
    monkeypatch.setattr(LongTailClassifier, "on_fit_end", lambda self: seen.append(channels(self)))
    main(["compare", "--data", "ImageFolderLT", "--data.root", "images", "--epochs=4", "--seeds=1", "--jobs=1"])
    assert seen == [3, 3, 3, 3]


class Sounds(LongTailDataModule):
    """No images: the networks take 8 numbers."""

    many_above, few_below = 5, 2

    def __init__(self):
        super().__init__()
        self.class_counts = [6, 3]

    def make_sets(self):
        sets = TensorDataset(torch.randn(9, 8), torch.tensor([0] * 6 + [1] * 3))
        return dict.fromkeys(("train", "val", "test"), sets)


@pytest.mark.parametrize(
    ("data", "backbone", "parts"),
    [
        (
            DigitsLT,
            partial(TorchvisionResNet, arch="resnet18"),
            ["(1, 8, 8)", "to have 3 channels, but got 1 channels"],
        ),
        (DigitsLT, lambda num_classes: nn.Linear(8, num_classes), ["with logits (N, 10)", "shape (1, 1, 8, 10)"]),
        (Sounds, SmallConvNet, ["(8,)", "one with the error"]),
        (Sounds, lambda num_classes: nn.Linear(9, num_classes), ["(8,)", "shapes cannot be multiplied"]),
    ],
)
def test_network_of_the_wrong_shape_is_refused_before_training(data, backbone, parts, monkeypatch):
    monkeypatch.setattr("lightning_ssesam.experiments.results.make_runs", lambda *_: pytest.fail("trained"))
    methods = {"good": Method(ERM, backbone=Anything), "bad": Method(ERM, backbone=backbone)}
    with pytest.raises(ValueError, match="Expected argument `backbone` to be a network") as caught:
        compare(methods, data=data, seeds=1, epochs=1)
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not Path("comparison").exists()


class Anything(nn.Module):
    """A network that takes inputs of every shape."""

    def __init__(self, num_classes):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_classes))

    def forward(self, x):
        return x.flatten(1).sum(1, keepdim=True) + self.weight


def test_check_of_a_network_changes_nothing():
    data = DigitsLT()
    experiment = Experiment("ERM", ERM, epochs=1)
    before = torch.get_rng_state()
    experiment.check_network(data)
    assert torch.equal(before, torch.get_rng_state())


def test_batches_that_hooks_change_are_left_to_the_training():
    class Flattened(DigitsLT):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch[0].flatten(1), batch[1]

    experiment = Experiment(
        "ERM", ERM, backbone=lambda num_classes: nn.Linear(64, num_classes), data=Flattened, epochs=1
    )
    experiment.check_network(Flattened())
    with pytest.raises(ValueError, match="`backbone` to be a network"):
        experiment.check_network(DigitsLT())


def test_output_folder_is_tried(monkeypatch):
    make_folder(Path("new/deep"))
    assert not list(Path("new/deep").iterdir())

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    message = r"`output` to be a folder that can be written to \(Permission denied\), but got 'new'\.$"
    with pytest.raises(ValueError, match=message):
        make_folder(Path("new"))
