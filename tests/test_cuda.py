"""What needs a GPU; skipped without one."""

import copy
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import (
    SPLIT,
    STRICT,
    Automatic,
    Model,
    assert_same_bits,
    choose,
    classification_batch,
    convbn,
    fit,
    mlp,
    trainer,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch import nn

from lightning_ssesam import SSESAM, StageSwitch
from lightning_ssesam.data import ImageFolderLT, in_memory

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


@pytest.mark.parametrize("passes", ["full", "split", "auto", "group"])
def test_no_step_waits(passes):
    """Not even to choose the samples of split passes, as their targets are looked at before they are moved."""

    class Watched(Model):
        def training_step(self, batch, batch_idx):
            if batch_idx == 0:
                # The first step may look whether a forward changes buffers.
                return super().training_step(batch, batch_idx)
            torch.cuda.set_sync_debug_mode("error")
            try:
                return super().training_step(batch, batch_idx)
            finally:
                torch.cuda.set_sync_debug_mode("default")

    model = Watched(convbn() if passes == "group" else mlp(), SSESAM(SPLIT), "split" if passes == "group" else passes)
    if passes == "group":
        choose(model, batch_norm_statistics="group")
    choose(model, log_sharpness=True)
    shape = (3, 5, 5) if passes == "group" else (8,)
    assert fit(model, [classification_batch(shape=shape) for _ in range(4)], **GPU).global_step == 4


@pytest.mark.parametrize("has_room", [True, False])
def test_images_in_memory(has_room, monkeypatch):
    """No batch is waited for, and each has the images that the CPU makes of the same draws."""
    for label, number in (("a", 60), ("b", 20)):
        for part in ("train", "test"):
            Path("images", part, label).mkdir(parents=True)
            for index in range(number):
                pixels = torch.randint(256, (16, 16, 3), dtype=torch.uint8).numpy()
                Image.fromarray(pixels).save(f"images/{part}/{label}/{index}.png")
    if not has_room:
        monkeypatch.setattr(in_memory, "_free_memory", lambda device: 0)
    data = ImageFolderLT("images", val_fraction=0, batch_size=16, in_memory=True)

    class Watching(Model):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            # The next batch is made and moved.
            torch.cuda.set_sync_debug_mode("error" if batch_idx < 4 else "default")

        def on_train_batch_start(self, batch, batch_idx):
            torch.cuda.set_sync_debug_mode("default")

        def training_step(self, batch, batch_idx):
            # The first step may look whether a forward changes buffers.
            torch.cuda.set_sync_debug_mode("error" if batch_idx > 0 else "default")
            return super().training_step(batch, batch_idx)

    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 256, 2))
    model = Watching(net, SSESAM(data.split(tail_below=30)), "split")
    try:
        run = trainer(limit_val_batches=0, **GPU)
        run.fit(model, datamodule=data)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    images = run.train_dataloader.dataset
    assert images.images.device.type == ("cuda" if has_room else "cpu")
    assert run.train_dataloader.pin_memory is not has_room
    on_host = images.placed(torch.device("cpu"))
    for transform in (images.transform, replace(images.transform, padding=None)):
        made = []
        for each in (images, on_host):
            torch.manual_seed(3)
            made.append(replaced(each, transform).__getitems__(range(80)))
        assert torch.equal(made[0].images.cpu(), made[1].images)
        assert torch.equal(made[0].labels, made[1].labels)
    assert made[0].labels.is_pinned() is has_room
    assert pickle.loads(pickle.dumps(images)).images.device.type == "cpu"


def replaced(images, transform):
    return in_memory.InMemoryImages(images.images, images.targets, transform)


@pytest.mark.parametrize("passes", ["full", "split"])
def test_memory_above_plain_training(passes):
    net, data, peaks = nn.Sequential(nn.Linear(8, 2000), nn.Linear(2000, 2000), nn.Linear(2000, 5)), batches(), []
    for model in (Automatic(copy.deepcopy(net)), Model(copy.deepcopy(net), SSESAM(SPLIT), passes)):
        torch.cuda.reset_peak_memory_stats()
        fit(model, data, **GPU)
        peaks.append(torch.cuda.max_memory_allocated())
        del model
    assert peaks[1] - peaks[0] < 2.2 * sum(p.nbytes for p in net.parameters())
