from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from lightning_ssesam import DigitsLT
from lightning_ssesam.data import LongTailed, long_tailed_counts, long_tailed_indices
from lightning_ssesam.data.profiles import largest_max_count


@pytest.mark.parametrize(("classes", "largest", "total"), [(10, 5000, 12_406), (100, 500, 10_847)])
@pytest.mark.parametrize("factor", [100, 0.01])
def test_counts_of_the_published_cifar_protocol(classes, largest, total, factor):
    counts = long_tailed_counts(classes, largest, factor)
    assert sum(counts) == total
    assert counts == sorted(counts, reverse=True)
    assert (counts[0], counts[-1]) == (largest, largest // 100)


@pytest.mark.parametrize("factor", [10, 20, 50, 100, 200])
def test_smallest_class_is_exact(factor):
    assert long_tailed_counts(10, 5000, factor)[-1] == 5000 // factor
    assert long_tailed_counts(10, 5000, factor, "step") == [5000] * 5 + [5000 // factor] * 5


def test_smallest_class_is_exact_where_floating_point_is_not():
    # 49 * (1 / 49) is 0.9999999999999999, and 100 * 0.57 is 56.99999999999999.
    assert long_tailed_counts(2, 49, 49) == [49, 1]
    assert long_tailed_counts(2, 100, 0.57) == [100, 57]


def test_step_profile_and_no_imbalance():
    assert long_tailed_counts(5, 100, 10, "step") == [100, 100, 100, 10, 10]
    assert long_tailed_counts(3, 7, 1) == [7, 7, 7]
    assert long_tailed_counts(1, 7, 1) == [7]


def test_indices():
    labels = torch.tensor([0, 1, 0, 1, 2, 0, 2])
    picked = long_tailed_indices(labels, [2, 1, 2], torch.Generator().manual_seed(0))
    assert torch.bincount(labels[picked]).tolist() == [2, 1, 2]
    assert picked.tolist() == sorted(set(picked.tolist()))
    others = [long_tailed_indices(labels, [2, 1, 2], torch.Generator().manual_seed(s)).tolist() for s in range(9)]
    assert others[0] == picked.tolist()
    assert any(other != picked.tolist() for other in others)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: long_tailed_counts(0, 10, 10), "`num_classes` to be an integer >= 1, but got 0"),
        (lambda: long_tailed_counts(10, 0, 10), "`max_count` to be an integer >= 1, but got 0"),
        (lambda: long_tailed_counts(10, 10, 0), "`imbalance_factor` to be a finite number > 0"),
        (lambda: long_tailed_counts(10, 10, float("nan")), "`imbalance_factor` to be a finite number > 0"),
        (lambda: long_tailed_counts(10, 10, "10"), "`imbalance_factor` to be a finite number > 0, .* but got '10'"),
        (lambda: long_tailed_counts(10, 10, 11), "`imbalance_factor` to be at most max_count = 10, .* but got 11"),
        (lambda: long_tailed_counts(10, 10, 2, "linear"), "`profile` to be one of 'exponential', 'step', but got"),
        (
            lambda: long_tailed_indices([0, 0, 1], [2, 2], torch.Generator()),
            "`class_counts` to be at most the 1 samples at hand of class 1, but got 2",
        ),
        (lambda: DigitsLT(imbalance_factor=101), "`imbalance_factor` to be at most max_count = 100"),
        (lambda: DigitsLT(batch_size=0), "`batch_size` to be an integer >= 1, but got 0"),
        (lambda: DigitsLT(seed=-1), "`seed` to be an integer >= 0, but got -1"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def everything(loader):
    return [torch.cat(parts) for parts in zip(*loader, strict=True)]


@pytest.mark.parametrize("profile", ["exponential", "step"])
def test_digits(profile):
    data = DigitsLT(imbalance_factor=20, profile=profile, batch_size=16, seed=3)
    assert data.num_classes == 10
    sets = {name: everything(getattr(data, f"{name}_dataloader")()) for name in ("train", "val", "test")}
    counts = {name: torch.bincount(labels).tolist() for name, (_, labels) in sets.items()}
    assert counts == {"train": data.class_counts, "val": [20] * 10, "test": [50] * 10}
    assert data.class_counts[0] == 100
    assert data.class_counts[-1] == 5
    images, labels = next(iter(data.train_dataloader()))
    assert (images.shape, images.dtype, labels.dtype) == ((16, 1, 8, 8), torch.float32, torch.int64)
    rows = [tuple(image.flatten().tolist()) for images, _ in sets.values() for image in images]
    assert len(set(rows)) == len(rows), "an image is in two sets"


def test_digits_are_seeded():
    def labels_and_images(seed):
        data = DigitsLT(seed=seed)
        data.setup("fit")
        data.setup("test")
        return everything(data.test_dataloader())

    assert torch.equal(labels_and_images(1)[0], labels_and_images(1)[0])
    assert not torch.equal(labels_and_images(1)[0], labels_and_images(2)[0])


def test_split_uses_the_data_sets_thresholds():
    split = DigitsLT().split(tail_fraction=0.2)
    assert (split.many_above, split.few_below) == (50, 10)
    assert split.tail.nonzero().flatten().tolist() == [4, 5, 6, 7, 8, 9]
    assert DigitsLT().split(tail_below=5, many_above=90).many.sum() == 1


SIZES = [40, 60, 7, 60, 30]
LABELS = torch.arange(5).repeat_interleave(torch.tensor(SIZES))[
    torch.randperm(sum(SIZES), generator=torch.Generator().manual_seed(4))
]


class Labelled(Dataset):
    """Samples that are numbers, from 0 on, and labels under any name."""

    def __init__(self, **attributes):
        vars(self).update(attributes)

    def __getitem__(self, index):
        return index, int(LABELS[index])

    def __len__(self):
        return len(LABELS)


def test_long_tailed_orders_classes_by_their_size():
    data = LongTailed(Labelled(targets=LABELS), imbalance_factor=16)
    # Classes 1 and 3 are the largest, 1 before 3; the rest follow as 0, 4, 2; all 60 of the largest fit.
    assert data.class_counts == [15, 60, 3, 30, 7]
    assert (data.num_classes, len(data)) == (5, 115)
    picked, labels = (torch.tensor(column) for column in zip(*data, strict=True))
    assert labels.bincount().tolist() == data.class_counts
    assert torch.equal(picked, data.indices)
    assert picked.tolist() == sorted(set(picked.tolist()))
    assert torch.equal(labels, data.targets)
    assert data[-1] == (int(picked[-1]), int(labels[-1]))
    assert data.split(tail_below=10).tail.tolist() == [False, False, True, False, True]
    step = LongTailed(Labelled(targets=LABELS), 4, "step")
    assert step.class_counts == [31, 31, 7, 31, 7]


def test_long_tailed_keeps_a_balanced_data_set_in_its_order():
    data = LongTailed(TensorDataset(torch.randn(500, 2), torch.arange(500) % 10), 10)
    assert data.class_counts == long_tailed_counts(10, 50, 10)


def test_long_tailed_with_fewer():
    data = Labelled(targets=LABELS)
    assert LongTailed(data, 16, max_count=32).class_counts == [8, 32, 2, 16, 4]
    assert LongTailed(data, 2).class_counts == [10, 15, 7, 12, 8]
    assert LongTailed(data, 2, max_count=14).class_counts == [9, 14, 7, 11, 8]


@pytest.mark.parametrize("factor", [1, 3, 16.5, 60])
@pytest.mark.parametrize("profile", ["exponential", "step"])
def test_largest_max_count(factor, profile):
    sizes = sorted(SIZES, reverse=True)

    def fits(largest):
        ratio = [
            factor ** -(k / 4) if profile == "exponential" else (1, 1, 1, 1 / factor, 1 / factor)[k] for k in range(5)
        ]
        return all(int(largest * r + 1e-9) <= size for r, size in zip(ratio, sizes, strict=True))

    assert largest_max_count(sizes, factor, profile) == max(n for n in range(1, 61) if fits(n))


def test_long_tailed_is_seeded():
    indices = [LongTailed(Labelled(targets=LABELS), 16, seed=seed).indices.tolist() for seed in (0, 0, 1)]
    assert indices[0] == indices[1] != indices[2]


@pytest.mark.parametrize(
    "dataset",
    [
        Labelled(targets=LABELS.tolist()),
        Labelled(labels=LABELS.numpy().astype(np.uint8)),
        Labelled(samples=[(f"{i}.png", label) for i, label in enumerate(LABELS.tolist())]),
        Labelled(targets=None, labels=LABELS),
        TensorDataset(torch.arange(len(LABELS)), LABELS),
    ],
)
def test_long_tailed_finds_the_labels(dataset):
    expected = LongTailed(Labelled(), 16, labels=LABELS)
    found = LongTailed(dataset, 16)
    assert torch.equal(found.targets, expected.targets)
    assert torch.equal(found.indices, expected.indices)
    chosen = LABELS.argsort()[20:].tolist()
    part = LongTailed(Subset(dataset, chosen), 4)
    assert torch.equal(part.targets, LABELS[chosen][part.indices])
    for sample, label in part:
        assert LABELS[int(sample)] == label
    batch, labels = next(iter(DataLoader(LongTailed(found, 2), batch_size=99)))
    assert torch.equal(LABELS[batch], labels)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LongTailed(Labelled(), 5), "`dataset` to be a data set with `targets`, .* but got Labelled"),
        (lambda: LongTailed(Labelled(labels=["a", "b"]), 5), r"`labels of Labelled` to be .* but got \['a', 'b'\]"),
        (
            lambda: LongTailed(Labelled(targets=LABELS[1:]), 5),
            "`labels of Labelled` to be one for each of 197 .* got 196",
        ),
        (
            lambda: LongTailed(Labelled(), 5, labels=LABELS[1:]),
            "`labels` to be one for each of 197 samples, but got 196",
        ),
        (
            lambda: LongTailed(Labelled(), 5, labels=LABELS * 2),
            r"`labels` to be labels of every .* classes \[1, 3, 5, 7\]",
        ),
        (lambda: LongTailed(Labelled(), 5, labels=LABELS * 1.0), "`labels` to be a non-empty vector .* float32 values"),
        (lambda: LongTailed(Labelled(), 5, labels=LABELS > 2), "`labels` to be a non-empty vector .* bool values"),
        (lambda: LongTailed(Labelled(), 5, labels=LABELS - 1), "`labels` to be .* but got values from -1 to"),
        (
            lambda: LongTailed(Labelled(targets=LABELS), 16, max_count=61),
            "`max_count` to be at most 60, for which every",
        ),
        (lambda: LongTailed(Labelled(targets=LABELS), 2, max_count=0), "`max_count` to be an integer >= 1, but got 0"),
        (lambda: LongTailed(Labelled(targets=LABELS), 61), "`imbalance_factor` to be at most max_count = 60"),
        (lambda: LongTailed(Labelled(targets=LABELS), 5, "linear"), "`profile` to be one of"),
        (lambda: LongTailed(Labelled(targets=LABELS), 5, seed=-1), "`seed` to be an integer >= 0, but got -1"),
        (lambda: LongTailed(TensorDataset(LABELS), 5), "`dataset` to be .* but got TensorDataset"),
        (lambda: LongTailed(SimpleNamespace(), 5), "`dataset` to be .* but got SimpleNamespace"),
    ],
)
def test_long_tailed_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_indices_of_many_classes():
    labels = torch.randint(3000, (60_000,))
    counts = labels.bincount(minlength=3000).clamp(max=5)
    picked = long_tailed_indices(labels, counts.tolist(), torch.Generator().manual_seed(0))
    assert torch.equal(labels[picked].bincount(minlength=3000), counts)
    # As the plain loop over classes chooses, so that a seed keeps its meaning.
    generator = torch.Generator().manual_seed(0)
    chosen = []
    for label, count in enumerate(counts.tolist()):
        members = (labels == label).nonzero().flatten()
        chosen.append(members[torch.randperm(len(members), generator=generator)[:count]])
    assert torch.equal(picked, torch.cat(chosen).sort().values)


@pytest.mark.parametrize(
    ("labels", "counts", "message"),
    [
        ([0, 1], [1, -1], "`class_counts` to be an integer >= 0, but got -1"),
        ([0, 1], [1, 0.5], "`class_counts` to be an integer >= 0, but got 0.5"),
        ([0, 2], [1, 1], r"`labels` to be class indices in \[0, 2\), but got values from 0 to 2"),
        ([], [1], "`labels` to be a non-empty vector of class indices"),
    ],
)
def test_bad_choice_of_samples(labels, counts, message):
    with pytest.raises(ValueError, match=message):
        long_tailed_indices(labels, counts, torch.Generator())


def test_part_of_a_data_set_without_samples():
    whole = TensorDataset(torch.zeros(4, 2), torch.arange(4))
    with pytest.raises(ValueError, match="`labels of Subset` to be a non-empty vector of class indices"):
        LongTailed(Subset(whole, []), imbalance_factor=2)
