"""A fast ViLU head: `fold` combines it with a class set, `fused_head` answers a batch of images in one pass.

Names are resolved on first use. So importing this package needs no Triton, and the server, which has no torch, can
use `plan` and `launch`.
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


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
