"""Chooses the defaults of ``lightning-ssesam compare`` on validation data, with seeds that it does not use.

Run it from the root of the repository (about 5 minutes on one CPU core):

    python benchmarks/tune_digits.py

First it chooses the learning rate that is best for ERM. With that rate, it chooses the radii of each method. Best
means the highest validation accuracy of the tail. It printed, with lightning 2.6.6 and torch 2.14.1:

    ERM, lr 0.02                                                  66.5 ± 4.4
    ERM, lr 0.05                                                  70.0 ± 2.8
    ERM, lr 0.1                                                   68.1 ± 0.8
    ERM, lr 0.2                                                   69.0 ± 2.1
    SAM(rho=0.05)                                                 71.7 ± 2.3
    SAM(rho=0.1)                                                  70.4 ± 1.7
    SAM(rho=0.2)                                                  71.9 ± 1.3
    SAM(rho=0.3)                                                  67.9 ± 3.4
    ImbSAM(rho=0.1, tail_weight=1.0, reduction='batch')           74.8 ± 1.0
    ImbSAM(rho=0.2, tail_weight=1.0, reduction='batch')           75.2 ± 1.8
    ImbSAM(rho=0.3, tail_weight=1.0, reduction='batch')           74.4 ± 1.4
    SSESAM(head_rho=0.05, tail_rho=0.1, first_stage='grouped')    72.7 ± 1.0
    SSESAM(head_rho=0.05, tail_rho=0.2, first_stage='grouped')    75.2 ± 0.8
    SSESAM(head_rho=0.05, tail_rho=0.3, first_stage='grouped')    74.6 ± 1.6
    SSESAM(head_rho=0.1, tail_rho=0.2, first_stage='grouped')     74.6 ± 1.1
"""

import logging
import statistics
import warnings
from functools import partial

import torch
from torch.optim import SGD

from lightning_ssesam import ERM, SAM, SSESAM, ImbSAM
from lightning_ssesam.runs import Experiment

EPOCHS = 60
SEEDS = range(100, 104)
RADII = {
    "SAM": [partial(SAM, rho) for rho in (0.05, 0.1, 0.2, 0.3)],
    "ImbSAM": [partial(ImbSAM, rho=rho) for rho in (0.1, 0.2, 0.3)],
    "SSESAM": [
        partial(SSESAM, head_rho=head_rho, tail_rho=tail_rho)
        for head_rho, tail_rho in ((0.05, 0.1), (0.05, 0.2), (0.05, 0.3), (0.1, 0.2))
    ],
}


def validate(objective, lr, seed):
    """Return the validation accuracy of the tail after the last epoch."""
    optimizer = partial(SGD, lr=lr, momentum=0.9, weight_decay=5e-4)
    options = {"accelerator": "cpu", "check_val_every_n_epoch": EPOCHS}
    experiment = Experiment("", objective, optimizer=optimizer, epochs=EPOCHS, trainer=options)
    trainer, _, _ = experiment.fit(seed)
    return 100 * trainer.callback_metrics["val/acc_tail"].item()


def best(candidates):
    """Print the accuracy of each candidate ``(name, objective, lr)``, and return the best candidate."""
    means = {}
    for name, objective, lr in candidates:
        values = [validate(objective, lr, seed) for seed in SEEDS]
        means[name, objective, lr] = statistics.mean(values)
        print(f"{name:60} {statistics.mean(values):5.1f} ± {statistics.stdev(values):.1f}", flush=True)
    return max(means, key=means.get)


def main():
    """Choose the learning rate, then the radii."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    lr = best((f"ERM, lr {lr}", ERM, lr) for lr in (0.02, 0.05, 0.1, 0.2))[2]
    for objectives in RADII.values():
        best((repr(objective()), objective, lr) for objective in objectives)


if __name__ == "__main__":
    main()
