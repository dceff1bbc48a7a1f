"""What a comparison says about its radii and switches: searched, given, or defaults made for 8x8 digits."""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import STRICT
from torch.utils.data import TensorDataset

from lightning_ssesam import SSESAM, DeferredReweighting, DigitsLT, StageSwitch
from lightning_ssesam.cli import main
from lightning_ssesam.compare import Method, compare
from lightning_ssesam.data import ClassBalancedSampler, LongTailDataModule
from lightning_ssesam.losses import LogitAdjustedLoss
from lightning_ssesam.runs import CONFUSIONS, GROUPS, Experiment, Run

pytestmark = STRICT


class Others(LongTailDataModule):
    """Not the digits, on which the defaults were chosen."""

    class_counts = [50, 40, 30, 20, 10, 9, 8, 7, 6, 5]  # noqa: RUF012 (as the data modules of users)

    def make_sets(self):
        images = TensorDataset(torch.zeros(10, 1, 8, 8), torch.arange(10))
        return dict.fromkeys(("train", "val", "test"), images)


@pytest.fixture(autouse=True)
def _made_up(monkeypatch):
    def run(self, seed, *_):
        groups = dict.fromkeys(GROUPS, 0.5)
        curves = {group: [0.5] * self.epochs for group in GROUPS}
        return Run(self.method, seed, groups, dict(groups), [0.5] * 10, dict.fromkeys(CONFUSIONS, 0.2), curves)

    monkeypatch.setattr(sys, "argv", ["lightning-ssesam"])
    monkeypatch.setattr(Experiment, "run", run)
    # Pictures take longer than all the rest.
    monkeypatch.setattr("lightning_ssesam.experiments.report.FIGURES", ())


def said(capsys=None, **arguments):
    """What table.md says below its table; the report must say the same."""
    compare(seeds=2, epochs=2, **arguments)
    report = " ".join(Path("comparison/report.html").read_text().split())
    values, *notes = Path("comparison/table.md").read_text().partition("excludes 0).")[2].strip().split("\n\n")
    escaped = values.removesuffix(".").removeprefix("Radii and switch: ")
    assert f"<dt>Radii and switch</dt><dd>{escaped}</dd>" in report
    for note in notes:
        assert f'<p class="bad">{note}</p>'.replace("'", "&#39;") in report
    if capsys:
        printed = capsys.readouterr().out
        assert all(note in printed for note in notes)
    return values, [note for note in notes if not note.startswith(REMEDIES)]


REMEDIES = "No method has a loss or a sampler for imbalanced classes."


@pytest.mark.parametrize(
    ("arguments", "is_said"),
    [
        ({}, True),
        ({"methods": {"a": Method(), "b": Method(loss=partial(LogitAdjustedLoss))}}, False),
        ({"methods": {"a": Method(), "b": Method(sampler=ClassBalancedSampler)}}, False),
        ({"methods": {"a": Method(callbacks=[DeferredReweighting()])}}, False),
        ({"data": partial(Others, sampler=ClassBalancedSampler)}, False),
    ],
)
def test_losses_and_samplers_are_recommended_where_there_is_none(arguments, is_said, capsys):
    compare(**{"seeds": 1, "epochs": 2, "data": Others, **arguments})
    for text in (capsys.readouterr().out, Path("comparison/report.html").read_text()):
        assert (REMEDIES in text) == is_said


def test_defaults_are_called_defaults(capsys):
    values, notes = said(data=Others, capsys=capsys)
    assert values == (
        "Radii and switch: sam_rho = 0.2 (a default, chosen on 8x8 digits); imbsam_rho = 0.2 (a default, chosen on 8x8"
        " digits); head_rho = 0.05 (a default, chosen on 8x8 digits); tail_rho = 0.2 (a default, chosen on 8x8 digits);"
        " gamma = 0.7 (a default, the published value)."
    )
    assert notes == [
        "Nothing was searched on these data. Defaults made for 8x8 digits were compared: sam_rho = 0.2, imbsam_rho ="
        " 0.2, head_rho = 0.05, tail_rho = 0.2. Search with `lightning-ssesam sweep` before you prefer a method."
    ]


def test_defaults_are_right_on_digits():
    assert said()[1] == []

    class Seeded(DigitsLT):
        pass

    assert said(data=partial(Seeded, seed=3))[1] == []


def test_what_is_given_is_called_given(capsys):
    values, notes = said(data=Others, methods="ERM,SAM,SSESAM", sam_rho=0.3, head_rho=0.1, tail_rho=0.11, gamma=0.6)
    assert values == (
        "Radii and switch: sam_rho = 0.3 (given); head_rho = 0.1 (given); tail_rho = 0.11 (given); gamma = 0.6 (given)."
    )
    # They may be right for these data: nobody knows.
    assert notes == []


def test_a_comparison_after_a_search_of_one_method_is_not_fair():
    searched = ["head_rho=0.1", "tail_rho=0.2", "gamma=0.5"]
    values, notes = said(data=Others, head_rho=0.1, gamma=0.5, imbsam_rho=0.4, searched=searched)
    assert "imbsam_rho = 0.4 (given); head_rho = 0.1 (searched on validation data);" in values
    # A searched value may equal the default.
    assert "tail_rho = 0.2 (searched on validation data); gamma = 0.5 (searched on validation data)" in values
    assert notes == [
        "Values of SSESAM were searched on validation data, and none of SAM and ImbSAM: the comparison is not fair to"
        " SAM and ImbSAM."
    ]
    everything = ["sam_rho", "imbsam_rho", *searched]
    assert said(data=Others, head_rho=0.1, gamma=0.5, searched=everything)[1] == []


def test_a_value_that_was_changed_after_the_search_was_not_searched():
    values, notes = said(
        methods="SAM,ImbSAM", sam_rho=0.3, imbsam_rho=0.31, searched=["sam_rho=0.1", "imbsam_rho=0.31"]
    )
    assert values == "Radii and switch: sam_rho = 0.3 (given); imbsam_rho = 0.31 (searched on validation data)."
    assert notes[0].endswith("and none of SAM: the comparison is not fair to SAM.")


def test_methods_of_a_user():
    methods = {
        "Mine": Method(partial(SSESAM, head_rho=0.1, tail_rho=0.3)),
        "Early": Method(SSESAM, callbacks=[StageSwitch(at=0.25)]),
        "Epoch": Method(SSESAM, callbacks=[StageSwitch(epoch=1)]),
        "Plain": Method(),
    }
    values, notes = said(data=Others, methods=methods, searched=["Mine.head_rho=0.1", "Mine.tail_rho", "Mine.lr=0.05"])
    parts = values.removeprefix("Radii and switch: ").removesuffix(".").split("; ")
    assert parts == [
        "Mine.head_rho = 0.1 (searched on validation data)",
        "Mine.tail_rho = 0.3 (searched on validation data)",
        "gamma = 0.7 (a default, the published value)",
        "Mine.lr = 0.05 (searched on validation data)",
        "Early.head_rho = 0.05 (given)",
        "Early.tail_rho = 0.1 (given)",
        "Early.gamma = 0.25 (given)",
        "Epoch.head_rho = 0.05 (given)",
        "Epoch.tail_rho = 0.1 (given)",
    ]
    # Plain training has a learning rate, too.
    assert notes[0].endswith(
        "and none of Early, Epoch and Plain: the comparison is not fair to Early, Epoch and Plain."
    )


@pytest.mark.parametrize("searched", [["rho"], ["sam_rho=x"], ["sam_rho="], "sam_rho", ["SAM.rho=0.1"], [3]])
def test_refuses_names_of_no_value(searched, monkeypatch):
    monkeypatch.setattr(Experiment, "run", lambda *args: pytest.fail("trained"))
    expected = r"`searched` to be a list of names of values \(sam_rho, imbsam_rho, head_rho, tail_rho, gamma\), each"
    with pytest.raises(ValueError, match=expected):
        compare(methods="SAM", seeds=1, epochs=1, searched=searched)


def test_from_the_command_line():
    main(["compare", "--methods=SAM,SSESAM", "--seeds=1", "--epochs=2", "--jobs=1", "--searched=[sam_rho]"])
    assert "not fair to SSESAM." in Path("comparison/table.md").read_text()
