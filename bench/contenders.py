"""The ways to answer an image that bench/throughput.py sets side by side, all with the same weights and class set.

A Way is four steps (decode, stack, tower, head), each as a user of that way would have it: the peers with open_clip's
own transform and the authors' head, ours with the exported graphs and vilu.preprocess.image.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import open_clip
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor, nn

from bench.authors import AuthorsFailureProbability, is_authors_form
from bench.head_forms import EagerHead
from vilu import Checkpoint, ViLUHead
from vilu.clip import Clip
from vilu.errors import UserError
from vilu.preprocess.image import decode
from vilu.serving.about import CONFIG, load_config
from vilu.serving.backends.onnxruntime import session as session_file

Answer = tuple[np.ndarray, np.ndarray]  # failure_probability (B,), class_index (B,)


@dataclass
class Way:
    """One contender.

    decode: encoded image -> what one image is to the tower; stack: those -> a batch; tower: batch -> embeddings (B, D)
    float32; head: embeddings -> answer. parallel: decodes images side by side, as the server does. note: what runs it.
    """

    name: str
    precision: str
    decode: Callable[[bytes], Any]
    stack: Callable[[Sequence[Any]], Any]
    tower: Callable[[Any], Any]
    head: Callable[[Any], Answer]
    ours: bool = False
    parallel: ThreadPoolExecutor | None = None
    note: str = ""

    def batch(self, images: Sequence[bytes]) -> Any:
        if self.parallel is not None and len(images) > 1:
            return self.stack(list(self.parallel.map(self.decode, images)))
        return self.stack([self.decode(image) for image in images])

    def answer(self, images: Sequence[bytes]) -> Answer:
        return self.head(self.tower(self.batch(images)))


def eager_head(checkpoint: Checkpoint, device: str) -> Callable[[Tensor], Answer]:
    """The authors' forward over the class set where this head has their form, else ours in eager PyTorch."""
    head: ViLUHead = copy.deepcopy(checkpoint.head).to(device)
    assert checkpoint.class_set is not None
    t = checkpoint.class_set.text_embeddings.to(device)
    module: nn.Module = AuthorsFailureProbability(head) if is_authors_form(head) else EagerHead(head)

    def run(v: Tensor) -> Answer:
        failure, index = module(torch.as_tensor(v, device=device), t)
        return failure.float().cpu().numpy(), index.cpu().numpy()

    return run


class PlainTower(nn.Module):
    """open_clip's own encode_image on normalised pixels (B, 3, S, S), then unit length."""

    def __init__(self, clip: Clip, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.model = copy.deepcopy(clip.model).to(dtype)
        self.dtype = dtype

    def forward(self, pixels: Tensor) -> Tensor:
        return F.normalize(self.model.encode_image(pixels.to(self.dtype)).float(), dim=-1)


def peers(
    clip: Clip, checkpoint: Checkpoint, device: str, threads: int, folder: Path, quick: bool
) -> Iterator[tuple[str, str, Callable[[], Way]]]:
    """(name, precision, build) of what a user would otherwise run; one that cannot be built costs only its own row.

    quick: only the reference, eager float32.
    """
    cfg = open_clip.get_model_preprocess_cfg(clip.model)
    transform = image_transform_v2(PreprocessCfg(**cfg), is_train=False)

    def read(data: bytes) -> Tensor:
        tensor: Tensor = transform(Image.open(io.BytesIO(data)))
        return tensor

    def way(name: str, precision: str, tower: Callable[[Tensor], Any]) -> Way:
        return Way(
            name, precision, read, lambda images: torch.stack(list(images)), tower, eager_head(checkpoint, device)
        )

    def eager(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        module = PlainTower(clip, dtype).to(device)
        return lambda pixels: module(pixels.to(device))

    def compiled(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        module = torch.compile(PlainTower(clip, dtype).to(device), dynamic=False)
        return lambda pixels: module(pixels.to(device))

    yield "eager", "float32", lambda: way("eager", "float32", eager(torch.float32))
    if quick:
        return
    half = "float16" if device == "cuda" else "bfloat16"
    low = getattr(torch, half)
    yield "eager", half, lambda: way("eager", half, eager(low))
    yield "torch.compile", "float32", lambda: way("torch.compile", "float32", compiled(torch.float32))
    yield "torch.compile", half, lambda: way("torch.compile", half, compiled(low))
    plain = functools.cache(lambda: write_plain(clip, folder / "plain.onnx"))
    providers = ["CUDAExecutionProvider"] if device == "cuda" else ["CPUExecutionProvider"]
    yield "ONNX Runtime", "float32", lambda: way("ONNX Runtime", "float32", session(plain(), providers, threads))
    if device == "cpu":
        yield "OpenVINO", "float32", lambda: way("OpenVINO", "float32", openvino(plain(), "f32", threads))
        yield "OpenVINO", half, lambda: way("OpenVINO", half, openvino(plain(), "bf16", threads))


def write_plain(clip: Clip, path: Path) -> Path:
    """torch.onnx.export of the plain tower, nothing of ours in it."""
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    side = clip.transform.size
    with warnings.catch_warnings(), torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            PlainTower(clip).eval(), (torch.randn(2, 3, side, side),), path, dynamo=True, verbose=False,
            input_names=["pixels"], output_names=["embedding"], dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
        )  # fmt: skip
    return path


def session(path: Path, providers: list[Any], threads: int) -> Callable[[Any], np.ndarray]:
    if providers[0] not in onnxruntime.get_available_providers():
        raise RuntimeError(f"onnxruntime has no {providers[0]}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    found = onnxruntime.InferenceSession(path, options, providers=providers)
    name = found.get_inputs()[0].name

    def run(pixels: Any) -> np.ndarray:
        embedding: np.ndarray = found.run(None, {name: np.asarray(pixels)})[0]
        return embedding

    return run


def openvino(path: Path, hint: str, threads: int) -> Callable[[Any], np.ndarray]:
    try:
        ov = importlib.import_module("openvino")
    except ModuleNotFoundError:
        raise RuntimeError("openvino is not installed") from None
    core = ov.Core()
    capabilities = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if hint == "bf16" and "BF16" not in capabilities:
        raise RuntimeError("OpenVINO finds no bfloat16 on this CPU")
    config = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"}
    compiled = core.compile_model(str(path), "CPU", config)

    def run(pixels: Any) -> np.ndarray:
        embedding: np.ndarray = np.array(compiled(np.asarray(pixels))[0])
        return embedding

    return run


def exported(
    repository: Path, precision: str, clip: Clip, device: str, threads: int
) -> Iterator[tuple[str, str, Callable[[], Way]]]:
    """The graphs of one of our model repositories in this process, opened as the server's backend opens them."""
    pool = ThreadPoolExecutor(threads)
    if not (repository / "vilu_head" / "1" / "model.onnx").is_file():
        raise UserError(f"{repository}: its head is no ONNX graph; bench/head.py measures the fused kernel")

    def build() -> Way:
        tower, head = (open_model(repository / name, device, threads) for name in ("clip_image", "vilu_head"))
        picks = [head.outputs.index("FAILURE_PROBABILITY"), head.outputs.index("CLASS_INDEX")]

        def embed(pixels: np.ndarray) -> np.ndarray:
            embedding: np.ndarray = tower.run(["IMAGE_EMBEDDING"], {"PIXELS": pixels})[0]
            return embedding

        def answer(v: Any) -> Answer:
            values = head.run(head.outputs, {"IMAGE_EMBEDDING": np.asarray(v)})  # all of them, as a client asks
            failure, index = (values[i].reshape(-1) for i in picks)
            return failure, index

        read = functools.partial(decode, transform=clip.transform)
        return Way("vilu export", precision, read, np.stack, embed, answer, True, pool, tower.provider)

    yield "vilu export", precision, build


def open_model(folder: Path, device: str, threads: int) -> Any:
    """A model of a repository, opened as its config.pbtxt asks: `outputs`, `run(names, feed)`, `provider`."""
    config = load_config(folder / CONFIG)
    asked = {key: value.string_value for key, value in config.parameters.items()}
    # A Python model, as the head's is, has its graph beside it.
    named = config.default_model_filename
    file = folder / "1" / (named if named.endswith(".onnx") else "model.onnx")
    if device == "cuda":
        return Cuda(file)
    return session_file.open_session(file, asked.get("provider", "cpu"), asked.get("precision", "float32"), threads)


class Cuda:
    """A graph on ONNX Runtime's CUDA provider, as the native backend runs it."""

    provider = "ONNX Runtime, CUDA provider"

    def __init__(self, path: Path) -> None:
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise RuntimeError("onnxruntime has no CUDAExecutionProvider")
        self.session = onnxruntime.InferenceSession(path, providers=["CUDAExecutionProvider"])
        self.outputs = [output.name for output in self.session.get_outputs()]

    def run(self, names: Sequence[str], feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        values: list[np.ndarray] = self.session.run(list(names), feed)
        return values
