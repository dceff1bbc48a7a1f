"""Chooses the radii of the shipped configuration ``compare_family`` on validation data, with seeds it does not use.

Run it from the root of the repository:

    python benchmarks/tune_family.py
    python benchmarks/tune_family.py SAM "late SAM"

Every method gets the same budget: three values of one radius, each with the same seeds. Its other arguments stay. Best
means the highest validation accuracy over all classes after the last epoch. Plain training had its budget before: the
learning rate of all methods is the best of four for plain training (``tune_digits.py``).

Its results, in %, with lightning 2.6.6 and torch 2.14.1:

    SAM, rho 0.05                                        81.9 ± 1.3   tail  71.7
    SAM, rho 0.1                                         81.2 ± 1.0   tail  70.4
    SAM, rho 0.2                                         81.9 ± 1.1   tail  71.9
    late SAM, rho 0.1                                    81.1 ± 1.9   tail  70.4
    late SAM, rho 0.2                                    81.7 ± 1.2   tail  71.3
    late SAM, rho 0.4                                    80.5 ± 1.4   tail  69.2
    ASAM, rho 0.5                                        81.9 ± 1.0   tail  71.5
    ASAM, rho 1                                          81.2 ± 1.4   tail  70.6
    ASAM, rho 2                                          78.6 ± 3.0   tail  66.0
    FriendlySAM, rho 0.05                                82.1 ± 1.7   tail  71.7
    FriendlySAM, rho 0.1                                 82.2 ± 0.6   tail  71.9
    FriendlySAM, rho 0.2                                 83.6 ± 1.7   tail  74.2
    GSAM, rho 0.02                                       81.6 ± 1.3   tail  71.0
    GSAM, rho 0.05                                       81.9 ± 1.1   tail  71.5
    GSAM, rho 0.1                                        81.0 ± 1.5   tail  70.2
    WSAM, rho 0.002                                      81.2 ± 1.2   tail  70.4
    WSAM, rho 0.005                                      80.9 ± 1.9   tail  69.6
    WSAM, rho 0.01                                       81.4 ± 1.1   tail  70.6
    PGN, rho 0.05                                        82.0 ± 1.7   tail  71.9
    PGN, rho 0.1                                         81.4 ± 1.1   tail  70.4
    PGN, rho 0.2                                         82.2 ± 1.7   tail  72.1
    LESAM, sigma 0.02                                    84.0 ± 0.6   tail  75.0
    LESAM, sigma 0.05                                    83.8 ± 1.0   tail  74.6
    LESAM, sigma 0.1                                     82.9 ± 0.5   tail  73.1
    LookSAM, rho 0.05                                    81.1 ± 0.9   tail  70.4
    LookSAM, rho 0.1                                     81.2 ± 0.5   tail  70.4
    LookSAM, rho 0.2                                     82.6 ± 0.9   tail  72.7
    FocalSAM, rho 0.05                                   82.0 ± 1.4   tail  71.7
    FocalSAM, rho 0.1                                    83.4 ± 0.5   tail  74.0
    FocalSAM, rho 0.2                                    83.5 ± 1.0   tail  74.2
    CCSAM, radius 0.0005                                 80.5 ± 1.4   tail  69.4
    CCSAM, radius 0.002                                  80.4 ± 1.5   tail  69.2
    CCSAM, radius 0.01                                   70.5 ± 1.8   tail  52.9
    MomentumSAM, rho 0.15                                80.6 ± 2.2   tail  69.6
    MomentumSAM, rho 0.5                                 83.4 ± 1.3   tail  74.0
    MomentumSAM, rho 1.5                                 80.0 ± 1.6   tail  68.3
    RandomSAM, rho 0.3                                   80.4 ± 1.4   tail  69.0
    RandomSAM, rho 1                                     80.4 ± 1.0   tail  69.0
    RandomSAM, rho 3                                     82.5 ± 1.1   tail  72.5
    ImbSAM, rho 0.1                                      83.9 ± 0.6   tail  74.8
    ImbSAM, rho 0.2                                      84.0 ± 1.0   tail  75.2
    ImbSAM, rho 0.4                                      80.9 ± 0.9   tail  70.2
    SSE-SAM, tail_rho 0.1                                82.6 ± 0.6   tail  72.7
    SSE-SAM, tail_rho 0.2                                84.0 ± 0.4   tail  75.2
    SSE-SAM, tail_rho 0.4                                80.6 ± 1.4   tail  69.6
    late Friendly adaptive SSE-SAM, tail_rho 0.5         81.1 ± 1.3   tail  70.6
    late Friendly adaptive SSE-SAM, tail_rho 1           84.5 ± 0.4   tail  76.0
    late Friendly adaptive SSE-SAM, tail_rho 2           85.0 ± 0.4   tail  76.9
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
