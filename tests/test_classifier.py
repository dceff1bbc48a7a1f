import pytest
import torch
import torch.nn.functional as F
from helpers import STRICT, batches_loader, classification_batch, trainer
from torch import nn

from lightning_ssesam import SAM, SSESAM, ClassSplit, DigitsLT, ImbSAM, LongTailClassifier, StageSwitch, StepOptions
from lightning_ssesam.models import SmallConvNet

pytestmark = STRICT

COUNTS = [50, 40, 30, 6, 5]


def test_makes_the_split_and_hands_it_on():
    class Margin(nn.Module):
        reduction = "none"

        def bind(self, split):
            self.split = split

        def forward(self, logits, targets):
            return F.cross_entropy(logits, targets, reduction="none")

    objective, loss = ImbSAM(rho=0.1), Margin()
    model = LongTailClassifier(COUNTS, nn.Linear(8, 5), objective, loss, tail_below=10, many_above=40, few_below=6)
    assert objective.split.tail.tolist() == [False, False, False, True, True]
    assert loss.split is objective.split is model.objective.split
    assert (objective.split.many.sum(), objective.split.few.sum()) == (1, 1)


def test_defaults():
    model = LongTailClassifier(COUNTS, SmallConvNet)
    assert isinstance(model.objective, SSESAM)
    # 5 + 6 of 131 samples are the rarest classes within a fifth; with 30 more they are not.
    assert model.objective.split.tail.tolist() == [False, False, False, True, True]
    assert model.backbone.classifier.out_features == 5
    optimizer = model.configure_optimizers()
    assert (optimizer.defaults["lr"], optimizer.defaults["momentum"]) == (0.1, 0.9)
    assert model.loss.reduction == "none"


def test_parts_are_not_shared_between_models():
    first, second = LongTailClassifier(COUNTS, SmallConvNet), LongTailClassifier(COUNTS, SmallConvNet)
    assert first.objective is not second.objective
    assert first.backbone is not second.backbone


def test_logs_losses_and_accuracies():
    torch.manual_seed(0)
    model = LongTailClassifier(COUNTS, nn.Linear(8, 5), many_above=35, few_below=6)
    data = [classification_batch(20) for _ in range(3)]
    (logged,) = trainer().test(model, batches_loader(data), verbose=False)
    inputs, targets = (torch.cat(parts) for parts in zip(*data, strict=True))
    logits = model(inputs)
    recalls = [(logits.argmax(1)[targets == k] == k).float().mean().item() for k in range(5)]
    groups = {"head": [0, 1, 2], "tail": [3, 4], "many": [0, 1], "medium": [2, 3], "few": [4], "all": range(5)}
    expected = {f"test/acc_{g}": sum(recalls[k] for k in ks) / len(ks) for g, ks in groups.items()}
    expected["test/loss"] = F.cross_entropy(logits, targets).item()
    for source in ("head", "tail"):
        for target in ("head", "tail"):
            rates = [
                sum(int(p) != k and int(p) in groups[target] for p in logits[targets == k].argmax(1))
                / (targets == k).sum()
                for k in groups[source]
            ]
            expected[f"test/{source}_to_{target}"] = float(sum(rates) / len(rates))
    assert logged == pytest.approx(expected)


def test_hflip_averages_probabilities_with_those_of_the_mirror_image():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(6, 3))
    models = [LongTailClassifier([30, 20, 5], net, tta=tta) for tta in ("none", "hflip")]
    images, targets = torch.randn(200, 1, 2, 3), torch.randint(3, (200,))
    both = net(images).softmax(1) + net(images.flip(3)).softmax(1)
    for model, scores in zip(models, (net(images), both), strict=True):
        (logged,) = trainer().test(model, batches_loader([(images, targets)]), verbose=False)
        recalls = [(scores.argmax(1)[targets == k] == k).float().mean().item() for k in range(3)]
        assert logged["test/acc_all"] == pytest.approx(sum(recalls) / 3)
        assert logged["test/loss"] == pytest.approx(F.cross_entropy(net(images), targets).item())
    with pytest.raises(ValueError, match="`tta` to be one of 'none', 'hflip', but got 'vflip'"):
        LongTailClassifier([30, 20, 5], net, tta="vflip")


def test_metrics_start_anew_every_epoch():
    data = DigitsLT(imbalance_factor=20)
    model = LongTailClassifier(data.class_counts, SmallConvNet)
    run = trainer(max_epochs=2, callbacks=[StageSwitch(at=0.5)])
    run.fit(model, datamodule=data)
    fitted = {name: value.item() for name, value in run.callback_metrics.items() if name.startswith("val/")}
    (again,) = run.validate(model, datamodule=data, verbose=False)
    assert again == pytest.approx(fitted, nan_ok=True)
    assert model.objective.stage == 2


def test_learns_digits():
    torch.manual_seed(0)
    data = DigitsLT(imbalance_factor=2)
    model = LongTailClassifier(data.class_counts, SmallConvNet, SAM(0.05))
    run = trainer(max_epochs=5)
    run.fit(model, datamodule=data)
    (tested,) = run.test(model, datamodule=data, verbose=False)
    assert tested["test/acc_all"] > 0.9


def test_scheduler_and_optimizer_are_injected():
    model = LongTailClassifier(
        COUNTS,
        nn.Linear(8, 5),
        optimizer=lambda params: torch.optim.AdamW(params, lr=0.01),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
    )
    run = trainer(max_epochs=3)
    run.fit(model, batches_loader([classification_batch() for _ in range(2)]))
    assert isinstance(run.optimizers[0], torch.optim.AdamW)
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01 / 8)


def test_scheduler_by_the_step():
    model = LongTailClassifier(
        COUNTS,
        nn.Linear(8, 5),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
        scheduler_interval="step",
    )
    run = trainer()
    run.fit(model, batches_loader([classification_batch() for _ in range(3)]))
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 / 8)


def test_options_of_the_step():
    options = StepOptions(passes="split", batch_norm_statistics="group", log_sharpness=True)
    model = LongTailClassifier(COUNTS, nn.Linear(8, 5), step_options=options)
    assert model.step_options is options
    run = trainer()
    run.fit(model, batches_loader([classification_batch()]))
    assert run.callback_metrics["train/grad_norm"] > 0


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_small_conv_net(norm):
    net = SmallConvNet(num_classes=7, in_channels=3, width=16, norm=norm)
    assert net(torch.randn(4, 3, 9, 12)).shape == (4, 7)
    # Group norm keeps samples apart, so that split passes are exact; batch norm does not.
    x = torch.randn(6, 3, 8, 8)
    together = net(x)[:3]
    assert torch.allclose(together, net(x[:3]), atol=1e-6) == (norm == "group")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LongTailClassifier([3, 0], nn.Linear(8, 2)), "`class_counts` to be integers >= 1 for every class"),
        (lambda: LongTailClassifier([3, 1], nn.Linear(8, 2), tail_below=1), "both head and tail classes"),
        (
            lambda: LongTailClassifier([9, 1], nn.Linear(8, 2), tail_below=2, tail_fraction=0.5),
            "exactly one of the arguments",
        ),
        (
            lambda: LongTailClassifier([9, 1], nn.Linear(8, 2), loss=nn.CrossEntropyLoss()),
            "`loss` to be a module with reduction='none', but got reduction='mean'",
        ),
        (
            lambda: LongTailClassifier([9, 1], nn.Linear(8, 2), SSESAM(ClassSplit([9, 1], tail=[1]))),
            "Pass `objective` without a split: LongTailClassifier builds the split from `class_counts`",
        ),
        (lambda: LongTailClassifier([9, 1], SmallConvNet, "SAM"), "`objective` to be an Objective, but got 'SAM'"),
        (
            lambda: LongTailClassifier([9, 1], None),
            "`backbone` to be a class or a function that makes it, but got None",
        ),
        (lambda: LongTailClassifier([9, 1], SmallConvNet, optimizer="sgd"), "`optimizer` to be a class or a function"),
        (lambda: LongTailClassifier([9, 1], SmallConvNet, scheduler="cos"), "`scheduler` to be a class or a function"),
        (
            lambda: LongTailClassifier([9, 1], nn.Linear(8, 3))(torch.ones(2, 8)),
            r"`backbone` to be a network with logits \(N, 2\), .* but got one with an output of shape \(2, 3\)",
        ),
        (
            lambda: LongTailClassifier([9, 1], nn.Linear(8, 2), step_options={"interval": 2}),
            "`step_options` to be a StepOptions, but got {'interval': 2}",
        ),
        (
            lambda: LongTailClassifier([9, 1], nn.Linear(8, 2), scheduler_interval="batch"),
            "one of 'epoch', 'step', but",
        ),
        (lambda: SmallConvNet(0), "`num_classes` to be an integer >= 1, but got 0"),
        (lambda: SmallConvNet(2, norm="layer"), "`norm` to be one of 'group', 'batch', but got 'layer'"),
        (lambda: SmallConvNet(2, width=12), "`width` to be a multiple of 8, but got 12"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
