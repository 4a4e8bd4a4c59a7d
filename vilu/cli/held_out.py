"""Samples that a head was trained on are no held-out data: `vilu eval` and `vilu calibrate` count them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from vilu.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from vilu.embeddings import EmbeddedSet


def held_out(data: EmbeddedSet, trained: Mapping[str, Tensor], drop: bool) -> tuple[EmbeddedSet, int, list[str]]:
    """Find the samples that something was trained on, by their fingerprints, and leave them out if that is wanted.

    Args:
        data: N samples.
        trained: fingerprints of training samples, by what was trained on them, as in "head.safetensors: was trained".
        drop: whether to leave the known samples out.

    Returns:
        The samples to use; how many of them are known, or 0 where false positives explain them; and one line for each
        part of `trained` that knows some of the N samples.

    Raises:
        UserError: no sample is left.
    """
    import torch

    from vilu.fingerprints import known, too_many

    rows, lines = torch.zeros(len(data), dtype=torch.bool), []
    for what, samples in trained.items():
        found = known(data.image.normalised, samples)
        if found.any():
            lines.append(f"{what} on {int(found.sum())} of the {len(data)} samples of {data.name}")
            rows |= found
    count = int(rows.sum())
    if not drop or not count:
        return data, count if too_many(count, len(data)) else 0, lines
    if count == len(data):
        raise UserError(f"{lines[0]}; none is left")
    return data[(~rows).nonzero()[:, 0]], 0, [f"{line}; these are left out" for line in lines]
