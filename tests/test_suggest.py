"""What is suggested for long-tailed data, and the file that `compare` runs."""

import math
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import STRICT, planned_runs
from PIL import Image

import lightning_ssesam.data
from lightning_ssesam import ClassSplit, Staged
from lightning_ssesam.cli import main
from lightning_ssesam.data import ImageListLT
from lightning_ssesam.errors import ArgumentError
from lightning_ssesam.suggest import suggest

pytestmark = STRICT

CIFAR_100_LT = [int(500 * 100 ** (-k / 99)) for k in range(100)]
CIFAR_10_LT = [int(5000 * 100 ** (-k / 9)) for k in range(10)]
POWERS = {"SquareRootSampler": 0.5, "ClassBalancedSampler": 0.0, None: 1.0}


@pytest.fixture(autouse=True)
def _own_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning-ssesam"])


def without_tail(counts, tail, images, sampler):
    """The share of updates of so many draws that have no tail image, and their number on average."""
    drawn = np.array(counts, dtype=float) ** POWERS[sampler]
    share = drawn[np.array(tail)].sum() / drawn.sum()
    return (1 - share) ** images, images * share


# Rules.


@pytest.mark.parametrize(
    ("counts", "tail"),
    [
        (CIFAR_100_LT, {"tail_below": 100}),
        # The 2 classes below 100 have 1 % of the images.
        (CIFAR_10_LT, {"tail_fraction": 0.2}),
        # All classes, and no class, are below 100.
        ([60, 20, 10, 3], {"tail_fraction": 0.2}),
        ([5000, 900, 300], {"tail_fraction": 0.2}),
        # More than half of the images are of classes below 100, as in iNaturalist 2018.
        ([900, *[50] * 8000], {"tail_fraction": 0.2}),
        ([3_000_000, 200, 50], {"tail_fraction": 0.2}),
        ([99, 100], {"tail_below": 100}),
        ([70, 30], {"tail_below": 31}),
        ([9, 8, 7], {"tail_below": 8}),
        ([50, 50], {"tail_fraction": 0.5}),
        ([50, 50, 50], {"tail_fraction": 0.34}),
        ([1, 1], {"tail_fraction": 0.5}),
        ([7] * 12, {"tail_fraction": 0.2}),
        ([2, 1], {"tail_below": 2}),
    ],
)
def test_tail(counts, tail):
    suggestion = suggest(counts)
    assert suggestion.tail == tail
    split = ClassSplit.from_counts(counts, **tail)
    assert 0 < int(split.tail.sum()) < len(counts)
    ((name, value),) = tail.items()
    share = sum(n for n, is_tail in zip(counts, split.tail.tolist(), strict=True) if is_tail) / sum(counts)
    line = suggestion.lines[1]
    assert f"({name}: {value})" in line
    assert f"{int(split.tail.sum()):,} of {len(counts):,} classes, {100 * share:.2g} % of the images" in line


@pytest.mark.parametrize(
    ("counts", "side", "batches", "sampler"),
    [
        (CIFAR_100_LT, 32, (64, 1), None),
        # Enough by larger batches, and by several for an update. Photos do not fit the memory in such batches.
        ([2000, 100, 10], 32, (128, 1), None),
        ([2000, 100, 10], 300, (64, 2), None),
        ([50_000, 800], 32, (256, 2), None),
        # Too rare for those.
        ([100_000, 40], 32, (256, 1), "SquareRootSampler"),
        ([3_000_000, 200, 50], 32, (256, 2), "SquareRootSampler"),
        ([3_000_000, 3, 2], 32, (64, 1), "ClassBalancedSampler"),
        ([990, 3, 2, 1], 32, (64, 1), "SquareRootSampler"),
        # Few images: two updates in an epoch or more.
        ([42, 17, 6, 2], 32, (32, 1), None),
        ([3, 1], 32, (8, 1), "SquareRootSampler"),
        ([1, 1], 32, (8, 1), None),
    ],
)
def test_batches_and_sampler(counts, side, batches, sampler):
    suggestion = suggest(counts, image_side=side, gpu=True)
    assert (suggestion.batch_size, suggestion.accumulated) == batches
    assert suggestion.sampler == sampler
    images, tail = math.prod(batches), ClassSplit.from_counts(counts, **suggestion.tail).tail.tolist()
    missing, mean = without_tail(counts, tail, images, sampler)
    assert missing <= 0.05
    if sum(counts) > 100:
        assert missing <= 0.01
    assert f"has {mean:.2g} tail images on average" in suggestion.lines[2]
    if sampler is not None:
        # Without it, and in batches as large as may be, too many updates have no tail image.
        largest = min(1024, 2 ** int(math.log2(max(8, sum(counts) // 2))))
        assert without_tail(counts, tail, largest, None)[0] > 0.05
        assert f"({without_tail(counts, tail, images, None)[1]:.1g} without the sampler)" in suggestion.lines[2]
    assert suggestion.config().get("trainer") == (None if batches[1] == 1 else {"accumulate_grad_batches": batches[1]})


def test_methods_with_and_without_a_sampler():
    plain, drawn = suggest(CIFAR_100_LT), suggest([100_000, 40])
    assert list(plain.methods) == ["ERM", "ERM + logit adjustment", "late SAM + logit adjustment", "ImbSAM", "SSE-SAM"]
    assert list(drawn.methods)[:3] == list(plain.methods)[:3]
    assert list(drawn.methods)[3:] == [f"{name} + square-root sampler" for name in ("ERM", "ImbSAM", "SSE-SAM")]
    for name, method in drawn.methods.items():
        # A loss and a sampler would make up for the sizes twice.
        assert ("loss" in method) == ("logit adjustment" in name)
        assert method.get("sampler") == ("lightning_ssesam.data.SquareRootSampler" if "sampler" in name else None)
    assert (plain.loss, plain.sampler) == ("lightning_ssesam.losses.LogitAdjustedLoss", None)


@pytest.mark.parametrize("counts", [[50, 50, 50], [100, 51], [12, 10, 11], [7] * 200])
def test_balanced_classes(counts):
    suggestion = suggest(counts)
    assert suggestion.is_balanced
    assert (suggestion.loss, suggestion.sampler, list(suggestion.methods)) == (None, None, ["ERM", "late SAM"])
    assert "not needed" in " ".join(suggestion.lines)
    assert not any(line.startswith(("Loss", "Sampler")) for line in suggestion.lines)


def test_factors_around_the_bounds():
    assert not suggest([100, 50]).is_balanced
    assert "expect small gains" in suggest([100, 50, 11]).lines[0]
    assert "expect small gains" not in suggest([100, 50, 10]).lines[0]
    assert "small gains" not in suggest([100, 51]).lines[0]


NETWORKS = [
    # A GPU, the side, whether it may change; the size and the network.
    (False, 300, True, 32, ("CIFARResNet", {"depth": 8})),
    (False, 24, True, 24, ("CIFARResNet", {"depth": 8})),
    (False, 8, True, 8, ("SmallConvNet", None)),
    (False, 224, False, None, ("TorchvisionResNet", {"arch": "resnet18", "stem": "imagenet"})),
    (True, 32, True, 32, ("CIFARResNet", {"depth": 32})),
    (True, 90, True, 64, ("CIFARResNet", {"depth": 32})),
    (True, 640, True, 224, ("TorchvisionResNet", {"arch": "resnet50", "stem": "imagenet"})),
    (True, 96, False, None, ("TorchvisionResNet", {"arch": "resnet50", "stem": "imagenet"})),
]


@pytest.mark.parametrize(("gpu", "side", "may_resize", "size", "network"), NETWORKS)
def test_network_and_size(gpu, side, may_resize, size, network):
    suggestion = suggest(CIFAR_100_LT, image_side=side, gpu=gpu, may_resize=may_resize)
    assert suggestion.image_size == size
    backbone = suggestion.backbone
    assert (backbone["class_path"].rpartition(".")[2], backbone.get("init_args")) == network
    (line,) = [line for line in suggestion.lines if line.startswith("Network")]
    assert f"{size or side}x{size or side} pixels" in line
    assert ("without a GPU" in line) == (not gpu and side > 64)


def test_pretrained_weights_are_for_colours():
    lines = {channels: suggest([90, 9], image_side=300, in_channels=channels, gpu=True).lines for channels in (3, 12)}
    assert "Pretrained" in " ".join(lines[3])
    assert "Pretrained" not in " ".join(lines[12])


def test_images_of_an_unknown_size_have_no_network():
    suggestion = suggest([90, 9])
    assert (suggestion.backbone, suggestion.image_size) == (None, None)
    assert "backbone" not in suggestion.config()


def test_length():
    assert suggest([100_000, 1000]).epochs == 90
    assert suggest([90_000, 1000]).epochs == suggest([90_000, 1000]).config()["epochs"] == 200


def test_classes_with_few_images():
    names = ["cat", "dog", "owl", "yak", "emu"]
    tested = suggest([300, 30, 7, 2, 1], names, test_counts=[80, 9, 2, 1, 0]).lines[-1]
    assert "4 classes have fewer than 10 test images: 'emu' (0), 'yak' (1), 'owl' (2) and more." in tested
    unknown = suggest([300, 30, 7, 10, 10], names).lines[-1]
    assert "1 class has fewer than 10 training images: 'owl' (7)." in unknown
    assert not any("Too few" in line for line in suggest([300, 30, 10]).lines)


@pytest.mark.parametrize(
    ("counts", "sides"),
    [
        (CIFAR_100_LT, 500),
        ([70, 30], 20),
        ([3_000_000, 200, 5], 500),
        ([max(1, 9000 // (k + 1)) for k in range(8142)], 9),
    ],
)
def test_ten_lines(counts, sides):
    for gpu in (False, True):
        lines = suggest(counts, image_side=sides, gpu=gpu, test_counts=[5] * len(counts)).lines
        assert len(lines) <= 10
        assert max(map(len, lines)) <= 160


def test_pages_that_lines_cite():
    """Every page that a line rests on is there, and has what the line says."""
    docs = Path(__file__).parent.parent / "docs"
    lines = " ".join(suggest([400, 40, 4], image_side=300).lines)
    cited = {page.partition(")")[0] for page in lines.split("(docs/")[1:]}
    assert cited == {"choosing.md", "results.md", "family.md", "photos.md"}
    assert "Logit adjustment gives 6 points" in (docs / "results.md").read_text()
    assert "late SAM 0.2" in (docs / "family.md").read_text()
    assert "Start from a pretrained network" in (docs / "photos.md").read_text()
    assert "less than one in a hundred" in (docs / "choosing.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_counts": [5]}, "`class_counts` to be counts of two classes or more, but got that of a single class"),
        ({"class_counts": []}, "`class_counts` to be a non-empty vector"),
        ({"class_counts": [5, 0]}, "`class_counts` to be integers >= 1 for every class, but got 0 for class 1"),
        ({"class_counts": [5, 2], "class_names": ["a"]}, "`class_names` to be 2 different names"),
        ({"class_counts": [5, 2], "test_counts": [1]}, "`test_counts` to be 2 integers >= 0"),
        ({"class_counts": [5, 2], "image_side": 0}, "`image_side` to be an integer >= 1, but got 0"),
        ({"class_counts": [5, 2], "gpu": "yes"}, "`gpu` to be True or False, but got 'yes'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        suggest(**arguments)


# The command.


def make_images(counts, side=40, folder="images"):
    generator = np.random.default_rng(0)
    for number, (name, count) in enumerate(counts.items()):
        Path(folder, name).mkdir(parents=True)
        for k in range(count):
            pixels = generator.integers(40 * number, 40 * number + 80, (side + k % 3, side + 5, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(f"{folder}/{name}/{k} of.png")


ANIMALS = {"cat": 30, "dog": 12, "owl": 5, "yak": 1}


def content(path="suggestion.yaml"):
    return yaml.safe_load(Path(path).read_text())


def made(path="suggestion.yaml"):
    """The data module of the file."""
    given = content(path)["data"]
    return getattr(lightning_ssesam.data, given["class_path"])(**given["init_args"])


def plan(monkeypatch, path="suggestion.yaml"):
    """The experiments that the file makes, one for each method."""
    return [task.experiment for task in planned_runs(monkeypatch, ["--config", path, "--seeds=1"])]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_folder_is_compared_as_it_is(capsys, monkeypatch):
    make_images(ANIMALS)
    main(["suggest", "images", "--gpu=false"])
    printed = capsys.readouterr().out
    # As the folder is divided: a fifth tests, a tenth validates, and one yak stays.
    assert "34 training images of 4 classes, from 21 of 'cat' to 1 of 'yak'" in printed
    assert "fewer than 10 test images: 'yak' (0), 'owl' (1), 'dog' (2) and more." in printed
    assert "Compare with: lightning-ssesam compare --config suggestion.yaml" in printed
    given = content()
    assert given["data"] == {
        "class_path": "ImageFolderLT",
        "init_args": {"root": "images", "batch_size": 16, "image_size": 32},
    }
    for line in printed.split("\n\n")[0].splitlines():
        assert f"# {line}" in Path("suggestion.yaml").read_text()
    late = next(each for each in plan(monkeypatch) if each.method == "late SAM + logit adjustment")
    objective = late.objective()
    assert isinstance(objective, Staged)
    assert [type(part).__name__ for part in objective.objectives] == ["ERM", "SAM"]
    assert late.model_arguments["tail_fraction"] == 0.2


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_file_trains(capsys, monkeypatch):
    """One epoch of every method."""
    make_images(ANIMALS, side=12)
    monkeypatch.setattr("lightning_ssesam.experiments.report.FIGURES", ())
    main(["suggest", "images"])
    methods = content()["methods"]
    short = ["--epochs=1", "--seeds=1", "--jobs=1", "--trainer.accelerator=cpu"]
    with warnings.catch_warnings():
        # Three updates are over before SAM begins.
        warnings.filterwarnings("ignore", message="The training ended at step")
        main(["compare", "--config=suggestion.yaml", *short])
    printed = capsys.readouterr().out
    assert all(f"\n{name}  " in printed for name in methods)
    assert Path("comparison/report.html").exists()


def test_nothing_is_overwritten(capsys):
    make_images(ANIMALS, side=12)
    main(["suggest", "images", "--output=new/mine.yaml"])
    first = Path("new/mine.yaml").read_text()
    main(["suggest", "images", "--output=new/mine.yaml"])
    assert not Path("new/earlier").exists()
    capsys.readouterr()
    make_images({"gnu": 9}, side=12)
    main(["suggest", "images", "--output=new/mine.yaml"])
    assert "The new/mine.yaml that was there is new/earlier/mine-1.yaml now." in capsys.readouterr().out
    assert Path("new/earlier/mine-1.yaml").read_text() == first != Path("new/mine.yaml").read_text()


def write_list(path, samples):
    Path(path).write_text("".join(f"{place} {label}\n" for place, label in samples))


def samples_of(counts, folder="images"):
    return [(f"{folder}/{name}/{k} of.png", label) for label, name in enumerate(counts) for k in range(counts[name])]


@pytest.mark.parametrize("root", [".", "..", "absolute"])
def test_a_list_without_test_images_is_divided(root, tmp_path, monkeypatch, capsys):
    make_images(ANIMALS)
    monkeypatch.chdir(tmp_path)
    prefix = {".": "", "..": f"{tmp_path.name}/", "absolute": f"{tmp_path}/"}[root]
    samples = samples_of(ANIMALS, f"{prefix}images")
    write_list("all.txt", samples)
    options = [] if root == "absolute" else [f"--root={root}"]
    main(["suggest", "all.txt", *options])
    assert "34 training images of 4 classes, from 21 of class 0 to 1 of class 3" in capsys.readouterr().out
    assert content()["data"]["class_path"] == "ImageListLT"
    written = {name: Path(f"suggestion_{name}.txt").read_text().splitlines() for name in ("train", "val", "test")}
    assert {name: len(lines) for name, lines in written.items()} == {"train": 34, "val": 5, "test": 9}
    # Every image is in one of them.
    assert sorted(line for lines in written.values() for line in lines) == sorted(f"{p} {k}" for p, k in samples)
    data = made()
    assert isinstance(data, ImageListLT)
    assert data.class_counts == [21, 9, 3, 1]
    data.prepare_data()


def test_lists_of_sets():
    animals = {**ANIMALS, "yak": 2}
    make_images(animals)
    samples = samples_of(animals)
    for name, part in {"train": samples[::2], "val": samples[1:20:2], "test": samples[21::2]}.items():
        write_list(f"pets_{name}.txt", part)
    main(["suggest", "pets_train.txt"])
    arguments = content()["data"]["init_args"]
    assert (arguments["train"], arguments["val"], arguments["test"]) == tuple(
        f"pets_{name}.txt" for name in ("train", "val", "test")
    )
    assert not Path("suggestion_train.txt").exists()
    main(["suggest", "pets_train.txt", "--test=pets_val.txt", "--output=other.yaml"])
    assert content("other.yaml")["data"]["init_args"]["test"] == "pets_val.txt"
    assert made().class_counts == [15, 6, 3, 1]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_table_of_files_and_labels(delimiter, capsys):
    make_images(ANIMALS)
    names = list(ANIMALS)
    rows = [delimiter.join((place, names[label], "x")) for place, label in samples_of(ANIMALS)]
    Path("tables").mkdir()
    Path("tables/pets.csv").write_text("\n".join([delimiter.join(("Path", "label", "other")), *rows]))
    main(["suggest", "tables/pets.csv", "--root=."])
    assert "from 21 of 'cat' to 1 of 'yak'" in capsys.readouterr().out
    data = made()
    assert (list(data.class_names), data.class_counts) == (names, [21, 9, 3, 1])


def test_a_table_with_sets(capsys):
    make_images(ANIMALS)
    sets = ["train", "test", "val"]
    rows = [f"{place},{5 * label},{sets[k % 3]}" for k, (place, label) in enumerate(samples_of(ANIMALS))]
    Path("pets.csv").write_text("\n".join(["file,species,split", *rows, f"{samples_of(ANIMALS)[-1][0]},15,train"]))
    main(["suggest", "pets.csv", "--label=species"])
    assert "from 10 of '0' to 1 of '15'" in capsys.readouterr().out
    assert content()["data"]["init_args"]["class_names"] == ["0", "5", "10", "15"]
    assert len(Path("suggestion_test.txt").read_text().splitlines()) == 16


def test_labels_alone(capsys):
    Path("labels.csv").write_text("\n".join(["id,target", *(f"{k},{k % 7 // 6}" for k in range(700))]))
    main(["suggest", "labels.csv"])
    printed = capsys.readouterr().out
    assert "from 600 of '0' to 100 of '1'" in printed
    assert "No YAML file is written" in printed
    assert not Path("suggestion.yaml").exists()


@pytest.mark.parametrize(
    ("header", "options"), [("file,flash,class", []), ("file,day,kind", ["--label=kind"]), ("file,kind", [])]
)
def test_classes_may_be_called_0_and_1(header, options, capsys):
    """One column is the label's: by its name, by the option, or as there is no other."""
    make_images({"cat": 12})
    number = header.count(",")
    rows = [
        ",".join([place, *["1"] * (number - 1), str(int(k < 4))])
        for k, (place, _) in enumerate(samples_of({"cat": 12}))
    ]
    Path("table.csv").write_text("\n".join([header, *rows]))
    main(["suggest", "table.csv", *options])
    printed = capsys.readouterr().out
    assert "of '0' to" in printed
    assert "of '1'" in printed


@pytest.mark.parametrize("data", ["DigitsLT", "digits_lt", "mine.yaml", "fit.yaml"])
def test_data_modules(data, monkeypatch, capsys):
    arguments = {"class_path": "DigitsLT", "init_args": {"imbalance_factor": 20}}
    network = {"class_path": "SmallConvNet", "init_args": {"width": 8}}
    Path("mine.yaml").write_text(yaml.safe_dump({"data": arguments, "epochs": 7}))
    Path("fit.yaml").write_text(yaml.safe_dump({"data": arguments, "model": {"backbone": network}}))
    main(["suggest", data])
    factor = 50 if data in ("DigitsLT", "digits_lt") else 20
    assert f"imbalance factor {factor}." in capsys.readouterr().out
    given = content()
    assert given["data"]["init_args"].get("imbalance_factor", 50) == factor
    assert given["backbone"]["class_path"].rpartition(".")[2] == "SmallConvNet"
    assert given["backbone"].get("init_args") == ({"width": 8} if data == "fit.yaml" else None)
    assert given["data"]["init_args"]["batch_size"] == 64
    if data == "fit.yaml":
        first = plan(monkeypatch)[0]
        assert (first.data().batch_size, first.data().class_counts[-1]) == (64, 5)


MODULE = """
import torch
from lightning_ssesam.data import LongTailDataModule
class Satellite(LongTailDataModule):
    in_channels, image_size = 12, 48
    def __init__(self, imbalance: float = 3):
        super().__init__(batch_size=4)
        self.class_counts = [90, int(90 / imbalance)]
    def make_sets(self):
        sizes = [(90, 30), (20, 9), (20, 9)]
        labels = [torch.tensor([0] * first + [1] * second) for first, second in sizes]
        made = [torch.utils.data.TensorDataset(torch.randn(len(k), 12, 48, 48), k) for k in labels]
        return dict(zip(("train", "val", "test"), made))
"""


def test_a_module_of_ones_own(monkeypatch, capsys):
    Path("sky_of_mine.py").write_text(MODULE)
    main(["suggest", "sky_of_mine.Satellite", "--gpu=true"])
    printed = capsys.readouterr().out
    assert "90 of class 0 to 30 of class 1" in printed
    assert "Pretrained" not in printed
    # It has no argument for the size of batches.
    assert content()["data"] == {"class_path": "sky_of_mine.Satellite", "init_args": {}}
    first = plan(monkeypatch)[0]
    model = first.make_model(first.data())
    assert model(torch.randn(2, 12, 48, 48)).shape == (2, 2)
    sys.modules.pop("sky_of_mine", None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nothing"], "Expected argument `data` to be a folder .* or a YAML file, but got 'nothing'."),
        (["DigitLT"], "but got 'DigitLT'. Did you mean 'DigitsLT'?"),
        (["images.yml"], "but got 'images.yml'."),
        (["labelled_twice.Both"], "a data set with one label for each image, but got Both, whose images have several"),
        (["torch.nn.Linear"], "Linear does not correspond to a subclass of LongTailDataModule"),
        (
            ["single"],
            "Expected argument `data` to be a data set of two classes or more, but got .* single class ('cat')",
        ),
        (["empty"], "Expected argument `root` to be"),
        (["empty.csv"], "a CSV file with a line of column names and a line for each image"),
        (["two.csv"], "two.csv, line 3: Expected one label in 'label', but got 'cat|dog'."),
        (["semicolon.csv"], "semicolon.csv, line 2: Expected one label in 'labels', but got 'cat;big'."),
        (
            ["columns.csv"],
            "columns.csv: Expected one column of labels, but got 2 columns of 0 and 1, such as 'cat' and 'dog'. .* "
            "`ImageTableLT` trains on several labels for an image. If one column has the classes, give `--label`.",
        ),
        (
            ["sets.csv"],
            "sets.csv: Expected one column of labels, but got 3 columns of 0 and 1, such as 'cat' and 'dog'.",
        ),
        (
            ["no_files.csv"],
            "no_files.csv: Expected one column of labels, but got 2 columns of 0 and 1, such as 'cat' and 'dog'.",
        ),
        (["wide.csv"], "but got 300 columns of 0 and 1, such as 'c0' and 'c1'. .* give `--label`."),
        (["none.csv"], "none.csv, line 2: Expected one label in 'label', but got ''."),
        (["two.csv", "--label=lable"], "Did you mean 'label'?"),
        (["away.csv"], "No image can be read, such as 'x.jpg'"),
        (["away.txt"], "No image can be read, such as './x.jpg' in '.'. Give the folder"),
        (
            ["gap.txt"],
            "gap.txt: Expected an image of every class in [0, 3), but got none of 1 of them, such as class 1.",
        ),
        (["empty.yaml"], "empty.yaml' without `data`"),
        (["DigitsLT", "--output=."], "Expected argument `output` to be a file, but got the folder '.'."),
        (["DigitsLT", "--gpu=perhaps"], "Expected `--gpu` to be"),
        ([], "data"),
    ],
)
def test_wrong_input_takes_one_line(options, message, capsys):
    make_images({"cat": 20}, side=8, folder="single")
    Path("empty").mkdir()
    Path("empty.yaml").write_text("epochs: 3\n")
    Path("empty.csv").write_text("file,label\n")
    Path("two.csv").write_text("file,label\nx.jpg,cat\nx.jpg,cat|dog\n")
    Path("semicolon.csv").write_text("file,labels\nx.jpg,cat;big\nx.jpg,cat\n")
    Path("columns.csv").write_text("file,cat,dog\nx.jpg,1,\ny.jpg,0,1\n")
    Path("sets.csv").write_text("image,cat,dog,big,split\nx.jpg,1.0,0.0,1.0,train\ny.jpg,True, ,False,test\n")
    Path("no_files.csv").write_text("cat,dog\n1,0\n0,1\n")
    wide = [",".join(["file", *(f"c{k}" for k in range(300))]), *(",".join(["x.jpg", *["1"] * 300]) for _ in "ab")]
    Path("wide.csv").write_text("\n".join(wide))
    Path("none.csv").write_text("file,label\nx.jpg,\n")
    Path("away.csv").write_text("file,label\nx.jpg,cat\ny.jpg,dog\n")
    Path("away.txt").write_text("x.jpg 0\ny.jpg 1\n")
    Path("gap.txt").write_text("x.jpg 0\ny.jpg 2\n")
    Path("labelled_twice.py").write_text(
        "from lightning_ssesam import DigitsLT\nclass Both(DigitsLT): multi_label = True\n"
    )
    with pytest.raises(SystemExit) as stop:
        main(["suggest", *options])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    parts = message.split(" .* ")
    assert all(part in error for part in parts), error
    assert not list(Path().glob("suggestion*"))
