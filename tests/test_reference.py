"""The published code's weights, through Trainer.fit."""

import json

import numpy as np
import pytest
import torch
from helpers import REFERENCE, STRICT, Model, choose, convbn, fit, mlp

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
    ClassSplit,
    FocalSAM,
    Friendly,
    FriendlySAM,
    ImbSAM,
    PACBayesRadius,
    StageSwitch,
)

pytestmark = STRICT


def by_class(kind, *names):
    return lambda split, s: kind(ClassSplit(s["counts"], tail=split.tail.nonzero().flatten()), *(s[n] for n in names))


def gkp_gsa(split, s):
    radius = PACBayesRadius(s["C"], s["n"], s["rho_min"], s["rho_max"])
    return SAM(1.0, ascent=Ascent(Friendly(s["sigma"], s["lmbda"]), Adaptive(0.0, "adaptive"), radius))


# Each is given head and tail, and the settings of the file.
METHODS = {
    "sgd": lambda split, s: ERM(),
    "sam": lambda split, s: SAM(0.05),
    "imbsam_double": lambda split, s: ImbSAM(split, 0.05, tail_weight=2.0),
    "imbsam_group": lambda split, s: ImbSAM(split, 0.05, reduction="group"),
    "ssesam": lambda split, s: SSESAM(split, head_rho=0.05, tail_rho=0.1),
    "sam_schedule": lambda split, s: SAM(0.0),
    "asam": lambda split, s: ASAM(s["rho"], eta=0.0, biases="adaptive"),
    "asam_eta": lambda split, s: ASAM(s["rho"], s["eta"]),
    "gsam": lambda split, s: GSAM(s["rho"], s["alpha"]),
    "wsam": lambda split, s: WSAM(s["rho"], s["gamma"]),
    "looksam": lambda split, s: SAM(s["rho"]),
    "friendlysam": lambda split, s: FriendlySAM(s["rho"], s["sigma"], s["lmbda"]),
    "friendlysam_release": lambda split, s: FriendlySAM(s["rho"], s["sigma"], s["lmbda"]),
    "focalsam": by_class(FocalSAM, "rho", "gamma", "lam"),
    "ccsam": by_class(CCSAM, "r", "f"),
    "lesam": lambda split, s: LESAM(s["sigma"], s["rho_max"]),
    "gkp_gsa": gkp_gsa,
    "pgn": lambda split, s: PGN(s["rho"], s["alpha"]),
    "sam_on": lambda split, s: SAM(s["rho"], ascent=Ascent(only="norm")),
    "asam_on": lambda split, s: SAM(s["rho"], ascent=Ascent(only="norm", scale=Adaptive(0.0, "adaptive"))),
}
NETS = {"mlp": mlp, "convbn": convbn}
CASES = [
    (net, method, passes)
    for net in NETS
    for method in METHODS
    for passes in ("full", "split", "auto")
    if (net, passes) != ("convbn", "split") and (net == "convbn" or not method.endswith("_on"))
]


class Recorded(Model):
    radii = None

    def on_train_start(self):
        self.after, self.clean_loss = {}, []

    def on_train_batch_start(self, batch, batch_idx):
        if self.radii is not None:
            self.objective.rho = self.radii[batch_idx]

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.after[self.trainer.global_step] = {k: p.detach().clone() for k, p in self.net.named_parameters()}
        self.clean_loss.append(self.trainer.callback_metrics["train/loss"].item())


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("net", "method", "passes"), CASES)
def test_trajectory(net, method, passes):
    # All files of a network begin alike, so one of them has the inputs.
    data, expected = np.load(REFERENCE / f"{net}_sgd.npz"), np.load(REFERENCE / f"{net}_{method}.npz")
    settings = json.loads(str(expected["settings"])) if "settings" in expected else {}
    split = ClassSplit([1] * 5, tail=torch.from_numpy(data["tail_classes"]))
    model = Recorded(NETS[net](), METHODS[method](split, settings), passes)
    if method == "looksam":
        choose(model, interval=settings["k"], reuse=settings["alpha"])
    if method == "sam_schedule":
        model.radii = settings["rho"]
    with torch.no_grad():
        for name, p in model.net.named_parameters():
            p.copy_(torch.from_numpy(data[f"init/{name}"]))
    batches = [(torch.from_numpy(x), torch.from_numpy(y)) for x, y in zip(data["x"], data["y"], strict=True)]
    # Each step is one epoch of eight, as in the published run.
    fit(model, batches, limit_train_batches=8, callbacks=[StageSwitch(at=0.5)] if method == "ssesam" else [])

    # Small constants that the formulas leave out come to 1.3e-12.
    tolerance = 1e-12 if "settings" not in expected else 2e-12
    compared = [key.split("/", 2)[1:] for key in expected if key.startswith("after/")]
    assert len(compared) == 4 * len(list(model.net.parameters()))
    for step, name in compared:
        key = f"after/{step}/{name}"
        np.testing.assert_allclose(model.after[int(step)][name], expected[key], rtol=0, atol=tolerance)
    np.testing.assert_allclose(model.clean_loss, expected["clean_loss"], rtol=0, atol=tolerance)
