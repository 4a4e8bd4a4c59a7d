"""Images that no decoder should trust: damaged ones, and small files that would decode to much."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

import numpy as np


class Mutator:
    """Damages encoded images: cut, bits flipped, bytes overwritten, pieces spliced or repeated, lengths that lie."""

    def __init__(self, corpus: Sequence[bytes]) -> None:
        self.corpus = list(corpus)

    def one(self, draw: np.random.Generator) -> tuple[str, bytes]:
        data = bytearray(self.corpus[int(draw.integers(len(self.corpus)))])
        way = str(draw.choice(["cut", "bits", "bytes", "splice", "repeat", "length", "head"]))
        at = int(draw.integers(len(data)))
        if way == "cut":
            del data[at:]
        elif way == "bits":
            for _ in range(int(draw.integers(1, 30))):
                data[int(draw.integers(len(data)))] ^= 1 << int(draw.integers(8))
        elif way == "bytes":
            size = int(draw.integers(1, 64))
            data[at : at + size] = draw.bytes(size)
        elif way == "splice":
            other = self.corpus[int(draw.integers(len(self.corpus)))]
            data[at:] = other[int(draw.integers(len(other))) :]
        elif way == "repeat":
            piece = data[at : at + int(draw.integers(1, 512))]
            data[at:at] = piece * int(draw.integers(1, 20))
        elif way == "length":
            data[at : at + 4] = struct.pack(
                ">I" if draw.random() < 0.5 else "<I", int(draw.choice([0, 1, 1 << 31, 2**32 - 1]))
            )
        else:
            at = int(draw.integers(min(len(data), 40)))
            data[at] = int(draw.integers(256))
        return f"image, {way}", bytes(data)


def bombs() -> dict[str, bytes]:
    """Small files that would decode to much, and files over the limits."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    def png(width: int, height: int, *more: bytes) -> bytes:
        head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + chunk(b"IEND", b"")

    zeros = chunk(b"IDAT", zlib.compress(bytes(4 << 20), 9))
    size = struct.pack(">HH", 65500, 65500)
    jpeg = b"\xff\xd8\xff\xc0\x00\x11\x08" + size + b"\x03\x01\x22\x00\x02\x11\x01\x03\x11\x01"
    webp = b"VP8X\x0a\x00\x00\x00\x10\x00\x00\x00\xff\xff\xff\xff\xff\xff"
    return {
        "bomb, PNG of 30000 x 30000": png(30000, 30000, zeros),
        "bomb, PNG of 2^31 - 1": png(2**31 - 1, 2**31 - 1, zeros),
        "bomb, PNG of no pixels": png(0, 0, zeros),
        "bomb, PNG of 30000 chunks": png(8, 8, *[chunk(b"tEXt", b"a\0b")] * 30000),
        "bomb, PNG text of 64 MB": png(8, 8, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(64 << 20), 9))),
        "bomb, JPEG of 65500 x 65500": jpeg + b"\xff\xda\x00\x0c\x03\x01\x00\x02\x11\x03\x11\x00\x3f\x00" + bytes(2000),
        "bomb, WebP of 2^24": b"RIFF" + struct.pack("<I", 4 + len(webp)) + b"WEBP" + webp,
        "bomb, 21 MB": b"\xff\xd8\xff\xe0" + bytes(21 << 20),
        "other format, GIF": b"GIF89a\x01\0\x01\0\x80\0\0\0\0\0\xff\xff\xff,\0\0\0\0\x01\0\x01\0\0\x02\x02D\x01\0;",
        "other format, SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "other format, EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "empty image": b"",
    }
