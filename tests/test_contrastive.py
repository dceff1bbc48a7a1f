"""Balanced contrastive learning: the loss by the paper's formula, the branch, and training with it."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import SPLIT, STRICT, Model, fit, trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader

from lightning_ssesam import CCSAM, ERM, SAM, SSESAM, ImbSAM, LongTailClassifier, StepOptions
from lightning_ssesam.losses import BalancedContrastiveLoss, LogitAdjustedLoss
from lightning_ssesam.losses.contrastive import balanced_contrastive
from lightning_ssesam.models import CIFARResNet, ContrastiveBranch, NormalizedLinear, SmallConvNet

pytestmark = STRICT

COUNTS = [50, 40, 30, 6, 5]


def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


def naive_losses(features, targets, centers, temperature, ignored=()):
    """The formula of the paper, one number after the other."""
    views = [(i, z, int(y)) for i, y in enumerate(targets) if i not in ignored for z in features[i]]
    losses = [[] for _ in targets]
    for anchor, (i, z, y) in enumerate(views):
        members = {j: [center] for j, center in enumerate(centers)}
        for number, (_, other, label) in enumerate(views):
            if number != anchor:
                members[label].append(other)
        below = sum(sum(math.exp(float(z @ k) / temperature) for k in group) / len(group) for group in members.values())
        terms = [-math.log(math.exp(float(z @ p) / temperature) / below) for p in members[y]]
        losses[i].append(sum(terms) / len(terms))
    return torch.tensor([sum(values) / max(len(values), 1) for values in losses])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("number", "views"), [(1, 1), (5, 1), (6, 2), (4, 3)])
def test_loss_is_the_papers_formula(number, views):
    features, centers, targets = unit(number, views, 3), unit(5, 3), torch.randint(5, (number,))
    expected = naive_losses(features, targets, centers, 0.3)
    losses = balanced_contrastive(features, targets, centers, 0.3)
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-12)
    # The class normalizes.
    again = BalancedContrastiveLoss(0.3)(7 * features, targets.int(), 0.5 * centers)
    torch.testing.assert_close(again, expected, rtol=0, atol=1e-12)


def published_mean(features, targets, centers, temperature):
    """What the published code computes: all views, the first of each sample before the second, with sizes as it has."""
    labels = targets.repeat(features.shape[1])
    z = features.transpose(0, 1).flatten(0, 1)
    others, classes = torch.cat([z, centers]), torch.cat([labels, torch.arange(len(centers))])
    same = (labels[:, None] == classes).double() * (1 - torch.eye(len(z), len(others)))
    sizes = classes.bincount()[classes] - same
    logits = z @ others.T / temperature
    below = (logits.exp() * (1 - torch.eye(len(z), len(others))) / sizes).sum(1, keepdim=True)
    return -((same * (logits - below.log())).sum(1) / same.sum(1)).mean()


@pytest.mark.usefixtures("float64")
def test_mean_is_that_of_the_published_code():
    features, centers, targets = unit(8, 2, 4), unit(5, 4), torch.randint(5, (8,))
    expected = published_mean(features, targets, centers, 0.1)
    torch.testing.assert_close(balanced_contrastive(features, targets, centers, 0.1).mean(), expected)


@pytest.mark.usefixtures("float64")
def test_ignored_samples_are_not_compared():
    features, centers = unit(5, 2, 3).requires_grad_(), unit(4, 3)
    targets = torch.tensor([0, 255, 3, 255, 0])
    losses = BalancedContrastiveLoss(0.2, ignore_index=255)(features, targets, centers)
    expected = naive_losses(features.detach(), targets, centers, 0.2, ignored=(1, 3))
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-12)
    losses.sum().backward()
    assert features.grad[[1, 3]].eq(0).all()
    assert features.grad.isfinite().all()
    assert BalancedContrastiveLoss()(features, torch.full((5,), -100), centers).eq(0).all()


@pytest.mark.usefixtures("float64")
def test_gradient_of_the_loss():
    features, centers, targets = unit(4, 2, 3).requires_grad_(), unit(3, 3).requires_grad_(), torch.tensor([0, 2, 0, 1])
    assert torch.autograd.gradcheck(lambda z, c: BalancedContrastiveLoss(0.5)(z, targets, c), (features, centers))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    features, centers, targets = unit(6, 2, 8), unit(5, 8), torch.randint(5, (6,))
    expected = BalancedContrastiveLoss()(features.to(dtype).float(), targets, centers.to(dtype).float())
    with torch.autocast("cpu", torch.bfloat16):
        losses = BalancedContrastiveLoss()(features.to(dtype), targets, centers.to(dtype))
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected)


LOSS = BalancedContrastiveLoss()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BalancedContrastiveLoss(0), "`temperature` to be a finite number > 0, but got 0"),
        (lambda: BalancedContrastiveLoss(ignore_index=0.5), "`ignore_index` to be an integer, but got 0.5"),
        (lambda: LOSS(torch.ones(4, 3), torch.zeros(4).long(), torch.ones(2, 3)), r"`features` .* \(N, V, D\)"),
        (lambda: LOSS(torch.ones(4, 2, 3), torch.zeros(4).long(), torch.ones(2, 5)), r"`centers` .* \(C, 3\)"),
        (lambda: LOSS(torch.ones(4, 2, 3), torch.zeros(4, 2), torch.ones(2, 3)), r"`targets` .* class indices of sh"),
        (lambda: LOSS(torch.ones(4, 2, 3), torch.zeros(3).long(), torch.ones(2, 3)), r"`targets` .* shape \(4,\)"),
        (lambda: ContrastiveBranch(weight=-1), "`weight` to be a finite number >= 0, but got -1"),
        (lambda: ContrastiveBranch(loss_weight=math.nan), "`loss_weight` to be a finite number >= 0, but got nan"),
        (lambda: ContrastiveBranch(temperature=0), "`temperature` to be a finite number > 0"),
        (lambda: ContrastiveBranch(dim=0), "`dim` to be an integer >= 1, but got 0"),
        (lambda: ContrastiveBranch(hidden=0), "`hidden` to be an integer >= 1, but got 0"),
        (lambda: classifier(contrast=nn.Identity()), "`contrast` to be a ContrastiveBranch, but got"),
        (lambda: classifier(multi_label=True), "`contrast` to be None for multi-label data, but got"),
        (lambda: classifier(backbone=lambda num_classes: nn.Conv2d(3, 5, 1)), "`backbone` .* nn.Linear of 5 outputs"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# The branch -----------------------------------------------------------------------------------------------------------


def small_net(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, num_classes))


def classifier(objective=None, backbone=small_net, contrast=None, **kwargs):
    contrast = ContrastiveBranch(0.6, 2.0, 0.3, dim=4, hidden=7) if contrast is None else contrast
    loss = None if kwargs.get("multi_label") else LogitAdjustedLoss()
    return LongTailClassifier(COUNTS, backbone, objective or ERM(), loss, tail_below=10, contrast=contrast, **kwargs)


def batch_of_views(number=8, views=3, shape=(3, 2, 2)):
    return torch.randn(number, views, *shape), torch.randint(5, (number,))


def naive_sample_losses(model, views, targets):
    """Both branches, written out."""
    body, last, branch = model.backbone[:-1], model.backbone[-1], model.contrast
    features = [body(view) for view in views.unbind(1)]
    adjusted = last(features[0]) + torch.tensor(COUNTS).double().log()
    projected = branch.projection(torch.cat(features)).chunk(len(features))
    others = F.normalize(torch.stack(projected[1:], 1), dim=-1)
    centers = F.normalize(branch.center_projection(last.weight), dim=-1)
    contrast = balanced_contrastive(others, targets, centers, 0.3)
    return 2.0 * F.cross_entropy(adjusted, targets, reduction="none") + 0.6 * contrast


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("views", [2, 3])
def test_losses_of_the_branch(views):
    model, (x, y) = classifier(), batch_of_views(views=views)
    expected = naive_sample_losses(model, x, y)
    assert expected.shape == (8,)
    torch.testing.assert_close(model.sample_losses((x, y)), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(model.sample_losses((list(x.unbind(1)), y)), expected, rtol=0, atol=1e-12)
    # Validation and predictions are those of the classifier.
    assert model(x[:, 0]).shape == (8, 5)
    assert not model.backbone[-1]._forward_pre_hooks


OBJECTIVES = {
    "ERM": ERM,
    "SAM": lambda: SAM(0.05),
    "ImbSAM": lambda: ImbSAM(rho=0.05),
    "SSESAM": lambda: SSESAM(head_rho=0.05, tail_rho=0.1),
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("name", "stage"), [("ERM", 1), ("SAM", 1), ("ImbSAM", 1), ("SSESAM", 1), ("SSESAM", 2)])
def test_training_equals_its_naive_twin(name, stage):
    """Three updates, against the definition written out with the whole batch in every pass."""
    model = classifier(OBJECTIVES[name](), optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
    if stage == 2:
        model.objective.stage = 2
    twin, steps = copy.deepcopy(model), [batch_of_views() for _ in range(3)]
    parameters = list(twin.parameters())

    def gradient(weights, x, y):
        return torch.autograd.grad((weights * naive_sample_losses(twin, x, y)).sum(), parameters)

    def add(vectors, factor):
        with torch.no_grad():
            for p, vector in zip(parameters, vectors, strict=True):
                p.add_(factor * vector)

    for x, y in steps:
        found = []
        for term in model.objective.terms(y):
            moved = gradient(term.weights, x, y)
            if term.rho > 0:
                distance = term.rho / torch.sqrt(sum((g**2).sum() for g in moved))
                add(moved, distance)
                direction, moved = moved, gradient(term.weights, x, y)
                add(direction, -distance)
            found.append(moved)
        for vectors in found:
            add(vectors, -0.1)
    fit(model, steps)
    for (key, p), q in zip(model.named_parameters(), parameters, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-11, msg=key)


class Contrasted(Model):
    """A module of somebody's own, without batch norm: only its loss mixes samples."""

    def __init__(self, objective=None, passes="auto"):
        super().__init__(nn.Linear(8, 4), objective, passes)
        self.centers, self.loss = nn.Parameter(torch.randn(5, 4)), BalancedContrastiveLoss(0.5)

    def sample_losses(self, batch):
        views, targets = batch
        self.sizes = [*getattr(self, "sizes", []), len(targets)]
        return self.loss(self.net(views), targets, self.centers)


@pytest.mark.usefixtures("float64")
def test_auto_passes_find_that_samples_are_compared(capsys, caplog):
    steps = [(torch.randn(12, 2, 8), torch.arange(12) % 5) for _ in range(2)]
    models = {passes: Contrasted(SSESAM(SPLIT, 0.05, 0.1), passes) for passes in ("auto", "full")}
    models["full"].load_state_dict(models["auto"].state_dict())
    with caplog.at_level("INFO"):
        for model in models.values():
            fit(model, steps)
    assert "the loss of a sample depends on the other samples of the batch" in caplog.text + capsys.readouterr().err
    torch.testing.assert_close(models["auto"].state_dict(), models["full"].state_dict(), rtol=0, atol=0)
    assert set(models["full"].sizes) == {12}


@pytest.mark.usefixtures("float64")
def test_split_passes_are_refused():
    with pytest.raises(MisconfigurationException, match="`passes='split'` cannot work with `contrast`"):
        classifier(step_options=StepOptions(passes="split", batch_norm_statistics="group"))
    model = classifier(SAM(0.05))
    model.step_options = StepOptions(passes="split", batch_norm_statistics="group")
    with pytest.raises(MisconfigurationException, match="`passes='split'` cannot work with `contrast`"):
        fit(model, [batch_of_views()])


@pytest.mark.parametrize(
    ("views", "got"),
    [
        (torch.randn(4, 3, 2, 2), r"shape \(4, 3, 2, 2\)"),
        (torch.randn(4, 1, 3, 2, 2), r"shape \(4, 1, 3, 2, 2\)"),
        ([torch.randn(4, 3, 2, 2)], "a list of 1"),
        ([torch.randn(4, 3, 2, 2), torch.randn(4, 3, 3, 3)], "a list of 2"),
    ],
)
def test_batches_without_views_are_refused(views, got):
    with pytest.raises(ValueError, match=rf"`contrast` to be None, or to get batches with V >= 2 views .*{got}"):
        classifier().sample_losses((views, torch.zeros(4).long()))


def test_classifier_alone_is_what_classifier_selections_move():
    """CC-SAM moves the last linear layer, which must be the classifier and not a projection."""
    model = classifier(CCSAM(radius=0.1))
    linear = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    assert linear[-1] == "backbone.3"
    fit(model, [batch_of_views()])


@pytest.mark.parametrize("backbone", [SmallConvNet, CIFARResNet])
def test_checkpoint_builds_the_branch(backbone, tmp_path):
    model = classifier(backbone=backbone, in_channels=3)
    run = trainer(accelerator="cpu")
    run.fit(model, DataLoader([batch_of_views(shape=(3, 8, 8))], batch_size=None))
    run.save_checkpoint(tmp_path / "a.ckpt")
    loaded = LongTailClassifier.load_from_checkpoint(tmp_path / "a.ckpt")
    assert repr(loaded.contrast) == repr(model.contrast)
    assert [loaded.contrast.weight, loaded.contrast.loss_weight, loaded.contrast.temperature] == [0.6, 2.0, 0.3]
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_cosine_classifiers_have_centers():
    model = classifier(backbone=lambda num_classes: CIFARResNet(num_classes, 8, normalized=True))
    assert isinstance(model.backbone.classifier, NormalizedLinear)
    assert model.sample_losses(batch_of_views(shape=(3, 8, 8))).isfinite().all()
