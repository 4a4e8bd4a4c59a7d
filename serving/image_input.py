"""Images as a user has them, made into the encoded bytes that a request carries."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator

from vilu.answers import Answer, ImageLike, opened

Item = tuple[str, "bytes | Answer"]  # an image's name and its encoded bytes, or an answer that says why there are none
PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")  # of Pillow
REQUEST_BYTES = 32 << 20  # a batch of large images ends here, whatever its number


def encoded(image: ImageLike, index: int) -> Item:
    """The name and the encoded bytes of one image.

    Args:
        image: a path, encoded bytes, a Pillow image or a (H, W, 3) uint8 array.
        index: the image's place in the stream, from 0; it names an image without a path.

    Returns:
        (name, bytes); in place of the bytes an Answer with the error, where the image cannot be read.

    Example:
        >>> import numpy as np
        >>> name, data = encoded(np.zeros((4, 5, 3), np.uint8), 0)
        >>> name, data[:4]
        ('image 0', b'\\x89PNG')
    """
    name, found = opened(image, index)
    if isinstance(found, bytes | Answer):
        return name, found
    buffer = io.BytesIO()
    try:
        found = found if found.mode in PNG_MODES else found.convert("RGB")
        found.save(buffer, "PNG")  # lossless: the server sees these very pixels
    except Exception as error:  # Pillow raises many types for modes that it cannot convert
        return name, Answer(name, error=f"image of mode {found.mode} cannot be sent ({type(error).__name__})")
    return name, buffer.getvalue()


def batches(images: Iterable[ImageLike], size: int) -> Iterator[list[Item]]:
    """The images in lists of at most `size` and about REQUEST_BYTES, each read when it is needed."""
    batch: list[Item] = []
    held = 0
    for index, image in enumerate(images):
        batch.append(encoded(image, index))
        data = batch[-1][1]
        held += len(data) if isinstance(data, bytes) else 0
        if len(batch) == size or held >= REQUEST_BYTES:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch
