"""The command `lightning-ssesam adjust`: the table is true, the checkpoints are read by themselves, nothing is lost."""

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers import STRICT, trainer
from torchmetrics.classification import MulticlassCalibrationError

from lightning_ssesam import DigitsLT, LongTailClassifier
from lightning_ssesam.cli import main
from lightning_ssesam.errors import ArgumentError
from lightning_ssesam.experiments import adjust_command
from lightning_ssesam.experiments.adjust_command import adjust
from lightning_ssesam.experiments.checkpoints import find_config, load_checkpoint
from lightning_ssesam.posthoc import METHODS, logit_shift

pytestmark = [STRICT, pytest.mark.filterwarnings("ignore::UserWarning:lightning.*")]

GROUPS = ("head", "tail", "many", "medium", "few", "all")
FIT = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--model.backbone.width=8"]
QUICK = ["--steps=20", "--device=cpu"]


def fit(folder, *options, epochs=3):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["lightning-ssesam"])
        main(["fit", *FIT, f"--trainer.max_epochs={epochs}", *options])
    (checkpoint,) = (folder / "lightning_logs" / "version_0" / "checkpoints").iterdir()
    return checkpoint


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("trained"), "--model.tta=hflip")


@pytest.fixture
def checkpoint(trained, tmp_path):
    """A copy of the training's folder, for each test."""
    shutil.copytree(trained.parents[1], tmp_path / "run")
    return tmp_path / "run" / "checkpoints" / trained.name


def results(checkpoint, config=None):
    """What the classifier of a checkpoint reaches on the test data, by Lightning, and its probabilities."""
    model, data = load_checkpoint(checkpoint, config or find_config(checkpoint))
    run = trainer()
    found = run.test(model, datamodule=data, verbose=False)[0]
    probabilities = torch.cat(run.predict(model, data.test_dataloader()))
    error = MulticlassCalibrationError(10, n_bins=15)(probabilities, data._sets["test"].tensors[1])
    return {**{group: found[f"test/acc_{group}"] for group in GROUPS}, "ECE": float(error)}, probabilities


def test_the_table_and_the_checkpoints(checkpoint, capsys):
    before = checkpoint.read_bytes()
    main(["adjust", str(checkpoint), *QUICK])
    shown = capsys.readouterr()
    assert checkpoint.read_bytes() == before
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]
    folder = checkpoint.parents[1] / "adjusted"
    written = {name: folder / f"{checkpoint.stem}-{name}.ckpt" for name in METHODS}
    assert set(folder.iterdir()) == set(written.values())
    lines = shown.out.splitlines()
    assert lines[0].endswith("500 images")
    assert lines[1].split() == [*GROUPS, "ECE"]
    assert lines[-1] == "Written: " + ", ".join(os.path.relpath(path) for path in written.values())
    labels = []
    for line, path in zip(lines[2:], [checkpoint, *written.values()], strict=False):
        label, *numbers = re.split(r"\s{2,}", line)
        expected, probabilities = results(path)
        assert numbers == [f"{100 * expected[name]:.1f}" for name in (*GROUPS, "ECE")], label
        labels.append(label)
        # By itself, as the file says what builds it.
        loaded = LongTailClassifier.load_from_checkpoint(path).eval()
        images = DigitsLT().test_dataloader().dataset.tensors[0][:256]
        with torch.no_grad():
            torch.testing.assert_close(loaded.probabilities(images), probabilities[:256])
    assert [label.partition(",")[0].split()[0] for label in labels] == ["before", *METHODS]
    assert len({line[30:] for line in lines[2:8]}) == 6
    assert "Model and data come from" in shown.err
    assert "balanced already" not in shown.err
    best = re.search(r"Best on the validation images, by the mean recall of all classes: (\w+)\.", shown.out)
    assert best[1] in METHODS


def test_only_the_correction_has_changed(checkpoint):
    adjust(checkpoint, methods="logit_adjustment,tau_norm", tau=0.5, device="cpu")
    before = torch.load(checkpoint, weights_only=True)
    folder = checkpoint.parents[1] / "adjusted"
    shifted, normed = (
        torch.load(folder / f"{checkpoint.stem}-{name}.ckpt", weights_only=True)
        for name in ("logit_adjustment", "tau_norm")
    )
    new = {"correction.scale": torch.ones(10), "correction.shift": logit_shift(DigitsLT().class_counts, 0.5).float()}
    torch.testing.assert_close(shifted["state_dict"], {**before["state_dict"], **new})
    weight = before["state_dict"]["backbone.classifier.weight"]
    new = {"weight": weight / weight.norm(dim=1, keepdim=True) ** 0.5, "bias": torch.zeros(10)}
    new = {f"backbone.classifier.{name}": value for name, value in new.items()}
    torch.testing.assert_close(normed["state_dict"], {**before["state_dict"], **new})
    for content in (shifted, normed):
        kept = before.keys() - {"optimizer_states", "lr_schedulers", "callbacks", "loops"}
        assert content.keys() == kept | {"posthoc"}
        assert content["classifier"] == before["classifier"]
    assert normed["posthoc"] == [{"method": "tau_norm", "tau": 0.5}]


def test_a_single_checkpoint_is_that_of_the_best_method(checkpoint, monkeypatch, capsys):
    rows = adjust(checkpoint, methods=["temperature", "lws", "crt"], steps=20, device="cpu", output=Path("new/a.ckpt"))
    out = capsys.readouterr().out
    best = re.search(r"Best on the validation images, by the mean recall of all classes: (\w+)\.", out)[1]
    assert "Written: new/a.ckpt\n" in out
    monkeypatch.setattr(sys, "argv", ["lightning-ssesam"])
    main(["test", f"--config={find_config(checkpoint)}", "--trainer.logger=false", "--ckpt_path=new/a.ckpt"])
    shown = dict(re.findall(r"test/acc_(\w+) +(\S+)", capsys.readouterr().out))
    assert {group: float(shown[group]) for group in GROUPS} == pytest.approx({k: rows[best][k] for k in GROUPS})
    assert os.listdir("new") == ["a.ckpt"]
    assert not (checkpoint.parents[1] / "adjusted").exists()
    # A file of that name is not lost.
    Path("new/a.ckpt").write_text("mine")
    adjust(checkpoint, methods="temperature", device="cpu", output=Path("new/a.ckpt"))
    assert Path("new/earlier/a-1.ckpt").read_text() == "mine"
    assert torch.load("new/a.ckpt", weights_only=True)["posthoc"][0]["method"] == "temperature"


def test_the_same_configuration_is_found_for_what_is_written(checkpoint):
    """Where another training follows in the folder, the newest configuration is not that of the checkpoint."""
    later = checkpoint.parents[1] / "config-1.yaml"
    later.write_text("other")
    os.utime(later, (checkpoint.stat().st_mtime + 10,) * 2)
    adjust(checkpoint, methods="temperature", device="cpu")
    (written,) = (checkpoint.parents[1] / "adjusted").iterdir()
    assert find_config(written).name == "config.yaml"


def test_the_tail_with_a_floor_for_the_head(checkpoint, capsys):
    options = {"methods": "logit_adjustment", "device": "cpu", "output": Path("x.ckpt")}
    taus = []
    for drop in (0.0, 1.0):
        adjust(checkpoint, criterion="tail", head_drop=drop, **options)
        out = capsys.readouterr().out
        taus.append(float(re.search(r"logit_adjustment, tau (\S+)", out)[1]))
        assert "the recall of the tail" in out
    assert taus[0] < taus[1]


def test_what_does_not_help_is_said(checkpoint, capsys):
    adjust(checkpoint, methods="logit_adjustment", tau=0.0, device="cpu")
    out = capsys.readouterr().out
    assert "No gain on the 200 validation images: logit_adjustment." in out
    assert "No gain on the test images: logit_adjustment." in out
    assert "By the mean recall of all classes of the validation images, nothing is better than the checkpoint" in out


def test_nothing_is_adjusted_twice_in_silence(checkpoint, capsys):
    adjust(checkpoint, methods="temperature,crt,logit_adjustment", steps=20, device="cpu")
    folder = checkpoint.parents[1] / "adjusted"
    messages = {}
    for name in ("temperature", "crt"):
        capsys.readouterr()
        adjust(folder / f"{checkpoint.stem}-{name}.ckpt", methods="logit_adjustment,crt", steps=2, device="cpu")
        messages[name] = capsys.readouterr().err
    assert "balanced already, by an earlier correction (crt). What logit_adjustment would add" in messages["crt"]
    assert "balanced" not in messages["temperature"]
    # A correction of the logits is known by itself; and a second one is made on top of it.
    content = torch.load(folder / f"{checkpoint.stem}-logit_adjustment.ckpt", weights_only=True)
    first = content["state_dict"]["correction.shift"]
    del content["posthoc"]
    torch.save(content, folder / "bare.ckpt")
    rows = adjust(folder / "bare.ckpt", methods="logit_adjustment", tau=1.0, device="cpu")
    assert "balanced already, by an earlier correction of its logits" in capsys.readouterr().err
    again = folder / "bare-logit_adjustment.ckpt"
    shift = torch.load(again, weights_only=True)["state_dict"]["correction.shift"]
    torch.testing.assert_close(shift, first + logit_shift(DigitsLT().class_counts).float())
    assert results(again)[0] == pytest.approx(rows["logit_adjustment"])


def changed_config(checkpoint, **changes):
    config = yaml.safe_load(find_config(checkpoint).read_text())
    for path, value in changes.items():
        *parents, last = path.split("__")
        part = config
        for name in parents:
            part = part[name]
        part[last] = value
    Path("other.yaml").write_text(yaml.safe_dump(config))
    return Path("other.yaml")


DEFERRED = [{"class_path": "lightning_ssesam.DeferredReweighting"}]
SAMPLER = {"class_path": "lightning_ssesam.data.ClassBalancedSampler"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model__loss": {"class_path": "lightning_ssesam.losses.BalancedSoftmaxLoss"}},
            "its loss BalancedSoftmaxLoss",
        ),
        ({"data__init_args__sampler": SAMPLER}, "the sampler of its training set"),
        ({"trainer__callbacks": DEFERRED}, "DeferredReweighting"),
    ],
)
def test_training_that_was_balanced(checkpoint, capsys, changes, message):
    config = changed_config(checkpoint, **changes)
    content = torch.load(checkpoint, weights_only=True)
    # As `compare --keep_weights` saves them.
    del content["callbacks"]
    torch.save(content, checkpoint)
    adjust(checkpoint, config, methods="tau_norm,temperature", device="cpu")
    assert f"This classifier is balanced already, by {message}. What tau_norm would add" in capsys.readouterr().err


@pytest.mark.parametrize(("switched_at", "is_said"), [(None, False), (20, True)])
def test_late_class_weights_count_once_they_have_begun(checkpoint, capsys, switched_at, is_said):
    content = torch.load(checkpoint, weights_only=True)
    content["callbacks"]["DeferredReweighting"] = {"switched_at": switched_at}
    torch.save(content, checkpoint)
    adjust(checkpoint, methods="logit_adjustment", device="cpu")
    assert ("DeferredReweighting" in capsys.readouterr().err) == is_said


def test_a_validation_set_that_is_the_test_set(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(DigitsLT, "val_is_test", True)
    adjust(checkpoint, methods="logit_adjustment", device="cpu")
    assert "The validation set is the test set. What is chosen on it looks better" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "text"), [("val", "validation"), ("test", "test")])
def test_data_that_are_missing(checkpoint, monkeypatch, name, text):
    monkeypatch.setattr(DigitsLT, f"{name}_dataloader", lambda self: [])
    with pytest.raises(ArgumentError, match=f"DigitsLT has no {text} data"):
        adjust(checkpoint, methods="logit_adjustment", device="cpu")


def test_a_method_that_does_not_work_costs_no_other_one(checkpoint, capsys, monkeypatch):
    def fail(logits, targets):
        raise ArgumentError("No temperature fits: every sample is classified right. Use more validation samples.")

    monkeypatch.setattr("lightning_ssesam.posthoc.methods.fit_temperature", fail)
    rows = adjust(checkpoint, methods="temperature,logit_adjustment", device="cpu")
    assert set(rows) == {"before", "logit_adjustment"}
    assert "temperature is left out: No temperature fits" in capsys.readouterr().err
    with pytest.raises(ArgumentError, match="None of the methods works"):
        adjust(checkpoint, methods="temperature", device="cpu", output=Path("x.ckpt"))
    assert not Path("x.ckpt").exists()


def test_an_interruption_loses_nothing(checkpoint, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    before = checkpoint.read_bytes()
    monkeypatch.setattr("lightning_ssesam.posthoc.methods.retrained", interrupt)
    with pytest.raises(SystemExit) as stop:
        main(["adjust", str(checkpoint), "--methods=tau_norm,crt,temperature", *QUICK])
    assert stop.value.code == 130
    assert checkpoint.read_bytes() == before
    (written,) = (checkpoint.parents[1] / "adjusted").iterdir()
    assert written.name.endswith("-tau_norm.ckpt")
    # Or half a file.
    monkeypatch.setattr(torch, "save", interrupt)
    with pytest.raises(SystemExit):
        main(["adjust", str(checkpoint), "--methods=temperature", *QUICK])
    assert list((checkpoint.parents[1] / "adjusted").iterdir()) == [written]


def test_weights_that_a_comparison_keeps(capsys, monkeypatch, no_pictures):
    monkeypatch.setattr(sys, "argv", ["lightning-ssesam"])
    options = ["--methods=ERM", "--seeds=1", "--epochs=1", "--jobs=1", "--trainer={accelerator: cpu}"]
    main(["compare", *options, "--keep_weights=true"])
    (weights,) = Path("comparison/weights").glob("*/seed-0.ckpt")
    capsys.readouterr()
    rows = adjust(weights, methods="tau_norm", device="cpu")
    written = weights.parent / "adjusted" / "seed-0-tau_norm.ckpt"
    assert results(written)[0] == pytest.approx(rows["tau_norm"])
    assert weights.exists()
    # No training goes on from either file.
    for path in (weights, written):
        with pytest.raises(SystemExit) as stop:
            main(["fit", *FIT, "--trainer.max_epochs=2", f"--ckpt_path={path}"])
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert f"Cannot load the checkpoint {str(path)!r}: it holds weights only, no state of" in error
        assert "so `fit` cannot go on from it. Corrected checkpoints and those of `compare --keep_weights`" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nope.ckpt"], "No such checkpoint: 'nope.ckpt'."),
        (["CHECKPOINT", "--methods=mix"], "`methods` to be some of logit_adjustment, tau_norm, lws, crt, temperature"),
        (["CHECKPOINT", "--methods=tau_nrm"], "Did you mean 'tau_norm'?"),
        (["CHECKPOINT", "--methods=crt,crt"], "`methods` to be some of"),
        (["CHECKPOINT", "--tau=-1"], "`tau` to be a finite number >= 0, but got -1"),
        (["CHECKPOINT", "--tau=[1, 0.5]"], "`tau` to be a strictly increasing list of finite numbers >= 0"),
        (["CHECKPOINT", "--criterion=head"], "criterion"),
        (["CHECKPOINT", "--head_drop=2"], "`head_drop` to be a number in [0, 1], but got 2"),
        (["CHECKPOINT", "--steps=0"], "`steps` to be an integer >= 1"),
        (["CHECKPOINT", "--lr=0"], "`lr` to be a finite number > 0"),
        (["CHECKPOINT", "--seed=-1"], "`seed` to be an integer >= 0"),
        (["CHECKPOINT", "--threads=0"], "`threads` to be an integer >= 1"),
        (["CHECKPOINT", "--device=tpu9"], "`device` to be 'auto' or a device of this machine"),
        (
            ["CHECKPOINT", "--output=CHECKPOINT"],
            "`output` to be another file than the checkpoint, which stays",
        ),
        (["CHECKPOINT", "--output=LINK"], "`output` to be another file than the checkpoint, which stays"),
        (["CHECKPOINT", "--output=folder"], "`output` to be the path of a file that ends in .ckpt"),
        (["CHECKPOINT", "--output=text/x.ckpt"], "`output` to be a folder that can be made"),
        (["CHECKPOINT", "--config=text"], "'text' is no configuration of `lightning-ssesam fit`"),
    ],
)
def test_wrong_options(trained, options, message, capsys):
    Path("text").write_text("text")
    Path("folder").mkdir()
    os.symlink(trained, "link.ckpt")
    before = trained.read_bytes()
    names = {"CHECKPOINT": str(trained), "LINK": "link.ckpt"}
    for name, path in names.items():
        options = [option.replace(name, path) for option in options]
    with pytest.raises(SystemExit) as stop:
        main(["adjust", *options])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert trained.read_bytes() == before
    assert not (trained.parents[1] / "adjusted").exists()


def test_more_than_plain_data(checkpoint, capsys):
    content = torch.load(checkpoint, weights_only=True)
    torch.save({**content, "path": Path("x")}, checkpoint)
    with pytest.raises(SystemExit):
        main(["adjust", str(checkpoint), *QUICK])
    assert "holds pathlib." in capsys.readouterr().err
    main(["adjust", str(checkpoint), "--methods=temperature", "--trust_checkpoint=true", *QUICK])


def test_options_reach_their_place(checkpoint, monkeypatch):
    seen = {}

    def stop(name, evidence):
        seen[name] = evidence
        raise KeyboardInterrupt

    monkeypatch.setattr(adjust_command, "find_correction", stop)
    options = ["--methods=crt", "--tau=[0.5, 1]", "--criterion=tail", "--head_drop=0.2", "--steps=7", "--lr=0.3"]
    with pytest.raises(SystemExit):
        main(["adjust", str(checkpoint), *options, "--seed=9", "--device=cpu"])
    choice, training = seen["crt"].choice, seen["crt"].training
    assert (list(choice.taus), choice.criterion, choice.head_drop) == ([0.5, 1.0], "tail", 0.2)
    assert (training.steps, training.lr, training.seed, training.batch_size) == (7, 0.3, 9, 512)
