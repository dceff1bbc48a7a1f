"""What a run keeps: every test image, numbers of images, the accuracy on the training images. Nothing else changes."""

import csv
import json
import random
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import STRICT
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    Subset,
    TensorDataset,
)

from lightning_ssesam import ERM, DigitsLT
from lightning_ssesam.compare import Method, compare
from lightning_ssesam.data import ImageFolderLT, LongTailDataModule
from lightning_ssesam.data.samplers import ClassBalancedSampler
from lightning_ssesam.data.unaugmented import _plain
from lightning_ssesam.experiments import experiment as experiment_file
from lightning_ssesam.runs import GROUPS, Experiment, RunStore

pytestmark = STRICT

COUNTS = [12, 8, 3]


class Points(LongTailDataModule):
    """Points in the plane, whose class the first coordinate tells."""

    class_names = ("a", "b", "c")
    many_above, few_below = 10, 5

    def __init__(self, **kwargs):
        super().__init__(batch_size=4, **kwargs)
        self.class_counts = COUNTS

    def make_sets(self):
        generator = torch.Generator().manual_seed(0)
        return {
            name: self.points(torch.arange(3).repeat_interleave(torch.tensor(counts)), generator)
            for name, counts in {"train": COUNTS, "val": [2, 0, 5], "test": [7, 6, 0]}.items()
        }

    def points(self, labels, generator):
        # Not sorted by class.
        labels = labels[torch.randperm(len(labels), generator=generator)]
        return TensorDataset(labels[:, None] + torch.randn(len(labels), 2, generator=generator), labels)


def experiment(data=Points, epochs=2, **kwargs):
    return Experiment("ERM", ERM, data=data, backbone=line, optimizer=sgd, epochs=epochs, tail_below=5, **kwargs)


def line(num_classes):
    return nn.Linear(2, num_classes)


def sgd(params):
    return torch.optim.SGD(params, lr=0.05)


def naive_recalls(model, dataset):
    with torch.no_grad():
        inputs, labels = (torch.stack([torch.as_tensor(pair[k]) for pair in dataset]) for k in (0, 1))
        right = model.eval()(inputs).argmax(1) == labels
    return [right[labels == k].int().tolist() for k in range(3)]


def means(recalls):
    """Mean recall of each group of `Points`, whose classes are all tested."""
    each = [np.mean(of_class) for of_class in recalls]
    groups = {"head": each[:2], "tail": each[2:], "many": each[:1], "medium": each[1:2], "few": each[2:], "all": each}
    return {group: pytest.approx(np.mean(groups[group])) for group in GROUPS}


def test_a_run_keeps_every_test_image_and_the_training_accuracy():
    run = experiment().run(3)
    _, model, data = experiment().fit(3)
    tested = naive_recalls(model, data._sets["test"])
    assert run.test_hits == ["".join(map(str, of_class)) for of_class in tested]
    assert run.test_images == [7, 6, 0]
    assert run.val_images == [2, 0, 5]
    assert run.class_names == ["a", "b", "c"]
    assert run.groups == {"head": "110", "tail": "001", "many": "100", "medium": "010", "few": "001"}
    assert run.train_accuracy == means(naive_recalls(model, data._sets["train"]))
    # Something was learned, and something is missing.
    assert 0.3 < run.train_accuracy["all"] < 1
    assert "0" in "".join(run.test_hits)
    assert "1" in "".join(run.test_hits)
    RunStore(Path("runs")).save(run, "same")
    assert json.dumps(asdict(RunStore(Path("runs")).load("ERM", 3, "same"))) == json.dumps(asdict(run))


class Noisy(nn.Module):
    """Dropout, batch norm, and draws from every generator in evaluation: a test of the state that must not move."""

    def __init__(self, num_classes):
        super().__init__()
        self.layers = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.2), nn.Linear(2, num_classes))

    def forward(self, x):
        draws = torch.rand(()) + random.random() + np.random.rand()
        return self.layers(x) + 0 * draws


def test_measuring_changes_nothing_else(monkeypatch):
    noisy = Experiment("ERM", ERM, data=Points, backbone=Noisy, optimizer=sgd, epochs=2, tail_below=5)

    def run_and_draw():
        run = noisy.run(1)
        return asdict(run) | {"seconds": 0}, (torch.rand(3).tolist(), random.random(), np.random.rand())

    run, draws = run_and_draw()
    monkeypatch.setattr(experiment_file, "training_accuracy", lambda *_: {})
    plain, plain_draws = run_and_draw()
    assert run["train_accuracy"]
    assert json.dumps(run | {"train_accuracy": {}}) == json.dumps(plain)
    assert draws == plain_draws


def test_every_training_image_counts_once_whatever_the_sampler_draws():
    data = partial(Points, sampler=ClassBalancedSampler)
    run = experiment(data).run(0)
    _, model, module = experiment(data).fit(0)
    assert run.train_accuracy == means(naive_recalls(model, module._sets["train"]))


class Transformed(Dataset):
    """A data set as those of torchvision: its transform is an attribute."""

    def __init__(self, pairs, transform):
        self.pairs, self.transform = pairs, transform

    def __getitem__(self, index):
        point, label = self.pairs[index]
        return self.transform(point), label

    def __len__(self):
        return len(self.pairs)


class OwnTransformed(Transformed):
    """Another class."""


def far_away(point):
    return point + 100 * torch.randn(2)


def unchanged(point):
    return point


class Augmented(Points):
    kind = Transformed

    def make_sets(self):
        sets = super().make_sets()
        train = self.kind(sets["train"], far_away)
        others = {name: Transformed(sets[name], unchanged) for name in ("val", "test")}
        return {"train": Subset(Subset(train, range(len(train))), range(len(train))), **others}


class OwnAugmented(Augmented):
    kind = OwnTransformed


def test_training_images_are_measured_without_augmentation_where_that_is_known():
    run = experiment(Augmented).run(0)
    _, model, data = experiment(Augmented).fit(0)
    plain = data._sets["train"].dataset.dataset.pairs
    assert run.train_accuracy == means(naive_recalls(model, plain))
    # What the training sees is not touched.
    evaluated = _plain(data._sets["train"], data._sets["test"])
    assert evaluated.dataset.dataset.transform is unchanged
    assert data._sets["train"].dataset.dataset.transform is far_away
    # A class of its own may give its transform another meaning.
    own = OwnAugmented()
    own.setup("fit")
    assert _plain(own._sets["train"], own._sets["test"]).dataset.dataset.transform is far_away


class SeveralLoaders(Points):
    def val_dataloader(self):
        return [super().val_dataloader(), self._loader("train", batch_size=5)]

    def test_dataloader(self):
        return [super().test_dataloader(), self._loader("train", batch_size=5)]


def test_of_several_loaders_the_first_counts():
    run = experiment(SeveralLoaders).run(2)
    _, model, data = experiment(SeveralLoaders).fit(2)
    tested, validated = (naive_recalls(model, data._sets[name]) for name in ("test", "val"))
    assert run.test_hits == ["".join(map(str, of_class)) for of_class in tested]
    assert run.accuracy["all"] == pytest.approx(np.mean([np.mean(of_class) for of_class in tested[:2]]))
    assert run.curves["all"][-1] == pytest.approx(np.mean([np.mean(validated[0]), np.mean(validated[2])]))
    assert run.val_images == [2, 0, 5]
    assert run.train_accuracy == means(naive_recalls(model, data._sets["train"]))


class Shuffled(Points):
    def test_dataloader(self):
        return self._loader("test", batch_size=4, shuffle=True)


class Backwards(BatchSampler):
    def __iter__(self):
        yield from list(super().__iter__())[::-1]


class OwnBatches(Points):
    def test_dataloader(self):
        self.setup("test")
        return self._loader("test", batch_sampler=Backwards(SequentialSampler(self._sets["test"]), 4, drop_last=False))


@pytest.mark.filterwarnings("ignore:.*has `shuffle=True`")
@pytest.mark.parametrize("data", [Shuffled, OwnBatches])
def test_images_whose_order_may_change_are_counted_only(data):
    run, plain = (experiment(kind).run(0) for kind in (data, Points))
    assert (run.test_hits, run.test_images) == ([], [7, 6, 0])
    assert run.class_recalls == pytest.approx(plain.class_recalls, nan_ok=True)


class Partly(Points):
    """Some images have no label."""

    def make_sets(self):
        sets = super().make_sets()
        points, labels = sets["test"].tensors
        labels[::3] = 7
        return sets | {"test": TensorDataset(points, labels)}


def test_ignored_images_are_no_misses():
    run = experiment(Partly, model={"ignore_index": 7}).run(0)
    data = Partly()
    data.setup("test")
    labels = data._sets["test"].tensors[1]
    assert [len(text) for text in run.test_hits] == [int((labels == k).sum()) for k in range(3)] == run.test_images
    assert run.class_recalls[:2] == pytest.approx([text.count("1") / len(text) for text in run.test_hits[:2]])


class Endless(IterableDataset):
    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        while True:
            label = int(torch.randint(3, (), generator=generator))
            yield label + torch.randn(2, generator=generator), label


class EndlessPoints(Points):
    def train_dataloader(self):
        return DataLoader(Endless(), batch_size=4)


class Batches:
    """Batches made elsewhere."""

    def __iter__(self):
        yield torch.zeros(2, 2), torch.tensor([0, 1])
        yield torch.ones(3, 2), torch.tensor([0, 0, 2])

    def __len__(self):
        return 2


class OwnLoader(Points):
    def train_dataloader(self):
        return Batches()


def test_a_stream_is_measured_as_far_as_an_epoch_went():
    assert experiment(EndlessPoints, trainer={"max_steps": 5}).run(0).train_accuracy == {}
    run = experiment(EndlessPoints, trainer={"limit_train_batches": 3}).run(0)
    _, model, _ = experiment(EndlessPoints, trainer={"limit_train_batches": 3}).fit(0)
    stream = iter(Endless())
    assert run.train_accuracy == means(naive_recalls(model, [next(stream) for _ in range(12)]))
    run = experiment(OwnLoader).run(0)
    _, model, _ = experiment(OwnLoader).fit(0)
    batches = [pair for inputs, labels in Batches() for pair in zip(inputs, labels, strict=True)]
    assert run.train_accuracy == means(naive_recalls(model, batches))


class Broken(Points):
    """Its training set cannot be read in order."""

    class _Set(Dataset):
        def __getitem__(self, index):
            if torch.utils.data.get_worker_info() is None and self.is_over():
                raise OSError("the disk is gone")
            return torch.zeros(2), index % 3

        def __len__(self):
            return 23

        reads = 0

        def is_over(self):
            type(self).reads += 1
            return self.reads > 46

    def make_sets(self):
        return super().make_sets() | {"train": self._Set()}


@pytest.mark.filterwarnings("default:The training accuracy")
def test_nothing_is_lost_if_the_training_accuracy_cannot_be_measured():
    Broken._Set.reads = 0
    with pytest.warns(UserWarning, match="The training accuracy of 'ERM' was not measured: the disk is gone"):
        run = experiment(Broken).run(0)
    assert run.train_accuracy == {}
    assert run.test_images == [7, 6, 0]


def test_a_logger_sees_the_test_only():
    given = {"logger": CSVLogger("logs"), "limit_test_batches": 1, "log_every_n_steps": 1}
    run = experiment(trainer=given).run(0)
    with next(Path("logs").rglob("metrics.csv")).open() as file:
        tested = [row["test/acc_all"] for row in csv.DictReader(file) if row["test/acc_all"]]
    assert [float(value) for value in tested] == [pytest.approx(run.accuracy["all"])]
    assert len(list(Path("logs").rglob("metrics.csv"))) == 1
    assert run.train_accuracy["all"] == pytest.approx(experiment().run(0).train_accuracy["all"])


def test_names_must_fit_the_classes():
    for names in (["a"], "abc", None):
        data = type("Named", (Points,), {"class_names": names})
        assert experiment(data, epochs=1).run(0).class_names == []


def test_compare_says_what_it_rests_on(capsys):
    methods = {name: Method(ERM) for name in ("one", "two")}
    options = {"seeds": 2, "epochs": 1, "tail_below": 5, "backbone": line, "optimizer": sgd}
    compare(methods, data=Points, **options)
    printed = capsys.readouterr().out
    assert "Images of each class: 0 to 5 for validation, 0 to 7 for test" in printed
    assert "Fewer than 10 test images: 'b' (6), 'a' (7)." in printed
    assert "No test images: 'c'." in printed
    assert "No validation images: 'b'." in printed
    # The same method twice, with the same seeds.
    assert "+0.0 ± " in printed
    assert "*" not in printed.partition("(* excludes 0)")[2]
    assert "The training set is not fitted yet (one " in printed


def test_digits_are_fitted():
    run = Experiment(
        "ERM", ERM, optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9), data=DigitsLT, epochs=20
    ).run(0)
    assert run.train_accuracy["all"] > 0.8
    assert run.test_images == [50] * 10
    assert run.val_images == [20] * 10


def test_few_images_are_said_before_the_training(monkeypatch, capsys):
    """They are known then; a training may take hours."""

    def train(self, seed, *_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Experiment, "run", train)
    for name, count in (("ant", 60), ("bee", 12), ("cat", 1)):
        Path("images", name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(f"images/{name}/{number}.png")
    with pytest.raises(KeyboardInterrupt):
        compare("ERM", seeds=1, epochs=1, data=partial(ImageFolderLT, "images"), tail_below=20)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("Fewer than 10 test images: 'bee' (2). In such a class, a single image moves")
    assert printed[1].startswith("No test images: 'cat'.")
    assert not any("group all" in line for line in printed)
