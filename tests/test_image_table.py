"""Images with several labels each, named in a CSV file."""

import os
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch
import yaml
from helpers import STRICT, trainer
from PIL import Image

from lightning_ssesam import SSESAM, LongTailClassifier
from lightning_ssesam.cli import main
from lightning_ssesam.data import ClassBalancedSampler, ImageTableLT
from lightning_ssesam.data.label_table import Columns, read_table
from lightning_ssesam.models import SmallConvNet

pytestmark = STRICT

ROWS = [
    ("a.png", "cat|dog", "train"),
    ("b.png", "cat", "train"),
    ("sub/c d.png", "", "train"),
    ("d.png", "owl; cat", "train"),
    ("e.png", "dog", "val"),
    ("f.png", "cat|owl", "test"),
]
ANSWERS = [[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 0, 1], [0, 1, 0], [1, 0, 1]]


def write(text, name="table.csv", encoding="utf-8"):
    Path(name).write_bytes(text.encode(encoding))
    return name


def table_of(rows=ROWS, header="file,labels,split", mark=","):
    return write("\n".join([header.replace(",", mark), *(mark.join(row) for row in rows)]) + "\n")


def make_images(files, size=(9, 8)):
    for number, file in enumerate(files):
        Path(file).parent.mkdir(exist_ok=True)
        Image.new("RGB", size, (10 * number, 0, 255)).save(file)


@pytest.fixture
def images():
    make_images([file for file, *_ in ROWS])


# The table.


@pytest.mark.parametrize("mark", [",", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\n\n"])
def test_column_of_names(mark, encoding, end):
    text = end.join(["file,labels,split".replace(",", mark), *(mark.join(row) for row in ROWS), mark * 2])
    table = read_table(write(text, encoding=encoding), Columns())
    assert table.class_names == ["cat", "dog", "owl"]
    assert table.files == [file for file, *_ in ROWS]
    assert table.answers.tolist() == ANSWERS
    assert table.sets == ["train"] * 4 + ["val", "test"]
    if end == "\n":
        assert table.lines == [2, 3, 4, 5, 6, 7]


def test_columns_of_0_and_1_with_missing_labels():
    text = "path;cat;dog;site\na.png;1;0;x\nb.png;;1.0;y\nc.png;True;0.0;z\n"
    table = read_table(write(text), Columns(files="path", labels=["dog", "cat"]))
    assert table.class_names == ["dog", "cat"]
    assert table.answers.tolist() == [[0, 1], [1, -100], [0, 1]]
    assert table.sets is None
    # Without a column `labels`, all others are labels.
    every = read_table(write("file,split,cat,dog\na.png,Training,1,0\nb.png,valid,0,1\n"), Columns(), ["Cat", "Dog"])
    assert every.class_names == ["Cat", "Dog"]
    assert (every.answers.tolist(), every.sets) == ([[1, 0], [0, 1]], ["train", "val"])


def test_quoted_cells_and_other_separators():
    table = read_table(write('file,tags\n"a,1.png","cat, dog"\nb.png,owl\n'), Columns(labels="tags", separator=","))
    assert table.files == ["a,1.png", "b.png"]
    assert table.class_names == ["cat", "dog", "owl"]
    assert table.answers.tolist() == [[1, 1, 0], [0, 0, 1]]
    # A name may have a comma, if the separator is another one.
    names = read_table(write('file,labels\na.png,"mass, left/nodule"\n'), Columns(separator="/")).class_names
    assert names == ["mass, left", "nodule"]
    # With given names, a label need not be one of a training image.
    rows = [("a.png", "cat", "train"), ("b.png", "owl", "test")]
    assert read_table(table_of(rows), Columns(), ["owl", "cat"]).answers.tolist() == [[0, 1], [1, 0]]


BAD_TABLES = {
    "no column of files": (
        "image,labels\na,b\n",
        {},
        "table.csv: Expected a column 'file' .*, but got 'image', 'labels'",
    ),
    "empty": ("", {}, "table.csv: Expected a column 'file' .*, but got an empty file"),
    "no rows": ("file,labels\n", {}, "table.csv: Expected a row for each image, but got none"),
    "no labels": ("file\na.png\n", {}, "a column 'labels', or one of 0 and 1 for each label, but got no other column"),
    "repeated column": ("file,cat,cat\na,1,0\n", {}, "columns with different names, but got 'cat' more than once"),
    "too few cells": ("file,labels\na.png,cat\nb.png\n", {}, "table.csv, line 3: Expected 2 cells, .*, but got 1"),
    "too many cells": ("file;labels\na.png;cat;dog\n", {}, "table.csv, line 2: Expected 2 cells, .*, but got 3"),
    "no name of a file": ("file,labels\n,cat\n", {}, "line 2: Expected the name of a file, but got an empty cell"),
    "other separator": (
        'file,labels\na,"cat,dog"\n',
        {},
        "line 2: .* with | or ; between them, but got 'cat,dog'; see",
    ),
    "other answer": ("file,cat,age\na,1,57\n", {}, "line 2: Expected 0, 1 or nothing .* 'age', but got '57'; `labels`"),
    "twice": (
        "file,labels\na.png,x\n./a.png,x\n",
        {},
        r"line 3: Expected each image once, but got './a.png' .* line 2",
    ),
    "other set": ("file,labels,split\na,x,dev\n", {}, "line 2: Expected one of the sets 'train', .*, but got 'dev'"),
    "wrong labels": (
        "file,labels\na,x\n",
        {"labels": "tags"},
        r"`labels` to be a column of table.csv \('file', 'labels'",
    ),
    "wrong list": ("file,cat\na,1\n", {"labels": ["cat", "dog"]}, "`labels` to be a column of .*, but got 'dog'"),
    "files as labels": (
        "file,cat\na,1\n",
        {"labels": ["file"]},
        "`labels` to be a column of label names, or different",
    ),
    "wrong split": ("file,labels\na,x\n", {"split": "fold"}, "`split` to be a column of .*, but got 'fold'"),
    "no label": ("file,labels\na.png,\n", {}, "a label of a training image in the column 'labels', but got none"),
    "open quote": (
        'file,labels\n"a.png,x\n',
        {},
        "table.csv: Expected a table in CSV format and UTF-8, but got an error",
    ),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_bad_tables(name):
    text, options, message = BAD_TABLES[name]
    with pytest.raises(ValueError, match=message):
        read_table(write(text), Columns(**options))


def test_other_bad_tables():
    with pytest.raises(
        ValueError, match=r"table.csv: Expected a table in CSV format and UTF-8, but got an error: No such"
    ):
        read_table("table.csv", Columns())
    with pytest.raises(ValueError, match="but got an error: 'utf-8' codec can't decode"):
        read_table(write("file,labels\na.png,Vögel\n", encoding="latin-1"), Columns())
    typo = table_of([*ROWS, ("g.png", "cat|doog", "test")])
    message = (
        r"table.csv, line 8: Expected a label of a training image, but got 'doog' \(did you mean 'dog'\?\); if it is"
    )
    with pytest.raises(ValueError, match=message):
        read_table(typo, Columns())
    with pytest.raises(ValueError, match="line 2: Expected one of `class_names`, but got 'dog'"):
        read_table(table_of(), Columns(), ["cat", "owl"])
    with pytest.raises(ValueError, match="`class_names` to be 2 different names"):
        read_table(table_of(), Columns(), ["cat", "cat"])
    with pytest.raises(ValueError, match=r"`class_names` to be 2 different names, .*, but got 3 names"):
        read_table(write("file,cat,dog\na,1,0\n"), Columns(), ["a", "b", "c"])


# The data module.


@pytest.mark.usefixtures("images")
def test_sets_of_the_table():
    # File names are relative to the table, not to the working folder.
    table = os.path.abspath(table_of())
    os.mkdir("elsewhere")
    os.chdir("elsewhere")
    data = ImageTableLT(table, batch_size=3, num_workers=0)
    assert (data.class_names, data.class_counts, data.num_samples) == (["cat", "dog", "owl"], [3, 1, 1], 4)
    assert (data.multi_label, data.val_is_test, data.image_size, data.in_channels) == (True, False, 8, 3)
    split = data.split(tail_below=2)
    assert (split.multi_label, split.num_samples, split.tail.tolist()) == (True, 4, [False, True, True])
    data.prepare_data()
    data.setup("fit")
    assert [len(data._sets[name]) for name in ("train", "val", "test")] == [4, 1, 1]
    ((pixels, answers),) = data.test_dataloader()
    assert (pixels.shape, answers.dtype, answers.tolist()) == ((1, 3, 8, 8), torch.int64, [[1, 0, 1]])
    # The image is the sixth one: its red is 50.
    assert pixels[0, 0, 0, 0].item() == pytest.approx((50 / 255 - 0.485) / 0.229, abs=1e-5)
    inputs, answers = next(iter(data.train_dataloader()))
    assert (inputs.shape, answers.shape) == ((3, 3, 8, 8), (3, 3))


def many_rows(number=200):
    torch.manual_seed(1)
    answers = torch.rand(number, 4) < torch.tensor([0.6, 0.3, 0.1, 0.03])
    return [(f"{k}.png", "|".join(f"c{c}" for c in range(4) if answers[k, c])) for k in range(number)], answers


def test_drawn_sets_have_each_label_in_about_the_same_share():
    rows, answers = many_rows()
    table = table_of(rows, "file,labels")
    make_images(["0.png"])
    data = ImageTableLT(table, image_size=8, seed=3)
    members = data._members
    assert sorted(chain(*members.values())) == list(range(200))
    counts = answers.sum(0)
    for name, fraction in {"test": 0.2, "val": 0.1}.items():
        difference = answers[members[name]].sum(0) - fraction * counts
        assert bool((difference.abs() <= torch.maximum(0.08 * counts, torch.ones(4))).all())
    assert data.class_counts == answers[members["train"]].sum(0).tolist()
    assert data.division == "drawn from the images of each label, with seed 3: test 20 %, val 10 %"
    assert ImageTableLT(table, image_size=8, seed=3)._members == members
    assert ImageTableLT(table, image_size=8, seed=4)._members != members
    alone = ImageTableLT(table, image_size=8, val_fraction=0)
    assert (alone.val_is_test, sorted(alone._members)) == (True, ["test", "train"])


def test_a_label_of_a_single_image_trains():
    few = [("a.png", "cat"), ("b.png", "owl"), ("c.png", "cat"), ("d.png", "cat"), ("e.png", "cat")]
    data = ImageTableLT(table_of(few, "file,labels"), image_size=8, test_fraction=0.6, val_fraction=0.3)
    assert data.class_counts == [1, 1]
    rows = [*((f"{k}.png", "cat") for k in range(10)), ("x.png", "cat|owl")]
    for seed in range(5):
        data = ImageTableLT(table_of(rows, "file,labels"), image_size=8, seed=seed)
        assert data.class_counts[1] == 1
        assert {name: len(members) for name, members in data._members.items()} == {"train": 8, "test": 2, "val": 1}


@pytest.mark.usefixtures("images")
def test_bad_files_are_named_with_their_lines_before_training():
    Path("b.png").unlink()
    Path("d.png").write_text("no picture")
    data = ImageTableLT(table_of(), image_size=8)
    message = (
        r"Expected 6 files .*, but got 2 .*: table.csv, line 3: b.png \(an error: No such file.*; table.csv, line 5: d"
    )
    with pytest.raises(ValueError, match=message):
        data.prepare_data()
    make_images(["d.png"])
    with pytest.raises(ValueError, match=r"table.csv, line 3: Expected b.png to be an image that can be read"):
        ImageTableLT(table_of(), image_size=8).prepare_data()
    images = ImageTableLT(table_of(), image_size=8).file_sets()["train"]
    with pytest.raises(ValueError, match=r"table.csv, line 3: Expected b.png to be an image"):
        images[1]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (ROWS, {"sampler": ClassBalancedSampler}, "`sampler` to be None for multi-label data"),
        (ROWS[:5], {}, "table.csv: Expected images of the set 'test', but got none"),
        ([("a.png", "cat", "test")], {"class_names": ["cat"]}, "Expected images of the set 'train', but got none"),
        ([("a", "", "train"), ("b", "x", "test")], {"class_names": ["x"]}, "training images with labels, but got none"),
        (ROWS, {"separator": ""}, "`separator` to be a text that is not empty"),
        (ROWS, {"test_fraction": 1.5}, "`test_fraction` to be a number strictly between 0 and 1"),
        (ROWS, {"val_fraction": -0.5}, "`val_fraction` to be a number in"),
        (ROWS, {"seed": -1}, "`seed` to be an integer >= 0"),
        (ROWS, {"image_size": 0}, "`image_size` to be an integer >= 1"),
    ],
)
def test_bad_arguments(rows, options, message):
    with pytest.raises(ValueError, match=message):
        ImageTableLT(table_of(rows), **options)


def test_fractions_that_leave_nothing():
    rows = [(f"{k}.png", "cat") for k in range(4)]
    with pytest.raises(ValueError, match=r"`test_fraction` to be less than 1 together with .*, but got 0.5 \+ 0.5"):
        ImageTableLT(table_of(rows, "file,labels"), test_fraction=0.5, val_fraction=0.5)
    with pytest.raises(ValueError, match="Expected an image for each set, but got 2 in all"):
        ImageTableLT(table_of(rows[:2], "file,labels"))


@pytest.mark.usefixtures("images")
def test_fingerprint_changes_with_table_and_images():
    before = ImageTableLT(table_of()).fingerprint()
    assert ImageTableLT(table_of()).fingerprint().split()[1] == before.split()[1]
    Image.new("RGB", (20, 20)).save("a.png")
    after = ImageTableLT("table.csv").fingerprint()
    assert after != before
    table_of([*ROWS[:-1], ("f.png", "cat", "test")])
    assert ImageTableLT("table.csv").fingerprint() != after


@pytest.mark.usefixtures("images")
def test_in_memory():
    data = ImageTableLT(table_of(), num_workers=0, in_memory=True, batch_size=4)
    data.setup("fit")
    ((_, expected),) = ImageTableLT("table.csv", num_workers=0).test_dataloader()
    ((inputs, answers),) = data.test_dataloader()
    assert torch.equal(answers, expected)
    plain, _ = next(iter(ImageTableLT("table.csv", num_workers=0).test_dataloader()))
    assert torch.equal(inputs, plain)
    inputs, answers = next(iter(data.train_dataloader()))
    assert (inputs.shape, answers.shape, answers.dtype) == ((4, 3, 8, 8), (4, 3), torch.int64)
    assert data._sets["train"][0][1].tolist() == [1, 1, 0]


@pytest.mark.usefixtures("images")
def test_classifier_takes_it():
    data = ImageTableLT(table_of(), num_workers=0)
    model = LongTailClassifier(
        data.class_counts,
        lambda num_classes: SmallConvNet(num_classes, in_channels=3, width=8),
        SSESAM(),
        tail_below=2,
        multi_label=True,
        num_samples=data.num_samples,
    )
    run = trainer()
    run.fit(model, datamodule=data)
    assert model.class_names == ["cat", "dog", "owl"]
    run.validate(model, datamodule=data, verbose=False)
    assert run.callback_metrics["val/map_all"] == 1


@pytest.mark.usefixtures("images")
def test_command_line(monkeypatch, capsys):
    table_of()
    options = [
        "--data",
        "ImageTableLT",
        "--data.table",
        "table.csv",
        "--data.num_workers",
        "0",
        "--data.batch_size",
        "1",
    ]
    options += ["--model.backbone", "SmallConvNet", "--model.backbone.width", "8", "--model.tail_below", "2"]
    options += ["--trainer.max_epochs", "2", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    loss = ["--model.loss", "lightning_ssesam.losses.DistributionBalancedLoss"]
    main(["fit", *options, *loss])
    (folder,) = Path("lightning_logs").glob("version_*")
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert not {"multi_label", "num_samples", "class_counts"} & saved["model"].keys()
    (checkpoint,) = folder.glob("checkpoints/*.ckpt")
    model = LongTailClassifier.load_from_checkpoint(checkpoint)
    assert (model.split.multi_label, model.split.num_samples, model.loss._total) == (True, 4, 4)
    assert (model.class_names, model.image_input.image_size) == (["cat", "dog", "owl"], 8)
    capsys.readouterr()
    for command in ("validate", "test"):
        main([command, "--config", str(folder / "config.yaml"), "--ckpt_path", str(checkpoint)])
    printed = capsys.readouterr().out
    assert "val/map_tail" in printed
    assert "test/map_few" in printed
    assert "acc_" not in printed
    monkeypatch.setattr("lightning_ssesam.experiments.adjust_command.classifier_outputs", lambda *_: 1 / 0)
    with pytest.raises(SystemExit):
        main(["adjust", str(checkpoint), "--device=cpu"])
    expected = (
        f"Corrections are for data with one class a sample, but the classifier in {str(checkpoint)!r} has several"
    )
    assert expected in capsys.readouterr().err
    for command in ("compare", "sweep"):
        monkeypatch.setattr(sys, "argv", ["lightning-ssesam"])
        with pytest.raises(SystemExit):
            main([command, "--data", "ImageTableLT", "--data.table", "table.csv"])
        assert "`data` to be a data module with one label a sample; `fit`, `validate`" in capsys.readouterr().err
    assert not Path("comparison").exists()
