import pytest
import torch

from lightning_ssesam import DigitsLT
from lightning_ssesam.data import long_tailed_counts, long_tailed_indices


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
