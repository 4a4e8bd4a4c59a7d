"""What a served repository refuses: the limits of `vilu export`, which the writers put into the configurations."""

from __future__ import annotations

from dataclasses import dataclass

from vilu.errors import UserError
from vilu.preprocess.image import Transform

# Pillow raises at 178,956,970 pixels, whatever is set here; one gRPC message holds 1 GiB with room to spare.
MAX_LIMITS = {"max_image_bytes": 1 << 30, "max_image_pixels": 178_956_970, "queue_seconds": 3600.0}
MIN_LIMITS = {"max_queue": 0, "queue_seconds": 1e-6}  # Triton counts microseconds, and 0 would be no limit
PROMPT_BYTES = 1024  # room for the prompt around the longest label
TEXT_BYTES = 4096  # a prompt that the tokenizer always takes


@dataclass(frozen=True)
class Limits:
    """The largest that the server still takes.

    Attributes:
        max_queue: requests that wait before one model; more are refused at once, with UNAVAILABLE. 0: no limit on
            their number or their time, and a fault of tritonserver's is avoided (`model_config.write_config`).
        queue_seconds: how long one may wait, in seconds; then it is refused. A request may ask for less.
        max_image_bytes: size of an encoded image, in bytes.
        max_image_pixels: width times height of an encoded image, checked before it is decoded.
        max_labels: candidates that one request brings.
        max_label_bytes: length of one candidate, or of a name in a class set, in UTF-8.

    Raises:
        UserError: a limit is not positive, or the server cannot keep it.

    Examples:
        >>> Limits(max_labels=100).max_queue
        256
        >>> Limits(max_labels=0)
        Traceback (most recent call last):
            ...
        vilu.errors.UserError: max_labels must be from 1 to 1,073,741,824, got 0
    """

    max_queue: int = 256
    queue_seconds: float = 30.0
    max_image_bytes: int = Transform.max_bytes
    max_image_pixels: int = Transform.max_pixels
    max_labels: int = 1000
    max_label_bytes: int = 256

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least, most = MIN_LIMITS.get(name, 1), MAX_LIMITS.get(name, 1 << 30)
            if not least <= value <= most:
                raise UserError(f"{name} must be from {least:g} to {most:,}, got {value:,}")

    @property
    def max_text_bytes(self) -> int:
        """Length of a text that the tokenizer takes: a label in its prompt, in UTF-8."""
        return max(TEXT_BYTES, self.max_label_bytes + PROMPT_BYTES)
