"""Measures milliseconds and memory of a step for one network, and whether graphs change a bit or wait for the host."""

import time
from pathlib import Path
from typing import Any

import lightning as L
import step_cost
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from typing_extensions import override

from gpu_parts import contenders
from gpu_parts.contenders import OBJECTIVES, Ours
from gpu_parts.results import write_json
from gpu_parts.settings import Settings, about, measured, settings_of_child

STEPS = 50
"""Steps after which weights are compared."""


class Watch(Callback):
    """Lets every step after the first ones fail that waits for the GPU."""

    first = 10

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Called before every step: begin to watch."""
        if batch_idx >= self.first and torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("error")

    @override
    def on_train_batch_end(self, *args: Any) -> None:
        """Called after every step: end it."""
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")


def weights_after(
    settings: Settings, method: str, steps: int, callbacks: tuple[Callback, ...] = (), **step_options: Any
) -> dict[str, Tensor]:
    """Return weights and buffers of a ResNet-32 after some steps on different batches; and before, as "start NAME"."""
    options = contenders.options_of("ResNet-32", settings)
    objective = OBJECTIVES[method](contenders.split_of(options))
    module = Ours(contenders.make_net(options), objective, passes="full", **step_options)
    start = {f"start {name}": value.clone() for name, value in module.state_dict().items()}
    torch.manual_seed(1)
    batches = [step_cost.make_batch(options) for _ in range(steps)]
    if settings.on_gpu:
        batches = [tuple(t.pin_memory() for t in batch) for batch in batches]
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    step_cost.make_trainer(options, max_epochs=1, callbacks=[*callbacks]).fit(module, loader)
    return {**start, **{name: value.cpu().clone() for name, value in module.state_dict().items()}}


def difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Any]:
    """Return which tensors are not the same to the last bit, and how far apart they are, as a share of the way."""
    names = [name for name in first if not name.startswith("start ")]
    differing = [name for name in names if not torch.equal(first[name], second[name])]
    apart, way = _distance(first, second, differing), _distance(first, {n: first[f"start {n}"] for n in names}, names)
    return {"tensors": len(names), "differing": differing, "share_of_the_way": apart / way if way else 0.0}


def _distance(first: dict[str, Tensor], second: dict[str, Tensor], names: list[str]) -> float:
    return sum(float((first[name].double() - second[name].double()).square().sum()) for name in names) ** 0.5


def compare_bits(settings: Settings) -> dict[str, Any]:
    """Return for each method how an eager training differs from one with graphs, and once from a second eager one."""
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    found: dict[str, Any] = {}
    kinds = {"eager again": {}, **_with_graphs(settings)}
    for method in OBJECTIVES:
        eager = weights_after(settings, method, STEPS)
        found[method] = {}
        for kind, options in kinds.items():
            # One method tells whether the device repeats itself.
            if kind == "with graphs" or method == "SSE-SAM stage 1":
                try:
                    found[method][kind] = difference(eager, weights_after(settings, method, STEPS, **options))
                except Exception as error:
                    found[method][kind] = {"error": contenders.in_short(error)}
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = False, True
    return found


def _with_graphs(settings: Settings) -> dict[str, dict[str, Any]]:
    return {"with graphs": {"cuda_graphs": True}} if settings.on_gpu else {}


def find_waits(settings: Settings) -> dict[str, str]:
    """Return what waits for the GPU in a step of each method, eager and with graphs; empty texts if nothing does."""
    kinds = {"eager": {}, **_with_graphs(settings)}
    pairs = [(method, kind) for method in OBJECTIVES for kind in kinds]
    return {f"{method} {kind}": _error_of(settings, method, kinds[kind]) for method, kind in pairs}


def _error_of(settings: Settings, method: str, options: dict[str, Any]) -> str:
    try:
        weights_after(settings, method, Watch.first + 6, (Watch(),), **options)
    except Exception as error:
        return contenders.in_short(error)
    finally:
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")
    return ""


def main() -> None:
    """Measure one network, and write after every method what there is."""
    settings, (network,) = settings_of_child()
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    name = f"steps/{network.replace('/', '_')}.json"
    if any(one["is_whole"] for one in measured(name, settings)):
        print("measured already", flush=True)
        return
    path = Path(settings.output) / name
    given = contenders.options_of(network, settings)
    shape = {"batch": given.batch_size, "image_size": given.image_size, "precision": settings.precision}
    result: dict[str, Any] = {"network": network, **shape, **about(settings), "is_whole": False, "methods": {}}
    number = 2 if settings.tiny else 4 if given.image_size > 64 else 8
    for method in OBJECTIVES:
        result["methods"][method] = contenders.race(contenders.makers(network, method, settings), settings, number)
        write_json(path, result)
        print(time.strftime("%H:%M:%S"), method, result["methods"][method], flush=True)
    if network == "ResNet-32":
        result["bits"] = compare_bits(settings)
        write_json(path, result)
        result["waits"] = find_waits(settings)
    write_json(path, {**result, "is_whole": True})


if __name__ == "__main__":
    main()
