"""Says what a training costs on many GPUs: simulated, counted, and measured with two processes on this machine.

    python benchmarks/scaling.py                      # simulates 8, 64 and 512 GPUs, and asks where the tail is
    python benchmarks/scaling.py --inter-bandwidth 3  # the same on another network
    python benchmarks/scaling.py --count              # what two processes send, by formula, by count, by their sockets
    python benchmarks/scaling.py --measure            # the time of a step of two processes: 10 minutes on two cores
    python benchmarks/scaling.py --write              # the tables of docs/scaling.md, from all of that

The simulation needs no GPU and starts no process. ``--count`` and ``--measure`` keep their results in
benchmarks/results/scaling. Only ``--write`` changes the page: it takes the results that are kept, and simulates with
the default settings.
"""

import argparse
import os
import platform
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from gpu_parts.results import read_json, write_json
from gpu_parts.tables import table
from scaling_parts import simulation, traffic
from scaling_parts.simulation import METHODS, Cluster, Network

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "scaling.md"
RESULTS = ROOT / "benchmarks" / "results" / "scaling"

ETHERNET = 25 / 8 / 8
"""GB/s of a GPU to other machines if eight GPUs share a card of 25 Gb/s."""

SHARES = (0.2, 0.1, 0.05, 0.02, 0.01, 0.005)
IMAGES = {"ImageNet-LT": 115_846, "iNaturalist 2018": 437_513}


def networks(options: argparse.Namespace) -> list[Network]:
    """Return the networks. Their times grow with the batch."""
    scale = options.batch / 128
    return [
        Network("ResNet-50", 25_557_032, options.resnet50_ms * scale, True, 5, options.batch),
        Network("ViT-B/16", 86_567_656, options.vit_ms * scale, False, 13, options.batch),
    ]


def cluster_of(options: argparse.Namespace) -> Cluster:
    """Return the machines that the options describe."""
    names = ("per_node", "intra_bandwidth", "inter_bandwidth", "efficiency", "intra_latency", "inter_latency")
    return Cluster(**{name: getattr(options, name) for name in names})


# The simulation.


def simulated(options: argparse.Namespace, cluster: Cluster) -> str:
    """Return a table for each network."""
    return "\n\n".join(_simulated(options, cluster, network) for network in networks(options))


def _simulated(options: argparse.Namespace, cluster: Cluster, network: Network) -> str:
    gpus, k = options.gpus, options.interval
    rows = []
    for method in METHODS:

        def update(number: int, method: simulation.Method = method, **kwargs: Any) -> float:
            return simulation.update_ms(cluster, network, method, number, tail_share=options.tail_share, **kwargs)

        def sharded(number: int, method: simulation.Method = method) -> float:
            return simulation.sharded_update_ms(cluster, network, method, number, options.tail_share)

        columns: list[Callable[[int], float]] = [
            lambda number, update=update: update(number, ascent="local"),
            update,
            lambda number, update=update: update(number, overlaps=True),
            lambda number, update=update: update(number, interval=k),
            sharded,
        ]
        rows.append([method.name, f"{update(1):.0f}", *(_list(map(column, gpus)) for column in columns)])
    head = [network.name, "1 GPU", "local", "global", "global, with overlap", f"global, `interval={k}`", "FSDP2"]
    return table(head, rows)


def _list(values: Iterable[float], form: str = ".0f") -> str:
    return ", ".join(f"{value:{form}}" for value in values)


def tails(options: argparse.Namespace) -> str:
    """Return the table of how often a process has no tail sample, or too few."""
    rows = []
    for share in SHARES:
        some = (simulation.some_without_tail(share, options.batch, number) for number in options.gpus)
        rows.append(
            [
                f"{100 * share:g} %",
                f"{share * options.batch:.1f}",
                _percent(simulation.no_tail(share, options.batch)),
                _percent(simulation.fewer_than(8, share, options.batch)),
                ", ".join(map(_percent, some)),
                f"{simulation.least_batch(share):,}",
            ]
        )
    numbers = ", ".join(map(str, options.gpus))
    some = f"some process of {numbers} has none"
    return table(["tail share", "tail samples", "none", "fewer than 8", some, "batch for none below 1 %"], rows)


def _percent(probability: float) -> str:
    percent = 100 * probability
    return f"{percent:.0f} %" if percent >= 1 else "below 1 %"


def epochs(options: argparse.Namespace) -> str:
    """Return the table of the updates in an epoch."""
    rows = []
    for name, images in IMAGES.items():
        steps = simulation.steps_of_epoch(images, options.batch, options.gpus)
        rows.append([name, f"{images:,}", *(f"{number:,.{0 if number >= 10 else 1}f}" for number in steps)])
    return table(["data set", "images", *(f"{number} GPUs" for number in options.gpus)], rows)


# What was counted and measured.


def counted(options: argparse.Namespace) -> str:
    """Return the table of what was sent."""
    found = read_json(RESULTS / "counted.json")
    if found is None:
        return "Nothing has been counted yet."
    rows: dict[tuple[str, str], list[str]] = {}
    for row in found["rows"]:
        cells = rows.setdefault((row["objective"], row["ascent"]), [row["objective"], row["ascent"]])
        expected, nbytes = (traffic.Counter(row[key]) for key in ("formula", "counted"))
        if not cells[2:]:
            cells += [_millions(expected, kind) for kind in ("all-reduce", "all-gather", "reduce-scatter")]
            cells.append("the same" if expected == nbytes else f"{sum(nbytes.values()) / 1e6:.1f}")
        cells += [f"{traffic.ring_bytes(expected, row['processes']) / 1e6:.1f}", f"{row['wire'] / 1e6:.1f}"]
    head = ["", "ascent", "all-reduce", "all-gather", "reduce-scatter", "counted"]
    for number in sorted({row["processes"] for row in found["rows"]}):
        head += [f"ring of {number}", f"sockets of {number}"]
    return f"{found['about']}\n\n{table(head, rows.values())}"


def _millions(found: Any, kind: str) -> str:
    return f"{found[kind] / 1e6:.1f}" if found[kind] > 1e4 else ""


def measured(options: argparse.Namespace) -> str:
    """Return the table of what was measured."""
    found = read_json(RESULTS / "measured.json")
    if found is None:
        return "Nothing has been measured yet."
    ways = {
        "apart": "two, apart",
        "local": "local",
        "global": "global",
        "FSDP2": "FSDP2",
        "both cores": "one, both cores, both batches",
    }
    rows = []
    for row in found["rows"]:
        cells = []
        for way in ways:
            if way not in row:
                cells.append("")
                continue
            low, high = row[way]["quartiles"]
            cells.append(f"{row[way]['ratio']:.2f} ({low:.2f} to {high:.2f})")
        rows.append([row["objective"], f"{row['ms']:.0f} ms", *cells])
    return f"{found['about']}\n\n{table(['', 'one alone', *ways.values()], rows)}"


def about(options: argparse.Namespace) -> str:
    """Return what was run, and on what."""
    tail = round(options.small_batch * options.tail_share)
    return (
        f"{options.network}, group norm, images of {options.image_size}x{options.image_size} pixels, float32;"
        f" {options.small_batch} images of a process, {tail} of them tail; {os.cpu_count()} CPU cores"
        f" ({platform.machine()}); torch {torch.__version__.partition('+')[0]}, lightning {L.__version__}."
    )


def run_processes(options: argparse.Namespace) -> None:
    """Count and measure, as the options ask for, and keep the results."""
    from scaling_parts import processes

    fixed = {"width": 8, "classes": processes.CLASSES, "compiled": False, "batch_size": options.small_batch}
    settings = argparse.Namespace(**{**vars(options), **fixed}, ascents=processes.ASCENTS)
    if not hasattr(torch.cpu.Stream, "record_event"):
        # An older torch shards on a GPU only.
        settings.ascents = processes.ASCENTS[:2]
    if options.count:
        rows = []
        for number in options.processes:
            settings.processes = number
            rows += [{**row, "processes": number} for row in processes.start(processes.count, settings)]
        write_json(options.results / "counted.json", {"about": about(options), "rows": rows})
    if options.measure:
        settings.processes = 2
        rows = processes.medians(processes.start(processes.measure, settings))
        write_json(options.results / "measured.json", {"about": about(options), "rows": rows})


# The page.


def filled(text: str, options: argparse.Namespace) -> str:
    """Return a page with what belongs between its marks."""
    fast = cluster_of(options)
    blocks: dict[str, Callable[[], str]] = {
        "simulated": lambda: simulated(options, fast),
        "ethernet": lambda: simulated(options, replace(fast, inter_bandwidth=ETHERNET)),
        "tails": lambda: tails(options),
        "epochs": lambda: epochs(options),
        "counted": lambda: counted(options),
        "measured": lambda: measured(options),
    }

    def between(match: re.Match[str]) -> str:
        return f"{match[1]}\n\n{blocks[match[2]]()}\n\n{match[3]}"

    return re.sub(r"(<!-- scaling: (\w+) -->).*?(<!-- end of scaling -->)", between, text, flags=re.DOTALL)


def _positive(kind: type[Any], most: float | None = None) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        value = kind(text)
        if not 0 < value < float("inf") or (most is not None and value > most):
            raise ValueError
        return value

    # What argparse calls it in an error.
    parse.__name__ = f"{kind.__name__} above 0" + ("" if most is None else f" and at most {most:g}")
    return parse


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the settings from the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    number, integer, cluster = _positive(float), _positive(int), Cluster()
    add = parser.add_argument
    add("--gpus", type=integer, nargs="+", default=[8, 64, 512], help="numbers of GPUs")
    add("--per-node", type=integer, default=cluster.per_node, help="GPUs of a machine")
    add("--intra-bandwidth", type=number, default=cluster.intra_bandwidth, help="GB/s of a GPU within a machine")
    add("--inter-bandwidth", type=number, default=cluster.inter_bandwidth, help="GB/s of a GPU to other machines")
    add("--efficiency", type=_positive(float, 1), default=cluster.efficiency, help="part of both that is reached")
    add("--intra-latency", type=number, default=cluster.intra_latency, help="microseconds of a step in a machine")
    add("--inter-latency", type=number, default=cluster.inter_latency, help="microseconds of a step between machines")
    add("--batch", type=integer, default=128, help="images of a GPU")
    add("--tail-share", type=_positive(float, 0.99), default=0.2, help="share of tail samples in a batch")
    add("--interval", type=_positive(int), default=5, help="updates from one perturbed update to the next")
    add("--resnet50-ms", type=number, default=52.0, help="milliseconds of a plain step of ResNet-50 on 128 images")
    add("--vit-ms", type=number, default=54.0, help="milliseconds of a plain step of ViT-B/16 on 128 images")
    add("--count", action="store_true", help="count what processes on this machine send")
    add("--measure", action="store_true", help="measure the time of a step of two processes on this machine")
    add("--write", action="store_true", help=f"write the tables of {PAGE.relative_to(ROOT)}")
    add("--network", default="resnet18", help="network of --count and --measure, as in step_cost.py")
    add("--image-size", type=integer, default=32, help="pixels on a side, of --count and --measure")
    add("--small-batch", type=integer, default=10, help="images of a process, of --count and --measure")
    add("--processes", type=integer, nargs="+", default=[2, 4], help="numbers of processes, of --count")
    add("--rounds", type=_positive(int), default=20, help="measured steps of each kind, of --measure")
    add("--warm-up", type=_positive(int), default=3, help="steps before the measured ones, of --measure")
    add("--results", type=Path, default=RESULTS, help="folder for the results of --count and --measure")
    options = parser.parse_args(arguments)
    if several := [n for n in options.gpus if n > options.per_node and n % options.per_node]:
        parser.error(f"--gpus: expected multiples of --per-node {options.per_node}, but got {several[0]}")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Simulate, and run what the options ask for."""
    options = parse_arguments(arguments)
    if options.count or options.measure:
        run_processes(options)
    if options.write:
        PAGE.write_text(filled(PAGE.read_text(), parse_arguments([])))
    print(f"Milliseconds of an update on {_list(options.gpus, 'd')} GPUs.\n\n{simulated(options, cluster_of(options))}")
    print(f"\nTail samples of a process with {options.batch} images.\n\n{tails(options)}")
    print(f"\nUpdates in an epoch.\n\n{epochs(options)}")


if __name__ == "__main__":
    main()
