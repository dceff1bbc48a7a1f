"""Samples of the groups, as curvature is measured on them."""

import random

import numpy as np
import pytest
import torch
from helpers import SPLIT

from lightning_ssesam.curvature import choose_samples


class Listed:
    """A data set whose labels cannot be found."""

    def __init__(self, labels):
        self.kept = labels

    def __len__(self):
        return len(self.kept)

    def __getitem__(self, index):
        return torch.randn(2), self.kept[index]


def test_samples_of_a_data_set_without_labels():
    labels = torch.arange(5).repeat(6)
    state = torch.get_rng_state()
    chosen = choose_samples(Listed(labels), list, SPLIT, ["tail", "class_1"], 4, 3, seed=7, labels=labels)
    assert torch.get_rng_state().equal(state)
    assert [[len(batch) for batch in chosen[group]] for group in ("tail", "class_1")] == [[3, 1], [3, 1]]
    assert {int(label) for batch in chosen["tail"] for _, label in batch} <= {3, 4}
    assert {int(label) for batch in chosen["class_1"] for _, label in batch} == {1}
    other = choose_samples(Listed(labels), list, SPLIT, ["tail"], 4, 3, seed=8, labels=labels)
    assert not other["tail"][0][0][0].equal(chosen["tail"][0][0][0])
    for arguments, message in (
        ({"labels": labels + 1}, "`labels` to be class indices in"),
        ({}, "`dataset` to be a data set with"),
        ({"labels": labels, "samples": 0}, "`samples` to be an integer >= 1"),
        ({"labels": labels, "groups": ["nope"]}, "`groups` to be any of"),
    ):
        with pytest.raises(ValueError, match=message):
            choose_samples(
                **{"dataset": Listed(labels), "collate": list, "split": SPLIT, "groups": ["tail"]}
                | {"samples": 4}
                | arguments
            )


class Augmented(torch.utils.data.Dataset):
    targets = torch.arange(5).repeat(6)

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()]), self.targets[index]


def test_a_seed_decides_all_augmentations():
    chosen = []
    for _ in range(2):
        random.random(), np.random.rand()
        batches = choose_samples(Augmented(), torch.utils.data.default_collate, SPLIT, ["tail"], 4, seed=2**40)
        chosen.append(batches["tail"][0][0])
    assert chosen[0].equal(chosen[1])


class InBatches(torch.utils.data.Dataset):
    """A data set that makes whole batches only."""

    targets = torch.arange(5).repeat(6)

    def __len__(self):
        return len(self.targets)

    def __getitems__(self, indices):
        return torch.tensor(indices), self.targets[indices]


def test_a_data_set_that_gives_whole_batches():
    chosen = choose_samples(InBatches(), lambda batch: batch, SPLIT, ["tail"], 100, 5)
    assert [len(batch[1]) for batch in chosen["tail"]] == [5, 5, 2]
    assert torch.cat([batch[0] for batch in chosen["tail"]]).tolist() == [i for i in range(30) if i % 5 > 2]
    few = [choose_samples(InBatches(), lambda batch: batch, SPLIT, ["tail"], 5, seed=seed) for seed in (0, 0, 1)]
    first, again, other = (chosen["tail"][0][0].tolist() for chosen in few)
    assert first == again != other
