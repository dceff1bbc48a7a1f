"""Multi-label data, (N, C) targets of 0 and 1: the split, every objective beside its plain version, training steps."""

import copy

import pytest
import torch
import torch.nn.functional as F
import twins
from helpers import OBJECTIVES, STRICT, Automatic, Model, ThreeRadii, choose, fit, mlp, stage_2, trainer
from lightning.pytorch.callbacks import Callback
from test_family import METHODS, OPTIMIZERS
from torch import nn
from twins import Twin, layered

from lightning_ssesam import CCSAM, ERM, SAM, SSESAM, ClassSplit, CurvatureMonitor, FocalSAM, ImbSAM, Staged
from lightning_ssesam.batches import terms_of_union
from lightning_ssesam.curvature import choose_samples, measure_curvature
from lightning_ssesam.engine import MicroBatch, SharpnessEngine

pytestmark = STRICT

COUNTS = [50, 40, 30, 6, 0]
SPLIT = ClassSplit(COUNTS, tail=[3, 4], multi_label=True)
MISSING = -100


def labels(n=24, missing=0.0, ignore_index=MISSING):
    """Some samples have no label, some have labels of head and tail."""
    y = (torch.rand(n, 5) < 0.4).long()
    y[0] = 0
    return y.masked_fill(torch.rand(n, 5) < missing, ignore_index)


def columns(y, ignore_index=MISSING):
    """The label of each position, one after the other."""
    return torch.tensor(
        [[ignore_index if v == ignore_index else c for c, v in enumerate(row)] for row in y.long().tolist()]
    )


# The split.


def test_split_counts_positives_and_may_have_labels_without_any():
    y = torch.tensor([[1, 0, 1, 0], [1, 1, -100, 0], [1, -100, 0, 0]])
    split = ClassSplit.from_labels(y, multi_label=True, tail_below=2)
    assert split.class_counts.tolist() == [3, 1, 1, 0]
    assert split.tail.tolist() == [False, True, True, True]
    assert (split.multi_label, split.num_samples) == (True, 3)
    for kind in (torch.float32, torch.bool, torch.uint8):
        full = y.clamp(min=0)
        assert ClassSplit.from_labels(full.to(kind), multi_label=True, tail=[3]).class_counts.tolist() == [3, 1, 1, 0]
    assert repr(split) == "ClassSplit(num_classes=4, labels=5, tail=[1, 2, 3], multi_label=True)"
    # The rarest labels whose 2 of 5 yeses are at most 40 %.
    fraction = ClassSplit.from_counts([3, 1, 1, 0], tail_fraction=0.4, multi_label=True)
    assert fraction.tail.tolist() == [False, True, True, True]
    assert ClassSplit([3, 1], tail=[1]).multi_label is False


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ClassSplit([3, -1], [1], multi_label=True), "integers >= 0 for every class, but got -1 for class 1"),
        (lambda: ClassSplit([0, 0], [1], multi_label=True), "`class_counts` to be more than 0 for some class"),
        (lambda: ClassSplit([3, 1], [1], multi_label=1), "`multi_label` to be True or False, but got 1"),
        (lambda: ClassSplit([3, 1], [1], num_samples=5), "`num_samples` to be None without multi_label=True"),
        (lambda: ClassSplit([3, 1], [1], multi_label=True, num_samples=2), "`num_samples` to be an integer >= 3"),
        (
            lambda: ClassSplit.from_labels([0, 1], multi_label=True, tail=[0]),
            r"multi-label targets \(N, 0\).*shape \(2,",
        ),
        (lambda: ClassSplit.from_labels([[0, 2]], multi_label=True, tail=[0]), "0, 1 and -100 .*, but got values such"),
        (lambda: ClassSplit.from_labels([[0, 1]], 3, multi_label=True, tail=[0]), r"\(N, 3\) of .*shape \(1, 2\)"),
    ],
)
def test_bad_splits(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# The objectives.


def naive_terms(name, y):
    """The weights of each term for every sample and label, one at a time, and its radius."""
    tail_labels, number = {3, 4}, sum(v != MISSING for row in y.tolist() for v in row)

    def weights(wanted, factor=1.0, total=None):
        chosen = [[float(v != MISSING and wanted(c)) for c, v in enumerate(row)] for row in y.tolist()]
        total = sum(map(sum, chosen)) if total is None else total
        return torch.tensor([[factor * w / total for w in row] for row in chosen])

    everything = weights(lambda c: True, total=number)
    head = weights(lambda c: c not in tail_labels, total=number)
    tail = weights(lambda c: c in tail_labels, total=number)
    head_mean = weights(lambda c: c not in tail_labels)
    tail_mean = weights(lambda c: c in tail_labels)
    return {
        "ERM": [(everything, 0.0)],
        "SAM": [(everything, 0.05)],
        "ImbSAM": [(head, 0.0), (tail, 0.05)],
        "ImbSAM double": [(head, 0.0), (2 * tail, 0.05)],
        "ImbSAM group": [(head_mean, 0.0), (tail_mean, 0.05)],
        "SSESAM 1": [(head, 0.05), (tail, 0.1)],
        "SSESAM 2": [(head, 0.0), (tail, 0.1)],
        "SSESAM joint 1": [(everything, 0.05)],
        "SSESAM joint 2": [(head, 0.0), (tail, 0.1)],
        "SSESAM head_rho=0": [(head, 0.0), (tail, 0.1)],
    }[name]


def bce(net, x, y, ignore_index=MISSING):
    missing = y == ignore_index
    losses = F.binary_cross_entropy_with_logits(net(x), y.masked_fill(missing, 0).to(x.dtype), reduction="none")
    return losses.masked_fill(missing, 0.0)


def naive_gradient(net, terms, x, y):
    """The definition: the gradient of each term at its own ascended weights."""
    net = copy.deepcopy(net)
    params, clean = list(net.parameters()), [p.detach().clone() for p in net.parameters()]
    total = [torch.zeros_like(p) for p in params]
    for weights, rho in terms:
        gradient = torch.autograd.grad((weights * bce(net, x, y)).sum(), params)
        norm = torch.sqrt(sum((g**2).sum() for g in gradient))
        with torch.no_grad():
            for p, g in zip(params, gradient, strict=True):
                p.add_(rho * g / norm if norm > 0 else 0 * g)
        gradient = torch.autograd.grad((weights * bce(net, x, y)).sum(), params)
        with torch.no_grad():
            for p, value in zip(params, clean, strict=True):
                p.copy_(value)
        total = [t + g for t, g in zip(total, gradient, strict=True)]
    return total


def bound(objective):
    stage, objective = objective.stage, copy.copy(objective)
    objective.bind(SPLIT)
    objective.stage = stage
    return objective


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "own"])
@pytest.mark.parametrize("missing", [0.0, 0.3])
@pytest.mark.parametrize("passes", ["full", "split"])
def test_objective_equals_its_naive_twin(name, missing, passes):
    net, x, y, objective = mlp(), torch.randn(24, 8), labels(missing=missing), bound(OBJECTIVES[name]())
    if missing:
        # One sample has labels of the head alone, one of the tail alone, one none.
        y[1, 3:], y[2, :3], y[3] = MISSING, MISSING, MISSING
    terms, expected = objective.terms(y), naive_terms(name, y)
    assert [rho for _, rho, _ in terms] == [rho for _, rho in expected]
    for (weights, _, _), (hand_made, _) in zip(terms, expected, strict=True):
        torch.testing.assert_close(weights, hand_made, rtol=0, atol=1e-16)

    def sample_losses(index, is_clean):
        return bce(net, x, y) if index is None else bce(net, x[index], y[index])

    ours = SharpnessEngine()
    part = MicroBatch(sample_losses, terms, objective.find_ignored(y))
    loss = ours.compute([part], net.parameters(), net, passes=passes).loss
    torch.testing.assert_close(
        [p.grad for p in net.parameters()], naive_gradient(net, expected, x, y), rtol=0, atol=1e-14
    )
    torch.testing.assert_close(loss, bce(net, x, y).sum() / (y != MISSING).sum(), rtol=0, atol=1e-14)


class MultiLabelTwin(Twin):
    """The plain network of `twins.py`, whose targets are the labels of the positions."""

    answers = None

    def losses(self, x, y):
        return bce(self.net, x, self.answers)

    def mean(self, y):
        ignored = y == MISSING
        return (~ignored).double() / int((~ignored).sum()), ignored


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("method", [name for name in METHODS if "CCSAM" not in name])
def test_family_equals_its_naive_twin(method):
    objective, plain = copy.copy(METHODS[method][0]), METHODS[method][1]
    # The counts of the twins.
    objective.bind(ClassSplit(twins.COUNTS, tail=[3, 4], multi_label=True))
    net = layered()
    twin = MultiLabelTwin(copy.deepcopy(net), OPTIMIZERS["sgd"])
    optimizer, engine = OPTIMIZERS["sgd"](list(net.parameters())), SharpnessEngine()
    for missing in (0.0, 0.4, 0.2):
        x, y = torch.randn(12, 8), labels(12, missing)

        def sample_losses(index, is_clean, x=x, y=y):
            return bce(net, x, y) if index is None else bce(net, x[index], y[index])

        part = MicroBatch(sample_losses, objective.terms(y), objective.find_ignored(y))
        engine.compute([part], net.parameters(), net, objective=objective, optimizer=optimizer, passes="split")
        optimizer.step()
        optimizer.zero_grad()
        twin.answers = y
        twin.step(plain(twin, x, columns(y)))
        torch.testing.assert_close(list(net.parameters()), list(twin.params), rtol=0, atol=1e-13)


def test_class_conditional_sam_is_refused():
    with pytest.raises(
        ValueError, match=r"without `multi_label`, as CCSAM perturbs .* one class at a time, but got Cla"
    ):
        CCSAM(SPLIT)
    with pytest.raises(ValueError, match="as CCSAM perturbs"):
        Staged([ERM(), CCSAM()]).bind(SPLIT)
    other = ClassSplit([50, 40, 30, 6, 5], tail=[3, 4])
    single = ClassSplit([50, 40, 30, 6, 5], tail=[3, 4], multi_label=True)
    with pytest.raises(ValueError, match="`split` to be the same for all objectives"):
        Staged([SSESAM(other), SSESAM(single)])


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float16, torch.float64])
def test_all_dtypes_of_answers_give_the_same_terms(dtype):
    y = labels()
    for objective in (SSESAM(SPLIT), FocalSAM(SPLIT)):
        for term, expected in zip(objective.terms(y.to(dtype)), objective.terms(columns(y)), strict=True):
            assert torch.equal(term.weights, expected.weights)
    assert bound(SAM()).find_ignored(y.to(dtype)) is None
    if dtype != torch.bool:
        some = labels(missing=0.3)
        given = some.to(torch.float32 if dtype == torch.uint8 else dtype)
        assert torch.equal(bound(SAM()).find_ignored(given), some == MISSING)
    # Yes may be a probability.
    assert torch.equal(SSESAM(SPLIT).terms(0.9 * y.double())[1].weights, SSESAM(SPLIT).terms(y)[1].weights)


@pytest.mark.parametrize(("ignore_index", "dtype"), [(-1, torch.int8), (255, torch.uint8), (-100, torch.bfloat16)])
def test_another_target_may_be_that_of_missing_labels(ignore_index, dtype):
    y = labels(missing=0.3, ignore_index=ignore_index).to(dtype)
    expected = SSESAM(SPLIT).terms(columns(y, ignore_index).masked_fill(y.long() == ignore_index, MISSING))
    for term, other in zip(SSESAM(SPLIT, ignore_index=ignore_index).terms(y), expected, strict=True):
        assert torch.equal(term.weights, other.weights)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.zeros(4, 6), r"multi-label targets \(N, 5\) of 0, 1 and -100 \(missing\), but got shape \(4, 6\)"),
        (torch.zeros(4, dtype=torch.long), r"\(N, 5\) .*, but got shape \(4,\) of torch.int64"),
        (torch.zeros(4, 5, 2), r"but got shape \(4, 5, 2\)"),
        (torch.full((1, 5), 2), "but got values such as 2"),
        # In 8 bits without a sign, it is -100.
        (torch.full((1, 5), 156, dtype=torch.uint8), "but got values such as 156"),
        (torch.tensor([[0.0, 1.0, 0.5, -1.0, 0.0]]), "but got values such as -1"),
        (torch.full((1, 5), float("nan")), "but got values such as nan"),
        (torch.tensor([[0, 1, 2, 3, 3]]), "but got values such as 2"),
        ([[0, 1, 0, 1, 0]], "`targets` to be a tensor"),
    ],
)
def test_bad_targets(targets, message):
    for objective in (SSESAM(SPLIT), bound(SAM()), FocalSAM(SPLIT)):
        with pytest.raises(ValueError, match=message):
            objective.terms(targets)


@pytest.mark.parametrize("ignore_index", [0, 1, 4])
def test_missing_labels_need_a_target_of_their_own(ignore_index):
    message = rf"`ignore_index` to be an integer outside \[0, 5\) for multi-label targets, but got {ignore_index}"
    with pytest.raises(ValueError, match=message):
        SSESAM(SPLIT, ignore_index=ignore_index).terms(labels())


# Parts of an update, and processes.


@pytest.mark.parametrize("objective", [SSESAM(SPLIT), ImbSAM(SPLIT, reduction="group"), FocalSAM(SPLIT), bound(SAM())])
def test_terms_of_several_batches_and_processes(objective):
    y = [labels(5, 0.2), labels(3).double(), labels(4, 0.5)]
    whole = objective.terms(torch.cat([part.long() for part in y]))
    parts = terms_of_union(objective, [objective.positions(part) for part in y])
    for number, term in enumerate(whole):
        assert torch.equal(torch.cat([part[number].weights for part in parts]), term.weights)
    # Another process has the first batch, and this one the other two.
    flat = objective.positions(y[0]).flatten()
    parts = terms_of_union(objective, [objective.positions(part) for part in y[1:]], lambda own: ([flat, own], 1))
    for number, term in enumerate(whole):
        assert torch.equal(torch.cat([part[number].weights for part in parts]), 2 * term.weights[5:])
    # A process without a sample.
    (empty,) = terms_of_union(objective, [objective.positions(y[0][:0])], lambda own: ([own, own], 1))
    assert [term.weights.shape for term in empty] == [(0, 5)] * len(whole)


# Training steps.


class MultiLabel(Model):
    def sample_losses(self, batch):
        return bce(self.net, *batch)


def batches(number=6, **kwargs):
    return [(torch.randn(10, 8), labels(10, **kwargs)) for _ in range(number)]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("passes", ["full", "split", "auto"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("as_float", [False, True])
def test_steps_equal_a_plain_loop(passes, accumulate, as_float):
    data = batches(missing=0.2)
    given = [(x, y.double() if as_float else y) for x, y in data]
    model = MultiLabel(objective=stage_2(SSESAM(SPLIT, 0.05, 0.1)), passes=passes)
    net = copy.deepcopy(model.net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    run = fit(model, given, accumulate_grad_batches=accumulate)
    for k in range(0, len(data), accumulate):
        x, y = (torch.cat(parts) for parts in zip(*data[k : k + accumulate], strict=True))
        for p, g in zip(net.parameters(), naive_gradient(net, naive_terms("SSESAM 2", y), x, y), strict=True):
            p.grad = g
        with torch.no_grad():
            loss = bce(net, x, y).sum() / (y != MISSING).sum()
        optimizer.step()
    torch.testing.assert_close(list(model.net.parameters()), list(net.parameters()), rtol=0, atol=1e-13)
    torch.testing.assert_close(run.callback_metrics["train/loss"].double(), loss, rtol=0, atol=1e-7)


class AutomaticBCE(Automatic):
    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.binary_cross_entropy_with_logits(self.net(x), y)


@pytest.mark.usefixtures("float64")
def test_erm_steps_as_automatic_optimization_with_the_mean_of_torch():
    """N counts labels: so the papers' mean of the binary cross-entropy, and its learning rate, stay."""
    data = [(x, y.double()) for x, y in batches()]
    ours, plain = MultiLabel(objective=bound(ERM())), AutomaticBCE()
    plain.net.load_state_dict(ours.net.state_dict())
    for model in (ours, plain):
        fit(model, data)
    torch.testing.assert_close(list(ours.net.parameters()), list(plain.net.parameters()), rtol=0, atol=1e-14)


def test_a_sample_goes_into_both_terms_unless_its_labels_are_missing():
    forwarded = []

    class Counting(MultiLabel):
        def sample_losses(self, batch):
            forwarded.append(len(batch[0]))
            return super().sample_losses(batch)

    x, y = torch.randn(10, 8), labels(10)
    y[:6, 3:], y[6:, :3] = MISSING, MISSING
    model = Counting(objective=stage_2(SSESAM(SPLIT)))
    fit(model, [(x, y)], max_epochs=1)
    choose(model, passes="split")
    forwarded.clear()
    fit(model, [(x, y)])
    # Head, tail, and the tail at its ascended weights.
    assert sorted(forwarded) == [4, 4, 6]
    forwarded.clear()
    fit(model, [(x, labels(10))])
    assert forwarded == [10, 10]


def test_an_epoch_that_only_forwards_has_the_same_loss():
    """As the last one of weight averaging does."""

    class ForwardOnly(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            trainer.fit_loop._skip_backward = True

    x, y = torch.randn(10, 8), labels(10, 0.3)
    model = MultiLabel(objective=SSESAM(SPLIT))
    expected = bce(model.net, x, y).sum() / (y != MISSING).sum()
    run = fit(model, [(x, y.float())], callbacks=[ForwardOnly()])
    assert run.callback_metrics["train/loss"].item() == pytest.approx(expected.item(), rel=1e-6)


def test_an_objective_of_somebody_finds_the_label_of_each_loss():
    seen = []

    class TailTwice(ERM):
        def terms(self, targets):
            seen.append(targets)
            return super().terms(targets)

    x, y = torch.randn(10, 8), labels(10, 0.3)
    fit(MultiLabel(objective=bound(TailTwice())), [(x, y.float())])
    assert torch.equal(seen[0], columns(y))
    with pytest.raises(ValueError, match=r"`sample_losses` to return one unreduced loss for each target.*\(24,\)"):
        fit(MultiLabel(objective=bound(ThreeRadii())), [(torch.randn(24, 8), labels())])


def test_floating_targets_without_a_split_are_refused_with_the_way_out():
    with pytest.raises(
        ValueError, match=r"several labels a sample, give the objective a `ClassSplit\(..., multi_label"
    ):
        fit(MultiLabel(objective=SAM()), [(torch.randn(10, 8), labels(10).float())])
    wrong = MultiLabel(objective=bound(SAM()))
    wrong.sample_losses = lambda batch: bce(wrong.net, *batch).mean(1)
    with pytest.raises(ValueError, match=r"one unreduced loss for each target, a tensor of shape \(10, 5\)"):
        fit(wrong, [(torch.randn(10, 8), labels(10))])


# Curvature.


@pytest.mark.usefixtures("float64")
def test_curvature_of_the_labels_of_a_group():
    """The loss of label j is a bowl of its own: the Hessian of a group is the mean over its labels."""

    def sample_losses(model, batch):
        _, y = batch
        x = model.weight[0]
        return (y != MISSING) * torch.stack([k * x[k % 2] ** 2 for k in range(5)])

    model, y = nn.Linear(2, 1, bias=False), labels(6)
    y[:3, 4] = MISSING
    groups = ["head", "tail", "class_3"]
    found = measure_curvature(model, [(torch.zeros(6, 2), y)], SPLIT, groups, sample_losses)
    # The head has labels 0, 1, 2: second derivatives 2 * (0 + 2) and 2 * 1, over three labels.
    assert found["head"].eigenvalues.largest == pytest.approx(4 / 3)
    assert found["head"].eigenvalues.smallest == pytest.approx(2 / 3)
    # Of 9 losses of the tail, 6 are of label 3 and 3 of label 4.
    assert found["tail"].samples == 9
    assert sorted([found["tail"].eigenvalues.smallest, found["tail"].eigenvalues.largest]) == pytest.approx(
        [2 * 3 * 4 / 9, 2 * 6 * 3 / 9]
    )
    assert found["class_3"].eigenvalues.largest == pytest.approx(6)


def test_curvature_monitor_and_its_choice_of_samples():
    data = torch.utils.data.TensorDataset(torch.randn(12, 8), labels(12))
    chosen = choose_samples(data, torch.utils.data.default_collate, SPLIT, ["head", "tail"], 5)
    assert {group: [len(y) for _, y in found] for group, found in chosen.items()} == {"head": [5], "tail": [5]}
    monitor = CurvatureMonitor(every_n_epochs=1, samples=6, max_iterations=2)
    model = MultiLabel(objective=SSESAM(SPLIT))
    run = trainer(callbacks=[monitor])
    run.fit(model, torch.utils.data.DataLoader(data, 4))
    assert [entry["group"] for entry in monitor.history] == ["head", "tail"]
    x, y = map(torch.stack, zip(*[data[k] for k in range(12)], strict=True))
    monitor = CurvatureMonitor(every_n_epochs=1, samples=12, max_iterations=2)
    model = MultiLabel(objective=SSESAM(SPLIT), optimizer=lambda params: torch.optim.SGD(params, lr=0.0))
    trainer(callbacks=[monitor]).fit(model, torch.utils.data.DataLoader(data, 4))
    with torch.no_grad():
        losses = bce(model.net, x, y)
    assert monitor.history[1]["loss"] == pytest.approx(losses[:, 3:].mean().item(), rel=1e-5)
