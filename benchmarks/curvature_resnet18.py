"""Measures how long both ends of the Hessian's spectrum take for a ResNet-18 on a CPU, and how exact they are.

    python benchmarks/curvature_resnet18.py

512 images of 32x32 pixels, 10 classes, a ResNet-18 of torchvision (11.2 million weights) after some steps; batch norm
in evaluation mode, float32, two threads. Prints the time to a tolerance of 1 %. Then it measures again to 0.01 %,
and prints how far the first answer was off. docs/curvature.md has the results.
"""

import argparse
import time

import torch
import torch.nn.functional as F
import torchvision

from lightning_ssesam.curvature import Hessian, extreme_eigenvalues

IMAGES, CLASSES = 512, 10


def losses(net, batch):
    """Return the loss of every sample."""
    images, targets = batch
    return F.cross_entropy(net(images), targets, reduction="none")


def train(net, images, targets, steps):
    """Make some steps of SGD."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    for _ in range(steps):
        chosen = torch.randint(IMAGES, (64,))
        optimizer.zero_grad()
        losses(net, (images[chosen], targets[chosen])).mean().backward()
        optimizer.step()


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help="steps of SGD before the measurement")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=256)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    targets = torch.arange(IMAGES) % CLASSES
    images = torch.randn(IMAGES, 3, 32, 32) + 0.5 * torch.randn(CLASSES, 3, 32, 32)[targets]
    net = torchvision.models.resnet18(num_classes=CLASSES)
    train(net, images, targets, options.steps)
    batches = list(zip(images.split(options.batch_size), targets.split(options.batch_size), strict=True))
    found = {}
    for tolerance in (0.01, 0.0001):
        start = time.perf_counter()
        hessian = Hessian(net, batches, losses)
        ends = found[tolerance] = extreme_eigenvalues(hessian, tolerance, progress=f"to {100 * tolerance:g} %")
        print(
            f"to {100 * tolerance:g} %: {ends.smallest:.6g} and {ends.largest:.6g}, {ends.iterations} products,"
            f" {time.perf_counter() - start:.0f} s"
        )
    for name in ("smallest", "largest"):
        first, second = (getattr(ends, name) for ends in found.values())
        print(f"{name}: the first is off by {100 * abs(first / second - 1):.2g} %")


if __name__ == "__main__":
    main()
