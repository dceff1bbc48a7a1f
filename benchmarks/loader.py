"""Measures how many images a second the loaders make: transforms of one image at a time, and ``in_memory=True``.

    python benchmarks/loader.py                       # half a minute on one core
    python benchmarks/loader.py --device cuda

The images are noise of 32x32 pixels in the folders of ten classes. Each round makes every batch of an epoch with each
loader in turn, in this process and with one thread. The table has the medians of all rounds. Files are decoded before
the first round, since both loaders keep them in memory. On a device, the host time is that until all operations of the
epoch are started, and the rate is that until they are done.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lightning_ssesam.data import ImageFolderLT


def write_images(folder, number, image_size):
    """Write as many images of noise for each of ten classes, for training and for the test."""
    draws = np.random.default_rng(0)
    for part in ("train", "test"):
        for label in range(10):
            (folder / part / str(label)).mkdir(parents=True)
            for index in range(number):
                pixels = draws.integers(0, 256, (image_size, image_size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / str(label) / f"{index}.png")


def make_loaders(folder, options):
    """Return the loaders by set and kind."""
    loaders = {}
    for kind, in_memory in (("transforms", False), ("in_memory=True", True)):
        data = ImageFolderLT(
            folder,
            val_fraction=0.0,
            image_size=options.image_size,
            batch_size=options.batch_size,
            in_memory=in_memory,
        )
        for name in ("train", "test"):
            loader = getattr(data, f"{name}_dataloader")()
            if in_memory and options.device != "cpu":
                loader.dataset.images = loader.dataset.images.to(options.device)
            loaders[name, kind] = loader
    return loaders


def measure(loader, device):
    """Return the seconds of the host and of everything for an epoch, and how many batches and images it has."""
    wait = torch.cuda.synchronize if device != "cpu" else lambda: None
    wait()
    images, batches, start = 0, 0, time.perf_counter()
    for pixels, _ in loader:
        if device != "cpu":
            pixels = pixels.to(device, non_blocking=True)
        images, batches = images + len(pixels), batches + 1
    host = time.perf_counter() - start
    wait()
    return host, time.perf_counter() - start, batches, images


def main():
    """Measure in alternating rounds, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--number", type=int, default=500, help="images of each class")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=128, help="size of training batches; test batches have 256")
    parser.add_argument("--device", default="cpu", help="where the images of in_memory=True lie")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), options.number, options.image_size)
        loaders = make_loaders(Path(folder), options)
        found = {key: [] for key in loaders}
        for round_number in range(options.rounds + 1):
            for key, loader in loaders.items():
                measured = measure(loader, options.device)
                # The first round reads the files.
                if round_number > 0:
                    found[key].append(measured)
    print("| set | loader | images a second | host time, ms a batch | host time, µs an image |")
    print("|---|---|---|---|---|")
    for (name, kind), rounds in found.items():
        host, whole = (statistics.median(values) for values in list(zip(*rounds, strict=True))[:2])
        _, _, batches, images = rounds[0]
        rate = f"{images / whole:,.0f} | {1e3 * host / batches:.2f} | {1e6 * host / images:.1f}"
        print(f"| {name} | {kind} | {rate} |")


if __name__ == "__main__":
    main()
