"""Which changes of settings, code and data let `compare` make its runs again, and which do not."""

import copy
import importlib
import inspect
import json
import logging
import os
import sys
from array import array
from collections import deque
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from helpers import STRICT
from lightning.pytorch.callbacks import ModelSummary, TQDMProgressBar
from PIL import Image
from torch.utils.data import Dataset, TensorDataset, WeightedRandomSampler

import lightning_ssesam
from lightning_ssesam import ERM, SAM, DigitsLT, ImbSAM, StepOptions
from lightning_ssesam.compare import Method, compare
from lightning_ssesam.data import (
    CIFAR10LT,
    ClassBalancedSampler,
    ImageFolderLT,
    ImageListLT,
    LongTailDataModule,
    SquareRootSampler,
)
from lightning_ssesam.data.contents import hash_array, hash_attributes
from lightning_ssesam.experiments.fingerprint import data_factory, describe
from lightning_ssesam.experiments.recipe import Recipe
from lightning_ssesam.experiments.refusals import place_in_user_code
from lightning_ssesam.experiments.sources import is_foreign, is_foreign_file, sources_of
from lightning_ssesam.models import SmallConvNet
from lightning_ssesam.runs import Experiment
from lightning_ssesam.sweep import sweep

pytestmark = STRICT

FILES = {
    "mine.py": """
import functools
import helper
import torch
from lightning.pytorch.callbacks import Callback
from lightning_ssesam import ERM, DigitsLT
from lightning_ssesam.data import ClassBalancedSampler
from lightning_ssesam.losses import BalancedSoftmaxLoss
from lightning_ssesam.models import SmallConvNet
from package.other import WIDTH, Base, activate

SEEDS = 5

class Net(Base):
    def forward(self, x):
        from lazy import late
        return late(helper.scale(activate(super().forward(x))))  # net

class Objective(ERM):
    text = "the objective"

class Loss(BalancedSoftmaxLoss):
    text = "the loss"

class Steps(torch.optim.SGD):
    text = "the optimizer"

class Watch(Callback):
    text = "the callback"

class Sampler(ClassBalancedSampler):
    text = "the sampler"

class Dataset(torch.utils.data.TensorDataset):
    text = "the dataset"

class Data(DigitsLT):
    def make_sets(self):
        return {name: Dataset(*part.tensors) for name, part in super().make_sets().items()}

def backbone(num_classes):
    return Net(num_classes, width=WIDTH)

def unused():
    return "unused"

parts = {
    "objective": Objective, "loss": Loss, "backbone": backbone, "callbacks": [Watch()],
    "optimizer": functools.partial(Steps, lr=0.1), "data": functools.partial(Data, sampler=Sampler),
}
""",
    "helper.py": "import deep\n\ndef scale(x):\n    return x * deep.factor()\n",
    "deep.py": "def factor():\n    return 1\n",
    "lazy.py": "from package import later\n\ndef late(x):\n    return x\n",
    "package/__init__.py": "",
    "package/later.py": "LATER = 1\n",
    "package/other.py": """
from lightning_ssesam.models import SmallConvNet
from .inner import slope

WIDTH = 8
UNUSED = 1

class Base(SmallConvNet):
    text = "the base"

def activate(x):
    return slope(x)
""",
    "package/inner.py": "def slope(x):\n    return x * FACTOR\n\nFACTOR = 2\n",
    "stranger.py": "STRANGER = 1\n",
}


@pytest.fixture
def with_files(monkeypatch):
    """Returns the fingerprint of a training whose parts come from files that are read anew."""
    monkeypatch.syspath_prepend(str(Path.cwd()))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    own = {"mine", "helper", "deep", "lazy", "stranger", "package"}

    def fingerprint(files):
        for name in [name for name in sys.modules if name.partition(".")[0] in own]:
            del sys.modules[name]
        for name, text in files.items():
            Path(name).parent.mkdir(exist_ok=True)
            Path(name).write_text(text)
        importlib.invalidate_caches()
        parts = importlib.import_module("mine").parts
        return Experiment("name", **parts).fingerprint(DigitsLT().split(tail_fraction=0.2))

    yield fingerprint
    for name in [name for name in sys.modules if name.partition(".")[0] in own]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("file", "old", "new", "counts"),
    [
        ("mine.py", "# net", "# a comment", True),
        *(
            ("mine.py", f'"the {part}"', f'"another {part}"', True)
            for part in ("objective", "loss", "optimizer", "callback")
        ),
        *(("mine.py", f'"the {part}"', f'"another {part}"', True) for part in ("sampler", "dataset")),
        ("mine.py", "width=WIDTH)", "width=WIDTH, norm='batch')", True),
        ("package/other.py", '"the base"', '"another base"', True),
        ("package/other.py", "WIDTH = 8", "WIDTH = 16", True),
        ("package/other.py", "slope(x)", "-slope(x)", True),
        ("package/inner.py", "x * FACTOR", "x + FACTOR", True),
        ("package/inner.py", "FACTOR = 2", "FACTOR = 3", True),
        ("helper.py", "return x *", "return x +", True),
        ("deep.py", "return 1", "return 2", True),
        ("lazy.py", "return x", "return 2 * x", True),
        ("package/later.py", "LATER = 1", "LATER = 2", True),
        ("mine.py", "SEEDS = 5", "SEEDS = 6", False),
        ("mine.py", '"unused"', '"never used"', False),
        ("package/other.py", "UNUSED = 1", "UNUSED = 2", False),
        ("stranger.py", "STRANGER = 1", "STRANGER = 2", False),
    ],
)
def test_code_counts_where_it_is_used(file, old, new, counts, with_files):
    before = with_files(FILES)
    assert with_files(FILES) == before
    assert old in FILES[file]
    after = with_files({**FILES, file: FILES[file].replace(old, new)})
    assert (after != before) == counts
    assert with_files(FILES) == before


def test_code_of_lambdas_and_functions_within_functions():
    def make(width):
        return lambda num_classes: SmallConvNet(num_classes, width=width)

    def codes(value):
        return sources_of([value])

    assert codes(make(8)) == codes(make(8)) != codes(make(16))
    assert codes(lambda x: x + 1) == codes(lambda x: x + 1)
    assert codes(lambda x: x + 1) != codes(lambda x: x + 2)
    assert codes(lambda x, y=1: x + y) != codes(lambda x, y=2: x + y)
    assert codes(lambda x: x in {"a", "b"}) == codes(lambda x: x in {"b", "a"})
    assert codes(lambda: lambda: 1) != codes(lambda: lambda: 2)
    assert codes(partial(make, 8)) == codes(partial(make, 8))
    assert codes({"transform": [lambda x: -x]}) != codes({"transform": [lambda x: x]})


def test_code_without_a_file():
    """As at a prompt."""
    found = []
    for number in (1, 2):
        names = {"__name__": "__main__"}
        exec(f"class Net:\n    width = 8\n    def forward(self, x):\n        return x * {number}\n", names)
        found.append(sources_of([names["Net"]]))
    assert found[0] != found[1]


def test_installed_code_is_left_out():
    found = sources_of([torch.nn.Linear(2, 2), np.mean, os.path.join, SmallConvNet, DigitsLT()])
    names = {text.partition(" ")[0] for text in found}
    assert names - {"lightning-ssesam"} == {"torch", "torchvision", "torchmetrics", "lightning", "numpy"}
    assert [is_foreign(name) for name in ("torch.nn", "json", "lightning_ssesam.cli", "__main__")] == [False] * 3 + [
        True
    ]


@pytest.mark.parametrize("name", ["torch", "lightning", "torchvision", "torchmetrics", "pillow"])
def test_versions_of_installed_packages_count(name, monkeypatch):
    class Picture(Image.Image):
        pass

    def version(of):
        return "99" if of == name else known(of)

    known, before = metadata.version, sources_of([Picture])
    assert sources_of([Picture]) == before
    monkeypatch.setattr(metadata, "version", version)
    assert sources_of([Picture]) != before


def test_which_files_are_the_users(tmp_path):
    package = Path(inspect.getfile(lightning_ssesam)).parent
    folders = {
        package / "data": False,
        package.with_name("lightning_ssesam_mine"): True,
        Path("/home/user/.local/lib/python3.12/site-packages/torch"): False,
        Path("/usr/lib/python3/dist-packages/torch"): False,
        Path(json.__file__).parent: False,
        Path(sys.executable).parent: False,
        tmp_path: True,
    }
    for folder, is_of_user in folders.items():
        file = str(folder / "net.py")
        names = {}
        exec(compile("def fail():\n    raise ValueError('here')", file, "exec"), names)
        with pytest.raises(ValueError, match="here") as error:
            names["fail"]()
        # The traceback begins in this file, which is the user's.
        place = place_in_user_code(error.value)
        assert (is_foreign_file(file), place.file == file) == (is_of_user, is_of_user), folder


def fingerprint(**parts):
    experiment = Experiment("name", **{"objective": ERM, "epochs": 2, **parts})
    return experiment.fingerprint(experiment.make_split(experiment.data()))


@pytest.mark.parametrize(
    "parts",
    [
        {"data": partial(DigitsLT, num_workers=3)},
        {"threads": 4},
        {"trainer": {"accelerator": "cpu", "devices": 1, "enable_progress_bar": True, "log_every_n_steps": 3}},
        {"trainer": {"default_root_dir": "elsewhere", "logger": True, "profiler": "simple"}},
        {"callbacks": [TQDMProgressBar(refresh_rate=3)]},
        {"callbacks": [ModelSummary(max_depth=3)]},
    ],
)
def test_what_only_speed_depends_on_does_not_count(parts):
    assert fingerprint(**parts) == fingerprint()


class Shift:
    def __init__(self, by):
        self.by = by

    def __call__(self, image):
        return image


class Scale(torch.nn.Module):
    def __init__(self, by):
        super().__init__()
        self.by = by


def nested(depth, value):
    return [nested(depth - 1, value)] if depth else value


def test_containers_that_contain_themselves():
    values, options, shift = [1], {"a": 1}, Shift(1)
    values.append(values)
    options["options"] = options
    shift.by = [shift]
    for value in (values, options, shift):
        assert describe(value) == describe(value)
    assert describe(values) != describe([2, values])
    # The same object twice is no circle.
    assert describe([[1], [1]]) == describe([[1]] * 2)


def test_settings_that_a_repr_hides():
    pairs = [
        ({"shift": Shift(1)}, {"shift": Shift(2)}),
        (Scale(1.0), Scale(2.0)),
        (np.arange(5000) % 7, np.arange(5000) % 7 + (np.arange(5000) == 2500)),
        ([torch.zeros(5000)], [torch.zeros(5000).index_fill(0, torch.tensor([2500]), 1)]),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        (partial(Shift, 1), partial(Shift, 2)),
        (Shift([Shift(1)]), Shift([Shift(2)])),
    ]
    for one, other in [*pairs, (nested(9, 1), nested(9, 2))]:
        assert describe(one) != describe(other)
        assert describe(one) == describe(one)
    # The order of a set is that in which its values came, and another one in the next process.
    assert list({0, 8}) != list({8, 0})
    assert describe({0, 8}) == describe({8, 0})
    assert describe({"a": 1, "b": 2}) == describe({"b": 2, "a": 1})
    assert "0x" not in describe([Shift(1), lambda: 1, Shift(1).__call__])


def test_weights_that_a_factory_reads_count(tmp_path):
    def net(num_classes, weights):
        return SmallConvNet(num_classes)

    Path("weights.pt").write_bytes(b"one")
    before = fingerprint(backbone=partial(net, weights="weights.pt"))
    assert fingerprint(backbone=partial(net, weights="weights.pt")) == before
    Path("weights.pt").write_bytes(b"other")
    assert fingerprint(backbone=partial(net, weights="weights.pt")) != before


def draw(path, size=(4, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)
    os.utime(path, ns=(10**18, 10**18))


@pytest.fixture
def images():
    for name, number in (("cat", 12), ("dog", 6)):
        for k in range(number):
            draw(Path("images", name, f"{k:02}.png"))
    for part in ("train", "test"):
        Path(f"{part}.txt").write_text(
            "".join(f"{name}/0{k}.png {y}\n" for y, name in enumerate(("cat", "dog")) for k in range(4))
        )
    return Path("images")


MODULES = {
    "folders": lambda root, **kwargs: partial(ImageFolderLT, root, **kwargs),
    "lists": lambda root, **kwargs: partial(ImageListLT, "train.txt", "test.txt", root=root, **kwargs),
}
rgb = partial(SmallConvNet, in_channels=3)


@pytest.mark.parametrize("kind", MODULES)
def test_images_count(kind, images):
    def found():
        return fingerprint(data=MODULES[kind](images), backbone=rgb)

    before = found()
    image = images / "dog" / "02.png"
    os.utime(image, ns=(10**18, 2 * 10**18))
    assert found() != before
    draw(image, (50, 70))
    assert found() != before
    draw(image)
    assert found() == before
    if kind == "folders":
        image.rename(images / "dog" / "20.png")
    else:
        Path("test.txt").write_text(Path("test.txt").read_text() + "cat/05.png 0\n")
    assert found() != before


@pytest.mark.parametrize("kind", MODULES)
def test_how_a_path_is_written_does_not_count(kind, images):
    Path("link").symlink_to(images)
    ways = ["images", "./images", "images/", "link", str(images.absolute()), images, Path("images/../images")]
    make = MODULES[kind]
    texts = {fingerprint(data=make(way), backbone=rgb) for way in ways}
    assert len(texts | {fingerprint(data=make("images", num_workers=2), backbone=rgb)}) == 1
    if kind == "lists":
        Path("link.txt").symlink_to("train.txt")
        linked = partial(ImageListLT, "link.txt", Path("./test.txt"), root="images")
        assert {fingerprint(data=linked, backbone=rgb)} == texts
    assert fingerprint(data=make("images", image_size=225), backbone=rgb) not in texts


def test_a_text_does_not_become_a_path():
    def settings(text):
        return describe(data_factory(partial(DigitsLT, profile=text)))

    texts = ("exponential", "a/b")
    before = {text: settings(text) for text in texts}
    Path("exponential").mkdir()
    assert settings("exponential") == before["exponential"] != before["a/b"]
    # But one with a folder is a path, and so is a link.
    Path("link").symlink_to("exponential")
    ways = ["./exponential", "link", os.path.abspath("exponential"), Path("exponential"), "exponential/"]
    assert {settings(way) for way in ways} == {before["exponential"]}


class Points(LongTailDataModule):
    def __init__(self, path="points.npy", **kwargs):
        super().__init__(**kwargs)
        self.path, self.class_counts = path, [6, 2]

    def make_sets(self):
        values = torch.from_numpy(np.load("points.npy"))
        labels = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1])
        return dict.fromkeys(("train", "val", "test"), TensorDataset(values, labels))


class Table(LongTailDataModule):
    """Names its file, and has loaders of its own."""

    def __init__(self, path):
        super().__init__()
        self.path, self.class_counts = path, [6, 2]


class Named(Points):
    def fingerprint(self):
        return Path("version.txt").read_text()


def test_data_modules_of_a_user(tmp_path):
    values = np.random.default_rng(0).random((8, 1, 8, 8))
    np.save("points.npy", values)
    state = torch.get_rng_state()
    before = fingerprint(data=Points)
    assert torch.get_rng_state().equal(state)
    os.utime("points.npy", ns=(10**18, 10**18))
    named = fingerprint(data=partial(Table, "points.npy"))
    assert fingerprint(data=partial(Table, "./points.npy")) == named
    values[7, 0, 0, 0] += 1e-9
    np.save("points.npy", values)
    assert fingerprint(data=Points) != before
    assert fingerprint(data=partial(Table, "points.npy")) != named
    Path("version.txt").write_text("1")
    one = fingerprint(data=Named)
    np.save("points.npy", values + 1)
    assert fingerprint(data=Named) == one
    Path("version.txt").write_text("2")
    assert fingerprint(data=Named) != one


class Records(Dataset):
    def __init__(self, records):
        self._records = records


@dataclass
class Record:
    path: str
    label: int


@dataclass
class SlottedRecord:
    __slots__ = ("label",)
    label: int


CHANGES = [
    ([{"pixels": [0.0, 0.0], "label": 0}], [{"pixels": [0.0, 1.0], "label": 0}]),
    ([{"pixels": torch.zeros(2), "label": 0}], [{"pixels": torch.zeros(2), "label": 1}]),
    ([{"pixels": torch.zeros(2)}], [{"pixels": torch.ones(2)}]),
    ([("a.jpg", np.int64(1))], [("a.jpg", np.int64(2))]),
    ({"a.jpg": 1}, {"a.jpg": 2}),
    ({1: "a"}, {2: "a"}),
    ([None, torch.zeros(2)], [None, torch.ones(2)]),
    ({1, 2}, {1, 3}),
    (frozenset("a"), frozenset("b")),
    (b"a", b"b"),
    ([bytearray(b"a")], [bytearray(b"b")]),
    (array("i", [1]), array("i", [2])),
    ([Record("a.jpg", 1)], [Record("a.jpg", 2)]),
    ([Record("a.jpg", 1)], [Record("b.jpg", 1)]),
    ([SlottedRecord(1)], [SlottedRecord(2)]),
    ([SimpleNamespace(label=1)], [SimpleNamespace(label=2)]),
    ([[[1]], [[2]]], [[[1]], [[3]]]),
    ([[["a"]]], [[["b"]]]),
    ([["a", "b"]], [["a"], ["b"]]),
    (np.array([[1], [1, 2]], dtype=object), np.array([[1], [1, 3]], dtype=object)),
    (deque([1]), deque([2])),
    (range(3), range(4)),
    (1.0, 2.0),
]


@pytest.mark.parametrize(("before", "after"), CHANGES)
def test_changed_contents_count(before, after):
    def found(records):
        data = Points()
        data._sets = {"train": Records(copy.deepcopy(records))}
        return hash_attributes(data)

    assert found(before) == found(before) != found(after)


def test_contents_with_circles_and_settings(caplog):
    def found(**attributes):
        data = Points(num_workers=attributes.pop("num_workers", 0))
        data._sets = {"train": (records := Records([[1, 2]]))}
        records.module, records._records[0][0] = data, records
        vars(records).update(attributes)
        return hash_attributes(data)

    Path("images").mkdir()
    before = found(root="images")
    assert found(root="images", num_workers=2) == before != found(root="other")
    assert found(root="./images") == found(root=os.path.abspath("images")) == before
    # Neither code nor what changes by itself is contents.
    outside = {"log": logging.getLogger("records"), "net": torch.nn.Linear(2, 2), "code": os, "kind": Record}
    texts = {found(**outside)}
    outside["log"].setLevel("DEBUG")
    assert texts == {found(**outside)}


def test_files_count_wherever_they_are_named():
    Path("a.jpg").write_text("1")
    for records in ([["a.jpg"]], {"a.jpg": 1}, [Record("a.jpg", 1)], np.array(["a.jpg"], dtype=object)):
        os.utime("a.jpg", ns=(10**18, 10**18))
        before = hash_attributes(Records(records))
        os.utime("a.jpg", ns=(10**18, 2 * 10**18))
        assert hash_attributes(Records(records)) != before


def test_all_elements_of_a_large_array_count(monkeypatch):
    monkeypatch.setattr("lightning_ssesam.data.contents._CHUNK", 4)
    for make in (torch.tensor, np.array):
        for position in range(10):
            assert hash_array(make([0] * 10)) != hash_array(make([int(k == position) for k in range(10)]))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.bool, torch.int64, torch.complex64])
def test_arrays_of_any_type(kind):
    tensor = torch.zeros(4, 3, dtype=kind)
    other = tensor.clone()
    other[3, 2] = 1
    assert hash_array(tensor) == hash_array(tensor.clone()) != hash_array(other)
    assert hash_array(tensor.t()) == hash_array(tensor.t().contiguous())
    assert hash_array(torch.tensor(1)) != hash_array(torch.tensor(2))
    assert hash_array(other.real.float().to_sparse()) == hash_array(other.real.float())
    names = np.array(["a", "b"], dtype=object)
    assert hash_array(names) == hash_array(names.copy()) != hash_array(names[::-1])


def test_published_data_are_not_read(monkeypatch):
    for module in (CIFAR10LT, DigitsLT):
        monkeypatch.setattr(module, "prepare_data", lambda self: pytest.fail("read"))
        assert module().fingerprint() == ""


def test_a_method_may_have_a_sampler_of_its_own():
    methods = {
        "plain": Method(ERM),
        "balanced": Method(ERM, sampler=ClassBalancedSampler),
        "root": Method(ERM, sampler=SquareRootSampler, data=partial(DigitsLT, seed=3, sampler=ClassBalancedSampler)),
    }
    made = {name: method.experiment(name, Recipe(), 0.7) for name, method in methods.items()}
    modules = {name: experiment.data() for name, experiment in made.items()}
    assert {name: data.sampler for name, data in modules.items()} == {
        "plain": None,
        "balanced": ClassBalancedSampler,
        "root": SquareRootSampler,
    }
    assert [data.seed for data in modules.values()] == [0, 0, 3]
    assert isinstance(modules["balanced"].train_dataloader().sampler, ClassBalancedSampler)
    split = DigitsLT().split(tail_fraction=0.2)
    assert len({experiment.fingerprint(split) for experiment in made.values()}) == 3


class Counted(DigitsLT):
    calls: ClassVar = []

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.calls.append("made")

    def check_files(self):
        self.calls.append("checked")

    def make_sets(self):
        self.calls.append("read")
        return super().make_sets()


@pytest.mark.parametrize("command", [compare, sweep])
def test_data_are_made_and_read_once_before_training(command, monkeypatch):
    class Planned(Exception):
        pass

    def stop(folder):
        raise Planned

    monkeypatch.setattr(Counted, "calls", calls := [])
    monkeypatch.setattr(f"{command.__module__}.make_folder", stop)
    methods = {"one": Method(ERM), "two": Method(SAM), "three": Method(ImbSAM, sampler=ClassBalancedSampler)}
    with pytest.raises(Planned):
        command(methods, data=Counted, epochs=1)
    assert calls[0] == "made"
    assert sorted(calls) == ["checked", "made", "read"]


def weighted(labels, weights):
    return WeightedRandomSampler(weights[labels], len(labels))


def test_arrays_of_a_sampler_count():
    weights = torch.zeros(5000), torch.zeros(5000).index_fill(0, torch.tensor([2500]), 1)
    methods = [Method(ERM, sampler=partial(weighted, weights=values)) for values in weights]
    data, split = DigitsLT(), DigitsLT().split(tail_fraction=0.2)
    made = [method.experiment("name", Recipe(), 0.7) for method in methods]
    assert len({experiment.fingerprint(split, "", data) for experiment in made}) == 2


def test_recorded_steps_are_the_same_run():
    # The text of versions that had no such option.
    text = describe(StepOptions(interval=2))
    assert text.startswith("StepOptions(passes='auto', batch_norm_statistics='batch', interval=2, ")
    assert text.endswith(", exact_resume=True, log_loss=True)")
    full = describe(StepOptions(passes="full", interval=2))
    assert {describe(StepOptions(passes=p, interval=2, cuda_graphs=True)) for p in ("auto", "full")} == {full}
