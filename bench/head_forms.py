"""The ways to compute the head that bench/head.py sets side by side, and the gate that their answers must pass."""

from __future__ import annotations

import copy
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.authors import SCALE, AuthorsFailureProbability
from vilu import ViLUHead
from vilu.kernels import FoldedHead, fused_head

# Largest error of P(failure), CLIP's prediction equal wherever its lead is beyond rounding: the gate, by storage type.
GATE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
CONTENDERS = ("authors", "eager", "compile", "sdpa", "onnxruntime", "fused", "folded")
Run = Callable[[Tensor], tuple[Tensor, Tensor]]  # image_embedding -> P(failure), class_index


class EagerHead(nn.Module):
    def __init__(self, head: Any) -> None:
        super().__init__()
        self.head = head

    def forward(self, v: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.head.failure_probability(v, t), (v @ t.T).argmax(-1)


class AttentionHead(nn.Module):
    """Eager, with torch's own fused attention (one key and value of width D, every query its own head)."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        self.head = head

    def forward(self, v: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        index = (v @ t.T).argmax(-1)
        k = self.head.key(t)
        z = F.scaled_dot_product_attention(self.head.query(v)[None], k[None], k[None], scale=SCALE)[0]
        return torch.sigmoid(self.head.mlp(torch.cat([v, t[index], z], dim=-1)).squeeze(-1)), index


class WithText(nn.Module):
    """A head with its text embeddings as a buffer: an argument would be copied at every replay of a compiled graph."""

    def __init__(self, module: nn.Module, text_embeddings: Tensor) -> None:
        super().__init__()
        self.module = module
        self.register_buffer("text_embeddings", text_embeddings)

    def forward(self, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.module(v, self.text_embeddings)


@dataclass(frozen=True)
class Case:
    images: int
    classes: int
    dim: int
    dtype: torch.dtype

    def bytes_read(self, folded: FoldedHead) -> int:
        """Bytes that one pass cannot avoid: every bank the layout has, once."""
        banks = (folded.text_embeddings, folded.keys, folded.attended if folded.layout == "folded" else None)
        return sum(bank.numel() * bank.element_size() for bank in banks if bank is not None)

    def products(self) -> int:
        """Floating-point operations of the necessary products: v · t, u · t and the weighted sum."""
        return 3 * 2 * self.images * self.classes * self.dim

    def data(self, device: str) -> tuple[ViLUHead, Tensor, Tensor]:
        """A head whose answers spread, and embeddings crowded around a common direction, as CLIP's are."""
        torch.manual_seed(0)
        head: Any = ViLUHead(self.dim)
        with torch.no_grad():
            for layer in (head.query, head.key):
                layer.weight += 0.1 * torch.randn(self.dim, self.dim) / math.sqrt(self.dim)
            for layer in head.mlp[::2]:
                layer.weight.normal_(std=1.4 / math.sqrt(layer.in_features))
            head.mlp[0].weight *= math.sqrt(self.dim)
        # Made where they are used: a million rows would take the host longer than all measurements of them.
        centre = torch.randn(self.dim, device=device)
        v = torch.randn(self.images, self.dim, device=device).add_(centre)
        t = torch.randn(self.classes, self.dim, device=device).add_(centre)
        v, t = (F.normalize(x, dim=1, out=x).to(self.dtype) for x in (v, t))
        return head.to(device).requires_grad_(False), v, t


def contenders(
    case: Case, head: ViLUHead, v: Tensor, t: Tensor, folded: FoldedHead
) -> Iterator[tuple[str, Callable[[], Run]]]:
    """(name, build); building is left to the caller, so that one that cannot be built costs only its own row."""
    cast = copy.deepcopy(head).to(case.dtype)

    def compiled() -> Run:
        # Else what was compiled for other shapes is kept, made dynamic, and at the eighth given up for eager.
        torch.compiler.reset()
        mode = "max-autotune" if v.is_cuda else "default"
        return torch.compile(WithText(EagerHead(cast), t), mode=mode, dynamic=False)

    yield "authors", lambda: WithText(AuthorsFailureProbability(cast), t)
    yield "eager", lambda: WithText(EagerHead(cast), t)
    yield "compile", compiled
    yield "sdpa", lambda: WithText(AttentionHead(cast), t)
    if case.dtype == torch.float32:
        yield "onnxruntime", lambda: onnx_session(EagerHead(cast), v, t)

    def answer(x: Tensor) -> tuple[Tensor, Tensor]:
        out = fused_head(x, folded)
        return out.failure_probability, out.class_index

    yield "fused" if v.is_cuda else "folded", lambda: answer


def onnx_session(module: nn.Module, v: Tensor, t: Tensor) -> Run:
    """The eager head with its text embeddings, exported and run by ONNX Runtime (CUDA where it can)."""
    import onnxruntime

    wanted, settings = "CPUExecutionProvider", {}
    if v.is_cuda:
        # On this stream, where the events are; tf32 would fail the gate, and is this provider's default.
        wanted = "CUDAExecutionProvider"
        settings = {"use_tf32": "0", "user_compute_stream": str(torch.cuda.current_stream().cuda_stream)}
    if wanted not in onnxruntime.get_available_providers():
        raise RuntimeError(f"onnxruntime has no {wanted}")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        path = f"{folder}/head.onnx"
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.cpu().eval(), (v.cpu(), t.cpu()), path, dynamo=True, verbose=False,
            input_names=["v", "t"], output_names=["p", "i"],
        )  # fmt: skip
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(path, options, providers=[(wanted, settings)])
        if session.get_providers()[0] != wanted:
            raise RuntimeError(f"onnxruntime could not start its {wanted}")
    how = onnxruntime.RunOptions()
    if v.is_cuda:  # else every run ends by waiting for the GPU, and the wait would be counted as the GPU's
        how.add_run_config_entry("disable_synchronize_execution_providers", "1")
    module.to(v.device)
    binding = session.io_binding()
    where = (v.device.type, v.device.index or 0)
    binding.bind_input("t", *where, np.float32, tuple(t.shape), t.data_ptr())
    p = torch.empty(len(v), device=v.device)
    i = torch.empty(len(v), dtype=torch.int64, device=v.device)
    binding.bind_output("p", *where, np.float32, tuple(p.shape), p.data_ptr())
    binding.bind_output("i", *where, np.int64, tuple(i.shape), i.data_ptr())

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        binding.bind_input("v", *where, np.float32, tuple(x.shape), x.data_ptr())
        session.run_with_iobinding(binding, how)
        return p, i

    return run


class Exact(NamedTuple):
    """float64 answers of a case's first images: at most 16, so that a million classes stay affordable."""

    failure: Tensor
    similarity: Tensor

    @staticmethod
    def of(head: ViLUHead, v: Tensor, t: Tensor) -> Exact:
        exact, x, rows = copy.deepcopy(head).double(), v[:16].double(), t.double()
        with torch.no_grad():
            return Exact(exact.failure_probability(x, rows), x @ rows.T)

    def error(self, run: Run, v: Tensor) -> float:
        """Largest error of P(failure); infinite where CLIP's prediction differs although its lead is clear."""
        failure, index = (column[:16] for column in run(v))
        lead = self.similarity.amax(1) - self.similarity.gather(1, index[:, None]).squeeze(1)
        if not torch.isfinite(failure).all() or (lead > 2 * torch.finfo(v.dtype).eps).any():
            return math.inf
        same = index == self.similarity.argmax(1)
        return float((failure.double() - self.failure)[same].abs().max()) if same.any() else math.inf
