"""Makes one training after the other, as ``benchmarks/gpu.py`` plans them, and keeps those that end in time."""

import math
import os
import time
from functools import cache, partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import override

import lightning_ssesam
from gpu_parts import plan
from gpu_parts.folders import is_alive
from gpu_parts.images import SOURCES
from gpu_parts.plan import Run
from gpu_parts.results import read_json, write_json
from gpu_parts.settings import Settings, about, settings_of_child
from lightning_ssesam import ERM, SAM, SSESAM, ImbSAM, Objective, Staged, StageSwitch, StepOptions
from lightning_ssesam.data import ImageFolderLT
from lightning_ssesam.losses import LogitAdjustedLoss
from lightning_ssesam.models import CIFARResNet, LongTailClassifier, SmallConvNet

BATCH = 128
WARM_UP = 5
RECIPE = "SGD lr 0.1 (5 epochs of warm-up, cosine by updates), momentum 0.9, weight decay 5e-4, crop and flip"


class OutOfTimeError(Exception):
    """A training that would not end in time."""


class Images(ImageFolderLT):
    """Images whose test loader can be changed, so that the Trainer measures on training images, too."""

    measured = "test"

    @override
    def test_dataloader(self) -> Any:
        """Return the test images, the training images, or those that a search holds out."""
        loaders = {"train": self.train_dataloader, "val": self.val_dataloader, "test": super().test_dataloader}
        return loaders[self.measured]()


class Classifier(LongTailClassifier):
    """The classifier, which keeps the recall of each class."""

    @override
    def on_test_epoch_end(self) -> None:
        """Called after the last test batch: keeps the recalls, then logs the accuracies."""
        self.recalls = self.test_metrics[0].class_recalls().tolist()
        super().on_test_epoch_end()


class Clock(Callback):
    """Ends a training that would not end in time, as far as its first epochs tell.

    Args:
        deadline: Time by which it has to end.
        extra: Seconds that it needs after its last epoch.
    """

    def __init__(self, deadline: float, extra: float) -> None:
        self.deadline, self.extra, self.epoch_ends = deadline, extra, []

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Called after every epoch: raise an error if those that are left take too long."""
        self.epoch_ends.append(time.time())
        # The first epoch also starts the training.
        if (number := len(self.epoch_ends)) > 2:
            an_epoch = (self.epoch_ends[-1] - self.epoch_ends[0]) / (number - 1)
            if self.epoch_ends[-1] + an_epoch * (trainer.max_epochs - number) + self.extra > self.deadline:
                raise OutOfTimeError(an_epoch * trainer.max_epochs)


def make_objective(run: Run) -> Objective:
    """Return the objective of a training."""
    method = run.method.removeprefix("late ")
    kinds: dict[str, Any] = {"ERM": ERM, "SAM": SAM, "ImbSAM": ImbSAM, "SSE-SAM": SSESAM}
    objective = kinds[method](**run.radii) if method in kinds else getattr(lightning_ssesam, method)()
    return Staged([ERM(), objective]) if run.method.startswith("late ") else objective


@cache
def make_data(name: str, folder: str, is_search: bool, in_memory: bool) -> Images:
    """Return the images, which are decoded once for all trainings of this process."""
    held_out = plan.HELD_OUT if is_search else 0.0
    options = {"in_memory": True} if in_memory else {}
    return Images(folder, val_fraction=held_out, image_size=32, batch_size=BATCH, seed=0, **options)


def make_model(run: Run, data: Images, steps: int, settings: Settings, graphs: bool) -> Classifier:
    """Return the classifier of a training of so many steps."""
    source, warm_up = SOURCES[run.data], WARM_UP * steps // run.epochs
    tail_below = source.tail_below * (1 - plan.HELD_OUT * run.is_search)
    if settings.tiny:
        tail_below = sorted(data.class_counts)[data.num_classes // 2]
    schedule = partial(share_of_rate, steps=steps, warm_up=min(warm_up, steps // 2))
    network = partial(SmallConvNet, width=8, norm="batch") if settings.tiny else partial(CIFARResNet, depth=32)
    return Classifier(
        data.class_counts,
        network,
        make_objective(run),
        LogitAdjustedLoss() if run.loss == "LA" else None,
        partial(SGD, lr=0.1, momentum=0.9, weight_decay=5e-4, **({"fused": True} if settings.on_gpu else {})),
        partial(LambdaLR, lr_lambda=schedule),
        tail_below=max(1, round(tail_below)),
        many_above=source.many_above,
        few_below=source.few_below,
        scheduler_interval="step",
        step_options=StepOptions(passes="full", exact_resume=False, **({"cuda_graphs": True} if graphs else {})),
        in_channels=3,
    ).to(memory_format=torch.channels_last)


def share_of_rate(step: int, steps: int, warm_up: int) -> float:
    """Return the learning rate of a step, as a share of the largest: a line, then a cosine to 0."""
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def train(run: Run, settings: Settings, graphs: bool) -> dict[str, Any]:
    """Make a training, and return its result.

    Raises:
        OutOfTimeError: If it would not end in time.
    """
    start = time.time()
    L.seed_everything(run.seed)
    data = make_data(run.data, settings.images[run.data], run.is_search, in_memory=True)
    # The last, smaller batch of an epoch would be computed without a graph.
    batches = max(1, sum(data.class_counts) // BATCH)
    model = make_model(run, data, batches * run.epochs, settings, graphs)
    clock = Clock(settings.deadline, extra=4.0)
    switches = [StageSwitch(at=run.switches)] if run.switches else []
    trainer = L.Trainer(
        accelerator=settings.device,
        devices=1,
        precision=settings.precision,
        max_epochs=run.epochs,
        limit_train_batches=batches,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        callbacks=[clock, *switches],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=data)
    seconds, updates = time.time() - start, trainer.global_step
    on_test = measure(trainer, model, data, "val" if run.is_search else "test")
    on_train = measure(trainer, model, data, "train")
    return {
        **plan.describe(run),
        "updates": updates,
        "batch": BATCH,
        "network": type(model.backbone).__name__,
        "recipe": RECIPE,
        "precision": settings.precision,
        "graphs": graphs,
        "jobs": settings.jobs,
        "class_counts": data.class_counts,
        **on_test,
        "training_accuracy": on_train["accuracy"],
        "seconds": round(seconds, 1),
        **about(settings),
    }


def measure(trainer: L.Trainer, model: Classifier, data: Images, part: str) -> dict[str, Any]:
    """Return the recall of each class, and the mean recalls of the groups, on a part of the images."""
    data.measured = part
    (logged,) = trainer.test(model, datamodule=data, verbose=False)
    groups = ("all", "head", "tail", "many", "medium", "few")
    accuracy = {group: round(logged[f"test/acc_{group}"], 5) for group in groups}
    # A group without classes is NaN, which is not JSON.
    accuracy = {group: value for group, value in accuracy.items() if value == value}
    return {"recall": [round(value, 5) for value in model.recalls], "accuracy": accuracy}


class Claims:
    """Which trainings this call has begun, by any of its processes: one file each.

    Args:
        folder: Folder of the files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def take(self, run: Run) -> bool:
        """Claim a training. Return whether nobody else has."""
        try:
            with self._file(run).open("x") as file:
                file.write(str(os.getpid()))
        except FileExistsError:
            return False
        return True

    def settle(self, run: Run, seconds: float | None, jobs: int) -> None:
        """Note that a training is over, or how long it would have taken."""
        write_json(self._file(run), {**plan.describe(run), "seconds": seconds, "jobs": jobs})

    def too_long(self) -> list[dict[str, Any]]:
        """Return the trainings that would have taken too long."""
        notes = [read_json(path) for path in self.folder.iterdir()]
        return [note for note in notes if isinstance(note, dict) and note["seconds"] is not None]

    def are_pending(self) -> bool:
        """Return whether another process still trains."""
        begun = [read_json(path) for path in self.folder.iterdir()]
        return any(isinstance(pid, int) and pid != os.getpid() and is_alive(pid) for pid in begun)

    def _file(self, run: Run) -> Path:
        return self.folder / run.path.replace("/", "_")


def next_run(settings: Settings, claims: Claims) -> Run | None:
    """Claim the next training that ends in time; None if there is none, now or later."""
    hardware = about(settings)["hardware"]
    while True:
        found = settings.found()
        same = ("hardware", hardware), ("jobs", settings.jobs)
        measured = [one for one in found.values() if "radii" in one and all(one[k] == value for k, value in same)]
        measured += claims.too_long()
        for run in plan.ordered(found, list(settings.images), settings.epochs, settings.seeds):
            fits = time.time() + plan.estimate(run, measured) < settings.deadline
            if run.path not in found and (fits or settings.tiny) and claims.take(run):
                return run
        # Another process may find the radius that others wait for.
        if not claims.are_pending() or time.time() > settings.deadline:
            return None
        time.sleep(0.5)


def main() -> None:
    """Make trainings until none is left that ends in time."""
    settings, _ = settings_of_child()
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    claims = Claims(Path(settings.scratch) / "claims")
    while (run := next_run(settings, claims)) is not None:
        print(time.strftime("%H:%M:%S"), run.path, flush=True)
        try:
            try:
                result = train(run, settings, graphs=settings.on_gpu)
            except MisconfigurationException as refusal:
                if not settings.on_gpu:
                    raise
                print(f"without graphs, because: {refusal}", flush=True)
                result = train(run, settings, graphs=False)
        except OutOfTimeError as error:
            claims.settle(run, error.args[0], settings.jobs)
            print("would not end in time", flush=True)
        except BaseException:
            # This process ends, since an error may have left the device in a bad state.
            claims.settle(run, None, settings.jobs)
            raise
        else:
            write_json(Path(settings.output) / run.path, result)
            claims.settle(run, None, settings.jobs)


if __name__ == "__main__":
    main()
