"""Corrections after training: each formula beside its plain version and hand-computed numbers, in float64."""

import copy
import math
from functools import partial
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from helpers import STRICT, mlp
from scipy.optimize import minimize_scalar
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torchmetrics.functional.classification import multiclass_accuracy

from lightning_ssesam import ClassSplit, LongTailClassifier
from lightning_ssesam.data import ClassBalancedSampler
from lightning_ssesam.data.long_tailed import LongTailed
from lightning_ssesam.data.unaugmented import unaugmented
from lightning_ssesam.errors import ArgumentError
from lightning_ssesam.losses import (
    BalancedSoftmaxLoss,
    ClassBalancedLoss,
    FocalLoss,
    LDAMLoss,
    LogitAdjustedLoss,
    VSLoss,
)
from lightning_ssesam.models import NormalizedLinear
from lightning_ssesam.posthoc import (
    METHODS,
    BalancedTraining,
    Evidence,
    Outputs,
    TauChoice,
    collect_outputs,
    find_correction,
    fit_scales,
    fit_temperature,
    group_recalls,
    logit_shift,
    retrained,
    tau_normalized,
)
from lightning_ssesam.posthoc.choosing import probabilities_of
from lightning_ssesam.posthoc.methods import balanced_already
from lightning_ssesam.posthoc.outputs import classifier_of

pytestmark = [STRICT, pytest.mark.usefixtures("float64")]

COUNTS = [50, 40, 30, 6, 5]
SPLIT = ClassSplit(COUNTS, tail=[3, 4], many_above=35, few_below=20)
SHORT = BalancedTraining(steps=7, batch_size=6, lr=0.3, momentum=0.8, weight_decay=0.01, seed=3)


def close(actual, expected, atol=1e-12):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=0, atol=atol)


def samples(number=40):
    return torch.randn(number, 8), torch.arange(number) % 5


class TestLogitShift:
    def test_by_hand(self):
        close(logit_shift([75, 25]), [math.log(4 / 3), math.log(4)])
        close(logit_shift([75, 25], tau=0.5), [0.5 * math.log(4 / 3), math.log(2)])
        close(logit_shift([9, 3, 1], tau=0.0), [0.0, 0.0, 0.0])

    def test_probabilities_are_divided_by_the_priors(self):
        logits = torch.randn(30, 5)
        naive = logits.softmax(1) / (torch.tensor(COUNTS) / sum(COUNTS)) ** 1.5
        close((logits + logit_shift(SPLIT, 1.5)).softmax(1), naive / naive.sum(1, keepdim=True))

    def test_a_class_without_samples_is_not_preferred(self):
        split = ClassSplit([6, 0, 2], tail=[1, 2], allow_empty=True)
        close(logit_shift(split), [math.log(8 / 6), math.log(8 / 6), math.log(4)])

    @pytest.mark.parametrize(
        ("counts", "tau", "name"), [([3, 0], 1.0, "class_counts"), ([3, 1], -1, "tau"), ([3, 1], math.inf, "tau")]
    )
    def test_wrong(self, counts, tau, name):
        with pytest.raises(ArgumentError, match=f"`{name}`|{name}"):
            logit_shift(counts, tau)


class TestTauNormalized:
    @pytest.mark.parametrize("tau", [0.0, 0.4, 1.0, 2.0])
    def test_equals_its_naive_twin(self, tau):
        weight = torch.randn(5, 8)
        rows = [[value / math.sqrt(sum(v * v for v in row)) ** tau for value in row] for row in weight.tolist()]
        close(tau_normalized(weight, tau), rows)

    def test_by_hand(self):
        close(tau_normalized(torch.tensor([[3.0, 4.0], [0.0, 0.25]]), 0.5), [[3 / 5**0.5, 4 / 5**0.5], [0.0, 0.5]])

    def test_a_row_of_zeros_stays(self):
        close(tau_normalized(torch.tensor([[0.0, 0.0], [0.0, 2.0]])), [[0.0, 0.0], [0.0, 1.0]])


class TestTemperature:
    def test_by_hand(self):
        """Three of four are right with a logit that is 2 higher: softmax(2 / T) = 3/4, so T = 2 / log 3."""
        logits = torch.tensor([[2.0, 0.0]]).repeat(4, 1)
        assert fit_temperature(logits, torch.tensor([0, 0, 0, 1])) == pytest.approx(2 / math.log(3), rel=1e-8)

    @pytest.mark.parametrize("unit", [0.03, 1.0, 200.0])
    def test_equals_a_search_by_scipy(self, unit):
        targets = torch.arange(60) % 5
        logits = unit * (torch.randn(60, 5) + 1.5 * F.one_hot(targets))
        naive = minimize_scalar(
            lambda t: float(F.cross_entropy(logits / (unit * math.exp(t)), targets)), (-2, 2), tol=1e-12
        )
        assert fit_temperature(logits, targets) == pytest.approx(unit * math.exp(naive.x), rel=1e-6)

    def test_ignored_targets_do_not_count(self):
        logits, targets = torch.tensor([[2.0, 0.0]]).repeat(6, 1), torch.tensor([0, 0, 0, 1, -100, -100])
        assert fit_temperature(logits, targets) == pytest.approx(2 / math.log(3), rel=1e-8)

    @pytest.mark.parametrize(
        ("logits", "targets", "message"),
        [
            ([[2.0, 0.0], [0.0, 1.0]], [0, 1], "classified right"),
            ([[2.0, 0.0], [0.0, 1.0]], [1, 0], "better than chance"),
            ([[1.0, 1.0], [1.0, 1.0]], [0, 1], "classified right"),
            ([[math.nan, 0.0], [0.0, 1.0]], [1, 0], "`logits` to be finite"),
            ([[2.0, 0.0], [0.0, 1.0]], [1, 2], "`targets` to be class indices"),
            ([[2.0, 0.0], [0.0, 1.0]], [1], "`targets` to be class indices of shape"),
            ([2.0, 0.0], [1, 0], "`logits` to be of shape"),
        ],
    )
    def test_wrong(self, logits, targets, message):
        with pytest.raises(ArgumentError, match=message):
            fit_temperature(torch.tensor(logits), torch.tensor(targets))


def naive_training(parameters, gradients, targets, training):
    """SGD with momentum, weight decay and a cosine, written out; the draws are those of the sampler."""
    parameters, velocity = [p.clone() for p in parameters], [torch.zeros_like(p) for p in parameters]
    sampler = ClassBalancedSampler(targets, num_samples=training.batch_size, seed=training.seed)
    for step in range(training.steps):
        sampler.set_epoch(step)
        rate = training.lr * (1 + math.cos(math.pi * step / training.steps)) / 2
        found = gradients(parameters, torch.tensor(list(sampler)))
        for p, v, g in zip(parameters, velocity, found, strict=True):
            v.mul_(training.momentum).add_(g + training.weight_decay * p)
            p.sub_(rate * v)
    return parameters


def error_of(logits, targets):
    """The gradient of the mean cross-entropy with respect to the logits."""
    return (logits.softmax(1) - F.one_hot(targets, logits.shape[1])) / len(targets)


def test_lws_equals_its_naive_twin():
    logits, targets = torch.randn(40, 5), torch.arange(40) % 5

    def gradients(parameters, index):
        return [(error_of(logits[index] * parameters[0], targets[index]) * logits[index]).sum(0)]

    (expected,) = naive_training([torch.ones(5)], gradients, targets, SHORT)
    assert (expected - 1).abs().min() > 0.01
    close(fit_scales(logits, targets, SHORT), expected)


@pytest.mark.parametrize("logit_scale", [1.0, 5.0])
def test_crt_equals_its_naive_twin(logit_scale):
    layer, (features, targets) = nn.Linear(8, 5), samples()
    before = copy.deepcopy(layer.state_dict())
    with torch.random.fork_rng():
        torch.manual_seed(SHORT.seed)
        start = nn.Linear(8, 5)

    def gradients(parameters, index):
        weight, bias = parameters
        error = logit_scale * error_of(logit_scale * (features[index] @ weight.T + bias), targets[index])
        return [error.T @ features[index], error.sum(0)]

    expected = naive_training([start.weight.detach(), start.bias.detach()], gradients, targets, SHORT)
    state = torch.get_rng_state()
    new = retrained(layer, features, targets, SHORT, logit_scale)
    assert torch.equal(state, torch.get_rng_state())
    for actual, value in zip([new.weight.detach(), new.bias.detach()], expected, strict=True):
        close(actual, value)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_balanced_batches_make_up_for_the_class_sizes():
    """On features that say nothing, the new classifier predicts every class with the same probability."""
    features, targets = torch.zeros(131, 3), torch.repeat_interleave(torch.arange(5), torch.tensor(COUNTS))
    new = retrained(nn.Linear(3, 5), features, targets, BalancedTraining(steps=300, batch_size=256))
    close(new(features[:1]).softmax(1), torch.full((1, 5), 0.2), atol=0.02)


def test_ignored_samples_are_not_drawn():
    logits, targets = torch.randn(40, 5), torch.arange(40) % 5
    kept = fit_scales(logits[:35], targets[:35], SHORT)
    close(fit_scales(logits, torch.cat([targets[:35], torch.full((5,), -100)]), SHORT), kept)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"steps": 0}, "steps"),
        ({"batch_size": 1.5}, "batch_size"),
        ({"lr": 0}, "lr"),
        ({"momentum": 1}, "momentum"),
        ({"weight_decay": -1}, "weight_decay"),
        ({"seed": -1}, "seed"),
    ],
)
def test_wrong_training(arguments, name):
    with pytest.raises(ArgumentError, match=f"`{name}`"):
        BalancedTraining(**arguments)


def test_a_training_that_diverges():
    with pytest.raises(ArgumentError, match=r"`lr` to be a rate at which .* but got 1e\+200"):
        fit_scales(1e200 * torch.randn(40, 5), torch.arange(40) % 5, BalancedTraining(steps=5, lr=1e200))


def recalls_by(values):
    def recalls(tau):
        head, tail = values[tau]
        return {"head": head, "tail": tail, "all": (head + tail) / 2}

    return recalls


class TestTauChoice:
    VALUES: ClassVar = {0.0: (0.9, 0.1), 0.5: (0.88, 0.3), 1.0: (0.85, 0.4), 1.5: (0.6, 0.62), 2.0: (0.3, 0.9)}
    TAUS = tuple(VALUES)

    @pytest.mark.parametrize(
        ("options", "best"),
        [
            ({}, 1.0),
            ({"criterion": "tail"}, 1.0),
            ({"criterion": "tail", "head_drop": 0.03}, 0.5),
            ({"criterion": "tail", "head_drop": 0.0}, 0.0),
            ({"criterion": "tail", "head_drop": 1.0}, 2.0),
        ],
    )
    def test_by_hand(self, options, best):
        recalls = recalls_by(self.VALUES)
        assert TauChoice(self.TAUS, **options).best(recalls, recalls(0.0)) == best

    def test_the_smallest_of_equal_ones(self):
        recalls = recalls_by({0.0: (0.5, 0.5), 1.0: (0.6, 0.6), 2.0: (0.6, 0.6)})
        assert TauChoice((0.0, 1.0, 2.0)).best(recalls, recalls(0.0)) == 1.0

    def test_where_each_tau_costs_the_head_too_much_the_least_is_taken(self):
        recalls = recalls_by({0.5: (0.5, 0.9), 1.0: (0.7, 0.2)})
        assert TauChoice((0.5, 1.0), "tail").best(recalls, {"head": 0.9, "tail": 0.1, "all": 0.5}) == 1.0

    def test_a_single_one_is_taken(self):
        assert TauChoice([0.7]).best(lambda tau: pytest.fail("was measured"), {}) == 0.7

    @pytest.mark.parametrize(("criterion", "group"), [("tail", "tail"), ("tail", "head"), ("recall", "all")])
    def test_nothing_to_choose_by(self, criterion, group):
        recalls = {"head": 0.5, "tail": 0.5, "all": 0.5, group: math.nan}
        with pytest.raises(ArgumentError, match=f"no sample of the group '{group}'"):
            TauChoice((0.0, 1.0), criterion).best(lambda tau: recalls, recalls)

    @pytest.mark.parametrize(
        ("arguments", "name"),
        [
            ({"taus": []}, "taus"),
            ({"taus": [1.0, 0.5]}, "taus"),
            ({"taus": [-1.0]}, "taus"),
            ({"criterion": "head"}, "criterion"),
            ({"head_drop": 2}, "head_drop"),
        ],
    )
    def test_wrong(self, arguments, name):
        with pytest.raises(ArgumentError, match=f"`{name}`"):
            TauChoice(**arguments)


def convolutional():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 6), nn.Linear(6, 5)
    )


class TestCollectOutputs:
    def test_equals_a_plain_loop(self):
        network, images, targets = convolutional(), torch.randn(21, 1, 6, 6), torch.arange(21) % 5
        network(images)
        network[1].eval()
        targets[4] = 255
        modes, state = [m.training for m in network.modules()], copy.deepcopy(network.state_dict())
        loader = DataLoader(TensorDataset(images, targets), batch_size=8)
        outputs = collect_outputs(network, loader, mirror=True, ignore_index=255)
        assert [m.training for m in network.modules()] == modes
        assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
        plain, kept = network.eval(), targets != 255
        with torch.no_grad():
            for found, x in ((outputs, images[kept]), (outputs.mirrored, images[kept].flip(-1))):
                close(found.logits, plain(x))
                close(found.features, plain[:-1](x))
                assert torch.equal(found.targets, targets[kept])
        assert not network[-1]._forward_hooks
        close(probabilities_of(outputs), (outputs.logits.softmax(1) + outputs.mirrored.logits.softmax(1)) / 2)

    def test_no_features_where_the_logits_are_made_of_something_else(self):
        class Scaled(nn.Module):
            def __init__(self, factor):
                super().__init__()
                self.net, self.factor = mlp(), factor

            def forward(self, x):
                return self.factor * self.net(x)

        x, y = samples()
        assert collect_outputs(Scaled(2), [(x, y)]).features is None
        assert collect_outputs(Scaled(1), [(x, y)]).features.shape == (40, 16)
        layer = nn.Linear(8, 8)
        assert collect_outputs(nn.Sequential(layer, layer), [(x, y)]).features is None

    def test_half_precision_becomes_single(self):
        x, y = samples()
        outputs = collect_outputs(mlp().bfloat16(), [(x.bfloat16(), y)])
        assert outputs.logits.dtype == outputs.features.dtype == torch.float32

    @pytest.mark.parametrize(
        ("batch", "message"),
        [
            (torch.randn(4, 8), "pairs of two tensors"),
            ((torch.randn(4, 8), torch.randn(4, 5).softmax(1)), "class indices"),
            ((torch.randn(4, 8).double(), torch.full((4,), -100)), "at least one sample"),
        ],
    )
    def test_wrong_batches(self, batch, message):
        network = mlp()
        with pytest.raises(ArgumentError, match=f"`batches` to be .*{message}"):
            collect_outputs(network, [batch])
        assert network.training
        assert not network[-1]._forward_hooks

    def test_no_batches(self):
        with pytest.raises(ArgumentError, match="at least one sample"):
            collect_outputs(mlp(), [])

    def test_dense_logits(self):
        with pytest.raises(ArgumentError, match=r"logits \(3, C\) for 3 samples, but got \(3, 5, 4, 4\)"):
            collect_outputs(nn.Conv2d(1, 5, 1), [(torch.randn(3, 1, 4, 4), torch.arange(3))])


def tied():
    network = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    network[1].weight = network[0].weight
    return network


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (lambda: nn.Sequential(nn.Conv2d(1, 5, 1), nn.Flatten()), "has no linear layer"),
        (lambda: nn.Sequential(weight_norm(nn.Linear(8, 5))), "are computed"),
        (tied, "shares its weights: '0' and '1'"),
    ],
)
def test_no_classifier_to_change(network, message):
    with pytest.raises(ArgumentError, match=message):
        classifier_of(network())


def test_group_recalls():
    targets = torch.tensor([0, 0, 1, 2, 3, 3, 4, 4])
    predicted = torch.tensor([0, 1, 1, 2, 3, 0, 0, 0])
    found = group_recalls(Outputs(F.one_hot(predicted, 5).double(), targets), SPLIT)
    expected = {"head": 2.5 / 3, "tail": 0.25, "many": 0.75, "medium": 1.0, "few": 0.25, "all": 3 / 5}
    assert found == pytest.approx(expected)
    with pytest.raises(ArgumentError, match="5 logits, but the split has 2 classes"):
        group_recalls(Outputs(F.one_hot(predicted, 5).double(), targets), ClassSplit([3, 1], tail=[1]))


def classifier(network=None, loss=None, **kwargs):
    network = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 5)) if network is None else network
    return LongTailClassifier(COUNTS, network, loss=loss, tail_below=10, many_above=35, **kwargs)


def evidence_of(model, **changes):
    torch.manual_seed(1)
    x = torch.randn(60, 8)
    with torch.no_grad():
        # It is right more often than not.
        y = (model(x) + 0.2 * torch.randn(60, 5)).argmax(1)
    val, train = collect_outputs(model.backbone, [(x, y)]), collect_outputs(model.backbone, [samples(131)])
    options = {"choice": TauChoice(), "training": SHORT, **changes}
    return Evidence(model.backbone, model.split, val, lambda: train, model.loss, **options), x, y


@pytest.mark.parametrize("method", METHODS)
def test_the_corrected_classifier_has_the_outputs_that_were_measured(method):
    model = classifier()
    evidence, x, y = evidence_of(model)
    before = copy.deepcopy(model.state_dict())
    correction = find_correction(method, evidence)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    measured = correction(evidence.val)
    correction.apply_to(model)
    close(model(x).detach(), measured.logits, atol=1e-6)
    assert not torch.allclose(measured.logits, evidence.val.logits, atol=1e-4)
    assert torch.equal(measured.targets, y)
    trunk = [name for name in before if not name.startswith("backbone.2")]
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in trunk)


def test_each_method_is_its_formula():
    model = classifier()
    evidence, x, y = evidence_of(model, choice=TauChoice([0.7]))
    found = {name: find_correction(name, evidence) for name in METHODS}
    logits, features, layer = evidence.val.logits, evidence.val.features, model.backbone[2]
    close(found["logit_adjustment"](evidence.val).logits, logits + logit_shift(COUNTS, 0.7))
    close(found["tau_norm"](evidence.val).logits, features @ tau_normalized(layer.weight, 0.7).T)
    train = evidence.train()
    close(found["lws"](evidence.val).logits, logits * fit_scales(train.logits, train.targets, SHORT))
    close(found["crt"](evidence.val).logits, retrained(layer, train.features, train.targets, SHORT)(features).detach())
    close(found["temperature"](evidence.val).logits, logits / fit_temperature(logits, y))
    assert found["tau_norm"].values == found["logit_adjustment"].values == {"tau": 0.7}
    assert str(found["tau_norm"]) == "tau_norm, tau 0.7"
    assert torch.equal(x, evidence_of(model)[1])


def test_tau_is_the_one_with_the_highest_mean_recall():
    model = classifier()
    with torch.no_grad():
        model.backbone[2].bias.add_(2 * torch.tensor(COUNTS).log())
    evidence, _, y = evidence_of(model)
    for name, corrected in {
        "logit_adjustment": lambda tau: evidence.val.logits + logit_shift(COUNTS, tau),
        "tau_norm": lambda tau: evidence.val.features @ tau_normalized(model.backbone[2].weight, tau).T,
    }.items():
        recalls = [
            float(multiclass_accuracy(corrected(number / 10), y, num_classes=5, average="macro"))
            for number in range(21)
        ]
        assert find_correction(name, evidence).values["tau"] == recalls.index(max(recalls)) / 10
        assert max(recalls) > recalls[0] or name == "tau_norm"


def test_logits_that_a_loss_multiplies():
    """The cosines of LDAM are 30 times as large in its loss: so the summands are 30 times as small."""
    model = classifier(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), NormalizedLinear(16, 5)), LDAMLoss(scale=30.0))
    evidence, *_ = evidence_of(model, choice=TauChoice([1.0]))
    close(find_correction("logit_adjustment", evidence).shift, logit_shift(COUNTS) / 30)
    train = evidence.train()
    close(find_correction("lws", evidence).scale, fit_scales(30 * train.logits, train.targets, SHORT))
    new = retrained(model.backbone[2], train.features, train.targets, SHORT, 30.0)
    close(find_correction("crt", evidence).layer.weight.detach(), new.weight.detach())
    with pytest.raises(ArgumentError, match="a NormalizedLinear normalises its weights itself"):
        find_correction("tau_norm", evidence)


def test_a_new_layer_takes_the_place_of_an_earlier_correction():
    model = classifier()
    evidence, x, _ = evidence_of(model)
    find_correction("logit_adjustment", evidence).apply_to(model)
    crt = find_correction("crt", evidence)
    crt.apply_to(model)
    assert model.correction is None
    close(model(x).detach(), crt(evidence.val).logits, atol=1e-6)


@pytest.mark.parametrize("method", ["tau_norm", "crt"])
def test_methods_that_need_features(method):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            return 2 * self.net(x)

    evidence, *_ = evidence_of(classifier(Scaled()))
    with pytest.raises(ArgumentError, match="not the outputs of its last linear layer"):
        find_correction(method, evidence)
    assert find_correction("lws", evidence).scale.shape == (5,)


def test_no_such_method():
    with pytest.raises(ArgumentError, match="`method` to be one of 'logit_adjustment', "):
        find_correction("mix", evidence_of(classifier())[0])


@pytest.mark.parametrize(
    ("loss", "found"),
    [
        (None, ""),
        (nn.CrossEntropyLoss(reduction="none"), ""),
        (FocalLoss(), ""),
        (LogitAdjustedLoss(COUNTS, tau=0.0), ""),
        (VSLoss(COUNTS, gamma=0.0, tau=0.0), ""),
        (LDAMLoss(COUNTS, max_margin=0.0), ""),
        (FocalLoss(weight=[2.0] * 5), ""),
        (LogitAdjustedLoss(COUNTS), "its loss LogitAdjustedLoss"),
        (BalancedSoftmaxLoss(COUNTS), "its loss BalancedSoftmaxLoss"),
        (VSLoss(COUNTS, tau=0.0), "its loss VSLoss"),
        (LDAMLoss(COUNTS), "its loss LDAMLoss"),
        (ClassBalancedLoss(COUNTS), "the class weights of its loss ClassBalancedLoss"),
        (nn.CrossEntropyLoss(torch.arange(5.0)), "the class weights of its loss CrossEntropyLoss"),
    ],
)
def test_what_has_made_up_for_the_class_sizes(loss, found):
    assert balanced_already(loss) == found
    assert balanced_already(loss, ClassBalancedSampler) == (found or "the sampler of its training set")


class Transformed(Dataset):
    def __init__(self, number, transform):
        self.targets, self.transform = torch.arange(number) % 3, transform

    def __getitem__(self, index):
        return self.transform(torch.full((2,), float(index))), int(self.targets[index])

    def __len__(self):
        return len(self.targets)


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: Subset(s, [5, 2, 7]), partial(LongTailed, imbalance_factor=4)])
@pytest.mark.parametrize("wrap_test", [lambda s: s, lambda s: Subset(s, [0, 1])])
def test_training_images_without_augmentation(wrap, wrap_test):
    train, test = wrap(Transformed(12, lambda x: -x)), wrap_test(Transformed(6, lambda x: 10 * x))
    loader = DataLoader(train, batch_size=2, shuffle=True)
    images, targets = zip(*unaugmented(loader, DataLoader(test, batch_size=4)), strict=True)
    assert len(images[0]) == min(4, len(train))
    expected = [train[index] for index in range(len(train))]
    close(torch.cat(images), torch.stack([-10 * image for image, _ in expected]))
    assert torch.cat(targets).tolist() == [target for _, target in expected]


def test_training_images_of_another_kind_stay():
    train = TensorDataset(torch.randn(6, 2), torch.arange(6) % 3)
    plain = unaugmented(DataLoader(train, batch_size=4, shuffle=True), DataLoader(Transformed(6, torch.neg)))
    close(torch.cat([images for images, _ in plain]), train.tensors[0])
    batches = [(torch.randn(2, 2), torch.arange(2))]
    assert unaugmented(batches, None) is batches
