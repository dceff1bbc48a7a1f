"""Chooses the radii of the shipped configuration ``compare_family`` on validation data, with seeds it does not use.

Run it from the root of the repository:

    python benchmarks/tune_family.py
    python benchmarks/tune_family.py SAM "late SAM"

Every method gets the same budget: three values of one radius, each with the same seeds. Its other arguments stay. Best
means the highest validation accuracy over all classes after the last epoch. Plain training had its budget before: the
learning rate of all methods is the best of four for plain training (``tune_digits.py``).

Its results, in %, with lightning 2.6.6 and torch 2.14.1:

    SAM, rho 0.02                                       79.6 ± 1.6   tail  67.7
    SAM, rho 0.05                                       79.8 ± 1.5   tail  67.9
    SAM, rho 0.1                                        78.0 ± 1.2   tail  65.0
    late SAM, rho 0.05                                  80.0 ± 1.1   tail  68.3
    late SAM, rho 0.1                                   80.2 ± 1.3   tail  68.8
    late SAM, rho 0.2                                   80.5 ± 2.2   tail  69.2
    ASAM, rho 0.2                                       79.4 ± 1.9   tail  67.3
    ASAM, rho 0.5                                       79.6 ± 1.3   tail  67.7
    ASAM, rho 1                                         75.1 ± 2.5   tail  60.2
    FriendlySAM, rho 0.02                               80.1 ± 1.5   tail  68.5
    FriendlySAM, rho 0.05                               79.7 ± 1.5   tail  67.9
    FriendlySAM, rho 0.1                                80.2 ± 0.9   tail  68.8
    GSAM, rho 0.02                                      79.4 ± 1.3   tail  67.3
    GSAM, rho 0.05                                      78.9 ± 1.0   tail  66.5
    GSAM, rho 0.1                                       74.4 ± 1.0   tail  59.2
    WSAM, rho 0.002                                     79.9 ± 1.3   tail  68.1
    WSAM, rho 0.005                                     78.6 ± 1.1   tail  66.0
    WSAM, rho 0.01                                      77.9 ± 2.1   tail  64.6
    PGN, rho 0.02                                       79.5 ± 0.9   tail  67.5
    PGN, rho 0.05                                       80.4 ± 1.0   tail  69.0
    PGN, rho 0.1                                        79.6 ± 1.1   tail  67.7
    LESAM, sigma 0.02                                   81.4 ± 1.5   tail  70.6
    LESAM, sigma 0.05                                   79.5 ± 0.7   tail  67.5
    LESAM, sigma 0.1                                    77.6 ± 1.9   tail  64.6
    LookSAM, rho 0.02                                   80.1 ± 1.3   tail  68.8
    LookSAM, rho 0.05                                   79.7 ± 0.6   tail  67.9
    LookSAM, rho 0.1                                    79.0 ± 1.1   tail  66.7
    FocalSAM, rho 0.05                                  80.0 ± 1.1   tail  68.3
    FocalSAM, rho 0.1                                   80.2 ± 0.9   tail  68.8
    FocalSAM, rho 0.2                                   80.1 ± 0.8   tail  68.5
    CCSAM, radius 0.002                                 79.9 ± 1.5   tail  68.1
    CCSAM, radius 0.01                                  68.4 ± 3.9   tail  49.8
    CCSAM, radius 0.05                                  59.0 ± 3.0   tail  32.5
    MomentumSAM, rho 0.05                               79.0 ± 1.6   tail  66.9
    MomentumSAM, rho 0.15                               80.1 ± 1.5   tail  68.5
    MomentumSAM, rho 0.5                                81.1 ± 1.1   tail  70.2
    RandomSAM, rho 0.3                                  79.1 ± 0.8   tail  66.9
    RandomSAM, rho 1                                    79.5 ± 0.7   tail  67.5
    RandomSAM, rho 3                                    79.2 ± 2.1   tail  67.3
    ImbSAM, rho 0.05                                    81.0 ± 1.7   tail  70.0
    ImbSAM, rho 0.1                                     81.1 ± 0.9   tail  70.2
    ImbSAM, rho 0.2                                     78.5 ± 2.2   tail  66.2
    SSE-SAM, tail_rho 0.05                              80.0 ± 1.1   tail  68.3
    SSE-SAM, tail_rho 0.1                               79.1 ± 1.7   tail  66.9
    SSE-SAM, tail_rho 0.2                               76.2 ± 1.8   tail  62.3
    late Friendly adaptive SSE-SAM, tail_rho 0.2        80.5 ± 1.5   tail  69.2
    late Friendly adaptive SSE-SAM, tail_rho 0.5        80.6 ± 1.7   tail  69.6
    late Friendly adaptive SSE-SAM, tail_rho 1          82.4 ± 1.7   tail  72.3
"""

import logging
import statistics
import sys
import warnings
from functools import partial

import torch

from lightning_ssesam import (
    ASAM,
    CCSAM,
    ERM,
    GSAM,
    LESAM,
    PGN,
    SAM,
    SSESAM,
    WSAM,
    Adaptive,
    Ascent,
    FocalSAM,
    Friendly,
    FriendlySAM,
    ImbSAM,
    MomentumSAM,
    RandomSAM,
    Staged,
    StageSwitch,
)
from lightning_ssesam.experiments.methods import Method
from lightning_ssesam.experiments.recipe import Recipe

EPOCHS = 60
SEEDS = range(100, 104)
SMALL = (0.02, 0.05, 0.1)
MEDIUM = (0.05, 0.1, 0.2)
LARGE = (0.1, 0.2, 0.4)


def late_sam(rho):
    """Return SAM that begins in stage 2."""
    return Staged([ERM(), SAM(rho)])


def late_friendly_ssesam(tail_rho):
    """Return an adaptive, Friendly SSE-SAM that begins in stage 2."""
    ascent = Ascent(direction=Friendly(), scale=Adaptive())
    return Staged([ERM(), SSESAM(head_rho=tail_rho / 4, tail_rho=tail_rho, ascent=ascent)])


FAMILY = {
    "SAM": (SAM, "rho", MEDIUM),
    "late SAM": (late_sam, "rho", LARGE),
    "ASAM": (ASAM, "rho", (0.5, 1.0, 2.0)),
    "FriendlySAM": (FriendlySAM, "rho", MEDIUM),
    "GSAM": (GSAM, "rho", SMALL),
    "WSAM": (WSAM, "rho", (0.002, 0.005, 0.01)),
    "PGN": (PGN, "rho", MEDIUM),
    "LESAM": (partial(LESAM, rho_max=0.2), "sigma", SMALL),
    "LookSAM": (SAM, "rho", MEDIUM),
    "FocalSAM": (FocalSAM, "rho", MEDIUM),
    "CCSAM": (CCSAM, "radius", (0.0005, 0.002, 0.01)),
    "MomentumSAM": (MomentumSAM, "rho", (0.15, 0.5, 1.5)),
    "RandomSAM": (RandomSAM, "rho", (0.3, 1.0, 3.0)),
    "ImbSAM": (ImbSAM, "rho", LARGE),
    "SSE-SAM": (SSESAM, "tail_rho", LARGE),
    "late Friendly adaptive SSE-SAM": (late_friendly_ssesam, "tail_rho", (0.5, 1.0, 2.0)),
}
CALLBACKS = {
    "late SAM": [StageSwitch(at=0.8)],
    "late Friendly adaptive SSE-SAM": [StageSwitch(at=[0.5, 0.8])],
}
MODEL = {"LookSAM": {"step_options": {"interval": 5, "reuse": 0.1}}}


def validate(name, objective, seed):
    """Return the validation accuracies in % over all classes and over the tail, after the last epoch."""
    recipe = Recipe(epochs=EPOCHS, trainer={"accelerator": "cpu", "check_val_every_n_epoch": EPOCHS})
    method = Method(objective, callbacks=CALLBACKS.get(name, []), model=MODEL.get(name, {}))
    trainer, _, _ = method.experiment(name, recipe, StageSwitch.default_at).fit(seed)
    return [100 * trainer.callback_metrics[f"val/acc_{group}"].item() for group in ("all", "tail")]


def main(names):
    """Print the accuracies with each value, and the best value of each method."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in names or FAMILY:
        factory, radius, values = FAMILY[name]
        found = {}
        for value in values:
            accuracies, tails = zip(
                *(validate(name, partial(factory, **{radius: value}), seed) for seed in SEEDS), strict=True
            )
            found[value] = statistics.mean(accuracies)
            label = f"{name}, {radius} {value:g}"
            spread = statistics.stdev(accuracies)
            print(f"{label:50} {found[value]:5.1f} ± {spread:.1f}   tail {statistics.mean(tails):5.1f}", flush=True)
        print(f"{name}: {radius} {max(found, key=found.get):g}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
