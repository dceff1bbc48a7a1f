"""What a run keeps of single predictions: calibration, confused classes, the surest errors on the tail. No pixels."""

import json
import tracemalloc
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from helpers import STRICT
from test_recorder import OwnBatches, Partly, Points, SeveralLoaders, experiment, line
from torch import nn

from lightning_ssesam import ClassSplit, GroupCalibrationError
from lightning_ssesam.experiments.predictions import MOST_MISTAKES, MOST_PAIRS, Predictions
from lightning_ssesam.experiments.recorder import describe_optimizer
from lightning_ssesam.runs import GROUPS, Run

pytestmark = STRICT

SPLIT = ClassSplit([500, 120, 60, 8, 5], tail=[2, 3, 4])


def naive(scores, targets, ignored=-100):
    """Confused pairs and mistakes, one image at a time."""
    probabilities = scores.double().softmax(1)
    pairs, mistakes, tested = {}, [], {}
    for place, (row, true) in enumerate(zip(probabilities, targets.tolist(), strict=True)):
        if true == ignored:
            continue
        tested[true] = tested.get(true, 0) + 1
        if (predicted := int(row.argmax())) != true:
            pairs[true, predicted] = pairs.get((true, predicted), 0) + 1
            if SPLIT.tail[true]:
                mistakes.append([place, true, predicted, float(row.max())])
    few_last = sorted(
        pairs.items(), key=lambda item: (tested[item[0][0]] < 10, -item[1] / tested[item[0][0]], -item[1])
    )
    return [[*pair, number] for pair, number in few_last], sorted(mistakes, key=lambda entry: -entry[3])


def written(split, batches, in_order=True, **kwargs):
    predictions, run = Predictions(split, **kwargs), Run("ERM", 0)
    for scores, targets in batches:
        predictions.update(scores, targets)
    predictions.write_to(run, in_order)
    return run


def test_equals_its_naive_twin():
    targets = torch.tensor([0] * 80 + [1] * 60 + [2] * 40 + [3] * 12 + [4] * 3)[torch.randperm(195)]
    targets[::17] = 255
    scores = 2 * torch.randn(195, 5) + torch.eye(6)[targets.clamp(max=5), :5]
    batches = [(scores[start : start + 50], targets[start : start + 50]) for start in range(0, 195, 50)]
    run = written(SPLIT, batches, ignore_index=255)
    pairs, mistakes = naive(scores, targets, ignored=255)
    shares = [[number, number / int((targets == true).sum())] for true, _, number in run.confused_pairs]
    assert shares == [[number, number / int((targets == true).sum())] for true, _, number in pairs]
    assert sorted(run.confused_pairs) == sorted(pairs)
    # Three images decide nothing.
    assert {true for true, *_ in run.confused_pairs[:10]} <= {0, 1, 2, 3}
    assert run.confused_pairs[-1][0] == 4
    expected = mistakes[:MOST_MISTAKES]
    assert [entry[:3] for entry in run.tail_mistakes] == [entry[:3] for entry in expected]
    assert [entry[3] for entry in run.tail_mistakes] == pytest.approx([entry[3] for entry in expected])
    metric = GroupCalibrationError(SPLIT, ignore_index=255)
    values = metric(scores, targets)
    assert run.calibration == pytest.approx({name: float(value) for name, value in values.items()})
    assert list(run.calibration) == ["head", "tail", "many", "medium", "few", "all"] == list(GROUPS)
    for group in ("head", "tail", "all"):
        found = np.array(run.reliability[group])
        np.testing.assert_allclose(found, np.stack([part.numpy() for part in metric.reliability(group)], 1))


def test_nan_scores_are_no_errors_of_a_kind():
    scores = torch.eye(5)[[1, 1, 3]]
    scores[1, 0] = float("nan")
    run = written(SPLIT, [(10 * scores, torch.tensor([0, 2, 4]))])
    assert run.confused_pairs == [[0, 1, 1], [4, 3, 1]]
    assert [entry[0] for entry in run.tail_mistakes] == [2]
    assert np.isnan(run.calibration["tail"])
    assert run.test_hits == ["0", "", "0", "", "0"]


def test_without_an_order_there_are_no_images_to_show():
    run = written(SPLIT, [(torch.eye(5)[[1, 1]], torch.tensor([0, 2]))], in_order=False)
    assert (run.test_hits, run.tail_mistakes) == ([], [])
    assert run.confused_pairs == [[0, 1, 1], [2, 1, 1]]
    assert run.calibration["all"] > 0


def test_pixels_are_not_kept():
    predictions = Predictions(SPLIT)
    predictions.update(torch.randn(2, 5, 8, 8), torch.randint(5, (2, 8, 8)))
    assert not predictions.predicted
    assert not predictions.calibration.confidences
    run = Run("ERM", 0)
    predictions.write_to(run, in_order=True)
    assert run == Run("ERM", 0)


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
@pytest.mark.parametrize("classes", [1000, 8142])
def test_many_classes_and_images_stay_small(classes):
    """A dense table of 8,142 classes would have 66 million numbers."""
    generator = torch.Generator().manual_seed(0)
    split = ClassSplit.from_counts(torch.arange(classes) + 1, tail_below=classes // 2)
    predictions, run = Predictions(split, validate_args=False), Run("ERM", 0)
    images = 50_000
    for _ in range(5):
        # A few scores for each image, as class indices would have no confidence.
        targets = torch.randint(classes, (images // 5,), generator=generator)
        predictions.calibration.targets.append(targets.float())
        predictions.calibration.hits.append(torch.zeros(len(targets)))
        predictions.calibration.confidences.append(torch.rand(len(targets), generator=generator))
        predictions.predicted.append((targets + torch.randint(1, 9, targets.shape, generator=generator)) % classes)
    tracemalloc.start()
    predictions.write_to(run, in_order=True)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 30_000_000
    assert len(run.confused_pairs) == MOST_PAIRS
    assert len(run.tail_mistakes) == MOST_MISTAKES
    text = json.dumps(asdict(run) | {"test_hits": []})
    assert len(text) < 40_000


def test_a_run_keeps_them_with_network_and_optimizer():
    run = experiment().run(3)
    _, model, data = experiment().fit(3)
    scores = torch.cat([model(x) for x, _ in data.test_dataloader()]).detach()
    targets = torch.cat([y for _, y in data.test_dataloader()])
    values = GroupCalibrationError(model.split)(scores, targets)
    assert run.calibration == pytest.approx({name: float(value) for name, value in values.items()}, nan_ok=True)
    assert sum(number for *_, number in run.confused_pairs) == "".join(run.test_hits).count("0")
    # Class c, the tail, has no test images.
    assert run.tail_mistakes == []
    assert run.parameters == run.trained_parameters == 2 * 3 + 3
    assert run.optimizer == "SGD(lr=0.05)"


def frozen(num_classes):
    net = nn.Sequential(line(num_classes), nn.Linear(num_classes, num_classes))
    net[0].requires_grad_(False)
    return net


def test_only_what_is_trained_counts_as_trained():
    run = replace(experiment(epochs=1), backbone=frozen).run(0)
    assert (run.parameters, run.trained_parameters) == (9 + 12, 12)


def test_of_several_loaders_the_first_counts():
    several, plain = (experiment(kind, epochs=1).run(2) for kind in (SeveralLoaders, Points))
    assert several.calibration == pytest.approx(plain.calibration, nan_ok=True)
    assert several.confused_pairs == plain.confused_pairs


def test_other_orders_and_ignored_images():
    run, plain = (experiment(kind, epochs=1).run(0) for kind in (OwnBatches, Points))
    assert run.confused_pairs == plain.confused_pairs
    assert run.tail_mistakes == []
    partly = experiment(Partly, epochs=1, model={"ignore_index": 7}).run(0)
    assert sum(number for *_, number in partly.confused_pairs) == "".join(partly.test_hits).count("0")


def test_mirrored_images_have_the_mean_probability():
    """With test-time augmentation, the classifier hands probabilities on."""
    run = experiment(epochs=1, model={"tta": "hflip"}).run(0)
    _, model, data = experiment(epochs=1, model={"tta": "hflip"}).fit(0)
    probabilities = torch.cat([model.probabilities(x) for x, _ in data.test_dataloader()]).detach()
    targets = torch.cat([y for _, y in data.test_dataloader()])
    values = GroupCalibrationError(model.split)(probabilities, targets)
    assert run.calibration == pytest.approx({name: float(value) for name, value in values.items()}, nan_ok=True)


PARTS = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: torch.optim.SGD(PARTS, lr=0.1), "SGD(lr=0.1)"),
        (lambda: torch.optim.AdamW(PARTS), "AdamW(lr=0.001)"),
        (lambda: torch.optim.AdamW(PARTS, betas=(0.9, 0.95)), "AdamW(lr=0.001, betas=(0.9, 0.95))"),
        (lambda: torch.optim.Adam(PARTS, lr=torch.tensor(0.25)), "Adam(lr=0.25)"),
        (
            lambda: torch.optim.SGD(PARTS, lr=0.1, momentum=0.9, nesterov=True),
            "SGD(lr=0.1, momentum=0.9, nesterov=True)",
        ),
        (
            lambda: torch.optim.SGD(
                [{"params": PARTS[:1]}, {"params": PARTS[1:], "lr": 0.01}], lr=0.1, weight_decay=5e-4
            ),
            "SGD(lr=0.1 and 0.01, weight_decay=0.0005)",
        ),
    ],
)
def test_optimizers_in_words(make, text):
    optimizer = make()
    assert describe_optimizer(optimizer) == text
    # A schedule that has begun, such as a warm-up, moves the rate.
    torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.5)
    assert describe_optimizer(optimizer) == text
