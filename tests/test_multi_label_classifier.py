"""LongTailClassifier on multi-label data: losses, mean average precisions, predictions, checkpoints, callbacks."""

import csv
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import STRICT, mlp, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ssesam import (
    CCSAM,
    ERM,
    DeferredReweighting,
    GroupAveragePrecision,
    LabelAveragePrecision,
    LongTailClassifier,
)
from lightning_ssesam.data import ImageInput, LongTailDataModule
from lightning_ssesam.errors import ArgumentError
from lightning_ssesam.experiments.network_check import check_network
from lightning_ssesam.experiments.predict_command import predict
from lightning_ssesam.losses import (
    AsymmetricLoss,
    BinaryCrossEntropyLoss,
    ClassBalancedBCELoss,
    DistributionBalancedLoss,
    LDAMLoss,
    class_balanced_weights,
)
from lightning_ssesam.models import SmallConvNet

pytestmark = [STRICT, pytest.mark.filterwarnings("ignore:.*many workers")]

COUNTS = [150, 120, 50, 12, 3]


class Labelled(LongTailDataModule):
    """Three labels depend on the inputs, two are rare. Some are missing."""

    multi_label, num_samples = True, 200
    class_names = ("cat", "dog", "owl", "red fox", "newt")

    def __init__(self, missing=0.1, dtype=torch.int64, **kwargs):
        super().__init__(**{"batch_size": 20, **kwargs})
        self.class_counts, self.missing, self.dtype = COUNTS, missing, dtype

    def make_sets(self):
        generator = torch.Generator().manual_seed(2)
        sets = {}
        for name, number in {"train": 60, "val": 40, "test": 40}.items():
            x = torch.randn(number, 8, generator=generator)
            y = (x[:, :5] > torch.tensor([-0.5, 0.0, 0.5, 1.0, 1.5])).long()
            y = y.masked_fill(torch.rand(number, 5, generator=generator) < self.missing, -100)
            sets[name] = TensorDataset(x, y.to(self.dtype))
        return sets


def classifier(loss=None, objective=None, backbone=None, **kwargs):
    options = {"tail_below": 20, "multi_label": True, "num_samples": 200, **kwargs}
    return LongTailClassifier(COUNTS, backbone or mlp(), objective, loss, **options)


def values(run, prefix):
    return {name: value.item() for name, value in run.callback_metrics.items() if name.startswith(prefix)}


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
@pytest.mark.parametrize("loss", [None, AsymmetricLoss, ClassBalancedBCELoss, DistributionBalancedLoss])
def test_validation_and_test_by_hand(dtype, loss):
    data, model, run = Labelled(dtype=dtype), classifier(loss and loss()), trainer(max_epochs=2)
    run.fit(model, datamodule=data)
    for stage, evaluate in (("val", run.validate), ("test", run.test)):
        evaluate(model, datamodule=data, verbose=False)
        x, y = data._sets[stage].tensors
        with torch.no_grad():
            logits = model(x)
        metric = GroupAveragePrecision(model.split)
        metric.update(logits, y)
        expected = {f"{stage}/map_{name}": value.item() for name, value in metric.compute().items()}
        per_label = model.loss(logits, y)
        assert per_label.shape == (40, 5)
        expected[f"{stage}/loss"] = (per_label.sum() / (y != -100).sum()).item()
        assert values(run, stage) == pytest.approx(expected, rel=1e-5)
    assert values(run, "test")["test/map_all"] > 0.3


def test_default_loss_is_binary_cross_entropy_and_trains():
    model, run = classifier(objective=ERM()), trainer(max_epochs=15)
    assert isinstance(model.loss, BinaryCrossEntropyLoss)
    run.fit(model, datamodule=Labelled())
    x, y = Labelled().make_sets()["test"].tensors
    assert values(run, "val")["val/map_head"] > 0.8
    # The probabilities of the two are those of their sigmoids.
    found = torch.cat(trainer().predict(model, DataLoader(TensorDataset(x, y), 7)))
    torch.testing.assert_close(found, model(x).sigmoid(), rtol=1e-5, atol=1e-6)
    assert float(found.sum(1).max()) > 1
    kept = y != -100
    with torch.no_grad():
        expected = F.binary_cross_entropy(found[kept], y[kept].float())
    torch.testing.assert_close(model.loss(model(x), y).sum() / kept.sum(), expected, rtol=1e-4, atol=0)


def test_several_loaders_have_their_own_values():
    model, run, sets = classifier(), trainer(), Labelled().make_sets()
    loaders = [DataLoader(sets[name], 16) for name in ("val", "test")]
    run.validate(model, loaders, verbose=False)
    for number, name in enumerate(("val", "test")):
        metric = GroupAveragePrecision(model.split)
        x, y = sets[name].tensors
        metric.update(model(x), y)
        for group, value in metric.compute().items():
            logged = run.callback_metrics[f"val/map_{group}/dataloader_idx_{number}"]
            assert logged.item() == pytest.approx(value.item())


def test_average_precision_of_each_label_on_request():
    data, run = Labelled(), trainer()
    model = classifier(log_recalls=True)
    run.fit(model, datamodule=data)
    x, y = data._sets["val"].tensors
    metric = LabelAveragePrecision(model.split, data.class_names)
    metric.update(model(x), y)
    assert list(metric.compute()) == list(data.class_names)
    expected = {f"val/ap/{name.replace(' ', '_')}": value.item() for name, value in metric.compute().items()}
    assert values(run, "val/ap") == pytest.approx(expected, rel=1e-5)
    assert GroupAveragePrecision(model.split).names()[-1] == "all"


def test_probabilities_of_mirror_images_and_a_correction():
    x = torch.randn(4, 1, 8, 8)
    model = classifier(backbone=SmallConvNet(5, width=8), tta="hflip").eval()
    expected = (model(x).sigmoid() + model(x.flip(-1)).sigmoid()) / 2
    torch.testing.assert_close(model.predict_step((x, None), 0), expected)
    scores = []
    model._log_value = lambda *args, **kwargs: None
    for metric in model.val_metrics:
        metric.update = lambda preds, target: scores.append(preds)
    model._trainer = None
    model.log = lambda *args, **kwargs: None
    model._has_several_loaders = lambda stage: False
    model._evaluate((x, torch.ones(4, 5, dtype=torch.long)), "val", 0)
    torch.testing.assert_close(scores[0], expected)
    model.tta = "none"
    before = model(x)
    model.correct(scale=2.0, shift=[0.0, 1.0, 2.0, 3.0, 4.0])
    torch.testing.assert_close(model.predict_step(x, 0), (2 * before + torch.arange(5.0)).sigmoid())


@pytest.mark.parametrize(
    "loss",
    [None, AsymmetricLoss(2.0, 1.0, 0.1, weight=[1.0, 2.0, 1.0, 1.0, 3.0]), DistributionBalancedLoss(kappa=0.1)],
    ids=lambda loss: type(loss).__name__,
)
def test_checkpoints_build_the_classifier_again(loss):
    data, run = Labelled(), trainer(max_epochs=1)
    model = classifier(loss, backbone=lambda num_classes: mlp(), ignore_index=-1)
    data.missing = 0.0
    run.fit(model, datamodule=data)
    run.save_checkpoint("last.ckpt")
    again = LongTailClassifier.load_from_checkpoint("last.ckpt", backbone=mlp())
    assert repr(again.split) == repr(model.split)
    assert (again.split.num_samples, again.ignore_index, again.loss.ignore_index) == (200, -1, -1)
    assert type(again.loss) is type(model.loss)
    assert sorted(again.loss.extra_repr().split(", ")) == sorted(model.loss.extra_repr().split(", "))
    x, y = data._sets["test"].tensors
    assert torch.equal(again.loss(again(x), y), model.loss(model(x), y))
    assert again.class_names == list(data.class_names)


def test_another_target_of_missing_labels_reaches_all_parts():
    model, run = classifier(AsymmetricLoss(), ignore_index=255), trainer()
    assert (model.loss.ignore_index, model.objective.ignore_index) == (255, 255)
    sets = {name: found.tensors for name, found in Labelled(missing=0.3).make_sets().items()}
    loaders = [DataLoader(TensorDataset(x, y.masked_fill(y == -100, 255)), 20) for x, y in sets.values()]
    run.fit(model, loaders[0], loaders[1])
    x, y = sets["val"]
    plain = AsymmetricLoss()(model(x), y)
    assert run.callback_metrics["val/loss"].item() == pytest.approx((plain.sum() / (y != -100).sum()).item(), rel=1e-5)


def test_a_loss_of_torch_gets_floating_targets():
    model, run, data = classifier(nn.BCEWithLogitsLoss(reduction="none")), trainer(), Labelled(missing=0.0)
    run.fit(model, datamodule=data)
    x, y = data._sets["val"].tensors
    expected = F.binary_cross_entropy_with_logits(model(x), y.float()).item()
    assert run.callback_metrics["val/loss"].item() == pytest.approx(expected, rel=1e-5)
    check_network(model, data)


@pytest.mark.parametrize(
    "loss", [BinaryCrossEntropyLoss, AsymmetricLoss, lambda: nn.BCEWithLogitsLoss(reduction="none")]
)
def test_deferred_reweighting_weights_the_labels(loss):
    seen = []

    class Watched(DeferredReweighting):
        def on_train_batch_end(self, trainer, pl_module, *args):
            seen.append(None if pl_module.loss.weight is None else pl_module.loss.weight.clone())

    model = classifier(loss())
    trainer(max_epochs=2, callbacks=[Watched(at=0.5)]).fit(model, datamodule=Labelled(missing=0.0))
    assert seen[:3] == [None] * 3
    torch.testing.assert_close(seen[3], class_balanced_weights(COUNTS).float())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: classifier(LDAMLoss()), "one without `multi_label` for LDAMLoss, but got ClassSplit"),
        (lambda: classifier(objective=CCSAM()), "without `multi_label`, as CCSAM perturbs"),
        (lambda: classifier(ignore_index=1), "`ignore_index` to be an integer outside"),
        (lambda: classifier(multi_label="yes"), "`multi_label` to be True or False, but got 'yes'"),
        (lambda: classifier(DistributionBalancedLoss(), num_samples=None), "`num_samples` to be an integer >= 150"),
        (lambda: classifier(num_samples=3), "`num_samples` to be an integer >= 150"),
        (
            lambda: LongTailClassifier(COUNTS, mlp(), loss=AsymmetricLoss()),
            "one with `multi_label` for AsymmetricLoss, but got ClassSplit",
        ),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_loss_of_one_class_a_sample_is_refused_before_training():
    data = Labelled(missing=0.0)
    model = classifier(nn.CrossEntropyLoss(reduction="none"))
    message = r"`loss` to be a module that returns a loss for each label \(N, C\), .* output of shape \(1,\)"
    with pytest.raises(ArgumentError, match=message):
        check_network(model, data)
    with pytest.raises(ArgumentError, match=r"a loss for each label .* shape \(\d+,\)"):
        trainer().fit(model, datamodule=data)


@pytest.mark.parametrize(
    ("monitor", "message"),
    [
        ("val/acc_tail", "monitors 'val/acc_tail', which multi-label data do not have.* 'val/map_all'"),
        ("val/map_few", "monitors 'val/map_few', which is always NaN.* such as 'val/map_all'"),
    ],
)
def test_monitors_of_what_is_never_logged_are_refused(monitor, message):
    model = classifier(few_below=2)
    run = trainer(callbacks=[ModelCheckpoint(monitor=monitor)], enable_checkpointing=True)
    with pytest.raises(MisconfigurationException, match=message):
        run.fit(model, datamodule=Labelled())


def test_best_checkpoint_by_mean_average_precision():
    keeper = ModelCheckpoint(monitor="val/map_tail", mode="max")
    trainer(max_epochs=3, callbacks=[keeper], enable_checkpointing=True).fit(classifier(), datamodule=Labelled())
    assert 0 < float(keeper.best_model_score) <= 1


def test_data_module_makes_the_split():
    split = Labelled().split(tail_below=20)
    assert (split.multi_label, split.num_samples, split.tail.tolist()) == (True, 200, [False] * 3 + [True] * 2)


def test_predict_writes_the_most_probable_labels():
    for folder in ("cat", "dog"):
        Path("images", folder).mkdir(parents=True)
        Image.new("RGB", (8, 8), "red").save(f"images/{folder}/1.png")
    model = classifier(backbone=SmallConvNet(5, in_channels=3, width=8), class_names=Labelled.class_names)
    model.image_input = ImageInput(8)
    run = trainer()
    run.strategy.connect(model)
    run.save_checkpoint("last.ckpt")
    predict(Path("last.ckpt"), Path("images"), top=2, device="cpu")
    with open("predictions.csv") as file:
        rows = list(csv.DictReader(file))
    x = model.image_input.transform()(Image.new("RGB", (8, 8), "red"))
    best = model.eval().probabilities(x.unsqueeze(0))[0].topk(2)
    assert [row["class"] for row in rows] == [model.class_names[best.indices[0]]] * 2
    assert float(rows[0]["probability_2"]) == pytest.approx(best.values[1].item(), abs=1e-5)
    assert "true_class" not in rows[0]
    with pytest.raises(ValueError, match="`labelled` to be False for a classifier of multi-label data"):
        predict(Path("last.ckpt"), Path("images"), labelled=True, device="cpu")
