"""The tokenizer of a CLIP."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import open_clip
from torch import Tensor

from vilu.clip.hugging_face import FOLDER, load_folder_tokenizer
from vilu.errors import UserError

LOCAL = "local-dir:"


def load_tokenizer(source: str, name: str) -> Callable[[list[str]], Tensor]:
    """Return a CLIP's tokenizer, or a stand-in that raises UserError when called if its files cannot be loaded."""
    folder = Path(source.removeprefix(LOCAL))
    merges = folder / "bpe.txt.gz"
    try:
        # The folder's config cannot name its merges file, because open_clip wants an absolute path there.
        if source.startswith(LOCAL) and merges.is_file():
            text = json.loads((folder / "open_clip_config.json").read_text("utf-8-sig"))["model_cfg"]["text_cfg"]
            options = {"context_length": text["context_length"], **text.get("tokenizer_kwargs", {})}
            return open_clip.SimpleTokenizer(bpe_path=str(merges), **options)
        if source.startswith(FOLDER):
            return load_folder_tokenizer(Path(source.removeprefix(FOLDER)))
        return open_clip.get_tokenizer(source)
    except Exception as error:  # transformers and the hub raise many types
        reason = str(error).strip().splitlines() or [type(error).__name__]
        return _MissingTokenizer(f"CLIP {name}: its tokenizer cannot be loaded ({reason[0]}){_advice(error, source)}")


def _advice(error: Exception, source: str) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"; pip install {error.name}"
    if source.startswith((LOCAL, FOLDER)):
        return ""
    return "; put its tokenizer.json beside the weights in a folder of open_clip's layout and name local-dir:FOLDER"


class _MissingTokenizer:
    """A tokenizer that raises UserError when called. Loading does not fail, as the image tower needs no tokenizer."""

    def __init__(self, message: str) -> None:
        self.message = message

    def __call__(self, texts: list[str]) -> Tensor:
        raise UserError(self.message)
