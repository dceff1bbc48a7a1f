"""What makes steps cheaper: perturbing now and then, batch norm by groups, no wait for the device."""

import contextlib
import copy
import gc
import itertools
import json
import logging
import runpy
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    OBJECTIVES,
    SPLIT,
    STRICT,
    Automatic,
    Model,
    assert_same_bits,
    batches,
    batches_loader,
    choose,
    classification_batch,
    clones,
    compute,
    convbn,
    engine_gradient,
    fit,
    mlp,
    naive_gradient,
    sample_losses_of,
    sgd,
    stage_2,
    trainer,
)
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer.connectors.logger_connector import _LoggerConnector
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_ssesam import ERM, SAM, SSESAM, StageSwitch, StepOptions, Term, mixin
from lightning_ssesam.batches import HostTargets
from lightning_ssesam.errors import ArgumentError
from lightning_ssesam.layers import survey
from lightning_ssesam.passes import choose_passes

pytestmark = STRICT


def with_interval(interval, *args):
    model = Model(*args)
    choose(model, interval=interval)
    return model


def sizes_of_forwards(net):
    sizes = []
    net.register_forward_hook(lambda module, args, output: sizes.append(len(args[0])))
    return sizes


@pytest.mark.usefixtures("float64")
class TestInterval:
    @pytest.mark.parametrize("accumulate", [1, 2])
    @pytest.mark.parametrize("objective", OBJECTIVES)
    def test_equals_naive_twin(self, objective, accumulate):
        data = batches(7 * accumulate)
        model = with_interval(3, mlp(), OBJECTIVES[objective]())
        twin, made = copy.deepcopy(model.net), OBJECTIVES[objective]()
        fit(model, data, accumulate_grad_batches=accumulate)
        optimizer = sgd(twin.parameters())
        for update in range(1, 8):
            group = data[(update - 1) * accumulate : update * accumulate]
            x, y = (torch.cat(parts) for parts in zip(*group, strict=True))
            terms = [term if update in (3, 6) else term._replace(rho=0.0) for term in made.terms(y)]
            for p, g in zip(twin.parameters(), naive_gradient(twin, terms, x, y), strict=True):
                p.grad = g
            optimizer.step()
        torch.testing.assert_close(list(model.net.parameters()), list(twin.parameters()), rtol=0, atol=1e-13)

    def test_updates_between_cost_a_plain_step(self):
        model = with_interval(4, mlp(), SAM(0.1))
        sizes = sizes_of_forwards(model.net)
        fit(model, batches(8))
        assert sizes == [24] * 10
        model = with_interval(2, mlp(), SSESAM(SPLIT))
        sizes = sizes_of_forwards(model.net)
        fit(model, [*batches(1), (torch.randn(24, 8), torch.arange(24) % 5)])
        # Before the first perturbed update, five forwards measure whether samples mix.
        assert sizes[0] == 24
        assert sizes[1:6] == [24, 24, 15, 24, 9]
        assert sizes[6:] == [15, 9, 15, 9]

    def test_with_stages_and_resume(self, tmp_path):
        data, start = batches(8), mlp()

        def run(**kwargs):
            model = with_interval(3, copy.deepcopy(start), SSESAM(SPLIT))
            keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
            # An epoch a batch, so that the loader need not know where it was.
            callbacks = [StageSwitch(step=5), keep]
            model.train_dataloader = lambda: batches_loader([data[model.current_epoch]])
            run = trainer(
                callbacks=callbacks, enable_checkpointing=True, max_epochs=8, reload_dataloaders_every_n_epochs=1
            )
            run.fit(model, **kwargs)
            return model

        model, twin, objective = run(), copy.deepcopy(start), SSESAM(SPLIT)
        optimizer = sgd(twin.parameters())
        for update, (x, y) in enumerate(data, start=1):
            objective.stage = 1 if update <= 5 else 2
            terms = [term if update in (3, 6) else term._replace(rho=0.0) for term in objective.terms(y)]
            for p, g in zip(twin.parameters(), naive_gradient(twin, terms, x, y), strict=True):
                p.grad = g
            optimizer.step()
        torch.testing.assert_close(list(model.net.parameters()), list(twin.parameters()), rtol=0, atol=1e-13)
        for step in range(1, 8):
            resumed = run(ckpt_path=tmp_path / f"step={step}.ckpt")
            assert_same_bits(resumed.parameters(), model.parameters())

    def test_skipped_updates_count(self):
        data = batches(4)
        data[0][0][0] = torch.nan
        model = with_interval(2, mlp(), SAM(0.1))
        choose(model, on_nonfinite="skip")
        sizes = sizes_of_forwards(model.net)
        fit(model, data)
        assert model.skipped_updates == 1
        assert sizes == [24] * 6

    def test_logs_sharpness_of_perturbed_updates_only(self):
        model = with_interval(2, mlp(), SSESAM(SPLIT))
        choose(model, log_sharpness=True)
        seen = fit(model, batches(1)).callback_metrics
        assert set(seen) == {"train/loss", "train/grad_norm"}
        seen = fit(model, batches(2)).callback_metrics
        assert {"train/sharpness_head", "train/sharpness_tail", "train/grad_norm_tail"} <= set(seen)

    def test_interval_that_a_callback_spoils(self):
        model = with_interval(2, mlp(), SAM(0.1))
        model.on_train_batch_start = lambda batch, batch_idx: choose(model, interval=0)
        with pytest.raises(ArgumentError, match="Expected argument `interval` to be an integer >= 1, but got 0"):
            fit(model, batches(1))


def difference_gradient(net, terms, x, y):
    """The definition of what batch_norm_statistics="group" optimizes, with nothing shared."""
    own = [weights > 0 for weights, *_ in terms]
    total = naive_gradient(net, [(sum(weights for weights, *_ in terms), 0.0)], x, y)
    for (weights, rho, *_), samples in zip(terms, own, strict=True):
        if rho > 0 and samples.any():
            up, down = (naive_gradient(net, [(weights[samples], r)], x[samples], y[samples]) for r in (rho, 0.0))
            total = [t + u - d for t, u, d in zip(total, up, down, strict=True)]
    return total


def grouped(net, objective=None):
    model = Model(net, objective, "split")
    choose(model, passes="split", batch_norm_statistics="group")
    return model


IMAGES = (3, 5, 5)


@pytest.mark.usefixtures("float64")
class TestBatchNormByGroups:
    @pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name != "own"])
    def test_equals_naive_twin(self, objective):
        data = [*batches(3, shape=IMAGES), *batches(1, shape=IMAGES, classes=range(3))]
        net, made = convbn(), OBJECTIVES[objective]()
        model, twin = grouped(copy.deepcopy(net), OBJECTIVES[objective]()), copy.deepcopy(net)
        fit(model, data)
        optimizer = sgd(twin.parameters())
        for x, y in data:
            divides = sum((weights > 0).any() for weights, *_ in made.terms(y)) > 1
            gradient = (difference_gradient if divides else naive_gradient)(twin, made.terms(y), x, y)
            for p, g in zip(twin.parameters(), gradient, strict=True):
                p.grad = g
            optimizer.step()
        torch.testing.assert_close(list(model.net.parameters()), list(twin.parameters()), rtol=0, atol=1e-13)

    @pytest.mark.parametrize("objective", OBJECTIVES)
    def test_is_exact_where_no_layer_mixes_samples(self, objective):
        net, (x, y) = mlp(), classification_batch()
        terms = OBJECTIVES[objective]().terms(y)
        expected = naive_gradient(net, terms, x, y)
        torch.testing.assert_close(engine_gradient(net, terms, x, y, "difference"), expected, rtol=0, atol=1e-14)

    def test_term_without_samples_next_to_others(self):
        class Three(ERM):
            def terms(self, targets):
                first = (targets < 3).double() / len(targets)
                return Term(first, 0.1), Term(1 / len(targets) - first, 0.2), Term(0 * first, 0.3)

        net, (x, y) = convbn(), classification_batch(shape=IMAGES)
        terms = Three().terms(y)
        actual = engine_gradient(net, terms, x, y, "difference")
        torch.testing.assert_close(actual, difference_gradient(net, terms, x, y), rtol=0, atol=1e-14)

    def test_buffers_that_the_forward_reads(self):
        class Counting(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.register_buffer("count", torch.zeros(()))

            def forward(self, x):
                seen.append(self.count.item())
                self.count += 1
                return x

        net, seen, (x, y) = convbn().append(Counting()), [], classification_batch(shape=IMAGES)
        engine_gradient(net, SSESAM(SPLIT).terms(y), x, y, "difference")
        assert seen == [0, 1, 1, 1, 1]

    def test_is_near_full_passes_for_small_radii(self):
        net, (x, y) = convbn(), classification_batch(64, IMAGES)
        errors = []
        for rho in (1e-3, 1e-5):
            terms = SSESAM(SPLIT, rho, rho).terms(y)
            both = [engine_gradient(net, terms, x, y, passes) for passes in ("full", "difference")]
            errors.append(max((a - b).abs().max() for a, b in zip(*both, strict=True)))
        assert 0 < errors[1] < errors[0] / 50

    def test_statistics_are_those_of_plain_training(self):
        net, data = convbn(), batches(2, shape=IMAGES)
        frozen = {"optimizer": lambda params: torch.optim.SGD(params, lr=0.0)}
        models = [grouped(copy.deepcopy(net), SSESAM(SPLIT)), Model(copy.deepcopy(net), **frozen)]
        models[0].make_optimizer = frozen["optimizer"]
        for model in models:
            fit(model, data)
        assert_same_bits(models[0].net.buffers(), models[1].net.buffers())

    def test_cost(self):
        targets = torch.tensor([0, 1, 2, 0, 1] * 4 + [3, 4, 3, 4])
        for objective, expected in [
            (SAM(0.1), [24, 24]),
            (SSESAM(SPLIT), [24, 20, 20, 4, 4]),
            (stage_2(SSESAM(SPLIT)), [24, 4, 4]),
        ]:
            model = grouped(convbn(), objective)
            sizes = sizes_of_forwards(model.net)
            fit(model, [(torch.randn(24, *IMAGES), targets)])
            assert sizes == expected

    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_group_of_one_sample_takes_full_passes(self, accumulate):
        net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16), torch.nn.Linear(16, 5))
        data = [(torch.randn(6, 8), torch.tensor([0, 1, 2, 0, 1, tail])) for tail in (3, 4)]
        models = [grouped(copy.deepcopy(net), SSESAM(SPLIT)), Model(copy.deepcopy(net), SSESAM(SPLIT), "full")]
        for model in models:
            fit(model, data, accumulate_grad_batches=accumulate)
        assert_same_bits(models[0].parameters(), models[1].parameters())

    def test_refuses_statistics_of_all_processes(self):
        # Torch's own layer runs on GPUs only.
        model = grouped(torch.nn.SyncBatchNorm.convert_sync_batchnorm(convbn()))
        processes = SimpleNamespace(size=2, is_sharded=False)
        with pytest.raises(
            MisconfigurationException, match="cannot work with `batch_norm_statistics='group'` and `sync_batchnorm`"
        ):
            choose_passes(model, survey(model), model.step_options, processes)
        processes.size = 1
        assert choose_passes(model, survey(model), model.step_options, processes) == "difference"

    def test_share_of_full_passes_is_logged(self):
        data = batches(5, shape=IMAGES)
        data[1][1].fill_(0)
        data[2][1][:] = torch.tensor([0] * 23 + [3])
        trainer = fit(grouped(convbn(), stage_2(SSESAM(SPLIT))), data)
        assert trainer.callback_metrics["train/full_passes"] == pytest.approx(0.4)
        assert "train/full_passes" not in fit(Model(convbn(), SSESAM(SPLIT)), data).callback_metrics

    def test_mixed_targets_in_one_of_several_batches_take_full_passes(self):
        net, data = convbn(), batches(2, shape=IMAGES)
        data[1][1].fill_(0)
        data = [(x, F.one_hot(y, 5).double()) for x, y in data]
        data[1][1][0] = 0.2
        models = [grouped(copy.deepcopy(net), SSESAM(SPLIT)), Model(copy.deepcopy(net), SSESAM(SPLIT), "full")]
        for model in models:
            fit(model, data, accumulate_grad_batches=2)
        assert_same_bits(models[0].parameters(), models[1].parameters())

    def test_small_radii_with_other_buffers_and_accumulation(self):
        spectral = torch.nn.utils.parametrizations.spectral_norm
        net = torch.nn.Sequential(spectral(torch.nn.Linear(8, 16)), torch.nn.BatchNorm1d(16), torch.nn.Linear(16, 5))
        data, nets = batches(2), []
        for objective in (SSESAM(SPLIT, 1e-9, 1e-9), ERM()):
            nets.append(copy.deepcopy(net))
            model = Model(nets[-1], objective, "split")
            choose(model, passes="split", batch_norm_statistics="group")
            fit(model, data, accumulate_grad_batches=2)
        torch.testing.assert_close(list(nets[0].parameters()), list(nets[1].parameters()), rtol=0, atol=1e-8)

    def test_layer_of_ones_own_that_is_called_batch_norm(self):
        class Named(Model):
            def __init__(self):
                super().__init__(mlp(), SSESAM(SPLIT))
                self.batch_norm = torch.nn.BatchNorm1d(8)

            def sample_losses(self, batch):
                return super().sample_losses((self.batch_norm(batch[0]), batch[1]))

        sizes = sizes_of_forwards((model := Named()).batch_norm)
        fit(model, batches(1))
        assert sizes == [24, 24, 24]

    def test_accumulation_with_a_batch_without_tail(self):
        net, data = convbn(), [*batches(1, shape=IMAGES), *batches(1, shape=IMAGES, classes=range(3))]
        model = grouped(copy.deepcopy(net), SSESAM(SPLIT))
        sizes = sizes_of_forwards(model.net)
        fit(model, data, accumulate_grad_batches=2)
        head = int((data[0][1] < 3).sum())
        assert sizes == [24, 24, head, 24, head, 24, 24 - head, 24 - head]
        assert all(p.isfinite().all() for p in model.parameters())

    def test_logs_and_counts_each_sample_once(self):
        class Counting(Model):
            def sample_losses(self, batch):
                self.log("seen", float(len(batch[1])), reduce_fx="sum")
                counted.append(len(batch[1]) * self.in_clean_pass)
                return super().sample_losses(batch)

        counted = []
        model = Counting(convbn(), SSESAM(SPLIT), "split")
        choose(model, batch_norm_statistics="group", log_sharpness=True)
        run = fit(model, batches(1, shape=IMAGES))
        assert run.callback_metrics["seen"] == sum(counted) == 24
        assert {"train/sharpness_head", "train/sharpness_tail", "train/grad_norm_tail"} <= set(run.callback_metrics)

    def test_draws_the_random_numbers_of_plain_training(self):
        net, (x, y) = torch.nn.Sequential(convbn(), torch.nn.Dropout(0.5)), classification_batch(shape=IMAGES)
        states = []
        for objective in (OBJECTIVES["ERM"](), SSESAM(SPLIT)):
            torch.manual_seed(0)
            engine_gradient(net, objective.terms(y), x, y, "difference")
            states.append(torch.get_rng_state())
        assert torch.equal(*states)

    def test_fault_in_any_pass_leaves_no_trace(self):
        x, y = classification_batch(shape=IMAGES)
        for number in range(5):
            net, calls = convbn(), []

            def fail(module, args, output, number=number, calls=calls):
                calls.append(1)
                if len(calls) > number:
                    raise KeyboardInterrupt

            before, state = clones([*net.parameters(), *net.buffers()]), torch.get_rng_state()
            net.register_forward_hook(fail)
            losses, terms = sample_losses_of(net, x, y), SSESAM(SPLIT).terms(y)
            with pytest.raises(KeyboardInterrupt):
                compute(losses, terms, net.parameters(), net, passes="difference")
            assert_same_bits([*net.parameters(), *net.buffers()], before)
            assert torch.equal(torch.get_rng_state(), state)
            assert all(p.grad is None for p in net.parameters())

    def test_layers_in_evaluation_mode_take_split_passes(self):
        class Frozen(Model):
            def on_train_batch_start(self, batch, batch_idx):
                self.net[1].eval()

        model = Frozen(convbn(), SSESAM(SPLIT), "split")
        choose(model, passes="split", batch_norm_statistics="group")
        sizes = sizes_of_forwards(model.net)
        fit(model, [(torch.randn(10, *IMAGES), torch.tensor([0, 1, 2, 0, 1, 2, 0, 3, 4, 3]))])
        assert sizes == [7, 3, 7, 3]


def peak_of(model, data):
    """Bytes that a run has allocated at most at one time."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        fit(model, data)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def net_with_weights(has_norm):
    """A network whose weights outweigh all else that a step allocates."""
    norm = torch.nn.BatchNorm1d(700) if has_norm else torch.nn.Identity()
    return torch.nn.Sequential(torch.nn.Linear(8, 700), norm, torch.nn.Linear(700, 700), torch.nn.Linear(700, 5))


@cache
def peak_of_plain(has_norm):
    return peak_of(Automatic(net_with_weights(has_norm)), batches(2))


class TestMemory:
    @pytest.mark.parametrize("passes", ["full", "split", "group"])
    @pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name != "own"])
    def test_two_copies_of_the_weights_above_plain_training(self, objective, passes):
        net = net_with_weights(has_norm=passes == "group")
        model = grouped(net, OBJECTIVES[objective]())
        if passes != "group":
            model.step_options = StepOptions(passes=passes)
        size = sum(p.nbytes for p in net.parameters())
        copies = (peak_of(model, batches(2)) - peak_of_plain(passes == "group")) / size
        assert -0.1 < copies < 2.1

    def test_split_passes_need_less_for_activations(self):
        net, data = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(20)), torch.nn.Linear(8, 5)), []
        for x, _ in batches(2, n=2000):
            data.append((x, torch.arange(2000) % 5))
        plain = peak_of(Automatic(copy.deepcopy(net)), data)
        split = peak_of(Model(copy.deepcopy(net), SSESAM(SPLIT), "split"), data)
        full = peak_of(Model(copy.deepcopy(net), SSESAM(SPLIT), "full"), data)
        assert split < 0.8 * plain
        assert full < 2 * plain


class Meta(SingleDeviceStrategy):
    """A device whose tensors have no data: whoever asks for a value of theirs gets an exception."""

    strategy_name = "meta"

    def __init__(self):
        class Accelerator(CPUAccelerator):
            def setup_device(self, device):
                pass

        super().__init__(torch.device("meta"), Accelerator())

    def reduce(self, tensor, *args, **kwargs):
        # Lightning asks for the length of the loader when a run starts.
        return super().reduce(tensor, *args, **kwargs) if tensor.is_floating_point() else torch.ones(())

    def teardown(self):
        # To move the module back would ask for all of them.
        pass


class BlockingCopies(TorchDispatchMode):
    """Notes copies to the device that wait until they are done."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._to_copy.default and args[0].device.type == "cpu":
            to_device = torch.device(kwargs.get("device") or "cpu").type == "meta"
            if to_device and not kwargs.get("non_blocking"):
                self.found.append(tuple(args[0].shape))
        return function(*args, **kwargs)


class Watched(Model):
    def training_step(self, batch, batch_idx):
        assert all(t.is_meta for t in batch)
        with BlockingCopies() as copies:
            output = super().training_step(batch, batch_idx)
        assert not copies.found
        return output


class TestNoWaiting:
    """No step asks the device for anything, not even which samples are tail."""

    @pytest.fixture(autouse=True)
    def without_autocast_and_results(self, monkeypatch):
        # This device has no autocast, and Lightning moves the results to the host when a run ends.
        monkeypatch.setattr(mixin, "between_forwards", lambda *args: contextlib.nullcontext())
        monkeypatch.setattr(_ResultCollection, "cpu", lambda self: self)
        monkeypatch.setattr(_LoggerConnector, "teardown", lambda self: None)

    @pytest.mark.parametrize("accumulate", [1, 2])
    @pytest.mark.parametrize("passes", ["full", "split", "auto"])
    @pytest.mark.parametrize("objective", OBJECTIVES)
    def test_no_step_waits(self, objective, passes, accumulate):
        model = Watched(mlp(), OBJECTIVES[objective](), passes)
        choose(model, log_sharpness=True)
        run = fit(model, batches(4), strategy=Meta(), accelerator="auto", accumulate_grad_batches=accumulate)
        assert run.global_step == 4 // accumulate

    def test_sizes_of_the_passes(self):
        model = Watched(mlp(), SSESAM(SPLIT))
        sizes = sizes_of_forwards(model.net)
        fit(
            model,
            [(torch.randn(10, 8), torch.tensor([0, 1, 2, 0, 1, 2, 0, 3, 4, 3]))],
            strategy=Meta(),
            accelerator="auto",
        )
        assert sizes == [7, 3, 7, 3]

    def test_named_targets_and_lists_of_names(self):
        class Named(Watched):
            def sample_losses(self, batch):
                assert len(batch["names"]) == len(batch["label"])
                return super().sample_losses((batch["x"], batch["label"]))

            def training_step(self, batch, batch_idx):
                return Model.training_step(self, batch, batch_idx)

        data = [{"x": x, "label": y, "names": [str(k) for k in range(24)]} for x, y in batches(2)]
        assert fit(Named(mlp(), SSESAM(SPLIT)), data, strategy=Meta(), accelerator="auto").global_step == 2

    @pytest.mark.parametrize("passes", ["full", "split"])
    def test_accumulated_batches_of_which_some_change(self, passes):
        class Changing(Watched):
            def on_train_batch_start(self, batch, batch_idx):
                if batch_idx % 2 == 0:
                    batch[1] = batch[1].clone()

        data = [list(batch) for batch in batches(4)]
        model = Changing(mlp(), SAM(0.1), passes)
        run = fit(model, data, strategy=Meta(), accelerator="auto", accumulate_grad_batches=2)
        assert run.global_step == 2

    def test_host_targets_of_a_tensor_with_other_data(self):
        host, known = torch.arange(5), HostTargets()
        moved = host.clone()
        assert known.of(moved) is moved
        known.note(host, moved)
        assert known.of(moved) is host
        assert known.of(other := moved[:]) is other
        moved.data = moved.flip(0)
        assert known.of(moved) is moved

    def test_one_term_is_not_looked_at(self):
        model = Model(mlp(), SAM(0.1), "split")
        model.sample_targets = lambda batch: batch[1] + 0
        assert fit(model, batches(2), strategy=Meta(), accelerator="auto").global_step == 2

    @pytest.mark.parametrize("way", ["replaced", "in place", "hook", "computed"])
    def test_targets_that_change_after_the_transfer_are_looked_at_where_they_are(self, way):
        class Changing(Model):
            def on_train_batch_start(self, batch, batch_idx):
                if way == "replaced":
                    batch[1] = batch[1].clone()
                elif way == "in place":
                    batch[1].zero_()

        class Hooked(Model):
            def on_after_batch_transfer(self, batch, dataloader_idx):
                return batch

        class Computed(Model):
            def sample_targets(self, batch):
                return batch[1] + 0

        model = {"hook": Hooked, "computed": Computed}.get(way, Changing)(mlp(), SSESAM(SPLIT), "split")
        with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
            fit(model, [list(batch) for batch in batches(2)], strategy=Meta(), accelerator="auto")

    def test_sample_targets_that_works_on_the_device_only(self):
        class OnDevice(Model):
            def sample_targets(self, batch):
                assert batch[1].is_meta
                return batch[1]

        model = OnDevice(mlp(), SSESAM(SPLIT), "full")
        assert fit(model, batches(2), strategy=Meta(), accelerator="auto").global_step == 2


@pytest.mark.filterwarnings("ignore:.*")
def test_benchmark_of_step_costs(monkeypatch, capsys):
    script = Path(__file__).parents[1] / "benchmarks" / "step_cost.py"
    flags = "--network=small --width=8 --image-size=8 --batch-size=20 --rounds=10 --warm-up=1 --json=table.json"
    monkeypatch.setattr(sys, "argv", [str(script), *flags.split()])
    # It silences Lightning, which is not to last.
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "setLevel", lambda level: None)
    runpy.run_path(str(script), run_name="__main__")
    rows = {(row["norm"], row["name"]): row for row in json.loads(Path("table.json").read_text())["results"]}
    printed = capsys.readouterr().out
    for (_, name), row in rows.items():
        assert f"| {name} | {row['ratio']:.2f} |" in printed
    cost = {key: (row["forwards"], row["backwards"], row["floor"]) for key, row in rows.items()}
    assert cost["group", "plain SGD"] == (1, 1, 1)
    assert cost["group", "SAM, interval=5"] == pytest.approx((1.2, 1.2, 1.2))
    assert cost["group", "SSE-SAM stage 1, split"] == (2, 4, 2)
    assert cost["group", "SSE-SAM stage 2, split"] == pytest.approx((1.2, 3, 1.2))
    assert cost["batch", "SSE-SAM stage 1, full"] == pytest.approx((3, 4, 11 / 3))
    assert cost["batch", "SSE-SAM stage 1, group"] == (3, 5, 3)
    assert cost["batch", "SSE-SAM stage 2, group"] == pytest.approx((1.4, 3, 1.4))
