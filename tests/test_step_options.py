import copy
from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch
from helpers import SPLIT, STRICT, Model, batches, fit, mlp, naive_gradient
from torch import nn

from lightning_ssesam import SSESAM, StepOptions
from lightning_ssesam.errors import ArgumentError

pytestmark = STRICT


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(
            ({"interval": value}, f"Expected argument `interval` to be an integer >= 1, but got {value!r}.")
            for value in (0, -1, 1.5, "2", None, True)
        ),
        ({"passes": "half"}, "Expected argument `passes` to be one of 'auto', 'full', 'split', but got 'half'."),
        (
            {"batch_norm_statistics": "fixed"},
            "Expected argument `batch_norm_statistics` to be one of 'batch', 'group', but got 'fixed'.",
        ),
        ({"processes": 2}, "Expected argument `processes` to be one of 'global', 'local', but got 2."),
        (
            {"on_nonfinite": "stop"},
            "Expected argument `on_nonfinite` to be one of 'ignore', 'skip', 'raise', but got 'stop'.",
        ),
        ({"log_loss": 0}, "Expected argument `log_loss` to be True or False, but got 0."),
        ({"log_sharpness": "yes"}, "Expected argument `log_sharpness` to be True or False, but got 'yes'."),
        ({"exact_resume": 1}, "Expected argument `exact_resume` to be True or False, but got 1."),
        *(
            (
                {"batch_norm_statistics": "group", "passes": passes},
                f"`batch_norm_statistics='group'` requires `passes='split'`, but `passes` is '{passes}'.",
            )
            for passes in ("auto", "full")
        ),
    ],
)
def test_bad_values(options, message):
    with pytest.raises(ArgumentError) as caught:
        StepOptions(**options)
    assert str(caught.value) == message


def test_cannot_be_changed_but_replaced():
    options = StepOptions()
    with pytest.raises(FrozenInstanceError):
        options.interval = 2
    assert replace(options, interval=2) == StepOptions(interval=2) != options
    with pytest.raises(ArgumentError, match="`interval`"):
        replace(options, interval=0)


@pytest.mark.usefixtures("float64")
def test_names_of_a_user_change_nothing():
    """Attributes of the module that have the names of options are the user's own."""

    class Own(Model):
        def __init__(self, net):
            super().__init__(net, SSESAM(SPLIT), optimizer=lambda params: torch.optim.SGD(params, lr=1.0))
            self.interval, self.passes, self.on_nonfinite, self.ascent = 50, 3, "own", None
            self.batch_norm, self.log_sharpness, self.processes = nn.Identity(), 1, []

    assert {"interval", "passes", "on_nonfinite", "log_sharpness"} <= {field.name for field in fields(StepOptions)}
    net, data = mlp(), batches(1)
    gradient = naive_gradient(net, SSESAM(SPLIT).terms(data[0][1]), *data[0])
    expected = [p.detach() - g for p, g in zip(net.parameters(), gradient, strict=True)]
    model = Own(copy.deepcopy(net))
    run = fit(model, data)
    torch.testing.assert_close(list(model.net.parameters()), expected, rtol=0, atol=1e-14)
    assert not any("sharpness" in name for name in run.callback_metrics)


def test_options_of_a_class_and_in_a_checkpoint(tmp_path):
    class Own(Model):
        step_options = StepOptions(interval=3)

        def __init__(self, options=None):
            super().__init__(mlp(), SSESAM(SPLIT))
            self.save_hyperparameters()
            self.step_options = options or type(self).step_options

    model = Own(StepOptions(log_sharpness=True))
    run = fit(model, batches(1))
    run.save_checkpoint("options.ckpt")
    assert torch.load("options.ckpt", weights_only=True)["hyper_parameters"]["options"] == model.step_options
    assert Own.load_from_checkpoint("options.ckpt").step_options == StepOptions(log_sharpness=True)
    assert Own().step_options.interval == 3
