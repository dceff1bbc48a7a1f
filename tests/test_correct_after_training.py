"""The callback that corrects a classifier when its training has ended."""

import copy

import pytest
import torch
from helpers import STRICT, Model, batches, batches_loader, fit, mlp, trainer
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ssesam import CorrectAfterTraining, DeferredReweighting, DigitsLT, LongTailClassifier
from lightning_ssesam.data import ClassBalancedSampler
from lightning_ssesam.errors import ArgumentError
from lightning_ssesam.losses import LDAMLoss, LogitAdjustedLoss
from lightning_ssesam.models import NormalizedLinear
from lightning_ssesam.objectives import ERM
from lightning_ssesam.posthoc import (
    METHODS,
    BalancedTraining,
    Evidence,
    TauChoice,
    collect_outputs,
    find_correction,
    logit_shift,
)

pytestmark = STRICT

SHORT = BalancedTraining(steps=5, batch_size=16)


def flat(width=8, classes=10):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Tanh(), nn.Dropout(0.1), nn.Linear(width, classes))


def digits_model(network=None, loss=None):
    data = DigitsLT()
    return LongTailClassifier(data.class_counts, flat() if network is None else network, ERM(), loss=loss)


def trained(callback, model=None, data=None, others=(), epochs=1):
    torch.manual_seed(0)
    model = digits_model() if model is None else model
    run = trainer(max_epochs=epochs, callbacks=[callback, *others])
    run.fit(model, datamodule=DigitsLT() if data is None else data)
    return run, model


class Remember(Callback):
    """Keeps the weights as the training leaves them."""

    def on_train_end(self, trainer, pl_module):
        self.state = copy.deepcopy(pl_module.state_dict())


@pytest.mark.parametrize("method", METHODS)
def test_it_is_what_the_functions_find(method):
    callback, remember = CorrectAfterTraining(method, training=SHORT), Remember()
    run, model = trained(callback, others=[remember])
    data = DigitsLT()
    data.setup("fit")
    plain = digits_model()
    plain.load_state_dict(remember.state)
    loader = data.val_dataloader()
    val = collect_outputs(plain.backbone, loader)
    train = collect_outputs(plain.backbone, [data._sets["train"].tensors])
    evidence = Evidence(plain.backbone, plain.split, val, lambda: train, training=SHORT)
    correction = find_correction(method, evidence)
    correction.apply_to(plain)
    assert callback.found == pytest.approx({"method": method, **correction.values})
    x = next(iter(loader))[0]
    for network in (plain, model):
        network.eval()
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=1e-5)
    assert not torch.allclose(model(x), val.logits, atol=1e-3)
    # A test, and a checkpoint, come after it.
    run.test(model, datamodule=data, verbose=False)
    run.save_checkpoint("corrected.ckpt")
    content = torch.load("corrected.ckpt", weights_only=True)
    assert content["posthoc"] == [callback.found]
    loaded = LongTailClassifier.load_from_checkpoint("corrected.ckpt", backbone=flat()).eval()
    assert torch.equal(loaded(x), model(x))


def test_the_weights_are_those_that_another_callback_leaves():
    """Callbacks that average weights put them into the module when the training ends."""

    class Average(Callback):
        def on_train_end(self, trainer, pl_module):
            torch.nn.init.zeros_(pl_module.backbone[-1].weight)
            torch.nn.init.zeros_(pl_module.backbone[-1].bias)

    callback = CorrectAfterTraining("temperature")
    with pytest.warns(UserWarning, match="stays as it was trained. No temperature fits"):
        _, model = trained(callback, others=[Average()])
    assert callback.found is None
    assert model.correction is None


class Noisy(DigitsLT):
    """Adds noise to the batches that train."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        images, targets = batch
        return (images + 100 * torch.randn_like(images), targets) if self.trainer.training else (images, targets)


def test_nothing_is_augmented():
    remember, callback = Remember(), CorrectAfterTraining("crt", training=SHORT)
    _, model = trained(callback, data=Noisy(), others=[remember])
    plain = digits_model()
    plain.load_state_dict(remember.state)
    data = DigitsLT()
    data.setup("fit")
    val = collect_outputs(plain.backbone, data.val_dataloader())
    train = collect_outputs(plain.backbone, [data._sets["train"].tensors])
    find_correction("crt", Evidence(plain.backbone, plain.split, val, lambda: train, training=SHORT)).apply_to(plain)
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=1e-5)


def test_without_a_data_module():
    x, y = torch.randn(60, 8), torch.arange(60) % 5
    model = LongTailClassifier([12] * 4 + [11], mlp(), ERM(), tail_below=12)
    val = DataLoader(TensorDataset(x, y), batch_size=25)
    callback = CorrectAfterTraining("logit_adjustment", tau=0.5)
    fit(model, batches(2), val, callbacks=[callback])
    torch.testing.assert_close(model.correction.shift, logit_shift([12] * 4 + [11], 0.5).float())
    assert callback.found == {"method": "logit_adjustment", "tau": 0.5}


def test_a_second_training_needs_a_plain_classifier():
    callback = CorrectAfterTraining("logit_adjustment", tau=1.0)
    _, model = trained(callback)
    with pytest.raises(MisconfigurationException, match=r"corrected already\. Set `model.correction = None`"):
        trained(callback, model)
    model.correction = None
    trained(callback, model)
    torch.testing.assert_close(model.correction.shift, logit_shift(DigitsLT().class_counts).float())


@pytest.mark.parametrize(
    ("model", "callback", "error", "message"),
    [
        (lambda: Model(), "crt", MisconfigurationException, "needs a LongTailClassifier"),
        (
            lambda: LongTailClassifier(DigitsLT().class_counts, flat(), ERM(), multi_label=True, num_samples=900),
            "crt",
            MisconfigurationException,
            "needs data with one class a sample, but this classifier has `multi_label=True`",
        ),
        (
            lambda: digits_model(nn.Sequential(nn.Flatten(), NormalizedLinear(64, 10)), LDAMLoss()),
            "tau_norm",
            ArgumentError,
            "a NormalizedLinear normalises its weights itself",
        ),
        (
            lambda: digits_model(nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten())),
            "crt",
            ArgumentError,
            "has no linear layer",
        ),
    ],
)
def test_refused_before_the_training(model, callback, error, message):
    model = model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        trained(CorrectAfterTraining(callback), model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_refused_without_validation_data():
    with pytest.raises(MisconfigurationException, match="needs validation data"):
        fit(
            LongTailClassifier([12] * 5, mlp(), ERM(), tail_below=12),
            batches(2),
            callbacks=[CorrectAfterTraining("lws")],
        )


def test_refused_in_several_processes(monkeypatch):
    monkeypatch.setattr("lightning.pytorch.Trainer.world_size", 2)
    with pytest.raises(MisconfigurationException, match=r"one process, but this training has 2\. .*ssesam adjust"):
        trained(CorrectAfterTraining("lws"))


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"method": "mix"}, "method"),
        ({"method": "crt", "tau": -1}, "tau"),
        ({"method": "crt", "choice": "tail"}, "choice"),
        ({"method": "crt", "training": 3}, "training"),
        ({"method": "crt", "tau": 1.0, "choice": TauChoice()}, "choice"),
    ],
)
def test_wrong_arguments(arguments, name):
    with pytest.raises(ArgumentError, match=f"`{name}`"):
        CorrectAfterTraining(**arguments)


@pytest.mark.parametrize(
    ("loss", "data", "others", "phrase"),
    [
        (LogitAdjustedLoss(), None, [], "its loss LogitAdjustedLoss"),
        (None, DigitsLT(sampler=ClassBalancedSampler), [], "the sampler of its training set"),
        (None, None, [DeferredReweighting(at=0.5)], "DeferredReweighting"),
    ],
)
def test_what_has_made_up_for_the_class_sizes_is_said(loss, data, others, phrase):
    message = f"CorrectAfterTraining: {phrase} has made up for the class sizes, and logit_adjustment does so again"
    loss = nn.CrossEntropyLoss(reduction="none") if loss is None else loss
    with pytest.warns(UserWarning, match=message):
        trained(CorrectAfterTraining("logit_adjustment", tau=1.0), digits_model(loss=loss), data, others)


def test_a_new_layer_does_not_make_up_for_the_class_sizes_again():
    trained(CorrectAfterTraining("crt", training=SHORT), digits_model(loss=LogitAdjustedLoss()))


class Loaders(LightningDataModule):
    def train_dataloader(self):
        return batches_loader(batches(2))

    def val_dataloader(self):
        return [batches_loader(batches(1)), batches_loader(batches(1))]


def test_of_several_loaders_the_first_counts():
    model = LongTailClassifier([12] * 4 + [11], mlp(), ERM(), tail_below=12)
    callback = CorrectAfterTraining("lws", training=SHORT)
    trained(callback, model, Loaders())
    assert callback.found == {"method": "lws"}
