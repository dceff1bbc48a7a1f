"""MixUp and CutMix end before the training does, wherever the transform is kept."""

import copy
import pickle
import warnings
from functools import partial

import lightning as L
import pytest
import torch
from helpers import SPLIT, STRICT, KillAt, Killed, Model, assert_same_bits, batches, fit, trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from timm.data.mixup import Mixup
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, default_collate
from torchvision.transforms import v2

from lightning_ssesam import SSESAM, LongTailClassifier, MixingOff, StageSwitch
from lightning_ssesam.callbacks.mixers import mixers_in
from lightning_ssesam.errors import ArgumentError
from lightning_ssesam.experiments.command_parser import CommandParser, instantiate

pytestmark = [STRICT, pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")]

EPOCHS, BATCHES = 4, 3


def mix():
    return v2.RandomChoice([v2.MixUp(num_classes=5), v2.CutMix(num_classes=5)])


def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 5))


class Watched(Model):
    """Notes of every batch whether its targets are mixed, and of every epoch its images."""

    def __init__(self, **kwargs):
        super().__init__(net(), SSESAM(SPLIT, 0.05, 0.1), **kwargs)
        self.is_mixed, self.images = [], []

    def training_step(self, batch, batch_idx):
        # Those of timm are always (N, C).
        by_value = isinstance(getattr(self, "mix", None), Mixup)
        self.is_mixed.append(batch[1].ndim == 2 and (not by_value or bool((batch[1] != batch[1].round()).any())))
        self.images.append(batch[0])
        return super().training_step(batch, batch_idx)


class InModule(Watched):
    def __init__(self, transform=None):
        super().__init__()
        self.mix = mix() if transform is None else transform

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return self.mix(*batch) if self.trainer.training else batch


class Holder:
    def __init__(self):
        self.parts = {"mixes": [mix()]}

    def __call__(self, batch):
        return self.parts["mixes"][0](*batch)


class InHolder(Watched):
    def __init__(self):
        super().__init__()
        self.augment = Holder()

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return self.augment(batch)


GLOBAL = mix()


class InGlobal(Watched):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return GLOBAL(*batch)


def collate_globally(samples):
    return GLOBAL(*default_collate(samples))


def collate_with(transform, samples):
    return transform(*default_collate(samples))


class Data(L.LightningDataModule):
    """The mixing in a hook of the data module, or in the collate function of its loader."""

    def __init__(self, way, num_workers=0, persistent=False):
        super().__init__()
        self.way, self.options = way, {"num_workers": num_workers, "persistent_workers": persistent}
        self.mix = mix()

    def train_dataloader(self):
        return loader(self.collate if self.way == "collate" else None, **self.options)

    def collate(self, samples):
        return self.mix(*default_collate(samples))

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return self.mix(*batch) if self.way == "hook" else batch


def loader(collate_fn=None, **options):
    torch.manual_seed(3)
    samples = TensorDataset(torch.randn(8 * BATCHES, 3, 4, 4), torch.arange(8 * BATCHES) % 5)
    return DataLoader(samples, batch_size=8, collate_fn=collate_fn, **options)


def closure():
    transform = mix()
    return lambda samples: transform(*default_collate(samples))


def expected(plain, epochs=EPOCHS):
    return [True] * BATCHES * (epochs - plain) + [False] * BATCHES * plain


WAYS = {
    "attribute": lambda: (InModule(), loader()),
    "attribute of the kind of timm": lambda: (InModule(Mixup(num_classes=5, label_smoothing=0)), loader()),
    "object": lambda: (InHolder(), loader()),
    "global variable of a hook": lambda: (InGlobal(), loader()),
    "hook of the data module": lambda: (Watched(), Data("hook")),
    "collate of the data module": lambda: (Watched(), Data("collate")),
    "collate of the data module, workers": lambda: (Watched(), Data("collate", 1)),
    "collate of the data module, workers that stay": lambda: (Watched(), Data("collate", 1, persistent=True)),
    "collate, global variable": lambda: (Watched(), loader(collate_globally)),
    "collate, closure": lambda: (Watched(), loader(closure())),
    "collate, partial": lambda: (Watched(), loader(partial(collate_with, mix()))),
    "several loaders": lambda: (InModule(), {"a": loader(), "b": [loader(closure())]}),
}


class FirstOfSeveral(InModule):
    """Trains on the batch of a second loader, whose collate function mixes."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch["b"][0]


@pytest.mark.parametrize("way", WAYS)
def test_last_epochs_are_plain(way):
    torch.manual_seed(0)
    model, data = WAYS[way]()
    if way == "several loaders":
        model = FirstOfSeveral()
    run = trainer(max_epochs=EPOCHS, callbacks=[MixingOff(for_last=2)])
    run.fit(model, data)
    assert model.is_mixed == expected(plain=2)
    # The same images come in each epoch, and those of the plain ones are as they were.
    plain = [images for images, _ in loader()]
    assert_same_bits(model.images[-BATCHES:], plain)
    assert not torch.equal(model.images[0], plain[0])
    # It is on again.
    run = trainer(max_epochs=2, callbacks=[MixingOff(for_last=1)])
    model.is_mixed = []
    run.fit(model, data)
    assert model.is_mixed == expected(plain=1, epochs=2)


@pytest.mark.parametrize(
    ("arguments", "options", "plain"),
    [
        ({"for_last": 1}, {"max_epochs": 4}, 1),
        ({"for_last": 0.5}, {"max_epochs": 4}, 2),
        ({"for_last": 0.3}, {"max_epochs": 4}, 2),
        ({"for_last": 0.1}, {"max_epochs": 4}, 1),
        ({"epoch": 1}, {"max_epochs": 4}, 3),
        ({"epoch": 1}, {"max_epochs": -1, "max_steps": 4 * BATCHES}, 3),
        # Three updates are an epoch, and two where batches are accumulated.
        ({"for_last": 1}, {"max_epochs": 100, "max_steps": 4 * BATCHES}, 1),
        ({"for_last": 1}, {"max_epochs": -1, "max_steps": 8, "accumulate_grad_batches": 2}, 1),
    ],
)
def test_when_it_is_plain(arguments, options, plain):
    model = InModule()
    fit_on(model, callbacks=[MixingOff(**arguments)], **options)
    assert model.is_mixed == expected(plain)


def fit_on(model, data=None, ckpt_path=None, **options):
    run = trainer(**{"max_epochs": EPOCHS, **options})
    run.fit(model, loader() if data is None else data, ckpt_path=ckpt_path)
    return run


def test_limited_batches_and_accumulated_ones():
    model = InModule()
    fit_on(model, callbacks=[MixingOff(for_last=1)], max_epochs=2, limit_train_batches=2, accumulate_grad_batches=2)
    assert model.is_mixed == [True, True, False, False]


def test_ten_epochs_by_default():
    assert [MixingOff().first_plain_epoch(epochs) for epochs in (11, 200)] == [1, 190]
    assert MixingOff(3.0).first_plain_epoch(11) == 8
    # 0.07 of 100 epochs is 7.000000000000001 in floating point.
    assert MixingOff(0.07).first_plain_epoch(100) == 93


def test_plain_epochs_are_those_of_a_training_without_mixing():
    """The weights are those of a run whose module asks for the epoch itself."""

    class ByHand(InModule):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return self.mix(*batch) if self.current_epoch < 2 else batch

    weights = []
    for kind, callbacks in ((InModule, [MixingOff(2)]), (ByHand, [])):
        torch.manual_seed(1)
        model = kind()
        fit_on(model, callbacks=callbacks)
        weights.append(list(model.net.parameters()))
    assert_same_bits(*weights)


@pytest.mark.parametrize(("epoch", "workers"), [(0, 0), (1, 0), (2, 0), (1, 1), (1, "persistent")])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, epoch, workers):
    """Also from a checkpoint at the very end of the last mixed epoch, whose workers start before any hook."""

    def run(kill_at=None, path=None):
        torch.manual_seed(1)
        model = Watched()
        data = Data("collate", int(bool(workers)), workers == "persistent")
        saved = ModelCheckpoint(tmp_path / f"{kill_at} {path is None}", save_top_k=-1, filename="{epoch}")
        kill = [KillAt(kill_at)] if kill_at else []
        options = {"max_epochs": EPOCHS, "enable_checkpointing": True}
        training = trainer(callbacks=[MixingOff(2), StageSwitch(epoch=3), saved, *kill], **options)
        try:
            training.fit(model, data, ckpt_path=path)
        except Killed:
            assert [mixer.is_off for mixer in mixers_in(data)] == [False, False]
        return model

    whole = run()
    run(kill_at=BATCHES * (epoch + 1))
    resumed = run(path=tmp_path / f"{BATCHES * (epoch + 1)} True" / f"epoch={epoch}.ckpt")
    done = BATCHES * (epoch + 1)
    assert resumed.is_mixed == expected(plain=2)[done:]
    if not workers:
        # A worker draws other random numbers in a resumed run.
        assert_same_bits(resumed.parameters(), whole.parameters())


def test_resumed_within_an_epoch_and_longer(tmp_path):
    path, whole = tmp_path / "model.ckpt", InModule()
    torch.manual_seed(1)
    fit_on(whole, callbacks=[MixingOff(2)])

    class Save(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 2 * BATCHES + 1:
                trainer.save_checkpoint(path)

    torch.manual_seed(1)
    fit_on(InModule(), callbacks=[MixingOff(2), Save()])
    assert torch.load(path, weights_only=True)["callbacks"]["MixingOff"] == {"is_off": True}
    resumed = InModule()
    fit_on(resumed, callbacks=[MixingOff(2)], ckpt_path=path, max_epochs=9)
    # What was plain stays plain, although the run has become longer.
    assert resumed.is_mixed == [False] * (BATCHES - 1) + [False] * BATCHES * 6


def test_interrupted_runs_leave_mixing_on():
    model, callback = InModule(), MixingOff(2)
    with pytest.raises(Killed):
        fit_on(model, callbacks=[callback, KillAt(2 * BATCHES + 1)])
    assert all(not mixer.is_off and "forward" not in vars(mixer.owner) for mixer in mixers_in(model))
    images, targets = next(iter(loader()))
    assert model.mix(images, targets)[1].shape == (8, 5)
    # Neither the callback nor what it has turned off keeps the last run.
    copies = [copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))]
    for one in copies:
        model.is_mixed = []
        fit_on(model, callbacks=[one])
        assert model.is_mixed == expected(plain=2)


class Named(Watched):
    """Mixes by a function, or if a flag or a number says so."""

    def __init__(self):
        super().__init__()
        self.use_mixup, self.alpha = True, 0.3
        self.function = partial(roll, 0.3)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        if not self.use_mixup or self.alpha == 0:
            return batch
        return self.function(*batch)


def roll(share, images, targets):
    """MixUp by hand."""
    targets = torch.eye(5)[targets]
    return images.lerp(images.roll(1, 0), share), targets.lerp(targets.roll(1, 0), share)


@pytest.mark.parametrize(
    ("name", "on", "off"), [("use_mixup", True, False), ("alpha", 0.3, 0.0), ("function", None, None)]
)
def test_named_attributes(name, on, off):
    model, seen = Named(), []

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            seen.append(getattr(pl_module, name))

    fit_on(model, callbacks=[MixingOff(2, mixing=name), Look()])
    assert model.is_mixed == expected(plain=2)
    if on is not None:
        assert seen == [on] * 2 * BATCHES + [off] * 2 * BATCHES
        assert [type(value) for value in seen] == [type(on)] * 4 * BATCHES
        assert getattr(model, name) == on
    assert model.function(*next(iter(loader())))[1].shape == (8, 5)


class Doubles(nn.Module):
    """A mixing transform of somebody's own."""

    def forward(self, images, targets):
        return 2 * images, torch.eye(5)[targets] / 2 + 0.1


@pytest.mark.parametrize("kind", ["name", "path", "object", "list"])
def test_modules_of_a_kind_of_their_own(kind):
    model = InModule(Doubles())
    model.holder = Holder()
    model.holder.mix = model.mix
    mixing = {"name": "mix", "path": "holder.mix", "object": model.mix, "list": ["mix", "holder"]}[kind]
    fit_on(model, callbacks=[MixingOff(2, mixing=mixing)])
    assert model.is_mixed == expected(plain=2)
    assert_same_bits(model.images[-BATCHES:], [images for images, _ in loader()])
    assert "forward" not in vars(model.mix)


def test_workers_with_a_transform_that_is_given():
    transform = mix()
    data = loader(partial(collate_with, transform), num_workers=1)
    with pytest.raises(
        MisconfigurationException, match=r"workers .* have started with a (MixUp|CutMix) .* Give it the"
    ):
        fit_on(Watched(), data, callbacks=[MixingOff(2)])
    model = Watched()
    fit_on(model, data, callbacks=[MixingOff(2, mixing=transform)])
    assert model.is_mixed == expected(plain=2)


def test_the_state_of_a_classifier_stays_the_same():
    """The transform is part of the module, and the flag is not part of its checkpoints."""

    class Mixed(LongTailClassifier):
        def __init__(self):
            super().__init__([50, 40, 30, 6, 5], net())
            self.mix = mix()

        on_after_batch_transfer = InModule.on_after_batch_transfer

    model = Mixed()
    names = list(model.state_dict())
    run = fit_on(model, callbacks=[MixingOff(1), StageSwitch(epoch=1)], max_epochs=2)
    assert list(model.state_dict()) == names
    assert run.callback_metrics["train/loss"].isfinite()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"for_last": 0}, "`for_last` to be a number of epochs >= 1, or a share of the epochs .*, but got 0"),
        ({"for_last": -1}, "`for_last` to be .*, but got -1"),
        ({"for_last": 1.0}, r"`for_last` to be .*, but got 1\.0"),
        ({"for_last": 2.5}, r"`for_last` to be .*, but got 2\.5"),
        ({"for_last": True}, "`for_last` to be .*, but got True"),
        ({"for_last": "10"}, "`for_last` to be .*, but got '10'"),
        ({"for_last": float("nan")}, "`for_last` to be .*, but got nan"),
        ({"epoch": 0}, "`epoch` to be an integer >= 1, but got 0"),
        (
            {"for_last": 2, "epoch": 3},
            "at most one of .*, but got for_last=2, epoch=3",
        ),
        ({"mixing": print}, "`mixing` to be a transform that .*, but got <built-in function print>"),
        ({"mixing": ["mix", 3]}, "`mixing` to be a transform .*, but got 3"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        MixingOff(**arguments)


@pytest.mark.parametrize(("text", "value"), [("2", 2), ("0.25", 0.25)])
def test_on_the_command_line(text, value):
    parser = CommandParser(exit_on_error=False)
    parser.add_subclass_arguments(Callback, "callback")
    options = ["--callback=MixingOff", f"--callback.for_last={text}", "--callback.mixing=mix"]
    made = instantiate(parser, parser.parse_args(options)).callback
    assert (made.for_last, type(made.for_last), made.mixing) == (value, type(value), "mix")


@pytest.mark.parametrize(
    ("model", "callbacks", "options", "message"),
    [
        (Watched, [MixingOff(1)], {}, "finds nothing that mixes: .* in Watched, .* MixingOff\\(mixing=...\\)"),
        (InModule, [MixingOff(4)], {}, r"MixingOff\(for_last=4\) leaves no epoch to mix in a training of 4 epochs"),
        (InModule, [MixingOff()], {}, r"MixingOff\(for_last=10\) leaves no epoch to mix in a training of 4 epochs"),
        (InModule, [MixingOff(0.9)], {"max_epochs": 1}, "leaves no epoch to mix in a training of 1 epochs"),
        (InModule, [MixingOff(mixing="mixx")], {}, r"MixingOff\(mixing='mixx'\) cannot find what mixes: InModule and"),
        (InModule, [MixingOff(mixing="is_mixed")], {}, "cannot find what mixes"),
        (InModule, [MixingOff(2)], {"max_epochs": -1}, "needs the number of epochs, .* MixingOff\\(epoch=...\\)"),
    ],
)
def test_refused_before_training(model, callbacks, options, message):
    model = model()
    with pytest.raises(MisconfigurationException, match=message):
        fit_on(model, callbacks=callbacks, **options)
    assert model.is_mixed == []


def test_says_when_and_warns_if_it_never_came(caplog):
    with caplog.at_level("INFO"):
        fit_on(InModule(), callbacks=[MixingOff(1)], max_epochs=2)
    assert f"MixingOff: no mixing from step {BATCHES} (epoch 1)." in caplog.text
    with pytest.warns(match=r"ended in epoch 2 without plain epochs, which MixingOff had set for epoch 7\."):
        fit_on(InModule(), callbacks=[MixingOff(epoch=7)], max_epochs=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The training ended")
        fit(InModule(), batches(2, shape=(3, 4, 4)), callbacks=[MixingOff(5)], fast_dev_run=True)
