"""Samplers: the probabilities of the paper, and draws that several processes share."""

import itertools
import json
import os
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import STRICT, Model, mlp, start_process, trainer
from lightning.pytorch.strategies import DDPStrategy
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ssesam.data import (
    ClassBalancedSampler,
    ImageFolderLT,
    LongTailDataModule,
    ProgressivelyBalancedSampler,
    SquareRootSampler,
)
from lightning_ssesam.data.images import IMAGENET_MEAN, IMAGENET_STD
from lightning_ssesam.data.in_memory import InMemoryImages
from lightning_ssesam.data.samplers import ClassSampler

pytestmark = STRICT

# Class 2 has no sample.
COUNTS = [400, 90, 0, 9, 1]
LABELS = torch.arange(5).repeat_interleave(torch.tensor(COUNTS))[
    torch.randperm(500, generator=torch.Generator().manual_seed(1))
]
SAMPLERS = [ClassBalancedSampler, SquareRootSampler, lambda *args, **kw: ProgressivelyBalancedSampler(*args, 4, **kw)]

# The definitions, by hand.
EXPECTED = {
    "balanced": [1 / 4, 1 / 4, 0, 1 / 4, 1 / 4],
    "root": [20 / (24 + 90**0.5), 90**0.5 / (24 + 90**0.5), 0, 3 / (24 + 90**0.5), 1 / (24 + 90**0.5)],
    "progressive 0": [0.8, 0.18, 0, 0.018, 0.002],
    "progressive 1": [0.75 * n / 500 + 0.25 * (n > 0) / 4 for n in COUNTS],
    "progressive 3": [0.25 * n / 500 + 0.75 * (n > 0) / 4 for n in COUNTS],
    "progressive 4": [1 / 4, 1 / 4, 0, 1 / 4, 1 / 4],
    "progressive 9": [1 / 4, 1 / 4, 0, 1 / 4, 1 / 4],
}


def made(name, **options):
    kind, _, epoch = name.partition(" ")
    if kind == "progressive":
        sampler = ProgressivelyBalancedSampler(LABELS, num_epochs=4, **options)
        sampler.set_epoch(int(epoch))
        return sampler
    return {"balanced": ClassBalancedSampler, "root": SquareRootSampler}[kind](LABELS, **options)


def chi_square(seen, expected):
    """Statistic over degrees of freedom; its standard deviation is sqrt(2 / degrees)."""
    kept = expected > 0
    assert seen[~kept].sum() == 0
    return float(((seen - expected)[kept] ** 2 / expected[kept]).sum()) / (int(kept.sum()) - 1)


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("seed", [0, 7])
def test_distribution(name, seed):
    draws = 200_000
    drawn = torch.tensor(list(made(name, num_samples=draws, seed=seed)))
    probabilities = torch.tensor(EXPECTED[name], dtype=torch.float64)
    assert probabilities.sum() == pytest.approx(1)
    assert chi_square(LABELS[drawn].bincount(minlength=5), draws * probabilities) < 5
    each = draws * probabilities[LABELS] / torch.tensor(COUNTS)[LABELS]
    assert chi_square(drawn.bincount(minlength=500), each) < 1 + 5 * (2 / 499) ** 0.5
    followed = torch.stack([drawn[:-1], drawn[1:]])
    assert (followed[0] == followed[1]).double().mean() == pytest.approx(float((each / draws).square().sum()), abs=0.01)


@pytest.mark.parametrize("name", EXPECTED)
def test_probabilities(name):
    sampler = made(name)
    given = sampler.class_probabilities(torch.tensor(COUNTS).double(), sampler.epoch)
    assert given.dtype == torch.float64
    assert given.tolist() == pytest.approx(EXPECTED[name], abs=1e-12)


@pytest.mark.parametrize("make", SAMPLERS)
def test_seeds_and_epochs(make):
    def draws(seed, epoch):
        sampler = make(LABELS, seed=seed)
        sampler.set_epoch(epoch)
        return tuple(sampler)

    assert draws(0, 0) == draws(0, 0)
    assert len(draws(0, 0)) == len(make(LABELS)) == 500
    assert len({draws(seed, epoch) for seed in range(3) for epoch in range(3)}) == 9
    before = torch.get_rng_state()
    draws(0, 0)
    assert torch.equal(before, torch.get_rng_state())
    sampler = make(LABELS)
    assert tuple(sampler) == tuple(sampler)


@pytest.mark.parametrize(("draws", "world"), [(12, 2), (13, 2), (13, 5), (1, 3), (2, 5)])
def test_processes_together_draw_what_one_does(draws, world, monkeypatch):
    alone = list(ClassBalancedSampler(LABELS, num_samples=draws, seed=3))
    assert len(alone) == draws
    parts = []
    for rank in range(world):
        # Built before the processes know of each other.
        sampler, fixed = (ClassBalancedSampler(LABELS, num_samples=draws, seed=3) for _ in range(2))
        with monkeypatch.context() as patch:
            patch.setattr("torch.distributed.is_initialized", lambda: True)
            patch.setattr("torch.distributed.get_world_size", lambda: world)
            patch.setattr("torch.distributed.get_rank", lambda rank=rank: rank)
            parts.append(list(sampler))
            assert len(sampler) == len(parts[-1]) == -(-draws // world)
            fixed.share(num_replicas=1, rank=0)
            assert list(fixed) == alone
        fixed.share(num_replicas=world, rank=rank)
        assert list(fixed) == parts[-1]
    together = [index for step in zip(*parts, strict=True) for index in step]
    assert together == (alone * world * 2)[: len(together)]
    assert len(together) - draws < world


def test_ten_thousand_classes_and_a_million_samples():
    labels = torch.randint(10_000, (1_000_000,))
    start = time.perf_counter()
    drawn = list(SquareRootSampler(labels))
    assert time.perf_counter() - start < 5
    assert len(drawn) == 1_000_000
    assert labels[torch.tensor(drawn)].unique().numel() == 10_000


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ClassBalancedSampler([]), "`labels` to be a non-empty vector of class indices"),
        (
            lambda: ClassBalancedSampler([0.5, 1.0]),
            "`labels` to be a non-empty vector of class indices, but got float32",
        ),
        (lambda: ClassBalancedSampler([[0]]), r"`labels` to be .* but got int64 values of shape \(1, 1\)"),
        (lambda: ClassBalancedSampler(["cat"]), r"`labels` to be .* but got \['cat'\]"),
        (lambda: ClassBalancedSampler([0, -1]), "`labels` to be .* but got values from -1 to"),
        (lambda: SquareRootSampler([0], num_samples=0), "`num_samples` to be an integer >= 1, but got 0"),
        (lambda: SquareRootSampler([0], seed=-1), "`seed` to be an integer >= 0, but got -1"),
        (lambda: ProgressivelyBalancedSampler([0], 0), "`num_epochs` to be an integer >= 1, but got 0"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


class Data(LongTailDataModule):
    """Every input begins with its number."""

    val_is_test = True

    def __init__(self, **options):
        super().__init__(**options)
        self.class_counts = [400, 90, 9, 1]

    def make_sets(self):
        inputs = torch.randn(500, 8, generator=torch.Generator().manual_seed(2))
        inputs[:, 0] = torch.arange(500)
        return {"train": TensorDataset(inputs, LABELS.clamp(max=3)), "test": TensorDataset(inputs, LABELS)}


class Watching(Model):
    """Keeps the numbers of the samples of each epoch."""

    def __init__(self):
        super().__init__(mlp(), optimizer=lambda params: torch.optim.SGD(params, lr=0.0))
        self.seen = {}

    def sample_losses(self, batch):
        self.seen.setdefault(self.current_epoch, []).extend(batch[0][:, 0].long().tolist())
        return super().sample_losses(batch)


def samplers():
    return {
        "data module": lambda labels: ProgressivelyBalancedSampler(labels, 3, num_samples=71, seed=5),
        "loader": lambda labels: ClassBalancedSampler(labels, num_samples=71, seed=5),
    }


def seen(name, **options):
    """Train for two epochs; return the numbers of the samples of each, and the kind of sampler that was used."""
    data, model = Data(batch_size=8, sampler=samplers()[name]), Watching()
    run = trainer(max_epochs=2, limit_val_batches=0, **options)
    if name == "data module":
        run.fit(model, datamodule=data)
    else:
        # Built when there is no process group yet.
        train = data.make_sets()["train"]
        run.fit(model, DataLoader(train, batch_size=8, sampler=samplers()[name](train.tensors[1])))
    return {"seen": list(model.seen.values()), "sampler": type(run.train_dataloader.sampler).__name__}


class WatchingImages(Model):
    """Keeps the index and the label of each image of a batch, which are its colours."""

    def __init__(self):
        super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 3)))
        self.seen = []

    def sample_losses(self, batch):
        colours = (batch[0][:, :2, 4, 4] * torch.tensor(IMAGENET_STD[:2]) + torch.tensor(IMAGENET_MEAN[:2])) * 255
        self.seen.append(colours.round().long().tolist())
        assert [label for _, label in self.seen[-1]] == batch[1].tolist()
        return super().sample_losses(batch)


def seen_in_memory():
    """Train on images in memory by two processes; return what this one saw, and the kind of sampler that was used."""
    data, model = ImageFolderLT("images", val_fraction=0, batch_size=4, in_memory=True), WatchingImages()
    strategy = DDPStrategy(timeout=timedelta(seconds=60), process_group_backend="gloo")
    run = trainer(limit_val_batches=0, devices=2, strategy=strategy)
    run.fit(model, datamodule=data)
    assert isinstance(run.train_dataloader.dataset, InMemoryImages)
    return {"seen": model.seen, "sampler": type(run.train_dataloader.sampler).__name__}


def two_processes(rank, port):
    """Run by `test_two_processes`, one of two."""
    variables = {"MASTER_PORT": port, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "NODE_RANK": 0}
    os.environ.update({"MASTER_ADDR": "127.0.0.1"} | {key: str(value) for key, value in variables.items()})
    results = {}
    for name in samplers():
        strategy = DDPStrategy(timeout=timedelta(seconds=60), process_group_backend="gloo")
        results[name] = seen(name, devices=2, strategy=strategy)
    results["in memory"] = seen_in_memory()
    Path(f"{rank}.json").write_text(json.dumps(results))


def test_two_processes(free_port):
    for part, label, index in itertools.product(("train", "test"), range(3), range(8)):
        path = Path("images", part, str(label), f"{index}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (index, label, 7)).save(path)
    processes = [start_process(two_processes, rank, free_port) for rank in range(2)]
    try:
        for process in processes:
            process.join(timeout=120)
        assert [process.exitcode for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    results = [json.loads(Path(f"{rank}.json").read_text()) for rank in range(2)]
    # Lightning gives each process its share.
    shares = [result["in memory"] for result in results]
    assert [share["sampler"] for share in shares] == ["DistributedSampler"] * 2
    assert [[len(batch) for batch in share["seen"]] for share in shares] == [[4, 4, 4]] * 2
    both = [image for share in shares for batch in share["seen"] for image in batch]
    assert sorted(both) == [[index, label] for index in range(8) for label in range(3)]
    for name in samplers():
        alone = seen(name)
        assert len({tuple(epoch) for epoch in alone["seen"]}) == 2, "two epochs have the same draws"
        for epoch in range(2):
            first, second = (result[name]["seen"][epoch] for result in results)
            together = [index for step in zip(first, second, strict=True) for index in step]
            assert together == [*alone["seen"][epoch], alone["seen"][epoch][0]]
        kinds = {result[name]["sampler"] for result in [*results, {name: alone}]}
        assert kinds == {type(samplers()[name]([0])).__name__}


def test_data_module_shares_as_the_strategy_does():
    data = Data(sampler=lambda labels: ClassBalancedSampler(labels, num_samples=10))
    whole = list(data.train_dataloader().sampler)
    data.trainer = SimpleNamespace(distributed_sampler_kwargs={"num_replicas": 2, "rank": 1})
    assert list(data.train_dataloader().sampler) == whole[1::2]


def test_a_class_without_samples_is_never_drawn_whatever_its_probability():
    class Uniform(ClassSampler):
        def class_probabilities(self, class_counts, epoch):
            return torch.ones_like(class_counts)

    assert {[0, 0, 2][index] for index in Uniform([0, 0, 2], num_samples=500)} == {0, 2}
