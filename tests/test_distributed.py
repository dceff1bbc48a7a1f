"""Two processes train what one does. They run all of `SCENARIOS` once; each test looks at one of them."""

import os
import socket
import sys
import traceback
import warnings
from argparse import Namespace
from collections import Counter
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import twins
from helpers import (
    OBJECTIVES,
    SPLIT,
    STRICT,
    Automatic,
    Model,
    assert_same_bits,
    batches_loader,
    choose,
    classification_batch,
    convbn,
    fit,
    mlp,
    naive_gradient,
    sgd,
    start_process,
    trainer,
)
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_ssesam import (
    ASAM,
    CCSAM,
    GSAM,
    LESAM,
    PGN,
    SAM,
    SSESAM,
    Adaptive,
    Ascent,
    FocalSAM,
    Friendly,
    FriendlySAM,
    MomentumSAM,
    RandomSAM,
    StageSwitch,
)
from lightning_ssesam.terms import unperturbed

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from scaling_parts import traffic

pytestmark = STRICT

WORLD = 2


def data(shape=(8,), even=False):
    """For every process, its batches: unequal numbers of samples and of tail samples, and none at all."""
    torch.manual_seed(11)
    every, head, tail = range(5), [0, 1, 2], [3, 4]
    steps = [
        (24, every, 24, every),
        (24, every, 24, head),
        (6, tail, 24, head),
        (24, every, 5, every),
        (8, tail, 9, tail),
    ]
    if not even:
        steps.append((7, every, 0, every))
    if even:
        steps = [(24, kind, 24, other) for _, kind, _, other in steps]
    pairs = [(classification_batch(n, shape, a), classification_batch(m, shape, b)) for n, a, m, b in steps]
    return [[pair[rank] for pair in pairs] for rank in range(WORLD)]


def head_only():
    torch.manual_seed(16)
    return [[classification_batch(24, classes=[0, 1, 2]) for _ in range(3)] for _ in range(WORLD)]


def unions(parts):
    return [(torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]])) for a, b in zip(*parts, strict=True)]


def network(make=mlp):
    torch.manual_seed(12)
    return make()


def train(rank, model, parts, strategy=None, **kwargs):
    """Train in this process, with the others; return the module's state."""
    strategy = strategy or DDPStrategy(timeout=timedelta(seconds=60), process_group_backend="gloo")
    options = {"devices": WORLD, "strategy": strategy, "use_distributed_sampler": False, **kwargs}
    run = trainer(**options)
    run.fit(model, batches_loader(parts[rank]))
    return {"state": {k: v.clone() for k, v in model.state_dict().items()}, "metrics": run.callback_metrics}


def ddp(**kwargs):
    return DDPStrategy(timeout=timedelta(seconds=60), process_group_backend="gloo", **kwargs)


class Branches(Model):
    """Tail samples take a branch of their own, which other processes and steps leave unused."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.branch = nn.Linear(5, 5)

    def sample_losses(self, batch):
        x, y = batch
        logits = self.net(x)
        tail = y >= 3
        if bool(tail.any()):
            logits = torch.where(tail[:, None], self.branch(logits), logits)
        return F.cross_entropy(logits, y, reduction="none")


def branches(objective, passes="auto"):
    torch.manual_seed(13)
    return Branches(network(), objective, passes)


class Poisoned(Model):
    """The loss of the second step is not a number, in one process alone."""

    poisoned = True

    def __init__(self, *args):
        super().__init__(*args)
        choose(self, on_nonfinite="skip")

    def sample_losses(self, batch):
        losses = super().sample_losses(batch)
        return losses * float("nan") if self.global_step == 1 and self.poisoned else losses


def poisoned(rank):
    model = Poisoned(network(), SSESAM(SPLIT))
    model.poisoned = rank == 1
    return train(rank, model, data()) | {"skipped": model.skipped_updates}


def poisoned_loss(rank):
    """The loss is infinite in one process, and no gradient shows it to the other."""

    class Infinite(Poisoned):
        def sample_losses(self, batch):
            losses = Model.sample_losses(self, batch)
            return losses + float("inf") if self.global_step == 1 and self.poisoned else losses

    model = Infinite(network(), SSESAM(SPLIT))
    model.poisoned = rank == 1
    return train(rank, model, data()) | {"skipped": model.skipped_updates}


def raised(rank):
    model = Poisoned(network(), SSESAM(SPLIT))
    choose(model, on_nonfinite="raise")
    model.poisoned = rank == 1
    with pytest.raises(FloatingPointError):
        train(rank, model, data(), callbacks=[OnExceptionCheckpoint("raised", "end")], enable_checkpointing=True)
    return len(torch.load("raised/end.ckpt", weights_only=True)["callbacks"]["ExactResume"]["random_states"])


def one_hot_in_one_process(rank):
    parts = data()
    parts[1] = [(x, F.one_hot(y, 5).double()) for x, y in parts[1]]
    return train(rank, Model(network(), SSESAM(SPLIT)), parts)


def reported(rank, processes="global", first=0, stage=1):
    model = Model(network(), SSESAM(SPLIT, 0.3, 0.5))
    choose(model, log_sharpness=True, processes=processes)
    model.objective.stage = stage
    return train(rank, model, [part[first : first + 1] for part in data()])


def local(rank, objective, passes, strategy=None, parts=None):
    model = Model(network(), OBJECTIVES[objective](), passes)
    choose(model, processes="local")
    return train(rank, model, parts or data(even=True), strategy)


class Dropping(Model):
    def __init__(self):
        super().__init__(nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 5)), SSESAM(SPLIT))

    def on_train_start(self):
        # Every process draws numbers of its own.
        if self.trainer.current_epoch == 0:
            torch.manual_seed(20 + self.global_rank)


def resumed(rank):
    def run(**kwargs):
        torch.manual_seed(14)
        model, folder = Dropping(), kwargs.pop("folder", None)
        callbacks = [StageSwitch(at=0.5)]
        if folder:
            callbacks.append(ModelCheckpoint(folder, "{epoch}", every_n_epochs=1, save_top_k=-1))
        one = trainer(
            devices=WORLD,
            strategy=ddp(),
            use_distributed_sampler=False,
            max_epochs=3,
            callbacks=callbacks,
            enable_checkpointing=True,
        )
        one.fit(model, batches_loader(data()[rank]), **kwargs)
        return {k: v.clone() for k, v in model.state_dict().items()}

    whole = run(folder="resumed")
    return {"state": run(ckpt_path="resumed/epoch=0.ckpt"), "whole": whole}


class Sharded(Model):
    def configure_model(self):
        for layer in (self.net[0], self.net[2]):
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def sharded(rank, objective, processes="global", passes="auto", parts=None, **kwargs):
    model = Sharded(network(), OBJECTIVES[objective](), passes)
    choose(model, processes=processes)
    strategy = ModelParallelStrategy(WORLD, 1, process_group_backend="gloo", timeout=timedelta(seconds=60))
    result = train(rank, model, parts or data(), strategy, **kwargs)
    return result | {"state": {k: v.full_tensor() for k, v in model.state_dict().items()}}


class Divided(Model):
    """Two layers divided among the processes, and one that each has for itself."""

    def __init__(self, objective):
        torch.manual_seed(15)
        layers = [nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 5)]
        # Multi-tensor optimizers take no mixture.
        super().__init__(
            nn.Sequential(*layers),
            objective,
            optimizer=lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, foreach=False),
        )

    def configure_model(self):
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
            parallelize_module(self.net, self.device_mesh["tensor_parallel"], plan)


def tensor_parallel(rank, log_sharpness=False, objective=None):
    model = Divided(objective or SSESAM(SPLIT))
    choose(model, log_sharpness=log_sharpness)
    strategy = ModelParallelStrategy(1, WORLD, process_group_backend="gloo", timeout=timedelta(seconds=60))
    result = train(rank, model, [unions(data())] * WORLD, strategy)
    state = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in model.state_dict().items()}
    return result | {"state": state}


def raises(function, *args, **kwargs):
    with pytest.raises(MisconfigurationException) as caught:
        function(*args, **kwargs)
    return str(caught.value)


class SyncedBatchNorm(_BatchNorm):
    """What torch.nn.SyncBatchNorm does, which DDP refuses on a CPU: statistics of all processes, in both directions."""

    def _check_input_dim(self, input):
        pass

    def forward(self, x):
        count = torch.tensor([float(x.numel() // x.shape[1]) if len(x) else 0.0])
        moments = torch.cat([x.sum((0, 2, 3)), (x**2).sum((0, 2, 3)), count])
        moments = torch.distributed.nn.functional.all_reduce(moments)
        mean, square = moments[:-1].view(2, -1) / moments[-1]
        var = square - mean**2
        with torch.no_grad():
            self.num_batches_tracked += 1
            unbiased = var * moments[-1] / (moments[-1] - 1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(unbiased, self.momentum)
        x = (x - mean.view(-1, 1, 1)) / torch.sqrt(var + self.eps).view(-1, 1, 1)
        return x * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)


def with_sync_batch_norm(rank, objective):
    net = network(convbn)
    net[1] = SyncedBatchNorm(4)
    return train(rank, Model(net, OBJECTIVES[objective]()), data((3, 5, 5)))


def grouped():
    model = Model(network(convbn), SSESAM(SPLIT), "split")
    choose(model, passes="split", batch_norm_statistics="group")
    return model


def alike():
    """Both processes have the batches of the first."""
    return [data((3, 5, 5), even=True)[0]] * WORLD


def with_interval():
    model = Model(network(), SSESAM(SPLIT))
    choose(model, interval=2)
    return model


FAMILY = {
    "friendly adaptive": lambda: SSESAM(SPLIT, 0.3, 0.5, ascent=Ascent(Friendly(0.6, 0.8), Adaptive(0.05))),
    "GSAM": lambda: GSAM(0.3, 0.6),
    "LookSAM": lambda: SAM(0.3),
    "PGN": lambda: PGN(0.3, 1.3),
    "FocalSAM": lambda: FocalSAM(SPLIT, 0.3, 0.5, 1.3),
    "CCSAM": lambda: CCSAM(SPLIT, 0.3, 0.6),
    "MomentumSAM": lambda: MomentumSAM(0.3),
    "RandomSAM": lambda: RandomSAM(0.3),
    "InverseNorm": lambda: LESAM(0.05, 0.4),
}


def of_family(name, kind=Model):
    """A module whose states of ascents make a way through what a checkpoint holds, in the middle of the training."""
    model = kind(network(), FAMILY[name]())
    if name == "LookSAM":
        choose(model, interval=3, reuse=0.7)

    def save_and_load(outputs, batch, batch_idx):
        states = model._SharpnessAwareMixin__step.engine.states
        states.load_state_dict(states.state_dict())

    model.on_train_batch_end = save_and_load
    return model


def sharded_family(rank, name):
    strategy = ModelParallelStrategy(WORLD, 1, process_group_backend="gloo", timeout=timedelta(seconds=60))
    model = of_family(name, Sharded)
    result = train(rank, model, data(), strategy)
    return result | {"state": {k: v.full_tensor() for k, v in model.state_dict().items()}}


def local_ascent(rank, objective):
    model = Model(network(), objective)
    choose(model, processes="local")
    return train(rank, model, data(even=True))


def automatic(rank):
    return train(rank, Automatic(network()), data(even=True))


def sender(objective, make=network, **options):
    """A module whose exchanges are counted, and its batches."""
    model = Model(make(), objective())
    choose(model, **options)
    return model, [part[:4] for part in data()] if "interval" in options else few()


def few():
    """Three updates. In the last one a process has no sample; in one of the others, DDP arranges its buckets."""
    return [[part[0], part[2], part[5]] for part in data()]


def frozen():
    model, parts = sender(OBJECTIVES["SSESAM 1"])
    model.net[0].bias.requires_grad_(False)
    return model, parts


# By name: what makes a module and its batches, and arguments of DDP.
SENDERS = {
    **{
        f"{o} {ascent}": (partial(sender, OBJECTIVES[o], processes=ascent), {})
        for o in OBJECTIVES
        for ascent in ("global", "local")
    },
    **{
        name: (partial(sender, FAMILY[name]), {})
        for name in ("GSAM", "PGN", "CCSAM", "MomentumSAM", "friendly adaptive")
    },
    "local GSAM": (partial(sender, FAMILY["GSAM"], processes="local"), {}),
    "local LookSAM": (partial(sender, FAMILY["LookSAM"], processes="local", interval=3, reuse=0.7), {}),
    "LookSAM": (partial(sender, FAMILY["LookSAM"], interval=3, reuse=0.7), {}),
    "LookSAM of PGN": (partial(sender, FAMILY["PGN"], interval=2, reuse=0.7), {}),
    "LookSAM of MomentumSAM": (partial(sender, FAMILY["MomentumSAM"], interval=2, reuse=0.7), {}),
    "interval": (partial(sender, OBJECTIVES["SSESAM 1"], interval=2), {}),
    "no parameter unused": (partial(sender, OBJECTIVES["SSESAM 1"]), {"find_unused_parameters": True}),
    "small buckets": (partial(sender, OBJECTIVES["SSESAM 1"]), {"bucket_cap_mb": 1e-4}),
    "batch norm by groups": (lambda: (grouped(), [part[:3] for part in data((3, 5, 5), even=True)]), {}),
    "frozen": (frozen, {}),
}


def sends(rank, make, options):
    """The bytes of each step by kind of collective, as counted."""
    counts, (model, parts) = traffic.TrafficOfSteps(), make()
    train(rank, model, parts, ddp(**options), callbacks=[counts])
    return [step.nbytes for step in counts.steps]


def sends_otherwise(rank, run, *args, **kwargs):
    counts = traffic.TrafficOfSteps()
    run(rank, *args, callbacks=[counts], **kwargs)
    return [step.nbytes for step in counts.steps]


def sends_probabilities(rank):
    parts = few()
    parts[1] = [(x, F.one_hot(y, 5).double()) for x, y in parts[1]]
    return sends_otherwise(rank, train, Model(network(), SSESAM(SPLIT)), parts)


def sends_number(rank):
    model, parts = sender(OBJECTIVES["SAM"], on_nonfinite="skip")
    return sends_otherwise(rank, train, model, parts)


class ShardedWhole(Model):
    """Its parameters stay whole from a forward to the next backward pass."""

    def configure_model(self):
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def sharded_whole(rank, objective, **kwargs):
    strategy = ModelParallelStrategy(WORLD, 1, process_group_backend="gloo", timeout=timedelta(seconds=60))
    return train(rank, ShardedWhole(network(), OBJECTIVES[objective]()), few(), strategy, **kwargs)


SENT_SHARDED = ("ERM", "SAM", "ImbSAM", "SSESAM 1", "SSESAM 2", "own")


SMALL = {"network": "small", "width": 8, "image_size": 8, "classes": 10, "compiled": False, "batch_size": 10}


def script(rank):
    """What `benchmarks/scaling.py` counts and measures, for one objective."""
    from scaling_parts import processes

    processes.OBJECTIVES = {"SSE-SAM stage 1": processes.OBJECTIVES["SSE-SAM stage 1"]}
    ascents = ("global", "FSDP2") if SHARDS_ON_CPU else ("global",)
    options = Namespace(**SMALL, tail_share=0.2, processes=WORLD, ascents=ascents, rounds=1, warm_up=1)
    found = processes.count(options, rank), processes.measure(options, rank)
    torch.set_num_threads(1)
    return found


# What each process does, given its rank.
SCENARIOS = {
    **{
        f"{objective} {passes}": lambda rank, o=objective, p=passes: train(
            rank, Model(network(), OBJECTIVES[o](), p), data()
        )
        for objective in OBJECTIVES
        for passes in ("full", "split")
    },
    **{
        f"local {objective} {passes}": lambda rank, o=objective, p=passes: local(rank, o, p)
        for objective in ("SAM", "ImbSAM group", "SSESAM 1", "SSESAM 2")
        for passes in ("full", "split")
    },
    "bucket views": lambda rank: train(
        rank, Model(network(), SSESAM(SPLIT)), data(), ddp(gradient_as_bucket_view=True), max_epochs=2
    ),
    "small buckets": lambda rank: train(rank, Model(network(), SSESAM(SPLIT)), data(), ddp(bucket_cap_mb=1e-4)),
    "auto": lambda rank: train(rank, Model(network(), SSESAM(SPLIT)), data()),
    "unused full": lambda rank: train(rank, branches(SSESAM(SPLIT), "full"), data(), ddp(find_unused_parameters=True)),
    "unused split": lambda rank: train(rank, branches(SSESAM(SPLIT)), data(), ddp(find_unused_parameters=True)),
    "unused and not looked for": lambda rank: train(rank, branches(SSESAM(SPLIT)), data()),
    "unused everywhere": lambda rank: train(
        rank, branches(SSESAM(SPLIT)), head_only(), ddp(find_unused_parameters=True)
    ),
    "accumulated": lambda rank: train(rank, Model(network(), SSESAM(SPLIT)), data(), accumulate_grad_batches=3),
    "clipped": lambda rank: train(rank, Model(network(), SSESAM(SPLIT)), data(), gradient_clip_val=0.05),
    "switched": lambda rank: train(rank, Model(network(), SSESAM(SPLIT)), data(), callbacks=[StageSwitch(step=2)]),
    "sync batch norm SAM": lambda rank: with_sync_batch_norm(rank, "SAM"),
    "sync batch norm SSESAM 1": lambda rank: with_sync_batch_norm(rank, "SSESAM 1"),
    "batch norm by groups, alike": lambda rank: train(rank, grouped(), alike()),
    "batch norm by groups": lambda rank: train(rank, grouped(), data((3, 5, 5), even=True)),
    "interval": lambda rank: train(rank, with_interval(), data()),
    "poisoned": poisoned,
    "poisoned loss": poisoned_loss,
    "raised": raised,
    "one-hot": one_hot_in_one_process,
    "reported": reported,
    "reported local": lambda rank: reported(rank, "local"),
    # The second step has no tail samples in one process.
    "reported local without tail": lambda rank: reported(rank, "local", first=1),
    "reported without tail": lambda rank: reported(rank, first=1),
    "reported in stage 2": lambda rank: reported(rank, stage=2),
    "resumed": resumed,
    **{f"family {name}": lambda rank, n=name: train(rank, of_family(n), data()) for name in FAMILY},
    "local ASAM": lambda rank: local_ascent(rank, ASAM(0.5, 0.05)),
    "local Friendly": lambda rank: raises(local_ascent, rank, FriendlySAM()),
    "automatic": automatic,
    "ERM even": lambda rank: train(rank, Model(network()), data(even=True)),
    "static graph": lambda rank: raises(train, rank, Model(network(), SAM(0.1)), data(), ddp(static_graph=True)),
    **{f"sends {name}": partial(sends, make=make, options=options) for name, (make, options) in SENDERS.items()},
    "sends accumulated": lambda rank: sends_otherwise(
        rank, train, *sender(OBJECTIVES["SSESAM 1"], interval=1), accumulate_grad_batches=2
    ),
    "sends probabilities": sends_probabilities,
    "sends a number": sends_number,
    "script": script,
}

# An older torch shards on a GPU only.
SHARDS_ON_CPU = hasattr(torch.cpu.Stream, "record_event")
if SHARDS_ON_CPU:
    SCENARIOS |= {
        **{f"sharded {objective}": lambda rank, o=objective: sharded(rank, o) for objective in OBJECTIVES},
        **{f"sharded family {name}": lambda rank, n=name: sharded_family(rank, n) for name in FAMILY},
        "tensor parallel RandomSAM": lambda rank: tensor_parallel(rank, objective=RandomSAM(0.3)),
        "tensor parallel friendly adaptive": lambda rank: tensor_parallel(
            rank, objective=FAMILY["friendly adaptive"]()
        ),
        "sharded accumulated": lambda rank: sharded(rank, "SSESAM 1", accumulate_grad_batches=3),
        "sharded clipped": lambda rank: sharded(rank, "SSESAM 1", gradient_clip_val=0.05),
        "sharded local": lambda rank: raises(sharded, rank, "SAM", processes="local"),
        "sharded split": lambda rank: raises(sharded, rank, "SAM", passes="split"),
        **{
            f"sends sharded {o}": lambda rank, o=o: sends_otherwise(rank, sharded, o, parts=few()) for o in SENT_SHARDED
        },
        "sends whole": lambda rank: sends_otherwise(rank, sharded_whole, "SSESAM 1"),
        "sends sharded accumulated": lambda rank: sends_otherwise(
            rank, sharded, "SSESAM 1", parts=few(), accumulate_grad_batches=3
        ),
        "tensor parallel": tensor_parallel,
        "tensor parallel reported": lambda rank: tensor_parallel(rank, log_sharpness=True),
    }


def work(rank, port):
    """What each process does."""
    warnings.simplefilter("ignore")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank), NODE_RANK="0")
    # An earlier test may have set it, and Lightning would seed these processes by it.
    os.environ.pop("PL_GLOBAL_SEED", None)
    torch.set_default_dtype(torch.float64)
    results, name = {}, ""
    try:
        for name, scenario in SCENARIOS.items():
            results[name] = scenario(rank)
    except Exception:
        # The other process waits in vain; it is told when this one has gone.
        results[name] = traceback.format_exc()[:9] + traceback.format_exc()[-1500:]
    torch.save(results, f"{rank}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    logs = [folder / f"{rank}.log" for rank in range(WORLD)]
    processes = [start_process(work, rank, port, folder=folder, log=log) for rank, log in enumerate(logs)]
    try:
        for process in processes:
            process.join(timeout=240)
    finally:
        for process in processes:
            process.kill()
    found = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]
    for rank, log in enumerate(logs):
        last = list(found[rank])[-1]
        if isinstance(found[rank][last], str) and found[rank][last].startswith("Traceback"):
            pytest.fail(f"process {rank} in '{last}':\n{found[rank][last]}\n{log.read_text()[-3000:]}")
    return found


def same_in_all(results, name):
    first, *others = (result[name] for result in results)
    for other in others:
        assert_same_bits(first["state"].values(), other["state"].values())
    return first


def one_process(model, batches, **kwargs):
    run = fit(model, batches, **kwargs)
    return model.state_dict(), run


def assert_close(state, expected, atol=1e-13):
    torch.testing.assert_close(dict(state), dict(expected), rtol=0, atol=atol)


@pytest.mark.usefixtures("float64")
class TestDDP:
    @pytest.mark.parametrize("passes", ["full", "split"])
    @pytest.mark.parametrize("objective", OBJECTIVES)
    def test_equals_one_process(self, results, objective, passes):
        expected, _ = one_process(Model(network(), OBJECTIVES[objective]()), unions(data()))
        assert_close(same_in_all(results, f"{objective} {passes}")["state"], expected)

    @pytest.mark.parametrize("name", ["auto", "small buckets", "one-hot"])
    def test_equals_one_process_too(self, results, name):
        expected, _ = one_process(Model(network(), SSESAM(SPLIT)), unions(data()))
        assert_close(same_in_all(results, name)["state"], expected)

    def test_interval(self, results):
        expected, _ = one_process(with_interval(), unions(data()))
        assert_close(same_in_all(results, "interval")["state"], expected)

    def test_batch_norm_by_groups(self, results):
        expected, _ = one_process(grouped(), alike()[0])
        assert_close(same_in_all(results, "batch norm by groups, alike")["state"], expected)
        # Where one process has groups that the other lacks, they still end alike, but for their own statistics.
        states = [result["batch norm by groups"]["state"] for result in results]
        for name, value in states[0].items():
            assert value.isfinite().all()
            assert torch.equal(value, states[1][name]) or "running" in name

    def test_gradients_as_views_of_buckets(self, results):
        expected, _ = one_process(Model(network(), SSESAM(SPLIT)), unions(data()), max_epochs=2)
        assert_close(same_in_all(results, "bucket views")["state"], expected)

    @pytest.mark.parametrize("name", ["unused full", "unused split", "unused and not looked for"])
    def test_parameters_that_some_processes_leave_unused(self, results, name):
        expected, _ = one_process(branches(SSESAM(SPLIT)), unions(data()))
        assert_close(same_in_all(results, name)["state"], expected)

    def test_parameters_that_all_processes_leave_unused(self, results):
        """They have no gradient, so that weight decay does not move them."""
        model = branches(SSESAM(SPLIT))
        before = model.branch.weight.detach().clone()
        expected, _ = one_process(model, unions(head_only()))
        state = same_in_all(results, "unused everywhere")["state"]
        assert_close(state, expected)
        assert torch.equal(state["branch.weight"], before)

    def test_accumulation(self, results):
        groups = [[batch for part in data() for batch in part[i : i + 3]] for i in (0, 3)]
        expected, _ = one_process(
            Model(network(), SSESAM(SPLIT)), [tuple(map(torch.cat, zip(*group, strict=True))) for group in groups]
        )
        assert_close(same_in_all(results, "accumulated")["state"], expected)

    def test_clipping(self, results):
        expected, _ = one_process(Model(network(), SSESAM(SPLIT)), unions(data()), gradient_clip_val=0.05)
        assert_close(same_in_all(results, "clipped")["state"], expected)

    def test_stage_switch(self, results):
        expected, _ = one_process(Model(network(), SSESAM(SPLIT)), unions(data()), callbacks=[StageSwitch(step=2)])
        assert_close(same_in_all(results, "switched")["state"], expected)

    @pytest.mark.parametrize("objective", ["SAM", "SSESAM 1"])
    def test_sync_batch_norm(self, results, objective):
        model = Model(network(convbn), OBJECTIVES[objective]())
        expected, _ = one_process(model, unions(data((3, 5, 5))))
        assert_close(same_in_all(results, f"sync batch norm {objective}")["state"], expected, atol=1e-12)

    @pytest.mark.parametrize("passes", ["full", "split"])
    @pytest.mark.parametrize("objective", ["SAM", "ImbSAM group", "SSESAM 1", "SSESAM 2"])
    def test_local_ascent(self, results, objective, passes):
        """Each process perturbs for its own batch, and the gradients are averaged."""
        net = network()
        optimizer = sgd(net.parameters())
        for batches in zip(*data(even=True), strict=True):
            gradients = [naive_gradient(net, OBJECTIVES[objective]().terms(y), x, y) for x, y in batches]
            for p, *parts in zip(net.parameters(), *gradients, strict=True):
                p.grad = sum(parts) / WORLD
            optimizer.step()
        expected = {f"net.{name}": value for name, value in net.state_dict().items()}
        state = same_in_all(results, f"local {objective} {passes}")["state"]
        assert_close(state, expected)
        together = same_in_all(results, f"{objective} {passes}")["state"]
        assert not torch.allclose(state["net.0.weight"], together["net.0.weight"], atol=1e-8)

    def test_erm_equals_automatic_optimization(self, results):
        assert_close(same_in_all(results, "ERM even")["state"], same_in_all(results, "automatic")["state"])

    def test_exception_in_all_processes_saves_the_random_state_of_all(self, results):
        assert [result["raised"] for result in results] == [2, 2]

    @pytest.mark.parametrize("name", ["poisoned", "poisoned loss"])
    def test_one_process_with_a_bad_loss_skips_for_all(self, results, name):
        expected, _ = one_process(
            Model(network(), SSESAM(SPLIT)), [b for number, b in enumerate(unions(data())) if number != 1]
        )
        assert_close(same_in_all(results, name)["state"], expected)
        assert [result[name]["skipped"] for result in results] == [1, 1]

    def test_sharpness_is_that_of_the_whole_batch(self, results):
        model = Model(network(), SSESAM(SPLIT, 0.3, 0.5))
        choose(model, log_sharpness=True)
        _, run = one_process(model, unions(data())[:1])
        seen = results[0]["reported"]["metrics"]
        for name in ("grad_norm", "grad_norm_head", "grad_norm_tail", "sharpness_head", "sharpness_tail"):
            assert seen[f"train/{name}"].item() == pytest.approx(run.callback_metrics[f"train/{name}"].item(), rel=1e-6)
        assert results[0]["reported local"]["metrics"]["train/sharpness_tail"] > 0
        assert results[0]["reported local without tail"]["metrics"]["train/sharpness_tail"] > 0

    @pytest.mark.parametrize(("name", "first", "stage"), [("without tail", 1, 1), ("in stage 2", 0, 2)])
    def test_what_is_logged_is_that_of_one_process(self, results, name, first, stage):
        model = Model(network(), SSESAM(SPLIT, 0.3, 0.5))
        choose(model, log_sharpness=True)
        model.objective.stage = stage
        _, run = one_process(model, unions(data())[first : first + 1])
        seen = {k: v.item() for k, v in results[0][f"reported {name}"]["metrics"].items() if k != "train/loss"}
        expected = {k: v.item() for k, v in run.callback_metrics.items() if k != "train/loss"}
        if stage == 2:
            # The unperturbed head's would have to be sent for the log alone.
            expected.pop("train/grad_norm_head")
        assert seen == pytest.approx(expected, rel=1e-6)

    def test_resume_with_random_numbers_of_each_process(self, results):
        resumed = same_in_all(results, "resumed")
        assert_same_bits(resumed["state"].values(), resumed["whole"].values())

    @pytest.mark.parametrize("name", FAMILY)
    def test_family_equals_one_process(self, results, name):
        expected, _ = one_process(of_family(name), unions(data()))
        assert_close(same_in_all(results, f"family {name}")["state"], expected)

    def test_local_ascent_with_a_scale(self, results):
        net = network()
        twin = twins.Twin(net, sgd)
        for batches in zip(*data(even=True), strict=True):
            gradients = [twins.asam(twin, x, y, 0.5, 0.05, "plain") for x, y in batches]
            twin.step([sum(parts) / WORLD for parts in zip(*gradients, strict=True)])
        expected = {f"net.{name}": value for name, value in net.state_dict().items()}
        assert_close(same_in_all(results, "local ASAM")["state"], expected)

    def test_local_ascent_with_a_state_is_refused(self, results):
        text = (
            "`processes='local'` cannot work with Friendly(sigma=1.0, decay=0.9), which would remember other gradients"
        )
        assert text in results[0]["local Friendly"]

    def test_static_graph_is_refused(self, results):
        assert "cannot work with DDPStrategy(static_graph=True)" in results[0]["static graph"]


@pytest.mark.skipif(not SHARDS_ON_CPU, reason="this torch shards on a GPU only")
@pytest.mark.usefixtures("float64")
class TestModelParallel:
    @pytest.mark.parametrize("objective", OBJECTIVES)
    def test_equals_one_process(self, results, objective):
        expected, _ = one_process(Model(network(), OBJECTIVES[objective]()), unions(data()))
        assert_close(same_in_all(results, f"sharded {objective}")["state"], expected)

    @pytest.mark.parametrize("name", [name for name in FAMILY if name != "RandomSAM"])
    def test_family_equals_one_process(self, results, name):
        expected, _ = one_process(of_family(name), unions(data()))
        assert_close(same_in_all(results, f"sharded family {name}")["state"], expected)

    def test_noise(self, results):
        """Each shard has noise of its own; what all processes hold moves alike in all."""
        random = same_in_all(results, "sharded family RandomSAM")["state"]
        plain = same_in_all(results, "sharded ERM")["state"]
        moved = torch.cat([(random[name] - plain[name]).flatten() for name in plain])
        assert 1e-3 < moved.norm() < 1
        same_in_all(results, "tensor parallel RandomSAM")
        expected, _ = one_process(Divided(FAMILY["friendly adaptive"]()), unions(data()))
        assert_close(same_in_all(results, "tensor parallel friendly adaptive")["state"], expected)

    def test_accumulation(self, results):
        assert_close(results[0]["sharded accumulated"]["state"], results[0]["accumulated"]["state"])

    def test_clipping(self, results):
        assert_close(results[0]["sharded clipped"]["state"], results[0]["clipped"]["state"])

    def test_tensor_parallel(self, results):
        expected, run = one_process(Divided(SSESAM(SPLIT)), unions(data()))
        assert_close(same_in_all(results, "tensor parallel")["state"], expected)
        reported = same_in_all(results, "tensor parallel reported")
        assert_close(reported["state"], expected)
        assert run.callback_metrics["train/loss"].item() == pytest.approx(reported["metrics"]["train/loss"].item())

    def test_what_it_cannot_do_is_refused(self, results):
        assert "`processes='local'` cannot work with ModelParallelStrategy" in results[0]["sharded local"]
        assert "`passes='split'` cannot work with ModelParallelStrategy" in results[0]["sharded split"]


def targets_of(parts, accumulate=1):
    """For every update, the targets of all processes, and their number in the process that has most."""
    for start in range(0, len(parts[0]), accumulate):
        own = [torch.cat([y for _, y in part[start : start + accumulate]]) for part in parts]
        yield torch.cat(own), max(map(len, own))


def assert_sent(counted, expected):
    """What was counted in every update. In one of the first two, DDP also says how it has arranged its buckets."""
    assert not any(step["broadcast"] for step in counted[2:])
    assert [Counter({k: v for k, v in step.items() if k != "broadcast"}) for step in counted] == expected


@pytest.mark.usefixtures("float64")
class TestTraffic:
    """The formulas of `benchmarks/scaling_parts/traffic.py` give what the processes exchange, to the byte."""

    @pytest.mark.parametrize("name", SENDERS)
    def test_ddp(self, results, name):
        make, ddp_options = SENDERS[name]
        model, parts = make()
        options, expected = model.step_options, []
        for number, (y, most) in enumerate(targets_of(parts)):
            terms = model.objective.terms(y)
            keeps = model.objective.needs_clean_gradient or options.reuse is not None
            if not options.perturbs(number, can_reuse=True):
                terms = unperturbed(terms)
            exchanges = traffic.gradient_exchanges(terms, options.processes == "local", keeps)
            sent = traffic.under_ddp(model.parameters(), exchanges, bool(ddp_options.get("find_unused_parameters")))
            expected.append(sent if options.processes == "local" else sent + traffic.of_targets(WORLD, most))
        for result in results:
            assert_sent(result[f"sends {name}"], expected)

    def test_exchanges_of_the_main_methods(self, results):
        """In copies of the parameters, without the formula."""
        size = sum(p.nbytes for p in network().parameters())
        copies = {"ERM": 1, "SAM": 2, "ImbSAM": 2, "SSESAM 1": 3, "SSESAM 2": 2}
        for name, number in copies.items():
            assert results[0][f"sends {name} global"][-1]["all-reduce"] == number * size
            assert results[0][f"sends {name} local"][-1] == {"all-reduce": size}

    def test_accumulated_batches_are_one_update(self, results):
        model, parts = sender(OBJECTIVES["SSESAM 1"], interval=1)
        expected = []
        for y, most in targets_of(parts, 2):
            sent = traffic.under_ddp(model.parameters(), traffic.gradient_exchanges(model.objective.terms(y), False))
            expected.append(sent + traffic.of_targets(WORLD, most))
        counted = results[1]["sends accumulated"]
        assert_sent(counted[1::2], expected)
        assert not any(counted[::2])

    def test_class_probabilities_in_one_process(self, results):
        gathered = [step["all-gather"] for step in results[0]["sends probabilities"]]
        assert gathered == [traffic.of_targets(WORLD, most, 5)["all-gather"] for _, most in targets_of(few())]

    def test_a_number_that_says_whether_all_is_finite(self, results):
        plain = results[0]["sends SAM global"][-1]
        assert results[0]["sends a number"][-1] == plain + Counter({"all-reduce": 8})

    @pytest.mark.skipif(not SHARDS_ON_CPU, reason="this torch shards on a GPU only")
    @pytest.mark.parametrize(
        ("name", "objective"), [*((f"sharded {o}", o) for o in SENT_SHARDED), ("whole", "SSESAM 1")]
    )
    def test_fsdp2(self, results, name, objective):
        net, expected = network(), []
        for y, most in targets_of(few()):
            terms = OBJECTIVES[objective]().terms(y)
            sent = traffic.under_fsdp2(net.parameters(), WORLD, terms, stays=lambda p: name == "whole")
            expected.append(sent + traffic.of_targets(WORLD, most))
        assert_sent(results[0][f"sends {name}"], expected)

    @pytest.mark.skipif(not SHARDS_ON_CPU, reason="this torch shards on a GPU only")
    def test_fsdp2_accumulated(self, results):
        ((y, most),) = targets_of(few(), 3)
        terms = OBJECTIVES["SSESAM 1"]().terms(y)
        expected = traffic.under_fsdp2(network().parameters(), WORLD, terms, batches=3)
        counted = results[0]["sends sharded accumulated"]
        assert sum(counted, Counter()) == expected + traffic.of_targets(WORLD, most)

    def test_script(self, results):
        """It counts what the formula says, on the wire too, and times each way of making a step."""
        counted, seconds = results[0]["script"]
        for row in counted:
            assert row["counted"] == row["formula"]
            expected = traffic.ring_bytes(Counter(row["formula"]), WORLD)
            if row["ascent"] == "FSDP2":
                # gloo divides a sum by an all-reduce.
                expected += row["formula"]["reduce-scatter"] / 2
            # Each message has a header, which weighs with so small a network.
            assert expected < row["wire"] < 1.1 * expected + 1500
        for row, other in zip(seconds, results[1]["script"][1], strict=True):
            assert len(row["seconds"]) == 1
            assert all(time > 0 for time in row["seconds"])
            waits = row["way"] in ("alone", "both cores")
            assert all((time == 0) == waits for time in other["seconds"])


def test_other_strategies_are_refused(monkeypatch):
    from lightning_ssesam.processes import Processes

    with pytest.raises(MisconfigurationException, match=r"cannot work with FSDPStrategy, .* Use strategy='ddp', or"):
        Processes.check_supported(FSDPStrategy(), "global")
