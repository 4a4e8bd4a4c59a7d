"""Random numbers that are the same on every run, without a trace in the caller's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Within the block, torch's global generators draw as after `torch.manual_seed(seed)`; after it, as before it.

    `torch.manual_seed` reseeds every GPU too, and `torch.random.fork_rng` undoes that only for the GPUs it is given.

    Args:
        device: a GPU whose generator the block uses beside the CPU's; every other GPU's is left alone.
    """
    gpus = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        torch.default_generator.manual_seed(seed)
        for gpu in gpus:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(seed)
        yield
