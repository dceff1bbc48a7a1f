"""Measures what a list of millions of images takes: time and memory of `ImageListLT`, and the rate of tar shards.

    python benchmarks/large_lists.py                     # three million lines; three minutes
    python benchmarks/large_lists.py --lines 100000

The list names a few hundred real pictures over and over, so the disk is not measured: everything is in the system's
memory. The memory of a loading process is what it does not share with others (USS), after it has read its share of
`--read` images. The last rows read the same pictures from files and from shards, in one process.
"""

import argparse
import pickle
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image

from lightning_ssesam.data import ClassBalancedSampler, ImageList, ImageListLT, ImageShardsLT, write_shards

CLASSES, PICTURES = 8000, 400


def write_lists(folder, lines):
    """Write pictures of noise, a long-tailed training list, and a test list with five lines of each class."""
    draws = np.random.default_rng(0)
    for number in range(PICTURES):
        pixels = draws.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"picture_{number:06d}.jpg")
    drawn = (CLASSES * draws.power(0.4, lines - CLASSES)).astype(int) % CLASSES
    train = np.concatenate([np.arange(CLASSES), drawn])
    for name, labels in (("train", train), ("test", np.repeat(np.arange(CLASSES), 5))):
        with (folder / f"{name}.txt").open("w") as file:
            file.writelines(f"picture_{k % PICTURES:06d}.jpg {label}\n" for k, label in enumerate(labels))


def timed(function):
    """Return the seconds of a call, and what it returns."""
    start = time.perf_counter()
    value = function()
    return time.perf_counter() - start, value


def own_memory(process=None):
    """Return the memory that a process shares with no other, in MB."""
    return psutil.Process(process).memory_full_info().uss / 1e6


def read(data, number):
    """Read a number of images. Return the seconds after the first batch, and the memory of each loading process."""
    loader = data.train_dataloader()
    batches, memory = iter(loader), []
    next(batches)
    start = time.perf_counter()
    for _ in range(number // data.batch_size):
        next(batches)
    seconds = time.perf_counter() - start
    if loader.num_workers:
        memory = [own_memory(worker.pid) for worker in batches._workers]
    return seconds, memory


def rows(folder, options):
    """Yield the rows of the table: what was measured, and how much it is."""
    before = own_memory()
    seconds, data = timed(
        lambda: ImageListLT(folder / "train.txt", folder / "test.txt", root=folder, image_size=64, num_workers=2)
    )
    yield "read the list (`ImageListLT(...)`)", f"{seconds:.1f} s"
    yield "memory of the list", f"{own_memory() - before:.0f} MB"
    seconds, content = timed(lambda: pickle.dumps(data._train))
    yield "send it to another process", f"{len(content) / 1e6:.0f} MB, {seconds:.2f} s"
    seconds, _ = timed(data.check_files)
    yield "look at the files, before the first training", f"{seconds:.0f} s"
    seconds, _ = timed(data.fingerprint)
    yield "fingerprint, for `compare`", f"{seconds:.0f} s"
    sampler = ClassBalancedSampler(data._train.targets)
    yield "draw an epoch of `ClassBalancedSampler`", f"{timed(lambda: list(sampler))[0]:.1f} s"
    # Pictures that are kept in memory would be measured.
    few, many = (read(data, number)[1] for number in (2 * data.batch_size, options.read))
    yield (
        f"memory that a loading process gains by reading {options.read // 2:,} images",
        f"{max(many) - max(few):.0f} MB",
    )


def rates(folder, options):
    """Yield the rates of files and of shards, for transforms that only read the picture."""
    (folder / "small.txt").write_text("".join((folder / "train.txt").read_text().splitlines(True)[: options.read]))
    images = ImageList(folder / "small.txt", folder)
    classes = int(images.targets.max()) + 1
    write_shards(images, folder / "shards", "train", samples=max(1, options.read // 8))
    pattern = folder / "shards" / "train-*.tar"
    shared = {"image_size": 96, "num_workers": 0, "train_transform": first_pixel, "test_transform": first_pixel}
    kinds = {
        "from files": ImageListLT(folder / "small.txt", folder / "small.txt", root=folder, **shared),
        "from tar shards": ImageShardsLT(pattern, pattern, num_classes=classes, **shared),
    }
    for name, data in kinds.items():
        data._files_checked = True
        seconds = [read(data, options.read // 2)[0] for _ in range(3)]
        yield f"pictures a second {name}, decoded by one process", f"{options.read / 2 / sorted(seconds)[1]:,.0f}"


def first_pixel(image):
    """Return the colour of a pixel."""
    return torch.tensor(image.getpixel((0, 0)))


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=3_000_000, help="images of the list, at least 8,000")
    parser.add_argument("--read", type=int, default=20_000, help="images that are read")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_lists(Path(folder), options.lines)
        print(f"| {options.lines:,} images of {CLASSES:,} classes | |\n|---|---|")
        for part in (rows, rates):
            for name, value in part(Path(folder), options):
                print(f"| {name} | {value} |", flush=True)


if __name__ == "__main__":
    main()
