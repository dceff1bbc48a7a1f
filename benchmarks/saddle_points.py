"""Measures whether the losses of head and tail keep negative curvature during training, for every method.

    python benchmarks/saddle_points.py                                  # DigitsLT, 20 trainings: 30 minutes on a core
    python benchmarks/saddle_points.py --images cifar/                  # CIFAR-10-LT, 200 epochs: for a GPU
    python benchmarks/saddle_points.py --images cifar/ --small --seeds 2    # at 16x16 pixels, 40 epochs: for a CPU

Trains ERM, SAM, ImbSAM and SSE-SAM with several seeds under a CurvatureMonitor. Then it prints the largest and smallest
eigenvalues of the Hessians of the mean training loss of head and tail. It also draws them over the epochs.

Images come from a folder cifar/{train,test}/CLASS/*.jpg. Trainings whose results are in the output folder are not
repeated. docs/saddle_points.md has the results.
"""

import argparse
import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from cifar10_lt import DecodedCIFAR10LT, decode_all
from cifar10_lt_cpu import OBJECTIVES, reduce
from matplotlib.figure import Figure
from torch.optim import SGD

from lightning_ssesam import ERM, SAM, SSESAM, CurvatureMonitor, DigitsLT, ImbSAM
from lightning_ssesam.compare import DEFAULT_SGD, usable_jobs
from lightning_ssesam.data import ImageFolderLT
from lightning_ssesam.experiments.console import limited_threads, quiet
from lightning_ssesam.experiments.figures import method_style
from lightning_ssesam.experiments.tables import write_csv
from lightning_ssesam.models import CIFARResNet, SmallConvNet
from lightning_ssesam.runs import Experiment

GAMMA = 0.7
DIGITS = {
    "ERM": ERM,
    "SAM": partial(SAM, 0.2),
    "ImbSAM": partial(ImbSAM, rho=0.2),
    "SSE-SAM": partial(SSESAM, head_rho=0.05, tail_rho=0.2),
}
COLUMNS = ["method", "seed", "step", "epoch", "stage", "when", "group"]
NUMBERS = ["loss", "gradient_norm", "largest", "smallest", "ratio", "sharpness", "iterations", "converged"]


def plan(options):
    """Return, by method, its experiment and the settings of its CurvatureMonitor."""
    if options.images is None:
        monitor = {"every_n_epochs": 3, "samples": 1000, "tolerance": 0.01, "max_iterations": 300}
        make = partial(
            Experiment,
            data=DigitsLT,
            backbone=SmallConvNet,
            optimizer=DEFAULT_SGD,
            epochs=options.epochs or 60,
            gamma=GAMMA,
            trainer={"accelerator": "cpu", "limit_val_batches": 0},
        )
        return {name: (make(name, objective=objective), monitor) for name, objective in DIGITS.items()}
    if options.small:
        return plan_small(options)
    file = options.output / "images.pt"
    if not file.exists():
        decode_all(options.images, file)
    monitor = {"every_n_epochs": 10, "samples": 1024, "batch_size": 1024, "tolerance": 0.05, "max_iterations": 150}
    make = partial(
        Experiment,
        data=partial(DecodedCIFAR10LT, file, batch_size=128),
        backbone=partial(CIFARResNet, depth=20),
        optimizer=partial(SGD, lr=0.05, momentum=0.9, weight_decay=5e-4),
        epochs=options.epochs or 200,
        gamma=GAMMA,
        model={"tail_below": 500},
        trainer={"limit_val_batches": 0},
    )
    return {name: (make(name, objective=objective), monitor) for name, objective in OBJECTIVES.items()}


def plan_small(options):
    """Return the same as :func:`plan`, for the images and the network of cifar10_lt_cpu.py."""
    folder = options.output / "images"
    if not folder.exists():
        reduce(options.images, options.output / "unfinished", {"train": 1000, "test": 200})
        (options.output / "unfinished").rename(folder)
    monitor = {"every_n_epochs": 4, "tolerance": 0.05, "max_iterations": 150}
    make = partial(
        Experiment,
        data=partial(ImageFolderLT, folder, imbalance_factor=100, val_fraction=0.0, image_size=16, batch_size=32),
        backbone=partial(SmallConvNet, in_channels=3, width=16),
        optimizer=DEFAULT_SGD,
        epochs=options.epochs or 40,
        gamma=GAMMA,
        model={"tail_below": 100},
        trainer={"accelerator": "cpu", "limit_val_batches": 0},
    )
    return {name: (make(name, objective=objective), monitor) for name, objective in OBJECTIVES.items()}


def train(experiment, monitor_options, seed, file):
    """Train once, and write the measurements into a file."""
    monitor = CurvatureMonitor(**monitor_options)
    with quiet(), limited_threads(1):
        experiment.fit(seed, [monitor])
    rows = [{"method": experiment.method, "seed": seed, **row} for row in monitor.history]
    unfinished = file.with_suffix(".tmp")
    unfinished.write_text(json.dumps(rows))
    os.replace(unfinished, file)


def spread(values):
    """Return the mean and the standard deviation of values as text."""
    return f"{np.mean(values):9.3g} ± {np.std(values, ddof=1) if len(values) > 1 else 0.0:<7.2g}"


def history_of(rows, method, group):
    """Return the measurements at the ends of epochs of one method and one group, for all seeds."""
    return [row for row in rows if (row["method"], row["group"], row["when"]) == (method, group, "epoch")]


def table(rows, epochs):
    """Return the table of the eigenvalues at the switch and at the end, over seeds."""
    lines = []
    for title, epoch in ((f"When stage 2 begins (epoch {GAMMA * epochs:g})", GAMMA * epochs), ("At the end", epochs)):
        heading = f"{title:38}{'largest':>19}{'smallest':>19}{'|smallest| / largest':>22}"
        lines += ["", heading]
        for group in ("head", "tail"):
            for method in dict.fromkeys(row["method"] for row in rows):
                history = history_of(rows, method, group)
                nearest = min({row["epoch"] for row in history}, key=lambda measured: abs(measured - epoch))
                rows_there = [row for row in history if row["epoch"] == nearest]
                cells = [spread([row[name] for row in rows_there]) for name in ("largest", "smallest", "ratio")]
                lines.append(f"  {group:6}{method:12}{'':16}" + "  ".join(cells))
    return "\n".join(lines)


def draw(rows, epochs, title, path):
    """Draw the largest and smallest eigenvalues of head and tail over the epochs."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey="row")
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for column, group in enumerate(("head", "tail")):
        for ax, name in zip(axes[:, column], ("largest", "smallest"), strict=True):
            for number, method in enumerate(methods):
                history = history_of(rows, method, group)
                x = sorted({row["epoch"] for row in history})
                y = np.array([[row[name] for row in history if row["epoch"] == epoch] for epoch in x])
                color, marker = method_style(number)
                ax.plot(x, y.mean(1), color=color, marker=marker, markersize=4, label=method)
                ax.fill_between(x, y.min(1), y.max(1), color=color, alpha=0.15, linewidth=0)
            ax.axvline(GAMMA * epochs, color="0.4", linestyle="--", linewidth=1)
            ax.grid(alpha=0.3)
            ax.set_title(f"{name} eigenvalue, {group}")
        axes[1, column].set_xlabel("epoch")
    axes[0, 0].set_yscale("log")
    axes[1, 0].set_yscale("symlog", linthresh=0.5 * min(abs(row["smallest"]) for row in rows))
    axes[1, 0].set_ylim(top=0.0)
    axes[1, 0].annotate(" stage 2 of SSE-SAM", (GAMMA * epochs, 0.97), xycoords=("data", "axes fraction"), va="top")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def main():
    """Train, then print and draw the eigenvalues."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, help="folder with {train,test}/CLASS/*.jpg; without it, DigitsLT")
    parser.add_argument("--small", action="store_true", help="images of 16x16 pixels and a small network, for a CPU")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--jobs", type=int, default=usable_jobs(), help="number of trainings that run at a time")
    parser.add_argument("--output", type=Path, default=Path("saddle_points"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    plans, start = plan(options), time.perf_counter()
    files = {(name, seed): options.output / f"{name}-{seed}.json" for seed in range(options.seeds) for name in plans}
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        missing = [key for key, file in files.items() if not file.exists()]
        for training in [pool.submit(train, *plans[name], seed, files[name, seed]) for name, seed in missing]:
            training.result()
    rows = [row for name in plans for seed in range(options.seeds) for row in json.loads(files[name, seed].read_text())]
    columns = COLUMNS + NUMBERS
    write_csv(options.output / "saddle_points.csv", columns, [[row[name] for name in columns] for row in rows])
    experiment = next(iter(plans.values()))[0]
    name = "CIFAR-10-LT" + (" at 16x16 pixels" if options.small else "") if options.images else "DigitsLT"
    title = f"{name}: Hessian of the mean training loss; mean and range over {options.seeds} seeds"
    draw(rows, experiment.epochs, title, options.output / "saddle_points.png")
    print(table(rows, experiment.epochs))
    missed = sum(1 - row["converged"] for row in rows)
    print(f"\n{len(rows)} measurements, {missed:g} missed their tolerance; torch {torch.__version__},", end=" ")
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes. Written to {options.output}.")


if __name__ == "__main__":
    main()
