"""What needs a GPU; skipped without one."""

import copy

import pytest
import torch
from helpers import SPLIT, STRICT, Automatic, Model, assert_same_bits, classification_batch, fit, mlp
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_ssesam import SSESAM, StageSwitch

pytestmark = [STRICT, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
GPU = {"accelerator": "gpu", "devices": 1}


def batches(number=4):
    return [classification_batch() for _ in range(number)]


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed", "64-true"])
def test_as_under_automatic_optimization(precision):
    net, data = mlp(), batches()
    models = [Model(copy.deepcopy(net)), Automatic(copy.deepcopy(net))]
    for model in models:
        fit(model, data, precision=precision, gradient_clip_val=0.5, accumulate_grad_batches=2, **GPU)
    torch.testing.assert_close(models[0].net.state_dict(), models[1].net.state_dict(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("passes", ["full", "split"])
def test_as_on_the_cpu(passes, float64):
    net, data = mlp(), batches()
    models = [Model(copy.deepcopy(net), SSESAM(SPLIT), passes) for _ in range(2)]
    fit(models[0], data)
    fit(models[1], data, **GPU)
    torch.testing.assert_close(models[0].state_dict(), models[1].cpu().state_dict(), rtol=0, atol=1e-12)


def test_overflow_of_16_bits_skips_the_update():
    class Overflowing(Model):
        def sample_losses(self, batch):
            losses = super().sample_losses(batch)
            return losses * 1e38 if self.global_step == 1 and not self.in_clean_pass else losses

    model, scales = Overflowing(objective=SSESAM(SPLIT)), []
    model.on_train_batch_end = lambda *args: scales.append(model.trainer.precision_plugin.scaler.get_scale())
    run = fit(model, batches(3), precision="16-mixed", **GPU)
    assert scales[1] == scales[0] / 2 == scales[2]
    assert all(p.isfinite().all() for p in model.parameters())
    assert run.global_step == 3


def test_resume_with_dropout_on_the_device():
    torch.manual_seed(0)
    net, data = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 5)), batches()

    def run(**kwargs):
        torch.manual_seed(1)
        model = Model(copy.deepcopy(net), SSESAM(SPLIT))
        checkpoint = ModelCheckpoint("checkpoints", "{epoch}", every_n_epochs=1, save_top_k=-1)
        callbacks = [StageSwitch(at=0.5), checkpoint]
        fit(model, data, max_epochs=3, callbacks=callbacks, enable_checkpointing=True, **GPU, **kwargs)
        return model

    whole = run()
    assert_same_bits(run(ckpt_path="checkpoints/epoch=0.ckpt").parameters(), whole.parameters())


def test_compiled_by_inductor():
    net, data = mlp(), batches()
    models = [Model(copy.deepcopy(net), SSESAM(SPLIT)) for _ in range(2)]
    models[1].net = torch.compile(models[1].net)
    for model in models:
        fit(model, data, callbacks=[StageSwitch(step=2)], **GPU)
    torch.testing.assert_close(list(models[0].parameters()), list(models[1].parameters()), rtol=1e-4, atol=1e-5)
