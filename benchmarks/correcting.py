"""Measures what each correction after training gives to head and tail, for plain training and for SSE-SAM.

    python benchmarks/correcting.py                   # the digits: 5 seeds, about 8 minutes on one CPU core
    python benchmarks/correcting.py --images cifar/   # cifar/{train,test}/CLASS/*.jpg: 3 seeds, about half an hour

Each network is trained once, as ``lightning-ssesam compare`` does. Then every method of ``lightning-ssesam adjust`` is
tried on it, with tau and the temperature from the validation data. The results go to benchmarks/results/correcting; a
run that is there is not made again. It prints the table that docs/results.md has.

The images are reduced to 16x16 pixels: 1,000 of each class to train, before they are made long-tailed with imbalance
factor 100; 50 others to validate; 300 to test.
"""

import argparse
import json
import os
import statistics
from functools import partial
from pathlib import Path

import torch
from cifar10_lt_cpu import reduce
from torch.optim import SGD

from lightning_ssesam import ERM, SSESAM, DigitsLT
from lightning_ssesam.data import ImageFolderLT
from lightning_ssesam.experiments.adjust_command import BEFORE, _Rows, _SetOutputs
from lightning_ssesam.experiments.console import limited_threads, quiet
from lightning_ssesam.models import SmallConvNet
from lightning_ssesam.posthoc import METHODS, Evidence, find_correction
from lightning_ssesam.runs import Experiment

RESULTS = Path(__file__).parent / "results" / "correcting"
OBJECTIVES = {"ERM": ERM, "SSE-SAM": partial(SSESAM, head_rho=0.05, tail_rho=0.2)}
ON_IMAGES = {"ERM": ERM, "SSE-SAM": partial(SSESAM, head_rho=0.05, tail_rho=0.1)}
COLUMNS = ("head", "tail", "many", "medium", "few", "all", "ECE")


def digits():
    """Return the experiments on the digits by name, and the number of seeds."""
    options = {"data": DigitsLT, "trainer": {"accelerator": "cpu", "check_val_every_n_epoch": 60}}
    return {name: Experiment(name, objective, **options) for name, objective in OBJECTIVES.items()}, 5


def images(folder):
    """Return the experiments on small images of CIFAR-10 by name, and the number of seeds."""
    reduced = Path("correcting_images")
    if not reduced.exists():
        unfinished = Path("correcting_images.unfinished")
        reduce(folder, unfinished, {"train": 1050, "test": 300})
        for path in unfinished.glob("train/*/10[0-4]?.png"):
            held_out = unfinished / "val" / path.parent.name / path.name
            held_out.parent.mkdir(parents=True, exist_ok=True)
            path.rename(held_out)
        unfinished.rename(reduced)
    data = partial(ImageFolderLT, reduced, imbalance_factor=100, image_size=16, batch_size=32, in_memory=True)
    options = {
        "data": data,
        "backbone": partial(SmallConvNet, in_channels=3, width=16),
        "optimizer": partial(SGD, lr=0.05, momentum=0.9, weight_decay=5e-4),
        "epochs": 60,
        "tail_below": 100,
        "model": {"many_above": 200, "few_below": 40},
        "trainer": {"accelerator": "cpu", "check_val_every_n_epoch": 60},
    }
    return {name: Experiment(name, objective, **options) for name, objective in ON_IMAGES.items()}, 3


def measure(experiment, seed):
    """Train once, and return the numbers of each method on the test data, and what was chosen."""
    with quiet(), limited_threads(1):
        _, model, data = experiment.fit(seed)
        outputs = _SetOutputs(model, data)
        evidence = Evidence(model.backbone, model.split, outputs.of("val"), lambda: outputs.of("train"), model.loss)
        rows = _Rows(model.split, evidence, outputs.of("test"))
        for name in METHODS:
            rows.add(find_correction(name, evidence))
    chosen = {name: correction.values for name, correction in rows.corrections.items()}
    return {"objective": experiment.method, "seed": seed, "rows": rows.test, "chosen": chosen}


def table(runs):
    """Return the means and standard deviations over the seeds in Markdown."""
    lines = [f"| | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for objective in dict.fromkeys(run["objective"] for run in runs):
        own = [run for run in runs if run["objective"] == objective]
        for name in (BEFORE, *METHODS):
            values = [[100 * run["rows"][name][column] for run in own] for column in COLUMNS]
            cells = [f"{statistics.mean(v):.1f} ± {statistics.stdev(v):.1f}" for v in values]
            lines.append(f"| {objective}{'' if name == BEFORE else f' + {name}'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    """Make the runs that are missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder with the image files of CIFAR-10")
    folder = parser.parse_args().images
    torch.set_num_threads(1)
    path = RESULTS / ("digits.json" if folder is None else "cifar10_lt.json")
    experiments, seeds = digits() if folder is None else images(folder)
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    made = {(run["objective"], run["seed"]) for run in runs}
    for seed in range(seeds):
        for name, experiment in experiments.items():
            if (name, seed) not in made:
                runs.append(measure(experiment, seed))
                path.parent.mkdir(parents=True, exist_ok=True)
                unfinished = path.with_suffix(".unfinished")
                lines = ",\n".join(map(json.dumps, runs))
                unfinished.write_text(f'{{"torch": "{torch.__version__}", "runs": [\n{lines}\n]}}\n')
                os.replace(unfinished, path)
    print(table(runs))


if __name__ == "__main__":
    main()
