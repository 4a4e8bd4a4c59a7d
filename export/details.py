"""The graph of an answer's details: what only some requests ask for, over one set of candidates."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from vilu.export.graphs import write_graph
from vilu.kernels import FoldedHead


class DetailsGraph(nn.Module):
    """IMAGE_EMBEDDING (B, D), TEXT_EMBEDDINGS (K, D) -> PROBABILITIES, ATTENTION (B, K), ENTROPY, DOCTOR (B, 1).

    PROBABILITIES are CLIP's; ATTENTION is the head's, absent where the head has none; ENTROPY and DOCTOR are as
    `vilu.kernels.HeadOutput` defines them.

    Raises:
        ValueError: the head is folded over one class set; its layout must be "plain".
    """

    def __init__(self, folded: FoldedHead) -> None:
        super().__init__()
        if folded.layout != "plain":
            raise ValueError("details need a head folded with layout='plain', without a class set")
        self.folded = folded

    @property
    def outputs(self) -> dict[str, list[int | str]]:
        """Each output's name and shape, without the batch."""
        attention: dict[str, list[int | str]] = {} if self.folded.attended is None else {"ATTENTION": ["classes"]}
        return {"PROBABILITIES": ["classes"], **attention, "ENTROPY": [1], "DOCTOR": [1]}

    def forward(self, image_embedding: Tensor, text_embeddings: Tensor) -> tuple[Tensor, ...]:
        head, v, t = self.folded, image_embedding, text_embeddings
        similarity = v @ t.T
        log_p = torch.log_softmax(head.logit_scale * similarity, dim=-1)
        p = log_p.exp()
        # Entropy is divided by log K, and K is read from the input. At K = 1 it is 0, whatever divides it.
        log_k = torch.full((), t.shape[0], dtype=p.dtype, device=p.device).log().clamp(min=math.log(2))
        g = (p * p).sum(dim=-1, keepdim=True)
        scores = (p * log_p).sum(dim=-1, keepdim=True) / log_k, -(1 - g) / g
        if head.attended is None:
            return p, *scores
        logits = head.attention_scale * similarity
        if head.query_map is not None:
            logits = v @ head.query_map.T @ t.T
        return p, torch.softmax(logits, dim=-1), *scores


def write_details(folded: FoldedHead, path: Path) -> None:
    """Write the graph as an ONNX file, for any B and K. `folded` needs the layout "plain"."""
    graph, t = DetailsGraph(folded), folded.text_embeddings
    examples = (t[:1].repeat(3, 1), t[:1].repeat(4, 1))
    write_graph(graph, examples, path, ("IMAGE_EMBEDDING", "TEXT_EMBEDDINGS"), graph.outputs)
