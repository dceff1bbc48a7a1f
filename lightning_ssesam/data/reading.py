"""Image files: which are read, how one is read, and what is wrong with one as far as its header shows."""

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, BinaryIO

from lightning_ssesam.errors import ArgumentError

MAX_PIXELS = 89_478_485
"""Pixels of the largest image that is read by default: Pillow warns above it. In RGB these are 256 MiB."""

# What Pillow opens, but no picture of the world: documents, measurements, films, and icons. The image in an icon may
# have another size than the header says.
_NO_PICTURES = {"BUFR", "CUR", "EPS", "FITS", "GRIB", "HDF5", "ICNS", "ICO", "IPTC", "MPEG", "PDF", "WMF"}


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    from PIL import Image

    if find_spec("pillow_heif") is not None:
        import_module("pillow_heif").register_heif_opener()
    Image.init()
    return tuple(name for name in Image.ID if name not in _NO_PICTURES)


@lru_cache(maxsize=1)
def image_endings() -> frozenset[str]:
    """Return the endings of image files that are read here, such as ``".jpg"``, in lower case.

    They are those of Pillow, which depend on its version and on what is installed, without documents and films.
    """
    formats = _formats()
    from PIL import Image

    return frozenset(ending for ending, name in Image.registered_extensions().items() if name in formats)


class _RefusedError(ValueError):
    """A file that Pillow can open, but that is not read here. The message completes "but got"."""


def shown(path: str) -> str:
    """Return a path as text for one line: quoted if it has a line break or a character that cannot be printed."""
    return path if path.isprintable() else repr(path)


def read_image(path: str, max_pixels: int | None = MAX_PIXELS, content: bytes | None = None) -> Any:
    """Return the image in a file, upright, as a PIL image in RGB.

    The EXIF orientation is applied. Transparent pixels are laid on white. Of an animation, the first frame is read.

    Args:
        path: Path of the file.
        max_pixels: Pixels of the largest image that is read, as its header has them; None for no limit.
        content: Content of the file. By default it is read.

    Raises:
        ArgumentError: If the file is missing, broken, too large, no image, or has more than 8 bits a channel.
    """
    # A broken file makes Pillow raise almost any kind of exception.
    try:
        with _opened(path, max_pixels, content) as (image, _):
            image.load()
            return _to_rgb(image)
    except Exception as error:
        raise unreadable(path, _reason(error, max_pixels)) from error


def unreadable(path: str, reason: str) -> ArgumentError:
    """Return the error for a file that is no image. The reason completes "but got"."""
    return ArgumentError(f"Expected {shown(path)} to be an image that can be read, but got {reason}.")


def find_problem(path: str, max_pixels: int | None = MAX_PIXELS) -> str | None:
    """Return what is wrong with an image file, as text that completes "but got", or None.

    The header is read, and the end of the file. Only if the end looks as if it was cut off, the image is decoded.
    """
    try:
        with _opened(path, max_pixels) as (image, file):
            is_cut = _seems_cut(image.format, file)
        if is_cut:
            with _opened(path, max_pixels) as (image, _):
                image.load()
    except Exception as error:
        return _reason(error, max_pixels)
    return None


def size_of(path: str, max_pixels: int | None = MAX_PIXELS) -> tuple[int, int] | None:
    """Return width and height of an image, in pixels, from its header; None if it cannot be read."""
    with suppress(Exception), _opened(path, max_pixels) as (image, _):
        return int(image.size[0]), int(image.size[1])
    return None


@contextmanager
def _opened(path: str, max_pixels: int | None, content: bytes | None = None) -> Iterator[tuple[Any, BinaryIO]]:
    """Open a file, or the content of one, and read its header."""
    from PIL import Image

    if content is None:
        found = os.stat(path)
        # To open a pipe would wait for its other end.
        if not stat.S_ISREG(found.st_mode):
            raise _RefusedError("a folder" if stat.S_ISDIR(found.st_mode) else "no regular file")
    if (found.st_size if content is None else len(content)) == 0:
        raise _RefusedError("an empty file")
    _raise_pillows_limit(max_pixels)
    with (
        open(path, "rb") if content is None else io.BytesIO(content) as file,
        Image.open(file, formats=_formats()) as image,
    ):
        width, height = image.size
        if max_pixels is not None and width * height > max_pixels:
            raise _RefusedError(f"{width} x {height} pixels, more than max_pixels={max_pixels}")
        # Pillow would clip the values of these modes to white.
        if image.mode.startswith(("I", "F")):
            raise _RefusedError(f"more than 8 bits a channel (mode {image.mode!r})")
        yield image, file


def _raise_pillows_limit(max_pixels: int | None) -> None:
    """Let Pillow open what a raised limit allows. Its own limit is one for the whole program."""
    from PIL import Image

    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and (max_pixels is None or max_pixels > max(limit, MAX_PIXELS)):
        Image.MAX_IMAGE_PIXELS = max_pixels


def _to_rgb(image: Any) -> Any:
    from PIL import Image, ImageOps

    # An orientation that cannot be read does not count. Pillow raises almost any kind of exception.
    with suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)
    palette_mode = getattr(image.palette, "mode", "") if image.mode == "P" else ""
    if image.mode.endswith(("A", "a")) or palette_mode.endswith("A") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white
    return image.convert("RGB")


# The bytes with which a file ends, or almost: cameras and editors may append some kilobytes.
_LAST_BYTES = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}
_START_OF_SCAN = b"\xff\xda"


def _seems_cut(kind: str, file: BinaryIO) -> bool:
    size = file.seek(0, os.SEEK_END)
    if kind == "WEBP":
        file.seek(4)
        return size < int.from_bytes(file.read(4), "little") + 8
    if (last_bytes := _LAST_BYTES.get(kind)) is None:
        return False
    for length in (64, 2**16):
        file.seek(-min(length, size), os.SEEK_END)
        end = file.read()
        # A preview within the header has an end of its own, before the scan of the image starts.
        if end.rfind(last_bytes) > (-1 if kind == "PNG" else end.rfind(_START_OF_SCAN)):
            return False
    return True


def _reason(error: Exception, max_pixels: int | None) -> str:
    from PIL import Image, UnidentifiedImageError

    if isinstance(error, _RefusedError):
        return str(error)
    limit = Image.MAX_IMAGE_PIXELS
    if isinstance(error, Image.DecompressionBombError) and limit and max_pixels and limit >= max_pixels:
        return f"more pixels than max_pixels={max_pixels}"
    if isinstance(error, UnidentifiedImageError):
        return "a file that Pillow cannot open as a picture"
    if isinstance(error, OSError) and error.strerror:
        return f"an error: {error.strerror}"
    if "truncated" in str(error):
        return "a file that is cut off"
    return repr(error)
