"""Samples picked from batches of every form: each with its own targets, or refused by name."""

import copy
from collections import OrderedDict, UserDict, deque, namedtuple
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    OBJECTIVES,
    SPLIT,
    STRICT,
    Model,
    assert_same_bits,
    batches,
    batches_loader,
    fit,
    mlp,
    naive_gradient,
    trainer,
)
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from lightning_ssesam import SSESAM
from lightning_ssesam.curvature import Hessian
from lightning_ssesam.selection import SelectionError, pick_samples

pytestmark = STRICT

N = 6
INDEX = torch.tensor([1, 4, 4])
WAYS_OUT = r"Override `select_samples\(self, batch, index\)` in `M`, or .*StepOptions\(passes='full'\)"


def pick(item, size=N):
    return pick_samples(item, INDEX % size, size, "M")


Named = namedtuple("Named", "x names")


@dataclass
class Data:
    x: Tensor
    names: list
    temperature: float = 1.0
    total: Any = field(default=None, init=False)

    def __post_init__(self):
        self.total = len(self.x)

    @cached_property
    def mean(self):
        return self.x.mean()


@dataclass(frozen=True)
class Frozen:
    __slots__ = ("names", "x")
    x: Tensor
    names: tuple


@dataclass(slots=True)
class Slots:
    x: Tensor
    names: tuple


class Encoding(UserDict):
    """As transformers' BatchEncoding: encodings beside the data, attributes from the data."""

    def __init__(self, data=None, encodings=None):
        super().__init__(data)
        self._encodings = encodings

    def __getattr__(self, name):
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError from None


X, NAMES = torch.arange(2.0 * N).reshape(N, 2), [f"{n}.png" for n in range(N)]
RAGGED = [torch.full((length, 2), float(number)) for number, length in enumerate([3, 6, 1, 2, 6, 4])]


class TestForms:
    def test_rows_and_names_of_one_container(self):
        for make in (Named, Data, Frozen, Slots):
            picked = pick(make(X, NAMES))
            assert type(picked) is make
            assert torch.equal(picked.x, X[INDEX])
            assert list(picked.names) == ["1.png", "4.png", "4.png"]

    def test_mappings(self):
        data = {"x": X, "names": NAMES, "scale": torch.tensor(2.0)}
        for make in (dict, OrderedDict, UserDict, Encoding, MappingProxyType):
            batch = make(data)
            picked = pick(batch)
            assert type(picked) is type(batch)
            assert torch.equal(picked["x"], X[INDEX])
            assert picked["names"] == ["1.png", "4.png", "4.png"]
            assert picked["scale"] == 2
            assert len(batch["names"]) == N
        picked = pick(Encoding(data, encodings=[object() for _ in range(N)]))
        assert len(picked._encodings) == 3
        assert torch.equal(picked.x, X[INDEX])

    def test_dataclass_keeps_what_is_not_of_a_sample(self):
        batch = Data(X, NAMES, temperature=0.5)
        assert batch.mean == X.mean()
        picked = pick(batch)
        # No constructor has run, and what was computed for all samples is not kept.
        assert (picked.temperature, picked.total, picked.mean) == (0.5, N, X[INDEX].mean())
        assert len(batch.names) == len(batch.x) == N

    @pytest.mark.parametrize("make", [list, tuple, deque])
    def test_one_tensor_for_each_sample(self, make):
        for samples in (
            RAGGED,
            [t.numpy() for t in RAGGED],
            [{"boxes": t} for t in RAGGED],
            [(t, "a") for t in RAGGED],
        ):
            picked = pick({"x": make(samples), "y": X})["x"]
            assert type(picked) is make
            assert [a is samples[i] for a, i in zip(picked, INDEX.tolist(), strict=True)] == [True] * 3

    def test_images_of_several_sizes_and_none(self):
        gray = [torch.zeros(5, 5), torch.zeros(3, 5, 5)] * 3
        assert [t.ndim for t in pick([gray, X])[0]] == [3, 2, 2]
        several = [torch.zeros(5, 5), torch.zeros(3, 5, 5, dtype=torch.uint8)] * 3
        assert [t.ndim for t in pick([several, X])[0]] == [3, 2, 2]
        assert pick({"masks": [None, X, None, None, X[:4], None]})["masks"][1] is not None

    def test_arrays(self):
        picked = pick({"x": X.numpy(), "id": np.array(NAMES), "scale": np.array(3.0), "other": np.zeros(2)})
        assert np.array_equal(picked["x"], X[INDEX].numpy())
        assert picked["id"].tolist() == ["1.png", "4.png", "4.png"]
        assert picked["other"].shape == (2,)

    def test_what_belongs_to_no_sample_stays(self):
        config = SimpleNamespace(depth=3)
        for item in ("abcdef", b"abcdef", None, 3, torch.Size([1] * N), {1, 2, 3, 4, 5, 6}, config, torch.float32):
            assert pick({"item": item, "x": X})["item"] is item

    def test_views_of_a_batch(self):
        first, second = pick({"views": [X, -X], "y": X[:, 0]})["views"]
        assert torch.equal(first, -second)
        assert torch.equal(first, X[INDEX])


class TestSmallBatches:
    """A list as long as the batch may hold samples, or parts for all samples."""

    def test_told_by_the_kinds(self):
        x, y = torch.randn(2, 8), torch.tensor([0, 1])
        for batch in ((x, y), (x, x[:, 0]), [x, y.double()]):
            picked = pick_samples(batch, torch.tensor([1]), 2, "M")
            assert [len(part) for part in picked] == [1, 1]
            assert torch.equal(picked[0], x[1:])
        assert [len(p) for p in pick_samples((x, x + 1), torch.tensor([1]), 2, "M")] == [1, 1]

    def test_one_sample(self):
        x = torch.randn(1, 8)
        assert torch.equal(pick_samples({"views": [x]}, torch.tensor([0]), 1, "M")["views"][0], x)

    @pytest.mark.parametrize("item", [[X[:3], X[3:], X[:3]], [["a", "b", "c"]] * 3, [{"x": X[:3]}] * 3])
    def test_refused_where_both_are_possible(self, item):
        with pytest.raises(SelectionError, match=rf"`batch\['views'\]` is a list of 3 items of length 3. {WAYS_OUT}"):
            pick_samples({"views": item, "y": X[:3]}, torch.tensor([1]), 3, "M")


class Graph:
    """As a batch of PyTorch Geometric: rows of `x` are nodes."""

    num_graphs = N

    def __init__(self):
        self.x, self.edge_index, self.batch = torch.randn(9, 2), torch.zeros(2, 4).long(), torch.zeros(9).long()

    def to(self, *args, **kwargs):
        return self


@dataclass
class GraphData:
    x: Tensor
    edge_index: Tensor


class Opaque:
    def __init__(self, x):
        self.inner = x


class Slotted:
    __slots__ = ("x",)

    def __init__(self, x):
        self.x = x


class Yielding:
    """A loader of one batch, which is made anew each time."""

    def __init__(self, make):
        self.make = make

    def __iter__(self):
        yield self.make()


class Frame:
    """As a data frame, which has a length alone."""

    def __len__(self):
        return N


REFUSED = {
    "frame": (Frame, "a Frame, of which it is not known"),
    "graphs": (Graph, "a Graph of graphs, whose nodes and edges are no samples"),
    "graphs of a dataclass": (lambda: GraphData(torch.randn(N, 2), torch.zeros(2, 4)), "a GraphData of graphs"),
    "graphs in a mapping": (lambda: {"x": X, "edge_index": torch.zeros(2, 4)}, "a dict of graphs"),
    "points": (lambda: {"pos": torch.randn(9, 3), "batch": torch.zeros(9).long()}, "a dict of graphs"),
    "nested": (lambda: torch.nested.nested_tensor(RAGGED, layout=torch.jagged), "a nested tensor"),
    "COO": (lambda: torch.eye(N).to_sparse(), "a tensor of layout torch.sparse_coo"),
    "CSR": (lambda: torch.eye(N).to_sparse_csr(), "a tensor of layout torch.sparse_csr"),
    "packed": (lambda: pack_sequence(RAGGED, enforce_sorted=False), "a PackedSequence"),
    "opaque": (lambda: Opaque(X), "a Opaque, of which it is not known"),
    "slots": (lambda: Slotted(X), "a Slotted, of which it is not known"),
    "names": (lambda: Opaque(NAMES), "a Opaque, of which it is not known"),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:.*prototype")
class TestRefused:
    @pytest.mark.parametrize("form", REFUSED)
    def test_by_name(self, form):
        make, what = REFUSED[form]
        with pytest.raises(SelectionError, match=rf"but `batch\['a'\]\[0\]` is {what}.* {WAYS_OUT}"):
            pick({"a": [make(), 3, 4], "y": X})

    @pytest.mark.parametrize("form", REFUSED)
    def test_in_a_training_where_full_passes_work(self, form, caplog):
        class Anything(Model):
            def transfer_batch_to_device(self, batch, device, dataloader_idx):
                return batch

            def sample_losses(self, batch):
                return F.cross_entropy(self.net(batch[2]), batch[1], reduction="none")

            def sample_targets(self, batch):
                return batch[1]

        loader = Yielding(lambda: (REFUSED[form][0](), torch.tensor([0, 1, 2, 3, 4, 4]), torch.randn(N, 8)))
        net = mlp()
        model = Anything(copy.deepcopy(net), SSESAM(SPLIT), "split")
        with pytest.raises(MisconfigurationException, match="Override `select_samples"):
            trainer().fit(model, loader)
        assert torch.equal(model.net[0].weight, net[0].weight)
        models = [Anything(copy.deepcopy(net), SSESAM(SPLIT), passes) for passes in ("full", "auto")]
        for model in models:
            torch.manual_seed(1)
            with caplog.at_level("INFO"):
                trainer().fit(model, loader)
        assert not torch.equal(models[0].net[0].weight, net[0].weight)
        assert_same_bits(models[0].parameters(), models[1].parameters())
        said = [record.getMessage() for record in caplog.records if "passes='auto'" in record.getMessage()]
        assert len(said) == 1
        assert "samples cannot be picked from the batch" in said[0]

    def test_batches_of_several_loaders(self):
        class Semi(Model):
            def sample_targets(self, batch):
                return batch["a"][1] if isinstance(batch, dict) else batch[0][1]

            def sample_losses(self, batch):
                x, y = batch["a"] if isinstance(batch, dict) else batch[0]
                return F.cross_entropy(self.net(x), y, reduction="none")

        data = batches(2)
        pair = {"a": batches_loader(data), "b": batches_loader(data)}
        for loaders in (pair, list(pair.values()), CombinedLoader(pair, "min_size")):
            with pytest.raises(MisconfigurationException, match="A batch joins those of several loaders"):
                trainer().fit(Semi(objective=SSESAM(SPLIT), passes="split"), loaders)
            trainer().fit(Semi(objective=SSESAM(SPLIT), passes="full"), loaders)

    def test_losses_of_samples_that_were_not_picked(self):
        class Fixed(Model):
            def sample_losses(self, batch):
                return F.cross_entropy(self.net(X8), Y8, reduction="none")

        X8, Y8 = batches(1)[0]
        message = r"losses of shape \(24,\) for \d+ of 24 samples. Something in the batch was not picked with them"
        with pytest.raises(MisconfigurationException, match=message):
            fit(Fixed(objective=SSESAM(SPLIT), passes="split"), [(X8, Y8)])


def in_form(form, x, y):
    names = [str(value) for value in y.tolist()]
    return {
        "list": lambda: ([row + 0 for row in x], y),
        "named tuple": lambda: Named((x, y), names),
        "dataclass": lambda: Data([x, y], names),
        "encoding": lambda: Encoding({"x": x, "labels": y, "names": names}),
    }[form]()


class OfForm(Model):
    """Checks that each sample has come with its own name."""

    def parts(self, batch):
        if isinstance(batch, UserDict):
            x, y, names = batch["x"], batch["labels"], batch["names"]
        elif isinstance(batch, Named | Data):
            (x, y), names = batch.x, batch.names
        else:
            (x, y), names = batch, None
            x = torch.stack(list(x))
        assert names is None or names == [str(value) for value in y.tolist()]
        assert len(x) == len(y)
        return x, y

    def sample_targets(self, batch):
        return self.parts(batch)[1]

    def sample_losses(self, batch):
        x, y = self.parts(batch)
        return F.cross_entropy(self.net(x), y, reduction="none")


FORMS = ("list", "named tuple", "dataclass", "encoding")


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("passes", ["split", "auto"])
@pytest.mark.parametrize("form", FORMS)
def test_training_and_curvature_equal_their_plain_versions(form, passes):
    x, y = batches(1, n=16)[0]
    net, objective = mlp(), OBJECTIVES["SSESAM 1"]()
    model = OfForm(copy.deepcopy(net), objective, passes, optimizer=lambda params: torch.optim.SGD(params, lr=1.0))
    curvature = Hessian(model, [in_form(form, x, y)], classes=SPLIT.tail)
    in_tail = SPLIT.tail[y]
    expected = F.cross_entropy(net(x[in_tail]), y[in_tail])
    assert curvature.loss() == pytest.approx(expected.item(), abs=1e-12)
    trainer().fit(model, Yielding(lambda: in_form(form, x, y)))
    gradient = naive_gradient(net, objective.terms(y), x, y)
    moved = [p - q for p, q in zip(net.parameters(), model.net.parameters(), strict=True)]
    torch.testing.assert_close(moved, gradient, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("float64")
def test_curvature_of_batches_that_cannot_be_split():
    """All samples go through the network, and those of the group alone have weight."""
    x, y = batches(1, n=16)[0]

    class Sparse(Model):
        def sample_targets(self, batch):
            return batch[1]

        def sample_losses(self, batch):
            return F.cross_entropy(self.net(batch[0].to_dense()), batch[1], reduction="none")

    model = Sparse()
    in_tail = SPLIT.tail[y]
    expected = F.cross_entropy(model.net(x[in_tail]), y[in_tail]).item()
    assert Hessian(model, [(x.to_sparse(), y)], classes=SPLIT.tail).loss() == pytest.approx(expected, abs=1e-12)


def test_curvature_checks_what_was_picked():
    class Forgetful(Model):
        def select_samples(self, batch, index):
            return batch

    message = r"Expected argument `select_samples` to be a method of `Forgetful` that returns the \d+ samples"
    with pytest.raises(ValueError, match=message):
        Hessian(Forgetful(), batches(1), classes=SPLIT.tail).loss()


def test_curvature_of_a_plain_model_with_attributes_of_these_names():
    net = mlp()
    net.sample_targets, net.select_samples, net.measuring = torch.zeros(3), torch.ones(2), lambda: 1
    x, y = batches(1)[0]
    in_tail = SPLIT.tail[y]

    def losses(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    expected = F.cross_entropy(net(x[in_tail]), y[in_tail]).item()
    assert Hessian(net, [(x, y)], losses, SPLIT.tail).loss() == pytest.approx(expected, rel=1e-5)
    assert isinstance(net, nn.Module)
