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
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ssesam import ASAM, ERM, GSAM, SAM, SSESAM, FriendlySAM, ImbSAM, MomentumSAM, StageSwitch
from lightning_ssesam.data import ImageFolderLT, in_memory
from lightning_ssesam.models import CIFARResNet

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


class NeverWaiting:
    """Fails if a training step from some batch on waits for the GPU."""

    watched_from: int

    def training_step(self, batch, batch_idx):
        torch.cuda.set_sync_debug_mode("error" if batch_idx >= self.watched_from else "default")
        try:
            return super().training_step(batch, batch_idx)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("passes", ["full", "split", "auto", "group"])
def test_no_step_waits(passes):
    """Not even to choose the samples of split passes, as their targets are looked at before they are moved."""

    class Watched(NeverWaiting, Model):
        # The first step may look whether a forward changes buffers.
        watched_from = 1

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


# Recorded steps (CUDA graphs).


RECORDED = {
    "ERM": lambda: ERM(),
    "SAM": lambda: SAM(0.05),
    "ImbSAM": lambda: ImbSAM(SPLIT, 0.05),
    "SSESAM": lambda: SSESAM(SPLIT, 0.05, 0.1),
    "GSAM": lambda: GSAM(0.05),
    "FriendlySAM": lambda: FriendlySAM(0.05),
    "MomentumSAM": lambda: MomentumSAM(0.05),
    "ASAM": lambda: ASAM(0.5),
}


class Images(Model):
    """A small residual network with batch norm, channels last; logs in the clean pass."""

    def __init__(self, objective, compiled=False):
        torch.manual_seed(0)
        net = CIFARResNet(5, depth=8).to(memory_format=torch.channels_last)
        fused = lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, weight_decay=5e-4, fused=True)  # noqa: E731
        super().__init__(torch.compile(net) if compiled else net, objective, "full", optimizer=fused)
        self.logged = []

    def sample_losses(self, batch):
        losses = super().sample_losses(batch)
        self.log("largest", losses.max())
        return losses

    def on_train_batch_end(self, outputs, batch, batch_idx):
        metrics = self.trainer.callback_metrics
        self.logged.append([found[name] for found, name in ((outputs, "loss"), (metrics, "largest")) if name in found])


def images(number, n=16):
    pairs = (classification_batch(n, (3, 32, 32)) for _ in range(number))
    return [(x.to(memory_format=torch.channels_last), y) for x, y in pairs]


def recorded_and_not(make, given, compiled=False, options=None, **kwargs):
    """Train both ways; weights, statistics, momentum, losses and logged values are the same to the bit."""
    models = []
    for with_graphs in (False, True):
        model = Images(make(), compiled)
        choose(model, cuda_graphs=with_graphs, **(options or {}))
        # Lightning does not clip for a fused optimizer under autocast.
        clip = {} if "precision" in kwargs else {"gradient_clip_val": 5.0}
        fit(model, given, **GPU, **clip, **kwargs)
        momentum = [s["momentum_buffer"] for s in model.trainer.optimizers[0].state.values()]
        logged = [t for step in model.logged for t in step]
        models.append([t.cpu().nan_to_num() for t in (*model.state_dict().values(), *momentum, *logged)])
    assert_same_bits(*models)


@pytest.fixture
def deterministic():
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = False


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", RECORDED)
def test_recorded_steps_are_the_same_to_the_bit(name, precision, deterministic):
    """Fifty steps, the last one with another batch size; both stages."""
    callbacks = [StageSwitch(at=0.5)] if name == "SSESAM" else []
    given = [*images(49), *images(1, n=7)]
    recorded_and_not(RECORDED[name], given, precision=precision, callbacks=callbacks)


@pytest.mark.parametrize(
    "options", [{"interval": 2}, {"interval": 3, "reuse": 0.7}, {"log_sharpness": True}, {"on_nonfinite": "skip"}]
)
def test_recorded_steps_with_options(options, deterministic):
    given = images(12)
    if "on_nonfinite" in options:
        given[8][0][0] = float("nan")
    recorded_and_not(RECORDED["SSESAM"], given, options=options)


def test_recorded_steps_of_accumulated_batches(deterministic):
    recorded_and_not(RECORDED["SSESAM"], images(13), accumulate_grad_batches=2)


def test_recorded_steps_of_a_compiled_network(deterministic):
    recorded_and_not(RECORDED["SSESAM"], images(10), compiled=True)


def test_recorded_steps_wait_for_nothing():
    class Watched(NeverWaiting, Images):
        # The first steps look at the model, and the fourth is recorded.
        watched_from = 6

    model = Watched(SSESAM(SPLIT))
    choose(model, cuda_graphs=True)
    assert fit(model, images(10), **GPU).global_step == 10


def test_recorded_steps_beside_a_thread_that_pins_memory():
    model = Images(SSESAM(SPLIT))
    choose(model, cuda_graphs=True)
    x, y = classification_batch(16 * 40, (3, 32, 32))
    loader = DataLoader(TensorDataset(x, y), 16, pin_memory=True, num_workers=2)
    trainer(**GPU).fit(model, loader)
    assert model.trainer.global_step == 40


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m: m.net.append(nn.Dropout(0.5)), "draws random numbers"),
        (lambda m: m.net.register_forward_hook(lambda *_: print(m.net[0].weight.sum().item())), "waits for the device"),
        (lambda m: m.net.compile(mode="reduce-overhead"), "CUDA graphs of its own"),
    ],
)
def test_what_cannot_be_recorded_is_refused(change, match):
    model = Model(mlp(), SSESAM(SPLIT), "full")
    change(model)
    choose(model, cuda_graphs=True)
    with pytest.raises(MisconfigurationException, match=match):
        fit(model, batches(6), **GPU)


def test_a_step_that_fails_while_it_is_recorded_is_refused():
    class LooksOnce(Model):
        calls = 0

        def sample_losses(self, batch):
            # No earlier step has shown it.
            type(self).calls += 1
            losses = super().sample_losses(batch)
            return losses * losses.max().item() if self.calls > 3 else losses

    model = LooksOnce(mlp())
    choose(model, cuda_graphs=True)
    with pytest.raises(MisconfigurationException, match="a step cannot be recorded"):
        fit(model, batches(6), **GPU)
    # The device goes on.
    model.net.to("cuda")
    assert torch.isfinite(model.net(torch.ones(1, 8, device="cuda"))).all()


def test_a_grad_scaler_is_refused():
    model = Model()
    choose(model, cuda_graphs=True)
    with pytest.raises(MisconfigurationException, match="a GradScaler waits"):
        fit(model, batches(), precision="16-mixed", **GPU)


def test_memory_of_recorded_steps():
    """What is allocated between steps: one more set of inputs and gradients."""
    net, found = nn.Sequential(nn.Linear(8, 2000), nn.Linear(2000, 2000), nn.Linear(2000, 5)), []
    for with_graphs in (False, True):
        torch.cuda.empty_cache()
        model = Model(copy.deepcopy(net), SSESAM(SPLIT), "full")
        model.on_train_batch_end = lambda *_: found.append(torch.cuda.memory_allocated())
        choose(model, cuda_graphs=with_graphs)
        fit(model, batches(6), **GPU)
        del model
    assert found[11] - found[5] < 1.1 * sum(p.nbytes for p in net.parameters()) + 2**20
