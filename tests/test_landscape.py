"""Losses along lines and over planes: against a quadratic, and against weights that are moved by hand."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import SPLIT, Model, assert_same_bits, batches, convbn, mlp
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from lightning_ssesam.curvature import Hessian, filter_normalized, line, plane

DATA = [(torch.zeros(2, 1), torch.tensor([0, 0]))]


class Quadratic(nn.Module):
    """L(w) = 1 + w . diag(3, -2, 0.5) w / 2 at w = (0.1, 0.2, 0.3)."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64))

    def sample_losses(self, batch):
        curvature = torch.tensor([3, -2, 0.5], dtype=torch.float64)
        return (1 + 0.5 * curvature @ self.w**2).expand(len(batch[0]))


def loss_of(w):
    return 1 + 0.5 * (3 * w[0] ** 2 - 2 * w[1] ** 2 + 0.5 * w[2] ** 2)


def test_a_quadratic():
    hessian = Hessian(Quadratic(), DATA)
    offsets = [-2, 0.0, 0.5]
    direction = torch.tensor([0.0, 1, 2], dtype=torch.float64)
    along = [loss_of((0.1, 0.2 + t, 0.3 + 2 * t)) for t in offsets]
    assert line(hessian, direction, offsets) == pytest.approx(np.array(along), rel=1e-12)
    second = torch.tensor([3.0, 0, 0], dtype=torch.float64)
    over = [[loss_of((0.1 + 3 * b, 0.2 + a, 0.3 + 2 * a)) for b in (1, -1)] for a in offsets]
    assert plane(hessian, direction, second, offsets, [1, -1]) == pytest.approx(np.array(over), rel=1e-12)
    square = plane(hessian, direction, second, offsets)
    assert square.shape == (3, 3)
    assert square[0, 2] == pytest.approx(loss_of((0.1 + 1.5, 0.2 - 2, 0.3 - 4)))


def test_against_weights_moved_by_hand():
    net, data = convbn().eval(), batches(2, shape=(3, 5, 5))
    model = Model(net)
    before = copy.deepcopy(model.state_dict())
    direction = filter_normalized(model, 3)
    losses = line(Hessian(model, data, classes=SPLIT.tail), direction, [-0.7, 0.4])
    assert_same_bits(model.state_dict().values(), before.values())
    for offset, loss in zip((-0.7, 0.4), losses, strict=True):
        moved = copy.deepcopy(net)
        parts = direction.split([p.numel() for p in moved.parameters()])
        with torch.no_grad():
            for parameter, part in zip(moved.parameters(), parts, strict=True):
                parameter += offset * part.view_as(parameter)
        inputs, targets = (torch.cat(part) for part in zip(*data, strict=True))
        chosen = SPLIT.tail[targets]
        assert loss == pytest.approx(F.cross_entropy(moved(inputs[chosen]), targets[chosen]).item(), rel=1e-5)


def test_filters_are_as_long_as_those_of_the_weights():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5), nn.Linear(5, 2))
    net[2].weight.data[1] = 0
    net[3].requires_grad_(False)
    direction = filter_normalized(net)
    conv, conv_bias, norm, norm_bias, linear, linear_bias = direction.split([108, 4, 4, 4, 20, 5])
    for part, weights in ((conv, net[0].weight), (linear, net[2].weight)):
        rows = weights.detach().flatten(1)
        torch.testing.assert_close(part.view_as(rows).norm(dim=1), rows.norm(dim=1))
    for part in (conv_bias, norm, norm_bias, linear_bias):
        assert not part.any()
    # Of random directions: none prefers the weights, and another seed is another one.
    cosine = torch.cosine_similarity(conv, net[0].weight.detach().flatten(), dim=0)
    assert abs(cosine) < 4 / math.sqrt(108)
    assert filter_normalized(net, 0).equal(direction)
    assert abs(torch.cosine_similarity(filter_normalized(net, 1), direction, dim=0)) < 4 / math.sqrt(108)
    # An entry of a filter is not told from another: all of them get the same factor.
    drawn = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0)).flatten(1)
    ratios = conv.view(4, 27) / drawn
    torch.testing.assert_close(ratios, ratios[:, :1].expand(4, 27))


def output_filters(layer, groups):
    """The weights of each output channel of a transposed convolution, one by one."""
    weights = layer.detach().double()
    ins, outs = len(weights) // groups, weights.shape[1]
    return [weights[g * ins : (g + 1) * ins, k] for g in range(groups) for k in range(outs)]


@pytest.mark.parametrize("wrap", [lambda layer: layer, spectral_norm], ids=["plain", "spectral norm"])
@pytest.mark.parametrize(
    ("make", "groups"),
    [
        (lambda: nn.ConvTranspose2d(6, 4, 3), 1),
        (lambda: nn.ConvTranspose2d(6, 4, (1, 3), groups=2, bias=False), 2),
        (lambda: nn.ConvTranspose1d(4, 4, 3, groups=4), 4),
        (lambda: nn.ConvTranspose3d(2, 6, 2, groups=2), 2),
        (lambda: nn.ConvTranspose2d(4, 4, 1), 1),
    ],
)
def test_filters_of_transposed_convolutions(make, groups, wrap):
    """Against a loop over groups and output channels. All weights of a filter get the same factor."""
    layer = make()
    with torch.no_grad():
        layer.weight *= torch.rand(layer.weight.shape[1], *[1] * (layer.weight.ndim - 2)) + 0.1
    net = nn.Sequential(wrap(layer), nn.Conv2d(4, 6, 1, groups=2))
    weight = max(net[0].parameters(), key=lambda p: p.ndim)
    direction = filter_normalized(net)
    drawn, start = torch.Generator().manual_seed(0), 0
    for parameter in net.parameters():
        noise = torch.randn(parameter.shape, generator=drawn)
        part = direction[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
        if parameter.ndim == 1:
            assert not part.any()
            continue
        split = output_filters if parameter is weight else lambda p, _: list(p.detach().double())
        for moved, like, raw in zip(*(split(t, groups) for t in (part, parameter, noise)), strict=True):
            torch.testing.assert_close(moved, raw * like.norm() / raw.norm(), rtol=1e-5, atol=1e-6)
    assert start == len(direction)


def test_losses_that_are_not_finite():
    net = mlp()
    far = line(Hessian(Model(net), batches(1)), torch.full((229,), 1e38), [0.0, 1e30])
    assert math.isfinite(far[0])
    assert not math.isfinite(far[1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda h: line(h, torch.zeros(2), [0.0]), r"`direction` to be a finite vector of shape \(3,\), but got one"),
        (lambda h: line(h, torch.tensor([0, 0, math.nan]), [0.0]), "`direction` to be a finite vector"),
        (lambda h: line(h, torch.zeros(3), [math.inf]), "`offsets` to be finite numbers"),
        (lambda h: plane(h, torch.zeros(3), torch.zeros(3, 1), [0.0]), "`second` to be a finite vector"),
        (lambda h: plane(h, torch.zeros(3), torch.zeros(3), [0.0], 1.0), "`second_offsets` to be finite numbers"),
        (lambda h: filter_normalized(h.model), "`model` to be one whose trained parameters have filters"),
        (lambda h: filter_normalized(mlp(), -1), "`seed` to be an integer >= 0"),
    ],
)
def test_misuse(call, message):
    with pytest.raises(ValueError, match=message):
        call(Hessian(Quadratic(), DATA))


def test_progress_is_shown(capsys):
    line(Hessian(Quadratic(), DATA), torch.zeros(3), [0.0, 1.0], "tail: a line")
    assert "tail: a line" in capsys.readouterr().err
    line(Hessian(Quadratic(), DATA), torch.zeros(3), [0.0, 1.0])
    assert not capsys.readouterr().err
