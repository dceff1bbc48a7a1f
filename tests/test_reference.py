"""The published code's weights, through Trainer.fit."""

import numpy as np
import pytest
import torch
from helpers import REFERENCE, STRICT, Model, convbn, fit, mlp

from lightning_ssesam import ERM, SAM, SSESAM, ClassSplit, ImbSAM, StageSwitch

pytestmark = STRICT

METHODS = {
    "sgd": lambda split: ERM(),
    "sam": lambda split: SAM(0.05),
    "imbsam_double": lambda split: ImbSAM(split, 0.05, tail_weight=2.0),
    "imbsam_group": lambda split: ImbSAM(split, 0.05, reduction="group"),
    "ssesam": lambda split: SSESAM(split, head_rho=0.05, tail_rho=0.1),
}
NETS = {"mlp": mlp, "convbn": convbn}
CASES = [(net, method, passes) for net in NETS for method in METHODS for passes in ("full", "split", "auto")]


class Recorded(Model):
    def on_train_start(self):
        self.after, self.clean_loss = {}, []

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.after[self.trainer.global_step] = {k: p.detach().clone() for k, p in self.net.named_parameters()}
        self.clean_loss.append(self.trainer.callback_metrics["train/loss"].item())


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("net", "method", "passes"), [c for c in CASES if c[::2] != ("convbn", "split")])
def test_trajectory(net, method, passes):
    data = np.load(REFERENCE / f"{net}_{method}.npz")
    split = ClassSplit([1] * 5, tail=torch.from_numpy(data["tail_classes"]))
    model = Recorded(NETS[net](), METHODS[method](split), passes)
    with torch.no_grad():
        for name, p in model.net.named_parameters():
            p.copy_(torch.from_numpy(data[f"init/{name}"]))
    batches = [(torch.from_numpy(x), torch.from_numpy(y)) for x, y in zip(data["x"], data["y"], strict=True)]
    # Each step is one epoch of eight, as in the published run.
    fit(model, batches, limit_train_batches=8, callbacks=[StageSwitch(at=0.5)] if method == "ssesam" else [])

    for key in data:
        if key.startswith("after/"):
            _, step, name = key.split("/", 2)
            np.testing.assert_allclose(model.after[int(step)][name], data[key], rtol=0, atol=1e-12)
    np.testing.assert_allclose(model.clean_loss, data["clean_loss"], rtol=0, atol=1e-12)
