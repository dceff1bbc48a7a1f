"""Objectives one after the other."""

import copy
import io
import pickle

import pytest
import torch
from helpers import (
    SPLIT,
    STRICT,
    KillAt,
    Killed,
    Model,
    ThreeRadii,
    assert_same_bits,
    batches,
    classification_batch,
    convbn,
    fit,
    mlp,
    naive_gradient,
    sample_losses_of,
    trainer,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_ssesam import (
    ERM,
    GSAM,
    SAM,
    SSESAM,
    ClassSplit,
    FriendlySAM,
    ImbSAM,
    LongTailClassifier,
    Objective,
    Staged,
    StageSwitch,
    Term,
)
from lightning_ssesam.engine import MicroBatch, SharpnessEngine
from lightning_ssesam.errors import ArgumentError

pytestmark = [STRICT, pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")]


class TwoRadii(ImbSAM):
    """The first stage of SSE-SAM, written as an objective of somebody's own."""

    def __init__(self, split=None, head_rho=0.05, tail_rho=0.1):
        super().__init__(split)
        del self.rho
        self.head_rho, self.tail_rho = head_rho, tail_rho

    def terms(self, targets):
        head, tail, number = self._masses(targets)
        return Term(head / number, self.head_rho), Term(tail / number, self.tail_rho)


def trained(objective, switch, batches, **kwargs):
    torch.manual_seed(3)
    model = Model(objective=objective)
    fit(model, batches, callbacks=[StageSwitch(**switch)] if switch else [], **kwargs)
    return model


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("split", [None, SPLIT])
def test_sse_sam_is_two_objectives_in_turn(split):
    staged = Staged([TwoRadii(split, 0.2, 0.4), ImbSAM(split, 0.4)], SPLIT if split is None else None)
    data = batches(6)
    expected = trained(SSESAM(SPLIT, 0.2, 0.4), {"at": 0.5}, data)
    assert_same_bits(trained(staged, {"at": 0.5}, data).parameters(), expected.parameters())
    # Both stages matter.
    assert not torch.equal(trained(staged, {"at": 0.3}, data).net[0].weight, expected.net[0].weight)


def plain_training(net, batches, radius_at):
    """The naive twin: SGD with momentum by hand, with SAM's radius of each step."""
    net, velocity = copy.deepcopy(net), None
    for step, (x, y) in enumerate(batches):
        gradient = naive_gradient(net, [(torch.full((len(y),), 1 / len(y)), radius_at(step))], x, y)
        decayed = [g + 1e-3 * p.detach() for g, p in zip(gradient, net.parameters(), strict=True)]
        velocity = decayed if velocity is None else [0.9 * v + g for v, g in zip(velocity, decayed, strict=True)]
        with torch.no_grad():
            for p, v in zip(net.parameters(), velocity, strict=True):
                p.sub_(0.1 * v)
    return net


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("objectives", "switch", "radii"),
    [
        ([ERM(), SAM(0.3)], {"at": 0.8}, [0.0] * 8 + [0.3] * 2),
        ([SAM(0.3), ERM()], {"step": 3}, [0.3] * 3 + [0.0] * 7),
        ([ERM(), SAM(0.1), SAM(0.5)], {"at": [0.3, 0.5]}, [0.0] * 3 + [0.1] * 2 + [0.5] * 5),
        ([Staged([SAM(0.1), ERM()]), SAM(0.5)], {"epoch": [1, 4]}, [0.1] * 2 + [0.0] * 6 + [0.5] * 2),
        ([SAM(0.2)], None, [0.2] * 10),
    ],
)
def test_trains_as_its_naive_twin(objectives, switch, radii):
    data = batches(2, 12)
    torch.manual_seed(3)
    expected = plain_training(mlp(), data * 5, radii.__getitem__)
    model = trained(Staged(objectives), switch, data, max_epochs=5)
    torch.testing.assert_close(model.net.state_dict(), expected.state_dict(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("dense", [False, True])
def test_has_what_the_objective_of_the_stage_has(dense):
    objectives = [ERM(), SSESAM(SPLIT, 0.2, 0.4, first_stage="joint"), ThreeRadii(), ImbSAM(SPLIT, 0.3, 2.0)]
    staged, expected = Staged(objectives), [copy.copy(objective) for objective in objectives]
    in_turn = [expected[0], expected[1], expected[1], *expected[2:]]
    targets = torch.tensor([[0, 4], [3, -100]]) if dense else classification_batch()[1]
    assert staged.num_stages == 5
    for stage, own in zip(range(1, 6), in_turn, strict=True):
        staged.stage = stage
        own.stage = {2: 1, 3: 2}.get(stage, 1)
        assert staged.stage == stage
        assert staged.current.stage == own.stage
        assert repr(staged.current) == repr(own)
        assert staged.term_names == own.term_names
        assert torch.equal(torch.tensor(staged.find_ignored(targets) is None), torch.tensor(not dense))
        if isinstance(own, ThreeRadii) and dense:
            continue
        for term, wanted in zip(staged.terms(targets), own.terms(targets), strict=True):
            assert torch.equal(term.weights, wanted.weights)
            assert term.rho == wanted.rho
    assert staged.tail_weight == 2.0
    staged.stage = 2
    assert staged.first_stage == "joint"
    with pytest.raises(AttributeError, match="'SSESAM' object has no attribute 'tail_weight'"):
        _ = staged.tail_weight


def test_nothing_of_an_objective_is_forgotten():
    """Whatever an objective may have of its own, `Staged` asks the objectives for."""
    names = {name for name in vars(Objective) if not name.startswith("_")}
    assert names - set(vars(Staged)) == {"split"}


@pytest.mark.parametrize("stage", [0, 4, 1.5, "2"])
def test_bad_stage(stage):
    with pytest.raises(ArgumentError, match="`stage` to be an integer from 1 to 3, but got"):
        Staged([ERM(), SSESAM()]).stage = stage


def test_objectives_are_copies():
    sam, sse = SAM(0.1), SSESAM()
    first, second = Staged([ERM(), sam, sse]), Staged([sam, sse])
    first.bind(SPLIT)
    first.stage = 4
    first.set_radius("rho", 0.7)
    assert (sam.rho, second.rho, sse.split, second.split, sse.stage) == (0.1, 0.1, None, None, 1)
    assert [objective.stage for objective in second.objectives] == [1, 1]


# Radii.


def test_radii():
    staged = Staged([ERM(), SAM(0.1), SSESAM(SPLIT, 0.2, 0.3), SAM(0.4)])
    assert staged.radius_values == {"rho": 0.1, "head_rho": 0.2, "tail_rho": 0.3}
    assert set(staged.radius_names) == {"rho", "head_rho", "tail_rho"}
    staged.stage = 5
    assert staged.radius_values["rho"] == staged.rho == 0.4
    staged.rho = 0.5
    staged.set_radius("tail_rho", 1)
    assert repr(staged) == (
        "Staged([ERM(), SAM(rho=0.5), SSESAM(head_rho=0.2, tail_rho=1.0, first_stage='grouped'), SAM(rho=0.5)])"
    )
    assert "rho" not in vars(staged)
    for bad in (-1.0, float("nan"), "0.1"):
        with pytest.raises(ArgumentError, match="`rho` to be a finite number >= 0, but got"):
            staged.rho = bad
    with pytest.raises(ArgumentError, match=r"a radius of Staged \(.*rho.*\), but got 'radius'"):
        staged.set_radius("radius", 0.1)
    with pytest.raises(ArgumentError, match=r"a radius of Staged \(it has none\), but got 'rho'"):
        Staged([ERM()]).set_radius("rho", 0.1)


def test_radii_of_single_objectives():
    class Own(Objective):
        radius_names = ("near", "far", "missing")
        near, far = 0.1, "far"

        def terms(self, targets):
            return (Term(self._mean_weights(targets), self.near),)

    assert [o.radius_values for o in (ERM(), SAM(0.2), SSESAM(), Own())] == [
        {},
        {"rho": 0.2},
        {"head_rho": 0.05, "tail_rho": 0.1},
        {"near": 0.1},
    ]
    own = Own()
    own.set_radius("near", 2)
    assert own.terms(torch.tensor([0]))[0].rho == 2.0
    with pytest.raises(ArgumentError, match=r"a radius of Own \(near\), but got 'far'"):
        own.set_radius("far", 0.1)
    with pytest.raises(ArgumentError, match="`near` to be a finite number >= 0, but got -1"):
        own.set_radius("near", -1)


# Splits and ignored targets.


def test_split_is_bound_to_all():
    staged = Staged([ERM(), ImbSAM(), SSESAM()])
    assert staged.needs_split
    assert not Staged([ERM(), SAM()]).needs_split
    with pytest.raises(RuntimeError, match=r"ImbSAM does not know which classes are tail"):
        staged.check_ready()
    Staged([ERM(), SAM()]).check_ready()
    staged.bind(SPLIT)
    staged.check_ready()
    assert {id(objective.split) for objective in (staged, *staged.objectives)} == {id(SPLIT)}
    # A split of one objective serves the others.
    assert Staged([ImbSAM(), SSESAM(SPLIT)]).objectives[0].split is SPLIT
    equal = ClassSplit([50, 40, 30, 6, 5], tail=[3, 4])
    assert Staged([ImbSAM(equal), SSESAM(SPLIT)]).split is equal


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Staged([]), r"`objectives` to be a list of at least one Objective, .*, but got \[\]"),
        (lambda: Staged(ERM()), r"`objectives` to be a list .*, but got ERM\(\)"),
        (lambda: Staged([ERM, SAM]), "`objectives` to be a list"),
        (lambda: Staged("ERM"), "`objectives` to be a list .*, but got 'ERM'"),
        (lambda: Staged({0: ERM()}), "`objectives` to be a list"),
        (lambda: Staged([ERM(1), ERM(), SAM(0.1, 2)]), "`ignore_index` to be the same .*, but got 1 and 2"),
        (lambda: Staged([ERM(1)], ignore_index=3), "`ignore_index` to be the same .*, but got 3 and 1"),
        (lambda: Staged([ERM()], ignore_index=0.5), "`ignore_index` to be an integer, but got 0.5"),
        (lambda: Staged([ImbSAM(SPLIT), SSESAM(ClassSplit([1] * 5, tail=[3]))]), "`split` to be the same for all"),
        (lambda: Staged([ERM(), ImbSAM()], ClassSplit([5, 5], tail=[])), "with both head and tail classes"),
        (lambda: Staged([ERM(), ImbSAM()]).bind("tail"), "`split` to be a ClassSplit, but got 'tail'"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ArgumentError, match=message):
        make()


def test_a_split_that_one_cannot_use_is_bound_to_none():
    staged = Staged([ERM(), ImbSAM()])
    with pytest.raises(ArgumentError, match="as ImbSAM treats them apart"):
        staged.bind(ClassSplit([5, 5], tail=[]))
    assert [objective.split for objective in (staged, *staged.objectives)] == [None] * 3


@pytest.mark.parametrize(
    "make",
    [
        lambda: Staged([ERM(), SAM(0.1)], ignore_index=255),
        lambda: Staged([ERM(), SAM(0.1, ignore_index=255)]),
        lambda: LongTailClassifier([9, 1], mlp(), Staged([ERM(), SAM(0.1)]), ignore_index=255).objective,
    ],
)
def test_ignored_target_of_all(make):
    staged = make()
    assert [vars(objective)["ignore_index"] for objective in staged.objectives] == [255, 255]
    for stage in (1, 2):
        staged.stage = stage
        assert staged.ignore_index == 255
        assert staged.find_ignored(torch.tensor([0, 255])).tolist() == [False, True]
        assert staged.terms(torch.tensor([0, 255]))[0].weights.tolist() == [1.0, 0.0]


def test_ignored_targets_of_somebody():
    class Own(ERM):
        def find_ignored(self, targets):
            return targets > 7

    staged = Staged([ERM(), Own()])
    targets = torch.tensor([1, 8, -100])
    assert staged.find_ignored(targets).tolist() == [False, False, True]
    staged.stage = 2
    assert staged.find_ignored(targets).tolist() == [False, True, False]


# Saved and copied.


def test_copies_and_checkpoints():
    staged = Staged([ERM(), SSESAM(SPLIT, 0.2, 0.3)])
    staged.stage = 3
    file = io.BytesIO()
    torch.save(staged, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    others = [loaded, copy.deepcopy(staged), pickle.loads(pickle.dumps(staged))]
    y = classification_batch()[1]
    for other in others:
        assert repr(other) == repr(staged)
        assert (other.stage, other.num_stages, other.current.stage) == (3, 3, 2)
        assert torch.equal(other.terms(y)[1].weights, staged.terms(y)[1].weights)
        other.head_rho = 0.9
        other.stage = 1
    assert staged.radius_values == {"head_rho": 0.2, "tail_rho": 0.3}
    assert staged.current.stage == 2


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("stop_at", [2, 3, 7])
def test_resumes_in_its_stage(stop_at, tmp_path):
    data = batches(5, 12)

    def new():
        torch.manual_seed(1)
        model = Model(objective=Staged([ERM(), SSESAM(SPLIT, 0.2, 0.4)]))
        model.save_hyperparameters({"objective": model.objective})
        return model

    def run(model, ckpt_path=None, callbacks=(), **options):
        loader = StatefulDataLoader(data, batch_size=None)
        run = trainer(max_epochs=2, callbacks=[StageSwitch(at=[0.25, 0.6]), *callbacks], **options)
        run.fit(model, loader, ckpt_path=ckpt_path)

    whole, resumed = new(), new()
    run(whole)
    every_step = ModelCheckpoint(tmp_path, "last", every_n_train_steps=1, enable_version_counter=False)
    with pytest.raises(Killed):
        run(new(), callbacks=[every_step, KillAt(stop_at)], enable_checkpointing=True)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert isinstance(saved["hyper_parameters"]["objective"], Staged)
    run(resumed, tmp_path / "last.ckpt")
    assert_same_bits(resumed.parameters(), whole.parameters())
    assert resumed.objective.stage == 3


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("passes", ["auto", "full"])
def test_accumulation_and_batch_norm(accumulate, passes):
    """Every stage alone, with batch norm, equals the objective of that stage."""
    data = batches(4, 12, shape=(3, 6, 6))
    weights = []
    for objective, switch in [(Staged([ImbSAM(SPLIT, 0.3), ERM()]), StageSwitch(step=99)), (ImbSAM(SPLIT, 0.3), None)]:
        torch.manual_seed(2)
        model = Model(convbn(), objective, passes)
        if switch is None:
            fit(model, data, accumulate_grad_batches=accumulate)
        else:
            with pytest.warns(UserWarning, match="without the second stage"):
                fit(model, data, accumulate_grad_batches=accumulate, callbacks=[switch])
        weights.append([*model.parameters(), *model.buffers()])
    assert_same_bits(*weights)


def test_sam_in_the_last_fifth_costs_1_2_plain_steps():
    class Counting(Model):
        forwards = backwards = 0

        def sample_losses(self, batch):
            self.forwards += 1
            return super().sample_losses(batch)

        def on_after_backward(self):
            self.backwards += 1

    model = Counting(objective=Staged([ERM(), SAM(0.1)]))
    fit(model, batches(10, 6), callbacks=[StageSwitch(at=0.8)])
    assert (model.forwards, model.backwards) == (12, 12)


def test_missing_switch_and_split_are_said_before_training():
    with pytest.warns(UserWarning, match="Staged stays in stage 1, since no StageSwitch"):
        fit(Model(objective=Staged([ERM(), SAM()])), batches(1))
    with pytest.raises(MisconfigurationException, match="ImbSAM does not know which classes are tail"):
        fit(Model(objective=Staged([ERM(), ImbSAM()])), batches(1), callbacks=[StageSwitch()])
    bound = Staged([ERM(), ImbSAM(SPLIT)])
    with pytest.raises(ArgumentError, match="Pass `objective` without a split"):
        LongTailClassifier([50, 40, 30, 6, 5], mlp(), bound)


@pytest.mark.usefixtures("float64")
def test_objectives_share_no_states():
    """Terms of one name in two objectives: each begins without what the other has left."""
    net, (x, y) = mlp(), classification_batch()

    def step(engine, objective, **options):
        batch = [MicroBatch(sample_losses_of(net, x, y), objective.terms(y))]
        engine.compute(batch, net.parameters(), net, objective=objective, **options)
        return [p.grad.clone() for p in net.parameters()]

    used, staged = SharpnessEngine(), Staged([FriendlySAM(0.3), FriendlySAM(0.5, 0.7)])
    step(used, staged)
    x = -x
    step(used, staged)
    staged.stage = 2
    expected = step(SharpnessEngine(), FriendlySAM(0.5, 0.7))
    assert_same_bits(step(used, staged), expected)
    second = step(used, staged)
    assert not torch.equal(second[0], expected[0])

    look, staged = SharpnessEngine(), Staged([SAM(0.1), SAM(0.2)])
    step(look, staged, reuse=0.7)
    assert look.can_reuse(staged)
    staged.stage = 2
    assert not look.can_reuse(staged)


def test_attributes_reach_the_objectives_that_have_them():
    staged = Staged([GSAM(0.1, 0.4), SAM(0.1), FriendlySAM()])
    staged.alpha, staged.sigma = 0.9, 0.2
    assert (staged.objectives[0].alpha, staged.objectives[2].sigma) == (0.9, 0.2)
    assert not {"alpha", "sigma"} & vars(staged).keys()
    staged.note = "of one's own"
    assert staged.note == "of one's own"
