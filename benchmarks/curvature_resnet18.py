"""Measures the time and the error of the largest and smallest Hessian eigenvalues of a ResNet-18 on a CPU.

    python benchmarks/curvature_resnet18.py

The network is the ResNet-18 of torchvision (11.2 million weights) after some training steps, on 512 images of 32x32
pixels in 10 classes. It is measured in float32 with two threads, with batch norm in evaluation mode.

The script prints the time to a tolerance of 1 %. Then it measures again to 0.01 %, and prints the error of the first
answer. docs/curvature.md has the results.
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
    """Train for some steps of SGD."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    for _ in range(steps):
        chosen = torch.randint(IMAGES, (64,))
        optimizer.zero_grad()
        losses(net, (images[chosen], targets[chosen])).mean().backward()
        optimizer.step()


def main():
    """Measure to both tolerances, and print times and errors."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help="training steps before the measurement")
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
        print(f"{name}: the error of the first answer is {100 * abs(first / second - 1):.2g} %")


if __name__ == "__main__":
    main()
