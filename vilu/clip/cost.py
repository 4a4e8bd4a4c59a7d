"""What one image costs a CLIP's image tower: multiply-adds, which depend on the model alone, and measured time."""

from __future__ import annotations

import statistics
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from vilu.clip.model import Clip

BATCH = 16
RUNS = 5


def multiply_adds(clip: Clip) -> int:
    """Multiply-adds of the image tower for one image: its matrix products, convolutions and attention."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operator, which nothing counts
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            clip.encode_pixels(_pixels(clip, 1))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() // 2


def milliseconds(clip: Clip) -> float:
    """Time of the eager image tower on this machine, in ms an image: the median over batches of 16."""
    pixels, times = _pixels(clip, BATCH), []
    with torch.no_grad():
        clip.encode_pixels(pixels)
        for _ in range(RUNS):
            start = time.perf_counter()
            clip.encode_pixels(pixels)
            times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times) / BATCH


def _pixels(clip: Clip, images: int) -> torch.Tensor:
    side = clip.transform.size
    return torch.randint(0, 256, (images, side, side, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
