import io
import struct
import warnings
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vilu.preprocess.image import MAX_PARTS, MAX_SCANS, ImageError, Transform, decode, pixels

MIN_COSINE = 0.999  # of an embedding after fast preprocessing with that after exact


def encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@cache
def photo(name="china", size=None):
    """A real photograph that an installed package brings, 427 to 640 pixels a side, or resized."""
    if name == "grace_hopper":
        path = Path(pytest.importorskip("matplotlib").get_data_path()) / "sample_data" / "grace_hopper.jpg"
    else:
        path = Path(pytest.importorskip("sklearn.datasets").__file__).parent / "images" / f"{name}.jpg"
    image = Image.open(path).convert("RGB")
    return image.resize(size) if size else image


def alpha(image):
    """A horizontal ramp of alpha, from transparent to opaque."""
    ramp = np.linspace(0, 255, image.width).astype(np.uint8)
    image = image.copy()
    image.putalpha(Image.fromarray(np.broadcast_to(ramp, (image.height, image.width)).copy()))
    return image


def sixteen_bit(image):
    return Image.fromarray(np.asarray(image.convert("L"), np.uint16) * 3)


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


VARIANTS = {
    "JPEG colour": lambda i: encode(i, "JPEG", quality=90),
    "JPEG 4:4:4": lambda i: encode(i, "JPEG", quality=95, subsampling=0),
    "JPEG progressive": lambda i: encode(i, "JPEG", progressive=True),
    "JPEG grey": lambda i: encode(i.convert("L"), "JPEG"),
    "JPEG CMYK": lambda i: encode(i.convert("CMYK"), "JPEG"),
    "JPEG several pictures": lambda i: encode(i, "MPO", save_all=True, append_images=[i.rotate(180)]),
    "PNG colour": lambda i: encode(i),
    "PNG grey": lambda i: encode(i.convert("L")),
    "PNG alpha": lambda i: encode(alpha(i)),
    "PNG grey alpha": lambda i: encode(alpha(i.convert("L"))),
    "PNG palette": lambda i: encode(i.quantize(64)),
    "PNG palette, transparent": lambda i: encode(i.quantize(64), transparency=3),
    "PNG 1 bit": lambda i: encode(i.convert("1")),
    "PNG 16 bit": lambda i: encode(sixteen_bit(i)),
    "PNG animated": lambda i: encode(i, save_all=True, append_images=[i.rotate(180)]),
    "WebP": lambda i: encode(i, "WEBP"),
    "WebP lossless": lambda i: encode(i, "WEBP", lossless=True, method=0),
    "WebP alpha": lambda i: encode(alpha(i), "WEBP"),
    "WebP animated": lambda i: encode(i, "WEBP", save_all=True, append_images=[i.rotate(180)]),
    "EXIF turned": lambda i: encode(i, "JPEG", exif=exif(6)),
}


def of_open_clip(image, transform):
    open_clip = pytest.importorskip("open_clip")
    config = open_clip.transform.PreprocessCfg(
        size=transform.size,
        mean=(0, 0, 0),
        std=(1, 1, 1),
        interpolation=transform.interpolation,
        resize_mode=transform.resize_mode,
        fill_color=transform.fill_color,
    )
    theirs = open_clip.transform.image_transform_v2(config, is_train=False)(image)
    return (theirs.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_photos_are_as_open_clip_has_them(variant, resize_mode):
    cases = [
        ("china", None, 224),
        ("flower", (211, 500), 256),
        ("grace_hopper", (400, 397), 336),
        ("china", (97, 64), 384),
    ]
    for name, shape, size in cases:
        data = VARIANTS[variant](photo(name, shape))
        transform = Transform(size, resize_mode, fill_color=7)
        np.testing.assert_array_equal(decode(data, transform), of_open_clip(Image.open(io.BytesIO(data)), transform))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random"])
@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "CMYK", "RGBA", "P", "1"])
def test_pixels_of_odd_shapes(mode, resize_mode, interpolation):
    for width, height in [(64, 64), (97, 41), (33, 200), (20, 31), (32, 32), (1, 1), (1, 9), (100, 3)]:
        noise = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
        image = alpha(Image.fromarray(noise)) if mode.endswith("A") else Image.fromarray(noise)
        image = image.convert(mode)
        for size in (32, 33):
            transform = Transform(size, resize_mode, interpolation, fill_color=200)
            np.testing.assert_array_equal(pixels(image, transform), of_open_clip(image, transform))


def test_what_happens_to_each_kind():
    """The table in the module's docstring, in numbers."""

    def colour(image, kind="PNG", **options):
        return tuple(int(x) for x in decode(encode(image, kind, **options), Transform(4))[2, 2])

    assert colour(Image.new("RGBA", (8, 8), (10, 20, 30, 255))) == (10, 20, 30)
    assert colour(Image.new("RGBA", (4, 4), (10, 20, 30, 0))) == (10, 20, 30)  # not resized: the colour beneath
    assert colour(Image.new("RGBA", (8, 8), (10, 20, 30, 0))) == (0, 0, 0)  # resized: weighted by alpha
    assert colour(Image.new("LA", (8, 8), (90, 255))) == (90, 90, 90)
    assert colour(Image.new("RGB", (8, 8), (9, 9, 9)), transparency=(9, 9, 9)) == (9, 9, 9)
    for value, seen in ((200, 200), (300, 255), (65535, 255)):
        assert colour(Image.fromarray(np.full((8, 8), value, np.uint16))) == (seen,) * 3
    header = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    rows = (b"\0" + struct.pack(">HHH", 0x1234, 0x56FF, 0xABCD) * 4) * 4
    deep = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND")
    assert tuple(decode(deep, Transform(4))[0, 0]) == (0x12, 0x56, 0xAB)
    inks = Image.new("CMYK", (16, 16), (255, 0, 0, 51))
    np.testing.assert_allclose(colour(inks, "JPEG", quality=100), (0, 204, 204), atol=2)
    first, second = photo(size=(60, 40)), photo("flower", (60, 40))
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("MPO", {"quality": 95})):
        movie = encode(first, kind, save_all=True, append_images=[second], **options)
        alone = encode(first, "JPEG" if kind == "MPO" else kind, **options)
        np.testing.assert_array_equal(decode(movie, Transform(32)), decode(alone, Transform(32)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_not_applied(orientation):
    image = photo("grace_hopper", (120, 90))
    turned = decode(encode(image, "JPEG", exif=exif(orientation)), Transform(32))
    np.testing.assert_array_equal(turned, decode(encode(image, "JPEG"), Transform(32)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
def test_fast_costs_little(clip, kind, resize_mode):
    """Cosine of the embedded default's embeddings, fast against exact, of large images with a grain of noise."""
    exact, fast = (Transform(clip.transform.size, resize_mode, mode=mode) for mode in ("exact", "fast"))
    options = {"WEBP": {"method": 0}, "PNG": {"compress_level": 1}, "JPEG": {}}[kind]
    for name in ("china", "flower", "grace_hopper"):
        grain = np.random.default_rng(0).normal(0, 4, (643, 960, 1))
        large = Image.fromarray((np.asarray(photo(name, (960, 643))) + grain).clip(0, 255).astype(np.uint8))
        pair = [decode(encode(large, kind, **options), transform) for transform in (exact, fast)]
        assert not np.array_equal(pair[0], pair[1])
        v, w = clip.embed_images([np.stack(pair)])
        assert float(v @ w) >= MIN_COSINE
    small = encode(photo(size=(80, 80)), kind)  # below four times the side and nothing to crop: nothing to gain
    np.testing.assert_array_equal(decode(small, fast), decode(small, exact))


def chunk(kind, data=b""):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, *chunks):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"".join([b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header), *chunks, chunk(b"IDAT"), chunk(b"IEND")])


def jpeg(width, height, extra=b""):
    data = bytearray(encode(Image.new("L", (8, 8)), "JPEG"))
    struct.pack_into(">HH", data, data.index(b"\xff\xc0") + 5, height, width)
    return bytes(data[:2] + extra + data[2:])


def scans(count):
    data = encode(Image.new("L", (64, 64)), "JPEG", progressive=True)
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * count + data[-2:]


def webp(kind, payload):
    body = b"WEBP" + kind + struct.pack("<I", len(payload)) + payload
    return b"RIFF" + struct.pack("<I", len(body)) + body


VP8X = bytes([2, 0, 0, 0]) + (15999).to_bytes(3, "little") * 2 + bytes(8)
PROFILE = chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(900_000)))
BOMBS = {
    "PNG size": (png(60000, 60000), "60000x60000 pixels, the limit is 50000000"),
    "PNG above Pillow's warning": (png(10000, 10000), "10000x10000 pixels"),
    "PNG second header": (png(8, 8, chunk(b"IHDR", struct.pack(">II", 9000, 9000) + b"\x08\2\0\0\0")), "9000x9000"),
    "PNG chunks": (png(8, 8, chunk(b"teSt") * (MAX_PARTS + 1)), "more than 20000 chunks"),
    "PNG profiles": (png(8, 8, PROFILE * 50), "more than one colour profile"),
    "PNG text": (png(8, 8, chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(900_000))) * 80), "cannot be decoded"),
    "JPEG size": (jpeg(65500, 65500), "65500x65500 pixels"),
    "JPEG segments": (jpeg(8, 8, b"\xff\xe5\0\2" * (MAX_PARTS + 1)), "more than 20000 segments"),
    "JPEG padding": (jpeg(8, 8, b"\xff" * (MAX_PARTS + 9)), "more than 20000 segments"),
    "JPEG nothing else": (b"\xff\xd8" + b"\xff" * (MAX_PARTS + 9), "more than 20000 segments"),
    "JPEG scans": (scans(MAX_SCANS), "more than 100 scans"),
    "WebP canvas": (webp(b"VP8X", VP8X), "16000x16000 pixels"),
    "WebP lossy": (webp(b"VP8 ", b"\0\0\0\x9d\x01\x2a\xff\x3f\xff\x3f" + bytes(8)), "16383x16383 pixels"),
    "WebP lossless": (webp(b"VP8L", b"\x2f\xff\xff\xff\x0f" + bytes(16)), "16384x16384 pixels"),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_are_refused_before_decoding(bomb, monkeypatch):
    data, reason = BOMBS[bomb]
    if reason != "cannot be decoded":  # text chunks are bounded by Pillow itself
        monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("was opened"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match=reason):
            decode(data, Transform(32))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "MPO"])
def test_too_many_frames_are_refused(kind):
    frames = [photo(name, (40, 30)) for name in ("china", "flower", "grace_hopper")]
    movie = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    assert decode(movie, Transform(32, max_frames=3)).shape == (32, 32, 3)
    with pytest.raises(ImageError, match="3 frames, the limit is 2"):
        decode(movie, Transform(32, max_frames=2))


def test_many_scans_and_what_follows_an_image_are_no_bomb():
    assert decode(scans(50), Transform(32)).shape == (32, 32, 3)
    motion = encode(photo(size=(80, 60)), "JPEG", exif=exif(6)) + b"\xff\xda\0\2" * 500  # a phone appends its film
    assert decode(motion, Transform(32)).shape == (32, 32, 3)


def test_limits_come_before_decoding():
    data = encode(photo(size=(200, 100)))
    with pytest.raises(ImageError, match=r"200x100 pixels, the limit is 19999"):
        decode(data, Transform(32, max_pixels=19999))
    with pytest.raises(ImageError, match="bytes, the limit is 10"):
        decode(data, Transform(32, max_bytes=10))
    for resize_mode in ("shortest", "longest"):
        with pytest.raises(ImageError, match="too long and thin"):
            decode(encode(Image.new("RGB", (20000, 1))), Transform(224, resize_mode))
    with pytest.raises(ImageError, match="empty"):
        decode(b"", Transform(32))
    with pytest.raises(ImageError, match="not a JPEG, PNG or WEBP"):
        decode(encode(photo(size=(8, 8)), "GIF"), Transform(32))
    with pytest.raises(ImageError, match="cannot be decoded"):
        decode(encode(photo(), "JPEG")[:9000], Transform(32))  # cut: never filled up with grey


@pytest.mark.parametrize("wrong", [{"size": 0}, {"resize_mode": "fit"}, {"interpolation": "box"}, {"mode": "quick"}])
def test_unknown_transforms_are_refused(wrong):
    with pytest.raises(ValueError, match="unsupported transform"):
        Transform(**{"size": 32, **wrong})


@cache
def seed(index):
    image = photo(size=(60, 50))
    return (
        encode(image, "JPEG", exif=exif(3)),
        encode(image, "JPEG", progressive=True),
        encode(image.convert("CMYK"), "JPEG"),
        encode(image),
        encode(image.quantize(16), transparency=1),
        encode(image, save_all=True, append_images=[image.rotate(90)]),
        encode(image, "WEBP"),
        encode(alpha(image), "WEBP", lossless=True),
        encode(image, "WEBP", save_all=True, append_images=[image.rotate(90)]),
    )[index]


@settings(max_examples=600, deadline=None)
@given(
    index=st.integers(0, 8),
    cut=st.just(0) | st.integers(0, 5000),
    flips=st.lists(st.tuples(st.integers(0, 300) | st.integers(0, 20000), st.integers(0, 255)), max_size=8),
    mode=st.sampled_from(["exact", "fast"]),
)
def test_damaged_images_give_pixels_or_an_image_error(index, cut, flips, mode):
    """A size that the damage raised stays below the limit, so time and memory are bounded by it."""
    data = bytearray(seed(index))
    for position, value in flips:
        data[position % len(data)] = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            out = decode(bytes(data[: max(1, len(data) - cut)]), Transform(8, mode=mode, max_pixels=100_000))
        except ImageError:
            return
    assert (out.shape, out.dtype) == ((8, 8, 3), np.uint8)
