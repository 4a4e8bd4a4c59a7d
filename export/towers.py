"""The towers of one CLIP, kept from one export to the next: their graphs, and what they answered on a sample.

A graph depends on the CLIP's weights and modules, on the code that writes it and on the libraries that trace it. An
answer depends on the graph and its input, and on the runtime and the processor. These are the keys of the cache.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import itertools
import platform
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

import vilu.clip
from vilu.clip import Clip
from vilu.export import attention, fusion, graphs, onnx_file, views
from vilu.export.cache import Cache, digest, key
from vilu.export.parity import Arrays, Session
from vilu.serving.backends.onnxruntime import session

TRACERS = ("torch", "onnx", "onnxscript", "onnx-ir", "open-clip-torch", "timm", "numpy")
RUNTIMES = ("onnxruntime", "onnxruntime-ep-openvino", "openvino", "numpy")


def clip_digest(clip: Clip) -> str:
    """SHA-256 of a CLIP's parameters and buffers, and of its modules with their settings (heads, activation ...)."""
    found = hashlib.sha256()
    for name, module in clip.named_modules():
        settings = sorted((k, _setting(v)) for k, v in vars(module).items() if k[0] != "_" and k != "training")
        found.update(repr((name, _setting(type(module)), settings)).encode())
    for name, tensor in itertools.chain(clip.named_parameters(), clip.named_buffers()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _setting(value: Any) -> Any:
    """A module's attribute as something whose text is the same in every process."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)):
        return [_setting(part) for part in value]
    if isinstance(value, functools.partial):
        return [_setting(value.func), _setting(value.args), sorted((k, _setting(v)) for k, v in value.keywords.items())]
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


class Towers:
    """What a cache holds for one CLIP.

    Args:
        clip: the CLIP.
        cache: where it is kept.
    """

    def __init__(self, clip: Clip, cache: Cache) -> None:
        self.clip, self.cache = clip.eval(), cache

    @cached_property
    def digest(self) -> str:
        return clip_digest(self.clip)

    def graph(self, path: Path, fused: bool, write: Callable[[], None]) -> None:
        """Put a traced graph into place: from the cache, else as `write` writes it.

        Args:
            path: MODEL/VERSION/model.onnx.
            fused: as `graphs.write_graph` has it.
            write: writes the graph to `path`, its large weights beside it.
        """
        if self.cache.folder is None:
            write()
            return
        model = path.parent.parent.name
        size = self.clip.transform.size
        name = key(kind="graph", model=model, fused=fused, size=size, clip=self.digest, **_tracing())
        if not self.cache.fetch(name, path.parent):
            write()
            self.cache.keep(name, _files(path))

    def eager(self, encode: Callable[[torch.Tensor], torch.Tensor], feed: torch.Tensor, chunk: int) -> torch.Tensor:
        """The eager model's embeddings (N, D) of a feed (N, ...), `chunk` rows at a time.

        Each chunk is an entry of its own. They are counted from the end of the feed, as another precision's sample ends
        with the same images: it calibrates on none, or on more, of the first.
        """
        rest = len(feed) % chunk
        sizes = [rest] * bool(rest) + [chunk] * (len(feed) // chunk)
        return torch.cat([self._encoded(encode, rows) for rows in feed.split(sizes)])

    def _encoded(self, encode: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
        name, kept = "", None
        if self.cache.folder is not None:
            about = {"encode": encode.__name__, "feed": digest(rows.numpy()), "clip": self.digest}
            name = key(kind="eager", **about, **_versions("torch"), processor=_processor())
            kept = self.cache.arrays(name).get("embedding")
        if kept is None or len(kept) != len(rows):
            with torch.no_grad():
                kept = encode(rows).numpy()
            if name:
                self.cache.keep_arrays(name, {"embedding": kept})
        return torch.from_numpy(kept)


class KeptSession:
    """A tower's graph, opened for the first input that it has not run before; it keeps what it answers.

    Args:
        path: the graph.
        output: its output's name.
        provider: as `session.open_session` has it; so are `precision` and `threads`.
        sample: SHA-256 of what is measured: an entry holds the answers for one sample.
        cache: where they are kept once `keep` is called.
    """

    def __init__(
        self, path: Path, output: str, provider: str, precision: str, threads: int, sample: str, cache: Cache
    ) -> None:
        self.outputs = [output]
        self.cache, self.open = cache, functools.partial(session.open_session, path, provider, precision, threads)
        self.known: dict[str, np.ndarray] = {}
        self.name, self.new = "", False
        if cache.folder is not None:
            code = digest(Path(session.__file__))
            about: dict[str, Any] = {"provider": provider, "precision": precision, "threads": threads, "sample": sample}
            about |= {"graph": digest(*_files(path)), "code": code, "processor": _processor()}
            self.name = key(kind="answers", **about, **_versions(*RUNTIMES))
            self.known = cache.arrays(self.name)

    @cached_property
    def session(self) -> Session:
        return self.open()

    def run(self, names: Sequence[str], feed: Arrays) -> list[np.ndarray]:
        """As a session's: the output for a feed of one input."""
        (rows,) = feed.values()
        asked = digest(rows)
        found = self.known.get(asked)
        if found is None or len(found) != len(rows):
            (found,) = self.session.run(names, feed)
            self.known[asked], self.new = found, True
        return [found]

    def keep(self) -> None:
        """Keep what was answered for the next export."""
        if self.name and self.new:
            self.cache.keep_arrays(self.name, self.known)


def _files(path: Path) -> list[Path]:
    """A graph and the file of its large weights, where there is one."""
    return [file for file in (path, path.with_name(f"{path.name}.data")) if file.exists()]


@functools.cache
def _tracing() -> dict[str, str]:
    code = digest(*(Path(m.__file__) for m in (attention, fusion, graphs, onnx_file, views, vilu.clip) if m.__file__))
    return {"code": code, "python": platform.python_version(), **_versions(*TRACERS)}


@functools.cache
def _versions(*names: str) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
    return found


@functools.cache
def _processor() -> str:
    """The processor's kind: rounding differs between kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
