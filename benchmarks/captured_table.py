r"""Many trainings side by side on one GPU, without a Trainer: each whole update is a CUDA graph on a stream of its own.

    python benchmarks/captured_table.py --images cifar10-images.tar.xz --output captured \
        --runs ERM::LA:2 SAM:0.1:LA:2 SSE-SAM:0.1:LA:2 "late SAM:0.2:LA:2"      # method:radius:loss:seed

The graphs of one process share the GPU. On an H200, 16 trainings took half as long as one after the other. A process
with a Trainer makes one training at a time (``benchmarks/gpu.py``). docs/results.md has a table of 61 epochs.

A graph holds the choice and the augmentation of a batch, ``SharpnessEngine.compute`` and the step of the optimizer. The
network must not draw random numbers. Batches of 128, SGD with momentum 0.9, weight decay 5e-4 and learning rate 0.1
after five epochs of warm-up, then a cosine; bfloat16, channels last. The last epoch is measured.
"""

import argparse
import math
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import step_cost
import torch
import torch.nn.functional as F
from gpu_parts import images, plan, tables
from gpu_parts.captures import Captured, seconds_of
from gpu_parts.folders import make_folder
from gpu_parts.results import write_json
from gpu_parts.training import RECIPE, WARM_UP, make_objective, share_of_rate
from PIL import Image
from torchvision.datasets import ImageFolder

from lightning_ssesam import ClassSplit
from lightning_ssesam.data.images import IMAGENET_MEAN, IMAGENET_STD
from lightning_ssesam.engine import MicroBatch, SharpnessEngine
from lightning_ssesam.models import CIFARResNet, SmallConvNet

RATE = 0.1
TIMED = {"ERM": "ERM::CE:0", "SAM": "SAM:0.1:CE:0", "ImbSAM": "ImbSAM:0.1:CE:0", "SSE-SAM stage 1": "SSE-SAM:0.1:CE:0"}
"""Trainings whose updates are timed, for the cost of all others."""


class Data:
    """The images of all trainings, on the device."""

    def __init__(self, source, folder, batch, device):
        sets = [ImageFolder(folder / part).samples for part in images.PARTS]
        pixels = [torch.from_numpy(np.stack([np.array(Image.open(p).convert("RGB")) for p, _ in s])) for s in sets]
        train, self.test_images = (values.permute(0, 3, 1, 2).to(device) for values in pixels)
        self.targets, self.test_targets = (torch.tensor([label for _, label in s], device=device) for s in sets)
        self.mean, self.std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        self.padded, self.places = F.pad(train, [4] * 4), torch.arange(train.shape[-1], device=device)
        self.counts = self.targets.bincount().tolist()
        self.log_counts = torch.tensor(self.counts, device=device).log()
        self.split = ClassSplit.from_counts(self.counts, tail_below=source.tail_below)
        self.batch = min(batch, len(self.targets))
        self.batches = len(self.targets) // self.batch

    def normalised(self, pixels):
        """Return a batch of pixels as the network takes it."""
        return ((pixels / 255 - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def augmented(self, order, row, column, mirrored):
        """Return a batch of training images, cropped and mirrored as drawn."""
        rows, columns = row[:, None] + self.places, column[:, None] + self.places
        columns = torch.where(mirrored[:, None] > 0, columns.flip(1), columns)
        pixels = self.padded[order[:, None, None], :, rows[:, :, None], columns[:, None, :]]
        return self.normalised(pixels.permute(0, 3, 1, 2))


class Training:
    """One training, with a graph for each stage of its objective."""

    def __init__(self, run, data, network, device):
        self.run, self.data = run, data
        torch.manual_seed(run.seed)
        self.net = network(len(data.counts)).to(device, memory_format=torch.channels_last)
        self.objective, self.engine = make_objective(run), SharpnessEngine()
        self.objective.bind(data.split)
        self.rate = torch.tensor(RATE, device=device)
        options = {"momentum": 0.9, "weight_decay": 5e-4, "fused": device.type == "cuda"}
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=self.rate, **options)
        self.generator = torch.Generator().manual_seed(1000 + run.seed)
        # Image, row, column, and whether it is mirrored, of every place in the batches of an epoch.
        self.draws = torch.zeros(data.batches, 4, data.batch, dtype=torch.long, device=device)
        updates = run.epochs * data.batches
        schedule = partial(share_of_rate, steps=updates, warm_up=min(WARM_UP * data.batches, updates // 2))
        self.rates = RATE * torch.tensor([schedule(update) for update in range(updates)], device=device)
        # Static memory that a graph reads and moves: the batch of the epoch, and the update.
        self.position, self.update = torch.zeros(2, 1, dtype=torch.long, device=device).unbind()
        self.draw()
        self.captured = Captured(device)
        weights = [t.detach() for t in self.net.state_dict().values()]
        start = [t.clone() for t in weights]
        for stage in range(1, self.objective.num_stages + 1):
            self.captured.add(stage, partial(self.step, stage))
        with torch.no_grad():
            # Graphs read the memory that they were captured with, so that it is written to.
            for tensor, value in zip(weights, start, strict=True):
                tensor.copy_(value)
            for state in self.optimizer.state.values():
                state["momentum_buffer"].zero_()
            self.update.zero_()
        step_cost.synchronize()

    def draw(self):
        """Draw the order and the augmentation of an epoch."""
        shape, draw = (self.data.batches, 1, self.data.batch), self.generator
        order = torch.randperm(len(self.data.targets), generator=draw)[: math.prod(shape)].view(shape)
        offsets = torch.randint(9, (shape[0], 2, shape[2]), generator=draw)
        draws = torch.cat([order, offsets, torch.randint(2, shape, generator=draw)], 1)
        # From pinned memory, so that the host does not wait for the updates of the last epoch.
        self.draws.copy_(draws.pin_memory() if self.draws.is_cuda else draws, non_blocking=True)
        self.position.zero_()

    def step(self, stage):
        """Make an update. All of it can be captured."""
        order, *augmentation = self.draws.index_select(0, self.position)[0]
        batch, targets = self.data.augmented(order, *augmentation), self.data.targets[order]
        self.objective.stage = stage

        def sample_losses(index, is_clean):
            return F.cross_entropy(self.logits(batch), targets, reduction="none")

        part = MicroBatch(sample_losses, self.objective.terms(targets))
        self.engine.compute([part], self.net.parameters(), self.net, objective=self.objective)
        self.rate.copy_(self.rates.index_select(0, self.update)[0])
        self.optimizer.step()
        self.position.add_(1).remainder_(self.data.batches)
        self.update.add_(1).remainder_(len(self.rates))

    def logits(self, batch):
        """Return the logits of the loss, adjusted in training."""
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=batch.is_cuda):
            logits = self.net(batch)
        # The sum is float32 in any case.
        return logits + self.data.log_counts * float(self.run.loss == "LA" and self.net.training)

    def stage_at(self, epoch):
        """Return the stage of an epoch, counted from 0."""
        return 1 + sum(epoch >= round(share * self.run.epochs) for share in self.run.switches)

    def recall(self):
        """Return the recall of each class on the test set."""
        right, targets = self.right(self.data.test_images, self.data.test_targets), self.data.test_targets
        return [round(right[targets == label].float().mean().item(), 5) for label in range(len(self.data.counts))]

    @torch.no_grad()
    def right(self, pixels, targets):
        """Return for each image whether the network knows its class."""
        self.net.eval()
        logits = [self.logits(self.data.normalised(chunk)) for chunk in pixels.split(2500)]
        self.net.train()
        return torch.cat(logits).argmax(1) == targets

    def result(self):
        """Return the result, with what ``gpu_parts.tables.captured`` reads."""
        data, targets = self.data, self.data.targets
        right = self.right(data.padded[:, :, 4:-4, 4:-4], targets) & data.split.tail.to(targets.device)[targets]
        method = f"{self.run.method} {'/'.join(f'{radius:g}' for radius in self.run.radii.values())}".rstrip()
        train = {"right_tail_a_batch": round(right.double().mean().item() * data.batch, 5)}
        known = {**plan.describe(self.run), "method": method, "stages": stages_of(self.run)}
        return {**known, "recall": self.recall(), "train": train}


def stages_of(run):
    """Return of each stage the share of the training at which it ends, and its radii: head (None: no groups), tail."""
    radius = run.radius or 0.0
    last = {"SAM": [(None, radius)], "ImbSAM": [(0.0, radius)], "SSE-SAM": [(radius / 2, radius), (0.0, radius)]}
    method, is_late = run.method.removeprefix("late "), run.method.startswith("late ")
    radii = [(None, 0.0)] * (is_late or method == "ERM") + last.get(method, [])
    return [[until, *pair] for until, pair in zip([*run.switches, 1.0], radii, strict=True)]


def replayed_ms(make_training, name, epochs, number):
    """Return the milliseconds of an update of each kind, which nothing else delays."""
    found = {}
    for kind, text in TIMED.items():
        training = make_training(plan.parse_run(text, name, epochs))
        found[kind] = round(1000 * training.captured.seconds(1, number), 3)
    return found


def train_all(trainings, epochs):
    """Make all trainings, one update of each in turn."""
    for epoch in range(epochs):
        for training in trainings:
            with training.captured.on_stream():
                training.draw()
        for _ in range(trainings[0].data.batches):
            for training in trainings:
                training.captured.replay(training.stage_at(epoch))


def parse_arguments():
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="folder or archive of the images")
    parser.add_argument("--output", type=Path, help="folder (default: build/captured, or build/captured_tiny)")
    parser.add_argument("--epochs", type=int, default=60, help="epochs of each training (default: 60)")
    parser.add_argument("--runs", nargs="+", required=True, metavar="METHOD:RADIUS:LOSS:SEED")
    parser.add_argument("--tiny", action="store_true", help="a tiny network, to try the script")
    options = parser.parse_args()
    if options.epochs < 1:
        parser.error(f"Expected argument `--epochs` to be at least 1, but got {options.epochs}.")
    options.output = options.output or Path("build/captured_tiny" if options.tiny else "build/captured")
    return options


def main():
    """Make the trainings that are asked for, and write their table."""
    options = parse_arguments()
    ((name, place), *_) = images.find([options.images]).items()
    runs = [plan.parse_run(text, name, options.epochs) for text in options.runs]
    make_folder(options.output)
    source, device = images.SOURCES[name], torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True
    network = partial(SmallConvNet, in_channels=3, width=8) if options.tiny else partial(CIFARResNet, depth=32)
    with tempfile.TemporaryDirectory(dir=options.output) as folder:
        images.lay_out(name, place, Path(folder) / name)
        data = Data(source, Path(folder) / name, batch=128, device=device)
    make_training = partial(Training, data=data, network=network, device=device)
    ms = replayed_ms(make_training, name, options.epochs, number=20 if device.type == "cuda" else 3)
    trainings = [make_training(run) for run in runs]
    seconds = seconds_of(partial(train_all, trainings, options.epochs))
    written = {
        "data": source.title,
        "network": type(trainings[0].net).__name__,
        "epochs": options.epochs,
        "batch": data.batch,
        "recipe": RECIPE,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "torch": str(torch.__version__),
        "tiny": options.tiny,
        "class_counts": data.counts,
        "tail_below": source.tail_below,
        "replayed_ms": ms,
        "seconds": round(seconds, 1),
        "runs": [training.result() for training in trainings],
    }
    write_json(options.output / f"captured_{options.epochs}_epochs.json", written)
    print(tables.captured({"captured/new.json": written}))


if __name__ == "__main__":
    main()
