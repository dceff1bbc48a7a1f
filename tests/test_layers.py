"""What a step costs on the host, whatever the hardware: what it calls for each layer, and what it keeps of a model."""

import copy
import sys
from collections import Counter, OrderedDict

import pytest
import torch
from helpers import OBJECTIVES, STRICT, Automatic, Model, assert_same_bits, batches, clones, fit
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from test_performance import grouped
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_ssesam import ERM
from lightning_ssesam.engine import MicroBatch, SharpnessEngine
from lightning_ssesam.layers import Layers, survey
from lightning_ssesam.snapshots import BufferSnapshot, Snapshot

pytestmark = STRICT


class Operators(TorchDispatchMode):
    """Counts dispatched operators, and keeps the lists that are copied at once."""

    def __init__(self):
        super().__init__()
        self.number, self.copied = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += 1
        if function is torch.ops.aten._foreach_copy_.default:
            self.copied.append([t.dtype for t in args[0]])
        return function(*args, **(kwargs or {}))


class Watch(Callback):
    """Counts what the fourth step calls: operators, and functions of Python, each in a run of its own."""

    def __init__(self, counts_operators):
        self.counts_operators, self.operators, self.functions = counts_operators, Operators(), Counter()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 3 and self.counts_operators:
            self.operators.__enter__()
        elif batch_idx == 3:
            sys.setprofile(lambda frame, event, arg: self.functions.update({event: 1}))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 3 and self.counts_operators:
            self.operators.__exit__(None, None, None)
        elif batch_idx == 3:
            sys.setprofile(None)

    @property
    def number(self):
        return self.operators.number if self.counts_operators else self.functions["call"]


def deep(depth):
    blocks = [(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU()) for _ in range(depth)]
    return nn.Sequential(*(layer for block in blocks for layer in block), nn.Linear(8, 5))


def counts_of(make, counts_operators):
    """What a step calls for each of its blocks, and beside them."""
    numbers = []
    for depth in (5, 25):
        watch = Watch(counts_operators)
        fit(make(deep(depth)), batches(5), callbacks=[watch])
        numbers.append(watch.number)
    per_block = (numbers[1] - numbers[0]) / 20
    return per_block, numbers[0] - 5 * per_block


def full(name):
    return lambda net: Model(net, OBJECTIVES[name](), "full")


def group(name):
    return lambda net: grouped(net, OBJECTIVES[name]())


def calls_of_forward(net):
    """How many functions of Python a forward calls."""
    calls, x = Counter(), torch.randn(24, 8)
    sys.setprofile(lambda frame, event, arg: calls.update({event: 1}))
    net(x)
    sys.setprofile(None)
    return calls["call"]


class TestCounts:
    """Counts tell what times cannot on a machine that has other work to do."""

    def test_plain_training_costs_nothing_more_for_each_layer(self):
        for counts_operators, most in ((False, 360), (True, 20)):
            (plain, base), (ours, our_base) = (counts_of(make, counts_operators) for make in (Automatic, full("ERM")))
            assert ours == plain
            assert our_base - base <= most

    @pytest.mark.parametrize(
        ("make", "forwards"),
        [
            (full("SAM"), 2),
            (full("SSESAM 1"), 3),
            (full("SSESAM 2"), 2),
            (group("SSESAM 1"), 5),
            (group("SSESAM 2"), 3),
        ],
        ids=["SAM", "stage 1", "stage 2", "group, stage 1", "group, stage 2"],
    )
    def test_only_forwards_call_functions_for_each_layer(self, make, forwards):
        per_block = (calls_of_forward(deep(25)) - calls_of_forward(deep(5))) / 20
        plain, ours = counts_of(Automatic, False)[0], counts_of(make, False)[0]
        assert ours == plain + (forwards - 1) * per_block

    @pytest.mark.parametrize("depth", [1, 8])
    def test_copies_of_a_step(self, depth):
        # One list for each dtype: those of two dtypes are copied one by one on a GPU.
        net, watch = deep(depth), Watch(True)
        fit(full("SSESAM 1")(net), batches(5), callbacks=[watch])
        buffers, weights = [{torch.float32}, {torch.int64}], [{torch.float32}]
        # Before the step, after the clean pass, and the weights; then back after each of two perturbed passes.
        expected = [*buffers, *buffers, *weights, *(buffers + weights) * 2]
        assert [set(dtypes) for dtypes in watch.operators.copied] == expected


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.inner = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
        self.scale, self.nothing = nn.Parameter(torch.ones(())), None
        self.register_parameter("no_shift", None)


def replace_layer(net):
    net[0].first = nn.Linear(3, 3)


def replace_layer_in_its_dictionary(net):
    net[0].inner._modules["0"] = nn.Linear(3, 3)


def add_layer(net):
    net[0].third = nn.Linear(3, 3)


def give_a_leaf_a_layer(net):
    net[0].inner[1].below = nn.Linear(3, 3)


def remove_layer(net):
    del net[0].second


def set_layer_to_none(net):
    net[0].second = None


def share_layer(net):
    net[1].first = net[0].first


def move_layer(net):
    # The same layers, and the same parameters, in another order.
    net.append(net.pop(0))


def move_layer_to_a_neighbour(net):
    net[1]._modules = {"before": net[0]._modules.pop("inner"), **net[1]._modules}


def swap_names(net):
    net[0].first, net[0].second = net[0].second, net[0].first


def replace_parameter(net):
    net[0].first.weight = nn.Parameter(torch.zeros(3, 3))


def add_parameter(net):
    net[0].inner[1].slope = nn.Parameter(torch.zeros(()))


def make_parameter(net):
    net[1].no_shift = nn.Parameter(torch.zeros(()))


def remove_parameter(net):
    net[0].first.bias = None


def move_parameter(net):
    net[0].inner._parameters["scale"] = net[0]._parameters.pop("scale")


def move_all_parameters(net):
    # To the next layer, which has none: names and values stay in their order.
    for name in ("weight", "bias"):
        net[0].inner[1]._parameters[name] = net[0].inner[0]._parameters.pop(name)


def move_over_the_border(net):
    last, following = net[0]._parameters.pop("no_shift"), net[0].first._parameters
    others = dict(following)
    following.clear()
    following.update(no_shift=last, **others)


def rename_layer(net):
    net[0]._modules["renamed"] = net[0]._modules.pop("inner")


def tie_parameters(net):
    net[0].second.weight = net[0].first.weight


def replace_dictionaries(net):
    net[0].first._parameters = OrderedDict(net[0].first._parameters, weight=nn.Parameter(torch.zeros(3, 3)))


def replace_batch_norm(net):
    net[0].norm = nn.BatchNorm1d(3, affine=False)


def wrap_layer(net):
    net[1] = nn.Sequential(net[1])


def parametrize(net):
    nn.utils.parametrizations.weight_norm(net[0].first)


def prune(net):
    nn.utils.prune.l1_unstructured(net[0].first, "weight", 0.5)


CHANGES = [
    replace_layer, replace_layer_in_its_dictionary, add_layer, give_a_leaf_a_layer, remove_layer, set_layer_to_none,
    share_layer, move_layer, move_layer_to_a_neighbour, swap_names, replace_parameter, add_parameter, make_parameter,
    remove_parameter, move_parameter, move_all_parameters, move_over_the_border, rename_layer, tie_parameters,
    replace_dictionaries, replace_batch_norm, wrap_layer, parametrize, prune,
]  # fmt: skip


class TestLayers:
    @pytest.mark.parametrize("change", CHANGES)
    def test_every_change_is_found(self, change):
        net = nn.Sequential(Block(), Block())
        known = survey(net)
        assert survey(net, known) is known
        change(net)
        found = survey(net, known)
        assert found is not known
        assert list(map(id, found.modules)) == list(map(id, net.modules()))
        assert list(map(id, found.parameters)) == list(map(id, net.parameters()))
        assert survey(net, found) is found
        assert survey(iter(list(net.modules())), found) is found
        assert survey(net[0], found) is not found

    def test_another_model_of_the_same_layers(self):
        net = nn.Sequential(Block())
        other = nn.Sequential(*net)
        assert survey(other, survey(net)).modules[0] is other

    def test_modes_are_looked_at_in_every_step(self):
        net = nn.Sequential(Block(), Block())
        layers, parameters = survey(net), list(net.parameters())
        marks = [layers.mark(parameters)]
        assert layers.batch_norms == [net[0].norm, net[1].norm]
        net[0].norm.eval()
        assert survey(net, layers) is layers
        assert layers.batch_norms == [net[1].norm]
        marks.append(layers.mark(parameters))
        net[0].first.weight.requires_grad_(False)
        marks.append(layers.mark(parameters))
        net[0].register_buffer("count", torch.zeros(()))
        assert survey(net, layers) is layers
        assert list(layers.buffers[0]) == ["count"]
        marks.append(layers.mark(parameters))
        net[0].norm.running_mean = None
        assert layers.batch_norms == [net[0].norm, net[1].norm]
        assert len(set(marks)) == 4
        assert not layers.is_compiled
        net[0].inner.compile(backend="eager")
        assert survey(net, layers) is layers
        assert layers.is_compiled

    def test_is_compiled_by_a_wrapper(self):
        assert Layers(nn.Sequential(torch.compile(nn.Linear(2, 2), backend="eager"))).is_compiled

    @pytest.mark.usefixtures("float64")
    def test_engine_with_a_model_that_changes_between_steps(self):
        torch.manual_seed(1)
        net, engine = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 5)), SharpnessEngine()

        def step(net, engine, x, y):
            def sample_losses(index, is_clean):
                return nn.functional.cross_entropy(net(x), y, reduction="none")

            engine.compute([MicroBatch(sample_losses, OBJECTIVES["SSESAM 1"]().terms(y))], net.parameters(), net)
            gradients = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
            net.zero_grad()
            return gradients

        changes = [
            lambda net: None,
            lambda net: net.__setitem__(0, nn.Linear(8, 8)),
            lambda net: net[1].eval(),
            lambda net: net.insert(2, nn.BatchNorm1d(8)),
            lambda net: net[0].weight.requires_grad_(False),
            lambda net: net[1].register_buffer("running_mean", torch.full((8,), 0.3)),
            lambda net: setattr(net[2], "weight", nn.Parameter(torch.full((8,), 2.0))),
            lambda net: net.__delitem__(2),
        ]
        for change, (x, y) in zip(changes, batches(len(changes)), strict=True):
            change(net)
            twin = copy.deepcopy(net)
            assert_same_bits(step(net, engine, x, y), step(twin, SharpnessEngine(), x, y))
            assert_same_bits([*net.parameters(), *net.buffers()], [*twin.parameters(), *twin.buffers()])

    @pytest.mark.usefixtures("float64")
    def test_layer_with_a_counter_that_is_replaced(self):
        class Counting(nn.Module):
            def __init__(self):
                super().__init__()
                self.count = torch.zeros(())

            def forward(self, x):
                self.count = self.count + 1
                return x * self.count

        x, y = batches(1)[0]
        net, engine = nn.Sequential(Counting(), nn.Linear(8, 5)), SharpnessEngine()
        for _ in range(3):
            net[0] = Counting()
            for number in (1, 2):
                losses = lambda index, is_clean: nn.functional.cross_entropy(net(x), y, reduction="none")  # noqa: E731
                engine.compute([MicroBatch(losses, OBJECTIVES["SAM"]().terms(y))], net.parameters(), net)
                # Only the clean pass counts.
                assert net[0].count == number


def rebind_buffer(net):
    net[0].running_mean = torch.full((4,), 5.0)


def add_buffer(net):
    net[0].register_buffer("more", torch.ones(2))


def change_dtype(net):
    net[0].double()


def change_memory(net):
    net[0].running_var.data = torch.full((6,), 3.0, dtype=torch.float64)


def share_buffer(net):
    net[1].running_mean = net[0].running_mean


def set_buffer_to_none(net):
    net[1].running_var = None


class TestSnapshots:
    @pytest.mark.parametrize(
        "change",
        [
            None,
            rebind_buffer,
            add_buffer,
            change_dtype,
            change_memory,
            share_buffer,
            set_buffer_to_none,
            replace_batch_norm,
        ],
    )
    def test_buffers_that_change_between_steps(self, change):
        net, snapshot = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4)), BufferSnapshot()
        for number in range(3):
            if number == 1 and change is replace_batch_norm:
                net[0] = nn.BatchNorm1d(4)
            elif number == 1 and change is not None:
                change(net)
            snapshot.save_buffers(Layers(net).buffers)
            bound, values = dict(net.named_buffers()), clones(net.buffers())
            with torch.no_grad():
                for buffer in bound.values():
                    buffer.add_(1)
            assert snapshot.has_moved()
            net[1].running_mean = torch.zeros(4)
            assert snapshot.differs()
            snapshot.restore()
            assert {name: id(t) for name, t in net.named_buffers()} == {name: id(t) for name, t in bound.items()}
            assert_same_bits(net.buffers(), values)
            assert not snapshot.has_moved()
            assert not snapshot.differs()
            snapshot.forget()
            net[1].num_batches_tracked = torch.tensor(number)
            snapshot.restore()
            assert net[1].num_batches_tracked == number

    def test_lazy_buffers_are_saved_once_they_are_made(self):
        net, snapshot = nn.Sequential(nn.LazyBatchNorm1d()), BufferSnapshot()
        snapshot.save_buffers(Layers(net).buffers)
        snapshot.forget()
        with torch.no_grad():
            net(torch.randn(5, 3))
        snapshot.save_buffers(Layers(net).buffers)
        before = clones(net.buffers())
        net(torch.randn(5, 3))
        snapshot.restore()
        assert_same_bits(net.buffers(), before)

    def test_tensors_of_several_dtypes(self):
        kinds = [torch.float32, torch.int64, torch.bool, torch.float32, torch.complex64, torch.int64]
        tensors = [torch.full((number, 2), 1, dtype=dtype) for number, dtype in enumerate(kinds)]
        snapshot, before = Snapshot(), clones(tensors)
        with Operators() as operators:
            snapshot.save(tensors)
        assert operators.copied == [[kinds[0]] * 2, [kinds[1]] * 2, [kinds[2]], [kinds[4]]]
        for tensor in tensors:
            tensor.zero_()
        assert snapshot.differs()
        snapshot.restore()
        assert_same_bits(tensors, before)
        others = clones(tensors)
        snapshot.save(others)
        for tensor in others:
            tensor.zero_()
        snapshot.restore()
        assert_same_bits(others, before)


def test_options_of_a_log_that_change_in_a_later_step():
    class Changing(Model):
        def sample_losses(self, batch):
            self.log("seen", 1.0, on_epoch=self.trainer.global_step == 2)
            return super().sample_losses(batch)

    with pytest.raises(MisconfigurationException, match="twice in the training step with different arguments"):
        fit(Changing(nn.Linear(8, 5), ERM()), batches(4))
    fit(model := Changing(nn.Linear(8, 5), ERM()), batches(2))
    assert model.trainer.callback_metrics["seen"] == 1.0
