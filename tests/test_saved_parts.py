"""Checkpoints that build their classifier: what they keep, what they may name, what must be given."""

import functools
import io
import os
import pickle

import pytest
import torch
from helpers import OBJECTIVES, STRICT, fit, trainer
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR
from torchvision.models import resnet18

from lightning_ssesam import (
    ERM,
    SAM,
    SSESAM,
    Adaptive,
    Ascent,
    DigitsLT,
    LongTailClassifier,
    Staged,
    StageSwitch,
    StepOptions,
    losses,
)
from lightning_ssesam.callbacks import DeferredReweighting, RadiusSchedule
from lightning_ssesam.data import ImageInput, LongTailDataModule
from lightning_ssesam.errors import ArgumentError
from lightning_ssesam.experiments.checkpoints import load_classifier
from lightning_ssesam.experiments.fingerprint import describe as text_of
from lightning_ssesam.models import CIFARResNet, LogitCorrection, SmallConvNet, TimmModel, TorchvisionResNet
from lightning_ssesam.models.description import describe, restore, unknown_name
from lightning_ssesam.models.saved_parts import KEY

pytestmark = STRICT
COUNTS = [40, 20, 6, 3]
NAMES = ["ant", "bee", "cat/dog", "speed limit 30"]


class OwnNet(SmallConvNet):
    pass


def own_optimizer(parameters) -> SGD:
    return SGD(parameters, lr=0.1)


def images(n=8, classes=4):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 1, 8, 8, generator=generator), torch.arange(n) % classes


def saved(model, tmp_path, **checkpoint):
    """The path of a checkpoint of a model that is not trained."""
    runner = trainer(max_epochs=1)
    runner.strategy.connect(model)
    path = tmp_path / "saved.ckpt"
    runner.save_checkpoint(path)
    if checkpoint:
        content = torch.load(path, weights_only=True)
        for keys, value in checkpoint.items():
            *above, last = keys.split("__")
            functools.reduce(dict.__getitem__, above, content)[last] = value
        torch.save(content, path)
    return path


def is_plain(value):
    if isinstance(value, dict):
        return all(type(key) is str and is_plain(part) for key, part in value.items())
    if isinstance(value, list):
        return all(map(is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "own"])
def test_every_objective_comes_back(name):
    objective = OBJECTIVES[name]()
    description = describe(objective)
    assert unknown_name(description) is None
    assert is_plain(description)
    restored = restore(description)
    assert type(restored) is type(objective)
    assert describe(restored) == description


@pytest.mark.parametrize(
    "part",
    [
        SSESAM(head_rho=0.01, tail_rho=0.3, first_stage="joint", ascent=Ascent(scale=Adaptive(eta=0.5), only="norm")),
        Staged([ERM(), SAM(0.3)]),
        losses.VSLoss(gamma=0.3, tau=0.5, weight=[1.0, 2.0, 3.0, 4.0]),
        losses.ClassBalancedLoss(beta=0.9),
        nn.CrossEntropyLoss(reduction="none", label_smoothing=0.2),
        StepOptions(passes="full", interval=3, reuse=0.5),
        functools.partial(AdamW, lr=0.3, betas=[0.5, 0.6]),
        functools.partial(functools.partial(CosineAnnealingLR, T_max=3), eta_min=0.1),
        functools.partial(CIFARResNet, depth=8, normalized=True),
        functools.partial(TimmModel, name="resnet10t", options={"drop_rate": 0.1}),
        SmallConvNet,
    ],
    ids=lambda part: text_of(part)[:40],
)
def test_parts_come_back_with_their_arguments(part):
    """The texts by which comparisons identify a training are the same."""
    assert text_of(restore(describe(part))) == text_of(part)


@pytest.mark.parametrize("loss", [name for name in losses.__all__ if name.endswith("Loss") and name != "LongTailLoss"])
def test_every_loss_comes_back(loss):
    part = getattr(losses, loss)()
    assert text_of(restore(describe(part))) == text_of(part)


@pytest.mark.parametrize(
    "network",
    [
        lambda: SmallConvNet(4, width=8, norm="batch"),
        lambda: CIFARResNet(4, depth=8, in_channels=1),
        lambda: TorchvisionResNet(4, arch="resnet18", stem="imagenet"),
        lambda: TimmModel(4, name="resnet10t", in_channels=1),
    ],
)
def test_networks_that_are_made_already_come_back(network):
    made = network()
    again = restore(describe(made))
    assert {name: value.shape for name, value in again.state_dict().items()} == {
        name: value.shape for name, value in made.state_dict().items()
    }


def test_weights_and_files_are_not_fetched_again():
    """The checkpoint has the weights. A file that it names could be anything."""
    pretrained = functools.partial(TorchvisionResNet, arch="resnet18", stem="imagenet", weights="DEFAULT")
    assert restore(describe(pretrained)).keywords["weights"] is None
    options = {"checkpoint_path": "/somewhere.pth", "pretrained_cfg": {"url": "x"}, "drop_rate": 0.5}
    factory = restore(describe(functools.partial(TimmModel, name="resnet10t", pretrained=True, options=options)))
    assert factory.keywords == {"name": "resnet10t", "pretrained": False, "options": {"drop_rate": 0.5}}
    of_torchvision = restore(describe(functools.partial(resnet18, weights="DEFAULT")))
    assert (of_torchvision.func, of_torchvision.keywords) == (resnet18, {"weights": None})


def test_what_trains_is_saved_as_it_was_given(tmp_path):
    """Callbacks change radii and class weights during the training."""
    module = LongTailClassifier(
        COUNTS,
        functools.partial(SmallConvNet, width=8),
        objective=SSESAM(head_rho=0.1, tail_rho=0.2),
        loss=losses.LogitAdjustedLoss(),
    )
    schedule = RadiusSchedule("tail_rho", start=0.5, end=0.0)
    batch = images()
    runner = fit(
        module, [batch] * 4, callbacks=[schedule, DeferredReweighting(at=0.5), StageSwitch(at=0.5)], max_epochs=1
    )
    assert module.objective.tail_rho != 0.2
    path = tmp_path / "a.ckpt"
    runner.save_checkpoint(path)
    loaded = LongTailClassifier.load_from_checkpoint(path)
    assert (loaded.objective.head_rho, loaded.objective.tail_rho) == (0.1, 0.2)
    assert loaded.loss.weight is None
    assert loaded.split.class_counts.tolist() == COUNTS
    x, _ = batch
    torch.testing.assert_close(loaded.eval()(x), module.eval()(x), rtol=0, atol=0)


def test_all_arguments_come_back(tmp_path):
    model = LongTailClassifier(
        torch.tensor(COUNTS),
        functools.partial(SmallConvNet, width=8),
        SAM(0.3),
        losses.LDAMLoss(scale=5.0),
        functools.partial(SGD, lr=0.7),
        functools.partial(CosineAnnealingLR, T_max=9),
        tail_below=7,
        many_above=30,
        few_below=5,
        scheduler_interval="step",
        step_options=StepOptions(passes="full"),
        tta="hflip",
        ignore_index=-1,
        in_channels=1,
        class_names=NAMES,
        log_recalls=True,
    )
    path = saved(model, tmp_path)
    assert is_plain(torch.load(path, weights_only=True)[KEY])
    loaded = LongTailClassifier.load_from_checkpoint(path)
    for name in ("tta", "ignore_index", "class_names", "log_recalls", "step_options", "_scheduler_options"):
        assert getattr(loaded, name) == getattr(model, name), name
    assert str(loaded.split) == str(model.split)
    assert (loaded.split.many_above, loaded.split.few_below) == (30, 5)
    assert loaded.configure_optimizers()["optimizer"].defaults["lr"] == 0.7
    assert loaded.configure_optimizers()["lr_scheduler"]["scheduler"].T_max == 9
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    # And once more, from what was loaded.
    assert torch.load(saved(loaded, tmp_path), weights_only=True)[KEY] == torch.load(path, weights_only=True)[KEY]


def test_arguments_can_be_changed(tmp_path):
    path = saved(LongTailClassifier(COUNTS, functools.partial(SmallConvNet, width=8), SAM(0.3)), tmp_path)
    loaded = LongTailClassifier.load_from_checkpoint(path, objective=ERM(), tta="hflip")
    assert isinstance(loaded.objective, ERM)
    assert loaded.tta == "hflip"
    with open(path, "rb") as file:
        assert isinstance(LongTailClassifier.load_from_checkpoint(file).objective, SAM)


def test_a_network_of_ones_own_must_be_given(tmp_path):
    path = saved(LongTailClassifier(COUNTS, functools.partial(OwnNet, width=8)), tmp_path)
    with pytest.raises(
        ArgumentError, match=r"does not have the backbone: it was test_saved_parts\.OwnNet.*backbone=\.\.\."
    ):
        LongTailClassifier.load_from_checkpoint(path)
    loaded = LongTailClassifier.load_from_checkpoint(path, backbone=functools.partial(OwnNet, width=8))
    assert type(loaded.backbone) is OwnNet


class OwnObjective(ERM):
    pass


class OwnLoss(losses.LogitAdjustedLoss):
    pass


def test_other_parts_of_ones_own_are_missed_when_they_are_used(tmp_path):
    model = LongTailClassifier(
        COUNTS,
        functools.partial(SmallConvNet, width=8),
        OwnObjective(),
        OwnLoss(),
        own_optimizer,
        lambda optimizer: CosineAnnealingLR(optimizer, 3),
    )
    path = saved(model, tmp_path)
    loaded = LongTailClassifier.load_from_checkpoint(path)
    x, y = images()
    assert loaded.predict_step((x, y), 0).shape == (8, 4)
    for use, name in (
        (lambda: loaded.loss(loaded(x), y), "loss"),
        (lambda: loaded.objective.terms(y), "objective"),
        (loaded.configure_optimizers, "optimizer"),
        (lambda: loaded._make_scheduler(SGD(loaded.parameters())), "scheduler"),
    ):
        with pytest.raises(ArgumentError, match=rf"does not have the {name}: it was \w+.*{name}=\.\.\."):
            use()
    # What is saved of it again still says what is missing.
    assert torch.load(saved(loaded, tmp_path), weights_only=True)[KEY]["arguments"]["loss"] == {
        "unknown": "test_saved_parts.OwnLoss"
    }
    given = LongTailClassifier.load_from_checkpoint(path, loss=OwnLoss(), optimizer=own_optimizer, scheduler=None)
    assert isinstance(given.configure_optimizers(), SGD)


@pytest.mark.parametrize(
    "named",
    [
        "os.system",
        "builtins.eval",
        "test_saved_parts.OwnNet",
        "torch.nn.Linear",
        "torch.load",
        "lightning_ssesam.SSESAM.__init__",
        "torchvision.models.nothing",
        "torchvision.datasets.CIFAR10",
        # It would download a network within it.
        "torchvision.models.fcn_resnet50",
        ["SSESAM"],
        None,
    ],
)
@pytest.mark.parametrize("kind", ["class", "factory"])
def test_a_checkpoint_names_no_other_code(kind, named, tmp_path):
    path = saved(LongTailClassifier(COUNTS, functools.partial(SmallConvNet, width=8)), tmp_path)
    content = torch.load(path, weights_only=True)
    for argument in ("backbone", "loss", "objective", "optimizer"):
        arguments = {**content[KEY]["arguments"], argument: {kind: named, "arguments": {}}}
        torch.save({**content, KEY: {**content[KEY], "arguments": arguments}}, path)
        with pytest.raises(ArgumentError, match="a class of lightning-ssesam, torch or torchvision that it may name"):
            LongTailClassifier.load_from_checkpoint(path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({f"{KEY}__arguments__objective": {"class": "SAM", "arguments": {"rho": -1.0}}}, "rho"),
        ({f"{KEY}__arguments__objective": {"class": "SAM", "arguments": {"nothing": 1}}}, "SAM that cannot be made"),
        ({f"{KEY}__arguments__backbone": 5}, "backbone"),
        ({f"{KEY}__arguments": 5}, "wrong entry"),
        ({f"{KEY}__image_input": {"image_size": -1}}, "wrong entry"),
        ({f"{KEY}__class_names": 5}, "wrong entry"),
        ({KEY: [1]}, "wrong entry"),
        ({f"{KEY}__class_names": "abcd"}, "wrong entry"),
        ({f"{KEY}__class_names": ["a"]}, "class_names"),
        ({f"{KEY}__arguments__backbone": {"class": "SmallConvNet", "arguments": [1]}}, "named parts"),
        ({f"{KEY}__arguments__backbone": {"items": [1]}}, "named parts"),
    ],
)
def test_wrong_descriptions_are_one_error(changed, message, tmp_path):
    path = saved(LongTailClassifier(COUNTS, functools.partial(SmallConvNet, width=8)), tmp_path, **changed)
    with pytest.raises(ArgumentError, match=message):
        LongTailClassifier.load_from_checkpoint(path)


class Payload:
    def __reduce__(self):
        return os.makedirs, ("ran", 0o777, True)


def test_a_file_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = saved(LongTailClassifier(COUNTS, functools.partial(SmallConvNet, width=8)), tmp_path)
    content = torch.load(path, weights_only=True)
    torch.save({**content, "extra": Payload()}, path)
    with pytest.raises(ArgumentError, match=r"holds \w+\.makedirs, which is no plain data.*`weights_only=False`"):
        LongTailClassifier.load_from_checkpoint(path)
    assert not os.path.exists("ran")
    torch.save({**content, "hyper_parameters": {"_instantiator": "os.system", "_class_path": "x"}}, path)
    with pytest.raises(ArgumentError, match="`_instantiator`, which may name code"):
        LongTailClassifier.load_from_checkpoint(path)
    # Lightning takes these for hyperparameters, too.
    for name in ("hparams", "module_arguments"):
        called = {"class_path": "os.makedirs", "init_args": {"name": "ran"}}
        values = {
            "_instantiator": "lightning.pytorch.cli.instantiate_module",
            "class_counts": COUNTS,
            "optimizer": called,
        }
        torch.save({**content, name: values}, path)
        with pytest.raises(ArgumentError, match=f"`{name}`, which may name code"):
            LongTailClassifier.load_from_checkpoint(path)
        assert not os.path.exists("ran")
    torch.save({**content, "extra": Payload()}, path)
    with pytest.raises(ArgumentError, match="no plain data"):
        LongTailClassifier.load_from_checkpoint(path, weights_only=None)
    assert not os.path.exists("ran")
    for data in (b"", b"text", pickle.dumps({"state_dict": 5})):
        with pytest.raises(ArgumentError, match="is no checkpoint of a LongTailClassifier"):
            LongTailClassifier.load_from_checkpoint(io.BytesIO(data))
    with pytest.raises(ArgumentError, match=r"No such checkpoint: 'nothing\.ckpt'"):
        LongTailClassifier.load_from_checkpoint("nothing.ckpt")


class Digits(LongTailDataModule):
    """Four classes with names."""

    class_names = tuple(NAMES)
    image_input = ImageInput(8, channels=1, mean=(0.1,), std=(0.2,))

    def __init__(self):
        super().__init__(batch_size=8)
        self.class_counts = COUNTS

    def make_sets(self):
        return dict.fromkeys(("train", "val", "test"), torch.utils.data.TensorDataset(*images(16)))


def test_names_and_inputs_come_from_the_data_module(tmp_path):
    model = LongTailClassifier(COUNTS, functools.partial(SmallConvNet, width=8), log_recalls=True)
    runner = trainer(max_epochs=1, num_sanity_val_steps=0)
    runner.fit(model, Digits())
    assert model.class_names == NAMES
    # Spaces and slashes have a meaning in the names of logged values.
    recalls = {name for name in runner.logged_metrics if name.startswith("val/recall/")}
    assert recalls == {f"val/recall/{name}" for name in ("ant", "bee", "cat_dog", "speed_limit_30")}
    path = tmp_path / "a.ckpt"
    runner.save_checkpoint(path)
    loaded = LongTailClassifier.load_from_checkpoint(path)
    assert loaded.class_names == NAMES
    assert loaded.image_input == Digits.image_input
    # Names that were given stay.
    given = LongTailClassifier(COUNTS, functools.partial(SmallConvNet, width=8), class_names=["a", "b", "c", "d"])
    trainer(max_epochs=1).fit(given, Digits())
    assert given.class_names == ["a", "b", "c", "d"]


def test_recalls_are_those_of_the_classes():
    model = LongTailClassifier(COUNTS, functools.partial(SmallConvNet, width=8), log_recalls=True).eval()
    (logged,) = trainer(max_epochs=1).test(model, Digits(), verbose=False)
    x, y = images(16)
    predicted = model(x).argmax(1)
    for number, name in enumerate(("ant", "bee", "cat_dog", "speed_limit_30")):
        assert logged[f"test/recall/{name}"] == pytest.approx(float((predicted[y == number] == number).double().mean()))
    loaders = [Digits().test_dataloader()] * 2
    first, second = trainer(max_epochs=1).test(model, loaders, verbose=False)
    for number, logs in enumerate((first, second)):
        assert logs[f"test/recall/ant/dataloader_idx_{number}"] == logged["test/recall/ant"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "b", "c"], "got 3 names"),
        (["a", "b", "c", "a"], "got 'a' more than once"),
        (["a", "b", "c", " "], "got an empty name"),
        ("abcd", "got 'abcd'"),
        ([1, 2, 3, 4], r"got \[1, 2, 3, 4\]"),
    ],
)
def test_wrong_names(names, message):
    with pytest.raises(
        ArgumentError, match=f"`class_names` to be 4 different names, one for each class, but {message}"
    ):
        LongTailClassifier(COUNTS, SmallConvNet, class_names=names)


def test_predictions_are_probabilities():
    model = LongTailClassifier(COUNTS, functools.partial(SmallConvNet, width=8)).eval()
    x, y = images()
    expected = model(x).softmax(1)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=5)
    predicted = torch.cat(trainer(max_epochs=1).predict(model, loader))
    torch.testing.assert_close(predicted, expected)
    torch.testing.assert_close(model.predict_step(x, 0), expected)
    model.tta = "hflip"
    both = (expected + model(x.flip(-1)).softmax(1)) / 2
    torch.testing.assert_close(model.predict_step([x, y], 0), both)
    assert not torch.allclose(both, expected)


def test_corrections_follow_each_other_and_are_kept(tmp_path):
    model = LongTailClassifier(COUNTS, functools.partial(SmallConvNet, width=8)).eval()
    x, _ = images()
    plain = model(x)
    model.correct(shift=[0.0, 1.0, 2.0, 3.0])
    model.correct(scale=0.5)
    expected = (plain + torch.tensor([0.0, 1.0, 2.0, 3.0])) * 0.5
    torch.testing.assert_close(model(x), expected)
    path = saved(model, tmp_path)
    torch.testing.assert_close(LongTailClassifier.load_from_checkpoint(path).eval()(x), expected)
    # A module that has no correction takes that of a checkpoint, and gives its own up for one without.
    other = LongTailClassifier(COUNTS, functools.partial(SmallConvNet, width=8))
    trainer(max_epochs=1).validate(other, Digits(), ckpt_path=path, verbose=False)
    torch.testing.assert_close(other.eval()(x), expected)
    other.correction = None
    without = saved(other, tmp_path)
    trainer(max_epochs=1).validate(model, Digits(), ckpt_path=without, verbose=False)
    torch.testing.assert_close(model.eval()(x), plain)
    for wrong in ({"scale": [1.0, 2.0]}, {"shift": float("nan")}, {"scale": [[1.0] * 4]}, {"scale": "x"}):
        with pytest.raises(ArgumentError, match="one finite number, or 4, one for each class"):
            LogitCorrection(4, **wrong)


@pytest.mark.parametrize("size", [8, 64, 98])
def test_image_inputs_are_the_test_transform(size):
    from PIL import Image

    from lightning_ssesam.data.images import default_transforms

    generator = torch.Generator().manual_seed(0)
    picture = Image.fromarray(torch.randint(0, 256, (70, 90, 3), generator=generator, dtype=torch.uint8).numpy())
    _, test = default_transforms(size)
    plain = ImageInput(size)
    assert torch.equal(plain.transform()(picture), test(picture))
    assert ImageInput(**plain.as_plain()) == plain


def test_digits_as_pictures_are_the_digits_of_the_data_module():
    from PIL import Image
    from sklearn.datasets import load_digits

    pixels = load_digits().images[7]
    picture = Image.fromarray((pixels * 255 / 16).round().astype("uint8")).convert("RGB")
    made = DigitsLT.image_input.transform()(picture)
    every = torch.from_numpy(load_digits().images).float()
    expected = (torch.from_numpy(pixels).float() - every.mean()) / every.std()
    torch.testing.assert_close(made[0], expected, rtol=0, atol=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 0}, "image_size"),
        ({"image_size": 8, "channels": 2}, "`channels` to be 1 or 3"),
        ({"image_size": 8, "mean": (0.5,)}, "`mean` to be 3 numbers, one for each channel"),
        ({"image_size": 8, "std": (1.0, 0.0, 1.0)}, "`std` to be 3 numbers > 0"),
        ({"image_size": 8, "resize": "yes"}, "resize"),
    ],
)
def test_wrong_inputs(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        ImageInput(**arguments)


class Others(Digits):
    """The same number of classes, or other ones."""

    def __init__(self, names):
        super().__init__()
        self.class_names, self.class_counts = names, COUNTS[: len(names)]

    def make_sets(self):
        return dict.fromkeys(
            ("train", "val", "test"), torch.utils.data.TensorDataset(*images(16, len(self.class_names)))
        )


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["ant", "bee", "speed limit 30"], "'cat/dog' is missing"),
        (["ant", "cat/dog", "owl", "speed limit 30"], "'bee' is missing, 'owl' is new"),
        (["bee", "ant", "cat/dog", "speed limit 30"], "'ant' is class 1, and not 0"),
    ],
)
def test_data_with_other_classes_are_refused(names, message, tmp_path):
    """Every label would be taken for another class, without a word."""
    path = saved(LongTailClassifier(COUNTS, functools.partial(SmallConvNet, width=8), class_names=NAMES), tmp_path)
    loaded = LongTailClassifier.load_from_checkpoint(path)
    with pytest.raises(ArgumentError, match=f"Others has other classes than the classifier was made for: {message}"):
        trainer(max_epochs=1).test(loaded, Others(names), verbose=False)
    if len(names) == 4:
        fresh = LongTailClassifier(COUNTS, functools.partial(SmallConvNet, width=8))
        with pytest.raises(ArgumentError, match="data module of this run has other classes"):
            trainer(max_epochs=1).test(fresh, Others(names), ckpt_path=path, verbose=False)
    # A class may have a better name.
    trainer(max_epochs=1).test(loaded, Others(["ant", "bee", "cat or dog", "speed limit 30"]), verbose=False)


def test_recalls_have_the_names_of_the_checkpoint(tmp_path):
    model = LongTailClassifier(COUNTS, functools.partial(SmallConvNet, width=8), log_recalls=True)
    runner = trainer(max_epochs=1)
    runner.fit(model, Digits())
    path = tmp_path / "a.ckpt"
    runner.save_checkpoint(path)
    loaded = LongTailClassifier.load_from_checkpoint(path)
    (logged,) = trainer(max_epochs=1).test(loaded, Digits().test_dataloader(), verbose=False)
    assert "test/recall/speed_limit_30" in logged


def test_names_that_look_alike_in_logs_stay_apart():
    names = ["a b", "a_b", "a_b_2", "a/b"]
    model = LongTailClassifier(COUNTS, SmallConvNet, class_names=names, log_recalls=True)
    found = [name for metric in model.val_metrics if metric.log_prefix == "recall/" for name in metric.names()]
    assert found == ["a_b", "a_b_2", "a_b_2_2", "a_b_3"]


class Mixed(LongTailClassifier):
    def __init__(self, *args, mix=0.1, **kwargs):
        super().__init__(*args, **kwargs)
        self.mix = mix


class Needy(LongTailClassifier):
    def __init__(self, width, **kwargs):
        super().__init__(COUNTS, functools.partial(SmallConvNet, width=width), **kwargs)


def test_subclasses(tmp_path):
    path = saved(Mixed(COUNTS, functools.partial(SmallConvNet, width=8), SAM(0.3), mix=0.5), tmp_path)
    loaded = Mixed.load_from_checkpoint(path, mix=0.7)
    assert (loaded.mix, loaded.objective.rho, type(loaded)) == (0.7, 0.3, Mixed)
    with pytest.warns(UserWarning, match=r"saved by test_saved_parts\.Mixed, and is loaded by lightning_ssesam"):
        LongTailClassifier.load_from_checkpoint(path)
    with pytest.raises(ArgumentError, match=r"Load it by that class in Python"):
        load_classifier(path)
    path = saved(Needy(8, objective=SAM(0.3)), tmp_path)
    with pytest.raises(ArgumentError, match=r"arguments of its own: `load_from_checkpoint\(path, width=\.\.\.\)`"):
        Needy.load_from_checkpoint(path)
    assert Needy.load_from_checkpoint(path, width=8).objective.rho == 0.3
