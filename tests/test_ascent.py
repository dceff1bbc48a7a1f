"""Ascents in the engine: what they cost, what they keep, and the parameters that they meet."""

import copy
import math
import pickle
import threading
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
import twins
from helpers import STRICT, assert_same_bits, classification_batch, clones
from test_family import METHODS, SPLIT, Ours, assert_same, indices, sgd
from torch import nn
from twins import Twin, layered

from lightning_ssesam import (
    ASAM,
    CCSAM,
    ERM,
    GSAM,
    LESAM,
    PGN,
    SAM,
    SSESAM,
    WSAM,
    Adaptive,
    Ascent,
    ClassSplit,
    Direction,
    FocalSAM,
    Friendly,
    FriendlySAM,
    ImbSAM,
    InverseNorm,
    Momentum,
    MomentumSAM,
    Noise,
    PACBayesRadius,
    RandomSAM,
    Scale,
    StepOptions,
    Term,
)
from lightning_ssesam.engine import MicroBatch
from lightning_ssesam.errors import ArgumentError, NonFiniteError
from lightning_ssesam.weights import Names

pytestmark = STRICT

FRIENDLY = Ascent(Friendly(0.6, 0.8))


def after(objective, net=None, steps=3, **options):
    """A network after some steps on batches of its own."""
    torch.manual_seed(3)
    ours = Ours(copy.deepcopy(net) if net is not None else layered(), objective, sgd, **options)
    for _ in range(steps):
        ours.step(*indices())
    return ours


class Normalised(SAM):
    """The clean gradient made a tenth long, as the release of PGN does."""

    needs_clean_gradient = True

    def combine(self, clean, gradient, inner):
        length = inner(clean, clean).sum().sqrt()
        return [0.1 * g / length + G for g, G in zip(clean, gradient, strict=True)]


class TestPasses:
    # forwards, backwards and forwarded samples; of full passes, then of split ones (12 samples, 3 of the tail).
    COSTS = (
        ("ASAM", ASAM(0.1), (2, 2, 24), (2, 2, 24)),
        ("FriendlySAM", FriendlySAM(0.1), (2, 2, 24), (2, 2, 24)),
        ("GSAM", GSAM(0.1), (2, 2, 24), (2, 2, 24)),
        ("WSAM", WSAM(0.1), (2, 2, 24), (2, 2, 24)),
        ("PGN", PGN(0.1), (2, 2, 24), (2, 2, 24)),
        ("PGN alpha=1.3", PGN(0.1, 1.3), (2, 2, 24), (2, 2, 24)),
        ("PGN rho=0", PGN(0.0), (1, 1, 12), (1, 1, 12)),
        ("LESAM", LESAM(), (2, 2, 24), (2, 2, 24)),
        ("LESAM sigma=0", LESAM(0.0), (1, 1, 12), (1, 1, 12)),
        ("FocalSAM", FocalSAM(SPLIT), (2, 3, 24), (2, 3, 24)),
        ("CCSAM", CCSAM(SPLIT), (6, 10, 72), (10, 10, 24)),
        ("CCSAM radius=0", CCSAM(SPLIT, 0.0), (1, 1, 12), (1, 1, 12)),
        ("MomentumSAM", MomentumSAM(), (1, 1, 12), (1, 1, 12)),
        ("RandomSAM", RandomSAM(), (1, 1, 12), (1, 1, 12)),
        ("PGN alpha=1", PGN(0.1, 1.0), (2, 2, 24), (2, 2, 24)),
        ("WSAM gamma=0.5", WSAM(0.1, 0.5), (2, 2, 24), (2, 2, 24)),
        ("CCSAM share=1", CCSAM(SPLIT, share=1.0), (6, 10, 72), (10, 10, 24)),
        ("SSESAM friendly", SSESAM(SPLIT, ascent=FRIENDLY), (3, 4, 36), (4, 4, 24)),
        ("SSESAM noise", SSESAM(SPLIT, ascent=Ascent(Noise())), (3, 2, 36), (4, 2, 24)),
        ("ImbSAM momentum", ImbSAM(SPLIT, ascent=Ascent(Momentum())), (2, 2, 24), (3, 2, 15)),
        ("GSAM noise", GSAM(ascent=Ascent(Noise())), (2, 2, 24), (2, 2, 24)),
    )

    @pytest.mark.parametrize(("name", "objective", "full", "split"), COSTS, ids=[case[0] for case in COSTS])
    def test_counts(self, name, objective, full, split):
        for passes, expected in (("full", full), ("split", split)):
            ours, sizes, backwards = Ours(layered(), objective, sgd), [], []
            ours.net.register_forward_hook(lambda module, args, output, sizes=sizes: sizes.append(len(args[0])))

            def backward(loss, retain_graph, backwards=backwards):
                backwards.append(retain_graph)
                loss.backward(retain_graph=retain_graph)

            x, y = torch.randn(12, 8), torch.tensor([0, 1, 2] * 3 + [3, 4, 3])
            ours.step(x, y, passes=passes, backward=backward)
            assert (len(sizes), len(backwards), sum(sizes)) == expected
            assert backwards[-1] is False

    @pytest.mark.usefixtures("float64")
    @pytest.mark.parametrize("first", [0.0, 1.0])
    def test_weights_that_are_nearly_proportional_get_a_pass_of_their_own(self, first):
        class Nearly(ERM):
            def terms(self, targets):
                weights = torch.linspace(1.0, 2.0, len(targets))
                weights[0] = first
                return Term(weights, 0.0), Term(torch.ones(len(targets)), 0.3)

        net, (x, y) = layered(), indices()
        ours, twin = Ours(copy.deepcopy(net), Nearly(), sgd), Twin(net, sgd)
        ours.step(x, y)
        twin.step(twins.any_terms(twin, Nearly().terms(y), x, y, "ab", PLAIN))
        assert_same(ours.net, net)

    @pytest.mark.parametrize(
        ("objective", "expected"), [(PGN(0.1), (2, 2)), (WSAM(0.1), (2, 2)), (CCSAM(SPLIT), (6, 10))], ids=str
    )
    def test_a_first_sample_that_does_not_count_costs_nothing(self, objective, expected):
        net, forwards, backwards = layered(), [], []
        net.register_forward_hook(lambda *_: forwards.append(1))
        targets = torch.tensor([-100, 0, 1, 2, 3, 4, 0, 1])

        def losses(index, is_clean):
            return F.cross_entropy(net(torch.ones(8, 8)), targets, reduction="none")

        def backward(loss, retain_graph):
            backwards.append(1)
            loss.backward(retain_graph=retain_graph)

        Ours(net, objective, sgd).engine.compute(
            [MicroBatch(losses, objective.terms(targets))], net.parameters(), net, backward
        )
        assert (len(forwards), len(backwards)) == expected

    @pytest.mark.usefixtures("float64")
    def test_parts_whose_weights_have_other_ratios(self):
        """Each part has one class, so that within a part the plain weights are a multiple of the others."""
        x, y = torch.randn(12, 8), torch.tensor([0] * 6 + [4] * 6)
        whole, parts = (Ours(layered(), FocalSAM(SPLIT, 0.3), sgd) for _ in range(2))
        parts.net.load_state_dict(whole.net.state_dict())
        terms = whole.objective.terms(y)
        whole.engine.compute([MicroBatch(whole.sample_losses(x, y), terms)], whole.net.parameters(), whole.net)
        batch = [
            MicroBatch(parts.sample_losses(x[i], y[i]), [t._replace(weights=t.weights[i]) for t in terms])
            for i in (slice(6), slice(6, 12))
        ]
        parts.engine.compute(batch, parts.net.parameters(), parts.net)
        for p, q in zip(whole.net.parameters(), parts.net.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-14)


def test_a_class_of_a_single_sample_has_the_radius_of_two():
    one, two = (CCSAM(ClassSplit([50, n], tail=[1])).terms(torch.tensor([0, 1]))[2].ascent.radius for n in (1, 2))
    assert one.samples == two.samples == 2


def test_what_makes_the_gradient_is_checked():
    net, (x, y) = layered(), indices()

    class Wrong(GSAM):
        def combine(self, clean, gradient, inner):
            return [g.sum() for g in gradient]

    for objective, name in ((Wrong(), "combine"), (GSAM(), "reuse")):
        ours = Ours(net, objective, sgd, **({"reuse": -1.0} if name == "reuse" else {}))
        with pytest.raises(ArgumentError, match=f"argument `{name}` to be"):
            ours.step(x, y)


def test_names_that_contain_norm_are_no_norm_layers():
    class NormFree(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.ones(1, 1, 8))
            self.net = nn.Sequential(
                nn.Linear(8, 8), nn.utils.parametrizations.weight_norm(nn.GroupNorm(2, 8), dim=None)
            )

    net = NormFree()
    weights = Names(list(net.modules())).weights(list(net.parameters()))
    found = {name for name, is_norm in zip(weights.names, weights.are_norms, strict=True) if is_norm}
    assert found == {
        "net.1.bias",
        "net.1.parametrizations.weight.original0",
        "net.1.parametrizations.weight.original1",
    }


PLAIN = {"direction": "gradient", "scale": None, "radius": None, "only": lambda name: True}


@pytest.mark.usefixtures("float64")
class TestSeveralProcesses:
    """Two threads that add up their gradients, as a loop of one's own may do."""

    @staticmethod
    def train(objective, parts, average=False, **options):
        barrier, shared, results = threading.Barrier(2), {}, {}

        def work(rank):
            ours = Ours(layered(), objective, sgd, **options)
            ours.net.load_state_dict(start)
            params = list(ours.net.parameters())

            def synchronize():
                shared[rank] = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in params]
                barrier.wait(30)
                for p, a, b in zip(params, shared[0], shared[1], strict=True):
                    p.grad = (a + b) / (2 if average else 1)
                barrier.wait(30)

            n = sum(len(batch[1]) for batch in parts)
            own = [slice(0, len(parts[0][1])), slice(len(parts[0][1]), n)][rank]
            targets = torch.cat([batch[1] for batch in parts])
            scale = 2.0 if average else 1.0
            for _ in range(4):
                terms = [t._replace(weights=scale * t.weights[own]) for t in objective.terms(targets)]
                x, y = parts[rank]
                batch = [MicroBatch(ours.sample_losses(x, y), terms)]
                perturbs = ours.options.get("reuse") is None or not ours.engine.can_reuse(objective)
                if not perturbs:
                    batch = [batch[0]._replace(terms=[t._replace(rho=0.0) for t in terms])]
                ours.engine.compute(
                    batch,
                    params,
                    ours.net,
                    synchronize=synchronize,
                    optimizer=ours.optimizer,
                    objective=objective,
                    **options,
                )
                ours.optimizer.step()
            results[rank] = ours.net

        start = layered().state_dict()
        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        x, y = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        ours = Ours(layered(), objective, sgd, **options)
        ours.net.load_state_dict(start)
        for _ in range(4):
            if ours.options.get("reuse") is not None and ours.engine.can_reuse(objective):
                part = MicroBatch(ours.sample_losses(x, y), [t._replace(rho=0.0) for t in objective.terms(y)])
                ours.engine.compute([part], ours.net.parameters(), ours.net, **options)
                ours.optimizer.step()
            else:
                ours.step(x, y)
        return results[0], results[1], ours.net

    OBJECTIVES: ClassVar = {
        **{name: objective for name, (objective, _) in METHODS.items() if "=" not in name},
        "RandomSAM": RandomSAM(0.3),
        "SSESAM": SSESAM(SPLIT, 0.3, 0.5, ascent=Ascent(Friendly(0.6, 0.8), Adaptive())),
    }

    @pytest.mark.parametrize("average", [False, True])
    @pytest.mark.parametrize("name", OBJECTIVES)
    def test_equals_one(self, name, average):
        # The first process has no tail samples, or none at all.
        for first in (classification_batch(7, classes=[0, 1, 2]), classification_batch(0)):
            *nets, expected = self.train(self.OBJECTIVES[name], [first, classification_batch(12)], average)
            for net in nets:
                assert_same(net, expected)

    @pytest.mark.parametrize("average", [False, True])
    @pytest.mark.parametrize("kind", ["plain", "proportional", "perturbed"])
    def test_clean_gradient_is_that_of_all(self, kind, average):
        class Across(GSAM):
            term_names = ("first", "second")

            def terms(self, targets):
                n = len(targets)
                weights = {"plain": torch.linspace(0, 1, n), "proportional": torch.full((n,), 0.4)}.get(kind)
                if kind == "perturbed":
                    return super().terms(targets)
                return Term(weights / n, 0.0), Term(torch.full((n,), 0.6 / n), self.rho)

        parts = [classification_batch(7), classification_batch(12)]
        for options in ({}, {"reuse": 0.7}):
            *nets, expected = self.train(Across(0.3, 0.6), parts, average, **options)
            for net in nets:
                assert_same(net, expected)


@pytest.mark.usefixtures("float64")
class TestState:
    STATEFUL: ClassVar = {
        "FriendlySAM": FriendlySAM(0.3, 0.6, 0.8),
        "RandomSAM": RandomSAM(0.3),
        "SSESAM": SSESAM(SPLIT, 0.3, 0.5, ascent=FRIENDLY),
        "SSESAM noise": SSESAM(SPLIT, 0.3, 0.5, ascent=Ascent(Noise())),
    }

    @pytest.mark.parametrize("name", STATEFUL)
    def test_goes_on_from_what_was_saved(self, name, tmp_path):
        ours = after(self.STATEFUL[name])
        torch.save(ours.engine.states.state_dict(), tmp_path / "states.pt")
        other = copy.copy(ours)
        other.net = copy.deepcopy(ours.net)
        other.optimizer = sgd(list(other.net.parameters()))
        other.optimizer.load_state_dict(copy.deepcopy(ours.optimizer.state_dict()))
        other.engine = type(ours.engine)()
        other.engine.states.load_state_dict(torch.load(tmp_path / "states.pt", weights_only=True))
        for x, y in [indices() for _ in range(2)]:
            # Another seed, which the state overrules.
            for one, seed in ((ours, 3), (other, 4)):
                torch.manual_seed(seed)
                one.step(x, y)
        assert_same_bits(other.net.parameters(), ours.net.parameters())

    def test_what_is_saved(self):
        ours = after(FriendlySAM(0.3, 0.6, 0.8), steps=1)
        saved = ours.engine.states.state_dict()
        assert list(saved) == ["all"]
        assert list(saved["all"]["mean"]) == [name for name, _ in ours.net.named_parameters()]
        assert after(SAM(0.3)).engine.states.state_dict() == {}

    @pytest.mark.parametrize("name", STATEFUL)
    @pytest.mark.parametrize("how", ["exception", "not finite", "late exception"])
    def test_failed_step_leaves_it(self, name, how):
        ours = after(self.STATEFUL[name])
        twin = after(self.STATEFUL[name])
        x, y = indices()
        if how == "exception":
            losses, calls = ours.sample_losses(x, y), []

            def failing(index, is_clean):
                calls.append(1)
                if len(calls) == (1 if name == "RandomSAM" else 3):
                    raise RuntimeError("injected")
                return losses(index, is_clean)

            if name == "FriendlySAM":
                calls.append(1)
            part = MicroBatch(failing, ours.objective.terms(y))
            with pytest.raises(RuntimeError, match="injected"):
                ours.engine.compute([part], ours.net.parameters(), ours.net, objective=ours.objective)
        elif how == "not finite":
            with pytest.raises(NonFiniteError):
                ours.compute(x * math.inf, y, check_finite=lambda is_finite: is_finite)
        else:
            with pytest.raises(NonFiniteError):
                ours.compute(x, y, check_finite=lambda is_finite: False)
        ours.step(x, y)
        twin.step(x, y)
        assert_same_bits(ours.net.parameters(), twin.net.parameters())

    @pytest.mark.parametrize("scaled", [1.0, 65536.0, torch.tensor(65536.0), 0.5])
    @pytest.mark.parametrize(
        "objective",
        [
            FriendlySAM(0.3, 0.6, 0.8),
            LESAM(0.05, 0.4),
            CCSAM(SPLIT, 0.3, 0.6),
            GSAM(0.3, 0.6),
            Normalised(0.3),
            SAM(0.3, ascent=Ascent(radius=PACBayesRadius(0.2, 731, 0.01, 0.3))),
        ],
        ids=["Friendly", "InverseNorm", "per tensor", "combine", "combine of one's own", "PACBayesRadius"],
    )
    def test_does_not_see_the_factor_of_the_gradients(self, objective, scaled):
        def backward(loss, retain_graph):
            (loss * scaled).backward(retain_graph=retain_graph)

        for reuse in (None, 0.7):
            torch.manual_seed(5)
            net, start = layered(), SGDOf
            ours, plain = Ours(copy.deepcopy(net), objective, start), Ours(net, objective, start)
            for number in range(4):
                x, y = indices()
                for one, options in ((ours, {"backward": backward, "loss_scale": scaled}), (plain, {})):
                    if number in (1, 2) and reuse:
                        one.objective = ERM()
                    one.compute(x, y, reuse=reuse, **options)
                    one.objective = objective
                for p in ours.net.parameters():
                    p.grad /= scaled
                ours.optimizer.step()
                plain.optimizer.step()
            assert_same(ours.net, plain.net)

    @pytest.mark.parametrize("where", ["clean", "perturbed", "later reuse"])
    def test_overflow_leaves_it(self, where):
        """A GradScaler sees the gradients later; here it refuses the second step, and the first one."""
        for first in (False, True):
            objective = FriendlySAM(0.3, 0.6, 0.8)
            ours = Ours(layered(), objective, sgd)
            twin = Ours(copy.deepcopy(ours.net), objective, sgd)
            scale = torch.tensor(1024.0)
            batches = [indices() for _ in range(3)]
            for number, (x, y) in enumerate(batches):
                if not first or number > 0:
                    self._scaled_step(ours, x, y, scale)
                    twin.step(x, y, reuse=0.7)
                if number == (0 if first else 1):
                    losses = ours.sample_losses(x, y)

                    def overflowing(index, is_clean, losses=losses):
                        factor = math.inf if is_clean == (where == "clean") else 1.0
                        return losses(index, is_clean) * factor

                    part = MicroBatch(overflowing, objective.terms(y))
                    options = {"objective": objective, "reuse": 0.7, "loss_scale": scale}
                    ours.engine.compute([part], ours.net.parameters(), ours.net, **options)
            assert_same(ours.net, twin.net)
            for one in (ours, twin):
                one.objective = ERM()
            self._scaled_step(ours, x, y, scale)
            twin.step(x, y, reuse=0.7)
            assert_same(ours.net, twin.net)

    @staticmethod
    def _scaled_step(ours, x, y, scale):
        def backward(loss, retain_graph):
            (loss * scale).backward(retain_graph=retain_graph)

        ours.compute(x, y, backward=backward, loss_scale=scale, reuse=0.7)
        for p in ours.net.parameters():
            p.grad /= scale
        ours.optimizer.step()

    def test_mean_in_double_precision_under_another_default(self):
        """The decay is not rounded to the default dtype, which the Trainer's "64-true" leaves at float32."""
        net, batches = layered(), [indices() for _ in range(4)]
        ours, twin = Ours(copy.deepcopy(net), FriendlySAM(0.3, 0.6, 0.7), sgd), Twin(net, sgd)
        for x, y in batches:
            torch.set_default_dtype(torch.float32)
            ours.step(x, y)
            torch.set_default_dtype(torch.float64)
            twin.step(twins.friendly_sam(twin, x, y, 0.3, 0.6, 0.7))
        assert_same(ours.net, net)

    def test_frozen_and_thawed_parameters(self):
        """A mean goes on where the parameter was trained in the last step, and begins anew elsewhere."""
        net = layered()
        ours, plain = Ours(net, FriendlySAM(0.3, 0.6, 0.8), lambda p: torch.optim.SGD(p, lr=0.1)), copy.deepcopy(net)
        means = {}
        for is_frozen in (False, True, True, False, False):
            for network in (net, plain):
                network[0].requires_grad_(not is_frozen)
            x, y = indices()
            ours.step(x, y)
            named = {n: p for n, p in plain.named_parameters() if p.requires_grad}

            def gradient(x=x, y=y, named=named):
                return dict(zip(named, torch.autograd.grad(F.cross_entropy(plain(x), y), named.values()), strict=True))

            g = gradient()
            means = {n: m for n, m in means.items() if n in g}
            d = {n: t - 0.6 * means[n] if n in means else t for n, t in g.items()}
            means = {n: 0.8 * means[n] + 0.2 * t if n in means else t for n, t in g.items()}
            size, before = twins.norm(d.values()), copy.deepcopy(plain.state_dict())
            with torch.no_grad():
                for n, p in named.items():
                    p.add_(0.3 * d[n] / size)
            final = gradient()
            plain.load_state_dict(before)
            with torch.no_grad():
                for n, p in named.items():
                    p.sub_(0.1 * final[n])
            assert_same(net, plain)

    @pytest.mark.parametrize("size", [5, 7])
    @pytest.mark.parametrize("reuse", [None, 0.7])
    def test_replaced_parameter(self, size, reuse):
        """One of the same shape keeps the mean of its name; one of another shape begins anew."""
        ours = after(FriendlySAM(0.3, 0.6, 0.8), reuse=reuse)
        means = ours.engine.states.state_dict()["all"]["mean"]
        ours.net[3] = nn.Linear(6, size)
        x, y = indices()
        g = torch.autograd.grad(F.cross_entropy(ours.net(x), y), list(ours.net.parameters()))
        ours.compute(x, y)
        new = ours.engine.states.state_dict()["all"]["mean"]
        for (name, _), gradient in zip(ours.net.named_parameters(), g, strict=True):
            is_kept = size == 5 or not name.startswith("3.")
            expected = 0.8 * means[name] + 0.2 * gradient if is_kept else gradient
            torch.testing.assert_close(new[name], expected, rtol=0, atol=1e-14)
        if reuse:
            ours.objective = ERM()
            ours.compute(x, y)
            assert all(p.grad.shape == p.shape for p in ours.net.parameters())

    def test_it_is_not_copied_with_the_engine(self):
        ours = after(FriendlySAM(0.3))
        for engine in (copy.deepcopy(ours.engine), pickle.loads(pickle.dumps(ours.engine))):
            assert engine.states.state_dict() == {}
        assert ours.engine.states.state_dict()

    def test_stage_2_goes_on_with_the_mean_of_the_tail(self):
        objective = SSESAM(SPLIT, 0.3, 0.5, ascent=FRIENDLY)
        net = layered()
        ours, twin = Ours(copy.deepcopy(net), objective, sgd), Twin(net, sgd)
        plain = {**PLAIN, "direction": ("friendly", 0.6, 0.8)}
        for stage in (1, 1, 2, 2):
            objective.stage = stage
            x, y = indices()
            ours.step(x, y)
            twin.step(twins.any_terms(twin, objective.terms(y), x, y, ("head", "tail"), plain))
            assert_same(ours.net, net)
        assert set(ours.engine.states.state_dict()) == {"head", "tail"}

    def test_direction_that_forgets(self):
        class Every(Direction):
            keeps_state = True

            def find(self, gradient, weights, state):
                seen.append(dict(state))
                return gradient, {} if state else {"once": 1}

        seen = []
        after(SAM(0.3, ascent=Ascent(Every())), steps=3)
        assert seen == [{}, {"once": 1}, {}]

    def test_terms_draw_noise_of_their_own(self):
        ours = after(SSESAM(SPLIT, 0.3, 0.5, ascent=Ascent(Noise())), steps=1)
        states = ours.engine.states.state_dict()
        assert states["head"]["draws"] == states["tail"]["draws"] == 1
        assert states["head"]["seed"] != states["tail"]["seed"]


def SGDOf(params):
    return torch.optim.SGD(params, lr=0.1)


@pytest.mark.usefixtures("float64")
class TestParameters:
    def test_sparse_gradients(self):
        def network(sparse):
            torch.manual_seed(4)
            return nn.Sequential(nn.Embedding(9, 8, sparse=sparse), nn.Flatten(), nn.Linear(16, 5))

        optimizer = lambda params: torch.optim.SGD(params, lr=0.1)  # noqa: E731
        objectives = [o for o, _ in METHODS.values() if not isinstance(o, MomentumSAM)]
        objectives += [SSESAM(SPLIT, 0.3, 0.5, ascent=FRIENDLY), SSESAM(SPLIT), RandomSAM()]
        x, y = torch.randint(7, (12, 2)), indices()[1]
        for objective in objectives:
            for reuse in (None, 0.7):
                nets = []
                for sparse in (False, True):
                    torch.manual_seed(5)
                    ours = Ours(network(sparse), objective, optimizer, reuse=reuse)
                    for step in range(3):
                        ours.objective = objective if step % 2 == 0 else ERM()
                        ours.step(x, y)
                    nets.append(ours.net)
                assert_same(nets[1], nets[0])

    def test_complex_parameters(self):
        """Equal to a network of their real and imaginary parts, where the scale does not tell them apart."""
        x, y = torch.randn(6, 3), torch.tensor([0, 1, 0, 1, 1, 0])
        start = torch.randn(3, 2, 2)
        for ascent in (
            FRIENDLY,
            Ascent(radius=InverseNorm(0.05, 0.4)),
            Ascent(radius=PACBayesRadius(0.2, 99, 0, 9, True)),
        ):
            gradients = []
            for is_complex in (True, False):
                w = nn.Parameter(torch.view_as_complex(start.clone()) if is_complex else start.clone())

                def losses(index, is_clean, w=w, is_complex=is_complex):
                    parts = torch.view_as_real(w) if is_complex else w
                    return F.cross_entropy((x @ parts[..., 0]) * 2 + (x @ parts[..., 1]) ** 2, y, reduction="none")

                radius = ascent.radius
                if isinstance(radius, PACBayesRadius) and is_complex:
                    # It counts elements, of which a complex one is one: sqrt(P) P^(-1/4) = P^(1/4).
                    radius = PACBayesRadius(radius.factor * 2**0.25, radius.samples, 0, 9, True)
                objective = GSAM(0.3, 0.6, ascent=Ascent(ascent.direction, None, radius))
                engine = Ours(nn.Module(), objective, lambda _: None).engine
                part = MicroBatch(losses, objective.terms(y))
                for _ in range(2):
                    engine.compute([part], [w], objective=objective, reuse=0.7)
                gradients.append(torch.view_as_real(w.grad) if is_complex else w.grad)
            torch.testing.assert_close(*gradients, rtol=0, atol=1e-14)

    def test_complex_scale_is_its_size(self):
        w, d = torch.tensor([3 + 4j, 1j]), torch.tensor([1 + 0j, 1j])
        parameter, seen = nn.Parameter(w.clone()), []

        def losses(index, is_clean):
            seen.append(parameter.detach().clone())
            return (parameter * d.conj()).sum().real.reshape(1)

        SharpnessOf(SAM(1.0, ascent=Ascent(scale=Adaptive(0.0))), losses, [parameter])
        expected = torch.tensor([25.0, 1j]) / 26**0.5
        torch.testing.assert_close(seen[1] - w, expected, rtol=0, atol=1e-14)

    def test_parameters_that_are_0_stay_without_eta(self):
        net, seen = layered(), []
        with torch.no_grad():
            net[0].bias.zero_()
            net[0].weight[0].zero_()
        net.register_forward_pre_hook(lambda *_: seen.append(clones(net.parameters())))
        Ours(net, ASAM(0.5, 0.0, "adaptive"), sgd).compute(*indices())
        assert torch.equal(seen[1][1], torch.zeros(6))
        assert torch.equal(seen[1][0][0], torch.zeros(8))
        assert not torch.equal(seen[1][0][1], seen[0][0][1])

    def test_network_of_zeros_makes_a_plain_step(self):
        for radius in (None, InverseNorm(0.1, 0.1), PACBayesRadius(1, 9), PACBayesRadius(1, 9, 0.1, 0.2, True)):
            ascent = Ascent(Friendly(0.5), Adaptive(0.0, "adaptive"), radius)
            nets, (x, y) = [], indices()
            for objective in (SAM(0.5, ascent=ascent), ERM()):
                ours = Ours(layered(), objective, sgd)
                for p in ours.net.parameters():
                    p.data.zero_()
                ours.step(x, y)
                nets.append(ours.net)
            assert_same(*nets, atol=0)

    def test_tied_weights_belong_to_the_classifier(self):
        class Tied(nn.Module):
            def __init__(self):
                super().__init__()
                self.embedding, self.out = nn.Embedding(5, 8), nn.Linear(8, 5)
                self.out.weight = self.embedding.weight

            def forward(self, x):
                return self.out(self.embedding(x).mean(1))

        net, (_, y) = Tied(), indices()
        moved = self.moved(net, Ascent(only="classifier"), torch.randint(5, (12, 3)), y)
        assert moved == {"embedding.weight", "out.bias"}

    @pytest.mark.parametrize("how", ["frozen teacher after it", "compiled", "1x1 convolution", "parametrized"])
    def test_classifier(self, how):
        net, (x, y) = layered(), indices()
        expected = {"3.weight", "3.bias"}
        if how == "frozen teacher after it":
            net.teacher = nn.Linear(8, 5).requires_grad_(False)
            whole, net.forward = net, lambda x: nn.Sequential(*list(whole)[:4])(x)
        elif how == "compiled":
            net[3] = torch.compile(net[3], backend="eager")
            expected = {"3._orig_mod.weight", "3._orig_mod.bias"}
        elif how == "1x1 convolution":
            net = nn.Sequential(
                nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Conv1d(4, 5, 1), nn.AdaptiveAvgPool1d(1), nn.Flatten()
            )
            x, expected = x.unsqueeze(1), {"2.weight", "2.bias"}
        else:
            nn.utils.parametrizations.weight_norm(net[3])
            expected = {f"3.parametrizations.weight.original{i}" for i in (0, 1)} | {"3.bias"}
        assert self.moved(net, Ascent(only="classifier"), x, y) == expected

    def test_names_are_those_without_compilation(self):
        names = []

        def only(name, parameter):
            names.append(name)
            return True

        net = layered()
        net[0] = torch.compile(net[0], backend="eager")
        self.moved(net, Ascent(only=only), *indices())
        assert names == [name for name, _ in layered().named_parameters()]

    def test_norm_layers(self):
        class ScaleNorm(nn.Module):
            def __init__(self):
                super().__init__()
                self.gain = nn.Parameter(torch.ones(1, 1, 8))

            def forward(self, x):
                return (x.unsqueeze(1) * self.gain).squeeze(1)

        class NormLinear(nn.Linear):
            pass

        net = nn.Sequential(
            ScaleNorm(),
            nn.RMSNorm(8),
            NormLinear(8, 6),
            nn.Unflatten(1, (2, 3)),
            nn.RMSNorm((2, 3)),
            nn.Flatten(),
            nn.Linear(6, 5),
        )
        expected = {"0.gain", "1.weight", "4.weight"}
        assert self.moved(net, Ascent(only="norm"), *indices()) == expected
        rest = self.moved(net, Ascent(only="no_bias_no_norm"), *indices())
        assert rest == {"2.weight", "6.weight"}

    @staticmethod
    def moved(net, ascent, x, y):
        """Names of the parameters that a perturbation moves."""
        seen = []
        net.register_forward_pre_hook(lambda *_: seen.append(clones(net.parameters())))
        Ours(net, SAM(0.3, ascent=ascent), sgd).compute(x, y)
        pairs = zip(net.named_parameters(), seen[0], seen[1], strict=True)
        return {name for (name, _), before, after in pairs if not torch.equal(before, after)}

    def test_parameter_that_only_the_optimizer_has(self, monkeypatch):
        """It has no name in the model, and the names are looked for once."""
        from lightning_ssesam import weights

        net, extra, made = layered(), nn.Parameter(torch.ones(5)), []
        init = weights.Names.__init__
        monkeypatch.setattr(weights.Names, "__init__", lambda self, *args: made.append(1) or init(self, *args))
        ours = Ours(net, FriendlySAM(0.3, 0.6), sgd)
        (x, y), names = indices(), []

        def only(name, parameter):
            names.append(name)
            return True

        objective = SAM(0.3, ascent=Ascent(Friendly(0.6), only=only))

        def losses(index, is_clean):
            return F.cross_entropy(net(x) * extra, y, reduction="none")

        for _ in range(3):
            part = MicroBatch(losses, objective.terms(y))
            ours.engine.compute([part], [*net.parameters(), extra], net)
        assert len(made) == 1
        assert len(set(names)) == 7
        assert names[6].startswith("parameters.")
        assert len(ours.engine.states.state_dict()["0"]["mean"]) == 7

    def test_selection_of_nothing(self):
        net = nn.Linear(8, 5)
        with pytest.raises(
            ArgumentError, match="Expected argument `only` to be a selection of at least one of the 2 param"
        ):
            Ours(net, SAM(0.1, ascent=Ascent(only="norm")), sgd).compute(*indices())

    def test_frozen_parameters_do_not_count(self):
        net = layered()
        net[0].requires_grad_(False)
        ours = Ours(copy.deepcopy(net), ASAM(0.5, 0.03), sgd)
        twin = Twin(net, sgd)
        twin.names, twin.params = map(list, zip(*list(net.named_parameters())[2:], strict=True))
        for _ in range(2):
            x, y = indices()
            ours.step(x, y)
            twin.step(twins.asam(twin, x, y, 0.5, 0.03, "plain"))
        assert_same(ours.net, net)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, dtype):
        """Sizes that half precision cannot hold: |w| g is below its smallest number."""
        w, seen = nn.Parameter(torch.full((4,), 1e-4, dtype=dtype)), []

        def losses(index, is_clean):
            seen.append(w.detach().clone())
            return (w.float() * 1e-5).sum().reshape(1)

        SharpnessOf(SAM(2.0, ascent=Ascent(scale=Adaptive(0.0))), losses, [w])
        # Of equal elements, T^2 d / ||T d|| is w / 2.
        torch.testing.assert_close(
            (seen[1] / seen[0]).float(), torch.full((4,), 2.0, dtype=torch.float32), rtol=0.01, atol=0
        )

    def test_state_of_half_precision_is_single(self):
        net = layered().to(torch.bfloat16)
        ours, (x, y) = Ours(net, FriendlySAM(0.3), sgd), indices()
        ours.step(x.to(torch.bfloat16), y)
        means = ours.engine.states.state_dict()["all"]["mean"].values()
        assert {mean.dtype for mean in means} == {torch.float32}

    @pytest.mark.parametrize("name", METHODS)
    def test_empty_batch(self, name):
        ours = after(METHODS[name][0])
        before = clones(ours.net.parameters())
        outcome = ours.compute(torch.zeros(0, 8), torch.zeros(0, dtype=torch.long))
        assert outcome.loss == 0
        assert all(p.grad is None or not p.grad.any() for p in ours.net.parameters())
        assert_same_bits(ours.net.parameters(), before)

    @pytest.mark.parametrize("name", METHODS)
    def test_weights_come_back_from_losses_that_are_nan(self, name):
        ours = after(METHODS[name][0])
        before = clones(ours.net.parameters())
        x, y = indices()
        ours.compute(x * math.nan, y)
        assert_same_bits(ours.net.parameters(), before)
        assert any(p.grad.isnan().any() for p in ours.net.parameters())

    @pytest.mark.parametrize("ascent", [Ascent(Momentum()), Ascent(Noise()), FRIENDLY, Ascent(scale=Adaptive())])
    def test_under_an_outer_autocast(self, ascent):
        """The clean pass makes no gradient, and the copies that autocast keeps of its weights have none."""
        gradients = []
        for cache in (True, False):
            torch.manual_seed(6)
            net = layered().float()
            objective = SSESAM(SPLIT, 0.3, 0.5, ascent=ascent)
            x, y = indices()
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
                Ours(net, objective, sgd).compute(x.float(), y)
            gradients.append([p.grad for p in net.parameters()])
        assert_same_bits(*gradients)


def SharpnessOf(objective, losses, parameters):
    engine = Ours(nn.Module(), objective, lambda _: None).engine
    return engine.compute([MicroBatch(losses, objective.terms(torch.zeros(1).long()))], parameters)


@pytest.mark.usefixtures("float64")
class TestMomentum:
    @pytest.mark.parametrize("make", ["no momentum", "none", "Adagrad", "later", "one group"])
    def test_optimizer_without(self, make):
        class Silent(torch.optim.Optimizer):
            def __init__(self, params):
                super().__init__(params, {"betas": (0.9, 0.99)})

            def step(self, closure=None):
                for group in self.param_groups:
                    for p in group["params"]:
                        self.state[p]["seen"] = 1

        optimizer = {
            "no momentum": lambda params: torch.optim.SGD(params, lr=0.1),
            "none": lambda params: None,
            "Adagrad": torch.optim.Adagrad,
            "later": Silent,
            "one group": lambda params: torch.optim.SGD(
                [{"params": params[:2], "momentum": 0.9}, {"params": params[2:]}]
            ),
        }[make]
        ours = Ours(layered(), MomentumSAM(0.3), optimizer)
        x, y = indices()
        if make == "later":
            ours.step(x, y)
        before = clones(ours.net.parameters())
        with pytest.raises(ArgumentError, match="Expected argument `optimizer` to be"):
            ours.compute(x, y)
        assert_same_bits(ours.net.parameters(), before)

    @pytest.mark.parametrize("kind", ["Adam", "NAdam", "RAdam", "Adamax", "RMSprop"])
    def test_optimizer_with(self, kind):
        options = {"momentum": 0.9} if kind == "RMSprop" else {}
        make = lambda params: getattr(torch.optim, kind)(params, lr=0.01, **options)  # noqa: E731
        net = layered()
        ours, twin = Ours(copy.deepcopy(net), MomentumSAM(0.3), make), Twin(net, make)
        for _ in range(3):
            x, y = indices()
            ours.step(x, y)
            twin.step(twins.momentum_sam(twin, x, y, 0.3))
        assert_same(ours.net, net)


@pytest.mark.usefixtures("float64")
class TestGroupStatistics:
    """``passes="difference"``: each term's change is found with the statistics of its own samples."""

    @pytest.mark.parametrize("kind", ["friendly adaptive", "inverse", "norm"])
    @pytest.mark.parametrize("stage", [1, 2])
    def test_equals_naive_twin(self, kind, stage):
        ascent, plain = {
            "friendly adaptive": (Ascent(Friendly(0.6, 0.8), Adaptive(0.05)), {"scale": (0.05, "plain")}),
            "inverse": (Ascent(radius=InverseNorm(0.05, 0.4)), {"radius": ("inverse", 0.05, 0.4)}),
            "norm": (Ascent(only="norm"), {"only": lambda name: name.startswith("1.")}),
        }[kind]
        if kind == "friendly adaptive":
            plain["direction"] = ("friendly", 0.6, 0.8)
        objective = SSESAM(SPLIT, 0.3, 0.5, ascent=ascent)
        objective.stage = stage
        net = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 5))
        ours, twin = Ours(copy.deepcopy(net), objective, sgd, passes="difference"), Twin(net, sgd)
        for _ in range(3):
            x, y = torch.randn(12, 8), torch.randint(3, (12,))
            y[:5] = torch.tensor([3, 4, 4, 3, 3])
            ours.step(x, y)
            twin.step(self.naive(twin, objective.terms(y), x, y, {**PLAIN, **plain}))
            assert_same(ours.net, net)

    @staticmethod
    def naive(twin, terms, x, y, plain):
        total = twin.gradient(sum(term.weights for term in terms), x, y)
        for key, term in zip(("head", "tail"), terms, strict=True):
            if term.rho > 0:
                own = term.weights > 0
                part = [term._replace(weights=term.weights[own])]
                up = twins.any_terms(twin, part, x[own], y[own], [key], plain)
                down = twin.gradient(term.weights[own], x[own], y[own])
                total = twins.add(twins.add(total, 1.0, up), -1.0, down)
        return total

    @pytest.mark.parametrize("name", ["PGN", "FocalSAM", "CCSAM", "WSAM"])
    def test_samples_of_several_terms_take_full_passes(self, name):
        """Also where one backward serves two terms."""
        net = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 5))
        torch.manual_seed(8)
        batch, nets = (torch.randn(12, 8), torch.arange(12) % 5), []
        for passes in ("difference", "full"):
            ours = Ours(copy.deepcopy(net), METHODS[name][0], sgd, passes=passes)
            outcome = ours.step(*batch)
            assert not outcome.is_difference
            nets.append(ours.net)
        assert_same(*nets, atol=0)


@pytest.mark.usefixtures("float64")
def test_attributes_that_are_set_between_steps():
    changes = {
        ASAM: [("rho", 0.9), ("eta", 0.5), ("biases", "adaptive")],
        FriendlySAM: [("rho", 0.9), ("sigma", 0.2), ("decay", 0.1)],
        GSAM: [("rho", 0.9), ("alpha", 2.0)],
        PGN: [("rho", 0.9), ("alpha", 1.5)],
        WSAM: [("rho", 0.9), ("gamma", 0.2)],
        LESAM: [("sigma", 0.01), ("rho_max", 0.001), ("sigma", 0.0), ("rho_max", 0.0)],
        FocalSAM: [("rho", 0.9), ("gamma", 0.1), ("sharpness", 0.1)],
        CCSAM: [("radius", 0.9), ("share", 0.9), ("radius", 0.0)],
        MomentumSAM: [("rho", 0.9)],
        RandomSAM: [("rho", 0.9)],
    }
    start, batches = layered(), [indices() for _ in range(4)]
    for kind, values in changes.items():
        for name, value in values:
            make = (lambda kind=kind, **k: kind(SPLIT, **k)) if kind in (FocalSAM, CCSAM) else kind
            changed, fixed = make(), make()
            nets = []
            for objective, at_last in ((changed, None), (fixed, make(**{name: value})), (make(), make())):
                torch.manual_seed(7)
                ours = Ours(copy.deepcopy(start), objective, sgd)
                for number, batch in enumerate(batches):
                    if number == 2:
                        if at_last is None:
                            setattr(objective, name, value)
                        else:
                            ours.objective = at_last
                    ours.step(*batch)
                nets.append(list(ours.net.parameters()))
            assert_same_bits(nets[0], nets[1])
            assert not torch.equal(nets[0][0], nets[2][0]), (kind, name)


class Long(Direction):
    def find(self, gradient, weights, state):
        return gradient[:-1], state


class Flat(Scale):
    def factors(self, weights):
        return [p.flatten() for p in weights.values]


ERRORS = [
    (lambda: Adaptive(-0.1), "eta", "a finite number >= 0, but got -0.1."),
    (lambda: Adaptive("a"), "eta", "a finite number >= 0, but got 'a'."),
    (lambda: Adaptive(biases="none"), "biases", "one of 'plain', 'adaptive', but got 'none'."),
    (lambda: Friendly(-1), "sigma", "a finite number >= 0, but got -1."),
    (lambda: Friendly(decay=1.0), "decay", "a number in [0, 1), but got 1.0."),
    (lambda: InverseNorm(0, 1), "sigma", "a finite number > 0, but got 0."),
    (lambda: InverseNorm(1, math.inf), "rho_max", "a finite number > 0, but got inf."),
    (lambda: PACBayesRadius(0, 9), "factor", "a finite number > 0, but got 0."),
    (lambda: PACBayesRadius(1, 1), "samples", "a finite number > 1, but got 1."),
    (lambda: PACBayesRadius(1, "9"), "samples", "a finite number > 1, but got '9'."),
    (lambda: PACBayesRadius(1, math.nan), "samples", "a finite number > 1, but got nan."),
    (lambda: PACBayesRadius(1, 9, -1), "rho_min", "a finite number >= 0, but got -1."),
    (lambda: PACBayesRadius(1, 9, 0.5, 0.4), "rho_max", "a number >= rho_min = 0.5, but got 0.4."),
    (lambda: PACBayesRadius(1, 9, 0.5, "a"), "rho_max", "a number >= rho_min = 0.5, but got 'a'."),
    (lambda: PACBayesRadius(1, 9, per_tensor=1), "per_tensor", "True or False, but got 1."),
    (lambda: PACBayesRadius(1, 9, share=0), "share", "a finite number > 0, but got 0."),
    (lambda: Ascent(Adaptive()), "direction", "a Direction, such as Friendly(), but got Adaptive("),
    (lambda: Ascent(Friendly), "direction", "a Direction, such as Friendly(), but got <class"),
    (lambda: Ascent(scale=0.1), "scale", "a Scale, such as Adaptive(), or None, but got 0.1."),
    (
        lambda: Ascent(radius=0.1),
        "radius",
        "a function of norms, such as InverseNorm(0.04, 0.1), or None, but got 0.1.",
    ),
    (
        lambda: Ascent(radius=InverseNorm),
        "radius",
        "a function of norms, such as InverseNorm(0.04, 0.1), or None, but got",
    ),
    (lambda: Ascent(only="bn"), "only", "one of 'norm', 'classifier', 'no_bias_no_norm', a function of a name and a"),
    (lambda: Ascent(only=3), "only", "one of 'norm', 'classifier', 'no_bias_no_norm', a function of a name and a"),
    (
        lambda: SAM(ascent=Adaptive()),
        "ascent",
        "an Ascent, such as Ascent(scale=Adaptive()), or None, but got Adaptive(",
    ),
    (lambda: ASAM(-1), "rho", "a finite number >= 0, but got -1."),
    (lambda: ASAM(eta=math.nan), "eta", "a finite number >= 0, but got nan."),
    (lambda: ASAM(biases=1), "biases", "one of 'plain', 'adaptive', but got 1."),
    (
        lambda: ASAM(ascent=Ascent(scale=Adaptive())),
        "ascent",
        "an Ascent without `scale`, which ASAM sets, but got Ascent(",
    ),
    (lambda: FriendlySAM(sigma="1"), "sigma", "a finite number >= 0, but got '1'."),
    (lambda: FriendlySAM(decay=-0.1), "decay", "a number in [0, 1), but got -0.1."),
    (
        lambda: FriendlySAM(ascent=Ascent(Noise())),
        "ascent",
        "an Ascent without `direction`, which FriendlySAM sets, but",
    ),
    (lambda: GSAM(alpha=-1), "alpha", "a finite number >= 0, but got -1."),
    (lambda: PGN(alpha=0), "alpha", "a finite number > 0, but got 0."),
    (lambda: PGN(rho=True), "rho", "a finite number >= 0, but got True."),
    (lambda: WSAM(gamma=1), "gamma", "a number strictly between 0 and 1, but got 1."),
    (lambda: LESAM(sigma=-1), "sigma", "a finite number >= 0, but got -1."),
    (lambda: LESAM(rho_max=math.inf), "rho_max", "a finite number >= 0, but got inf."),
    (
        lambda: LESAM(ascent=Ascent(radius=InverseNorm(1, 1))),
        "ascent",
        "an Ascent without `radius`, which LESAM sets, but",
    ),
    (lambda: FocalSAM([5, 3]), "split", "a ClassSplit, but got [5, 3]."),
    (lambda: FocalSAM(SPLIT, gamma=-1), "gamma", "a finite number >= 0, but got -1."),
    (lambda: FocalSAM(SPLIT, sharpness=-1), "sharpness", "a finite number >= 0, but got -1."),
    (lambda: CCSAM(SPLIT, -1), "radius", "a finite number >= 0, but got -1."),
    (lambda: CCSAM(SPLIT, share=1.1), "share", "a number in (0, 1], but got 1.1."),
    (lambda: CCSAM(SPLIT, share=0), "share", "a finite number > 0, but got 0."),
    (
        lambda: CCSAM(SPLIT, ascent=FRIENDLY),
        "ascent",
        "an Ascent whose direction keeps no state, because the terms are",
    ),
    (
        lambda: CCSAM(SPLIT, ascent=Ascent(radius=InverseNorm(1, 1))),
        "ascent",
        "an Ascent without `radius`, which CCSAM",
    ),
    (
        lambda: MomentumSAM(ascent=Ascent(Noise())),
        "ascent",
        "an Ascent without `direction`, which MomentumSAM sets, but",
    ),
    (lambda: RandomSAM(-0.1), "rho", "a finite number >= 0, but got -0.1."),
    (lambda: StepOptions(interval=2, reuse=-1), "reuse", "a finite number >= 0, but got -1."),
    (
        lambda: StepOptions(reuse=0.7),
        "interval",
        "an integer >= 2 with `reuse`, which acts between perturbed updates, but",
    ),
    (lambda: ERM(ignore_index=0.5), "ignore_index", "an integer, but got 0.5."),
    (
        lambda: FocalSAM(SPLIT).terms(torch.tensor([0, 7])),
        "targets",
        "class indices in [0, 5), but got values from 0 to 7",
    ),
    (
        lambda: FocalSAM(SPLIT).terms(torch.ones(2, 5)),
        "targets",
        "class probabilities that add up to 1, but got some that",
    ),
    (
        lambda: CCSAM(SPLIT).terms(torch.ones(2, 5)),
        "targets",
        "class probabilities that add up to 1, but got some that",
    ),
    (
        lambda: CCSAM(SPLIT).terms(torch.ones(2, 4)),
        "targets",
        "class indices of an integer dtype, or class probabilities",
    ),
    (
        lambda: after(SAM(ascent=Ascent(Long()))),
        "direction",
        "one that returns a tensor of its shape, or None, for each",
    ),
    (
        lambda: after(SAM(ascent=Ascent(scale=Flat()))),
        "scale",
        "one that returns a tensor of its shape, or None, for each",
    ),
    (
        lambda: after(SAM(ascent=Ascent(radius=lambda n: torch.ones(2)))),
        "radius",
        "one that returns a tensor of the shape ()",
    ),
]


@pytest.mark.parametrize(("make", "name", "text"), ERRORS)
def test_errors_of_arguments(make, name, text):
    with pytest.raises(ArgumentError) as caught:
        make()
    assert str(caught.value).startswith(f"Expected argument `{name}` to be {text}")
    assert str(caught.value).endswith(".")


def test_state_of_one_process_alone_is_refused():
    local = {"synchronize": lambda: None, "processes": "local"}
    assert after(ASAM(), **local).engine.states.state_dict() == {}
    with pytest.raises(ArgumentError, match=r"`processes` to be 'global', but got 'local' with Friendly\(sigma=0.6"):
        after(SSESAM(SPLIT, ascent=FRIENDLY), **local)


def test_states_of_ascents_that_are_none():
    with pytest.raises(ArgumentError, match="Expected the states of ascents to be a mapping of mappings"):
        after(ERM()).engine.states.load_state_dict({"all": 3})


def test_parts_and_objectives_are_safe_in_checkpoints(tmp_path):
    ascent = Ascent(Friendly(0.5), Adaptive(0.1), PACBayesRadius(1.0, 9), "norm")
    objectives = [SAM(0.1, ascent=ascent), LESAM(), ASAM(), CCSAM(SPLIT), GSAM(), MomentumSAM()]
    torch.save(objectives, tmp_path / "objectives.pt")
    loaded = torch.load(tmp_path / "objectives.pt", weights_only=True)
    assert list(map(repr, loaded)) == list(map(repr, objectives))
    assert loaded[0].ascent == ascent
