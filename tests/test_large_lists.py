"""Data sets of millions of images: memory, the checks before training, and times that do not grow with the classes."""

import hashlib
import os
import pickle
import random
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
from helpers import STRICT
from PIL import Image
from torch.utils.data import DataLoader

from lightning_ssesam.data import (
    ClassBalancedSampler,
    ImageFolderLT,
    ImageList,
    ImageListLT,
    ImageTableLT,
    image_files,
    packed,
    samplers,
)
from lightning_ssesam.data.image_files import check_images, looked_at, spread_paths
from lightning_ssesam.data.listed import ListedImages
from lightning_ssesam.data.packed import PackedTexts
from lightning_ssesam.errors import ArgumentError
from lightning_ssesam.experiments.pictures import find_pictures

pytestmark = STRICT

TEXTS = ["a/b.png", "", "ünï/日本.png", "caf\udce9.png", "x" * 999, "a/b.png", "7"]


@pytest.mark.parametrize("part", [2, 2**16])
def test_packed_texts_are_the_texts(part, monkeypatch):
    """File names that are not UTF-8, too. In parts, and whole."""
    monkeypatch.setattr(packed, "_PART", part)
    texts = PackedTexts.pack(iter(TEXTS))
    assert list(texts) == [texts[k] for k in range(7)] == TEXTS
    assert (len(texts), texts[-1], texts[-7]) == (7, "7", TEXTS[0])
    assert list(texts[1:6:2]) == TEXTS[1:6:2]
    chosen = texts.take(torch.tensor([4, 0, 2, 2]))
    assert list(pickle.loads(pickle.dumps(chosen))) == [TEXTS[k] for k in (4, 0, 2, 2)]
    assert list(chosen.take(torch.tensor([1]))) == [TEXTS[0]]
    assert (list(PackedTexts.pack([])), "7" in texts, "8" in texts) == ([], True, False)
    for index in (7, -8):
        with pytest.raises(IndexError):
            texts[index]


def test_memory_of_listed_images():
    """A list of pairs takes more than 200 bytes an image, and each worker copies it."""
    number = 100_000
    samples = ((f"root/a class/the name of image {k:09d}.jpg", k % 100) for k in range(number))
    tracemalloc.start()
    images = ListedImages.pack(samples)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    characters = len(images.path(0))
    # The buffers are traced and the labels are torch's. A buffer that grows has some room at its end.
    assert held < (characters * 1.2 + 12) * number
    assert images.path(99_999) == "root/a class/the name of image 000099999.jpg"
    assert images.targets.tolist() == [k % 100 for k in range(number)]
    chosen = images.choose(torch.arange(0, number, 7))
    assert chosen.samples == images.samples[::7]


class Lookups(torch.utils.data.Dataset):
    """The own memory of a worker in kB, which asks for a path."""

    def __init__(self, images):
        self.images = images

    def __getitem__(self, index):
        assert self.images.path(index)
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines() if index % 20_000 == 0 else []
        return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty"))

    def __len__(self):
        return len(self.images)


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
def test_a_worker_copies_no_paths():
    images = ListedImages.pack((f"root/a class/the name of image {k:09d}.jpg", 0) for k in range(200_001))
    loader = DataLoader(Lookups(images), batch_size=20_000, num_workers=1, multiprocessing_context="fork")
    memory = [int(batch.max()) for batch in loader]
    # A list of these paths has 20 MB, and its reference counts are on all of its pages.
    assert memory[-2] - memory[0] < 5_000


@pytest.fixture
def files():
    """Lists of ten and four images, whose files are empty at 3, 4 and 9."""
    for name, number in (("train", 10), ("test", 4)):
        for k in range(number):
            Path(name, str(k % 2)).mkdir(parents=True, exist_ok=True)
            path = Path(name, str(k % 2), f"{k}.png")
            Image.new("RGB", (8, 8), (k, 0, 0)).save(path)
        Path(f"{name}.txt").write_text("".join(f"\n{name}/{k % 2}/{k}.png {k % 2}\n" for k in range(number)))


def module(limit=None, kind="list"):
    options = {"image_size": 8, "num_workers": 0, "max_checked_files": limit}
    if kind == "folder":
        Path("folder").mkdir(exist_ok=True)
        for name in ("train", "test"):
            if not Path("folder", name).exists():
                Path("folder", name).symlink_to(Path(name).resolve())
        return ImageFolderLT("folder", val_fraction=0, **options)
    if kind == "table":
        rows = [
            f"{name}/{k % 2}/{k}.png,{k % 2},{name}\n" for name, n in (("train", 10), ("test", 4)) for k in range(n)
        ]
        if not Path("table.csv").exists():
            Path("table.csv").write_text("file,labels,split\n" + "".join(rows))
        return ImageTableLT("table.csv", **options)
    return ImageListLT("train.txt", "test.txt", **options)


@pytest.mark.parametrize("number", [1, 2, 5, 10, 17])
@pytest.mark.parametrize("limit", [None, 0, 1, 2, 3, 5, 16, 17, 40])
def test_files_that_are_looked_at_are_spread_evenly(number, limit):
    Path("list.txt").write_text("".join(f"{k} 0\n" for k in range(number)))
    found = list(spread_paths(ImageList("list.txt", "."), limit))
    chosen = number if limit is None else min(number, limit)
    assert found == [(k * number // chosen, f"./{k * number // chosen}") for k in range(chosen)]
    assert looked_at(number, limit) == chosen


@pytest.mark.usefixtures("files")
def test_a_limit_of_the_check(monkeypatch):
    """Of ten files, five are looked at: 0, 2, 4, 6 and 8. Of four, all are."""
    said, seen = [], []
    monkeypatch.setattr(image_files, "rank_zero_info", said.append)
    plain = image_files.find_problem
    monkeypatch.setattr(image_files, "find_problem", lambda path, limit: seen.append(path) or plain(path, limit))
    sets = list(module().file_sets().values())
    check_images(sets)
    assert (len(seen), said) == (14, [])
    seen.clear()
    check_images(sets, 5)
    assert sorted(seen) == sorted(
        [f"./train/0/{k}.png" for k in range(0, 10, 2)] + [f"./test/{k % 2}/{k}.png" for k in range(4)]
    )
    others = "Damage in the others is found when they are read. `max_checked_files=None` looks at all."
    assert said == [f"9 of 14 image files are looked at before training. {others}"]
    for number in (3, 9):
        Path(f"train/1/{number}.png").write_bytes(b"")
    module(5).check_files()
    with pytest.raises(
        ArgumentError, match=r"Expected 14 files to be images .* but got 2 that .* line 8: .* line 20: "
    ):
        module().check_files()
    Path("train/0/4.png").write_bytes(b"")
    with pytest.raises(ArgumentError, match=r"train\.txt, line 10: Expected \./train/0/4\.png to be an image"):
        check_images(sets, 5)
    check_images(sets, 0)


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("kind", ["list", "folder", "table"])
def test_a_limit_of_the_fingerprint(kind):
    """With a limit, only files that are looked at count by size and time. All count by name."""
    chosen = next(path for _, path in list(spread_paths(module(kind=kind).file_sets()["train"], 5))[1:])
    other = list(module(kind=kind).file_sets()["train"].paths())[1]
    before = {limit: module(limit, kind).fingerprint() for limit in (None, 10, 5, 0)}
    # As many files as the limit are all of them, as before there was one.
    assert before[None] == before[10] != before[5] != before[0]
    os.utime(other, ns=(1, 1))
    after = {limit: module(limit, kind).fingerprint() for limit in before}
    assert [after[limit] == before[limit] for limit in before] == [False, False, True, True]
    os.utime(chosen, ns=(1, 1))
    changed = {limit: module(limit, kind).fingerprint() for limit in before}
    assert [changed[limit] == after[limit] for limit in before] == [False, False, False, True]
    if kind == "folder":
        Path(other).rename(Path(other).with_name("a new name.png"))
        assert module(5, kind).fingerprint() != changed[5]


@pytest.mark.usefixtures("files")
def test_fingerprint_of_a_list_without_a_limit_is_as_it_was():
    def hashed(paths, above):
        found = hashlib.sha256()
        for path in paths:
            state = os.stat(path)
            found.update(f"{path[above:]}\0{state.st_size} {state.st_mtime_ns}\0".encode())
        return found.hexdigest()

    images = [f"./{name}/{k % 2}/{k}.png" for name, number in (("train", 10), ("test", 4)) for k in range(number)]
    lists = [os.path.abspath(name) for name in ("train.txt", "test.txt")]
    expected = f"{hashed(lists, len(os.getcwd()) + 1)} {hashed(images, 2)}"
    assert module().fingerprint() == module(500_000).fingerprint() == expected


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("limit", [-1, 1.5, True, "all"])
def test_bad_limits(limit):
    with pytest.raises(ArgumentError, match=r"argument `max_checked_files` to be an integer >= 0, but got"):
        module(limit)


@pytest.mark.parametrize("part", [7, 2**16])
def test_draws_come_in_parts(part, monkeypatch):
    """As a list of all draws, also for a process of several."""
    monkeypatch.setattr(samplers, "_PART", part)
    sampler = ClassBalancedSampler([0] * 50 + [1] * 5, num_samples=101)
    assert list(sampler) == sampler._draw().tolist()
    everything = sampler._draw().tolist() + sampler._draw()[:1].tolist()
    sampler.share(num_replicas=2, rank=1)
    assert list(sampler) == everything[1::2]


def test_memory_of_an_epoch_of_draws():
    sampler = ClassBalancedSampler(torch.arange(400_000) % 10)
    tracemalloc.start()
    assert sum(1 for _ in sampler) == 400_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # As Python integers, all draws take 14 MB.
    assert peak < 5e6


def plain_divide(line, names):
    """The class at the end of a line, looked for by every name."""
    for name in sorted(names, key=len, reverse=True):
        path = line.removesuffix(name)
        if path != line and path.rstrip() not in ("", path):
            return path.rstrip(), names.index(name)
    path, _, label = line.rpartition(" ") if " " in line else line.rpartition("\t")
    is_index = label.isascii() and label.isdigit() and len(label) < 10 and int(label) < len(names)
    return (path.rstrip(), int(label)) if path and is_index else None


def test_labels_of_a_list_are_those_of_a_plain_search():
    names = ["cat", "big cat", "a big cat", "7", "t", "dog\tfox", "ünï 1", "12"]
    draws = random.Random(0)
    for _ in range(300):
        parts = draws.choices([*names, " ", "\t", "x.png", "/", "3", "99"], k=draws.randrange(1, 6))
        line = draws.choice(["", " ", "\t"]).join(parts).strip()
        Path("list.txt").write_text(f"{line}\n")
        if not line or len(line.splitlines()) > 1:
            continue
        expected = plain_divide(line, names)
        if expected is None:
            with pytest.raises(ArgumentError, match="line 1: Expected a path and the name or the index of a class"):
                find_pictures(Path("list.txt"), names, is_labelled=True)
        else:
            assert find_pictures(Path("list.txt"), names, is_labelled=True) == ([str(Path(expected[0]))], [expected[1]])


def test_time_of_a_labelled_list_does_not_grow_with_the_classes():
    def seconds(number):
        names = [f"a class {k}" for k in range(number)]
        Path("list.txt").write_text("".join(f"{k}.png a class {k % number}\n" for k in range(2000)))
        start = time.process_time()
        assert find_pictures(Path("list.txt"), names, is_labelled=True).labels == [k % number for k in range(2000)]
        return time.process_time() - start

    assert seconds(8000) < 5 * seconds(8) + 0.1


def test_paths_of_a_list_are_read_in_one_go(monkeypatch):
    monkeypatch.setattr("lightning_ssesam.data.image_list._PART", 3)
    Path("list.txt").write_text("".join(f"\n{k} a.png {k}\n" for k in range(10)))
    images = ImageList("list.txt")
    assert list(images.paths()) == [images.path(k) for k in range(10)] == [f"./{k} a.png" for k in range(10)]
    Path("list.txt").write_text("".join(f"\n{k} a.png {k + (k == 7)}\n" for k in range(10)))
    with pytest.raises(ArgumentError, match=r"list\.txt, line 16: Expected the line that was here"):
        list(images.paths())
