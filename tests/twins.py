"""The plain version of each method of the family, written from the formulas of tests/reference and of the papers.

Nothing here is shared with the package but the losses of the network.
"""

import torch
from torch import nn

COUNTS = [500, 160, 50, 16, 5]


def layered():
    """A network with a normalization layer, whose samples do not mix."""
    return nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 5))


# What counts as what in `layered`, by name.
NORM, CLASSIFIER, BIASES = ("1.weight", "1.bias"), ("3.weight", "3.bias"), ("0.bias", "1.bias", "3.bias")
SELECTED = {
    None: lambda name: True,
    "norm": lambda name: name in NORM,
    "classifier": lambda name: name in CLASSIFIER,
    "no_bias_no_norm": lambda name: name in ("0.weight", "3.weight"),
}


def norm(tensors):
    return sum((t.abs() ** 2).sum() for t in tensors) ** 0.5


def inner(a, b):
    return sum((x * y).sum() for x, y in zip(a, b, strict=True))


def add(a, factor, b):
    return [x + factor * y for x, y in zip(a, b, strict=True)]


def class_masses(y, ignored):
    """How much of each sample is of each class; 0 where it is ignored."""
    if y.is_floating_point():
        return y.movedim(1, -1)
    masses = torch.zeros(*y.shape, len(COUNTS))
    for c in range(len(COUNTS)):
        masses[..., c] = ((y == c) & ~ignored).double()
    return masses


class Twin:
    """A network that is trained plainly."""

    def __init__(self, net, make_optimizer, ignore_index=-100):
        self.net, self.ignore_index = net, ignore_index
        self.names, self.params = map(list, zip(*net.named_parameters(), strict=True))
        self.optimizer = make_optimizer(self.params)
        self.kept = {}

    def losses(self, x, y):
        return nn.functional.cross_entropy(self.net(x), y, reduction="none", ignore_index=self.ignore_index)

    def gradient(self, weights, x, y, e=None):
        """The gradient of the weighted loss, at the weights or at e from there."""
        before = [p.detach().clone() for p in self.params]
        with torch.no_grad():
            for p, step in zip(self.params, e or [], strict=False):
                p.add_(step)
        total = (weights * self.losses(x, y)).sum()
        found = torch.autograd.grad(total, self.params)
        with torch.no_grad():
            for p, value in zip(self.params, before, strict=True):
                p.copy_(value)
        return list(found)

    def mean(self, y):
        """1/N, and which targets are ignored."""
        if y.is_floating_point():
            shape = y.shape[:1] + y.shape[2:]
            return torch.full(shape, 1 / shape.numel()), torch.zeros(shape, dtype=torch.bool)
        ignored = y == self.ignore_index
        return (~ignored).double() / max(int((~ignored).sum()), 1), ignored

    def momentum(self):
        states = [self.optimizer.state.get(p, {}) for p in self.params]
        return [s.get("momentum_buffer", s.get("exp_avg")) for s in states]

    def step(self, gradient):
        for p, g in zip(self.params, gradient, strict=True):
            p.grad = g
        self.optimizer.step()


def unit(direction, length):
    size = norm(direction)
    return [length * d / size if size > 0 else 0 * d for d in direction]


def friendly(twin, key, g, sigma, decay):
    """g - sigma m, and then the new m."""
    m = twin.kept.get(key)
    d = g if m is None else add(g, -sigma, m)
    twin.kept[key] = g if m is None else [decay * a + (1 - decay) * b for a, b in zip(m, g, strict=True)]
    return d


def asam(twin, x, y, rho, eta, biases):
    a, _ = twin.mean(y)
    g = twin.gradient(a, x, y)
    T = [
        torch.ones_like(p) if biases == "plain" and name.endswith("bias") else p.detach().abs() + eta
        for name, p in zip(twin.names, twin.params, strict=True)
    ]
    length = norm([t * d for t, d in zip(T, g, strict=True)])
    return twin.gradient(a, x, y, [rho * t**2 * d / length for t, d in zip(T, g, strict=True)])


def friendly_sam(twin, x, y, rho, sigma, decay):
    a, _ = twin.mean(y)
    d = friendly(twin, "all", twin.gradient(a, x, y), sigma, decay)
    return twin.gradient(a, x, y, unit(d, rho))


def clean_and_perturbed(twin, x, y, rho):
    a, _ = twin.mean(y)
    g = twin.gradient(a, x, y)
    return g, twin.gradient(a, x, y, unit(g, rho))


def gsam(twin, x, y, rho, alpha):
    g, G = clean_and_perturbed(twin, x, y, rho)
    across = add(g, -inner(g, G) / inner(G, G), G)
    return add(G, -alpha, across)


def wsam(twin, x, y, rho, gamma):
    g, G = clean_and_perturbed(twin, x, y, rho)
    b = gamma / (1 - gamma)
    return [(1 - b) * u + b * v for u, v in zip(g, G, strict=True)]


def pgn(twin, x, y, rho, alpha):
    g, G = clean_and_perturbed(twin, x, y, rho)
    return [(1 - alpha) * u + alpha * v for u, v in zip(g, G, strict=True)]


def lesam(twin, x, y, sigma, rho_max):
    a, _ = twin.mean(y)
    g = twin.gradient(a, x, y)
    return twin.gradient(a, x, y, unit(g, min(sigma / float(norm(g)), rho_max)))


def focal_sam(twin, x, y, rho, gamma, sharpness):
    a, ignored = twin.mean(y)
    c = torch.tensor([sharpness * (1 - n / sum(COUNTS)) ** gamma for n in COUNTS])
    c = class_masses(y, ignored) @ c
    perturbed = twin.gradient(c * a, x, y, unit(twin.gradient(c * a, x, y), rho))
    return add(twin.gradient((1 - c) * a, x, y), 1.0, perturbed)


def cc_sam(twin, x, y, radius, share, classifier):
    a, ignored = twin.mean(y)
    masses = class_masses(y, ignored)
    last = [name in classifier for name in twin.names]
    W = norm([p.detach() for p, is_last in zip(twin.params, last, strict=True) if is_last])
    M = sum(p.numel() for p, is_last in zip(twin.params, last, strict=True) if is_last)
    total = [(1 - share) * g for g in twin.gradient(a, x, y)]
    for c, n in enumerate(COUNTS):
        weights = a * masses[..., c]
        if weights.sum() == 0:
            continue
        e = []
        for h, is_last in zip(twin.gradient(weights / weights.sum(), x, y), last, strict=True):
            r = radius * M**0.25 * (W / (2 * norm([h]))) ** 0.5 * (max(n, 2) - 1) ** -0.25
            e.append(r * h / norm([h]) if is_last and norm([h]) > 0 else 0 * h)
        total = add(total, share, twin.gradient(weights, x, y, e))
    return total


def momentum_sam(twin, x, y, rho):
    a, _ = twin.mean(y)
    v = twin.momentum()
    e = None if v[0] is None else unit([-t for t in v], rho)
    return twin.gradient(a, x, y, e)


def sam_along(twin, x, y, rho, direction):
    """SAM along a direction that is given."""
    return twin.gradient(twin.mean(y)[0], x, y, unit(direction, rho))


def any_terms(twin, terms, x, y, keys, ascent, drawn=None):
    """The sum of the terms' gradients, with any ascent. ``ascent`` is a dictionary of plain values.

    direction: "gradient", ("friendly", sigma, decay), "momentum", "noise" (``drawn`` by key);
    scale: None or (eta, biases); radius: None, ("inverse", sigma, rho_max) or ("pac", C, n, low, high, per_tensor);
    only: a function of a name.
    """
    total = [torch.zeros_like(p) for p in twin.params]
    for key, term in zip(keys, terms, strict=True):
        weights, rho = term[0], term[1]
        e = None
        if rho > 0:
            moves = [ascent["only"](name) for name in twin.names]
            e = _move(twin, twin.gradient(weights, x, y), rho, key, moves, ascent, drawn)
        total = add(total, 1.0, twin.gradient(weights, x, y, e))
    return total


def _move(twin, g, rho, key, moves, ascent, drawn):
    kind = ascent["direction"]
    if kind == "gradient":
        d = g
    elif kind == "momentum":
        d = [torch.zeros_like(t) if v is None else -v for t, v in zip(g, twin.momentum(), strict=True)]
    elif kind == "noise":
        noise = iter(drawn[key])
        d = [next(noise) if is_moved else torch.zeros_like(t) for t, is_moved in zip(g, moves, strict=True)]
    else:
        d = friendly(twin, key, g, *kind[1:])
    T = []
    for name, p, is_moved in zip(twin.names, twin.params, moves, strict=True):
        t = torch.ones_like(p)
        if ascent["scale"] is not None:
            eta, biases = ascent["scale"]
            t = t if biases == "plain" and name.endswith("bias") else p.detach().abs() + eta
        T.append(t if is_moved else torch.zeros_like(p))
    td = [t * v for t, v in zip(T, d, strict=True)]
    P = sum(p.numel() for p, is_moved in zip(twin.params, moves, strict=True) if is_moved)
    w = norm([p.detach() for p, is_moved in zip(twin.params, moves, strict=True) if is_moved])

    def radius(q):
        if q == 0:
            return 0.0
        if ascent["radius"] is None:
            return rho
        if ascent["radius"][0] == "inverse":
            return min(ascent["radius"][1] / float(q), ascent["radius"][2])
        _, C, n, low, high, _ = ascent["radius"]
        return P**0.5 * min(max(C * float((w / (2 * q)) ** 0.5) * P**-0.25 * (n - 1) ** -0.25, low), high)

    if ascent["radius"] is not None and ascent["radius"][-1] is True:
        norms = [norm([v]) for v in td]
    else:
        norms = [norm(td)] * len(td)
    return [radius(q) * t * v / q if q > 0 else 0 * v for t, v, q in zip(T, td, norms, strict=True)]
