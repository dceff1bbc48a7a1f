"""The command ``predict``: the rows against the classifier itself, labelled pictures, files that cannot be read."""

import csv
import functools
import os
import signal
import sys

import numpy as np
import pytest
import torch
from helpers import STRICT, start_process, trainer, wait_for
from PIL import Image

from lightning_ssesam import HeadTailAccuracy, LongTailClassifier
from lightning_ssesam.cli import main
from lightning_ssesam.data import ImageInput
from lightning_ssesam.experiments import predict_command
from lightning_ssesam.experiments.pictures import find_pictures
from lightning_ssesam.experiments.predict_command import predict
from lightning_ssesam.models import SmallConvNet

pytestmark = STRICT
NAMES = ["ant", "bee", "speed limit 30"]
INPUT = ImageInput(16)


def picture(path, seed):
    """A picture of an odd size, by its seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (20 + seed % 7, 17 + seed % 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a checkpoint, labelled pictures and pictures without labels."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    model = LongTailClassifier(
        [60, 30, 5], functools.partial(SmallConvNet, width=8, in_channels=3), class_names=NAMES, tail_below=10
    )
    model.image_input = INPUT
    torch.nn.init.normal_(model.backbone.classifier.weight, std=3)
    runner = trainer(max_epochs=1)
    runner.strategy.connect(model)
    runner.save_checkpoint(folder / "a.ckpt")
    for seed in range(12):
        picture(folder / "labelled" / NAMES[seed % 3] / f"{seed:02}.png", seed)
        picture(folder / "new" / f"{'deep/' * (seed % 2)}{seed:02}.png", seed)
    return folder


def expected(folder, path, tta="none"):
    model = LongTailClassifier.load_from_checkpoint(folder / "a.ckpt").eval()
    model.tta = tta
    with Image.open(path) as image, torch.inference_mode():
        return model.predict_step(INPUT.transform()(image)[None], 0)[0]


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("tta", ["none", "hflip"])
def test_rows_are_what_the_classifier_says(made, tta, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    predictions = predict(made / "a.ckpt", made / "new", top=2, tta=tta, batch_size=5, num_workers=0)
    rows = rows_of("predictions.csv")
    assert list(rows[0]) == ["file", "class", "probability", "class_2", "probability_2"]
    paths = [row["file"] for row in rows]
    assert sorted(paths) == sorted(str(path) for path in (made / "new").rglob("*.png"))
    for row, prediction in zip(rows, predictions, strict=True):
        best = expected(made, row["file"], tta).topk(2)
        assert [row["class"], row["class_2"]] == [NAMES[number] for number in best.indices] == prediction.classes
        found = [float(row["probability"]), float(row["probability_2"])]
        assert found == pytest.approx(best.values.tolist(), abs=2e-6)
        assert prediction.probabilities == pytest.approx(best.values.tolist(), abs=1e-6)


def test_labelled_pictures_begin_with_the_surest_mistakes(made, tmp_path, capsys):
    output = tmp_path / "of" / "a" / "rows.csv"
    predict(made / "a.ckpt", made / "labelled", output)
    rows = rows_of(output)
    assert list(rows[0])[:5] == ["file", "true_class", "correct", "class", "probability"]
    assert all(row["true_class"] == os.path.basename(os.path.dirname(row["file"])) for row in rows)
    right = [row["true_class"] == row["class"] for row in rows]
    assert [row["correct"] == "1" for row in rows] == right == sorted(right)
    assert 0 < sum(right) < len(rows)
    wrong = [float(row["probability"]) for row in rows if row["correct"] == "0"]
    assert wrong == sorted(wrong, reverse=True)
    assert [row["file"] for row in rows if row["correct"] == "1"] == sorted(
        row["file"] for row in rows if row["correct"] == "1"
    )
    text = capsys.readouterr().out
    metric = HeadTailAccuracy(LongTailClassifier.load_from_checkpoint(made / "a.ckpt").split)
    metric.update(*(torch.tensor([NAMES.index(row[name]) for row in rows]) for name in ("class", "true_class")))
    for name, value in metric.compute().items():
        assert f"{name} {100 * value:.1f}" in text
    assert f"Right: {sum(right)} of 12 ({100 * sum(right) / 12:.1f} %)" in text


def test_labels_are_found_or_asked_for(made, tmp_path):
    folder = made / "labelled"
    found = find_pictures(folder, NAMES)
    assert [NAMES[label] for label in found.labels] == [os.path.basename(os.path.dirname(path)) for path in found.paths]
    assert find_pictures(folder, NAMES, is_labelled=False).labels is None
    assert find_pictures(folder, ["ant", "bee"]).labels is None
    assert find_pictures(made / "new", NAMES).labels is None
    for source, message in ((made / "new", "'00.png'"), (folder / "ant" / "00.png", "single image")):
        with pytest.raises(ValueError, match=message):
            find_pictures(source, NAMES, is_labelled=True)


def test_list_files(made, tmp_path):
    first, second = made / "new" / "00.png", made / "labelled" / "speed limit 30" / "02.png"
    plain = tmp_path / "plain.txt"
    plain.write_text(f"\ufeff{first}\n\n{second}\n", encoding="utf-8")
    assert find_pictures(plain, NAMES) == ([str(first), str(second)], None)
    with_names = tmp_path / "named.txt"
    with_names.write_text(f"{first} ant\n{second}\tspeed limit 30\n")
    assert find_pictures(with_names, NAMES) == ([str(first), str(second)], [0, 2])
    with_numbers = made / "numbered.txt"
    with_numbers.write_text("new/00.png 1\nlabelled/speed limit 30/02.png 2\n")
    assert find_pictures(with_numbers, NAMES) == ([str(first), str(second)], [1, 2])
    with_numbers.write_text("new/00.png 1\nnew/02.png 3\n")
    with pytest.raises(
        ValueError, match=r"numbered\.txt, line 2: Expected a path and the name or the index of a class"
    ):
        find_pictures(with_numbers, NAMES)
    for wrong in ("", "\0\0"):
        plain.write_text(wrong)
        with pytest.raises(ValueError, match="list file with a path in each line"):
            find_pictures(plain, NAMES)


def test_unreadable_files_are_named(made, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "in" / "good.png", 1)
    (tmp_path / "in" / "text.jpg").write_text("no picture")
    # The header and the end are right. Only reading it shows the damage.
    picture(tmp_path / "in" / "worn.png", 2)
    content = bytearray((tmp_path / "in" / "worn.png").read_bytes())
    content[60:200] = bytes(140)
    (tmp_path / "in" / "worn.png").write_bytes(content)
    command = ["predict", str(made / "a.ckpt"), "in"]

    def refusal(*options):
        with pytest.raises(SystemExit) as ended:
            main([*command, *options])
        assert ended.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert "1 of 3 images cannot be read. Expected in/text.jpg to be" in (line := refusal())
    assert "`--skip_unreadable true`" in line
    assert not os.path.exists("predictions.csv")
    os.remove("in/text.jpg")
    assert "1 of 2 images cannot be read. Expected in/worn.png to be" in (line := refusal())
    assert "The others are in predictions.csv." in line
    assert [row["file"] for row in rows_of("predictions.csv")] == ["in/good.png"]
    main([*command, "--skip_unreadable", "true"])
    assert "in/worn.png" in capsys.readouterr().err
    os.remove("in/good.png")
    main([*command, "--skip_unreadable", "true"])
    assert rows_of("predictions.csv") == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Expected a checkpoint and images, but got none."),
        (["a.ckpt"], "Expected images, but got none."),
        (["b.ckpt", "new"], "No such checkpoint: 'b.ckpt'."),
        (["new", "new"], "is a folder"),
        (["a.ckpt", "nothing"], "`images` to be a folder, a list file or an image, but got 'nothing'"),
        (["a.ckpt", "empty"], "`images` to be a folder with images, but got 'empty' with none"),
        (["a.ckpt", "new", "--top", "0"], "`top` to be an integer >= 1, but got 0"),
        (["a.ckpt", "new", "--batch_size", "0"], "`batch_size` to be an integer >= 1, but got 0"),
        (["a.ckpt", "new", "--device", "tpu9"], "`device` to be 'auto' or a device of this machine"),
        (["a.ckpt", "new", "--tta", "vflip"], "tta"),
        (["a.ckpt", "new", "--labelled", "true"], "a labelled folder"),
        (["a.ckpt", "new", "--config", "nothing.yaml"], "nothing.yaml"),
        (["a.ckpt", "new", "more"], "more"),
        (["a.ckpt", "new", "--output", "a.ckpt/x.csv"], "a.ckpt"),
    ],
)
def test_misuse_gets_one_line(options, message, made, monkeypatch, capsys):
    monkeypatch.chdir(made)
    os.makedirs("empty", exist_ok=True)
    with pytest.raises(SystemExit) as ended:
        main(["predict", *options])
    assert ended.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert message in line
    assert len(line) < 400
    assert not os.path.exists("predictions.csv")


def test_a_checkpoint_without_an_input_needs_its_configuration(made, tmp_path, monkeypatch, capsys):
    """Of an earlier version, or with a transform of the user's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-ssesam"])
    content = torch.load(made / "a.ckpt", weights_only=True)
    del content["classifier"]
    torch.save(content, "old.ckpt")
    with pytest.raises(SystemExit):
        main(["predict", "old.ckpt", str(made / "new")])
    assert "No config.yaml" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text(
        f"""
model:
  backbone: {{class_path: lightning_ssesam.models.SmallConvNet, init_args: {{width: 8}}}}
  tail_fraction: 0.4
data:
  class_path: lightning_ssesam.data.ImageFolderLT
  init_args: {{root: "{made / "labelled"}", image_size: 16, test_fraction: 0.25, val_fraction: 0}}
"""
    )
    predict(tmp_path / "old.ckpt", made / "new")
    rows = rows_of("predictions.csv")
    for row in rows:
        assert row["class"] == NAMES[int(expected(made, row["file"]).argmax())]


def _predict_slowly(checkpoint, images):
    """Waits for its end after the first batch."""

    def step(model, loader, found, real=predict_command._predict):
        def first(batches):
            yield next(iter(batches))
            open("reached", "w").close()
            signal.pause()

        real(model, first(loader), found)

    predict_command._predict = step
    main(["predict", checkpoint, images, "--batch_size", "5"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_keeps_what_was_predicted(number, made, tmp_path):
    process = start_process(
        _predict_slowly, str(made / "a.ckpt"), str(made / "new"), folder=tmp_path, log=tmp_path / "log"
    )
    wait_for(lambda: (tmp_path / "reached").exists() or process.exitcode is not None, seconds=60)
    os.kill(process.pid, number)
    process.join(30)
    assert process.exitcode not in (0, None)
    text = (tmp_path / "log").read_text()
    assert "Interrupted after 5 of 12 images, which are in predictions.csv." in text
    assert len(rows_of(tmp_path / "predictions.csv")) == 5


def test_no_file_is_lost(made, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a.ckpt", "one.png", "list.txt"):
        source = {"a.ckpt": made / "a.ckpt", "one.png": made / "new" / "00.png"}.get(name)
        (tmp_path / name).write_bytes(b"one.png\n" if source is None else source.read_bytes())
    (tmp_path / "folder.csv").mkdir()
    for images, output in (
        ("one.png", "a.ckpt"),
        ("one.png", "one.png"),
        ("list.txt", "list.txt"),
        ("list.txt", "one.png"),
    ):
        before = (tmp_path / output).read_bytes()
        with pytest.raises(ValueError, match="`output` to be another file than those that are read"):
            predict(tmp_path / "a.ckpt", tmp_path / images, tmp_path / output)
        assert (tmp_path / output).read_bytes() == before
    with pytest.raises(ValueError, match="`output` to be a file, but got the folder"):
        predict(tmp_path / "a.ckpt", tmp_path / "one.png", tmp_path / "folder.csv")
    predict(tmp_path / "a.ckpt", tmp_path / "one.png")
    first = (tmp_path / "predictions.csv").read_bytes()
    predict(tmp_path / "a.ckpt", made / "new")
    assert (tmp_path / "earlier" / "predictions-1.csv").read_bytes() == first


def test_a_folder_that_is_no_class_is_said(made, tmp_path, capsys):
    for folder in ("ant", "Bee"):
        picture(tmp_path / folder / "0.png", 1)
    assert find_pictures(tmp_path, NAMES).labels is None
    assert "because 'Bee' is no class. Did you mean 'bee'?" in capsys.readouterr().err.replace("Bee is", "'Bee' is")
