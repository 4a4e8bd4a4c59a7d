"""Image bytes to the uint8 pixels that CLIP's image tower reads; Pillow and NumPy only.

The same file runs in training and in the server (export copies it beside the preprocess model), so both see the
same pixels: open_clip's evaluation transform (resize, centre crop or pad, RGB), in its order, without the
normalisation, which is inside the graph. What open_clip does to each kind of image is done here too:

* EXIF orientation is not applied, and no colour profile is.
* Alpha is dropped, not blended: colours under transparent pixels show. Resizing weights colours by alpha first.
* Palette and 1-bit images are resized by nearest neighbour, as Pillow does; a palette's transparency is dropped.
* 16-bit grey PNG is clipped at 255, not scaled (nearly white); 16-bit colour PNG keeps its upper 8 bits.
* CMYK JPEG is converted without a profile, as (255 - ink) * (255 - black) / 255, inverted where Adobe stored it so.
* Of an animation, or of several pictures in one file, the first is read.
"""

from __future__ import annotations

import io
import re
import struct
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("JPEG", "PNG", "WEBP")
RESIZE_MODES = ("shortest", "longest", "squash")
MODES = ("exact", "fast")
MAX_PARTS = 20_000  # JPEG segments and stray bytes, PNG chunks: Pillow walks them in Python
MAX_SCANS = 100  # of a progressive JPEG, each a pass over all its pixels; encoders write about 10
# open_clip has "random" for training alone; its evaluation transform then takes bicubic.
_BICUBIC = Image.Resampling.BICUBIC
_FILTERS = {"bicubic": _BICUBIC, "bilinear": Image.Resampling.BILINEAR, "random": _BICUBIC}
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # a JPEG marker; neither an escaped 255 nor a restart


class ImageError(ValueError):
    """An image that cannot be answered, with the reason in one line."""


@dataclass(frozen=True)
class Transform:
    """From an encoded image to S x S pixels.

    size: side S in pixels.
    resize_mode: "shortest" side to S then centre crop, "longest" side to S then padding with fill_color, or "squash".
    fill_color: of the padding, in the image's own mode as open_clip has it: in a CMYK image 0 is white, in a
        palette image it is an index.
    max_bytes bounds the encoded image, max_pixels the decoded one, max_frames an animation (its first is read); all
        are checked before decoding.
    mode: "exact", every value open_clip's own; or "fast": a large JPEG is decoded at a half, quarter or eighth of its
        size, never below twice the target, other large images are averaged down before resizing, and what the crop
        discards is not resized.
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


def decode(data: bytes, transform: Transform) -> np.ndarray:
    """(S, S, 3) uint8 pixels of an encoded JPEG, PNG or WebP.

    Raises:
        ImageError: empty, too large, not one of the formats, or damaged.

    Examples:
        >>> file = io.BytesIO()
        >>> Image.new("RGB", (60, 40), "red").save(file, "PNG")
        >>> pixels = decode(file.getvalue(), Transform(size=32))
        >>> pixels.shape, pixels[0, 0].tolist()
        ((32, 32, 3), [255, 0, 0])
    """
    if not data:
        raise ImageError("image is empty (0 bytes)")
    if len(data) > transform.max_bytes:
        raise ImageError(f"image has {len(data)} bytes, the limit is {transform.max_bytes}")
    try:
        _check(data, transform)
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(*image.size, transform)
            frames = getattr(image, "n_frames", 1)
            if frames > transform.max_frames:
                raise ImageError(f"image has {frames} frames, the limit is {transform.max_frames}")
            return pixels(image, transform)
    except ImageError:
        raise
    except Image.UnidentifiedImageError:
        raise ImageError(f"not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image") from None
    except Exception as error:  # decoders raise many types on hostile bytes; all mean the same to the client
        raise ImageError(f"image cannot be decoded ({type(error).__name__})") from None


def pixels(image: Image.Image, transform: Transform) -> np.ndarray:
    """(S, S, 3) uint8 pixels of a Pillow image, as open_clip's transform gives before normalising."""
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
        # Resizing only what the crop keeps is a quarter faster, but Pillow rounds the box: up to 7/255 in a few values.
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
    """Width and height after resizing, before cropping or padding; rounded as torchvision and open_clip do."""
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
    """Centred in size x size, an odd pixel at the right and bottom."""
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
    """Refuse by its structure alone what would cost more than its pixels; whatever else is wrong is Pillow's to say."""
    if data.startswith(b"\xff\xd8\xff"):
        _check_jpeg(data, transform)
    elif data.startswith(b"\x89PNG\r\n\x1a\n"):
        _check_png(data, transform)
    elif data.startswith(b"RIFF") and len(data) >= 30:
        # Opening a WebP allocates its canvas. Its chunks and frames are walked in C and cost next to nothing.
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
        parts += 1 if scans else marker.end() - position  # before the first scan stray bytes cost as much as segments
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
