"""What a served repository refuses: the limits of `vilu export`, written into its configurations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vilu.errors import UserError
from vilu.export.repository import (
    CONFIG,
    MAX_LABEL_BYTES,
    MAX_LABELS,
    MAX_QUEUE,
    MAX_TEXT_BYTES,
    QUEUE_SECONDS,
    load_config,
    save_config,
)
from vilu.preprocess.image import Transform

# Twice Pillow's own limit, where it raises whatever ours is; what one gRPC message may hold with room to spare.
MOST_PIXELS, MOST_BYTES = 178_956_970, 1 << 30


@dataclass(frozen=True)
class Limits:
    """Each is the largest that is still taken.

    max_queue: requests that wait before one model; more are refused at once, with UNAVAILABLE. 0: any number, however
        long; none is then left waiting by a fault of tritonserver's (`repository.write_config`).
    queue_seconds: that one may wait, then it is refused likewise; a request's own timeout may be shorter.
    max_image_bytes, max_image_pixels: of an encoded image, both before it is decoded.
    max_labels: candidates of a request's own. max_label_bytes: of one in UTF-8, and of a name in a class set.

    Raises:
        UserError: a limit that is not positive or that the server cannot keep.
    """

    max_queue: int = MAX_QUEUE
    queue_seconds: float = QUEUE_SECONDS
    max_image_bytes: int = Transform.max_bytes
    max_image_pixels: int = Transform.max_pixels
    max_labels: int = MAX_LABELS
    max_label_bytes: int = MAX_LABEL_BYTES

    def __post_init__(self) -> None:
        most = {"max_image_bytes": MOST_BYTES, "max_image_pixels": MOST_PIXELS, "queue_seconds": 3600.0}
        for name, value in vars(self).items():
            # Below a microsecond a time would round to 0, which is no limit to Triton.
            least = {"queue_seconds": 1e-6, "max_queue": 0}.get(name, 1)
            if not least <= value <= most.get(name, 1 << 30):
                raise UserError(f"{name} must be from {least:g} to {most.get(name, 1 << 30):,}, got {value:,}")


def write(root: Path, limits: Limits) -> None:
    """Put the limits into every configuration of a model repository.

    Raises:
        UserError: max_image_pixels is below what CLIP itself reads.
    """
    parameters = {
        "max_bytes": limits.max_image_bytes,
        "max_pixels": limits.max_image_pixels,
        "max_labels": limits.max_labels,
        "max_label_bytes": limits.max_label_bytes,
        "max_text_bytes": max(MAX_TEXT_BYTES, limits.max_label_bytes + MAX_TEXT_BYTES // 4),  # a label in its prompt
    }
    for path in root.glob(f"*/{CONFIG}"):
        config = load_config(path)
        if config.dynamic_batching.HasField("default_queue_policy"):  # where export set one
            queue = config.dynamic_batching.default_queue_policy
            queue.max_queue_size = limits.max_queue
            queue.default_timeout_microseconds = round(1e6 * limits.queue_seconds)
            if not limits.max_queue:
                config.dynamic_batching.ClearField("default_queue_policy")
        side = int(config.parameters["size"].string_value) if "max_pixels" in config.parameters else 0
        if limits.max_image_pixels < side * side:
            raise UserError(f"max_image_pixels must be at least {side}x{side}, what this CLIP reads")
        for name, value in parameters.items():
            if name in config.parameters:
                config.parameters[name].string_value = str(value)
        save_config(path.parent, config)
