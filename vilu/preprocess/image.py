"""Image bytes to the uint8 pixels that CLIP's image tower reads. This file needs only Pillow and NumPy.

The export copies this file into the model repository, so training and the server see the same pixels. The steps are
those of open_clip's evaluation transform, in its order: resize, centre crop or pad, convert to RGB. The exported graph
does the normalisation. Unusual images are treated as open_clip treats them:

* EXIF orientation and colour profiles are ignored.
* Alpha is dropped, not blended, so colours under transparent pixels show. Resizing weights colours by alpha first.
* Palette and 1-bit images are resized by nearest neighbour, as Pillow does. A palette's transparency is dropped.
* 16-bit grey PNG is clipped at 255, not scaled, so it is nearly white. 16-bit colour PNG keeps its upper 8 bits.
* CMYK JPEG is converted without a profile, as (255 - ink) * (255 - black) / 255. A file
  that Adobe stored inverted is inverted back.
* Only the first picture of an animation, or of a file with several pictures, is read.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("JPEG", "PNG", "WEBP")
RESIZE_MODES = ("shortest", "longest", "squash")
MODES = ("exact", "fast")
MAX_PARTS = 20_000  # JPEG segments and stray bytes, or PNG chunks. Pillow walks them in Python, which is slow
MAX_SCANS = 100  # scans of a progressive JPEG. Each is a pass over all pixels; encoders write about 10
# open_clip uses "random" only in training. Its evaluation transform then uses bicubic.
_BICUBIC = Image.Resampling.BICUBIC
_FILTERS = {"bicubic": _BICUBIC, "bilinear": Image.Resampling.BILINEAR, "random": _BICUBIC}
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # a JPEG marker, but no escaped 255 and no restart marker


class ImageError(ValueError):
    """An image cannot be decoded, or it exceeds a limit. The message gives the reason in one line."""


@dataclass(frozen=True)
class Transform:
    """A function from an encoded image to S x S pixels, and its settings. Every limit is checked before decoding.

    size: side S in pixels.
    resize_mode: "shortest" resizes the shortest side to S and crops the centre; "longest" resizes the longest side to S
        and pads with fill_color; "squash" resizes both sides to S.
    interpolation: "bicubic", "bilinear", or open_clip's "random", which is bicubic here.
    max_bytes: largest encoded image in bytes.
    max_pixels: largest decoded image in pixels.
    max_frames: largest number of frames of an animation.
    fill_color: value (0 to 255) of the padding in the image's own mode, as in open_clip. 0 is white in a CMYK image,
        and in a palette image the value is an index.
    mode: "exact" gives open_clip's own pixels. "fast" gives slightly other pixels sooner: it decodes a large JPEG at a
        half, a quarter or an eighth of its size (but at least twice the target), averages other large images down
        before it resizes them, and does not resize what the crop would discard.
    """

    size: int
    resize_mode: str = "shortest"
    interpolation: str = "bicubic"
    max_bytes: int = 20 * 1024 * 1024
    max_pixels: int = 50_000_000
    max_frames: int = 1000
    fill_color: int = 0
    mode: str = "exact"

    def __post_init__(self) -> None:
        known = self.resize_mode in RESIZE_MODES and self.interpolation in _FILTERS and self.mode in MODES
        if not known or self.size < 1 or not 0 <= self.fill_color <= 255:
            raise ValueError(f"unsupported transform {self}")

    def __call__(self, image: bytes | Image.Image) -> np.ndarray:
        """Turn an encoded image, or a Pillow image, into pixels (S, S, 3) uint8 in RGB.

        A Pillow image gives the pixels that its file gives.

        Raises:
            ImageError: as `decode` raises it.
        """
        if isinstance(image, bytes):
            return decode(image, self)
        with _one_message():
            image.load()  # so that `pixels` leaves the caller's image as it is
            return pixels(image, self)


def decode(data: bytes, transform: Transform) -> np.ndarray:
    """Decode a JPEG, PNG or WebP.

    Args:
        data: the encoded image.
        transform: the size, the kind of resizing and the limits.

    Returns:
        Pixels (S, S, 3) uint8, in RGB.

    Raises:
        ImageError: the image is empty, too large, damaged, or in another format.

    Examples:
        >>> file = io.BytesIO()
        >>> Image.new("RGB", (60, 40), "red").save(file, "PNG")
        >>> pixels = decode(file.getvalue(), Transform(size=32))
        >>> pixels.shape, pixels[0, 0].tolist()
        ((32, 32, 3), [255, 0, 0])
    """
    return resized(opened(data, transform), transform)


def opened(data: bytes, transform: Transform) -> Image.Image:
    """Check an encoded image against a transform's limits and open it, so that `resized` can decode it.

    Raises:
        ImageError: as `decode` raises it.
    """
    if not data:
        raise ImageError("image is empty (0 bytes)")
    if len(data) > transform.max_bytes:
        raise ImageError(f"image has {len(data)} bytes, the limit is {transform.max_bytes}")
    with _one_message():
        _check(data, transform)
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_size(*image.size, transform)
        frames = getattr(image, "n_frames", 1)
        if frames > transform.max_frames:
            raise ImageError(f"image has {frames} frames, the limit is {transform.max_frames}")
        return image


def resized(image: Image.Image, transform: Transform) -> np.ndarray:
    """Return the pixels (S, S, 3) uint8 of an opened image. The first call decodes it.

    In mode "exact" the image stays as the file has it, for other transforms. In mode "fast" it may be reduced: open it
    again for each transform.

    Raises:
        ImageError: as `decode` raises it.
    """
    with _one_message():
        return pixels(image, transform)


@contextmanager
def _one_message() -> Iterator[None]:
    """Decoders raise many types on hostile bytes; the client gets one message for all."""
    try:
        yield
    except ImageError:
        raise
    except Image.UnidentifiedImageError:
        raise ImageError(f"not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image") from None
    except Exception as error:
        raise ImageError(f"image cannot be decoded ({type(error).__name__})") from None


def pixels(image: Image.Image, transform: Transform) -> np.ndarray:
    """Transform a Pillow image as open_clip does before it normalises.

    Args:
        image: the image, in any mode.
        transform: the size, the kind of resizing and the limits.

    Returns:
        Pixels (S, S, 3) uint8, in RGB.

    Raises:
        ImageError: the image is so long and thin that resizing it would exceed max_pixels.
    """
    size = transform.size
    width, height = _target(*image.size, transform)
    if not 0 < width * height <= transform.max_pixels:
        raise ImageError(f"image of {image.width}x{image.height} pixels is too long and thin")
    box, gap = (0.0, 0.0, float(image.width), float(image.height)), None
    if transform.mode == "fast":
        drafted = image.draft(None, (2 * width, 2 * height))
        box, gap = (drafted[1] if drafted else box), 3.0
    left, top = round((width - size) / 2), round((height - size) / 2)
    crops = width > size or height > size
    if image.size != (width, height):
        target = (width, height)
        # Resizing only what the crop keeps is a quarter faster, but Pillow rounds the box: a few values move up to 7.
        if transform.mode == "fast" and crops and image.mode in ("RGB", "L"):
            x, y = box[2] / width, box[3] / height
            box = (left * x, top * y, min((left + size) * x, box[2]), min((top + size) * y, box[3]))
            target, crops = (size, size), False
        image = image.resize(target, _FILTERS[transform.interpolation], box, gap)
    if crops:
        image = image.crop((left, top, left + size, top + size))
    elif image.size != (size, size):
        image = _pad(image, size, transform.fill_color)
    return np.asarray(image.convert("RGB"))


def _target(width: int, height: int, transform: Transform) -> tuple[int, int]:
    """Return width and height after resizing, before cropping or padding, rounded as torchvision and open_clip do."""
    size = transform.size
    if transform.resize_mode == "squash":
        return size, size
    if transform.resize_mode == "longest":
        ratio = max(height / size, width / size)
        return round(width / ratio), round(height / ratio)
    if width <= height:
        return size, int(size * height / width)
    return int(size * width / height), size


def _pad(image: Image.Image, size: int, fill: int) -> Image.Image:
    """Centre an image in size x size pixels. An odd pixel of padding goes to the right or the bottom."""
    x, y = size - image.width, size - image.height
    bands = len(image.getbands())
    palette = image.getpalette() if image.mode == "P" else None
    border = (x // 2, y // 2, (x + 1) // 2, (y + 1) // 2)
    padded = ImageOps.expand(image, border, fill if bands == 1 else (fill,) * bands)
    if palette is not None:
        padded.putpalette(palette)
    return padded


def _check_size(width: int, height: int, transform: Transform) -> None:
    if width * height > transform.max_pixels:
        raise ImageError(f"image has {width}x{height} pixels, the limit is {transform.max_pixels}")


def _check(data: bytes, transform: Transform) -> None:
    """Refuse a file whose structure makes decoding too costly. Pillow reports every other fault when it decodes."""
    if data.startswith(b"\xff\xd8\xff"):
        _check_jpeg(data, transform)
    elif data.startswith(b"\x89PNG\r\n\x1a\n"):
        _check_png(data, transform)
    elif data.startswith(b"RIFF") and len(data) >= 30:
        # Opening a WebP allocates its canvas, so its size is read here. Its chunks cost little, as C code walks them.
        if data[12:16] == b"VP8X":
            width, height = (int.from_bytes(data[i : i + 3], "little") + 1 for i in (24, 27))
        elif data[12:16] == b"VP8L":
            bits = int.from_bytes(data[21:25], "little")
            width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        else:
            width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
        _check_size(width, height, transform)


def _check_jpeg(data: bytes, transform: Transform) -> None:
    position, parts, scans = 2, 0, 0
    while marker := _MARKER.search(data, position):
        code = data[marker.start() + 1]
        parts += 1 if scans else marker.end() - position  # before a scan, a stray byte costs as much as a segment
        position = marker.end()
        if code == 0xD9 and scans:
            break
        if code < 0xC0 or code in (0xD8, 0xD9):
            continue
        if 0xC0 <= code <= 0xCF and code not in (0xC4, 0xC8, 0xCC) and position + 7 <= len(data):
            height, width = struct.unpack_from(">HH", data, position + 3)
            _check_size(width, height, transform)
        scans += code == 0xDA
        position += max(2, int.from_bytes(data[position : position + 2], "big"))
        if parts > MAX_PARTS:
            break
        if scans > MAX_SCANS:
            raise ImageError(f"image has more than {MAX_SCANS} scans")
    else:
        parts += 0 if scans else len(data) - position
    if parts > MAX_PARTS:
        raise ImageError(f"image has more than {MAX_PARTS} segments")


def _check_png(data: bytes, transform: Transform) -> None:
    position, parts, profiles = 8, 0, 0
    while position + 16 <= len(data):
        length, kind, width, height = struct.unpack_from(">I4sII", data, position)
        if kind == b"IHDR":
            _check_size(width, height, transform)
        elif kind == b"IEND":
            return
        parts += 1
        profiles += kind == b"iCCP"
        position += 12 + length
        if parts > MAX_PARTS:
            raise ImageError(f"image has more than {MAX_PARTS} chunks")
        if profiles > 1:  # each may inflate to a megabyte
            raise ImageError("image has more than one colour profile")
