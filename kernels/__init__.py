"""The head made fast: folding, and the fused kernel built on it.

Names are resolved on first use: `plan` and `launch` serve where there is no torch, and importing this needs no Triton.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vilu.kernels.folding import FoldedHead, HeadOutput, fold
    from vilu.kernels.op import fused_head

_HOME = {
    "FoldedHead": "vilu.kernels.folding",
    "HeadOutput": "vilu.kernels.folding",
    "fold": "vilu.kernels.folding",
    "fused_head": "vilu.kernels.op",
}
__all__ = ["FoldedHead", "HeadOutput", "fold", "fused_head"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'vilu.kernels' has no attribute {name!r}")
