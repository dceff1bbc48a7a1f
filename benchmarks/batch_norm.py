"""Measures how ``batch_norm_statistics="group"`` changes the accuracy of SSE-SAM.

    python benchmarks/batch_norm.py

Trains a small convolutional network with batch norm on DigitsLT. Full passes are exact. Group statistics are cheaper:
the effect of a perturbation is computed with the statistics of the perturbed samples alone. The output below is from
one core of a shared machine, with Python 3.11, torch 2.14 and lightning 2.6. It shows mean and standard deviation over
five seeds, and the seconds of a training:

    ERM    head  98.5 ± 0.6   tail  81.3 ± 1.1   all  88.2 ± 0.8   6 s
    full   head  98.8 ± 0.4   tail  85.1 ± 0.7   all  90.6 ± 0.5   15 s
    group  head  98.5 ± 0.5   tail  84.4 ± 1.2   all  90.0 ± 0.6   17 s

A network this small spends its time on calls, not on arithmetic. benchmarks/step_cost.py shows what groups save.

Other images, such as CIFAR-10, come from ``FOLDER/train/CLASS/*`` and ``FOLDER/test/CLASS/*``. They are made
long-tailed:

    python benchmarks/batch_norm.py --folder FOLDER --largest 1000 --image-size 32 --epochs 100
"""

import argparse
import logging
import statistics
import time
import warnings
from pathlib import Path

import lightning as L
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

from lightning_ssesam import ERM, SSESAM, DigitsLT, LongTailClassifier, StageSwitch, StepOptions
from lightning_ssesam.data import LongTailDataModule, long_tailed_counts, long_tailed_indices
from lightning_ssesam.models import SmallConvNet

MODES = {
    "ERM": (ERM, StepOptions()),
    "full": (SSESAM, StepOptions(passes="full")),
    "group": (SSESAM, StepOptions(passes="split", batch_norm_statistics="group")),
}


class Folder(LongTailDataModule):
    """The images of a folder, held in memory. The training set is made long-tailed."""

    def __init__(self, folder, largest, imbalance_factor, image_size, batch_size):
        super().__init__()
        self.train, self.test = (self._load(folder / part, image_size) for part in ("train", "test"))
        self.class_counts = long_tailed_counts(int(self.test[1].max()) + 1, largest, imbalance_factor, "exponential")
        picked = long_tailed_indices(self.train[1], self.class_counts, torch.Generator().manual_seed(0))
        self.train = [t[picked] for t in self.train]
        self.batch_size = batch_size

    @staticmethod
    def _load(folder, image_size):
        from torchvision.datasets import ImageFolder
        from torchvision.transforms import v2

        to_tensor = v2.Compose([v2.Resize(image_size), v2.CenterCrop(image_size), v2.ToImage()])
        images, labels = zip(*ImageFolder(folder, to_tensor), strict=True)
        return [torch.stack(images).float() / 127.5 - 1, torch.tensor(labels)]

    def train_dataloader(self):
        """Return the shuffled training batches."""
        return DataLoader(TensorDataset(*self.train), batch_size=self.batch_size, shuffle=True, drop_last=True)

    def test_dataloader(self):
        """Return the test set."""
        return DataLoader(TensorDataset(*self.test), batch_size=256)


def train(mode, seed, data, options):
    """Return the test accuracies of head, tail and all classes in percent, and the training time in seconds."""
    objective, step_options = MODES[mode]
    L.seed_everything(seed, verbose=False)
    radii = {} if objective is ERM else {"head_rho": 0.05, "tail_rho": options.tail_rho}
    model = LongTailClassifier(
        data.class_counts,
        SmallConvNet(len(data.class_counts), options.channels, norm="batch"),
        objective(**radii),
        optimizer=lambda params: SGD(params, lr=0.05, momentum=0.9, weight_decay=5e-4),
        scheduler=lambda optimizer: CosineAnnealingLR(optimizer, options.epochs),
        step_options=step_options,
    )
    trainer = L.Trainer(
        max_epochs=options.epochs,
        limit_val_batches=0,
        callbacks=[StageSwitch(at=0.7)] if model.objective.num_stages > 1 else [],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    start = time.perf_counter()
    trainer.fit(model, data.train_dataloader())
    seconds = time.perf_counter() - start
    (tested,) = trainer.test(model, data.test_dataloader(), verbose=False)
    return [100 * tested[f"test/acc_{group}"] for group in ("head", "tail", "all")] + [seconds]


def main():
    """Train with every mode, and print the accuracies."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, help="folder of images, instead of DigitsLT")
    parser.add_argument("--largest", type=int, default=500, help="training images of the largest class, for --folder")
    parser.add_argument("--imbalance-factor", type=float, default=100, help="imbalance factor, for --folder")
    parser.add_argument("--image-size", type=int, default=32, help="height and width in pixels, for --folder")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tail-rho", type=float, default=0.2)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if options.folder is None:
        data, options.channels = DigitsLT(), 1
    else:
        data = Folder(options.folder, options.largest, options.imbalance_factor, options.image_size, batch_size=64)
        options.channels = 3
    for mode in MODES:
        columns = zip(*(train(mode, seed, data, options) for seed in range(options.seeds)), strict=True)
        *accuracies, seconds = [(statistics.mean(values), statistics.stdev(values)) for values in columns]
        cells = [
            f"{name} {mean:5.1f} ± {spread:.1f}"
            for name, (mean, spread) in zip(("head", "tail", "all"), accuracies, strict=True)
        ]
        print(f"{mode:6} {'   '.join(cells)}   {seconds[0]:.0f} s", flush=True)


if __name__ == "__main__":
    main()
