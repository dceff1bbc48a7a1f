"""Image files of every kind: how they are read, and what is found out about them before the first training."""

import os
import struct
import sys
import time
import warnings
import zlib
from collections import Counter
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from helpers import STRICT
from PIL import Image, features
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from lightning_ssesam import ERM
from lightning_ssesam.compare import compare
from lightning_ssesam.data import ImageFolderLT, ImageList, ImageListLT, image_files, reading
from lightning_ssesam.data.images import default_transforms
from lightning_ssesam.data.reading import find_problem, image_endings, read_image
from lightning_ssesam.data.walking import find_images
from lightning_ssesam.runs import Experiment

pytestmark = STRICT

RAW = {"train_transform": v2.PILToTensor(), "test_transform": v2.PILToTensor(), "num_workers": 0}


@pytest.fixture(autouse=True)
def _nothing_checked(monkeypatch):
    monkeypatch.setattr(image_files, "_CHECKED", set())


@pytest.fixture
def notices(monkeypatch):
    told = []
    monkeypatch.setattr(image_files, "rank_zero_info", told.append)
    return told


def save(path, number=0, size=(8, 8), **options):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (number % 256, number // 256, 7)).save(path, **options)


def noise(size=(60, 50)):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def bomb(path, width, height):
    """A PNG file of 70 bytes with any size in its header."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


def refusal(make):
    with pytest.raises(ValueError, match=r"[^\n]+") as caught:
        make()
    message = str(caught.value)
    assert "\n" not in message
    assert message.count("Expected") == 1
    assert message.endswith(".")
    return message


# Reading --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(10_000, 9_000), (50_000, 50_000), (2**31 - 1, 1)])
def test_bomb_is_refused_by_its_header(size):
    bomb("a.png", *size)
    assert Path("a.png").stat().st_size < 100
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        assert "more pixels than max_pixels=89478485" in refusal(lambda: read_image("a.png")).replace(
            f"{size[0]} x {size[1]} pixels, more than", "more pixels than"
        )
    # A check is silent about what Pillow warns of.
    bomb("root/a/0.png", *size)
    for number in range(9):
        save(f"root/a/{number + 1}.png", number)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "max_pixels" in refusal(ImageFolderLT("root", image_size=8).check_files)


def test_limit_of_pixels_can_be_changed(monkeypatch):
    save("a.png", size=(20, 10))
    assert read_image("a.png", 200).size == (20, 10)
    assert "but got 20 x 10 pixels, more than max_pixels=199." in refusal(lambda: read_image("a.png", 199))
    # Pillow's limit would refuse more than twice its number.
    monkeypatch.setattr(reading, "MAX_PIXELS", 50)
    for limit, allowed in ((None, True), (200, True), (50, False)):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
        assert (find_problem("a.png", limit) is None) == allowed
    # A smaller limit of the user's own for all of Pillow stays.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    assert "DecompressionBomb" in find_problem("a.png", 50)
    assert Image.MAX_IMAGE_PIXELS == 20


@pytest.mark.parametrize("make", [partial(ImageFolderLT, "root"), partial(ImageListLT, "list.txt", "list.txt", None)])
def test_limit_is_an_argument_of_the_data_modules(make):
    for number in range(10):
        save(f"root/a/{number}.png", number, size=(8, 9))
    Path("list.txt").write_text("".join(f"root/a/{number}.png 0\n" for number in range(10)))
    make(max_pixels=72, **RAW).prepare_data()
    data = make(max_pixels=71, **RAW)
    assert "got 10 that" in refusal(data.prepare_data).replace("got 20 that", "got 10 that")
    assert "more than max_pixels=71" in refusal(lambda: list(next(iter(data.make_sets().values()))))
    for wrong in (0, 1.5, "many"):
        assert "`max_pixels` to be an integer >= 1" in refusal(lambda wrong=wrong: make(max_pixels=wrong))
    assert "max_pixels" in refusal(lambda: ImageList("list.txt", max_pixels=0))


# What must be done with the pixels (rows, columns) to see them upright, by the EXIF standard.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
    8: lambda a: a.swapaxes(0, 1)[::-1],
}


@pytest.mark.parametrize("ending", ["png", "tiff", "webp"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation(orientation, ending):
    picture, exif = noise((5, 3)), Image.Exif()
    exif[0x0112] = orientation
    picture.save(f"a.{ending}", exif=exif, lossless=True)
    expected = UPRIGHT[orientation](np.asarray(picture))
    np.testing.assert_array_equal(np.asarray(read_image(f"a.{ending}")), expected)


@pytest.mark.parametrize("exif", [b"Exif\x00\x00rubbish", b"Exif\x00\x00II*\x00\xff\xff\xff\xff", None])
def test_exif_that_is_broken_does_not_count(exif):
    wrong = Image.Exif()
    wrong[0x0112] = 77
    noise().save("a.jpg", exif=wrong if exif is None else exif)
    np.testing.assert_array_equal(np.asarray(read_image("a.jpg")), np.asarray(Image.open("a.jpg")))


def test_transparent_pixels_are_white():
    colours = np.random.default_rng(1).integers(0, 256, (4, 6, 4), dtype=np.uint8)
    colours[0, :, 3], colours[1, :, 3] = 0, 255
    Image.fromarray(colours).save("a.png")
    alpha = colours[..., 3:] / 255
    expected = colours[..., :3] * alpha + 255 * (1 - alpha)
    found = np.asarray(read_image("a.png")).astype(float)
    assert np.abs(found - expected).max() <= 1
    np.testing.assert_array_equal(found[1], colours[1, :, :3])
    # What is opaque is read as it always was.
    colours[..., 3] = 255
    Image.fromarray(colours).save("a.png")
    np.testing.assert_array_equal(np.asarray(read_image("a.png")), colours[..., :3])


@pytest.mark.parametrize("kind", ["palette", "palette with bytes", "gif", "RGB with a colour", "grey", "LA"])
def test_transparency_of_every_kind(kind):
    """Two pixels: one transparent, one red or grey."""
    image, name, options = Image.new("P", (2, 1)), "a.png", {}
    image.putpalette([0, 0, 0, 200, 0, 0])
    image.putpixel((1, 0), 1)
    if kind == "palette with bytes":
        options["transparency"] = b"\x00\xff"
    elif kind in ("palette", "gif"):
        options["transparency"] = 0
        name = "a.gif" if kind == "gif" else name
    elif kind == "RGB with a colour":
        image, options["transparency"] = image.convert("RGB"), (0, 0, 0)
    else:
        image = Image.fromarray(np.array([[0, 200]], np.uint8))
        options = {"transparency": 0} if kind == "grey" else {}
        if kind == "LA":
            image.putalpha(Image.fromarray(np.array([[0, 255]], np.uint8)))
    image.save(name, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = np.asarray(read_image(name))[0].tolist()
    assert pixels == [[255, 255, 255], [200, 200, 200] if kind in ("grey", "LA") else [200, 0, 0]]


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    for name in ("a.gif", "a.png", "a.webp", "a.tiff"):
        options = {"lossless": True} if name == "a.webp" else {}
        frames[0].save(name, save_all=True, append_images=frames[1:], **options)
        assert read_image(name).getpixel((1, 1)) == (255, 0, 0)
        assert find_problem(name) is None


def test_kinds_that_pillow_can_open_are_read():
    endings = ["jpg", "JPEG", "jfif", "jpe", "gif", "Webp", "bmp", "tif", "ppm", "jp2", "tga"]
    endings += ["avif"] if features.check("avif") else []
    for number, ending in enumerate(endings):
        noise().save(f"{number}", format=Image.registered_extensions()[f".{ending.lower()}"])
        Path("root/a").mkdir(parents=True, exist_ok=True)
        Path(f"{number}").rename(f"root/a/{number}.{ending}")
    names = ["ü 日本.png", "new\nline.png", "blank .png", "..dots.png"]
    for number, name in enumerate(names):
        save(f"root/a/{name}", number)
    data = ImageFolderLT("root", image_size=8, val_fraction=0, **RAW)
    data.check_files()
    # `..dots.png` is hidden.
    assert sum(data.class_counts) + len(data._set("test")) == len(endings) + len(names) - 1
    assert {".pdf", ".eps", ".mpg", ".ico", ".h5", ".wmf"}.isdisjoint(image_endings())


def test_no_document_is_opened_as_a_picture():
    """The content decides, not the ending: an icon's header would hide the size of the image in it."""
    for kind in ("ICO", "PDF", "EPS"):
        noise((32, 32)).save("a.png", format=kind)
        assert find_problem("a.png") == "a file that Pillow cannot open as a picture"
        assert "a file that Pillow cannot open" in refusal(lambda: read_image("a.png"))


def test_heic_is_read_if_its_package_is_there(monkeypatch):
    plugin = ModuleType("pillow_heif")

    class Heif(Image.Image):
        pass

    def register():
        Image.register_open("HEIF", lambda file, name: Heif(), lambda prefix: False)
        Image.register_extension("HEIF", ".heic")

    plugin.register_heif_opener = register
    plugin.__spec__ = type("Spec", (), {"name": "pillow_heif", "loader": None})
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
    for name in ("ID", "OPEN", "EXTENSION"):
        monkeypatch.setattr(Image, name, type(getattr(Image, name))(getattr(Image, name)))
    for function in (reading._formats, reading.image_endings):
        function.cache_clear()
    assert ".heic" in image_endings()
    for function in (reading._formats, reading.image_endings):
        function.cache_clear()


def test_cmyk_and_single_pixels():
    noise().convert("CMYK").save("a.jpg")
    np.testing.assert_array_equal(np.asarray(read_image("a.jpg")), np.asarray(Image.open("a.jpg").convert("RGB")))
    save("b.png", size=(1, 1))
    for size in (1, 8, 224):
        for transform in default_transforms(size):
            assert transform(read_image("b.png")).shape == (3, size, size)


def test_pipe_does_not_wait():
    os.mkfifo("a.png")
    assert find_problem("a.png") == "no regular file"
    assert "no regular file" in refusal(lambda: read_image("a.png"))


@pytest.mark.parametrize("size", [(1, 30_000), (30_000, 1), (3, 8_000)])
def test_strips_do_not_become_gigabytes(size, monkeypatch):
    largest = []
    resize = Image.Image.resize

    def counting(image, to, *args, **kwargs):
        largest.append(to[0] * to[1])
        return resize(image, to, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", counting)
    for transform in default_transforms(224):
        assert transform(Image.new("RGB", size)).shape == (3, 224, 224)
    assert max(largest) < 256 * 256 * 11


def test_test_images_are_those_of_resize_and_crop():
    """Up to a ratio of ten, bit for bit; beyond that, as good as."""
    plain = v2.Compose([v2.Resize(112), v2.CenterCrop(98)])
    test = default_transforms(98)[1]
    ours = v2.Compose(test.transforms[:3])
    for size in ((60, 50), (20, 200), (300, 30)):
        picture = noise(size)
        np.testing.assert_array_equal(np.asarray(ours(picture)), np.asarray(plain(picture)))
    picture = noise((20, 400))
    np.testing.assert_array_equal(np.asarray(ours(picture)), np.asarray(plain(picture)))


# Checks ---------------------------------------------------------------------------------------------------------------


def write_bad(folder):
    """One good image, and a bad one of each kind."""
    save(f"{folder}/good.png")
    folder = Path(folder)
    (folder / "empty.jpg").touch()
    (folder / "text.png").write_text("no image")
    for name, options in {"jpg": {}, "png": {}, "webp": {"lossless": True}}.items():
        noise((200, 150)).save(folder / f"whole.{name}", **options)
        content = (folder / f"whole.{name}").read_bytes()
        (folder / f"half.{name}").write_bytes(content[: len(content) // 2])
        (folder / f"header.{name}").write_bytes(content[:18])
    # Its header has a preview with an end of its own.
    preview = b"\xff\xd8\xff\xda\x00\x00\xff\xd9"
    noise((200, 150)).save(folder / "half with preview.jpg", exif=b"Exif\x00\x00" + preview)
    content = (folder / "half with preview.jpg").read_bytes()
    (folder / "half with preview.jpg").write_bytes(content[: len(content) // 2])
    Image.fromarray(np.full((4, 4), 30_000, np.uint16)).save(folder / "deep.png")
    bomb(folder / "bomb.png", 40_000, 40_000)
    (folder / "gone.png").symlink_to("nowhere.png")
    (folder / "itself.png").symlink_to("itself.png")
    return 13


def test_all_bad_files_are_counted_before_training(monkeypatch):
    number = write_bad("root/a")
    for k in range(5):
        save(f"root/b/{k}.png", k)
    found = {path.name for path in Path("root/a").iterdir() if find_problem(str(path)) is not None}
    whole = {"good.png", "whole.jpg", "whole.png", "whole.webp"}
    assert {path.name for path in Path("root/a").iterdir()} - found == whole
    assert len(found) == number
    message = refusal(ImageFolderLT("root", num_workers=0).prepare_data)
    expected = f"Expected {number + 9} files to be images that can be read, but got {number} that cannot be read: "
    assert message.startswith(f"{expected}root/a/bomb.png (")
    assert message.count("root/a/") == 5
    assert message.endswith(f"; and {number - 5} more. Replace or remove them.")
    # Nothing is trained and nothing written.
    monkeypatch.setattr("lightning_ssesam.experiments.results.make_runs", lambda *_: pytest.fail("trained"))
    assert refusal(lambda: compare("ERM", data=partial(ImageFolderLT, "root"), seeds=1)) == message
    assert not Path("comparison").exists()


def test_a_camera_may_append_something():
    noise().save("a.jpg")
    with open("a.jpg", "ab") as file:
        file.write(b"\x00" * 3000)
    assert find_problem("a.jpg") is None
    with open("a.jpg", "rb") as file:
        assert not reading._seems_cut("JPEG", file)
    # With much behind its end, it is decoded, and found to be good.
    with open("a.jpg", "ab") as file:
        file.write(b"\x00" * 70_000)
    with open("a.jpg", "rb") as file:
        assert reading._seems_cut("JPEG", file)
    assert find_problem("a.jpg") is None


def test_bad_files_of_lists_have_their_lines():
    save("images/a.png")
    Path("images/empty.png").touch()
    Path("images/text one.png").write_text("no image")
    Path("train.txt").write_text("a.png 0\n\nempty.png 0\na.png 0\n")
    Path("test.txt").write_text("a.png 0\ngone\n.png 0\n".replace("gone\n", "gone"))
    Path("val.txt").write_text("text one.png 0\na.png 0\n")
    message = refusal(ImageListLT("train.txt", "test.txt", "val.txt", "images").prepare_data)
    assert message == (
        "Expected 7 files to be images that can be read, but got 3 that cannot be read:"
        " train.txt, line 3: images/empty.png (an empty file);"
        " val.txt, line 1: images/text one.png (a file that Pillow cannot open as a picture);"
        " test.txt, line 2: images/gone.png (an error: No such file or directory). Replace or remove them."
    )
    Path("train.txt").write_text("a.png 0\nempty.png 0\n")
    message = refusal(ImageListLT("train.txt", "train.txt", num_classes=1, root="images", val="train.txt").prepare_data)
    assert message.count("train.txt, line 2") == 3
    single = refusal(lambda: image_files.check_images([ImageList("train.txt", "images")]))
    assert single == (
        "train.txt, line 2: Expected images/empty.png to be an image that can be read, but got an empty file."
    )


def test_files_are_checked_once(monkeypatch):
    for k in range(9):
        save(f"root/a/{k}.png", k)
        save(f"root/b/{k}.png", k)
    looked_at = []
    monkeypatch.setattr(image_files, "find_problem", lambda path, _: looked_at.append(path))
    data = ImageFolderLT("root", seed=3, image_size=8)
    list(data.train_dataloader())
    data.prepare_data()
    ImageFolderLT("root", imbalance_factor=2, seed=1).prepare_data()
    assert Counter(looked_at) == Counter(str(path) for path in Path("root").glob("*/*"))
    # Once for a command, and not in its trainings, which may have processes of their own.
    looked_at.clear()
    image_files._CHECKED.clear()
    monkeypatch.setattr("lightning_ssesam.experiments.compare.write_report", lambda *_: [])
    options = {"data": partial(ImageFolderLT, "root", image_size=8), "epochs": 1, "tail_below": 9}
    assert len(compare("ERM,SAM", seeds=1, **options)) == 2
    assert len(looked_at) == 18
    image_files._CHECKED.clear()
    Experiment("ERM", ERM, **options).run(0)
    assert len(looked_at) == 18


def test_ignored_files_are_named_once(notices):
    for k in range(9):
        save(f"root/cat/{k}.png", k)
        save(f"root/dog/deep/er/{k}.png", k)
    names = ["cat/1.heic", "cat/2.HEIC", "cat/a.txt", "cat/._0.png", "cat/none", "dog/deep/x.heic", "dog/Thumbs.db"]
    for name in names:
        Path("root", name).write_text("x")
    save("root/alone.png")
    os.mkfifo("root/dog/pipe.png")
    data = ImageFolderLT("root", image_size=8)
    assert not notices
    data.check_files()
    data.check_files()
    assert notices == [
        "5 files of 'cat' are ignored: .heic 2, .txt 1, hidden 1, no ending 1",
        "3 files of 'dog' are ignored: .db 1, .heic 1, special files 1",
        "1 file of 'root' is ignored: .png 1",
    ]


def test_long_notices_are_cut():
    lines = image_files._notice({str(k): Counter({".txt": 2}) for k in range(14)})
    assert len(lines) == 11
    assert lines[-1] == "8 files of 4 more folders are ignored."


def test_class_with_other_files_only():
    for k in range(9):
        save(f"root/a/{k}.png", k)
    Path("root/b").mkdir()
    for name in ("1.heic", "2.heic", "c.gifv"):
        Path("root/b", name).write_text("x")
    message = refusal(lambda: ImageFolderLT("root"))
    assert "none for the classes b, whose files are no images: b .heic 2, .gifv 1." in message


def test_a_check_takes_less_than_a_millisecond_a_file():
    Path("root/a").mkdir(parents=True)
    noise().save("0.jpg")
    content = Path("0.jpg").read_bytes()
    for k in range(2000):
        Path(f"root/a/{k}.jpg").write_bytes(content)
    data = ImageFolderLT("root")
    start = time.process_time()
    data.check_files()
    assert time.process_time() - start < 2


# Links ----------------------------------------------------------------------------------------------------------------


def samples(**options):
    """The paths of each class of the folder ``root``."""
    parts = ImageFolderLT("root", test_fraction=0.5, val_fraction=0, **options).listed.values()
    images = [(path, label) for part in parts for path, label in part.samples]
    return {k: [path for path, label in images if label == k] for k in {label for _, label in images}}


def test_order_is_that_of_torchvision():
    paths = [
        "b/10.png",
        "b/9.png",
        "b/B.png",
        "b/x/1.png",
        "b/x-y/1.png",
        "b/x/z/0.png",
        "a/2.JPG",
        "a/ü.png",
        "c/0.bmp",
    ]
    for number, path in enumerate(paths):
        save(f"root/{path}", number)
    listed = ImageFolderLT("root", test_fraction=0.5).listed["train"].samples
    assert listed == ImageFolder("root").samples


def test_loops_of_links_end(notices):
    for k in range(3):
        save(f"root/a/{k}.png", k)
        save(f"root/b/{k}.png", k)
    Path("root/a/again").symlink_to("../a")
    Path("root/a/deep").mkdir()
    Path("root/a/deep/up").symlink_to("../..")
    Path("root/a/deep/top").symlink_to(Path.cwd())
    Path("root/a/itself").symlink_to("itself")
    Path("elsewhere").mkdir()
    save("elsewhere/9.png", 9)
    Path("elsewhere/back").symlink_to(Path("root").resolve())
    Path("root/a/other").symlink_to(Path("elsewhere").resolve())
    assert samples()[0] == [f"root/a/{k}.png" for k in range(3)] + ["root/a/other/9.png"]
    ImageFolderLT("root", image_size=8, val_fraction=0).check_files()
    assert notices == ["5 files of 'a' are ignored: links to a folder above 4, no ending 1"]


def test_a_file_that_links_reach_twice_counts_once(notices):
    for k in range(3):
        save(f"pool/{k}.png", k)
        save(f"root/b/{k}.png", k)
    Path("root/a/x").mkdir(parents=True)
    save("root/a/x/own.png", 7)
    Path("root/a/0.png").symlink_to("x/own.png")
    Path("root/a/1.png").symlink_to(Path("pool/1.png").resolve())
    Path("root/a/2.png").symlink_to(Path("pool/1.png").resolve())
    Path("root/a/p").symlink_to(Path("pool").resolve())
    Path("root/a/q").symlink_to(Path("pool").resolve())
    Path("root/a/r").symlink_to("x")
    Path("root/a/3.png").symlink_to(Path("elsewhere.png").resolve())
    Path("root/a/4.png").symlink_to(Path("elsewhere.png").resolve())
    save("elsewhere.png", 9)
    # By its name in the folder where it lies, if that is reached, and else by its first link.
    expected = ["root/a/3.png", "root/a/p/0.png", "root/a/p/1.png", "root/a/p/2.png", "root/a/x/own.png"]
    assert samples()[0] == expected
    ImageFolderLT("root", image_size=8, val_fraction=0).check_files()
    kinds = "links to images that count already 4, links to folders that count already 2"
    assert notices == [f"6 files of 'a' are ignored: {kinds}"]


def test_whole_classes_may_be_links():
    for k in range(3):
        save(f"pool/{k}.png", k)
        save(f"root/b/{k}.png", k)
    Path("root/a").symlink_to(Path("pool").resolve())
    Path("link").symlink_to("root")
    assert samples()[0] == [f"root/a/{k}.png" for k in range(3)]
    assert ImageFolderLT("link", val_fraction=0).class_counts == [2, 2]


@pytest.mark.parametrize("kind", ["file in two classes", "one class", "parent", "train and test", "val is test"])
def test_a_file_in_two_places_is_an_error(kind):
    base = "root" if "train" not in kind and "val" not in kind else "root/train"
    for k in range(4):
        save(f"{base}/a/{k}.png", k)
        save(f"{base}/b/{k}.png", k)
    if kind == "file in two classes":
        Path("root/b/9.png").symlink_to("../a/1.png")
    elif kind == "one class":
        Path("root/c").symlink_to("b")
    elif kind == "parent":
        Path("root/b/more").symlink_to("../a")
    else:
        save("root/test/a/0.png", 100)
        if kind == "train and test":
            Path("root/test/a/1.png").symlink_to("../../train/a/1.png")
        else:
            Path("root/val").symlink_to("test")
    message = refusal(lambda: ImageFolderLT("root"))
    assert (
        "`root` to be a folder whose images are each in one class and in one set, but got links to the same" in message
    )
    pairs = {
        "file in two classes": "root/a/1.png and root/b/9.png.",
        "one class": "root/b/0.png and root/c/0.png (and 3 more pairs).",
        "parent": "root/a/0.png and root/b/more/0.png (and 3 more pairs).",
        "train and test": "root/train/a/1.png and root/test/a/1.png.",
        "val is test": "root/test/a/0.png and root/val/a/0.png.",
    }
    assert message.endswith(pairs[kind])


def test_hard_links_are_files_of_their_own():
    save("root/a/0.png")
    os.link("root/a/0.png", "root/a/1.png")
    images, others = find_images("root/a")
    assert [image.path for image in images] == ["root/a/0.png", "root/a/1.png"]
    assert not others


def test_folder_that_cannot_be_read(monkeypatch):
    save("root/a/0.png")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("lightning_ssesam.data.walking.os.scandir", refuse)
    monkeypatch.setattr("lightning_ssesam.data.image_folder._folders", lambda root: ["a"])
    assert "`root` to be a folder that can be read, but got root: Permission denied." in refusal(
        lambda: ImageFolderLT("root")
    )


# Sizes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([(30, 50), (40, 20), (90, 80)], 30),
        ([(30, 50), (40, 20)], 20),
        ([(3000, 400), (500, 4000), (10, 10)], 64),
        ([(1, 1)], 1),
    ],
)
def test_size_comes_from_the_headers(sizes, expected):
    for k, size in enumerate(3 * sizes):
        save(f"root/a/{k}.png", k, size)
    Path("list.txt").write_text("".join(f"root/a/{k}.png 0\n" for k in range(len(sizes))))
    options = {"val_fraction": 0, "num_workers": 0}
    for data in (ImageFolderLT("root", **options), ImageListLT("list.txt", "list.txt", num_workers=0)):
        assert data.image_size == expected
        assert next(iter(data.train_dataloader()))[0].shape[1:] == (3, expected, expected)
    assert ImageFolderLT("root", image_size=17, **options).image_size == 17
    assert {ImageFolderLT("root", seed=seed, val_fraction=f).image_size for seed in (0, 1) for f in (0, 0.3)} == {
        expected
    }


def test_a_line_says_that_images_are_reduced(notices):
    for k in range(4):
        save(f"large/a/{k}.png", k, (300, 200))
        save(f"small/a/{k}.png", k, (64, 80))
    options = {"val_fraction": 0, "test_fraction": 0.3}
    for _ in range(2):
        ImageFolderLT("large", **options).prepare_data()
    assert notices == [
        "Images are reduced to 64x64 pixels (the median of their shorter sides is 200). Give `image_size` for another"
        " size."
    ]
    ImageFolderLT("small", **options).prepare_data()
    ImageFolderLT("large", image_size=32, **options).prepare_data()
    assert len(notices) == 1


def test_size_of_a_sample_of_many(monkeypatch):
    """As many headers are read, spread over the set, and no broken one counts."""
    for k in range(450):
        if k % 9:
            save(f"images/{k:03}.png", size=(10 + k // 150, 30))
    Path("list.txt").write_text("".join(f"images/{k:03}.png 0\n" for k in range(450)))
    read = []
    size_of = image_files.size_of
    monkeypatch.setattr(image_files, "size_of", lambda path, limit: read.append(path) or size_of(path, limit))
    assert ImageListLT("list.txt", "list.txt").image_size == 11
    assert [Path(path).stem for path in read] == [f"{k * 450 // 200:03}" for k in range(200)]
    Path("images").rename("gone")
    assert ImageListLT("list.txt", "list.txt").image_size == 64


def test_sizes_use_no_random_numbers():
    for k in range(9):
        save(f"root/a/{k}.png", k)
    before = torch.get_rng_state()
    ImageFolderLT("root", test_transform=v2.Compose([v2.ToImage(), v2.RandomCrop(4), v2.ToDtype(torch.float32)]))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("module", ["folder", "list"])
def test_small_images_are_read_once_and_are_the_same(module, monkeypatch):
    """Photos take most of an epoch to decode. What the network gets must not depend on it."""
    for number in range(8):
        for name in "ab":
            save(f"images/{name}/{number}.png")
        noise((90 + 7 * number, 60)).save(f"images/a/{number}.png")
    if module == "folder":
        data = ImageFolderLT("images", image_size=16)
    else:
        lines = [f"{name}/{number}.png {label}" for number in range(8) for label, name in enumerate("ab")]
        Path("list.txt").write_text("\n".join(lines))
        data = ImageListLT("list.txt", "list.txt", root="images", image_size=16, num_workers=0)
    data.setup("fit")
    train = data._sets["train"]
    plain = default_transforms(16)[0]
    expected = []
    for epoch in range(2):
        torch.manual_seed(epoch)
        expected.append([plain(train.image(index)) for index in range(len(train))])
    read = []
    monkeypatch.setattr(type(train), "image", lambda self, index: read.append(index) or read_image(self.path(index)))
    for epoch in range(2):
        torch.manual_seed(epoch)
        for index, image in enumerate(expected[epoch]):
            assert torch.equal(train[index][0], image)
    assert read == list(range(len(train)))


@pytest.mark.parametrize("options", [{"image_size": 65}, {"image_size": 16, "train_transform": v2.PILToTensor()}])
def test_other_images_are_not_kept(options):
    for name in "ab":
        for number in range(8):
            save(f"images/{name}/{number}.png")
    data = ImageFolderLT("images", **options)
    data.setup("fit")
    assert data._sets["train"]._kept is None
    assert (data._sets["test"]._kept is None) == (options["image_size"] > 64)


def test_no_more_is_kept_than_memory_allows(monkeypatch):
    for name in "ab":
        for number in range(8):
            save(f"images/{name}/{number}.png")
    for allowed, is_kept in ((16 * 3 * 16**2, True), (16 * 3 * 16**2 - 1, False)):
        monkeypatch.setattr("lightning_ssesam.data.images._MEMORY", allowed)
        data = ImageFolderLT("images", image_size=16)
        data.setup("fit")
        assert (data._sets["train"]._kept is not None) == is_kept
