"""Images in tar shards: how they are written, indexed, read, divided and resumed."""

import io
import json
import math
import os
import pickle
import random
import sys
import tarfile
from collections import Counter
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import STRICT, Killed, trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from PIL import Image

from lightning_ssesam import SSESAM, LongTailClassifier, StageSwitch
from lightning_ssesam.compare import compare
from lightning_ssesam.data import ImageList, ImageListLT, ImageShardsLT, index_shards, write_shards
from lightning_ssesam.data.shard_index import Shard
from lightning_ssesam.data.shard_plan import find_spans, share_of_process, share_of_worker
from lightning_ssesam.errors import ArgumentError
from lightning_ssesam.models import SmallConvNet

pytest.importorskip("webdataset")
pytestmark = STRICT
COUNTS = [20, 9, 4]


@pytest.fixture
def lists():
    """Lists of 33 training images and 6 test images, each of a colour of its own."""
    for name, counts in (("train", COUNTS), ("test", [2, 2, 2])):
        lines = []
        for number, label in enumerate(np.repeat(np.arange(3), counts).tolist()):
            path = Path(name, f"{'ab'[number % 2]} {number}.png")
            path.parent.mkdir(exist_ok=True)
            Image.new("RGB", (8, 8), (number, 10 * label, 255)).save(path)
            lines.append(f"{path} {label}\n")
        Path(f"{name}.txt").write_text("".join(lines))


@pytest.fixture
def shards(lists):
    write_shards(ImageList("train.txt"), "shards", "train", samples=5)
    write_shards(ImageList("test.txt"), "shards", "test", samples=4)


def module(**options):
    options = {"image_size": 8, "batch_size": 4, "num_workers": 0, "buffer": 6, **options}
    return ImageShardsLT("shards/train-{000000..000006}.tar", "shards/test-*.tar", **options)


def plain(image):
    """The number of an image, by its colour."""
    return torch.tensor(image.getpixel((0, 0))[0])


def epoch_of(loader, epoch=0):
    loader.sampler.set_epoch(epoch)
    return [(numbers.tolist(), labels.tolist()) for numbers, labels in loader]


def flat(batches):
    return [pair for numbers, labels in batches for pair in zip(numbers, labels, strict=True)]


ALL = [(number, label) for number, label in enumerate(np.repeat(np.arange(3), COUNTS).tolist())]


@pytest.mark.usefixtures("shards")
def test_shards_hold_the_files_as_they_are():
    paths = sorted(Path("shards").glob("train-*.tar"))
    assert [path.name for path in paths] == [f"train-{number:06d}.tar" for number in range(7)]
    found = {}
    for path in paths:
        with tarfile.open(path) as tar:
            names = tar.getnames()
            assert len(names) == (10 if path != paths[-1] else 6)
            content = {name: tar.extractfile(name).read() for name in names}
        for name in names[::2]:
            found[int(name[:9])] = content[name], int(content[f"{name[:9]}.cls"])
    images = ImageList("train.txt")
    assert found == {index: (Path(images.path(index)).read_bytes(), int(images.targets[index])) for index in range(33)}
    assert list(found) != sorted(found)
    index = json.loads(Path("shards/index.json").read_text())
    assert len(index) == 9
    total = Counter()
    for path in paths:
        assert index[path.name]["size"] == path.stat().st_size
        total.update(index[path.name]["counts"])
    assert total == {"0": 20, "1": 9, "2": 4}


@pytest.mark.usefixtures("shards")
@pytest.mark.parametrize("workers", [0, 3])
def test_each_sample_comes_once_an_epoch(workers):
    data = module(num_workers=workers, train_transform=plain, test_transform=plain)
    assert data.class_counts == COUNTS
    loader = data.train_dataloader()
    epochs = [epoch_of(loader, epoch) for epoch in (0, 1, 0)]
    assert [len(epoch) for epoch in epochs] == [len(loader)] * 3
    assert all(sorted(flat(epoch)) == ALL for epoch in epochs)
    # The order depends on the epoch, and on nothing else.
    assert epochs[0] == epochs[2] != epochs[1]
    assert epoch_of(module(num_workers=workers, train_transform=plain, seed=1).train_dataloader()) != epochs[0]
    assert sorted(number for number, _ in flat(epoch_of(data.test_dataloader()))) == list(range(6))
    assert loader.num_workers == workers
    assert module(num_workers=50).train_dataloader().num_workers == 7


@pytest.mark.usefixtures("shards")
@pytest.mark.parametrize(("processes", "workers"), [(2, 2), (3, 0), (11, 0)])
def test_processes_that_train_together_see_each_sample_once(processes, workers, monkeypatch):
    """They make as many batches each. What 33 samples lack to be divided is repeated, as by a DistributedSampler."""
    seen, batches = Counter(), set()
    for rank in range(processes):
        monkeypatch.setattr(
            "lightning_ssesam.data.image_shards.rank_and_processes", lambda rank=rank: (rank, processes)
        )
        loader = module(num_workers=workers, train_transform=plain).train_dataloader()
        epoch = epoch_of(loader, 1)
        assert len(epoch) == len(loader)
        batches.add(tuple(len(labels) for _, labels in epoch))
        seen.update(flat(epoch))
    own = math.ceil(33 / processes)
    assert batches == {(4,) * (own // 4) + ((own % 4,) if own % 4 else ())}
    assert sorted(seen) == ALL
    assert sum(seen.values()) == own * processes
    assert max(seen.values()) <= 2


@pytest.mark.usefixtures("shards")
def test_more_processes_than_samples(monkeypatch):
    monkeypatch.setattr("lightning_ssesam.data.image_shards.rank_and_processes", lambda: (39, 40))
    assert [len(labels) for _, labels in epoch_of(module(train_transform=plain).train_dataloader())] == [1]


def test_samples_are_found_as_in_a_plain_list():
    """Every process, worker and batch, against a list of all samples that is cut with indices."""
    draws = random.Random(0)
    for _ in range(200):
        sizes = [draws.randrange(1, 9) for _ in range(draws.randrange(1, 6))]
        shards = [Shard(str(number), 0, {0: size}) for number, size in enumerate(sizes)]
        every = [(str(number), index) for number, size in enumerate(sizes) for index in range(size)]
        processes, workers, batch_size = draws.randrange(1, 5), draws.randrange(1, 5), draws.randrange(1, 5)
        own = -(-len(every) // processes)
        for rank in range(processes):
            expected = [every[number % len(every)] for number in range(rank * own, (rank + 1) * own)]
            start, stop = share_of_process(len(every), rank, processes)
            parts = []
            for worker in range(workers):
                first, last = share_of_worker(own, batch_size, worker, workers)
                spans = find_spans(shards, start + first, start + last)
                found = [(shard.path, index) for shard, low, high in spans for index in range(low, high)]
                parts.append([found[k : k + batch_size] for k in range(0, len(found), batch_size)])
            # A loader asks its workers in turn, until they have no batch more.
            turns = [part[turn] for turn in range(max(map(len, parts))) for part in parts if turn < len(part)]
            assert [len(batch) for batch in turns[:-1]] == [batch_size] * (len(turns) - 1)
            assert stop - start == own == sum(map(len, turns))
            assert sorted(chain.from_iterable(turns)) == sorted(expected)


@pytest.mark.usefixtures("shards")
def test_images_are_those_of_the_files():
    shards, files = module(), ImageListLT("train.txt", "test.txt", image_size=8, num_workers=0)
    found = {}
    for images, labels in shards.test_dataloader():
        found |= {tuple(image.flatten()[:200].tolist()): label for image, label in zip(images, labels, strict=True)}
    for images, labels in files.test_dataloader():
        assert all(found[tuple(i.flatten()[:200].tolist())] == label for i, label in zip(images, labels, strict=True))
    assert shards.image_input == files.image_input
    assert shards.in_channels == 3


class Ends(Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == self.at:
            raise Killed

    def __init__(self, at):
        self.at = at


def train(callbacks=(), ckpt_path=None, workers=0):
    torch.manual_seed(0)
    data, seen = module(num_workers=workers), Seen()
    net = partial(SmallConvNet, width=8, in_channels=3)
    model = LongTailClassifier(data.class_counts, net, SSESAM(), tail_below=5)
    run = trainer(max_epochs=3, callbacks=[StageSwitch(epoch=2), seen, *callbacks], enable_checkpointing=True)
    try:
        run.fit(model, datamodule=data, ckpt_path=ckpt_path)
    except Killed:
        return None, seen.labels
    return model.state_dict(), seen.labels


class Seen(Callback):
    def __init__(self):
        self.labels = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.labels.setdefault(trainer.current_epoch, []).append(batch[1].tolist())


@pytest.mark.usefixtures("shards")
@pytest.mark.parametrize("workers", [0, 2])
def test_resumes_exactly_from_the_end_of_an_epoch(workers):
    whole, labels = train(workers=workers)
    assert labels[0] != labels[1] != labels[2]
    assert all(Counter(chain.from_iterable(epoch)) == {0: 20, 1: 9, 2: 4} for epoch in labels.values())
    save = ModelCheckpoint("saved", "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    train([save, Ends(2)], workers=workers)
    resumed, rest = train(ckpt_path="saved/epoch=1.ckpt", workers=workers)
    assert rest == {2: labels[2]}
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


@pytest.mark.usefixtures("shards")
@pytest.mark.parametrize("workers", [0, 3])
def test_a_loader_goes_on_from_its_position(workers):
    """With random transforms, of torch, Python and NumPy, at each position of an epoch."""
    options = {"num_workers": workers, "train_transform": noisy, "batch_size": 2}
    whole = module(**options).train_dataloader()
    whole.set_epoch(1)
    expected = [images.tolist() for images, _ in whole]
    for done in (4, 11) if workers else (1,):
        loader = module(**options).train_dataloader()
        loader.set_epoch(1)
        batches = iter(loader)
        for _ in range(done):
            next(batches)
        state = pickle.loads(pickle.dumps(loader.state_dict()))
        assert (state["epoch"], state["batches"]) == (1, done)
        resumed = module(**options).train_dataloader()
        resumed.load_state_dict(state)
        found = [images.tolist() for images, _ in resumed]
        # In the process that trains, the mixin restores the random numbers.
        compared = (0, 1, 2, 3) if workers else (0,)
        assert [[[row[k] for k in compared] for row in batch] for batch in found] == [
            [[row[k] for k in compared] for row in batch] for batch in expected[done:]
        ]
        assert len(list(resumed)) == len(whole)


def noisy(image):
    return torch.tensor([image.getpixel((0, 0))[0], torch.rand(()).item(), random.random(), np.random.rand()])


@pytest.mark.usefixtures("shards")
def test_a_position_of_another_division_begins_the_epoch_anew():
    loader = module(train_transform=plain, batch_size=2).train_dataloader()
    state = {**loader.state_dict(), "epoch": 3, "batches": 5}
    other = module(train_transform=plain).train_dataloader()
    with pytest.warns(UserWarning, match=r"read with {'batch_size': 4}, and were read with {'batch_size': 2}"):
        other.load_state_dict(state)
    assert other.state_dict() == {"epoch": 3, "batches": 0, "num_workers": 0, "batch_size": 4, "processes": 1}
    assert [batch.tolist() for batch, _ in other] == [
        numbers for numbers, _ in epoch_of(module(train_transform=plain).train_dataloader(), 3)
    ]
    # The end of an epoch is the beginning of the next one.
    loader.load_state_dict({**state, "batches": len(loader)})
    assert (loader.state_dict()["epoch"], len(list(loader))) == (4, 17)


class Batches(Callback):
    """Ends a run after some of its batches."""

    def __init__(self, number):
        self.number = number

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.number:
            raise Killed


@pytest.mark.usefixtures("shards")
@pytest.mark.parametrize("workers", [0, 2])
def test_resumes_exactly_in_the_middle_of_an_epoch(workers):
    """33 samples are nine batches. The run ends in its second epoch, before the twelfth batch."""
    whole, labels = train(workers=workers)
    save = ModelCheckpoint("middle", "{step}", save_top_k=-1, every_n_train_steps=11)
    train([save, Batches(12)], workers=workers)
    resumed, rest = train(ckpt_path="middle/step=11.ckpt", workers=workers)
    assert rest == {1: labels[1][2:], 2: labels[2]}
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


@pytest.mark.usefixtures("shards", "no_pictures")
def test_compared_and_made_again_if_a_shard_changes(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lightning-ssesam"])
    options = {"data": module, "seeds": 1, "epochs": 1, "tail_below": 5, "backbone": partial(SmallConvNet, width=8)}
    (run,) = compare("ERM", **options)
    assert run.train_accuracy
    before = module().fingerprint()
    os.utime("shards/train-000003.tar", (1, 1))
    assert module().fingerprint() != before
    compare("ERM", **options)
    assert "already" not in capsys.readouterr().out


def change(name, changed):
    """Write a shard anew, with a function of the name and the content of each member; None leaves it out."""
    with tarfile.open(f"shards/{name}.tar") as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]
    with tarfile.open(f"shards/{name}.tar", "w") as tar:
        for member, content in members:
            if (content := changed(member, content)) is not None:
                about = tarfile.TarInfo(member)
                about.size = len(content)
                tar.addfile(about, io.BytesIO(content))


def once(ending, content):
    """Give the first member with an ending another content."""
    left = [1]

    def changed(name, old):
        return content if name.endswith(ending) and left and left.pop() else old

    return changed


@pytest.mark.usefixtures("shards")
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (once(".cls", None), r"shards/train-000002\.tar to have one picture and one \.cls file .* got 1 and 0 of '000"),
        (once(".png", None), r"got 0 and 1 of '000"),
        (once(".cls", b"cat"), r"label of shards/train-000002\.tar: 0\d+ to be an integer >= 0, but got 'cat'"),
        (once(".cls", b"9" * 4999), r"to be an integer >= 0, but got '9{20}'"),
    ],
)
def test_what_the_index_cannot_be_made_of(damage, message):
    change("train-000002", damage)
    with pytest.raises(ArgumentError, match=message):
        index_shards("shards/train-{000000..000006}.tar")


@pytest.mark.usefixtures("shards")
def test_a_shard_that_is_cut_off_is_named():
    path = Path("shards/train-000002.tar")
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(ArgumentError, match=r"train-000002\.tar, which is of another size"):
        module()
    with pytest.raises(
        ArgumentError, match=r"Expected shards/train-000002\.tar to be a whole tar file, but got an error"
    ):
        index_shards("shards/train-000002.tar")


@pytest.mark.usefixtures("shards")
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (once(".png", b"no picture"), r"shards/train-000002\.tar: 0\d+ to be an image .* Pillow cannot open"),
        (once(".cls", b"7"), r"label of shards/train-000002\.tar: 0\d+ to be in \[0, 3\), but got 7"),
        (once(".cls", None), r"shards/train-000002\.tar: 0\d+ to be one picture with a \.cls file, but got"),
    ],
)
def test_a_bad_sample_is_named_when_it_is_read(damage, message):
    """Its shard has the size of the index."""
    change("train-000002", damage)
    index = json.loads(Path("shards/index.json").read_text())
    index["train-000002.tar"]["size"] = os.path.getsize("shards/train-000002.tar")
    Path("shards/index.json").write_text(json.dumps(index))
    with pytest.raises(ArgumentError, match=message):
        list(module().train_dataloader())


@pytest.mark.usefixtures("shards")
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content, members: content[: members[4].offset], r"to have 5 samples, as its index says, but got 2"),
        (
            lambda content, members: content[: members[4].offset_data + 9],
            r"to be a whole tar file, but got an error, behind the sample 0\d+: ",
        ),
        (lambda content, members: content[: members[5].offset], r"to have 5 samples, as its index says, but got 3"),
        (lambda content, members: b"no tar file" * 999, r"to be a whole tar file, but got an error: "),
        (lambda content, members: content, None),
    ],
)
def test_a_shard_that_is_damaged_later_is_named_when_it_is_read(damage, message):
    """Also where tarfile ends in silence, between two members."""
    path = Path("shards/train-000002.tar")
    data = module()
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    path.write_bytes(damage(path.read_bytes(), members))
    if message is None:
        assert len(list(data.train_dataloader())) == 9
        return
    with pytest.raises(ArgumentError, match=rf"Expected shards/train-000002\.tar.* {message}"):
        list(data.train_dataloader())


@pytest.mark.usefixtures("shards")
def test_a_shard_with_more_samples_than_its_index_says_is_named():
    index = json.loads(Path("shards/index.json").read_text())
    counts = index["train-000002.tar"]["counts"]
    counts[next(iter(counts))] -= 1
    Path("shards/index.json").write_text(json.dumps(index))
    with pytest.raises(ArgumentError, match=r"train-000002\.tar to have 4 samples, as its index says, but got 5\."):
        list(module().train_dataloader())


@pytest.mark.usefixtures("shards")
def test_a_shard_without_its_end_is_not_indexed():
    """tarfile takes it for whole: it is cut off between two members."""
    path = Path("shards/train-000002.tar")
    with tarfile.open(path) as tar:
        end = tar.getmembers()[4].offset
    path.write_bytes(path.read_bytes()[:end])
    with tarfile.open(path) as tar:
        assert len(tar.getnames()) == 4
    with pytest.raises(ArgumentError, match=r"train-000002\.tar to be a whole tar file, but got one without its end"):
        index_shards(str(path))


@pytest.mark.usefixtures("shards")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": torch.utils.data.RandomSampler}, "argument `sampler` to be left out for shards"),
        ({"in_memory": True}, "argument `in_memory` to be left out for shards"),
        (
            {"num_classes": 4},
            r"argument `train` to be shards with images of every class in \[0, 4\), .* such as class 3",
        ),
        ({"num_classes": 2}, r"argument `train` to be shards with images whose labels are in \[0, 2\), .* the label 2"),
        ({"buffer": 0}, "argument `buffer` to be an integer >= 1"),
        ({"image_size": 0}, "argument `image_size`"),
        ({"class_names": ["a"]}, "class_names"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ArgumentError, match=message):
        module(**options)


@pytest.mark.usefixtures("shards")
def test_shards_that_are_not_as_indexed():
    for pattern, message in (
        ("shards/none-*.tar", "a pattern of tar files that exist"),
        ("shards/train-{000000..000007}.tar", r"train-000007\.tar, which is not there"),
    ):
        with pytest.raises(ArgumentError, match=message):
            ImageShardsLT(pattern, "shards/test-*.tar")
    index = Path("shards/index.json")
    content = json.loads(index.read_text())
    del content["train-000001.tar"]
    index.write_text(json.dumps(content))
    with pytest.raises(
        ArgumentError, match=r"index_shards\('?shards/train.*\(?.*got shards/train-000001\.tar, which is new"
    ):
        module()
    for text in ("{", "[]", '{"train-000000.tar": {}}'):
        index.write_text(text)
        with pytest.raises(ArgumentError, match=r"tar files beside an index\.json .* without a readable one"):
            module()
    index_shards("shards/*.tar")
    assert module().class_counts == COUNTS


def test_webdataset_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-ssesam\[streaming\]'"):
        ImageShardsLT("a.tar", "b.tar")
