"""Intervals of differences: against a naive twin, and against the truth in simulated comparisons."""

import math

import numpy as np
import pytest
from scipy.stats import t

from lightning_ssesam.experiments.intervals import (
    Difference,
    Pair,
    binomial_variances,
    paired_difference,
    paired_variances,
)
from lightning_ssesam.runs import GROUPS, Run


def run_of(method, seed, hits, groups=None, **kwargs):
    """A run whose test images were right (1) and wrong (0) as in ``hits``, a list for each class."""
    recalls = [float(np.mean(of_class)) if len(of_class) else math.nan for of_class in hits]
    masks = {group: "1" * len(hits) for group in GROUPS if group != "all"} | (groups or {})
    accuracy = {group: mean_of(recalls, masks.get(group, "1" * len(hits))) for group in GROUPS}
    texts = ["".join(str(int(hit)) for hit in of_class) for of_class in hits]
    given = {"test_images": [len(text) for text in texts], "test_hits": texts, **kwargs}
    return Run(method, seed, accuracy, class_recalls=recalls, groups=masks, **given)


def mean_of(recalls, mask):
    tested = [value for value, digit in zip(recalls, mask, strict=True) if digit == "1" and not math.isnan(value)]
    return sum(tested) / len(tested) if tested else math.nan


def draw_runs(generator, sizes, seeds, easy=0.7, gain=0.0, luck=0.1):
    """Two methods that find the same images hard. Each seed has its own luck."""
    hardness = [generator.normal(size=size) for size in sizes]
    runs = {}
    for method, shift in (("A", gain), ("B", 0.0)):
        taste = [0.5 * generator.normal(size=size) for size in sizes]
        runs[method] = []
        for seed in range(seeds):
            fortunes = luck * generator.normal(size=len(sizes))
            hits = [
                hard + own + fortune + 0.4 * generator.normal(size=len(hard)) < easy + shift
                for hard, own, fortune in zip(hardness, taste, fortunes, strict=True)
            ]
            runs[method].append(run_of(method, seed, hits))
    return runs["A"], runs["B"]


def naive_difference(runs, others):
    """Mean and margin in points, written out with loops."""
    seeds, classes = len(runs), [c for c, text in enumerate(runs[0].test_hits) if text]
    by_seed = [100 * (a.accuracy["all"] - b.accuracy["all"]) for a, b in zip(runs, others, strict=True)]
    parts = [(float(np.var(by_seed, ddof=1)) / seeds, seeds - 1)]
    for c in classes:
        number = len(runs[0].test_hits[c])
        # With two images more: one of 0, and one that is half +1, half -1.
        values, weights = [0.0, 1.0, -1.0], [1.0, 0.5, 0.5]
        for i in range(number):
            one, other = (sum(int(run.test_hits[c][i]) for run in which) / seeds for which in (runs, others))
            values.append(one - other)
            weights.append(1.0)
        total = sum(weights)
        mean = sum(w * v for w, v in zip(weights, values, strict=True)) / total
        variance = sum(w * v**2 for w, v in zip(weights, values, strict=True)) / total - mean**2
        parts.append(((100 / len(classes)) ** 2 * variance / total, number + 1))
    variance = sum(part for part, _ in parts)
    degrees = variance**2 / sum(part**2 / df for part, df in parts)
    of_seeds = t.ppf(0.975, seeds - 1) * math.sqrt(parts[0][0])
    return sum(by_seed) / seeds, max(t.ppf(0.975, degrees) * math.sqrt(variance), of_seeds)


def test_equals_its_naive_twin():
    generator = np.random.default_rng(0)
    for sizes in ([50, 7, 1, 0, 12], [3], [1, 1, 200]):
        runs, others = draw_runs(generator, sizes, 3)
        found = Pair(runs, others[::-1]).difference("all")
        assert found[:2] == pytest.approx(naive_difference(runs, others), rel=1e-12)


def test_a_group_rests_on_its_own_classes():
    generator = np.random.default_rng(1)
    hits = [[generator.random(size) < 0.7 for size in (40, 20, 9)] for _ in range(4)]
    runs, others = (
        [run_of(name, seed, hits[2 * m + seed], {"tail": "001", "head": "110"}) for seed in (0, 1)]
        for m, name in enumerate("AB")
    )
    alone, other_alone = (
        [run_of(run.method, run.seed, [[int(x) for x in run.test_hits[2]]]) for run in which]
        for which in (runs, others)
    )
    expected = Pair(alone, other_alone).difference("all")
    assert Pair(runs, others).difference("tail") == pytest.approx((*expected[:2], "few images"))
    assert expected.doubt == "few images"
    assert Pair(runs, others).difference("head").doubt == ""


def test_interval_covers_the_truth_and_is_no_wider_than_it_must_be():
    """Without the images it would miss the truth often. A bootstrap over images and seeds is about as wide."""
    generator, sizes, seeds = np.random.default_rng(2), [50, 30, 12], 5
    # Of infinitely many images and seeds: a sum of normal numbers is below a threshold.
    truth = 100 * (_normal_below(1.0 / math.sqrt(_VARIANCE)) - _normal_below(0.7 / math.sqrt(_VARIANCE)))
    hits = seeds_only_hits = 0
    ratios = []
    for number in range(300):
        runs, others = draw_runs(generator, sizes, seeds, gain=0.3)
        found = Pair(runs, others).difference("all")
        hits += abs(found.mean - truth) <= found.margin
        seeds_only_hits += abs(found.mean - truth) <= _seeds_only(runs, others)
        if number < 15:
            ratios.append(found.margin / _bootstrap_margin(generator, runs, others))
    assert 0.945 <= hits / 300 <= 1
    assert seeds_only_hits / 300 < 0.85
    assert 1.0 < np.mean(ratios) < 1.6


@pytest.mark.parametrize(("seeds", "sizes"), [(2, [40] * 5), (3, [60] * 4)])
def test_few_seeds_that_agree_by_chance_give_no_certainty(seeds, sizes):
    """The degrees of freedom of the images would make the interval too narrow: it missed 0 in 1 of 10 cases."""
    generator = np.random.default_rng(3)
    stars = sum(
        Pair(*draw_runs(generator, sizes, seeds, gain=0.0, luck=0.3)).difference("all").is_significant
        for _ in range(300)
    )
    assert stars <= 0.06 * 300


_VARIANCE = 1 + 0.5**2 + 0.1**2 + 0.4**2


def _normal_below(value):
    return 0.5 * (1 + math.erf(value / math.sqrt(2)))


def _seeds_only(runs, others):
    differences = [100 * (a.accuracy["all"] - b.accuracy["all"]) for a, b in zip(runs, others, strict=True)]
    return t.ppf(0.975, len(runs) - 1) * np.std(differences, ddof=1) / math.sqrt(len(runs))


def _bootstrap_margin(generator, runs, others, draws=200):
    """Half of the width of the middle 95 % of means over drawn images and seeds."""
    tables = [
        np.array([[int(a) - int(b) for a, b in zip(run.test_hits[c], other.test_hits[c], strict=True)]
                  for run, other in zip(runs, others, strict=True)])
        for c in range(len(runs[0].test_hits))
    ]  # fmt: skip
    means = []
    for _ in range(draws):
        seeds = generator.integers(len(runs), size=len(runs))
        drawn = [table[seeds][:, generator.integers(table.shape[1], size=table.shape[1])].mean() for table in tables]
        means.append(100 * np.mean(drawn))
    low, high = np.quantile(means, [0.025, 0.975])
    return (high - low) / 2


def test_agreement_on_few_images_is_no_certainty():
    """Both methods are right on each of 12 images, and wrong or right elsewhere: the margin is not 0."""
    runs, others = ([run_of(name, seed, [[1] * 12]) for seed in (0, 1)] for name in "AB")
    found = Pair(runs, others).difference("all")
    # One pair of 14 that differs: a variance of 1 / 14 for an image, and 13 degrees of freedom.
    assert found == (0.0, pytest.approx(100 * t.ppf(0.975, 13) / 14), "no spread")


def better(images, seeds=3, wrong=0, **kwargs):
    """A method that is right everywhere, and one that is wrong everywhere but for its luck."""
    runs = [run_of("A", seed, [[1] * images], **kwargs) for seed in range(seeds)]
    others = [run_of("B", seed, [[1] * (seed % 2) + [0] * (images - seed % 2)]) for seed in range(seeds)]
    return runs, others


@pytest.mark.parametrize(
    ("images", "seeds", "doubt"),
    [(9, 3, "few images"), (10, 3, ""), (30, 1, ""), (1, 3, "few images"), (9, 1, "few images")],
)
def test_no_star_on_few_images_or_one_seed(images, seeds, doubt):
    found = Pair(*better(images, seeds)).difference("tail")
    assert found.doubt == doubt
    assert found.is_significant == (images == 10)
    assert math.isnan(found.margin) == (seeds == 1)
    assert str(found).endswith(f"({doubt})" if doubt else "*" if seeds > 1 else f"{found.mean:+.1f}")


def test_no_star_without_a_spread_over_seeds():
    runs, others = better(50)
    same = [run_of("B", seed, [[0] * 50]) for seed in range(3)]
    assert Pair(runs, others).difference("all").is_significant
    found = Pair(runs, same).difference("all")
    assert (found.mean, found.doubt, found.is_significant) == (100, "no spread", False)
    assert found.margin > 1
    # Rounding does not count as a spread.
    assert paired_difference({0: 0.1 + 0.2, 1: 0.3, 2: 0.3}, dict.fromkeys(range(3), 0.0)).doubt == "no spread"


@pytest.mark.parametrize("which", [0, 1])
def test_no_star_beside_runs_that_diverged(which):
    pair = better(50)
    pair[which][1].diverged = True
    found = Pair(*pair).difference("all")
    assert (found.doubt, found.is_significant) == ("1 diverged", False)
    # Only seeds that both have are compared.
    assert Pair(pair[which][1:2], pair[1 - which][:1]).difference("all").doubt == ""
    assert math.isnan(Pair(pair[which][1:2], pair[1 - which][:1]).difference("all").mean)


def test_images_whose_order_is_not_known_are_not_paired():
    generator = np.random.default_rng(3)
    runs, others = draw_runs(generator, [40, 20], 4)
    paired = Pair(runs, others).difference("all")
    for run in runs:
        run.test_hits = []
    found = Pair(runs, others).difference("all")
    assert found.mean == paired.mean
    # The methods find the same images hard, which is not known now.
    assert found.margin > paired.margin
    for c, number in enumerate((40, 20)):
        share = (sum(run.class_recalls[c] for run in runs) / 4 * number + 1) / (number + 2)
        assert binomial_variances(runs, np.array([40, 20]))[c] == pytest.approx(share * (1 - share) / (number + 2))


def test_runs_that_say_nothing_of_images_have_the_interval_over_seeds():
    runs, others = draw_runs(np.random.default_rng(4), [40, 20], 4)
    for run in (*runs, *others):
        run.test_images, run.test_hits = [], []
    assert Pair(runs, others).difference("all").margin == pytest.approx(_seeds_only(runs, others))
    # Nor can those be paired that were tested on other numbers of images.
    runs, others = draw_runs(np.random.default_rng(4), [40, 20], 4)
    others = [run_of("B", seed, [[1] * 39 + [0], [1] * (20 - seed)]) for seed in range(4)]
    assert Pair(runs, others).difference("all").margin == pytest.approx(_seeds_only(runs, others))


def test_a_group_that_is_not_tested_has_no_difference():
    runs, others = ([run_of(name, seed, [[1, 0] * 10, []], {"tail": "01"}) for seed in (0, 1)] for name in "AB")
    assert str(Pair(runs, others).difference("tail")) == "nan"
    assert not Pair(runs, others).difference("tail").is_significant
    assert paired_variances(runs, others)[1] == pytest.approx(0.25)
    assert str(Difference(math.nan, 3.0)) == "nan"
