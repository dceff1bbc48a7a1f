import copy
import math
import pickle
from decimal import Decimal, localcontext

import pytest
import torch
import torch.nn.functional as F
from helpers import STRICT
from torch import nn

from lightning_ssesam import ClassSplit, LongTailClassifier
from lightning_ssesam.losses import (
    BalancedSoftmaxLoss,
    ClassBalancedLoss,
    FocalLoss,
    LDAMLoss,
    LogitAdjustedLoss,
    LongTailLoss,
    VSLoss,
    class_balanced_weights,
    functional,
)

pytestmark = STRICT

COUNTS = [500, 90, 90, 7, 1]
WEIGHTS = [0.5, 1.0, 2.0, 0.0, 3.0]
CIFAR = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]

LOSSES = {
    "LDAM": lambda counts, **kwargs: LDAMLoss(counts, max_margin=0.4, scale=3.0, **kwargs),
    "LogitAdjusted": lambda counts, **kwargs: LogitAdjustedLoss(counts, tau=1.3, **kwargs),
    "BalancedSoftmax": BalancedSoftmaxLoss,
    "VS": lambda counts, **kwargs: VSLoss(counts, gamma=0.3, tau=0.8, **kwargs),
    "ClassBalanced": lambda counts, **kwargs: ClassBalancedLoss(counts, beta=0.99, **kwargs),
    "focal": lambda counts, **kwargs: FocalLoss(gamma=1.5, **kwargs),
    "focal root": lambda counts, **kwargs: FocalLoss(gamma=0.5, **kwargs),
    "focal sigmoid": lambda counts, **kwargs: FocalLoss(gamma=1.5, kind="sigmoid", alpha=0.3, **kwargs),
}
NEED_COUNTS = [LDAMLoss, LogitAdjustedLoss, BalancedSoftmaxLoss, VSLoss, ClassBalancedLoss]
TAKE_WEIGHTS = [name for name in LOSSES if name != "ClassBalanced"]
every_loss = pytest.mark.parametrize("name", LOSSES)


def log_share(scores, j):
    """Log of the softmax of a list of numbers."""
    top = max(scores)
    return scores[j] - top - math.log(sum(math.exp(s - top) for s in scores))


def naive_class_loss(name, z, n, j):
    """The loss l_j of one sample with logits z, if its class were j."""
    total, classes = sum(n), range(len(z))
    if name == "LDAM":
        margin = 0.4 * n[j] ** -0.25 / max(m**-0.25 for m in n)
        return -log_share([3.0 * (z[k] - margin * (k == j)) for k in classes], j)
    if name == "LogitAdjusted":
        return -log_share([z[k] + 1.3 * math.log(n[k] / total) for k in classes], j)
    if name == "BalancedSoftmax":
        return -log_share([z[k] + math.log(n[k]) for k in classes], j)
    if name == "VS":
        return -log_share([(n[k] / max(n)) ** 0.3 * z[k] + 0.8 * math.log(n[k] / total) for k in classes], j)
    if name == "ClassBalanced":
        raw = [(1 - 0.99) / (1 - 0.99**m) for m in n]
        return -log_share(z, j) * raw[j] * len(n) / sum(raw)
    gamma = 0.5 if name == "focal root" else 1.5
    loss = -log_share(z, j)
    return (1 - math.exp(-loss)) ** gamma * loss


def naive_sigmoid_focal(z, t):
    loss = 0.0
    for score, yes in zip(z, t, strict=True):
        p = 1 / (1 + math.exp(-score))
        p_t = p * yes + (1 - p) * (1 - yes)
        entropy = -yes * math.log(p) - (1 - yes) * math.log(1 - p)
        loss += (0.3 * yes + 0.7 * (1 - yes)) * (1 - p_t) ** 1.5 * entropy
    return loss


def naive(name, logits, targets, n, weights):
    """One sample after the other; logits (N, C, ...), targets of either kind."""
    c = logits.shape[1]
    rows = logits.movedim(1, -1).reshape(-1, c).tolist()
    if targets.is_floating_point():
        shares = targets.movedim(1, -1).reshape(-1, c).tolist()
    else:
        shares = [[float(k == y) for k in range(c)] for y in targets.flatten().tolist()]
    losses = []
    for z, t in zip(rows, shares, strict=True):
        if name == "focal sigmoid":
            losses.append(naive_sigmoid_focal(z, t) * sum(t[j] * weights[j] for j in range(c)))
        else:
            losses.append(sum(t[j] * weights[j] * naive_class_loss(name, z, n, j) for j in range(c)))
    return torch.tensor(losses, dtype=torch.float64).reshape(logits.shape[:1] + logits.shape[2:])


def make_targets(kind, shape):
    if kind == "indices":
        return torch.randint(shape[1], shape[:1] + shape[2:])
    return torch.rand(shape, dtype=torch.float64).pow(3).softmax(1)


@every_loss
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("shape", [(12, 5), (3, 5, 4), (2, 5, 3, 2)])
@pytest.mark.parametrize("weighted", [False, True])
def test_same_as_naive(name, kind, shape, weighted, float64):
    logits, targets = torch.randn(shape) * 2, make_targets(kind, shape)
    loss = LOSSES[name](COUNTS)
    if weighted and name in TAKE_WEIGHTS:
        loss = LOSSES[name](COUNTS, weight=WEIGHTS)
    weights = WEIGHTS if loss.weight is not None and name != "ClassBalanced" else [1.0] * 5
    actual = loss(logits, targets)
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, naive(name, logits, targets, COUNTS, weights), rtol=1e-12, atol=1e-13)


FUNCTIONS = {
    "LDAM": lambda z, y, n, w: functional.ldam(z, y, functional.ldam_margins(n, 0.4), scale=3.0, weight=w),
    "LogitAdjusted": lambda z, y, n, w: functional.logit_adjusted(z, y, n, tau=1.3, weight=w),
    "BalancedSoftmax": lambda z, y, n, w: functional.adjusted(z, y, n.log(), weight=w),
    "VS": lambda z, y, n, w: functional.vector_scaling(z, y, n, gamma=0.3, tau=0.8, weight=w),
    "ClassBalanced": lambda z, y, n, w: functional.cross_entropy(z, y, class_balanced_weights(n, 0.99).to(z)),
    "focal": lambda z, y, n, w: functional.focal(z, y, gamma=1.5, weight=w),
    "focal root": lambda z, y, n, w: functional.focal(z, y, gamma=0.5, weight=w),
    "focal sigmoid": lambda z, y, n, w: functional.sigmoid_focal(z, y, gamma=1.5, alpha=0.3, weight=w),
}


@every_loss
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_functions_are_the_formulas_of_the_classes(name, kind, dtype):
    logits, counts = torch.randn(3, 5, 4, dtype=dtype) * 2, torch.tensor(COUNTS, dtype=dtype)
    targets = make_targets(kind, logits.shape)
    if kind == "probabilities":
        targets = targets.to(dtype)
    weights = WEIGHTS if name in TAKE_WEIGHTS else [1.0] * 5
    options = {"weight": WEIGHTS} if name in TAKE_WEIGHTS else {}
    actual = FUNCTIONS[name](logits, targets, counts, torch.tensor(weights, dtype=dtype))
    assert actual.dtype == dtype
    expected = naive(name, logits.double(), targets, COUNTS, weights)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)
    # The weights of ClassBalancedLoss have the default dtype.
    if (name, dtype) != ("ClassBalanced", torch.float64):
        assert torch.equal(actual, LOSSES[name](COUNTS, **options)(logits, targets))


def test_a_loss_is_a_function_and_a_small_class():
    class Margin(LongTailLoss):
        def losses(self, logits, targets, weight):
            return functional.ldam(logits, targets, self.counts_like(logits) / 10, scale=1.0, weight=weight)

    loss = Margin(weight=[1.0, 3.0], reduction="sum")
    loss.bind(ClassSplit([2, 1], tail=[1]))
    logits = torch.zeros(2, 2, dtype=torch.float16)
    expected = math.log(1 + math.exp(0.2)) + 3 * math.log(1 + math.exp(0.1))
    assert loss(logits, torch.tensor([0, 1])).item() == pytest.approx(expected)
    assert repr(loss) == "Margin(reduction='sum')"
    with pytest.raises(NotImplementedError, match="LongTailLoss has no `losses`"):
        LongTailLoss([2, 1])(logits, torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        # Two classes with equal logits, of 9 and 1 of 10 samples.
        (LogitAdjustedLoss([9, 1]), [-math.log(0.9), -math.log(0.1)]),
        (LogitAdjustedLoss([9, 1], tau=0.0), [math.log(2), math.log(2)]),
        # tau=2: 81 to 1.
        (LogitAdjustedLoss([9, 1], tau=2.0), [math.log(82 / 81), math.log(82)]),
        (BalancedSoftmaxLoss([9, 1]), [math.log(10 / 9), math.log(10)]),
        # Delta is 1 and 1/3 at gamma=1/2, and the logits are log 8: 8 * 9 to 2 * 1.
        (VSLoss([9, 1], gamma=0.5, tau=1.0), [math.log(74 / 72), math.log(74 / 2)]),
        # The margins are 1/2 and 1: the target has exp(-2 * 1/2) and exp(-2 * 1) to the other's 1.
        (LDAMLoss([16, 1], max_margin=1.0, scale=2.0), [math.log(1 + math.e), math.log(1 + math.e**2)]),
        (FocalLoss(gamma=2.0), [math.log(2) / 4, math.log(2) / 4]),
        # beta=1/2: 1 / (1 - 1/4) to 1 / (1 - 1/2) is 0.8 to 1.2.
        (ClassBalancedLoss([2, 1], beta=0.5), [0.8 * math.log(2), 1.2 * math.log(2)]),
        # Every class is a coin: 1/4 log 2 for the yes, and for the no.
        (FocalLoss(gamma=2.0, kind="sigmoid"), [math.log(2) / 2, math.log(2) / 2]),
        (FocalLoss(gamma=0.0, kind="sigmoid", alpha=1.0), [math.log(2), math.log(2)]),
        (BalancedSoftmaxLoss([9, 1], weight=[3.0, 0.5]), [3 * math.log(10 / 9), 0.5 * math.log(10)]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_by_hand(loss, expected):
    logit = 0.0 if not isinstance(loss, VSLoss) else math.log(8)
    logits = torch.full((2, 2), logit, dtype=torch.float64)
    torch.testing.assert_close(loss(logits, torch.tensor([0, 1])), torch.tensor(expected, dtype=torch.float64))


@every_loss
def test_one_hot_probabilities_are_indices(name, float64):
    loss, logits, targets = LOSSES[name](COUNTS), torch.randn(20, 5, 3) * 4, torch.randint(5, (20, 3))
    one_hot = F.one_hot(targets, 5).movedim(-1, 1)
    torch.testing.assert_close(loss(logits, one_hot.double()), loss(logits, targets), rtol=1e-11, atol=1e-13)
    assert torch.equal(loss(logits, targets.to(torch.uint8)), loss(logits, targets))


@every_loss
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_gradient(name, kind, float64):
    loss, logits = LOSSES[name](COUNTS), torch.randn(4, 5, 2, requires_grad=True)
    targets = make_targets(kind, logits.shape)
    assert torch.autograd.gradcheck(lambda z: loss(z, targets), logits)


def extreme(limit, classes):
    """Rows in which one class, two, all or none but one are at the limit."""
    rows = torch.zeros(6, classes, dtype=torch.float64)
    rows[0, 0], rows[1, 0], rows[2, :2], rows[3], rows[4] = limit, -limit, limit, limit, -limit
    rows[4, -1] = limit
    rows[5] = torch.linspace(-limit, limit, classes)
    return rows


@every_loss
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize(
    ("dtype", "limit"),
    [(torch.float32, 1e4), (torch.float64, 1e4), (torch.float16, 6e4), (torch.bfloat16, 6e4)],
    ids=str,
)
def test_extreme_logits_and_counts(name, kind, dtype, limit):
    counts = [10**6, 1, 1000, 10**6, 2, 77, 1]
    rows = torch.cat([extreme(limit, 7), extreme(limit, 7).flip(1), torch.randn(8, 7, dtype=torch.float64)])
    rows = rows.repeat_interleave(7, 0).to(dtype).requires_grad_()
    loss, targets = LOSSES[name](counts), torch.arange(7).repeat(len(rows) // 7)
    if kind == "probabilities":
        targets = 0.9 * F.one_hot(targets, 7).to(torch.float32) + 0.1 / 7
    actual = loss(rows, targets)
    assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # Float32 targets are what both get; the naive one takes them in float64, with all else.
    exact = loss(rows.detach().double(), targets.double() if kind == "probabilities" else targets)
    assert exact.isfinite().all()
    torch.testing.assert_close(actual.double(), exact, rtol=2e-6, atol=1e-5 if name != "VS" else limit * 1e-6)
    (gradient,) = torch.autograd.grad(actual.sum(), rows)
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("name", ["LDAM", "LogitAdjusted", "BalancedSoftmax", "VS", "ClassBalanced", "focal"])
def test_extreme_logits_same_as_naive(name):
    rows = extreme(1e4, 5).repeat_interleave(5, 0)
    for targets in (torch.arange(5).repeat(6), make_targets("probabilities", rows.shape)):
        actual = LOSSES[name](COUNTS)(rows, targets)
        # The default dtype of the weights of ClassBalancedLoss is float32.
        torch.testing.assert_close(actual, naive(name, rows, targets, COUNTS, [1.0] * 5), rtol=1e-6, atol=1e-9)


def test_differences_of_extreme_logits_keep_the_margin():
    """Next to 1e4 the steps of float32 are 0.001, and 0.03 once they are scaled."""
    logits = torch.full((2, 2), 1e4)
    targets = torch.tensor([0, 1])
    for loss in (LDAMLoss([10, 1], scale=30.0), LogitAdjustedLoss([10**6, 1]), BalancedSoftmaxLoss([10**6, 1])):
        torch.testing.assert_close(loss(logits, targets), loss(torch.zeros(2, 2), targets), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_focal_gradient_of_certain_answers(gamma, dtype):
    loss = FocalLoss(gamma)
    for target in (torch.tensor([0]), torch.tensor([[1.0, 0.0]])):
        for gap in (5.0, 17.0, 40.0, 1e4):
            logits = torch.tensor([[gap, 0.0]], dtype=dtype, requires_grad=True)
            value = loss(logits, target)
            (gradient,) = torch.autograd.grad(value.sum(), logits)
            # With miss = 1 - p, which is about exp(-gap): l = miss**(gamma + 1), l' = -(gamma + 1) l.
            scale = math.exp(-gap * (gamma + 1))
            assert value.item() == pytest.approx(scale, rel=2e-2, abs=1e-7)
            assert gradient[0, 0].item() == pytest.approx(-(gamma + 1) * scale, rel=2e-2, abs=1e-7)


def test_focal_of_gamma_0_is_cross_entropy():
    logits, targets = torch.randn(10, 5) * 9, torch.randint(5, (10,))
    expected = F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(FocalLoss(gamma=0.0)(logits, targets), expected)


def test_losses_agree_where_they_must(float64):
    logits, targets = torch.randn(10, 5), torch.randint(5, (10,))
    balanced = BalancedSoftmaxLoss(COUNTS)(logits, targets)
    torch.testing.assert_close(LogitAdjustedLoss(COUNTS)(logits, targets), balanced)
    torch.testing.assert_close(VSLoss(COUNTS, gamma=0.0, tau=1.0)(logits, targets), balanced)
    plain = F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(LDAMLoss(COUNTS, max_margin=0.0, scale=1.0)(logits, targets), plain)
    torch.testing.assert_close(ClassBalancedLoss(COUNTS, beta=0.0)(logits, targets), plain)


def test_defaults():
    logits, targets = torch.randn(10, 10, dtype=torch.float64), torch.arange(10)
    n = torch.tensor(CIFAR, dtype=torch.float64)
    margins = 0.5 * (50 / n) ** 0.25
    expected = F.cross_entropy(30 * (logits - torch.diag(margins)), targets, reduction="none")
    torch.testing.assert_close(LDAMLoss(CIFAR)(logits, targets), expected)
    vs = F.cross_entropy((n / 5000) ** 0.15 * logits + 1.25 * (n / n.sum()).log(), targets, reduction="none")
    torch.testing.assert_close(VSLoss(CIFAR)(logits, targets), vs)
    torch.testing.assert_close(FocalLoss()(logits, targets), (p := logits.softmax(1).diag()).log().neg() * (1 - p) ** 2)
    assert ClassBalancedLoss().beta == 0.9999


def test_margins_of_cifar_10_lt():
    margins = LDAMLoss(CIFAR).margins
    # By the formula C / n^(1/4) with C such that the rarest class has 0.5; 5000 = 50 * 100 makes it 0.5 / sqrt(10).
    expected = [0.1581, 0.1797, 0.2042, 0.2321, 0.2638, 0.2998, 0.3407, 0.3872, 0.4405, 0.5]
    torch.testing.assert_close(margins, torch.tensor(expected), rtol=0, atol=5e-5)
    assert margins[-1] == 0.5
    assert LDAMLoss().margins is None


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.9, 0.999, 0.9999, 0.999999, 1 - 1e-12, 1 - 2**-53])
def test_class_balanced_weights(beta):
    counts = [1, 2, 3, 10, 999, 10_000, 123_456, 10**6]
    with localcontext() as context:
        context.prec = 60
        raw = [(1 - Decimal(beta)) / (1 - Decimal(beta) ** n) for n in counts]
        expected = [float(value * len(counts) / sum(raw)) for value in raw]
    weights = class_balanced_weights(counts, beta)
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64), rtol=1e-13, atol=0)
    split = ClassSplit(counts, tail=[0])
    assert torch.equal(class_balanced_weights(split, beta), weights)
    assert torch.equal(class_balanced_weights(torch.tensor(counts), beta), weights)


def test_class_balanced_loss_makes_its_weights_when_bound():
    split = ClassSplit(COUNTS, tail=[4])
    loss = ClassBalancedLoss(beta=0.99)
    assert loss.weight is None
    loss.bind(split)
    torch.testing.assert_close(loss.weight, class_balanced_weights(COUNTS, 0.99).float())
    # A second bind keeps what a callback has set.
    loss.weight = torch.ones(5)
    loss.bind(split)
    assert torch.equal(loss.weight, torch.ones(5))


@every_loss
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_reduction(name, kind):
    logits, targets = torch.randn(6, 5, 2), make_targets(kind, (6, 5, 2))
    losses = LOSSES[name](COUNTS)(logits, targets)
    assert losses.shape == (6, 2)
    torch.testing.assert_close(LOSSES[name](COUNTS, reduction="sum")(logits, targets), losses.sum())
    torch.testing.assert_close(LOSSES[name](COUNTS, reduction="mean")(logits, targets), losses.mean())


def test_weighted_mean_is_plain():
    logits, targets = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 4])
    for make in (LDAMLoss, BalancedSoftmaxLoss):
        losses = make(COUNTS)(logits, targets) * torch.tensor(WEIGHTS)[targets]
        actual = make(COUNTS, weight=WEIGHTS, reduction="mean")(logits, targets)
        torch.testing.assert_close(actual, losses.mean())


@every_loss
def test_weight_may_be_replaced(name):
    loss, logits, targets = LOSSES[name](COUNTS), torch.randn(7, 5), torch.randint(5, (7,))
    loss.weight = None
    plain = loss(logits, targets)
    loss.weight = torch.tensor(WEIGHTS, dtype=torch.float64)
    weighted = loss(logits, targets)
    assert weighted.dtype == torch.float32
    torch.testing.assert_close(weighted, plain * torch.tensor(WEIGHTS)[targets])
    assert loss.state_dict() == {}
    assert dict(loss.named_buffers()).keys() == {"weight"}


@every_loss
def test_ten_thousand_classes(name, float64):
    counts = torch.logspace(6, 0, 10_000).round().long()
    logits, targets = torch.randn(2, 10_000), torch.tensor([0, 9_999])
    actual = LOSSES[name](counts)(logits, targets)
    uniform = torch.zeros(2, 10_000).scatter(1, targets[:, None], 1.0)
    torch.testing.assert_close(LOSSES[name](counts)(logits, uniform), actual, rtol=1e-9, atol=1e-12)
    if name == "LDAM":
        expected = [naive_class_loss(name, logits[i].tolist(), counts.tolist(), j) for i, j in ((0, 0), (1, 9_999))]
        torch.testing.assert_close(actual, torch.tensor(expected))
    single = LOSSES[name](counts)(logits.float(), targets)
    torch.testing.assert_close(single.double(), actual, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 3)])
@every_loss
def test_empty_batch(name, shape):
    targets = torch.zeros(shape[:1] + shape[2:], dtype=torch.long)
    assert LOSSES[name](COUNTS)(torch.zeros(shape), targets).shape == targets.shape


@every_loss
def test_single_class(name):
    logits = torch.randn(3, 1, requires_grad=True)
    loss = LOSSES[name]([7])
    for targets in (torch.zeros(3, dtype=torch.long), torch.ones(3, 1)):
        losses = loss(logits, targets)
        (gradient,) = torch.autograd.grad(losses.sum(), logits)
        assert gradient.isfinite().all()
        if name != "focal sigmoid":
            assert losses.tolist() == [0.0] * 3


@every_loss
def test_copies_and_state(name):
    loss, logits, targets = LOSSES[name](COUNTS), torch.randn(7, 5), torch.randint(5, (7,))
    if name in TAKE_WEIGHTS:
        loss.weight = torch.tensor(WEIGHTS)
    expected = loss(logits, targets)
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), copy.deepcopy(loss).to("cpu")):
        assert torch.equal(twin(logits, targets), expected)
        twin.weight.zero_()
        assert torch.equal(loss(logits, targets), expected)
    assert loss.state_dict() == {}
    loss.load_state_dict({}, strict=True)


@every_loss
def test_converted_loss(name):
    """As under Lightning's true half precision: class sizes do not fit float16."""
    counts = [10**6, 4097, 4096, 5, 1]
    loss, logits, targets = LOSSES[name](counts), torch.randn(5, 5).half(), torch.arange(5)
    expected = LOSSES[name](counts)(logits.float(), targets)
    actual = loss.half()(logits, targets)
    torch.testing.assert_close(actual, expected, rtol=1e-3 if name == "ClassBalanced" else 1e-6, atol=1e-7)


def test_moves_to_another_device():
    loss = LDAMLoss(COUNTS, weight=WEIGHTS).to("meta")
    assert loss(torch.randn(3, 5, device="meta"), torch.zeros(3, dtype=torch.long, device="meta")).is_meta
    assert loss.weight.is_meta
    unmoved = BalancedSoftmaxLoss(COUNTS)
    assert unmoved(torch.randn(3, 5, device="meta"), torch.ones(3, 5, device="meta")).is_meta
    assert unmoved(torch.zeros(1, 5), torch.tensor([0])).item() == pytest.approx(math.log(688 / 500))


@every_loss
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_autocast(name, kind):
    net, loss = nn.Linear(8, 5), LOSSES[name](COUNTS)
    targets = make_targets(kind, (4, 5))
    with torch.autocast("cpu", torch.bfloat16):
        logits = net(torch.randn(4, 8))
        assert logits.dtype == torch.bfloat16
        losses = loss(logits, targets)
        losses.sum().backward()
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, loss(logits.float(), targets.float() if kind != "indices" else targets))
    assert net.weight.grad.abs().max() > 0


@pytest.mark.parametrize("make", NEED_COUNTS)
def test_bind(make):
    split, logits, targets = ClassSplit(COUNTS, tail=[4]), torch.randn(7, 5), torch.randint(5, (7,))
    loss = make()
    with pytest.raises(
        RuntimeError, match=rf"build it with `{make.__name__}\(counts=\.\.\.\)`, or call `bind\(split\)`"
    ):
        loss(logits, targets)
    loss.bind(split)
    assert torch.equal(loss(logits, targets), make(COUNTS)(logits, targets))
    assert torch.equal(make(split)(logits, targets), make(COUNTS)(logits, targets))
    loss.bind(ClassSplit(COUNTS, tail=[0]))
    with pytest.raises(ValueError, match=r"`split` to be one with the class counts that the \w+ has already, but got"):
        loss.bind(ClassSplit([500, 90, 90, 7, 2], tail=[4]))
    with pytest.raises(ValueError, match="`split` to be a ClassSplit, but got 5"):
        make().bind(5)


def test_the_classifier_binds():
    model = LongTailClassifier(COUNTS, nn.Linear(8, 5), loss=LDAMLoss())
    assert torch.equal(model.loss.class_counts, torch.tensor(COUNTS))
    with pytest.raises(ValueError, match="class counts that the LDAMLoss has already"):
        LongTailClassifier(COUNTS, nn.Linear(8, 5), loss=LDAMLoss([3, 2, 1, 1, 1]))
    LongTailClassifier(COUNTS, nn.Linear(8, 5), loss=FocalLoss())


def test_shown_with_its_arguments():
    assert repr(VSLoss(COUNTS)) == "VSLoss(reduction='none', gamma=0.15, tau=1.25)"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LDAMLoss([3, 0]), "to be integers >= 1 for every class, but got 0 for class 1"),
        (lambda: LDAMLoss(max_margin=-1), "`max_margin` to be a finite number >= 0, but got -1"),
        (lambda: LDAMLoss(scale=0), "`scale` to be a finite number > 0, but got 0"),
        (lambda: LogitAdjustedLoss(tau=math.inf), "`tau` to be a finite number >= 0, but got inf"),
        (lambda: VSLoss(gamma=-0.1), "`gamma` to be a finite number >= 0, but got -0.1"),
        (lambda: VSLoss(tau="one"), "`tau` to be a finite number >= 0, but got 'one'"),
        (lambda: FocalLoss(gamma=math.nan), "`gamma` to be a finite number >= 0, but got nan"),
        (lambda: FocalLoss(kind="hinge"), "`kind` to be one of 'softmax', 'sigmoid', but got 'hinge'"),
        (lambda: FocalLoss(alpha=0.5), "`alpha` to be None unless kind='sigmoid' .* but got 0.5"),
        (lambda: FocalLoss(kind="sigmoid", alpha=1.5), r"`alpha` to be a number in \[0, 1\], but got 1.5"),
        (lambda: FocalLoss(kind="sigmoid", gamma=0.5), "`gamma` to be 0 or >= 1 with kind='sigmoid', but got 0.5"),
        (lambda: BalancedSoftmaxLoss(reduction="max"), "`reduction` to be one of 'none', 'mean', 'sum', but got 'max'"),
        (lambda: ClassBalancedLoss(beta=1.0), r"`beta` to be a number in \[0, 1\), but got 1.0"),
        (lambda: class_balanced_weights([1], beta=-0.1), r"`beta` to be a number in \[0, 1\), but got -0.1"),
        (lambda: class_balanced_weights([1], beta=True), r"`beta` to be a number in \[0, 1\), but got True"),
        (lambda: class_balanced_weights([1.5]), "integers >= 1"),
        (lambda: VSLoss([3, 1], weight=[1.0]), r"`weight` to be of shape \(2,\), one for each class, but got 1 values"),
        (
            lambda: VSLoss(weight=[1.0]).bind(ClassSplit([3, 1], [1])),
            r"`weight` to be of shape \(2,\), one for each class, but got 1 values",
        ),
        (lambda: VSLoss(weight=[1.0, -1.0]), "`weight` to be a vector of finite numbers >= 0, but got"),
        (lambda: VSLoss(weight=[1.0, math.nan]), "`weight` to be a vector of finite numbers >= 0, but got"),
        (lambda: VSLoss(weight="balanced"), "`weight` to be a vector of finite numbers >= 0, but got 'balanced'"),
        (
            lambda: LDAMLoss(COUNTS)(torch.zeros(2, 4), torch.tensor([0, 1])),
            r"`logits` to be of shape \(N, 5\) or .* but got \(2, 4\) of torch.float32",
        ),
        (
            lambda: FocalLoss(weight=[1.0, 2.0])(torch.zeros(2, 4), torch.tensor([0, 1])),
            r"`logits` to be of shape \(N, 2\) or",
        ),
        (lambda: FocalLoss()(torch.zeros(4), torch.tensor(0)), r"`logits` to be of shape \(N, C\) or"),
        (
            lambda: LDAMLoss(COUNTS)(torch.zeros(2, 5, dtype=torch.long), torch.tensor([0, 1])),
            r"a floating dtype, but got \(2, 5\) of torch.int64",
        ),
        (
            lambda: LDAMLoss(COUNTS)(torch.zeros(2, 5), torch.tensor([0, 1, 2])),
            r"`targets` to be class indices of shape \(2,\) or class probabilities of shape \(2, 5\), but got shape"
            r" \(3,\) of torch.int64",
        ),
        (lambda: VSLoss(COUNTS)(torch.zeros(2, 5), torch.zeros(2)), r"`targets` to be .* but got shape \(2,\) of"),
        (lambda: VSLoss(COUNTS)(torch.zeros(2, 5), torch.zeros(2, dtype=torch.bool)), "`targets` to be class indices"),
        (lambda: VSLoss(COUNTS)(torch.zeros(2, 5, 3), torch.zeros(2, 5)), "`targets` to be class indices"),
        (
            lambda: VSLoss(COUNTS)(torch.zeros(2, 5), torch.zeros(2, 5, dtype=torch.long)),
            "`targets` to be class indices",
        ),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@every_loss
@pytest.mark.parametrize("target", [-1, 5])
def test_indices_that_are_no_class_are_refused(name, target):
    with pytest.raises((IndexError, RuntimeError)):
        LOSSES[name](COUNTS)(torch.zeros(2, 5), torch.tensor([0, target]))
