"""Parts of a report: confused classes, the worst images, curves, reliability, costs, LaTeX, formats of pictures."""

import base64
import io
import math
import re
import struct
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import STRICT
from PIL import Image
from test_tables import SPLIT, comparison_of, rows_of, run_of, table_in
from torch.utils.data import DataLoader, TensorDataset

from lightning_ssesam import ERM, ClassSplit, DigitsLT
from lightning_ssesam.cli import main
from lightning_ssesam.compare import Method, compare
from lightning_ssesam.data import ImageFolderLT, ImageInput, LongTailDataModule
from lightning_ssesam.experiments.figures import FIGURES, draw_curves, draw_reliability
from lightning_ssesam.experiments.gallery import make_gallery, thumbnail
from lightning_ssesam.experiments.latex import escaped, latex_table
from lightning_ssesam.experiments.pairs import pair_rows
from lightning_ssesam.experiments.report import write_report
from lightning_ssesam.experiments.runs import Comparison
from lightning_ssesam.experiments.tables import format_table, markdown_table, top1, write_runs, write_summary
from lightning_ssesam.runs import GROUPS

pytestmark = STRICT


def with_images(method, seed=0, errors=(0.1, 0.3), pairs=(), mistakes=(), **kwargs):
    """A run that knows its calibration."""
    calibration = dict(zip(GROUPS, np.linspace(*errors, len(GROUPS)).tolist(), strict=True))
    kept = {"calibration": calibration, "confused_pairs": list(pairs), "tail_mistakes": list(mistakes)}
    return run_of(method, seed, **kept, **kwargs)


def pixels_of(source):
    return Image.open(io.BytesIO(base64.b64decode(source.partition("base64,")[2])))


class TestImagesCountTheSame:
    def test_top_1_of_unequal_classes(self):
        run = run_of(test=(100, 50, 7, 0))
        run.test_hits = ["1" * 90 + "0" * 10, "1" * 10 + "0" * 40, "1" * 3 + "0" * 4, ""]
        # As a run keeps them: float32.
        run.class_recalls = torch.tensor([90 / 100, 10 / 50, 3 / 7, math.nan]).tolist()
        assert top1(run) == (90 + 10 + 3) / 157
        assert math.isnan(top1(run_of(test_images=[])))
        assert math.isnan(top1(run_of(test=(0, 0, 0, 0))))

    @pytest.mark.usefixtures("no_pictures")
    def test_stand_in_every_output(self):
        runs = [
            with_images(name, seed, (0.1 + seed / 10, 0.3), right=0.8) for name in ("ERM", "SAM") for seed in (0, 1)
        ]
        runs[3].diverged = True
        texts = [format_table(runs), markdown_table(runs)]
        for text in texts:
            assert "top-1 accuracy, and expected calibration error (ECE) of each group, in %" in text
            assert re.search(r"SAM \(1 of 2 diverged\)[ |]+80.0 ± +0.0 †[ |]+15.0 ± +7.1 †.*[ |]+30.0 ± +0.0 †", text)
        assert texts[0].splitlines()[-5].split() == ["top-1", *(word for group in GROUPS for word in ("ECE", group))]
        write_runs(runs, Path("results.csv"))
        write_summary(runs, Path("summary.csv"))
        rows = rows_of("results.csv")
        assert [row["ece_head"] for row in rows] == ["0.1", "0.2"] * 2
        assert {row["top_1"] for row in rows} == {"0.8"}
        means = {(row["method"], row["group"]): row["ece_mean"] for row in rows_of("summary.csv")}
        assert (means["ERM", "head"], means["ERM", "all"]) == ("0.15", "0.3")
        page = write_report(comparison_of(runs), Path())[0].read_text()
        assert "<td>ERM</td><td>80.0 ± 0.0</td><td>15.0 ± 7.1</td>" in table_in(page, "images")
        assert "<td>SAM (1 of 2 diverged)</td><td>80.0 ± 0.0 †</td><td>15.0 ± 7.1 †</td>" in table_in(page, "images")

    def test_runs_of_an_earlier_version_have_no_such_table(self, monkeypatch):
        run = run_of(test_images=[])
        assert "ECE" not in format_table([run]) + markdown_table([run]) + latex_table([run])
        monkeypatch.setattr("lightning_ssesam.experiments.report.FIGURES", FIGURES[4:])
        page = write_report(comparison_of([run]), Path())[0].read_text()
        assert not any(f'id="{part}"' in page for part in ("images", "pairs", "gallery"))
        assert not Path("reliability.png").exists()
        write_runs([run], Path("results.csv"))
        (row,) = rows_of("results.csv")
        assert [row[name] for name in ("top_1", "ece_all", "parameters", "optimizer")] == [""] * 4


class TestPairs:
    RUNS = (
        with_images("ERM", 0, pairs=[[0, 1, 10], [1, 0, 10], [2, 3, 5]]),
        with_images("ERM", 1, pairs=[[0, 1, 20], [1, 0, 10]]),
        with_images("SAM", 0, pairs=[[2, 3, 40], [1, 0, 10], [3, 0, 2]]),
    )

    def test_shares_are_means_over_the_runs_of_a_method(self):
        rows = pair_rows(comparison_of(self.RUNS))
        assert [(row.true_name, row.predicted_name, row.tested) for row in rows] == [
            ("cat", "dog", 50),
            ("ant", "bee", 50),
            ("bee", "ant", 50),
            ("dog", "ant", 50),
        ]
        # By the largest share of any method.
        expected = ((0.05, 0.8), (0.3, 0), (0.2, 0.2), (0, 0.04))
        assert [row.shares for row in rows] == [pytest.approx(pair) for pair in expected]

    def test_classes_with_few_images_come_last(self):
        runs = [with_images("ERM", pairs=[[0, 1, 9], [3, 0, 9]], test=(500, 50, 50, 9))]
        assert [row.true for row in pair_rows(comparison_of(runs))] == [0, 3]

    @pytest.mark.usefixtures("no_pictures")
    def test_stand_in_the_report_and_in_a_file(self):
        page = write_report(comparison_of(self.RUNS), Path())[0].read_text()
        assert "<td>cat → dog</td><td>5.0</td><td>80.0</td><td>50</td>" in table_in(page, "pairs")
        assert "confusions.csv has the others" not in page
        first = rows_of("confusions.csv")[0]
        assert list(first.values()) == ["2", "3", "cat", "dog", "50", "0.05", "0.8"]
        assert list(first)[-2:] == ["share of ERM", "share of SAM"]

    @pytest.mark.usefixtures("no_pictures")
    def test_the_first_of_many(self):
        split = ClassSplit.from_counts([50] * 8 + [3], tail_below=10)
        pairs = [[true, other, 1] for true in range(9) for other in range(9) if other != true]
        run = with_images("ERM", pairs=pairs, split=split, test=(20,) * 9, val=(9,) * 9, class_names=[])
        page = write_report(comparison_of([run], split), Path())[0].read_text()
        assert table_in(page, "pairs").count("<tr>") == 1 + 20
        assert "The first 20 of 72 pairs; confusions.csv has the others." in page
        assert len(rows_of("confusions.csv")) == 72


class Shades(LongTailDataModule):
    """Grey images whose place in the test set is their shade."""

    def __init__(self, labels=(0, 1, 2, 3, 2, 3, 3, 2), shape=(3, 4, 6)):
        super().__init__()
        self.class_counts = SPLIT.class_counts.tolist()
        self.labels, self.shape = torch.tensor(labels), shape

    def make_sets(self):
        images = torch.arange(len(self.labels))[:, None].expand(-1, math.prod(self.shape)).float()
        images = images.reshape(-1, *self.shape).clone()
        # The range of each image is from black to white.
        images.flatten(1)[:, 0], images.flatten(1)[:, -1] = 0, 10
        return {name: TensorDataset(images, self.labels) for name in ("train", "val", "test")}


def gallery_of(runs, data, **kwargs):
    return make_gallery(Comparison(runs, SPLIT, data, 2, None, **kwargs))


class TestGallery:
    MISTAKES = ([5, 3, 0, 0.9996], [2, 2, 0, 0.7], [4, 2, 1, 0.6])

    @pytest.mark.usefixtures("no_pictures")
    def test_shows_the_surest_errors_with_names(self):
        runs = [
            with_images("ERM", 0, mistakes=self.MISTAKES),
            with_images("ERM", 1, mistakes=[[4, 2, 3, 0.8], [2, 2, 0, 0.5]]),
            with_images("SAM", 0),
        ]
        gallery, problem = gallery_of(runs, Shades())
        assert problem == ""
        assert list(gallery) == ["ERM"]
        shown = [(each.true, each.predicted, each.probability) for each in gallery["ERM"]]
        # Each image once, with its surest error over the seeds. Nothing is certain.
        assert shown == [("dog", "ant", "99.9"), ("cat", "dog", "80.0"), ("cat", "ant", "70.0")]
        pictures = [pixels_of(each.source) for each in gallery["ERM"]]
        assert [picture.size for picture in pictures] == [(6, 4)] * 3
        # The shade is the place: 5, 4 and 2 of 10.
        assert [picture.getpixel((3, 2))[0] for picture in pictures] == [128, 102, 51]
        page = write_report(Comparison(runs, SPLIT, Shades(), 2, None), Path())[0].read_text()
        part = page.partition('id="gallery"')[2].partition("</div>")[0]
        assert re.findall("<b>(.*?)</b> → (.*?) %", part) == [
            ("dog", "ant, 99.9"),
            ("cat", "dog, 80.0"),
            ("cat", "ant, 70.0"),
        ]

    def test_at_most_some_tens(self):
        labels = [2] * 60
        runs = [
            with_images(f"m{k}", mistakes=[[place, 2, 0, 0.5 + place / 1000] for place in range(24)]) for k in range(10)
        ]
        gallery, _ = gallery_of(runs, Shades(labels))
        assert [len(exhibits) for exhibits in gallery.values()] == [4] * 10
        gallery, _ = gallery_of(runs[:1], Shades(labels))
        assert len(gallery["m0"]) == 12

    def test_a_method_with_its_own_data(self):
        own = Shades((3,) * 8, (1, 2, 2))
        runs = [with_images("ERM", mistakes=self.MISTAKES), with_images("own", mistakes=[[7, 3, 0, 0.9]])]
        gallery, _ = gallery_of(runs, Shades(), own_data={"own": own})
        assert pixels_of(gallery["own"][0].source).size == (2, 2)
        assert pixels_of(gallery["ERM"][0].source).size == (6, 4)

    def test_no_picture_is_better_than_a_wrong_one(self):
        runs = [with_images("ERM", mistakes=self.MISTAKES)]
        gallery, problem = gallery_of(runs, Shades((0,) * 8))
        assert gallery == {}
        assert problem.startswith("The images are not shown: those of the test set are not in the order")

    @pytest.mark.usefixtures("no_pictures")
    def test_nothing_is_lost_if_an_image_cannot_be_read(self):
        class Broken(Shades):
            def test_dataloader(self):
                raise OSError("the disk is gone")

        comparison = Comparison([with_images("ERM", mistakes=self.MISTAKES)], SPLIT, Broken(), 2, None)
        page = write_report(comparison, Path())[0].read_text()
        assert "The images could not be read: the disk is gone" in page

    def test_inputs_that_are_no_images_have_no_pictures(self):
        assert gallery_of([with_images("ERM", mistakes=self.MISTAKES)], Shades(shape=(7,))) == ({}, "")

    def test_a_collate_of_ones_own_and_several_loaders(self):
        class Own(Shades):
            def test_dataloader(self):
                def collate(samples):
                    return torch.stack([1 - image for image, _ in samples]), torch.tensor(
                        [label for _, label in samples]
                    )

                self.setup("test")
                return [DataLoader(self._sets["test"], collate_fn=collate), super().test_dataloader()]

        gallery, _ = gallery_of([with_images("ERM", mistakes=self.MISTAKES)], Own())
        # The second is at place 2. Its shade is turned round.
        assert pixels_of(gallery["ERM"][1].source).getpixel((3, 2))[0] == 255 - 51

    def test_reading_draws_nothing(self):
        state = torch.get_rng_state()
        gallery_of([with_images("ERM", mistakes=self.MISTAKES)], Shades())
        assert torch.get_rng_state().equal(state)

    @pytest.mark.parametrize(
        ("image", "expected"),
        [
            (torch.tensor([[[-2.0, 0.0], [2.0, 1.0]]]), [[0, 128], [255, 191]]),
            (torch.tensor([[0, 100], [200, 50]], dtype=torch.uint8), [[0, 128], [255, 64]]),
            (torch.tensor([[False, True]]), [[0, 255]]),
            (torch.full((1, 1, 2), 7.0), [[0, 0]]),
            (torch.tensor([[[float("nan"), 4.0]]]), [[0, 255]]),
            (torch.tensor([[[0.0, 1.0]], [[0.0, 3.0]]]), [[0, 170]]),
            (torch.tensor([[[0.0, 3.0]], [[0.0, 3.0]], [[1.5, 0.0]]]), [[[0, 0, 128], [255, 255, 0]]]),
            (torch.tensor([[[0.0, 3.0]]] * 3 + [[[9.0, 9.0]]]), [[[0, 0, 0], [85, 85, 85]]]),
            (torch.tensor([[[0.0, 3.0]]] * 5), [[0, 255]]),
        ],
    )
    def test_tensors_of_every_kind(self, image, expected):
        found = np.asarray(pixels_of(thumbnail(image)), dtype=int)
        assert found.shape == np.shape(expected)
        assert np.abs(found - expected).max() <= 1

    @pytest.mark.parametrize("image", [torch.zeros(5), torch.zeros(1, 1, 1, 1), torch.zeros(0, 3, 3), "x", None])
    def test_what_is_no_image(self, image):
        assert thumbnail(image) is None

    def test_the_form_of_the_input_gives_the_colours_back(self):
        form = ImageInput(2, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
        colours = torch.tensor([[[0.5, 0.6], [0.5, 0.5]]] * 3)
        normalised = (colours - torch.tensor(form.mean).view(3, 1, 1)) / torch.tensor(form.std).view(3, 1, 1)
        assert (
            np.abs(
                np.asarray(pixels_of(thumbnail(normalised, form)), dtype=int)[..., 0] - [[128, 153], [128, 128]]
            ).max()
            <= 1
        )
        # What does not come from it has another range, or other channels.
        assert np.asarray(pixels_of(thumbnail(normalised * 9, form))).min() == 0
        assert pixels_of(thumbnail(torch.rand(1, 3, 3), form)).mode == "L"

    def test_large_pictures_become_small(self):
        source = thumbnail(torch.rand(3, 500, 250))
        assert source.startswith("data:image/jpeg")
        assert pixels_of(source).size == (48, 96)
        assert len(source) < 8000


class TestFigures:
    def test_curves_of_every_group(self):
        runs = [run_of("ERM", seed) for seed in (0, 1)]
        for run, value in zip(runs, (0.2, 0.4), strict=True):
            run.curves = {group: [0.1 * k, value] for k, group in enumerate(GROUPS)}
        comparison = Comparison(runs, SPLIT, DigitsLT(), 2, 0.5)
        axes = draw_curves(comparison).axes
        assert [ax.get_title() for ax in axes] == list(GROUPS)
        for k, ax in enumerate(axes):
            assert ax.lines[0].get_ydata() == pytest.approx([10 * k, 30])
            assert list(ax.lines[1].get_xdata()) == [1, 1]
        assert [text.get_text() for text in axes[0].figure.legends[0].get_texts()] == ["ERM"]

    def test_reliability_pools_the_bins_of_all_runs(self):
        bins = [[[4, 0.25, 0.5], [0, math.nan, math.nan]], [[12, 0.45, 0.25], [2, 0.75, 1.0]]]
        runs = [run_of("ERM", seed, reliability=dict.fromkeys(("head", "tail", "all"), bins[seed])) for seed in (0, 1)]
        runs.append(run_of("SAM"))
        for ax, group in zip(draw_reliability(comparison_of(runs)).axes, ("head", "tail", "all"), strict=True):
            assert ax.get_title() == f"{group} (test)"
            diagonal, line, empty = ax.lines
            assert list(diagonal.get_xdata()) == list(diagonal.get_ydata())
            assert line.get_xdata() == pytest.approx([40, 75])
            assert line.get_ydata() == pytest.approx([100 * (4 * 0.5 + 12 * 0.25) / 16, 100])
            assert len(empty.get_xdata()) == 0
            sizes = ax.collections[0].get_sizes()
            assert (sizes[0] - 4) / (sizes[1] - 4) == pytest.approx(8)

    @pytest.mark.parametrize(("kind", "start"), [("svg", b"<?xml"), ("pdf", b"%PDF"), ("png", b"\x89PNG")])
    def test_formats_of_the_files(self, kind, start, monkeypatch):
        few = [figure for figure in FIGURES if figure.name in ("trade_off", "reliability")]
        monkeypatch.setattr("lightning_ssesam.experiments.report.FIGURES", few)
        written = write_report(comparison_of([run_of("ERM"), run_of("SAM")]), Path(), kind)
        # Without reliability in the runs, there is no such picture.
        assert [path.name for path in written[1:] if path.stem in ("trade_off", "reliability")] == [f"trade_off.{kind}"]
        assert Path(f"trade_off.{kind}").read_bytes().startswith(start)
        (source,) = re.findall('<img .*?src="(.*?)"', written[0].read_text())
        # A browser shows no PDF in a page.
        media = "image/svg+xml" if kind == "svg" else "image/png"
        assert source.startswith(f"data:{media};base64,")
        content = base64.b64decode(source.partition(",")[2])
        assert (content == Path(f"trade_off.{kind}").read_bytes()) == (kind != "pdf")
        if kind != "svg":
            assert struct.unpack(">II", content[16:24]) > (900, 900)

    def test_fonts_of_a_pdf_are_those_that_journals_take(self, monkeypatch):
        monkeypatch.setattr("lightning_ssesam.experiments.report.FIGURES", FIGURES[1:2])
        write_report(comparison_of([run_of("ERM")]), Path(), "pdf")
        content = Path("trade_off.pdf").read_bytes()
        assert b"/Type3" not in content
        assert b"/CIDFontType2" in content

    def test_a_wrong_format_is_refused_before_anything_is_trained(self):
        with pytest.raises(ValueError, match="`figure_format` to be one of 'png', 'svg', 'pdf', but got 'jpg'"):
            compare("ERM", figure_format="jpg")
        with pytest.raises(SystemExit):
            main(["compare", "--figure_format=jpg"])
        assert not Path("comparison").exists()


class TestTrainings:
    @pytest.mark.usefixtures("no_pictures")
    def test_costs_and_optimizers(self):
        runs = [
            run_of("ERM", seed, seconds=seconds, parameters=12_345, trained_parameters=45, optimizer="SGD(lr=<1>)")
            for seed, seconds in enumerate((10.0, 30.0))
        ]
        runs.append(run_of("SAM", seconds=5.0))
        page = write_report(comparison_of(runs), Path())[0].read_text()
        rows = re.findall("<tr><td>.*</tr>", table_in(page, "trainings"))
        cells = [re.findall("<td>(.*?)</td>", row) for row in rows]
        assert cells[0] == ["ERM", "20.0", "10.00", "12,345", "45", "SGD(lr=&lt;1&gt;)"]
        assert cells[1] == ["SAM", "5.0", "2.50", "?", "?", "?"]
        row = rows_of("results.csv")[0]
        assert [row[name] for name in ("parameters", "trained_parameters", "optimizer")] == [
            "12345",
            "45",
            "SGD(lr=<1>)",
        ]
        assert "lightning-ssesam compare --config repeat.yaml" in page


class TestLatex:
    def test_is_a_table_of_booktabs(self):
        runs = [with_images(name, seed, right=0.5 + seed / 10) for name in ("ERM", "A&B_1") for seed in (0, 1)]
        runs[0].accuracy["few"] = math.nan
        lines = latex_table(runs).splitlines()
        lines = [line for line in lines if not line.startswith("%")]
        assert lines[:2] == [r"\begin{tabular}{lrrrrrrrrr}", r"\toprule"]
        assert lines[2] == r"method & head & tail & many & medium & few & all & top-1 & ECE tail & ECE all \\"
        assert lines[-2:] == [r"\bottomrule", r"\end{tabular}"]
        first, second = lines[4:6]
        assert first.startswith(r"ERM & 55.0 $\pm$ 7.1 & ")
        assert first.split(" & ")[5] == "--"
        assert second.startswith(r"A\&B\_1 & 55.0 $\pm$ 7.1 & ")
        # The second of six errors from 0.1 to 0.3, and the last.
        assert second.endswith(r" & 55.0 $\pm$ 7.1 & 14.0 $\pm$ 0.0 & 30.0 $\pm$ 0.0 \\")
        assert {line.count(" & ") for line in lines[4:6]} == {9}

    def test_no_name_is_a_command(self):
        assert escaped("50% of $x_1^2$ ~ {a}#b&c\\d") == (
            r"50\% of \$x\_1\textasciicircum{}2\$ \textasciitilde{} \{a\}\#b\&c\textbackslash{}d"
        )
        assert escaped('a\nb\x1b<"|>') == r"a b\textless{}\textquotedbl{}\textbar{}\textgreater{}"

    def test_diverged_runs_are_named(self):
        text = latex_table([run_of("ERM", 0, diverged=True), run_of("ERM", 1)])
        assert "ERM (1 of 2 diverged) & " in text
        assert "†" not in text


def test_from_the_digits_to_a_report(monkeypatch):
    """What a run keeps leads to the pictures of the digits that are named."""
    monkeypatch.setattr("lightning_ssesam.experiments.report.FIGURES", FIGURES[1:2])
    methods = {"one": Method(ERM), "own": Method(ERM, data=partial(DigitsLT, seed=1))}
    runs = compare(methods, seeds=1, epochs=1, figure_format="svg", output=Path("out"))
    page = Path("out/report.html").read_text()
    data = DigitsLT()
    data.setup("test")
    images, labels = data._sets["test"].tensors
    place, true, predicted, probability = runs[0].tail_mistakes[0]
    assert labels[place] == true
    shown = re.search('<li><img src="(.*?)" alt="a test image of (.)"><b>(.)</b> → (.), (.*?) %', page)
    assert shown.groups()[1:] == (str(true), str(true), str(predicted), f"{min(100 * probability, 99.9):.1f}")
    levels = (16 * (images[place, 0] * data.image_input.std[0] + data.image_input.mean[0])).round()
    assert np.abs(np.asarray(pixels_of(shown[1]), dtype=int) - (255 / 16 * levels).numpy()).max() <= 1
    # The test images of the second method are its own.
    data = DigitsLT(seed=1)
    data.setup("test")
    images, labels = data._sets["test"].tensors
    assert not any(labels[place] != true for place, true, *_ in runs[1].tail_mistakes)
    assert re.findall("<h3>(.*?)</h3>", page) == ["one", "own"]
    second = page.partition("<h3>own</h3>")[2]
    levels = (
        16 * (images[runs[1].tail_mistakes[0][0], 0] * data.image_input.std[0] + data.image_input.mean[0])
    ).round()
    found = np.asarray(pixels_of(re.search('src="(.*?)"', second)[1]), dtype=int)
    assert np.abs(found - (255 / 16 * levels).numpy()).max() <= 1
    assert {path.suffix for path in Path("out").glob("[!r]*")} == {".csv", ".md", ".tex", ".svg", ""}


@pytest.mark.usefixtures("no_pictures")
def test_photos_in_a_folder():
    for name, (count, colour) in {"<b>": (60, 40), "owl": (12, 200)}.items():
        Path("images", name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (30 + number, 20), (colour, number, 0)).save(f"images/{name}/{number}.png")
    data = ImageFolderLT("images", image_size=16)
    split = data.split(tail_below=20)
    run = run_of("ERM", split=split, test=(8, 2), val=(8, 2), class_names=["<b>", "owl"])
    labels = [label for _, label in data.test_dataloader().dataset]
    run.tail_mistakes = [[labels.index(1), 1, 0, 0.75]]
    comparison = Comparison([run], split, ImageFolderLT("images", image_size=16), 2, None)
    gallery, problem = make_gallery(comparison)
    assert problem == ""
    picture = np.asarray(pixels_of(gallery["ERM"][0].source), dtype=int)
    assert picture.shape == (16, 16, 3)
    # The colours of the file, not those of the normalised input.
    assert np.abs(picture[..., 0] - 200).max() <= 1
    assert picture[..., 2].max() <= 1
    page = write_report(comparison, Path())[0].read_text()
    assert "<b>owl</b> → &lt;b&gt;, 75.0 %" in page
