"""Measures the time, passes and memory of a training step, for every objective and mode.

    python benchmarks/step_cost.py

Every contender is a module with its own Trainer. The Trainers take turns, one step each in random order, so that other
load on the machine affects all of them. The unit of time is a plain step: the same network under Lightning's automatic
optimization with SGD. Two contenders are plain, and the unit is their mean in the same round. The distance of these two
from 1 is the noise of the table.

Other SAM libraries take part if they are installed. They are pytorch-optimizer (``pip install pytorch-optimizer``) and
Composer (``pip install mosaicml``). Composer needs an older torch, so install it in a separate environment.

    python benchmarks/step_cost.py --json table.json        # machine-readable
    python benchmarks/step_cost.py --scaling                # over batch size, width, tail share, number of classes
    python benchmarks/step_cost.py --host                   # hardly any arithmetic: the time of the host
    python benchmarks/step_cost.py --late --network small   # whole trainings, with SAM in their last fifth
    python benchmarks/step_cost.py --network resnet50 --precision bf16-mixed --image-size 224   # on a GPU
    python benchmarks/step_cost.py --network small --compiled

docs/performance.md has the results and the conclusions.
"""

import argparse
import contextlib
import ctypes
import gc
import itertools
import json
import logging
import os
import platform
import random
import statistics
import sys
import threading
import time
import warnings
from functools import partial
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
import torchvision
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_ssesam import (
    ERM,
    SAM,
    SSESAM,
    ClassSplit,
    ImbSAM,
    SharpnessAwareMixin,
    Staged,
    StageSwitch,
    StepOptions,
)
from lightning_ssesam.models import CIFARResNet, SmallConvNet

INTERVAL = 5
NETWORKS = ("small", "cifar_resnet32", "vit_b_16")
PLAIN = "plain SGD"
LATE_STEPS = 50


def make_network(options, norm):
    """Return the network to train, with ``norm`` "group" or "batch"."""
    torch.manual_seed(0)
    if options.network == "small":
        net = SmallConvNet(options.classes, in_channels=3, width=options.width, norm=norm)
    elif options.network == "cifar_resnet32":
        net = CIFARResNet(options.classes, depth=32, norm=norm)
    elif options.network == "vit_b_16":
        net = torchvision.models.vit_b_16(num_classes=options.classes, image_size=options.image_size)
    else:
        layer = nn.BatchNorm2d if norm == "batch" else partial(nn.GroupNorm, 32)
        net = getattr(torchvision.models, options.network)(num_classes=options.classes, norm_layer=layer)
        if options.image_size <= 64:
            net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return torch.compile(net, dynamic=True) if options.compiled else net


def make_batch(options):
    """Return images and class indices, with the share of tail samples that the options ask for."""
    tail = round(options.batch_size * options.tail_share)
    targets = torch.cat([torch.randint(2, options.classes, (options.batch_size - tail,)), torch.randint(2, (tail,))])
    images = torch.randn(options.batch_size, 3, options.image_size, options.image_size)
    return images, targets[torch.randperm(options.batch_size)]


class Plain(L.LightningModule):
    """The unit of time: automatic optimization with SGD."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def loss(self, batch, reduction="mean"):
        """Return the cross-entropy of a batch."""
        images, targets = batch
        return F.cross_entropy(self.net(images), targets, reduction=reduction)

    def training_step(self, batch, batch_idx):
        """Called for every batch: return the loss."""
        loss = self.loss(batch)
        self.log("train/loss", loss)
        return loss

    def make_sgd(self):
        """Return the optimizer that all contenders use."""
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)

    def configure_optimizers(self):
        """Called when the run starts: return the optimizer."""
        return self.make_sgd()


class Ours(SharpnessAwareMixin, Plain):
    """A contender with an objective of this project."""

    training_step = SharpnessAwareMixin.training_step

    def __init__(self, net, objective, **options):
        super().__init__(net)
        self.objective = objective
        self.step_options = StepOptions(**options)

    def sample_losses(self, batch):
        """Return the loss of every sample."""
        return self.loss(batch, reduction="none")


class Peer(Plain):
    """A contender with another library's SAM, in manual optimization, as its documentation shows."""

    def __init__(self, net, make_optimizer):
        super().__init__(net)
        self.automatic_optimization = False
        self.make_optimizer = make_optimizer

    def configure_optimizers(self):
        """Called when the run starts: return the optimizer."""
        return self.make_optimizer(self)

    def training_step(self, batch, batch_idx):
        """Called for every batch: make an update."""
        # Not Lightning's wrapper, because it does not pass on the arguments that Composer gives to its closure.
        optimizer, losses = self.optimizers(use_pl_optimizer=False), []

        def closure(**kwargs):
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            losses.append(loss.detach())
            return loss

        if self.takes_first_gradient:
            closure()
        optimizer.step(closure)
        self.log("train/loss", losses[0])

    takes_first_gradient = False


class PeerWithFirstGradient(Peer):
    """A peer whose step expects a gradient that is computed already."""

    takes_first_gradient = True


def peers():
    """Return the installed peers: name, class, and a function that makes the optimizer."""
    found = []
    try:
        import pytorch_optimizer

        def make(module):
            return pytorch_optimizer.SAM(module.parameters(), torch.optim.SGD, rho=0.05, lr=0.01, momentum=0.9)

        found.append((f"SAM of pytorch-optimizer {version_of('pytorch-optimizer')}", PeerWithFirstGradient, make))
    except ImportError:
        print("pytorch-optimizer is not installed, so it does not take part.")
    try:
        from composer.algorithms.sam import SAMOptimizer

        found.append(
            (
                f"SAM of Composer {version_of('mosaicml')}",
                Peer,
                lambda module: SAMOptimizer(module.make_sgd(), rho=0.05),
            )
        )
    except ImportError:
        print("Composer is not installed, so it does not take part.")
    return found


def version_of(package):
    """Return the version of an installed package."""
    from importlib.metadata import version

    return version(package)


def second(objective):
    """Set an objective to its second stage, and return it."""
    objective.stage = 2
    return objective


def contenders(options, norm):
    """Return for each contender its name, the floor of its cost (None for peers), and a maker of its module."""
    net = partial(make_network, options, norm)
    split = ClassSplit([5, 5] + [100] * (options.classes - 2), tail=[0, 1])
    share = round(options.batch_size * options.tail_share) / options.batch_size

    def ours(objective, **step_options):
        return lambda: Ours(net(), objective(), **step_options)

    stage_1, stage_2 = partial(SSESAM, split), lambda: second(SSESAM(split))
    rows = [
        (PLAIN, 1.0, lambda: Plain(net())),
        (f"{PLAIN} again", 1.0, lambda: Plain(net())),
        ("ERM", 1.0, ours(ERM)),
        ("SAM", 2.0, ours(SAM)),
        (f"SAM, interval={INTERVAL}", 1 + 1 / INTERVAL, ours(SAM, interval=INTERVAL)),
    ]
    full = [
        ("SSE-SAM stage 1, full", 11 / 3, ours(stage_1, passes="full")),
        ("SSE-SAM stage 2, full", 8 / 3, ours(stage_2, passes="full")),
    ]
    if norm == "batch":
        group = {"passes": "split", "batch_norm_statistics": "group"}
        rows += [
            *full,
            ("SSE-SAM stage 1, group", 3.0, ours(stage_1, **group)),
            ("SSE-SAM stage 2, group", 1 + 2 * share, ours(stage_2, **group)),
        ]
    else:
        rows += [
            ("ImbSAM, split", 1 + share, ours(partial(ImbSAM, split), passes="split")),
            ("SSE-SAM stage 1, split", 2.0, ours(stage_1, passes="split")),
            ("SSE-SAM stage 2, split", 1 + share, ours(stage_2, passes="split")),
            *full,
        ]
    rows += [(name, None, lambda c=c, make=make: c(net(), make)) for name, c, make in options.peers]
    if unknown := set(options.only or []) - {name for name, _, _ in rows}:
        raise SystemExit(f"--only: {', '.join(sorted(unknown))} not among {', '.join(name for name, _, _ in rows)}")
    return [row for row in rows if options.only is None or row[0].startswith(PLAIN) or row[0] in options.only]


def make_trainer(options, **kwargs):
    """Return a Trainer that only trains: no logger, checkpoints, or progress bar."""
    return L.Trainer(
        accelerator=options.device,
        devices=1,
        precision=options.precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **kwargs,
    )


def synchronize():
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Turns:
    """A loader that waits before each batch until it is told to go, so that Trainers in several threads take turns."""

    def __init__(self, batch):
        self.batch, self.is_over = batch, False
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)

    def __len__(self):
        return 1 << 30

    def __iter__(self):
        while True:
            self.done.release()
            self.go.acquire()
            if self.is_over:
                return
            yield self.batch


class Contender:
    """A Trainer in a thread, which makes one step for each call of :meth:`step`."""

    def __init__(self, options, module, batch, callbacks=()):
        self.turns, self.error = Turns(batch), None
        # Other work on the machine takes wall-clock time, but no time of this process.
        self.clock = time.process_time if vars(options).get("host") else time.perf_counter
        self.thread = threading.Thread(target=self._run, args=(options, module, [*callbacks]), daemon=True)
        self.thread.start()
        self._wait()

    def _run(self, options, module, callbacks):
        try:
            make_trainer(options, max_epochs=1, callbacks=callbacks).fit(module, self.turns)
        except BaseException as error:
            self.error = error
        self.turns.done.release()

    def _wait(self):
        self.turns.done.acquire()
        if self.error is not None:
            raise self.error

    def step(self):
        """Make a step. Return its seconds, from one batch to the next."""
        synchronize()
        start = self.clock()
        self.turns.go.release()
        self._wait()
        synchronize()
        return self.clock() - start

    def end(self):
        """End the training."""
        self.turns.is_over = True
        self.turns.go.release()
        self.thread.join()


class Counts(Callback):
    """Counts forward passes, in batches, and backward passes."""

    def __init__(self, module, batch_size):
        self.forwards = self.backwards = 0.0
        self.hook = module.net.register_forward_pre_hook(partial(self._count, batch_size))

    def _count(self, batch_size, module, args):
        self.forwards += len(args[0]) / batch_size

    def on_after_backward(self, trainer, pl_module):
        """Called after every backward pass: count it."""
        self.backwards += 1


def passes_and_memory(options, make, batch):
    """Return the forwards and backwards of a step, and the peak of allocated bytes in a training of a few steps."""
    # Else garbage from before could be freed during the measurement.
    gc.collect()
    module = make()
    # From the second step on, all permanent memory is allocated.
    steps = max(2, module.step_options.interval if isinstance(module, Ours) else 1)
    counts = Counts(module, options.batch_size)
    trainer = make_trainer(options, max_epochs=1, callbacks=[counts])
    data = torch.utils.data.DataLoader([batch] * steps, batch_size=None)
    if options.device == "gpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        trainer.fit(module, data)
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            trainer.fit(module, data)
        events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
        peak = max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda event: event.start_ns())))
    counts.hook.remove()
    size = sum(p.nbytes for p in module.parameters())
    return {"forwards": counts.forwards / steps, "backwards": counts.backwards / steps, "peak": peak, "weights": size}


def race(racing, rounds):
    """Let the contenders make one step in each round, in random order, and end. Return the seconds by round."""
    seconds = [[0.0] * len(racing) for _ in range(rounds)]
    shuffle = random.Random(0).shuffle
    for round_seconds in seconds:
        order = list(range(len(racing)))
        shuffle(order)
        for number in order:
            round_seconds[number] = racing[number].step()
    for contender in racing:
        contender.end()
    return seconds


def measure_late(options, norm):
    """Return rows of results of whole trainings: plain ones, SAM, and SAM in the last fifth."""
    batch, net = make_batch(options), partial(make_network, options, norm)
    makers = {
        (PLAIN, 1.0): lambda: Plain(net()),
        (f"{PLAIN} again", 1.0): lambda: Plain(net()),
        ("SAM", 2.0): lambda: Ours(net(), SAM()),
        ("SAM in the last fifth", 1.2): lambda: Ours(net(), Staged([ERM(), SAM()])),
    }
    means = []
    for number in range(1 + options.rounds):
        switch = StageSwitch(step=options.warm_up + LATE_STEPS * 4 // 5)
        callbacks = [[], [], [], [switch]]
        racing = [Contender(options, make(), batch, c) for make, c in zip(makers.values(), callbacks, strict=True)]
        seconds = race(racing, options.warm_up + LATE_STEPS)[options.warm_up :]
        # The first training is a warm-up, too.
        means += [[statistics.mean(steps) for steps in zip(*seconds, strict=True)]] if number else []
    units = [statistics.mean(of_training[:2]) for of_training in means]
    return [
        {"name": name, "norm": norm, "floor": floor, **compare([times[place] for times in means], units)}
        for place, (name, floor) in enumerate(makers)
    ]


def measure(options, norm):
    """Return a row of results for every contender."""
    batch, rows = make_batch(options), contenders(options, norm)
    results = [{"name": name, "norm": norm, "floor": floor} for name, floor, _ in rows]
    if not options.no_memory:
        for result, (_, _, make) in zip(results, rows, strict=True):
            result |= passes_and_memory(options, make, batch)
    racing = [Contender(options, make(), batch) for _, _, make in rows]
    seconds = race(racing, options.warm_up + options.rounds)[options.warm_up :]
    units = [statistics.mean(round_seconds[:2]) for round_seconds in seconds]
    for number, result in enumerate(results):
        times = [round_seconds[number] for round_seconds in seconds]
        if "interval" in result["name"]:
            result |= compare(in_intervals(times), in_intervals(units))
        else:
            result |= compare(times, units)
    return results


def compare(times, units):
    """Return the milliseconds, and the ratios to the unit of the same round."""
    ratios = [value / unit for value, unit in zip(times, units, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4)
    return {"ms": 1000 * statistics.median(times), "ratio": median, "quartiles": [low, high], "ratios": ratios}


def in_intervals(values):
    """Return the means of consecutive intervals. One step of each interval is perturbed."""
    groups = [values[start : start + INTERVAL] for start in range(0, len(values) - INTERVAL + 1, INTERVAL)]
    return [statistics.mean(group) for group in groups]


def print_table(results):
    """Print the results as a Markdown table."""
    unit = results[0]
    has_memory = "peak" in unit
    print(f"\n| {unit['norm']} norm | cost | quartiles | floor |", end="")
    print(" forwards | backwards | peak memory, MiB |" if has_memory else "")
    print("|---|---|---|---|" + "---|---|---|" * has_memory)
    for row in results:
        low, high = row["quartiles"]
        floor = "" if row["floor"] is None else f"{row['floor']:.2f}"
        print(f"| {row['name']} | {row['ratio']:.2f} | {low:.2f} to {high:.2f} | {floor} |", end="")
        if has_memory:
            print(f" {row['forwards']:.2f} | {row['backwards']:.1f} | {row['peak'] / 2**20:.0f} |", end="")
        print()
    print(f"\nA plain step takes {unit['ms']:.1f} ms.", end="")
    print(f" One copy of the weights is {unit['weights'] / 2**20:.1f} MiB." if has_memory else "")


SWEEP = {
    "batch_size": [16, 64, 256],
    "width": [16, 32, 64],
    "tail_share": [0.05, 0.2, 0.5],
    "classes": [10, 1000, 100_000],
}


SWEPT = ["ERM", "SAM", "SSE-SAM stage 1, split", "SSE-SAM stage 2, split"]


def scaling(options):
    """Print tables of the cost over one setting after the other, and return their rows."""
    results = []
    for setting, values in SWEEP.items():
        print(
            f"\n| {setting} | plain step, ms | ERM | SAM | SSE-SAM stage 1 | stage 2 | 1 + tail share |\n"
            + "|---" * 7
            + "|"
        )
        for value in values:
            fixed = {"network": "small", "image_size": 16, "no_memory": True, "peers": [], "only": SWEPT}
            rows = measure(argparse.Namespace(**{**vars(options), **fixed, setting: value}), "group")
            ratios = {row["name"]: row["ratio"] for row in rows}
            cells = [f"{rows[0]['ms']:.1f}", *(f"{ratios[name]:.2f}" for name in SWEPT), f"{rows[-1]['floor']:.2f}"]
            print(f"| {value:,} | {' | '.join(cells)} |", flush=True)
            results += [{setting: value, **row} for row in rows]
    return results


# With four images of 4x4 pixels, a ResNet-32 has many small layers and little arithmetic. Its time is that of calls.
# Two of the images are tail samples, because a group of one would take full passes.
HOST = {
    "network": "cifar_resnet32",
    "norm": "batch",
    "image_size": 4,
    "batch_size": 4,
    "tail_share": 0.5,
    "threads": 1,
    "rounds": 200,
    "no_memory": True,
    "only": [
        "ERM",
        "SAM",
        "SSE-SAM stage 1, full",
        "SSE-SAM stage 2, full",
        "SSE-SAM stage 1, group",
        "SSE-SAM stage 2, group",
    ],
}


def parse_arguments():
    """Return the settings from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--network", default="resnet18", help=f"{', '.join(NETWORKS)}, or a ResNet of torchvision")
    parser.add_argument(
        "--norm", choices=["group", "batch", "both"], default="both", help="norm of ResNets and of small"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="samples in a batch")
    parser.add_argument("--image-size", type=int, default=32, help="pixels on a side")
    parser.add_argument("--tail-share", type=float, default=0.2, help="share of tail samples in a batch")
    parser.add_argument("--classes", type=int, default=10, help="number of classes, 3 or more; two are tail")
    parser.add_argument("--width", type=int, default=32, help="width of --network small")
    parser.add_argument("--precision", default="32-true", help="precision of the Trainer")
    parser.add_argument("--compiled", action="store_true", help="torch.compile the network")
    parser.add_argument("--rounds", type=int, default=20, help="measured steps of each contender")
    parser.add_argument("--warm-up", type=int, default=5, help="steps of each contender before the measured ones")
    parser.add_argument("--threads", type=int, help="number of CPU threads of an operation")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="contenders to measure with plain SGD, as in the table"
    )
    parser.add_argument("--no-memory", action="store_true", help="leave out the counts of passes and the memory")
    parser.add_argument("--scaling", action="store_true", help="measure a small network over several settings")
    parser.add_argument("--host", action="store_true", help="measure the time of the host, with " + str(HOST))
    parser.add_argument("--late", action="store_true", help=f"measure trainings of {LATE_STEPS} steps, each a round")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.set_defaults(**(HOST if "--host" in sys.argv else {}))
    options = parser.parse_args()
    if options.rounds < 2 * INTERVAL:
        parser.error(f"--rounds must be at least {2 * INTERVAL}, for two intervals of {INTERVAL}")
    if not 0 < options.tail_share < 1 or options.classes < 3:
        parser.error("--tail-share must be between 0 and 1, --classes at least 3")
    if options.network not in NETWORKS and not options.network.startswith("resnet"):
        known = ", ".join(NETWORKS)
        parser.error(f"--network must be {known}, or a ResNet of torchvision, but is {options.network}")
    options.device = "gpu" if torch.cuda.is_available() else "cpu"
    return options


def share_memory_among_threads():
    """Let all threads allocate from one arena if the C library allows it. Else some threads are faster by chance."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        m_arena_max = -8
        ctypes.CDLL(None).mallopt(m_arena_max, 1)


def main():
    """Measure, and print the tables."""
    share_memory_among_threads()
    options = parse_arguments()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if options.threads:
        torch.set_num_threads(options.threads)
    hardware = torch.cuda.get_device_name() if options.device == "gpu" else platform.processor() or platform.machine()
    about = {
        "hardware": f"{hardware}, {os.cpu_count()} CPU cores, {torch.get_num_threads()} threads",
        "versions": f"torch {torch.__version__}, lightning {L.__version__}, Python {platform.python_version()}",
        **{name: value for name, value in vars(options).items() if name != "json"},
    }
    tail = round(options.batch_size * options.tail_share)
    print(f"{about['hardware']}; {about['versions']}")
    print(
        f"{options.network}, images of {options.image_size}x{options.image_size}, batches of {options.batch_size} with"
        f" {tail} tail samples, {options.precision}, {options.rounds} rounds"
    )
    print("cost: median time of a step, in plain SGD steps; floor: its arithmetic, with a backward as 2 forwards")
    if options.scaling:
        results = scaling(options)
    else:
        options.peers = [] if options.late else peers()
        norms = ["group", "batch"] if options.norm == "both" else [options.norm]
        if options.network == "vit_b_16":
            norms = ["group"]  # Its layer norm does not mix samples, like group norm.
        results = []
        for norm in norms:
            rows = measure_late(options, norm) if options.late else measure(options, norm)
            print_table(rows)
            results += rows
    if options.json:
        options.json.write_text(json.dumps({**about, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
