"""Images with labels or captions, and their embeddings.

The images come from folders, tables, WebDataset shards, the paper's 13 data sets or the embedded data.

    source = open_source("photos")                        # or dataset="flowers102", root=Path("DATA"), split="test"
    data = embed(source, load_clip(), cache=Path("cache"))

Python imports each name's module when the name is first used, so importing this package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vilu.data.embed import embed
    from vilu.data.pipeline import augment, batches
    from vilu.data.precomputed import load_embeddings
    from vilu.data.registry import open_source
    from vilu.data.source import Source, check_same_classes

_HOME = {
    "Source": "vilu.data.source",
    "augment": "vilu.data.pipeline",
    "batches": "vilu.data.pipeline",
    "check_same_classes": "vilu.data.source",
    "embed": "vilu.data.embed",
    "load_embeddings": "vilu.data.precomputed",
    "open_source": "vilu.data.registry",
}
__all__ = [
    "Source",
    "augment",
    "batches",
    "check_same_classes",
    "embed",
    "load_embeddings",
    "open_source",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'vilu.data' has no attribute {name!r}")
    # The value is stored, because importing vilu.data.embed has just set `embed` here to the module of that name.
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value
