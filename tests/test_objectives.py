import pytest
import torch
import torch.nn.functional as F

from lightning_ssesam import ERM, SAM, SSESAM, ClassSplit, ImbSAM, Term

SPLIT = ClassSplit([9, 5, 2, 1], tail=[2, 3])
TARGETS = torch.tensor([0, 0, 1, 3, 2])
ALL, HEAD, TAIL = [0.2] * 5, [0.2, 0.2, 0.2, 0, 0], [0, 0, 0, 0.2, 0.2]
SWITCHED = SSESAM(SPLIT, 0.3, 0.4)
SWITCHED.stage = 2
SWITCHED_JOINT = SSESAM(SPLIT, 0.3, 0.4, first_stage="joint")
SWITCHED_JOINT.stage = 2


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (ERM(), [(ALL, 0)]),
        (SAM(0.3), [(ALL, 0.3)]),
        (ImbSAM(SPLIT, 0.3), [(HEAD, 0), (TAIL, 0.3)]),
        (ImbSAM(SPLIT, 0.3, tail_weight=2.0), [(HEAD, 0), ([0, 0, 0, 0.4, 0.4], 0.3)]),
        (ImbSAM(SPLIT, 0.3, reduction="group"), [([1 / 3] * 3 + [0, 0], 0), ([0, 0, 0, 0.5, 0.5], 0.3)]),
        (ImbSAM(SPLIT, 0.3, 3.0, "group"), [([1 / 3] * 3 + [0, 0], 0), ([0, 0, 0, 1.5, 1.5], 0.3)]),
        (SSESAM(SPLIT, 0.3, 0.4), [(HEAD, 0.3), (TAIL, 0.4)]),
        (SWITCHED, [(HEAD, 0), (TAIL, 0.4)]),
        (SSESAM(SPLIT, 0.3, 0.4, first_stage="joint"), [(ALL, 0.3)]),
        (SWITCHED_JOINT, [(HEAD, 0), (TAIL, 0.4)]),
    ],
)
@pytest.mark.parametrize("one_hot", [False, True])
def test_terms(objective, expected, one_hot):
    targets = F.one_hot(TARGETS, 4).float() if one_hot else TARGETS
    terms = objective.terms(targets)
    assert [rho for _, rho, _ in terms] == [rho for _, rho in expected]
    for term, (weights, _) in zip(terms, expected, strict=True):
        assert isinstance(term, Term)
        # In float32 1/5 would be off by 3e-9.
        torch.testing.assert_close(term.weights, torch.tensor(weights, dtype=torch.float64), rtol=0, atol=1e-17)


def test_probabilities_split_by_mass():
    targets = torch.tensor([[0.5, 0, 0.25, 0.25], [0.9, 0.1, 0, 0]])
    (head, *_), (tail, *_) = ImbSAM(SPLIT).terms(targets)
    torch.testing.assert_close(head, torch.tensor([0.25, 0.5], dtype=torch.float64))
    torch.testing.assert_close(tail, torch.tensor([0.25, 0.0], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_dense_targets_count_all_elements(dtype):
    targets = torch.tensor([[[0, 2], [1, 3]]], dtype=dtype)
    (head, *_), (tail, *_) = SSESAM(SPLIT).terms(targets)
    assert head.tolist() == [[[0.25, 0], [0.25, 0]]]
    assert tail.tolist() == [[[0, 0.25], [0, 0.25]]]
    assert ERM().terms(targets)[0].weights.tolist() == [[[0.25, 0.25], [0.25, 0.25]]]


def test_dense_probabilities():
    targets = F.one_hot(torch.tensor([[[0, 2], [1, 3]]]), 4).movedim(-1, 1).float()
    (head, *_), (tail, *_) = SSESAM(SPLIT).terms(targets)
    assert tail.tolist() == [[[0, 0.25], [0, 0.25]]]
    assert ERM().terms(targets)[0].weights.shape == head.shape == (1, 2, 2)


@pytest.mark.parametrize("classes", [[0, 1, 1], [2, 3, 3]])
def test_group_mean_of_an_absent_group_is_zero(classes):
    terms = ImbSAM(SPLIT, reduction="group").terms(torch.tensor(classes))
    sums = sorted(term.weights.sum().item() for term in terms)
    assert sums == pytest.approx([0.0, 1.0])


def test_bind_later():
    objective = SSESAM(head_rho=0.3, tail_rho=0.4)
    assert objective.split is None
    with pytest.raises(RuntimeError, match=r"SSESAM does not know which classes are tail.*`bind\(split\)`"):
        objective.terms(TARGETS)
    objective.bind(SPLIT)
    assert objective.split is SPLIT
    assert objective.terms(TARGETS)[1].weights.tolist() == pytest.approx(TAIL)


def test_a_refused_split_is_not_kept():
    objective = SSESAM()
    with pytest.raises(ValueError, match="both head and tail classes"):
        objective.bind(ClassSplit([2, 1], []))
    assert objective.split is None
    with pytest.raises(RuntimeError, match="does not know which classes are tail"):
        objective.check_ready()


def test_stage():
    objective = SSESAM(SPLIT)
    assert objective.stage == 1
    for wrong in (0, 3, 1.5, "2", None):
        with pytest.raises(ValueError, match="Expected argument `stage` to be an integer from 1 to 2, but got"):
            objective.stage = wrong
    with pytest.raises(ValueError, match="Expected argument `stage` to be an integer from 1 to 1, but got 2"):
        SAM(0.1).stage = 2


def test_repr():
    assert repr(SSESAM(SPLIT)) == "SSESAM(head_rho=0.05, tail_rho=0.1, first_stage='grouped')"


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), "0.1", None, True, [0.1]])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda rho: SAM(rho), "rho"),
        (lambda rho: ImbSAM(SPLIT, rho), "rho"),
        (lambda rho: SSESAM(SPLIT, head_rho=rho), "head_rho"),
        (lambda rho: SSESAM(SPLIT, tail_rho=rho), "tail_rho"),
    ],
)
def test_bad_radius(make, name, value):
    with pytest.raises(ValueError, match=f"Expected argument `{name}` to be a finite number >= 0, but got"):
        make(value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SSESAM(SPLIT).terms([0, 1]), r"`targets` to be a tensor of class indices or .*, but got \[0, 1\]"),
        (lambda: ERM().terms([0, 1]), "`targets` to be a tensor of class indices or class probabilities"),
        (lambda: SSESAM(SPLIT).terms(torch.ones(2, 4)), "`targets` to be class probabilities that add up to 1, but"),
        (lambda: SSESAM(SPLIT).terms(torch.tensor([[2.0, -1, 0, 0]])), "class probabilities that add up to 1"),
        (lambda: SSESAM(SPLIT).terms(torch.full((1, 4), float("nan"))), "class probabilities that add up to 1"),
        (lambda: ImbSAM(SPLIT, 0.1, tail_weight=0), "`tail_weight` to be a finite number > 0, but got 0"),
        (lambda: ImbSAM(SPLIT, 0.1, reduction="mean"), "`reduction` to be one of 'batch', 'group', but got 'mean'"),
        (lambda: SSESAM(SPLIT, first_stage="both"), "`first_stage` to be one of 'grouped', 'joint', but got 'both'"),
        (lambda: SSESAM([1, 2]), r"`split` to be a ClassSplit, but got \[1, 2\]"),
        (lambda: SSESAM(ClassSplit([2, 1], [])), "both head and tail classes.*0 of 2 classes are tail"),
        (lambda: ImbSAM(ClassSplit([2, 1], [0, 1])), "both head and tail classes.*2 of 2 classes are tail"),
        (lambda: SSESAM().bind(ClassSplit([2, 1], [])), "both head and tail classes.*0 of 2 classes are tail"),
        (
            lambda: SSESAM(SPLIT).terms(torch.tensor([0, 4])),
            r"`targets` to be class indices in \[0, 4\), but got.*0 to 4",
        ),
        (lambda: SSESAM(SPLIT).terms(torch.tensor([-1, 0])), r"`targets` to be class indices in \[0, 4\).*-1 to 0"),
        (
            lambda: SSESAM(SPLIT).terms(torch.rand(3)),
            r"`targets` to be class indices of an integer dtype, or .* \(N, 4\)",
        ),
        (
            lambda: SSESAM(SPLIT).terms(torch.rand(3, 5)),
            r"class probabilities of shape \(N, 4\), but got shape \(3, 5\)",
        ),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
