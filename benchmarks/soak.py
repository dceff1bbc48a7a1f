"""Trains through injected faults, and checks that the final weights equal those of a training without faults.

    python benchmarks/soak.py

A tiny model with dropout, batch norm and AdamW trains with SSE-SAM. Some batches have no tail samples. Three kinds of
faults happen at random:

- a batch of NaN;
- an exception in a clean or perturbed pass, after which a checkpoint is written;
- a kill in a clean or perturbed pass, after which only the last periodic checkpoint is left.

After an exception or a kill, a new module, Trainer and loader continue the training. The last lines say whether the
weights of both trainings are equal bit for bit, and how much memory the process used. The output below was printed with
Python 3.11, torch 2.14 and lightning 2.6 on one core of a shared machine:

       800 batches of NaN
        24 exception in a clean pass
        36 exception in a perturbed pass
        14 kill in a clean pass
        32 kill in a perturbed pass
    memory: 795 MiB after a fifth of the faults, 800 MiB after the last
    20000 updates in 219 s, and as many without faults
    the weights are the same
"""

import argparse
import logging
import random
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import Tensor, nn
from typing_extensions import override

from lightning_ssesam import SSESAM, ClassSplit, SharpnessAwareMixin, StageSwitch, StepOptions

BATCHES = 50
SPLIT = ClassSplit([50, 40, 30, 6, 5], tail=[3, 4])


class Killed(BaseException):
    """Stands for a killed process: only files on disk survive."""


class Loader:
    """Batches in a random order, which can resume at any batch. Some are NaN, and some have no tail samples."""

    def __init__(self, bad: int) -> None:
        self.bad, self.seed, self.position, self.resumed = bad, 0, 0, False

    def __len__(self) -> int:
        return BATCHES + self.bad

    def __iter__(self) -> Iterator[list[Tensor]]:
        if not self.resumed:
            self.seed, self.position = int(torch.randint(1 << 30, ())), 0
        self.resumed = False
        chance = random.Random(self.seed)
        numbers: list[int | None] = list(range(BATCHES))
        for _ in range(self.bad):
            numbers.insert(chance.randrange(len(numbers)), None)
        for number in numbers[self.position :]:
            self.position += 1
            yield self._batch(number)

    def _batch(self, number: int | None) -> list[Tensor]:
        if number is None:
            return [torch.full((8, 8), float("nan")), torch.zeros(8, dtype=torch.long)]
        generator = torch.Generator().manual_seed(self.seed + number)
        targets = torch.randint(3 if number % 4 == 0 else 5, (8,), generator=generator)
        return [torch.randn(8, 8, generator=generator) + F.one_hot(targets, 8), targets]

    def state_dict(self) -> dict[str, int]:
        """Return the seed of the epoch and the position in it."""
        return {"seed": self.seed, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from that position."""
        self.seed, self.position, self.resumed = state["seed"], state["position"], state["position"] > 0


class Model(SharpnessAwareMixin, L.LightningModule):
    """Raises a fault in a random share of its passes, ``fault_share``."""

    step_options = StepOptions(on_nonfinite="skip")

    def __init__(self, fault_share: float, chance: random.Random, faults: Counter[str]) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, 5))
        self.objective = SSESAM(SPLIT, head_rho=0.05, tail_rho=0.1)
        # A generator of the module would be put back after a fault, and the same fault would come again.
        self.draw, self.choose = chance.random, chance.choice
        self.fault_share, self.faults = fault_share, faults

    @override
    def sample_losses(self, batch: Any) -> Tensor:
        inputs, targets = batch
        losses = F.cross_entropy(self.net(inputs), targets, reduction="none")
        if self.draw() < self.fault_share:
            kind = self.choose(["exception", "kill"])
            self.faults[f"{kind} in a {'clean' if self.in_clean_pass else 'perturbed'} pass"] += 1
            raise ConnectionError if kind == "exception" else Killed
        return losses

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Rescue(OnExceptionCheckpoint):
    """Writes a checkpoint after an exception, but not after a kill."""

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, Killed):
            super().on_exception(trainer, pl_module, exception)


def train(epochs: int, faulty: bool, folder: Path, faults: Counter[str], memory: list[float]) -> Model:
    """Train to the end. After each fault, start again from the last checkpoint."""
    chance = random.Random(7)
    torch.manual_seed(7)
    while True:
        model = Model(0.002 if faulty else 0.0, chance, faults)
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            gradient_clip_val=1.0,
            callbacks=[
                StageSwitch(epoch=max(1, epochs // 2)),
                ModelCheckpoint(folder, "last", every_n_train_steps=29, enable_version_counter=False),
                Rescue(folder, "last"),
            ],
        )
        last = folder / "last.ckpt"
        try:
            trainer.fit(model, Loader(2 if faulty else 0), ckpt_path=last if last.exists() else None)
        except (ConnectionError, Killed, SystemExit):
            memory.append(resident_memory())
            continue
        faults["batches of NaN"] = model.skipped_updates
        return model


def resident_memory() -> float:
    """Return the memory of this process in MiB, or 0 if the system does not report it."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * 4096 / 2**20 if status.exists() else 0.0


def soak(steps: int) -> tuple[bool, Counter[str], list[float]]:
    """Train for ``steps`` updates with and without faults.

    Returns whether the final weights are equal, the number of faults by kind, and the memory after each fault in MiB.
    """
    faults, memory = Counter[str](), [resident_memory()]
    epochs = -(-steps // BATCHES)
    weights = []
    for faulty in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            weights.append(train(epochs, faulty, Path(folder), faults if faulty else Counter(), memory).state_dict())
    are_equal = all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    return are_equal, faults, memory


def main() -> None:
    """Train, and print the faults, the memory and the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--steps", type=int, default=20_000, help="updates, not counting skipped ones; 20000 by default"
    )
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    start = time.monotonic()
    steps = parser.parse_args().steps
    are_equal, faults, memory = soak(steps)
    for kind, number in sorted(faults.items()):
        print(f"{number:6d} {kind}")
    fifth = max(len(memory) // 5, 1)
    print(f"memory: {memory[fifth]:.0f} MiB after a fifth of the faults, {memory[-1]:.0f} MiB after the last")
    print(f"{steps} updates in {time.monotonic() - start:.0f} s, and as many without faults")
    print("the weights are the same" if are_equal else "THE WEIGHTS DIFFER")
    raise SystemExit(not are_equal)


if __name__ == "__main__":
    main()
