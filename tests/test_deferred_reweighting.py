import copy
import pickle

import lightning.pytorch as pl
import pytest
import torch
from helpers import (
    STRICT,
    Automatic,
    KillAt,
    Killed,
    assert_same_bits,
    batches_loader,
    classification_batch,
    fit,
    trainer,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_ssesam import SAM, ClassSplit, LongTailClassifier, StepOptions
from lightning_ssesam.callbacks import DeferredReweighting, StageSwitch, Switch
from lightning_ssesam.losses import BalancedSoftmaxLoss, FocalLoss, LDAMLoss, class_balanced_weights

pytestmark = STRICT

COUNTS = [50, 40, 30, 6, 5]
BALANCED = class_balanced_weights(COUNTS, 0.9999).float()
FIRST = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])

LOSSES = {
    "LDAM": lambda: LDAMLoss(),
    "focal": lambda: FocalLoss(),
    "cross-entropy": lambda: nn.CrossEntropyLoss(reduction="none"),
    "weighted": lambda: BalancedSoftmaxLoss(weight=FIRST),
    "weighted cross-entropy": lambda: nn.CrossEntropyLoss(weight=FIRST.clone(), reduction="none"),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


class Recorder(LongTailClassifier):
    """Notes the class weights with which every batch was trained, or the sanity check made."""

    def __init__(self, loss, passes="full"):
        torch.manual_seed(3)
        super().__init__(COUNTS, nn.Linear(8, 5), SAM(0.1), loss, step_options=StepOptions(passes=passes))
        self.seen, self.validated = [], []

    def training_step(self, batch, batch_idx):
        self.seen.append(self._weight())
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.validated.append(self._weight())

    def on_validation_epoch_end(self):
        pass

    def _weight(self):
        return None if self.loss.weight is None else self.loss.weight.clone()


def batches(number=5):
    torch.manual_seed(0)
    return [classification_batch(6) for _ in range(number)]


def first_of(name):
    return FIRST if name.startswith("weighted") else None


def weights(name, before, after):
    return [first_of(name)] * before + [BALANCED] * after


@every_loss
@pytest.mark.parametrize(
    ("switch", "epochs", "before"), [({}, 10, 40), ({"at": 0.5}, 2, 5), ({"epoch": 1}, 3, 5), ({"step": 7}, 3, 7)]
)
def test_weights_before_and_after(name, switch, epochs, before):
    model = Recorder(LOSSES[name]())
    fit(model, batches(), max_epochs=epochs, callbacks=[DeferredReweighting(**switch)])
    assert_same_bits(model.seen, weights(name, before, 5 * epochs - before))


def test_first_batch_of_epoch_160_of_200():
    model = Recorder(LDAMLoss())
    fit(model, batches(2), max_epochs=200, callbacks=[DeferredReweighting()])
    assert_same_bits(model.seen, weights("LDAM", 320, 80))


def test_beta():
    model = Recorder(LDAMLoss())
    fit(model, batches(), callbacks=[DeferredReweighting(0.5, beta=0.9)])
    raw = torch.tensor([(1 - 0.9) / (1 - 0.9**n) for n in COUNTS])
    torch.testing.assert_close(model.loss.weight, raw * 5 / raw.sum())


@every_loss
def test_same_parameters_as_weighting_by_hand(name):
    class ByHand(Recorder):
        def on_train_batch_start(self, batch, batch_idx):
            self.loss.weight = first_of(name) if batch_idx < 3 else BALANCED

    model, twin, plain = Recorder(LOSSES[name]()), ByHand(LOSSES[name]()), Recorder(LOSSES[name]())
    fit(model, batches(), callbacks=[DeferredReweighting(0.6)])
    fit(twin, batches())
    fit(plain, batches())
    assert_same_bits(model.parameters(), twin.parameters())
    assert not torch.equal(model.backbone.weight, plain.backbone.weight)


@every_loss
@pytest.mark.parametrize("stop_at", [5, 10])
def test_resumed_run_is_the_uninterrupted_one(name, stop_at, tmp_path):
    """Before the switch at step 7, and after it."""
    whole = Recorder(LOSSES[name]())
    fit(whole, batches(), max_epochs=3, callbacks=[DeferredReweighting(step=7)])
    every_step = ModelCheckpoint(tmp_path, "last", every_n_train_steps=1, enable_version_counter=False)
    callbacks = [DeferredReweighting(step=7), every_step, KillAt(stop_at)]
    with pytest.raises(Killed):
        fit(Recorder(LOSSES[name]()), batches(), max_epochs=3, callbacks=callbacks, enable_checkpointing=True)
    path = tmp_path / "last.ckpt"
    saved = torch.load(path, weights_only=True)
    assert saved["global_step"] == stop_at
    assert saved["callbacks"]["DeferredReweighting"] == {"switched_at": -1 if stop_at < 7 else 7}

    resumed = Recorder(LOSSES[name]())
    fit(resumed, batches(), max_epochs=3, callbacks=[DeferredReweighting(step=7)], ckpt_path=path)
    assert_same_bits(resumed.seen, whole.seen[stop_at:])
    assert_same_bits(resumed.parameters(), whole.parameters())
    # What was noted before the checkpoint was loaded is what the next training begins with.
    fit(resumed, batches(), callbacks=[DeferredReweighting(step=3)])
    assert_same_bits(resumed.seen[15 - stop_at :], weights(name, 3, 2))


def test_resumes_after_the_end_and_in_a_longer_run(tmp_path):
    run = fit(Recorder(LDAMLoss()), batches(), max_epochs=2, callbacks=[DeferredReweighting(0.5)])
    run.save_checkpoint(tmp_path / "end.ckpt")
    resumed = Recorder(LDAMLoss())
    fit(resumed, batches(), max_epochs=10, callbacks=[DeferredReweighting(0.5)], ckpt_path=tmp_path / "end.ckpt")
    assert_same_bits(resumed.seen, weights("LDAM", 0, 40))
    finished = Recorder(LDAMLoss())
    fit(finished, batches(), max_epochs=2, callbacks=[DeferredReweighting(0.5)], ckpt_path=tmp_path / "end.ckpt")
    assert finished.seen == []
    assert torch.equal(finished.loss.weight, BALANCED)


@every_loss
@pytest.mark.parametrize("epochs", [1, 3], ids=["before", "after"])
@pytest.mark.parametrize("weights_only", [False, True])
def test_checkpoint_fits_a_fresh_module(name, epochs, weights_only, tmp_path):
    run = trainer(max_epochs=epochs, callbacks=[DeferredReweighting(step=7)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeferredReweighting, "on_train_end", lambda *_: None)
        run.fit(Recorder(LOSSES[name]()), batches_loader(batches()))
    run.save_checkpoint(tmp_path / "end.ckpt", weights_only)
    fresh, state = Recorder(LOSSES[name]()), torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"]
    assert ("loss.weight" in state) == (name == "weighted cross-entropy")
    fresh.load_state_dict(state, strict=True)
    assert torch.equal(fresh.backbone.weight, run.lightning_module.backbone.weight)
    # And one that has had its weights loads a checkpoint of one that never had.
    if first_of(name) is None:
        run.lightning_module.load_state_dict(Recorder(LOSSES[name]()).state_dict(), strict=True)


@every_loss
@pytest.mark.parametrize("same_callback", [True, False])
@pytest.mark.parametrize("copied", [False, True])
def test_a_training_from_scratch_begins_with_the_first_weights(name, same_callback, copied):
    model, callback = Recorder(LOSSES[name]()), DeferredReweighting(0.6)
    fit(model, batches(), callbacks=[callback])
    assert torch.equal(model.loss.weight, BALANCED)
    model = copy.deepcopy(model) if copied else model
    model.seen, model.validated = [], []
    callback = callback if same_callback else DeferredReweighting(0.6)
    fit(model, batches(), val=batches_loader(batches(1)), callbacks=[callback])
    assert_same_bits(model.seen, weights(name, 3, 2))
    # The sanity check comes before the first batch, the other validation after the last.
    assert_same_bits(model.validated, [first_of(name), BALANCED])


def test_a_checkpoint_does_not_change_what_the_first_weights_were(tmp_path):
    model = Recorder(LOSSES["weighted cross-entropy"]())
    run = fit(model, batches(), callbacks=[DeferredReweighting(step=3)])
    run.save_checkpoint(tmp_path / "end.ckpt")
    # Its weights, in the checkpoint, are loaded into the loss in place.
    fit(model, batches(), max_epochs=2, callbacks=[DeferredReweighting(step=3)], ckpt_path=tmp_path / "end.ckpt")
    model.seen = []
    fit(model, batches(), callbacks=[DeferredReweighting(step=3)])
    assert_same_bits(model.seen, weights("weighted cross-entropy", 3, 2))


def test_callback_serves_several_modules():
    callback = DeferredReweighting(0.6)
    for name in LOSSES:
        model = Recorder(LOSSES[name]())
        fit(model, batches(), callbacks=[callback])
        assert_same_bits(model.seen, weights(name, 3, 2))
    assert callback.at == 0.6
    assert pickle.loads(pickle.dumps(callback)).at == 0.6


@pytest.mark.parametrize("name", ["LDAM", "cross-entropy", "weighted cross-entropy"])
def test_dtype_is_that_of_the_module(name):
    model = Recorder(LOSSES[name]())
    data = [(x.double(), y) for x, y in batches()]
    fit(model, data, callbacks=[DeferredReweighting(0.6)], precision="64-true")
    assert model.loss.weight.dtype == torch.float64
    torch.testing.assert_close(model.loss.weight, class_balanced_weights(COUNTS), rtol=0, atol=0)


@pytest.mark.parametrize("passes", ["auto", "split"])
def test_with_other_passes(passes):
    model, twin = Recorder(LDAMLoss(), passes=passes), Recorder(LDAMLoss())
    fit(model, batches(), callbacks=[DeferredReweighting(0.6)])
    fit(twin, batches(), callbacks=[DeferredReweighting(0.6)])
    torch.testing.assert_close(model.backbone.weight, twin.backbone.weight)
    assert_same_bits(model.seen, weights("LDAM", 3, 2))


def test_weight_that_is_a_plain_attribute():
    class Plain(nn.Module):
        reduction, weight = "none", None

        def forward(self, logits, targets):
            return nn.functional.cross_entropy(logits, targets, self.weight, reduction="none")

    model = Recorder(Plain())
    fit(model, batches(), callbacks=[DeferredReweighting(0.6)])
    assert_same_bits(model.seen, weights("plain", 3, 2))
    assert set(model.state_dict()) == {"backbone.weight", "backbone.bias"}


def test_automatic_optimization():
    class Module(Automatic):
        def __init__(self):
            super().__init__(nn.Linear(8, 5))
            self.loss, self.seen = LDAMLoss(COUNTS, reduction="mean"), []

        def setup(self, stage):
            # After the callback's.
            self.split = LongTailClassifier(COUNTS, nn.Linear(8, 5)).split

        def training_step(self, batch, batch_idx):
            self.seen.append(self.loss.weight)
            return self.loss(self.net(batch[0]), batch[1])

    model = Module()
    fit(model, batches(), callbacks=[DeferredReweighting(0.6)])
    assert_same_bits(model.seen, weights("LDAM", 3, 2))


def test_loss_made_in_configure_model():
    class Late(Recorder):
        def configure_model(self):
            self.loss = nn.CrossEntropyLoss(reduction="none")

    model = Late(None)
    del model.loss
    fit(model, batches(), callbacks=[DeferredReweighting(0.6)])
    assert_same_bits(model.seen, weights("late", 3, 2))


def test_says_so_once(caplog):
    with caplog.at_level("INFO"):
        fit(Recorder(LDAMLoss()), batches(), max_epochs=2, callbacks=[DeferredReweighting(0.5)])
    said = [record.getMessage() for record in caplog.records if "DeferredReweighting" in record.getMessage()]
    assert said == ["DeferredReweighting: class-balanced weights from step 5 (epoch 1)."]


def test_warns_where_it_never_switched():
    message = "ended at step 5 without class-balanced weights, which DeferredReweighting had set for step 9"
    with pytest.warns(UserWarning, match=message):
        fit(Recorder(LDAMLoss()), batches(), callbacks=[DeferredReweighting(step=9)])


def test_own_policy():
    class Early(DeferredReweighting):
        def should_switch(self, step_idx, epoch_idx):
            return step_idx >= 2

    model = Recorder(LDAMLoss())
    fit(model, batches(), callbacks=[Early()])
    assert_same_bits(model.seen, weights("LDAM", 2, 3))


def test_both_switches_together():
    model = Recorder(LDAMLoss())
    with pytest.warns(UserWarning, match="StageSwitch has no effect: SAM"):
        fit(model, batches(), callbacks=[StageSwitch(0.4), DeferredReweighting(0.6)])
    assert_same_bits(model.seen, weights("LDAM", 3, 2))
    assert issubclass(StageSwitch, Switch)


def test_module_without_split_or_weight():
    with pytest.raises(MisconfigurationException, match=r"a ClassSplit as its `split`.* `Automatic.split` is None"):
        fit(Automatic(), batches(), callbacks=[DeferredReweighting()])
    for loss in (nn.MSELoss(reduction="none"), nn.PReLU()):
        with pytest.raises(MisconfigurationException, match=r"whose `loss` has class weights.* `Recorder.loss` is"):
            fit(Recorder(loss), batches(), callbacks=[DeferredReweighting()])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"at": 1.0}, "`at` to be a number strictly between 0 and 1, but got 1.0"),
        ({"epoch": 0}, "`epoch` to be an integer >= 1, but got 0"),
        ({"epoch": 3, "step": 3}, "at most one of the arguments `at`, `epoch` and `step`"),
        ({"beta": 1}, r"`beta` to be a number in \[0, 1\), but got 1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DeferredReweighting(**arguments)


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss, LDAMLoss])
def test_makes_no_buffer_where_there_was_none(loss):
    """Callbacks that average weights pair the buffers of two copies."""
    module = pl.LightningModule()
    module.net, module.split = nn.Linear(2, 2), ClassSplit([20, 5], [1])
    module.loss = loss() if loss is nn.CrossEntropyLoss else loss([20, 5])
    before = [name for name, _ in module.named_buffers()]
    DeferredReweighting().apply(module, switched=True)
    assert module.loss.weight is not None
    assert [name for name, _ in module.named_buffers()] == before


def test_weight_follows_the_loss_to_another_device():
    module = pl.LightningModule()
    module.net, module.split, module.loss = nn.Linear(2, 2), ClassSplit([20, 5], [1]), nn.CrossEntropyLoss()
    DeferredReweighting().apply(module, switched=True)
    targets = torch.tensor([0, 1])
    module.loss(torch.zeros(2, 2), targets)
    module.loss(torch.zeros(2, 2, device="meta"), targets.to("meta"))
    assert module.loss.weight.device.type == "meta"
    assert len(module.loss._forward_pre_hooks) == 1
    DeferredReweighting().apply(module, switched=False)
    assert float(module.loss(torch.zeros(2, 2), targets)) == pytest.approx(0.6931, abs=1e-4)
    assert not module.loss._forward_pre_hooks


def contents(loss):
    """Everything that a module holds, with its private attributes, buffers and hooks."""
    return {name: dict(value) if isinstance(value, dict) else value for name, value in vars(loss).items()}


@every_loss
@pytest.mark.parametrize("copied", [False, True])
def test_a_loss_with_its_own_weight_is_as_it_was(name, copied):
    """After a run that never switched, from scratch and after one that did."""
    model = Recorder(LOSSES[name]())
    before = contents(model.loss)
    never = pytest.warns(UserWarning, match="without class-balanced weights")
    with never:
        fit(model, batches(), callbacks=[DeferredReweighting(step=9)])
    assert contents(model.loss).keys() == before.keys()
    assert_same_bits([model.loss.weight], [first_of(name)])
    fit(model, batches(), callbacks=[DeferredReweighting(step=3)])
    original, model = model, copy.deepcopy(model) if copied else model
    with never:
        fit(model, batches(), callbacks=[DeferredReweighting(step=9)])
    after = contents(model.loss)
    assert after.keys() == before.keys()
    assert not model.loss._forward_pre_hooks
    assert_same_bits([after["_buffers"].pop("weight")], [before["_buffers"].pop("weight")])
    assert [name for name, _ in model.named_buffers()] == [name for name, _ in Recorder(LOSSES[name]()).named_buffers()]
    # The copy has a hook of its own.
    assert len(original.loss._forward_pre_hooks) == int(copied and first_of(name) is None)


def test_a_loss_that_was_sent_elsewhere_gets_its_weight_back():
    module = pl.LightningModule()
    module.net, module.split, module.loss = nn.Linear(2, 2), ClassSplit([20, 5], [1]), nn.CrossEntropyLoss()
    DeferredReweighting().apply(module, switched=True)
    sent = pickle.loads(pickle.dumps(module))
    DeferredReweighting().apply(sent, switched=False)
    assert sent.loss.weight is None
    assert not sent.loss._forward_pre_hooks
    assert module.loss.weight is not None
