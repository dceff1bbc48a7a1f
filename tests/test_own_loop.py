"""The loops of docs/own_loop.md, in one process and in two, beside a plain version of the same training."""

import os
import socket

import pytest
import torch
from helpers import naive_gradient, start_process
from test_docs import code_of
from torch import nn

from lightning_ssesam.engine import SharpnessEngine

LOOPS = ["plain", "fabric", "ddp"]
START = "import torch\ntorch.set_num_threads(1)\ntorch.set_default_dtype(torch.float64)\n"
SAVE = "torch.save([net.state_dict() for net in (plain_net, fabric_net, ddp_net)], 'weights.pt')\n"
END = "dist.destroy_process_group()\n"


def environment(world, rank, port):
    """What torchrun tells a process."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    return {key: str(number) for key, number in numbers.items()} | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "none",
    }


def in_one_process(port, folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for key, value in environment(1, 0, port).items():
            patch.setenv(key, value)
        exec(START + code_of("docs/own_loop.md") + SAVE, {})
    torch.set_default_dtype(torch.float32)
    return [torch.load(folder / "weights.pt")]


def run_as_torchrun(code, variables):
    os.environ.update(variables)
    exec(code, {"__name__": "__main__"})


def in_two_processes(port, folder):
    code, in_one, in_two = code_of("docs/own_loop.md"), "devices=1)", 'devices=2, strategy="ddp")'
    assert code.count(in_one) == code.count(END) == 1
    # With torch 2.6, gloo now and then waits for ever in there if another process has ended already.
    code, processes = code.replace(END, f"{SAVE}import os; os._exit(0)\n"), []
    for rank in range(2):
        own = folder / str(rank)
        own.mkdir()
        arguments = START + code.replace(in_one, in_two), environment(2, rank, port)
        processes.append(start_process(run_as_torchrun, *arguments, folder=own, log=own / "log.txt"))
    try:
        for process in processes:
            process.join(timeout=120)
    finally:
        for process in processes:
            process.kill()
    errors = [(folder / str(rank) / "log.txt").read_text() for rank in range(2)]
    assert [process.exitcode for process in processes] == [0, 0], errors
    return [torch.load(folder / str(rank) / "weights.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """The weights that each loop ends with: for one process, and for each of two."""
    results = []
    for run in (in_one_process, in_two_processes):
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            port = server.getsockname()[1]
        results.append(run(port, tmp_path_factory.mktemp("loops")))
    return results


@pytest.fixture
def twin(float64):
    """The same training without the engine: the samples of an update at once, its terms one after the other."""
    names = {}
    exec(code_of("docs/own_loop.md").partition("def train(")[0], names)
    net, objective, (x, y) = names["make_net"](), names["make_objective"](), names["data"].tensors
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    clipped = 0
    for epoch in range(4):
        objective.stage = 1 if epoch < 3 else 2
        for inputs, targets in zip(x.split(48), y.split(48), strict=True):
            gradient = naive_gradient(net, objective.terms(targets), inputs, targets)
            for p, g in zip(net.parameters(), gradient, strict=True):
                p.grad = g
            clipped += nn.utils.clip_grad_norm_(net.parameters(), 0.5) > 0.5
            optimizer.step()
    assert 0 < clipped < 20
    return net.state_dict()


def test_scaled_backward(float64):
    """It scales the gradient, and neither loss nor perturbation."""
    names = {}
    exec(code_of("docs/own_loop.md").partition("def sum_gradients")[0], names)
    net, objective, batch = names["make_net"](), names["make_objective"](), names["data"][:48]
    results = []
    for options in ({}, {"backward": names["scaled_backward"]}):
        parts = names["microbatches"](net, objective, [batch])
        outcome = SharpnessEngine().compute(parts, net.parameters(), modules=net, **options)
        results.append(([p.grad for p in net.parameters()], outcome.loss, outcome.sharpness))
    (plain, *same), (scaled, *also_same) = results
    factor = names["scaler"].get_scale()
    assert factor > 1
    torch.testing.assert_close(scaled, [factor * g for g in plain], rtol=1e-12, atol=0)
    torch.testing.assert_close(also_same, same, rtol=0, atol=1e-14)


@pytest.mark.parametrize("loop", range(len(LOOPS)), ids=LOOPS)
def test_equals_the_plain_version(ends, twin, loop):
    """In one process, and in both of two."""
    weights = [of_process[loop] for of_processes in ends for of_process in of_processes]
    assert len(weights) == 3
    for state in weights:
        torch.testing.assert_close(state, twin, rtol=0, atol=1e-12)


@pytest.mark.parametrize("loop", range(len(LOOPS)), ids=LOOPS)
def test_two_processes_equal_one(ends, loop):
    ((alone,), together) = ends
    for of_process in together:
        torch.testing.assert_close(of_process[loop], alone[loop], rtol=0, atol=1e-12)
