"""What is measured side by side: trainings by the Trainer, and the engine captured by itself."""

import gc
import random
import statistics
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

import step_cost
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpu_parts.captures import Captured, seconds_of
from gpu_parts.settings import Settings
from lightning_ssesam import ERM, SAM, SSESAM, ClassSplit, ImbSAM, Objective
from lightning_ssesam.engine import MicroBatch, SharpnessEngine

NETWORKS: dict[str, dict[str, Any]] = {
    "ResNet-32": {"network": "cifar_resnet32", "batch_size": 128, "image_size": 32, "classes": 10},
    "ResNet-34": {"network": "resnet34", "batch_size": 64, "image_size": 32, "classes": 100},
    "ResNet-50": {"network": "resnet50", "batch_size": 64, "image_size": 224, "classes": 1000},
    "ViT-B/16": {"network": "vit_b_16", "batch_size": 64, "image_size": 224, "classes": 1000},
}
"""The networks that are measured, and their batches."""

TINY = {"network": "small", "batch_size": 20, "image_size": 8, "classes": 10}

OBJECTIVES: dict[str, Callable[[ClassSplit], Objective]] = {
    "ERM": lambda split: ERM(),
    "SAM": lambda split: SAM(),
    "ImbSAM": ImbSAM,
    "SSE-SAM stage 1": SSESAM,
    "SSE-SAM stage 2": lambda split: step_cost.second(SSESAM(split)),
}


def options_of(network: str, settings: Settings) -> Namespace:
    """Return the options of ``step_cost.py`` for a network."""
    fixed = {"width": 8, "tail_share": 0.2, "compiled": False}
    given = TINY if settings.tiny else NETWORKS[network]
    return Namespace(**fixed, **given, device=settings.device, precision=settings.precision)


class _Fused:
    """Makes the optimizer as one kernel, as a GPU's user would."""

    def make_sgd(self) -> torch.optim.Optimizer:
        fused = {"fused": True} if torch.cuda.is_available() else {}
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9, **fused)


class Plain(_Fused, step_cost.Plain):
    """Automatic optimization with SGD."""


class Ours(_Fused, step_cost.Ours):
    """An objective of this project."""


class Contender(step_cost.Contender):
    """A Trainer in a thread, which makes some steps for each call of :meth:`steps`."""

    def steps(self, number: int) -> float:
        """Make some steps. Return the seconds of one. The host may run ahead of the GPU."""

        def make() -> None:
            for _ in range(number):
                self.turns.go.release()
            for _ in range(number):
                self._wait()

        return seconds_of(make) / number


class Engine:
    """The engine captured by itself: the gradient of a batch, and the step of the optimizer."""

    def __init__(self, net: nn.Module, objective: Objective, batch: list[Tensor], settings: Settings) -> None:
        device = torch.device("cuda" if settings.on_gpu else "cpu")
        net, engine = net.to(device), SharpnessEngine()
        images, targets = (t.to(device) for t in batch)
        fused = {"fused": True} if settings.on_gpu else {}
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, **fused)
        modules = list(net.modules())

        def sample_losses(index: Tensor | None, is_clean: bool) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.on_gpu):
                return F.cross_entropy(net(images), targets, reduction="none")

        def step() -> None:
            part = MicroBatch(sample_losses, objective.terms(targets))
            engine.compute([part], net.parameters(), modules, objective=objective)
            optimizer.step()

        self.captured = Captured(device)
        self.captured.add("step", step)

    def steps(self, number: int) -> float:
        """Make some steps. Return the seconds of one."""
        return self.captured.seconds("step", number)

    def end(self) -> None:
        """Nothing is left to end."""


def make_net(options: Namespace) -> nn.Module:
    """Return a network whose convolutions have the channels last."""
    return step_cost.make_network(options, "batch").to(memory_format=torch.channels_last)


def make_batch(options: Namespace) -> list[Tensor]:
    """Return a batch, in memory that a GPU reads while the host goes on."""
    torch.manual_seed(0)
    images, targets = step_cost.make_batch(options)
    batch = [images.contiguous(memory_format=torch.channels_last), targets]
    return [t.pin_memory() for t in batch] if options.device == "gpu" else batch


def split_of(options: Namespace) -> ClassSplit:
    """Return a split with two tail classes, as ``step_cost.py`` has it."""
    return ClassSplit([5, 5] + [100] * (options.classes - 2), tail=[0, 1])


def makers(network: str, method: str, settings: Settings) -> dict[str, Callable[[], Any]]:
    """Return functions that start the contenders of a method, by name."""
    options, batch = options_of(network, settings), None
    batch, make_objective = make_batch(options), partial(OBJECTIVES[method], split_of(options))

    def trainer(make_module: Callable[[nn.Module], Any]) -> Contender:
        return Contender(options, make_module(make_net(options)), batch)

    def ours(net: nn.Module, **step_options: Any) -> Ours:
        return Ours(net, make_objective(), passes="full", **step_options)

    found: dict[str, Callable[[], Any]] = {"plain": lambda: trainer(Plain), "eager": lambda: trainer(ours)}
    if settings.on_gpu:
        found["graphs"] = lambda: trainer(partial(ours, cuda_graphs=True))
    if network == "ResNet-32":
        found["engine"] = lambda: Engine(make_net(options), make_objective(), batch, settings)
    if method == "SAM":
        for name, kind, make_optimizer in step_cost.peers():
            found[name] = lambda kind=kind, make=make_optimizer: trainer(lambda net: kind(net, make))
    return found


def race(starts: dict[str, Callable[[], Any]], settings: Settings, number: int = 8) -> dict[str, dict[str, Any]]:
    """Start contenders, let them make steps in turn, in random order, and end them.

    Args:
        starts: Functions that start them, by name.
        settings: Settings of the call.
        number: Steps in a turn.

    Returns:
        For each contender the milliseconds of a step (median and quartiles over the rounds), and the memory it took on
        the GPU, in MiB; or the error that it ended with.
    """
    warm_up, rounds = (2, 4) if settings.tiny else (8, 7)
    racing: dict[str, Any] = {}
    seconds: dict[str, list[float]] = {name: [] for name in starts}

    def take_turn(name: str) -> dict[str, Any]:
        seconds[name].append(racing[name].steps(number))
        return {}

    found = {
        name: _attempt(name, racing, partial(_begin, name, start, racing, warm_up)) for name, start in starts.items()
    }
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        order = list(racing)
        shuffle(order)
        for name in order:
            found[name].update(_attempt(name, racing, partial(take_turn, name)))
    for name, contender in racing.items():
        low, median, high = statistics.quantiles(seconds[name], n=4)
        found[name].update(ms=round(1000 * median, 3), quartiles=[round(1000 * low, 3), round(1000 * high, 3)])
        contender.end()
    return found


def _begin(name: str, start: Callable[[], Any], racing: dict[str, Any], warm_up: int) -> dict[str, Any]:
    """Start a contender, and return the memory that its first steps took."""
    gc.collect()
    if not torch.cuda.is_available():
        racing[name] = start()
        racing[name].steps(warm_up)
        return {}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    racing[name] = start()
    racing[name].steps(warm_up)
    after = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    peak, reserved = (round((end - begin) / 2**20, 1) for begin, end in zip(before, after, strict=True))
    return {"peak_mib": peak, "reserved_mib": reserved}


def _attempt(name: str, racing: dict[str, Any], action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what an action returns. If it fails, return its error, and take the contender out of the race."""
    try:
        return action()
    except Exception as error:
        racing.pop(name, None)
        return {"error": in_short(error)}


def in_short(error: Exception) -> str:
    """Return an error as one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]
