"""ViLU, deployed: CLIP zero-shot answers with the probability that each is wrong.

Python imports each name's module when the name is first used. So `import vilu` costs nothing, and the serving side,
which has no torch, can import its own folder.
"""

import os
import pwd
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vilu.answers import Answer
    from vilu.checkpoint import Checkpoint, ClipSpec, load_checkpoint, save_checkpoint
    from vilu.class_set import ClassSet
    from vilu.clip import load_clip
    from vilu.errors import UserError
    from vilu.head import ViLUHead
    from vilu.predictor import CascadePredictor, Predictor
    from vilu.train import train_head

__version__ = "0.1.0"

_HOME = {
    "Answer": "vilu.answers",
    "Checkpoint": "vilu.checkpoint",
    "ClipSpec": "vilu.checkpoint",
    "load_checkpoint": "vilu.checkpoint",
    "save_checkpoint": "vilu.checkpoint",
    "ClassSet": "vilu.class_set",
    "load_clip": "vilu.clip",
    "UserError": "vilu.errors",
    "ViLUHead": "vilu.head",
    "CascadePredictor": "vilu.predictor",
    "Predictor": "vilu.predictor",
    "train_head": "vilu.train",
}
_MODULES = {"metrics": "vilu.evaluation.metrics", "scores": "vilu.scores"}
__all__ = [
    "Answer",
    "CascadePredictor",
    "Checkpoint",
    "ClassSet",
    "ClipSpec",
    "Predictor",
    "UserError",
    "ViLUHead",
    "load_checkpoint",
    "load_clip",
    "save_checkpoint",
    "train_head",
]


def _name_the_user() -> None:
    """Give a user without a name one, as in a container that runs under a number: torch asks for it at import."""
    if not any(os.environ.get(name) for name in ("LOGNAME", "USER", "LNAME", "USERNAME")):
        try:
            pwd.getpwuid(os.getuid())
        except KeyError:
            os.environ["LOGNAME"] = str(os.getuid())


_name_the_user()


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name in _MODULES:
        return import_module(_MODULES[name])
    raise AttributeError(f"module 'vilu' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES, *(name for name in globals() if name.startswith("__"))})
