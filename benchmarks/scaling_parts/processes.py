"""Counts and measures the steps of several processes on the CPUs of this machine, which talk by gloo."""

import copy
import json
import logging
import os
import random
import socket
import statistics
import tempfile
import warnings
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import step_cost
import torch
import torch.multiprocessing
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from lightning_ssesam import ERM, SAM, SSESAM, ClassSplit, ImbSAM, Objective, Term
from scaling_parts import traffic

CLASSES = 10
SPLIT = ClassSplit([5, 5] + [100] * (CLASSES - 2), tail=[0, 1])
OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "ERM": ERM,
    "SAM": SAM,
    "ImbSAM": partial(ImbSAM, SPLIT),
    "SSE-SAM stage 1": partial(SSESAM, SPLIT),
    "SSE-SAM stage 2": lambda: step_cost.second(SSESAM(SPLIT)),
}
ASCENTS = ("local", "global", "FSDP2")
"""DDP with ``processes="local"`` and ``"global"``, and FSDP2, which is always global."""

COUNTED_STEPS = 3


class Sharded(step_cost.Ours):
    """A contender under FSDP2: each stage of the network is divided, then the rest."""

    def configure_model(self) -> None:
        """Called when the run starts: divide the parameters."""
        mesh = self.device_mesh["data_parallel"]
        for name, part in self.net.named_children():
            if name.startswith("layer"):
                fully_shard(part, mesh=mesh)
        fully_shard(self.net, mesh=mesh)

    @staticmethod
    def stays(net: nn.Module) -> Callable[[Tensor], bool]:
        """Return which parameters stay whole after a forward pass: those outside of the stages."""
        whole = {id(p) for name, p in net.named_parameters() if not name.startswith("layer")}
        return lambda parameter: id(parameter) in whole


def make_module(options: Namespace, name: str, is_sharded: bool = False) -> step_cost.Ours:
    """Return a module with an objective."""
    net = step_cost.make_network(options, "group")
    return (Sharded if is_sharded else step_cost.Ours)(net, OBJECTIVES[name]())


def strategy_of(ascent: str, processes: int) -> Strategy:
    """Return the strategy for an entry of :data:`ASCENTS`."""
    common: dict[str, Any] = {"process_group_backend": "gloo", "timeout": timedelta(minutes=5)}
    return ModelParallelStrategy(processes, 1, **common) if ascent == "FSDP2" else DDPStrategy(**common)


def make_batch(options: Namespace, rank: int, count: int = 1) -> list[Tensor]:
    """Return a batch of a process, as large as so many."""
    torch.manual_seed(rank)
    many = copy.copy(options)
    many.batch_size *= count
    return list(step_cost.make_batch(many))


def start(work: Callable[..., Any], options: Namespace) -> Any:
    """Run a function in every process. Return what the first one returns, which must be JSON."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "result.json")
        torch.multiprocessing.spawn(_work, (work, options, port, path), nprocs=options.processes)
        return json.loads(path.read_text())


def _work(rank: int, work: Callable[..., Any], options: Namespace, port: int, path: Path) -> None:
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    torch.set_num_threads(1)
    result = work(options, rank)
    if rank == 0:
        path.write_text(json.dumps(result))


# The count.


def count(options: Namespace, rank: int) -> list[dict[str, Any]]:
    """Return for each objective and ascent what an update sends: by formula, by count, and by the sockets."""
    found = []
    for name in OBJECTIVES:
        for ascent in options.ascents:
            module = make_module(options, name, ascent == "FSDP2")
            module.step_options = replace(module.step_options, processes="local" if ascent == "local" else "global")
            batch, net = make_batch(options, rank), copy.deepcopy(module.net)
            counts = traffic.TrafficOfSteps(counts_wire=True)
            trainer = _trainer(strategy_of(ascent, options.processes), options.processes, callbacks=[counts])
            trainer.fit(module, torch.utils.data.DataLoader([batch] * COUNTED_STEPS, batch_size=None))
            found.append(
                {
                    "objective": name,
                    "ascent": ascent,
                    "formula": formula(net, module.objective.terms(batch[1]), ascent, options),
                    "counted": counts.steps[-1].nbytes,
                    "calls": counts.steps[-1].calls,
                    "wire": counts.wire[-1],
                }
            )
    return found


def formula(net: nn.Module, terms: tuple[Term, ...], ascent: str, options: Namespace) -> dict[str, int]:
    """Return the bytes of an update by kind of collective."""
    params, targets = list(net.parameters()), traffic.of_targets(options.processes, options.batch_size)
    if ascent == "FSDP2":
        return targets + traffic.under_fsdp2(params, options.processes, terms, stays=Sharded.stays(net))
    sent = traffic.under_ddp(params, traffic.gradient_exchanges(terms, ascent == "local"))
    return sent if ascent == "local" else targets + sent


def _trainer(strategy: Strategy | str, devices: int, **kwargs: Any) -> L.Trainer:
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return L.Trainer(
        accelerator="cpu",
        strategy=strategy,
        devices=devices,
        max_epochs=1,
        use_distributed_sampler=False,
        **dict.fromkeys(quiet, False),
        **kwargs,
    )


# The measurement.


class Racer(step_cost.Contender):
    """A Trainer in a thread, which makes one step for each call of :meth:`step`, perhaps with other processes."""

    def __init__(self, module: step_cost.Ours, batch: Any, strategy: Strategy | str, devices: int) -> None:
        self.module, self.strategy, self.devices, self.threads = module, strategy, devices, 1
        super().__init__(Namespace(), module, batch)

    def _run(self, options: Namespace, module: step_cost.Ours, callbacks: Any) -> None:
        try:
            _trainer(self.strategy, self.devices).fit(module, self._batches())
        except BaseException as error:
            self.error = error
        self.turns.done.release()

    def _batches(self) -> Any:
        racer = self

        class Batches:
            """The loader: a thread has a number of CPU threads of its own, which it sets before each step."""

            def __len__(self) -> int:
                return len(racer.turns)

            def __iter__(self) -> Any:
                for batch in racer.turns:
                    torch.set_num_threads(racer.threads)
                    yield batch

        return Batches()


WAYS = ("alone", "both cores", "apart", *ASCENTS)
"""How a step is made. One process alone, on one core or on all with the batches of all processes; all processes at a
time, each for itself; and together, in the :data:`ASCENTS`."""


def measure(options: Namespace, rank: int) -> list[dict[str, Any]]:
    """Return for each objective the seconds of its steps in each way, round by round, as the first process saw them."""
    own, union = make_batch(options, rank), make_batch(options, rank, options.processes)
    racers: dict[tuple[str, str], Racer] = {}
    for name in OBJECTIVES:
        single = Racer(make_module(options, name), own, "auto", 1)
        racers |= {(name, way): single for way in ("alone", "both cores", "apart")}
        ddp = Racer(make_module(options, name), own, strategy_of("global", options.processes), options.processes)
        racers |= {(name, way): ddp for way in ("local", "global")}
        if "FSDP2" in options.ascents:
            sharded = make_module(options, name, is_sharded=True)
            racers[name, "FSDP2"] = Racer(sharded, own, strategy_of("FSDP2", options.processes), options.processes)
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in racers}
    shuffle = random.Random(0).shuffle
    for _ in range(options.warm_up + options.rounds):
        order = list(racers)
        shuffle(order)
        for key in order:
            seconds[key].append(_step(racers[key], key[1], rank, own, union, options.processes))
    for racer in dict.fromkeys(racers.values()):
        racer.end()
    return [
        {"objective": name, "way": way, "seconds": times[options.warm_up :]} for (name, way), times in seconds.items()
    ]


def _step(racer: Racer, way: str, rank: int, own: Any, union: Any, processes: int) -> float:
    """Make a step in one of :data:`WAYS`, while processes that do not take part wait. Return its seconds."""
    if way in ("local", "global"):
        racer.module.step_options = replace(racer.module.step_options, processes=way)
    racer.turns.batch = union if way == "both cores" else own
    racer.threads = processes if way == "both cores" else 1
    torch.distributed.barrier()
    seconds = racer.step() if rank == 0 or way not in ("alone", "both cores") else 0.0
    torch.distributed.barrier()
    return seconds


def medians(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return for each objective the milliseconds of a step alone, and the ratios of the other ways to it, by round."""
    times = {(row["objective"], row["way"]): row["seconds"] for row in found}
    rows = []
    for name in OBJECTIVES:
        units = times[name, "alone"]
        row: dict[str, Any] = {"objective": name, "ms": 1000 * statistics.median(units)}
        for way in WAYS[1:]:
            if (name, way) in times:
                ratios = [value / unit for value, unit in zip(times[name, way], units, strict=True)]
                low, median, high = statistics.quantiles(ratios, n=4)
                row[way] = {"ratio": median, "quartiles": [low, high]}
        rows.append(row)
    return rows
