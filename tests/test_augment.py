"""Stronger transforms of training images, several views, and a learning rate that warms up."""

import copy
import math
import pickle
from collections import Counter

import pytest
import torch
from helpers import STRICT
from PIL import Image
from torchvision.transforms import v2

from lightning_ssesam.data import AutoAugmentCutout, SeveralViews, SimAugment
from lightning_ssesam.data.augment import CIFAR100_MEAN, CIFAR100_STD
from lightning_ssesam.models import WarmupLR

pytestmark = STRICT

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
NOISE = v2.ToPILImage()(
    torch.randint(1, 256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
)


def test_augmented_image_is_that_of_torchvisions_transforms():
    """For the same draws: crop, mirror image, policy, then Cutout, which is black and not of the mean colour."""
    usual = v2.Compose([
        v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10),
        v2.ToImage(), v2.ToDtype(torch.float32, scale=True),
    ])  # fmt: skip
    normalize = v2.Normalize(CIFAR100_MEAN, CIFAR100_STD)
    for seed in range(20):
        torch.manual_seed(seed)
        expected = usual(NOISE)
        row, column = (int(torch.randint(32, ())) for _ in range(2))
        for y in range(32):
            for x in range(32):
                if -8 <= y - row < 8 and -8 <= x - column < 8:
                    expected[:, y, x] = 0
        torch.manual_seed(seed)
        assert torch.equal(AutoAugmentCutout()(NOISE), normalize(expected))


def test_cutout_covers_every_pixel_as_often_as_published():
    """The centre is uniform, so a square at the border is smaller; 16 x 16 pixels where it is not."""
    image, sizes, hits = Image.new("RGB", (32, 32), "white"), Counter(), torch.zeros(32, 32)
    transform = AutoAugmentCutout(cutout=16, **PLAIN)
    for _ in range(3000):
        cut = transform._cut_out(torch.ones(3, 32, 32)) == 0
        assert cut[0].equal(cut[1])
        sizes[int(cut[0].sum())] += 1
        hits += cut[0]
    assert max(sizes) == 256
    assert sizes[256] / 3000 == pytest.approx((17 / 32) ** 2, abs=0.03)
    assert float(hits[16, 16]) / 3000 == pytest.approx(0.25, abs=0.03)
    assert float(hits[0, 0]) / 3000 == pytest.approx((9 / 32) ** 2, abs=0.02)
    assert AutoAugmentCutout(cutout=0, **PLAIN)(image).shape == (3, 32, 32)
    assert torch.equal(AutoAugmentCutout(cutout=0)._cut_out(torch.ones(3, 4, 4)), torch.ones(3, 4, 4))


def test_sim_augment_is_that_of_torchvisions_transforms():
    usual = v2.Compose([
        v2.RandomResizedCrop(32, scale=(0.2, 1.0)), v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8), v2.RandomGrayscale(p=0.2),
        v2.RandomApply([v2.GaussianBlur(3, (0.1, 2.0))], p=0.5), v2.ToImage(), v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(CIFAR100_MEAN, CIFAR100_STD),
    ])  # fmt: skip
    for seed in range(5):
        torch.manual_seed(seed)
        expected = usual(NOISE)
        torch.manual_seed(seed)
        assert torch.equal(SimAugment(blur=0.5)(NOISE), expected)
    assert SimAugment(224, smallest_crop=0.08)(NOISE).shape == (3, 224, 224)


def test_views_are_drawn_apart_and_in_order():
    torch.manual_seed(0)
    as_it_is = v2.Compose([v2.PILToTensor(), v2.ToDtype(torch.float32)])
    views = SeveralViews([as_it_is, as_it_is, AutoAugmentCutout(), AutoAugmentCutout()])
    made = views(NOISE)
    assert made.shape == (4, 3, 32, 32)
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], v2.PILToTensor()(NOISE).float())
    assert not torch.equal(made[2], made[3])
    assert pickle.loads(pickle.dumps(views))(NOISE).shape == made.shape


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AutoAugmentCutout(0), "`image_size` to be an integer >= 1, but got 0"),
        (lambda: AutoAugmentCutout(cutout=-1), "`cutout` to be an integer >= 0, but got -1"),
        (lambda: AutoAugmentCutout(mean=(0.5,)), "`mean` to be 3 numbers, one for each channel"),
        (lambda: SimAugment(std=(0, 1, 1)), "`std` to be 3 numbers > 0, one for each channel"),
        (lambda: SimAugment(smallest_crop=0), r"`smallest_crop` to be a number in \(0, 1\], but got 0"),
        (lambda: SimAugment(smallest_crop=1.5), r"`smallest_crop` to be a number in \[0, 1\], but got 1.5"),
        (lambda: SimAugment(blur=2), r"`blur` to be a number in \[0, 1\], but got 2"),
        (lambda: SeveralViews([SimAugment()]), "`transforms` to be a list of at least two transforms"),
        (lambda: SeveralViews([SimAugment(), 3]), "`transforms` to be a list of at least two transforms"),
        (lambda: SeveralViews(SimAugment()), "`transforms` to be a list of at least two transforms"),
        (lambda: schedule(0), "`total` to be an integer >= 1, but got 0"),
        (lambda: schedule(5, warmup=5), "`warmup` to be less than total = 5, but got 5"),
        (lambda: schedule(5, warmup=-1), "`warmup` to be an integer >= 0, but got -1"),
        (lambda: schedule(9, milestones=[3, 2]), "`milestones` to be a strictly increasing list of integers >= 1"),
        (lambda: schedule(9, gamma=1.5), r"`gamma` to be a number in \[0, 1\], but got 1.5"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def schedule(*args, rates=(1.0,), **kwargs):
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": rate} for rate in rates]
    return WarmupLR(torch.optim.SGD(groups), *args, **kwargs)


def rates_of(made, number):
    rates = []
    for _ in range(number):
        rates.append(made.get_last_lr())
        made.optimizer.step()
        made.step()
    return rates


def test_rates_are_those_of_the_published_code():
    """BCL on CIFAR: 0.15 after five epochs, a tenth of it after 160, a hundredth after 180."""
    found = rates_of(schedule(200, 5, [160, 180], rates=(0.15, 0.3)), 200)
    for epoch, (rate, other) in enumerate(found):
        expected = (
            0.15 / 5 * (epoch + 1) if epoch < 5 else 0.15 * (0.01 if epoch >= 180 else 0.1 if epoch >= 160 else 1)
        )
        assert rate == pytest.approx(expected, rel=1e-12)
        assert other == pytest.approx(2 * rate, rel=1e-12)


@pytest.mark.parametrize("warmup", [0, 3])
def test_cosine(warmup):
    found = [rate for (rate,) in rates_of(schedule(10, warmup), 12)]
    assert found[:warmup] == pytest.approx([(epoch + 1) / 3 for epoch in range(warmup)])
    falling = [0.5 * (1 + math.cos(math.pi * k / (10 - warmup))) for k in range(10 - warmup)]
    assert found[warmup:10] == pytest.approx(falling)
    assert found[10:] == [0.0, 0.0]


def test_schedule_goes_on_from_its_state():
    whole = rates_of(schedule(10, 3, [6]), 10)
    first = schedule(10, 3, [6])
    rates_of(first, 4)
    second = schedule(10, 3, [6])
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    assert rates_of(second, 6) == whole[4:]
