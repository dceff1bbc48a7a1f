"""What tables, files and the report say of the numbers: how much was tested, what diverged, what is not trained yet."""

import csv
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_ssesam import ClassSplit, DigitsLT
from lightning_ssesam.experiments.class_table import class_rows, folded_rows, write_classes
from lightning_ssesam.experiments.figures import FIGURES, draw_comparison, draw_confusion, draw_trade_off
from lightning_ssesam.experiments.remarks import FITTED, describe_images, remarks
from lightning_ssesam.experiments.report import write_report
from lightning_ssesam.experiments.runs import Comparison
from lightning_ssesam.experiments.tables import differences, format_table, markdown_table, write_runs, write_summary
from lightning_ssesam.runs import CONFUSIONS, GROUPS, Run

pytestmark = pytest.mark.usefixtures("no_pictures")

SPLIT = ClassSplit([500, 120, 60, 8], tail=[2, 3])
NAMES = ["ant", "bee", "cat", "dog"]


def run_of(
    method="ERM", seed=0, test=(50, 50, 50, 50), val=(20, 20, 20, 20), right=0.8, train=1.0, split=SPLIT, **kwargs
):
    """A run in which the first images of each class were classified right."""
    numbers = [round(right * number) for number in test]
    recalls = [hit / number if number else math.nan for hit, number in zip(numbers, test, strict=True)]
    groups = {group: getattr(split, group).tolist() for group in GROUPS if group != "all"} | {"all": [True] * len(test)}
    chosen = {
        group: [r for r, is_in in zip(recalls, mask, strict=True) if is_in and r == r] for group, mask in groups.items()
    }
    accuracy = {group: sum(values) / len(values) if values else math.nan for group, values in chosen.items()}
    given = {
        "groups": {group: "".join(str(int(x)) for x in mask) for group, mask in groups.items() if group != "all"},
        "class_names": NAMES[: len(test)],
        "train_accuracy": dict.fromkeys(GROUPS, train),
        "val_images": list(val),
        "test_images": list(test),
        "test_hits": ["1" * hit + "0" * (number - hit) for hit, number in zip(numbers, test, strict=True)],
    }
    return Run(
        method,
        seed,
        accuracy,
        dict(accuracy),
        recalls,
        dict.fromkeys(CONFUSIONS, 0.1),
        {group: [0.5, 0.6] for group in GROUPS},
        **given | kwargs,
    )


def comparison_of(runs, split=SPLIT):
    data = DigitsLT()
    data.class_counts = split.class_counts.tolist()
    return Comparison(runs, split, data, 2, None, "epochs: 2")


def report_of(runs, split=SPLIT):
    return write_report(comparison_of(runs, split), Path())[0].read_text()


def rows_of(path):
    with Path(path).open() as file:
        return list(csv.DictReader(file))


def table_in(text, name):
    return text.partition(f'id="{name}"')[2].partition("</table>")[0]


def everywhere(runs):
    """The text of every output of a comparison that has sentences."""
    return {"console": format_table(runs), "markdown": markdown_table(runs), "report": report_of(runs)}


class TestImages:
    def test_numbers_of_images_stand_in_every_output(self):
        runs = [run_of(method, test=(50, 40, 30, 20), val=(9, 12, 11, 10)) for method in ("ERM", "SAM")]
        for text in everywhere(runs).values():
            assert "Images of each class: 9 to 12 for validation, 20 to 50 for test" in text
            assert (
                "Fewer than 10 validation images: &#39;ant&#39; (9)" in text or "validation images: 'ant' (9)" in text
            )
        assert [row["test_images"] for row in rows_of("summary.csv")[:6]] == ["90", "50", "90", "30", "20", "140"]
        assert describe_images([run_of()]) == "Images of each class: 20 for validation, 50 for test"
        assert describe_images([Run("ERM", 0)]) == ""

    def test_few_images_are_warned_of_with_the_names_of_the_classes(self):
        (few, *_) = remarks([run_of(test=(50, 10, 9, 1))])
        assert few == (
            "Fewer than 10 test images: 'dog' (1), 'cat' (9)."
            " In such a class, a single image moves the accuracy by more than 10 points."
        )
        assert not remarks([run_of(test=(50, 10, 10, 10))])
        for name, text in everywhere([run_of(test=(50, 10, 9, 1))]).items():
            assert "(1), " in text, name
            assert "(9). In such a class" in text, name

    def test_without_names_classes_have_numbers(self):
        few, absent, _ = remarks([run_of(test=(50, 10, 9, 0), class_names=[])])
        assert few.startswith("Fewer than 10 test images: class 2 (9). ")
        assert absent == "No test images: class 3. What is not tested counts in no group, not even in all."

    def test_classes_without_test_images_are_named(self):
        said = remarks([run_of(test=(50, 0, 50, 0))])
        assert said[0].startswith("No test images: 'bee', 'dog'. ")
        assert said[1:] == ["No class of the group few has test images, so its accuracy is nan."]
        # The tail has a class that is tested.
        assert not math.isnan(run_of(test=(50, 0, 50, 0)).accuracy["tail"])
        said = remarks([run_of(test=(50, 50, 0, 0))])
        assert [text.split(" has ")[0] for text in said[1:]] == [
            f"No class of the group {g}" for g in ("tail", "medium", "few")
        ]

    def test_a_group_without_classes_is_named(self):
        split = ClassSplit([500, 300, 200, 150], tail=[3])
        assert remarks([run_of(split=split)]) == [
            f"No class belongs to the group {group}, so its accuracy is nan." for group in ("medium", "few")
        ]

    def test_classes_without_validation_images_are_named(self):
        assert remarks([run_of(val=(20, 0, 20, 0))]) == [
            "No validation images: 'bee', 'dog'. The best epoch is chosen without them."
        ]
        assert remarks([run_of(val=(0, 0, 0, 0))]) == ["No class has validation images, so there is no best epoch."]
        # If the test set validates, it is enough to say it once.
        assert len(remarks([run_of(test=(50, 50, 50, 4), val=(50, 50, 50, 4))])) == 1

    def test_the_smallest_number_of_the_methods_counts(self):
        """A method may have data of its own."""
        runs = [run_of("ERM"), run_of("SAM", test=(50, 50, 50, 7))]
        assert remarks(runs)[0].startswith("Fewer than 10 test images: 'dog' (7).")

    def test_many_classes_are_counted_not_named(self):
        classes = 8142
        split = ClassSplit.from_counts(torch.arange(classes) + 1, tail_below=4000)
        images = [3] * (classes - 1) + [0]
        runs = [run_of(m, s, images, images, 2 / 3, split=split, class_names=[]) for m in ("a", "b") for s in (0, 1)]
        few, absent, *_ = remarks(runs)
        assert few.startswith("Fewer than 10 test images: class 0 (3), class 1 (3), ")
        assert "class 7 (3), and 8,133 more, in classes.csv. In such" in few
        assert absent.startswith("No test images: class 8141. ")
        text = report_of(runs, split)
        # Nothing is lost: the middle is folded.
        parts = [
            text.partition(f'id="classes{part}"')[2].partition("</table>")[0] for part in ("", "_between", "_last")
        ]
        rows = [re.findall("<tr><td>(\\d+)<", part) for part in parts]
        assert [len(part) for part in rows] == [100, 7942, 100]
        assert [int(number) for part in rows for number in part] == list(range(classes))[::-1]
        assert "<summary>7,942 classes between them</summary>" in text
        assert len(text) < 2_000_000
        assert len(rows_of("classes.csv")) == classes
        # Differences of thousands of classes of three images each are as sure as those of many images.
        assert differences(runs)["b"]["all"].margin < 1

    def test_rows_are_folded_in_the_middle(self):
        rows = class_rows(comparison_of([run_of()]))
        numbers = [[row.number for row in part] for part in folded_rows(rows, 2)]
        assert numbers == [[0], [1, 2], [3]]
        assert folded_rows(rows, 4) == [rows]

    def test_classes_are_a_file_and_a_table(self):
        runs = [run_of("ERM", seed, (50, 40, 30, 0), (9, 8, 7, 0), right) for seed, right in enumerate((0.5, 0.7))]
        runs += [run_of("SAM", 0, (50, 40, 30, 0), (9, 8, 7, 0), 0.9)]
        text = report_of(runs)
        rows = rows_of("classes.csv")
        assert [list(row.values()) for row in rows] == [
            ["0", "ant", "head", "many", "500", "9", "50", "0.6", "0.9"],
            ["1", "bee", "head", "many", "120", "8", "40", "0.6", "0.9"],
            ["2", "cat", "tail", "medium", "60", "7", "30", "0.6", "0.9"],
            ["3", "dog", "tail", "few", "8", "0", "0", "", ""],
        ]
        assert list(rows[0])[-2:] == ["accuracy of ERM", "accuracy of SAM"]
        table = text.partition('id="classes"')[2].partition("</table>")[0]
        assert "<td>cat</td><td>tail, medium</td><td>60</td>" in table
        assert '<td class="bad">7</td><td>30</td><td>60.0</td><td>90.0</td>' in table
        assert table.count("not tested") == 2

    def test_what_is_not_known_is_left_open(self):
        run = run_of(val_images=[], test_images=[], test_hits=[], groups={}, class_names=[], train_accuracy={})
        write_classes(comparison_of([run]), Path("classes.csv"))
        assert list(rows_of("classes.csv")[3].values())[1:7] == ["3", "tail", "few", "8", "", ""]
        parts = [
            report_of([run]).partition(f'id="{part}"')[2].partition("</table>")[0] for part in ("classes", "trainings")
        ]
        assert [part.count("<td>?</td>") for part in parts] == [8, 3]
        assert not remarks([run])
        assert "training" not in format_table([run])

    def test_names_of_classes_cannot_inject(self):
        names = ["<script>alert(1)</script>", "a|b", "\x1b[31mred", 'q"uote']
        runs = [run_of("ERM", seed, (50, 3, 3, 3), class_names=names) for seed in (0, 1)]
        texts = everywhere(runs)
        assert all("<script>" not in texts[name] for name in ("markdown", "report"))
        assert "\x1b" not in texts["console"] + texts["markdown"]
        lines = [line for line in texts["markdown"].splitlines() if line.startswith("|")]
        # The second table has the top-1 accuracy alone.
        assert [line.count("|") for line in lines] == [12] * 3 + [3] * 3


class TestDivergence:
    RUNS = tuple(
        run_of(method, seed, right=0.6 + seed / 10 + gain, diverged=(method, seed) == ("SAM", 1))
        for method, gain in (("ERM", 0), ("SAM", 0.1), ("ImbSAM", 0.2))
        for seed in range(3)
    )

    def test_every_output_marks_it(self):
        texts = everywhere(self.RUNS)
        for text in texts.values():
            assert "Diverged, with a loss that is not finite: SAM with seed 1" in text
            assert "SAM (1 of 3 diverged)" in text
            assert "ERM (" not in text
            assert "† A mean over runs of which some diverged." in text
        lines = texts["console"].splitlines()
        assert [line.count("†") for line in lines[2:5]] == [0, 7, 0]
        line, by_image = [line for line in texts["markdown"].splitlines() if line.startswith("| SAM")]
        assert by_image.count("†") == 1
        # Six groups, the training, and the best epoch.
        assert line.count("†") == 8
        assert line.count("(1 diverged)") == 2
        for table, number in {"last": 7, "best": 6, "images": 1}.items():
            part = texts["report"].partition(f'id="{table}"')[2].partition("</table>")[0]
            assert part.count(" †</td>") == number
        runs = texts["report"].partition('id="runs"')[2].partition("</table>")[0]
        assert runs.count("SAM (diverged)</td><td>1</td>") == runs.count("(diverged)") == 1
        assert texts["report"].partition('id="classes"')[2].count("<th>SAM (1 of 3 diverged)</th>") == 1

    def test_files_mark_it(self):
        report_of(self.RUNS)
        assert [row["diverged"] for row in rows_of("results.csv")] == ["False"] * 4 + ["True"] + ["False"] * 4
        summary = {(row["method"], row["group"]): row for row in rows_of("summary.csv")}
        assert [summary[method, "all"]["diverged"] for method in ("ERM", "SAM", "ImbSAM")] == ["0", "1", "0"]
        assert [summary[method, "all"]["doubt"] for method in ("ERM", "SAM", "ImbSAM")] == [
            "",
            "1 diverged",
            "no spread",
        ]
        assert "accuracy of SAM (1 of 3 diverged)" in rows_of("classes.csv")[0]

    def test_pictures_mark_it(self):
        comparison = comparison_of(self.RUNS)
        for figure in FIGURES:
            assert figure.caption(comparison).endswith(" Diverged: SAM with seed 1.")
        for draw in (draw_comparison, draw_trade_off):
            labels = [text.get_text() for text in draw(comparison).legends[0].get_texts()]
            assert labels[-3:] == ["ERM", "SAM (1 of 3 diverged)", "ImbSAM"]
        figure = draw_confusion(comparison)
        assert [text.get_text() for text in figure.axes[0].get_yticklabels()][1] == "SAM (1 of 3 diverged)"
        assert "Diverged" not in FIGURES[1].caption(comparison_of(self.RUNS[:3]))

    def test_no_star_and_no_colour_beside_it(self):
        text = report_of(self.RUNS).partition('id="differences"')[2].partition("</table>")[0]
        assert text.count("(1 diverged)</td>") == 6
        assert 'class="good"' not in text.partition("ImbSAM")[0]

    def test_all_runs_may_diverge_and_accuracies_may_be_nan(self):
        runs = [
            run_of(name, seed, right=0.0, train=math.nan, diverged=True) for name in ("ERM", "SAM") for seed in (0, 1)
        ]
        for run in runs:
            run.accuracy = dict.fromkeys(GROUPS, math.nan)
            run.best = dict(run.accuracy)
        for name, text in everywhere(runs).items():
            assert "ERM (2 of 2 diverged)" in text, name
            assert "train longer" not in text, name
        assert {row["mean"] for row in rows_of("summary.csv")} == {""}


class TestTraining:
    def test_training_accuracy_stands_in_every_output(self):
        runs = [run_of("ERM", seed, train=train) for seed, train in enumerate((0.9, 1.0))]
        for name, text in everywhere(runs).items():
            assert "95.0 ± 7.1" in text.replace("±  ", "± "), name
        assert format_table(runs).splitlines()[1].split() == [*GROUPS, "training"]
        assert [row["train_tail"] for row in rows_of("results.csv")] == ["0.9", "1.0"]
        assert {row["train_mean"] for row in rows_of("summary.csv")} == {"0.95"}
        each = report_of(runs).partition('id="runs"')[2].partition("</table>")[0]
        assert each.count("<td>90.0</td>") == 1

    @pytest.mark.parametrize(("train", "percent"), [(0.62, "62.0"), (0.7999, "79.9"), (FITTED, None), (1.0, None)])
    def test_what_is_not_fitted_is_said(self, train, percent):
        runs = [run_of("ERM"), run_of("SAM", train=train)]
        sentence = f"The training set is not fitted yet (SAM {percent} %): train longer before you compare."
        for text in everywhere(runs).values():
            assert (sentence in text) == (percent is not None)
            assert text.count("train longer") == (percent is not None)

    def test_every_class_counts_the_same(self):
        """The head is fitted, and has most of the images; the tail is not."""
        run = run_of()
        run.train_accuracy = {"head": 1.0, "tail": 0.2, "all": 0.6}
        assert remarks([run])[0].startswith("The training set is not fitted yet (ERM 60.0 %)")

    def test_diverged_runs_need_not_train_longer(self):
        runs = [run_of("ERM", 0), run_of("ERM", 1, train=0.1, diverged=True)]
        assert not any("train longer" in remark for remark in remarks(runs))
        runs[0].train_accuracy["all"] = 0.5
        assert "(ERM 50.0 %)" in remarks(runs)[1]


def test_no_star_where_few_images_decide():
    """The same accuracies with few and with many images."""
    many, few = (
        [run_of(m, s, (n, n, n, n // 5), right=r + 0.1 * s) for m, r in (("A", 0.2), ("B", 0.8)) for s in (0, 1)]
        for n in (500, 10)
    )
    for run, shift in zip((*many[2:], *few[2:]), (0, 0.01) * 2, strict=True):
        run.accuracy = {group: value + shift for group, value in run.accuracy.items()}
    assert differences(many)["B"]["few"].is_significant
    assert differences(few)["B"]["few"].doubt == "few images"
    assert "(few images)" in format_table(few)
    assert differences(few)["B"]["all"].doubt == ""
    text = report_of(few)
    assert "(few images)</td>" in text
    assert "<b>Few images</b>: the group has fewer than 10\ntest images" in text
    write_summary(few, Path("summary.csv"))
    assert [row["doubt"] for row in rows_of("summary.csv") if row["method"] == "B"] == [
        "",
        "",
        "",
        "",
        "few images",
        "",
    ]
    write_runs(few, Path("results.csv"))
    assert len(rows_of("results.csv")) == 4


class TestTradeOff:
    def figure(self, points):
        runs = [run_of(f"m{k}") for k in range(len(points))]
        for run, (head, tail) in zip(runs, points, strict=True):
            run.accuracy |= {"head": head, "tail": tail}
        figure = draw_trade_off(comparison_of(runs))
        figure.draw_without_rendering()
        return figure.axes[0]

    @pytest.mark.parametrize(
        "points",
        [[(0.99, 0.74), (0.991, 0.82)], [(0.2, 0.1), (0.9, 0.15)], [(1.0, 1.0)], [(0.5, 0.5), (math.nan, 0.6)]],
    )
    def test_a_point_is_as_long_on_both_axes_and_all_are_seen(self, points):
        ax = self.figure(points)
        start, right, up = ax.transData.transform([(50, 50), (51, 50), (50, 51)])
        assert right[0] - start[0] == pytest.approx(up[1] - start[1])
        for head, tail in points:
            if not math.isnan(head):
                assert ax.get_xlim()[0] < 100 * head < ax.get_xlim()[1]
                assert ax.get_ylim()[0] < 100 * tail < ax.get_ylim()[1]

    def test_arrows_lead_from_the_first_method_to_the_others(self):
        ax = self.figure([(0.99, 0.74), (0.991, 0.82), (0.98, 0.7), (math.nan, 0.7)])
        arrows = [(tuple(text.xyann), tuple(text.xy)) for text in ax.texts if text.arrow_patch]
        assert arrows == [((99, 74), pytest.approx((99.1, 82))), ((99, 74), pytest.approx((98, 70)))]
        # Eight points of the tail are most of the axis, and a tenth of a point of the head is to be seen.
        assert 9 < np.ptp(ax.get_ylim()) < 20
        guides = [tuple(line.get_data()) for line in ax.lines]
        assert guides == [([99, 99], [0, 1]), ([0, 1], [74, 74])]
