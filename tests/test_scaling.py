"""The plan for scale: what `benchmarks/scaling.py` simulates, and the tables that its page has from it.

`tests/test_distributed.py` compares what processes exchange with the formulas.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch.utils.data import DistributedSampler

from lightning_ssesam import ClassSplit

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import scaling  # noqa: E402
import step_cost  # noqa: E402
from scaling_parts import processes, simulation, traffic  # noqa: E402
from scaling_parts.simulation import METHODS, Cluster, Network  # noqa: E402

DEFAULTS = scaling.parse_arguments([])
# Everything but the bandwidth costs nothing, so that times are bytes.
BYTES = Cluster(intra_bandwidth=1e-6, inter_bandwidth=1e-6, efficiency=1.0, intra_latency=1e-9, inter_latency=1e-9)


def sent_around_a_ring(world, size):
    """Average a tensor the plain way, one part after the other around a ring; the numbers that each process sends."""
    values = [np.arange(size) * (rank + 1.0) for rank in range(world)]
    parts = np.array_split(np.arange(size), world)
    expected, sent = sum(values), [0] * world
    for step in range(2 * (world - 1)):
        messages = [(rank, parts[(rank - step) % world]) for rank in range(world)]
        copies = [(rank, part, values[rank][part].copy()) for rank, part in messages]
        for rank, part, numbers in copies:
            sent[rank] += len(part)
            receiver = values[(rank + 1) % world]
            receiver[part] = receiver[part] + numbers if step < world - 1 else numbers
    assert all(np.array_equal(value, expected) for value in values)
    return sent


@pytest.mark.parametrize("world", [2, 3, 8])
def test_bytes_of_a_ring(world):
    size = 48
    assert sent_around_a_ring(world, size) == [traffic.ring_bytes(Counter({"all-reduce": size}), world)] * world
    halves = Counter({"all-gather": size, "reduce-scatter": size})
    assert traffic.ring_bytes(halves, world) == traffic.ring_bytes(Counter({"all-reduce": size}), world)
    assert traffic.ring_bytes(Counter({"broadcast": size}), world) == size * (world - 1) / world


class TestCollectives:
    @pytest.mark.parametrize("gpus", [2, 8])
    def test_large_tensors_take_the_time_of_their_bytes(self, gpus):
        cluster = Cluster(intra_bandwidth=100, efficiency=0.5)
        expected = traffic.ring_bytes(Counter({"all-reduce": 10**12}), gpus) / 50e9 * 1e3
        assert cluster.all_reduce(1e12, gpus) == pytest.approx(expected, rel=1e-4)
        assert cluster.all_gather(1e12, gpus) == pytest.approx(expected / 2, rel=1e-4)

    def test_machines_share_their_cards(self):
        """Four GPUs with cards of 10 GB/s get 40 GB/s around a ring; more than NVLink has, they cannot get."""
        cluster = Cluster(per_node=4, intra_bandwidth=100, inter_bandwidth=10, efficiency=1)
        expected = 2 * 15 / 16 * 1e12 / 40e9 * 1e3
        assert cluster.all_reduce(1e12, 16) == pytest.approx(expected, rel=1e-4)
        fast = Cluster(per_node=4, intra_bandwidth=100, inter_bandwidth=1e9, efficiency=1)
        assert fast.all_reduce(1e12, 16) == pytest.approx(expected * 0.4, rel=1e-4)

    def test_small_tensors_take_the_latency(self):
        """By hand. 512 GPUs, 64 machines: Tree/LL needs 2 (7 * 0.6 + 6 * 5) + 6.8 microseconds, less than any ring."""
        assert Cluster().all_reduce(1, 512) * 1e3 == pytest.approx(2 * (7 * 0.6 + 6 * 5.0) + 6.8, rel=1e-3)
        assert Cluster().all_gather(1, 512) * 1e3 == pytest.approx(6.6 + 448 * 0.6 + 63 * 2.7, rel=1e-3)
        assert Cluster().all_reduce(1, 8) * 1e3 == pytest.approx(6.6 + 14 * 0.6, rel=1e-3)
        twice = Cluster(intra_latency=6.8, inter_latency=28)
        assert twice.all_reduce(1, 512) * 1e3 == pytest.approx(4 * (7 * 0.6 + 6 * 5.0) + 6.8, rel=1e-3)

    def test_more_gpus_and_more_bytes_take_longer(self):
        for function in (Cluster().all_reduce, Cluster().all_gather):
            times = [function(1e8, gpus) for gpus in (1, 2, 8, 16, 64, 512)]
            assert times[0] == 0
            assert times == sorted(times)
            assert function(1e6, 64) < function(1e7, 64) < function(1e8, 64)


class TestUpdates:
    network = Network("one bucket", 1000, 90.0, mixes=True, parts=1)

    @pytest.mark.parametrize("norm", ["group", "batch"])
    def test_passes_cost_what_the_page_of_costs_says(self, norm):
        options = step_cost.argparse.Namespace(batch_size=10, tail_share=0.2, classes=10, peers=[], only=None)
        floors = {name: floor for name, floor, _ in step_cost.contenders(options, norm)}
        kinds = {"batch": ("full", True), "group": ("split", False)}
        passes, mixes = kinds[norm]
        network, names = Network("", 1, 1.0, mixes, 1), [name.partition(",")[0] for name in floors]
        seen = 0
        for method in METHODS:
            name = method.name if method.name in floors else f"{method.name}, {passes}"
            if name in floors:
                seen += 1
                forwards, backwards = simulation.passes_ms(network, method, 0.2, is_split=True)
                assert sum(forwards) + sum(backwards) == pytest.approx(floors[name])
        assert seen == (5 if "ImbSAM" in names else 4)

    @pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
    def test_methods_are_those_of_the_project(self, method):
        """The number of terms, their samples, their passes and their exchanges."""
        targets = torch.tensor([0, 1, 2, 3, 4, 5])
        objective = processes.OBJECTIVES[method.name]()
        terms = objective.terms(targets)
        samples = {"all": [1, 1, 1, 1, 1, 1], "tail": [1, 1, 0, 0, 0, 0], "head": [0, 0, 1, 1, 1, 1]}
        assert [term.rho > 0 for term in terms] == [is_perturbed for is_perturbed, _ in method.terms]
        assert [term.weights.ne(0).int().tolist() for term in terms] == [samples[of] for _, of in method.terms]
        forwards, backwards = simulation.passes_ms(self.network, method, 0.2, is_split=False)
        assert (len(forwards), len(backwards)) == traffic.passes(terms)
        assert method.ascents + 1 == traffic.gradient_exchanges(terms, is_local=False)

    def test_split_passes_wait_for_most_tail_samples(self):
        """Where the tail alone is perturbed. Where head and tail are, each process has as many samples as others."""
        network, most = Network("", 1, 3.0, mixes=False, parts=1), simulation.most_tail(0.2, 128, 64) / 128
        assert 0.25 < most < 0.35
        for method in METHODS:
            alone, many = (simulation.passes_ms(network, method, 0.2, True, gpus) for gpus in (1, 64))
            rise = sum(map(sum, many)) - sum(map(sum, alone))
            waits = method.name in ("ImbSAM", "SSE-SAM stage 2")
            assert rise == pytest.approx(3 * (most - 0.2) if waits else 0)

    def test_gradients_that_do_not_overlap(self):
        """An update takes its passes and its exchanges: one of them, and one more for each ascent."""
        for method in METHODS:
            forwards, backwards = simulation.passes_ms(self.network, method, 0.2, is_split=True)
            once, small = Cluster().all_reduce(4000, 64), Cluster().all_gather(64 * 1024, 64)
            passes = sum(forwards) + sum(backwards)
            local = simulation.update_ms(Cluster(), self.network, method, 64, "local")
            assert local == pytest.approx(passes + once)
            everywhere = simulation.update_ms(Cluster(), self.network, method, 64)
            assert everywhere == pytest.approx(passes + (1 + method.ascents) * once + 2 * small)
            assert simulation.update_ms(Cluster(), self.network, method, 1) == pytest.approx(passes)

    @pytest.mark.parametrize(("share", "backward_ms"), [(0.3, 100.0), (0.9, 100.0), (3.0, 100.0), (1.0, 0.0)])
    def test_buckets_go_while_the_backward_goes_on(self, share, backward_ms):
        """Against a clock that ticks: a bucket goes when it is full and the line is free."""
        nbytes = 4.5 * simulation.BUCKET
        ms_of_a_bucket = share * 20
        cluster = Cluster(intra_bandwidth=simulation.BUCKET * 1.75 / ms_of_a_bucket / 1e6, efficiency=1.0)
        sizes, sent, busy_until, tick = [1, 1, 1, 1, 0.5], 0, 0.0, 0.01
        for clock in np.arange(0, 1000, tick):
            filled = 4.5 * min(1.0, clock / backward_ms) if backward_ms else 4.5
            if sent < 5 and clock >= busy_until and filled >= sum(sizes[: sent + 1]) - 1e-9:
                busy_until, sent = clock + cluster.all_reduce(sizes[sent] * simulation.BUCKET, 8), sent + 1
        assert simulation.exposed(cluster, nbytes, 8, backward_ms) == pytest.approx(busy_until - backward_ms, abs=0.1)

    def test_overlap_hides_and_never_costs(self):
        for network in scaling.networks(DEFAULTS):
            for method in METHODS:
                for ascent in ("local", "global"):
                    plain = simulation.update_ms(Cluster(), network, method, 64, ascent)
                    hidden = simulation.update_ms(Cluster(), network, method, 64, ascent, overlaps=True)
                    alone = simulation.update_ms(Cluster(), network, method, 1, ascent)
                    assert alone < hidden < plain

    def test_interval_is_a_mean(self):
        sam = METHODS[1]
        plain, perturbed = (simulation.update_ms(Cluster(), self.network, m, 64) for m in (METHODS[0], sam))
        found = simulation.update_ms(Cluster(), self.network, sam, 64, interval=5)
        assert found == pytest.approx((4 * plain + perturbed) / 5)

    def test_fsdp2(self):
        """If nothing but bytes counts, they are those of the formula; if only passes count, it takes those."""
        net, sse = Network("", 512, 1e-9, mixes=True, parts=1), METHODS[3]
        parameters = [torch.zeros(512)]
        terms = processes.OBJECTIVES[sse.name]().terms(torch.tensor([0, 5]))
        sent = traffic.under_fsdp2(parameters, 8, terms)
        del sent["all-reduce"]
        small = 2 * BYTES.all_gather(8 * 1024, 8) + 2 * BYTES.all_reduce(4, 8)
        found = simulation.sharded_update_ms(BYTES, net, sse, 8) - small
        # A millisecond has as many bytes as GB/s has millions.
        assert found == pytest.approx(traffic.ring_bytes(sent, 8), rel=0.05)
        slow = Network("", 512, 90.0, mixes=False, parts=1)
        found = simulation.sharded_update_ms(Cluster(), slow, sse, 8)
        assert found == pytest.approx(90 * 11 / 3, abs=0.1)

    def test_sizes_of_the_networks(self):
        with torch.device("meta"):
            nets = {"ResNet-50": torchvision.models.resnet50(), "ViT-B/16": torchvision.models.vit_b_16()}
        for network in scaling.networks(DEFAULTS):
            assert network.parameters == sum(p.numel() for p in nets[network.name].parameters())
            assert network.mixes == any("BatchNorm" in type(m).__name__ for m in nets[network.name].modules())


class TestTail:
    @pytest.mark.parametrize("share", [0.005, 0.02, 0.05])
    def test_against_lightnings_sampler(self, share):
        """The batches that a DistributedSampler gives to eight processes, over many epochs."""
        gpus, batch, images = 8, 32, 32 * 8 * 50
        is_tail = np.arange(images) < share * images
        none, few, some, most = [], [], [], []
        samplers = [DistributedSampler(range(images), gpus, rank) for rank in range(gpus)]
        for epoch in range(12):
            counts = []
            for sampler in samplers:
                sampler.set_epoch(epoch)
                counts.append(is_tail[list(sampler)].reshape(-1, batch).sum(1))
            none.append(np.mean(np.array(counts) == 0))
            few.append(np.mean(np.array(counts) < 2))
            some.append(np.mean((np.array(counts) == 0).any(0)))
            most.append(np.mean(np.array(counts).max(0)))
        # The sampler does not put an image back, which is a little better than the formula.
        assert np.mean(none) == pytest.approx(simulation.no_tail(share, batch), abs=0.015)
        assert np.mean(few) == pytest.approx(simulation.fewer_than(2, share, batch), abs=0.015)
        assert np.mean(some) == pytest.approx(simulation.some_without_tail(share, batch, gpus), abs=0.04)
        assert np.mean(most) == pytest.approx(simulation.most_tail(share, batch, gpus), rel=0.05)

    def test_fewer_than_one_is_none(self):
        assert simulation.fewer_than(1, 0.03, 50) == pytest.approx(simulation.no_tail(0.03, 50))
        assert simulation.fewer_than(51, 0.03, 50) == pytest.approx(1)

    def test_least_batch_is_that_of_the_page_of_costs(self):
        split = ClassSplit.from_counts([500, 300, 200, 50, 20], tail_below=100)
        share = float(split.class_counts[split.tail].sum() / split.class_counts.sum())
        assert simulation.least_batch(share) == 69
        for share in scaling.SHARES:
            least = simulation.least_batch(share)
            assert simulation.no_tail(share, least) <= 0.01 < simulation.no_tail(share, least - 1)


class TestScript:
    def test_page_has_what_it_prints(self):
        text = scaling.PAGE.read_text()
        assert scaling.filled(text, DEFAULTS) == text
        for name in ("simulated", "ethernet", "tails", "epochs", "counted", "measured"):
            assert text.count(f"<!-- scaling: {name} -->") == 1
        other = scaling.parse_arguments(["--inter-bandwidth=1"])
        assert scaling.filled(text, other) != text

    def test_numbers_in_the_text(self):
        text = " ".join(scaling.PAGE.read_text().split())
        resnet, vit = scaling.networks(DEFAULTS)
        slow, (erm, sam, imbsam, stage_1, _) = Cluster(inter_bandwidth=scaling.ETHERNET), METHODS

        def update(method, gpus, ascent="global", cluster=slow, network=resnet, **kwargs):
            return simulation.update_ms(cluster, network, method, gpus, ascent, **kwargs)

        three, one = (update(stage_1, 64, ascent) for ascent in ("global", "local"))
        assert f"on 64 GPUs that is {three:.0f} and {one:.0f} ms" in text
        assert f'`interval=5` with `"global"` takes {update(stage_1, 64, interval=5):.0f} ms, less' in text
        fast = {"cluster": Cluster(), "network": resnet}
        local = [update(method, 512, "local", **fast) for method in (erm, sam)]
        more = round(local[1]) - round(local[0]), round(update(sam, 512, **fast)) - round(local[1])
        assert f"takes {more[0]} ms more than ERM" in text
        assert f"and {more[1]} ms more than that" in text
        assert update(imbsam, 512, cluster=Cluster(), network=vit) / update(imbsam, 1, network=vit) == pytest.approx(
            1.25, abs=0.03
        )
        assert f"{simulation.most_tail(0.2, 128, 64):.0f} of 128 on 64 GPUs" in text
        for method, factor in ((sam, "1.5 times as much for SAM"), (stage_1, "1.8 times for stage 1")):
            terms = processes.OBJECTIVES[method.name]().terms(torch.tensor([0, 5]))
            sharded = traffic.under_fsdp2([torch.zeros(8000)], 8, terms)
            whole = traffic.under_ddp([torch.zeros(8000, requires_grad=True)], traffic.gradient_exchanges(terms, False))
            assert f"{traffic.ring_bytes(sharded, 8) / traffic.ring_bytes(whole, 8):.1f} {factor[4:]}" in text

    def test_results_are_kept_whole(self):
        """What was counted is what the formula says; every way was measured."""
        counted = json.loads((scaling.RESULTS / "counted.json").read_text())["rows"]
        kinds = {(row["objective"], row["ascent"], row["processes"]) for row in counted}
        assert len(kinds) == len(counted) == len(processes.OBJECTIVES) * len(processes.ASCENTS) * 2
        for row in counted:
            assert row["counted"] == row["formula"]
            if row["ascent"] != "FSDP2":
                ring = traffic.ring_bytes(Counter(row["formula"]), row["processes"])
                assert row["wire"] == pytest.approx(ring, rel=0.02)
        measured = json.loads((scaling.RESULTS / "measured.json").read_text())["rows"]
        assert [row["objective"] for row in measured] == list(processes.OBJECTIVES)
        assert all(set(processes.WAYS[1:]) <= set(row) for row in measured)

    def test_prints_what_was_asked_for(self, capsys):
        scaling.main(["--gpus", "4", "16", "--per-node=4", "--interval=3", "--batch=64"])
        printed = capsys.readouterr().out
        for text in (
            "4, 16 GPUs",
            "`interval=3`",
            "| ERM | 26 | ",
            "64 images",
            "| ImageNet-LT | 115,846 | 453 | 113 |",
        ):
            assert text in printed

    def test_counts_and_measures_into_a_folder(self, monkeypatch, capsys):
        """The processes are those of tests/test_distributed.py; here they are asked for and kept."""
        asked = []

        def start(work, options):
            asked.append((work.__name__, options.processes, options.batch_size))
            if work is processes.count:
                sent = {"all-reduce": 5_000_000}
                common = {"formula": sent, "counted": sent, "calls": {}, "wire": 5_100_000}
                return [{"objective": "ERM", "ascent": "local", **common}]
            ways = {way: 1.0 + number for number, way in enumerate(processes.WAYS)}
            return [
                {"objective": name, "way": way, "seconds": [factor, 2 * factor, 3 * factor]}
                for name in processes.OBJECTIVES
                for way, factor in ways.items()
            ]

        monkeypatch.setattr(processes, "start", start)
        scaling.main(["--count", "--measure", "--results=found", "--processes", "2", "3"])
        assert asked == [("count", 2, 10), ("count", 3, 10), ("measure", 2, 10)]
        monkeypatch.setattr(scaling, "RESULTS", Path("found"))
        about, _, table = scaling.counted(DEFAULTS).partition("\n\n")
        assert "resnet18" in about
        assert "| ERM | local | 5.0 | | | the same | 5.0 | 5.1 | 6.7 | 5.1 |" in table
        times = scaling.measured(DEFAULTS)
        assert "| SAM | 2000 ms | 3.00 (3.00 to 3.00) | 4.00 (4.00 to 4.00) | 5.00" in times

    def test_without_results_it_says_so(self, monkeypatch):
        monkeypatch.setattr(scaling, "RESULTS", Path("nothing"))
        assert scaling.counted(DEFAULTS) == "Nothing has been counted yet."
        assert scaling.measured(DEFAULTS) == "Nothing has been measured yet."

    @pytest.mark.parametrize(
        ("option", "text"),
        [
            ("--gpus=12", "--gpus: expected multiples of --per-node 8, but got 12"),
            ("--efficiency=1.5", "--efficiency: invalid float above 0 and at most 1 value: '1.5'"),
            ("--batch=0", "--batch: invalid int above 0 value: '0'"),
            ("--tail-share=1", "--tail-share: invalid float above 0 and at most 0.99 value: '1'"),
            ("--inter-bandwidth=nan", "--inter-bandwidth: invalid float above 0 value: 'nan'"),
            ("--interval=2.5", "--interval: invalid int above 0 value: '2.5'"),
        ],
    )
    def test_bad_options(self, option, text, capsys):
        with pytest.raises(SystemExit):
            scaling.main([option])
        assert text in capsys.readouterr().err
