"""Makes the pictures of the documentation.

python docs/pictures.py method         # what each objective perturbs; seconds
python docs/pictures.py comparison     # those of `lightning-ssesam compare`; minutes
python docs/pictures.py curvature      # those of `lightning-ssesam curvature`; minutes
"""

import shutil
import sys
import tempfile
from pathlib import Path

import torch
from matplotlib.figure import Figure

from lightning_ssesam import SAM, SSESAM, ClassSplit, ImbSAM
from lightning_ssesam.cli import main
from lightning_ssesam.compare import compare, usable_jobs

IMAGES = Path(__file__).parent / "images"

# A batch with nine head samples and a tail sample, whose losses are two valleys in the plane.
TARGETS = torch.tensor([0] * 9 + [1])
VALLEYS = {"head": ((0.0, 0.0), (1.0, 0.25), "#0072B2"), "tail": ((1.3, 1.6), (0.6, 2.4), "#D55E00")}
START = torch.tensor([1.2, 0.5])


def loss(weights, group):
    """Return the loss of a sample of a group at weights ``(..., 2)``."""
    center, steepness, _ = VALLEYS[group]
    return (torch.tensor(steepness) * (weights - torch.tensor(center)) ** 2).sum(-1)


def term_gradient(weights, share):
    """Return the gradient of a term's loss with the shares of head and tail in it."""
    weights = weights.clone().requires_grad_()
    total = share[0] * loss(weights, "head") + share[1] * loss(weights, "tail")
    return torch.autograd.grad(total, weights)[0]


def draw_objective(ax, title, objective):
    """Draw where an objective takes its gradients, and the step that comes of them."""
    x, y = torch.meshgrid(torch.linspace(-1.8, 2.4, 200), torch.linspace(-0.8, 3.4, 200), indexing="xy")
    for group, (center, _, color) in VALLEYS.items():
        ax.contour(x, y, loss(torch.stack([x, y], -1), group), [0.1, 0.5, 1.2, 2.4, 4], colors=color, linewidths=0.6)
        ax.text(*center, group, color=color, ha="center", va="center")
    step = torch.zeros(2)
    for weights, rho, *_ in objective.terms(TARGETS):
        share = (weights[TARGETS == 0].sum(), weights[TARGETS == 1].sum())
        gradient = term_gradient(START, share)
        ascent = rho * gradient / gradient.norm()
        step -= term_gradient(START + ascent, share)
        if rho:
            color = "#000000" if min(share) > 0 else VALLEYS["head" if share[0] > 0 else "tail"][2]
            arrow = {"arrowstyle": "->", "color": color, "linewidth": 2, "shrinkA": 0, "shrinkB": 0}
            ax.annotate("", START + ascent, START, arrowprops=arrow)
    arrow = {"arrowstyle": "->", "linestyle": "--", "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", START + 0.4 * step, START, arrowprops=arrow)
    ax.plot(*START, "ko", markersize=5)
    ax.set(title=title, xticks=[], yticks=[], aspect="equal", xlim=(-1.8, 2.4), ylim=(-0.8, 3.4))


def draw_method():
    """Draw the objectives side by side."""
    split = ClassSplit([9, 1], tail=[1])
    second = SSESAM(split, head_rho=0.45, tail_rho=0.9)
    second.stage = 2
    panels = {
        "SAM": SAM(0.9),
        "ImbSAM; SSE-SAM, stage 2": second,
        "SSE-SAM, stage 1": SSESAM(split, head_rho=0.45, tail_rho=0.9),
    }
    assert ImbSAM(split, 0.9).terms(TARGETS)[1].rho == second.terms(TARGETS)[1].rho
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    for ax, (title, objective) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        draw_objective(ax, title, objective)
    figure.savefig(IMAGES / "objectives.png", dpi=120)


def draw_comparison():
    """Run the default comparison and keep its pictures."""
    with tempfile.TemporaryDirectory() as folder:
        compare(jobs=usable_jobs(), output=Path(folder))
        for name in ("comparison", "trade_off", "confusion"):
            shutil.copy(Path(folder) / f"{name}.png", IMAGES)


def draw_curvature():
    """Train with ERM and with SSE-SAM, measure the curvature of both and keep the pictures, the landscapes of one."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("ERM", "SSESAM"):
            options = ["--trainer.accelerator=cpu", f"--trainer.default_root_dir={folder}/{name}"]
            main(["fit", "--config=digits_lt", *options, *(["--model.objective=ERM"] if name == "ERM" else [])])
        checkpoints = [str(path) for name in ("ERM", "SSESAM") for path in Path(folder, name).rglob("*.ckpt")]
        main(["curvature", *checkpoints, "--groups=head,tail", f"--output={folder}/curvature"])
        shutil.copy(f"{folder}/curvature/spectra.png", IMAGES)
        for name in ("landscape_1d", "landscape_2d"):
            shutil.copy(f"{folder}/curvature/{name}-SSESAM.png", IMAGES / f"{name}.png")


if __name__ == "__main__":
    {"method": draw_method, "comparison": draw_comparison, "curvature": draw_curvature}[sys.argv[1]]()
