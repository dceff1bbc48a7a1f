"""A metric of one group alone: a scalar, for whatever takes a metric."""

import copy
import pickle

import pytest
import torch
from helpers import STRICT, Model, batches_loader, classification_batch, mlp, trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import tensor
from torchmetrics import MetricCollection
from torchmetrics.wrappers import BootStrapper, MetricTracker, MinMaxMetric

from lightning_ssesam import ClassSplit, HeadTailAccuracy, HeadTailConfusion, LongTailClassifier, ManyMediumFewAccuracy

pytestmark = STRICT

SPLIT = ClassSplit([500, 300, 50, 30, 5, 4], tail=[3, 4, 5])
VALUES = {
    HeadTailAccuracy: ["head", "tail", "all"],
    ManyMediumFewAccuracy: ["many", "medium", "few", "all"],
    HeadTailConfusion: ["head_to_head", "head_to_tail", "tail_to_head", "tail_to_tail"],
}
EVERY = pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in VALUES.items() for name in names])


def batch(n=40):
    target = torch.randint(6, (n,))
    return torch.randn(n, 6) + 2 * torch.eye(6)[target], target


@EVERY
def test_is_one_of_the_values(kind, name):
    metric, whole = kind(SPLIT).group(name), kind(SPLIT)
    for _ in range(3):
        scores, target = batch()
        step = metric(scores, target)
        assert step.shape == ()
        assert step == whole(scores, target)[name]
    assert metric.compute() == whole.compute()[name]
    assert isinstance(metric, kind)
    assert metric.higher_is_better == whole.higher_is_better
    for twin in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        assert twin.compute() == whole.compute()[name]


def test_has_its_own_counts_and_the_arguments():
    whole = HeadTailAccuracy(SPLIT, ignore_index=5)
    whole.update(tensor([0, 3]), tensor([0, 4]))
    tail = whole.group("tail")
    assert tail.total.sum() == 0
    tail.update(tensor([3, 0]), tensor([3, 5]))
    assert (whole.compute()["tail"], tail.compute()) == (0, 1)
    assert tail.group("head")(tensor([0, 1]), tensor([0, 0])) == 0.5


@EVERY
def test_wrappers_take_it(kind, name):
    batches, whole = [batch() for _ in range(3)], kind(SPLIT)
    tracker, values = MetricTracker(kind(SPLIT).group(name), maximize=whole.higher_is_better), []
    for scores, target in batches:
        tracker.increment()
        tracker.update(scores, target)
        values.append(float(kind(SPLIT)(scores, target)[name]))
    assert tracker.compute_all().tolist() == pytest.approx(values)
    best = max(values) if whole.higher_is_better else min(values)
    assert tracker.best_metric() == pytest.approx(best)
    extremes, running = MinMaxMetric(kind(SPLIT).group(name)), []
    for scores, target in batches:
        extremes.update(scores, target)
        whole.update(scores, target)
        running.append(float(whole.compute()[name]))
        expected = {"raw": running[-1], "min": min(running), "max": max(running)}
        assert {key: float(v) for key, v in extremes.compute().items()} == pytest.approx(expected)
    straps = BootStrapper(kind(SPLIT).group(name), num_bootstraps=4, raw=True)
    straps.update(*batches[0])
    found = straps.compute()
    assert found["raw"].shape == (4,)
    assert found["mean"] == pytest.approx(float(found["raw"].mean()))
    assert ((found["raw"] >= 0) & (found["raw"] <= 1)).all()


def test_a_collection_counts_once():
    names = {"head": HeadTailAccuracy, "tail": HeadTailAccuracy, "few": ManyMediumFewAccuracy}
    collection = MetricCollection({name: kind(SPLIT).group(name) for name, kind in names.items()}, prefix="val/")
    collection.add_metrics({"errors": HeadTailConfusion(SPLIT).group("tail_to_head")})
    wholes = [kind(SPLIT) for kind in VALUES]
    for _ in range(3):
        scores, target = batch()
        collection.update(scores, target)
        for whole in wholes:
            whole.update(scores, target)
    values = {name: float(value) for whole in wholes for name, value in whole.compute().items()}
    expected = {f"val/{name}": values[name] for name in names} | {"val/errors": values["tail_to_head"]}
    assert {name: float(value) for name, value in collection.compute().items()} == pytest.approx(expected)
    assert sorted(map(len, collection.compute_groups.values())) == [1, 3]


def test_plot():
    mpl = pytest.importorskip("matplotlib")
    mpl.use("Agg")
    metric = HeadTailAccuracy(SPLIT).group("tail")
    metric.update(*batch())
    _, ax = metric.plot()
    assert float(ax.lines[0].get_ydata()[0]) == pytest.approx(metric.compute().item())


class Logged(Model):
    """Logs metrics as objects, as Lightning's documentation shows."""

    def __init__(self, split):
        super().__init__(mlp())
        self.tail = HeadTailAccuracy(split).group("tail")
        self.errors = HeadTailConfusion(split).group("tail_to_head")

    def validation_step(self, batch, batch_idx):
        scores = self.net(batch[0])
        self.tail.update(scores, batch[1])
        self.log("val/tail", self.tail)
        self.log("val/errors", self.errors)
        self.errors(scores, batch[1])


def test_log_takes_it():
    split = ClassSplit([50, 40, 30, 6, 5], tail=[3, 4])
    model = Logged(split)
    data = [classification_batch(20) for _ in range(3)]
    run = trainer(max_epochs=2, callbacks=[EarlyStopping("val/tail", mode="max", patience=5)])
    run.fit(model, batches_loader(data), batches_loader(data))
    scores, targets = model.net(torch.cat([x for x, _ in data])), torch.cat([y for _, y in data])
    assert run.callback_metrics["val/tail"] == HeadTailAccuracy(split)(scores, targets)["tail"]
    expected = HeadTailConfusion(split)(scores, targets)["tail_to_head"]
    assert run.callback_metrics["val/errors"] == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HeadTailAccuracy(SPLIT).group("few"), "`name` to be one of 'head', 'tail', 'all', but got 'few'"),
        (lambda: HeadTailConfusion(SPLIT).group("tail"), "`name` to be one of 'head_to_head', 'head_to_tail'"),
        (lambda: HeadTailAccuracy(SPLIT).group(None), "`name` to be one of 'head', 'tail', 'all', but got None"),
        (
            lambda: ManyMediumFewAccuracy(ClassSplit([9, 2], tail=[1])).group("many"),
            r"`name` to be a group with classes, but got 'many', which has none in ClassSplit\(num_classes=2",
        ),
        (lambda: HeadTailAccuracy(ClassSplit([9, 2], tail=[])).group("tail"), "`name` to be a group with classes"),
        (lambda: HeadTailConfusion(ClassSplit([9, 2], [])).group("tail_to_head"), "`name` to be a group with classes"),
        (lambda: HeadTailAccuracy(SPLIT, ignore_index=None), "`ignore_index` to be an integer, but got None"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# What monitors a group without classes.


@pytest.mark.parametrize(
    "callback",
    [
        lambda: EarlyStopping("val/acc_many", mode="max"),
        lambda: ModelCheckpoint(monitor="val/acc_many", mode="max"),
        lambda: EarlyStopping("val/acc_many/dataloader_idx_1", mode="max"),
    ],
)
def test_a_group_without_classes_cannot_be_monitored(callback):
    model = LongTailClassifier([50, 40, 30, 6, 5], mlp())
    before = copy.deepcopy(model.state_dict())
    data = batches_loader([classification_batch()])
    with pytest.raises(Exception, match=r"monitors 'val/acc_many\S*', which is always NaN: .*many_above=100") as caught:
        trainer(callbacks=[callback()], enable_checkpointing=True).fit(model, data, data)
    assert type(caught.value).__name__ == "MisconfigurationException"
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_a_scheduler_cannot_monitor_it_either():
    def plateau(optimizer):
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max")

    model = LongTailClassifier([50, 40, 30, 6, 5], mlp(), scheduler=plateau, scheduler_monitor="val/acc_many")
    data = batches_loader([classification_batch()])
    with pytest.raises(Exception, match="ReduceLROnPlateau monitors 'val/acc_many', which is always NaN"):
        trainer().fit(model, data, data)


def test_groups_with_classes_are_monitored():
    data = batches_loader([classification_batch()])
    model = LongTailClassifier([150, 40, 30, 6, 5], mlp())
    run = trainer(callbacks=[EarlyStopping("val/acc_many", mode="max")], max_epochs=2)
    with pytest.warns(UserWarning, match="stays in stage 1"):
        run.fit(model, data, data)
    assert run.current_epoch == 2


class Dictionary(Model):
    """Logs the dictionary of a metric, under names of its own."""

    def __init__(self, split):
        super().__init__(mlp())
        self.accuracy = HeadTailAccuracy(split)

    def validation_step(self, batch, batch_idx):
        self.accuracy.update(self.net(batch[0]), batch[1])

    def on_validation_epoch_end(self):
        self.log_dict({f"val/{name}": value for name, value in self.accuracy.compute().items()})
        self.accuracy.reset()


@pytest.mark.parametrize("tail", [[], [4]])
def test_own_modules_are_told_at_the_first_validation(tail):
    """With no tail class, and with a tail class that the validation data do not have."""
    data = batches_loader([classification_batch(classes=range(4))])
    stopping = EarlyStopping("val/tail", mode="max", check_finite=False, patience=9)
    run = trainer(callbacks=[stopping], max_epochs=3, num_sanity_val_steps=1)
    with pytest.warns(UserWarning, match="EarlyStopping monitors 'val/tail', which is NaN after the first") as told:
        run.fit(Dictionary(ClassSplit([50, 40, 30, 6, 5], tail)), data, data)
    assert sum("which is NaN" in str(warning.message) for warning in told) == 1
    assert run.current_epoch == 3


# Several loaders.


@pytest.mark.parametrize("stage", ["validate", "test", "fit"])
def test_each_loader_has_its_own_values(stage):
    model = LongTailClassifier([150, 40, 30, 6, 5], mlp(), many_above=35, few_below=6)
    loaders = [batches_loader([classification_batch(20) for _ in range(n)]) for n in (1, 3, 2)]
    run = trainer()
    prefix = "test" if stage == "test" else "val"

    def values_of(loaders, stage=stage):
        if stage == "fit":
            with pytest.warns(UserWarning, match="stays in stage 1"):
                run.fit(model, batches_loader([classification_batch()]), loaders)
        else:
            getattr(run, stage)(model, loaders, verbose=True)
        return {name: float(v) for name, v in run.callback_metrics.items() if name.startswith(prefix)}

    together = values_of(loaders)
    results = getattr(run, stage)(model, loaders, verbose=True) if stage != "fit" else []
    for number, result in enumerate(results):
        assert result == pytest.approx(
            {name: value for name, value in together.items() if name.endswith(f"_{number}")}, nan_ok=True
        )
    expected = {}
    for number, loader in enumerate(loaders):
        alone = values_of([loader], "test" if stage == "test" else "validate")
        expected |= {f"{name}/dataloader_idx_{number}": value for name, value in alone.items()}
    assert together == pytest.approx(expected, nan_ok=True)
    assert len(together) == 3 * (11 if stage == "test" else 7)


def test_an_interrupted_validation_leaves_no_counts():
    model = LongTailClassifier([150, 40, 30, 6, 5], mlp())
    good, other = classification_batch(20), classification_batch(40)
    bad = (torch.randn(20, 3), torch.zeros(20, dtype=torch.long))
    run = trainer()
    with pytest.raises(RuntimeError):
        run.validate(model, [batches_loader([other]), batches_loader([other, bad])], verbose=False)
    run.validate(model, [batches_loader([good]), batches_loader([good])], verbose=False)
    again = [float(run.callback_metrics[f"val/acc_head/dataloader_idx_{number}"]) for number in (0, 1)]
    fresh = LongTailClassifier([150, 40, 30, 6, 5], model.backbone)
    run.validate(fresh, batches_loader([good]), verbose=False)
    assert again == pytest.approx([float(run.callback_metrics["val/acc_head"])] * 2)
