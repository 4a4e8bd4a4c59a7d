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
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import head as head_bench  # bench/head.py
import numpy as np
import onnxruntime
import open_clip
import torch
import torch.nn.functional as F
from google.protobuf import text_format
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor, nn
from tritonclient.grpc import model_config_pb2 as pb

from vilu import Checkpoint, ViLUHead
from vilu.class_set import ClassSet
from vilu.clip import Clip
from vilu.data.image_files import image_files
from vilu.errors import UserError
from vilu.preprocess.image import decode
from vilu.serving.backends.onnxruntime import session as session_file

CLASSES = 1000
LEAD = 0.02  # of the similarity that a stand-in's answer has over the next
SIZE = (500, 375)
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


def photos(count: int, folder: Path | None = None, seed: int = 0) -> list[bytes]:
    """`count` JPEGs (quality 90, 500 x 375) of real photographs: crops, mirrored and of varied brightness.

    From scikit-learn's and matplotlib's samples; the files of `folder` are taken as they are, and repeat where too few.
    """
    if folder is not None:
        files = image_files(folder)
        return [files[i % len(files)].read_bytes() for i in range(count)]
    from matplotlib import cbook
    from PIL import ImageEnhance
    from sklearn.datasets import load_sample_images

    sources = [Image.fromarray(image) for image in load_sample_images().images]
    sources.append(Image.open(cbook.get_sample_data("grace_hopper.jpg")).convert("RGB"))
    draw = np.random.default_rng(seed)
    made = []
    for i in range(count):
        source = sources[i % len(sources)]
        width = int(min(source.width, source.height * SIZE[0] / SIZE[1]) * draw.uniform(0.5, 1))
        height = int(width * SIZE[1] / SIZE[0])
        left = int(draw.integers(source.width - width + 1))
        top = int(draw.integers(source.height - height + 1))
        image = source.crop((left, top, left + width, top + height)).resize(SIZE, Image.Resampling.BICUBIC)
        if draw.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        image = ImageEnhance.Brightness(image).enhance(draw.uniform(0.7, 1.3))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90)
        made.append(buffer.getvalue())
    return made


def stand_in(clip: Clip, images: Sequence[bytes]) -> Checkpoint:
    """A checkpoint for a CLIP that has none: made-up classes and an untrained head, whose answers on `images` spread.

    Random text embeddings would give all images one class, and no error could show. So class vectors scatter around
    the images as these do themselves, and only such are taken as leave every image a clear first among them.
    """
    v = clip.embed_images([np.stack([decode(image, clip.transform) for image in images])])
    generator = torch.Generator().manual_seed(1)
    centre = v.mean(dim=0)
    scatter = torch.randn(32 * CLASSES, len(v), generator=generator) @ (v - centre) / math.sqrt(len(v))
    beside = torch.randn(scatter.shape, generator=generator) / math.sqrt(v.shape[1])
    away = torch.linspace(0, 2, len(scatter))[:, None]
    candidates = F.normalize(centre + scatter + away * beside, dim=1)
    first, taken = torch.full((len(v),), -2.0), []
    for i, similarity in enumerate(candidates @ v.T):
        if ((similarity - first).abs() >= LEAD).all() and len(taken) < CLASSES:
            first = torch.maximum(first, similarity)
            taken.append(i)
    t = candidates[taken]
    head, _, _ = head_bench.Case(1, CLASSES, v.shape[1], torch.float32).data("cpu")
    with torch.no_grad():
        logit = head(v, t)
        last: Any = head.mlp[-1]
        gain = 1.5 / float(logit.std())
        last.bias.copy_(gain * (last.bias - logit.median()))
        last.weight.mul_(gain)
    names = tuple(f"class {i}" for i in range(len(t)))
    return Checkpoint(head.eval(), clip.spec, ClassSet(names, ("{}",), t), meta={"trained": False})


def eager_head(checkpoint: Checkpoint, device: str) -> Callable[[Tensor], Answer]:
    """The authors' forward over the class set where this head has their form, else ours in eager PyTorch."""
    head: ViLUHead = copy.deepcopy(checkpoint.head).to(device)
    assert checkpoint.class_set is not None
    t = checkpoint.class_set.text_embeddings.to(device)
    theirs = (
        head.projection == "shared" and len(head.parts) == 3 and head.prior is None
        and head.attention_scale == head_bench.SCALE
    )  # fmt: skip
    module: nn.Module = head_bench.AuthorsHead(head) if theirs else head_bench.EagerHead(head)

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
    """(name, precision, build) of what a user would otherwise run; one that cannot be built costs only its own row."""
    cfg = open_clip.get_model_preprocess_cfg(clip.model)
    transform = image_transform_v2(PreprocessCfg(**cfg), is_train=False)

    def read(data: bytes) -> Tensor:
        tensor: Tensor = transform(Image.open(io.BytesIO(data)))
        return tensor

    def way(name: str, precision: str, tower: Callable[[Tensor], Any]) -> Way:
        return Way(name, precision, read, torch.stack, tower, eager_head(checkpoint, device))

    def eager(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        module = PlainTower(clip, dtype).to(device)
        return lambda pixels: module(pixels.to(device))

    def compiled(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        module = torch.compile(PlainTower(clip, dtype).to(device), dynamic=False)
        return lambda pixels: module(pixels.to(device))

    half = "float16" if device == "cuda" else "bfloat16"
    low = getattr(torch, half)
    yield "eager", "float32", lambda: way("eager", "float32", eager(torch.float32))
    yield "eager", half, lambda: way("eager", half, eager(low))
    if not quick:
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
    config = text_format.Parse((folder / "config.pbtxt").read_text("utf-8"), pb.ModelConfig())
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


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
