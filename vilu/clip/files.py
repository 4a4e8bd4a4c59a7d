"""Weights files of a CLIP, as people keep them: read safely, and loaded into an open_clip model.

A file may be a safetensors file, a file of `torch.save`, or a TorchScript archive as OpenAI ships it. The tensors of
the CLIP may lie at any depth ("state_dict", "model", "ema", ...) and have any prefix ("model.", "module.", "clip.").

Files are hostile input. `torch.jit.load` is not used: it compiles the archive's own code and runs it where a module has
a `__setstate__`, and TorchScript can write files. `pickle.load` runs anything. Here torch's weights-only reader reads
both kinds of archive. Every class or function that it does not know is replaced by an inert object, so the settings,
callbacks and modules that lie beside the weights are skipped, and none of their code runs.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vilu.errors import UserError

MAX_DEPTH = 64  # of nested dictionaries and modules
WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})  # torch adds these to names
OPENAI = frozenset({"input_resolution", "context_length", "vocab_size"})  # only OpenAI's archives hold these
# A moving average of the weights: "ema", "state_dict_ema", "modelEma", "averaged_model", "swa" ...
EMA = re.compile(r"(?i:(^|[._])(ema|swa|averaged?|moving_average)([._]|$))|[a-z]E(ma|MA)([A-Z._]|$)")
SCRIPT = re.compile(r"[^/]*/(code/|constants|traced_inputs)")  # what a TorchScript archive has beside its modules
ALONE = "write its weights alone: torch.save(model.state_dict(), FILE)"
UNUSED = re.compile(r"(^|\.)(position_ids|attn_mask)$")  # constants that older versions stored


@dataclass(frozen=True)
class Weights:
    """The tensors of a file.

    path: the file.
    tensors: tensors by name. The keys of nested dictionaries are joined with dots.
    openai: whether these are OpenAI's own weights, which were trained with QuickGELU.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    openai: bool

    def load_into(self, model: nn.Module, name: str) -> None:
        """Copy the tensors of a CLIP into an open_clip model, whose type of number stays.

        Where the file holds both the weights and their moving average (EMA), the average is used.

        Args:
            model: open_clip's model. It is changed only when every tensor fits.
            name: name of the model in messages.

        Raises:
            UserError: a tensor is missing, unexpected, mis-shaped or not finite, or the file holds several CLIPs.
        """
        wanted = model.state_dict()
        prefix, found = self._choose(wanted, name)
        place = f" under {_printable(prefix)!r}" if prefix else ""
        try:
            tensors = _renamed(model, wanted, found)
        except Exception:  # open_clip's converter meets a tensor that is missing or has another shape
            raise UserError(f"{self.path}: its tensors{place} do not fit {name}") from None
        for key in sorted(wanted.keys() - tensors.keys()):
            have = len(wanted.keys() & tensors.keys())
            raise UserError(
                f"{self.path}: tensor {key} is missing{place}, where {have} of the {len(wanted)} tensors of {name} are"
            )
        for key in sorted(tensors.keys() - wanted.keys()):
            raise UserError(f"{self.path}: tensor {_printable(prefix + key)} does not belong to {name}")
        resize_pos_embed(tensors, model)  # a model of another image size or context length
        resize_text_pos_embed(tensors, model)
        for key, tensor in tensors.items():
            if tensor.shape != wanted[key].shape:
                shapes = f"has shape {tuple(tensor.shape)}, {name} needs {tuple(wanted[key].shape)}"
                raise UserError(f"{self.path}: tensor {prefix}{key} {shapes}")
            if not torch.isfinite(tensor).all():
                raise UserError(f"{self.path}: tensor {prefix}{key} holds a value that is not finite")
        model.load_state_dict(tensors)

    def _choose(self, wanted: Collection[str], name: str) -> tuple[str, dict[str, Tensor]]:
        """Return the prefix that most of the CLIP's tensors have in this file, and its tensors without the prefix."""
        known = {*wanted, *(key.removeprefix("text.") for key in wanted)}  # open_clip moves a text tower below "text."
        count = Counter(
            key.removesuffix(rest) for key in self.tensors for rest in _endings(key) if rest in known
        )  # fmt: skip
        if not count:
            begin = ", ".join(sorted({repr(_printable(key.split(".")[0])) for key in self.tensors})[:5])
            raise UserError(f"{self.path}: has no tensor of {name}; its tensors' names begin with {begin}")
        best = [prefix for prefix, n in count.items() if n == max(count.values())]
        average = [prefix for prefix in best if EMA.search(prefix)]
        best = average if len(average) == 1 else best
        if len(best) > 1:
            places = ", ".join(repr(_printable(prefix)) for prefix in sorted(best)[:5])
            raise UserError(f"{self.path}: holds several CLIPs ({places}); save one of them in a file of its own")
        inside = {key.removeprefix(best[0]): t for key, t in self.tensors.items() if key.startswith(best[0])}
        return best[0], {key: t for key, t in inside.items() if key not in OPENAI and not UNUSED.search(key)}


def read_weights(path: Path) -> Weights:
    """Read the tensors of a weights file. No code of the file runs.

    Raises:
        UserError: the file cannot be read, is cut short, or holds no named tensors, such as a whole pickled module.
    """
    try:
        with path.open("rb") as handle:
            magic = handle.read(9)
        if magic[8:] == b"{":
            document: Any = load_file(path)
        elif magic[:2] == b"PK":
            document = _read_zip(path)
        else:
            document = _load(path, [])
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except SafetensorError as error:
        raise UserError(f"{path}: not a safetensors file, or cut short ({error})") from None
    except UserError:
        raise
    except Exception as error:  # torch and zipfile raise many types on hostile files; the user gets one message for all
        unknown = any(words in str(error) for words in ("nsupported global", "nsupported GLOBAL", "Can only", "reduce"))
        reason = "it holds objects that only their own code can read" if unknown else "damaged, cut short or no weights"
        if unknown:
            advice = f"; {ALONE}"
        else:
            advice = "; it is a pointer of Git LFS: run `git lfs pull`" if magic == b"version h" else ""
        raise UserError(f"{path}: not weights that can be read safely ({reason}){advice}") from None
    tensors: dict[str, Tensor] = {}
    for key, tensor in _named(document, "", 0, set()):
        name = ".".join(part for part in key.split(".") if part not in WRAPPERS)
        tensors.setdefault(name, tensor)
    if not tensors:
        kind = next((f" ({_printable(o.kind)})" for o in [document, *_values(document)] if isinstance(o, _Inert)), "")
        raise UserError(
            f"{path}: holds no tensors by name but a whole pickled module{kind}, whose code would have to run; {ALONE}"
            if kind
            else f"{path}: holds no tensors by name"
        )
    for name, tensor in tensors.items():
        whole = tensor.layout == torch.strided and not tensor.is_meta
        # Strides of zero make a tensor of any size from a few bytes.
        if not whole or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise UserError(f"{path}: tensor {_printable(name)} is not stored whole")
    last = {name.rpartition(".")[2] for name in tensors}
    return Weights(path, tensors, openai=last >= OPENAI)


class _Inert:
    """An object in place of one of a class or function that the reader does not know. It keeps only its state."""

    kind = ""
    state: Any = None
    script = False

    def __new__(cls, *args: Any) -> _Inert:
        return object.__new__(cls)

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _read_zip(path: Path) -> Any:
    """Return what an archive of `torch.save` or TorchScript holds."""
    with zipfile.ZipFile(path) as archive, tempfile.TemporaryFile() as copy:
        entries = archive.infolist()
        if sum(entry.file_size for entry in entries) > 2 * path.stat().st_size + (1 << 26):
            raise UserError(f"{path}: unpacks to far more than its size")
        script = any(entry.filename.endswith("/constants.pkl") for entry in entries)
        if not script:
            with path.open("rb") as file:
                return _load(path, torch.serialization.get_unsafe_globals_in_checkpoint(file))
        # torch.load hands a TorchScript archive to torch.jit.load, so it gets a copy without what makes it one.
        with zipfile.ZipFile(copy, "w") as plain:
            for entry in entries:
                if not SCRIPT.match(entry.filename):
                    with archive.open(entry) as source, plain.open(entry.filename, "w", force_zip64=True) as target:
                        shutil.copyfileobj(source, target, 1 << 20)
        copy.seek(0)
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(copy)
        copy.seek(0)
        return _load(copy, unknown, script=True)


def _load(file: Any, unknown: list[str], *, script: bool = False) -> Any:
    inert: list[Any] = [(type("Inert", (_Inert,), {"kind": name, "script": script}), name) for name in unknown]
    with torch.serialization.safe_globals(inert), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(file, map_location="cpu", weights_only=True)


def _named(value: Any, name: str, depth: int, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors below a dictionary or a TorchScript module, with the keys that lead to them."""
    if isinstance(value, Tensor):
        yield name, value
        return
    if isinstance(value, _Inert) and value.script:
        value = value.state
    # A dictionary that lies in itself, or in many places, is visited once.
    if not isinstance(value, dict) or depth > MAX_DEPTH or id(value) in seen:
        return
    seen.add(id(value))
    for key, inner in value.items():
        yield from _named(inner, f"{name}.{key}" if name else str(key), depth + 1, seen)


def _values(document: Any) -> list[Any]:
    return list(document.values()) if isinstance(document, dict) else []


def _endings(name: str) -> Iterator[str]:
    """Yield "a.b.c", "b.c" and "c" for the name "a.b.c"."""
    yield name
    while "." in name:
        name = name.partition(".")[2]
        yield name


def _renamed(model: nn.Module, wanted: Mapping[str, Tensor], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give tensors of other layouts the model's names, as open_clip does for the files that it downloads."""
    tensors = dict(convert_state_dict(model, tensors))
    if "positional_embedding" in tensors and not hasattr(model, "positional_embedding"):
        tensors = convert_to_custom_text_state_dict(tensors)
    if "logit_bias" not in wanted:
        tensors.pop("logit_bias", None)  # it cancels in the softmax
    elif "logit_scale" in tensors:
        tensors.setdefault("logit_bias", torch.zeros_like(wanted["logit_bias"]))
    for name in ("logit_scale", "logit_bias"):  # one number, with or without an axis
        if name in tensors and name in wanted and tensors[name].numel() == 1:
            tensors[name] = tensors[name].reshape(wanted[name].shape)
    return tensors


def _printable(name: str) -> str:
    """A name from a file, short and without control characters."""
    return "".join(c if c.isprintable() else "?" for c in name)[:80]
