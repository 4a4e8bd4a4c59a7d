"""The head over candidates that are an input of the graph: many label sets in one run, and what lies behind an answer.

Requests that ride in one batch bring different candidates. Their rows lie one set after another in TEXT_EMBEDDINGS
(N, D), and CANDIDATES (B, 2) says from which row to before which an image is asked about; the others count for nothing,
as rows that are not there. What only some requests ask for is a graph of its own, over one set of rows.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from vilu.export.graphs import ANSWER, write_graph
from vilu.head import log_odds
from vilu.kernels import FoldedHead


class RaggedHeadGraph(nn.Module):
    """IMAGE_EMBEDDING (B, D), TEXT_EMBEDDINGS (N, D), CANDIDATES (B, 2) int64 -> CLASS_INDEX (a row of the N),
    CONFIDENCE, FAILURE_PROBABILITY, ACCEPT, each (B, 1). Every image needs a candidate.

    Raises:
        ValueError: a head that is folded over one class set; its layout must be "plain".
    """

    def __init__(self, folded: FoldedHead, threshold: float) -> None:
        super().__init__()
        if folded.layout != "plain":
            raise ValueError("candidates of each request's own need layout='plain': a folded bank has one class set's")
        self.folded, self.threshold = folded, threshold

    def forward(
        self, image_embedding: Tensor, text_embeddings: Tensor, candidates: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        head, v, t = self.folded, image_embedding, text_embeddings
        row = torch.arange(t.shape[0], device=t.device)
        candidate = (row >= candidates[:, :1]) & (row < candidates[:, 1:])  # (B, N)
        similarity = torch.where(candidate, v @ t.T, -torch.inf)
        index = similarity.argmax(dim=-1)
        confidence = torch.softmax(head.logit_scale * similarity, dim=-1).amax(dim=-1)
        h = head.bias.expand(v.shape[0], -1)
        if head.image_weight is not None:
            h = h + v @ head.image_weight.T
        if head.predicted is not None:
            h = h + t[index] @ head.predicted.T
        if head.attended is not None:
            logits = head.attention_scale * similarity
            if head.query_map is not None:
                logits = torch.where(candidate, v @ head.query_map.T @ t.T, -torch.inf)
            h = h + torch.softmax(logits, dim=-1) @ t @ head.attended.T
        logit = head.tail(h).squeeze(-1)
        if head.prior is not None:
            logit = logit + head.prior * log_odds(head.logit_scale * similarity)
        failure = torch.sigmoid(logit)[:, None]
        return index.int()[:, None], confidence[:, None], failure, failure < self.threshold


def write_ragged(folded: FoldedHead, threshold: float, path: Path) -> None:
    """The graph as an ONNX file, for any B and N."""
    t = folded.text_embeddings
    examples = (t[:1].repeat(3, 1), t[:1].repeat(4, 1), torch.tensor([[0, 4]] * 3))
    write_graph(
        RaggedHeadGraph(folded, threshold),
        examples,
        path,
        ("IMAGE_EMBEDDING", "TEXT_EMBEDDINGS", "CANDIDATES"),
        {name: [1] for name in ANSWER if name != "LABEL"},
        axes=("batch", "classes", "batch"),
    )


class DetailsGraph(nn.Module):
    """IMAGE_EMBEDDING (B, D), TEXT_EMBEDDINGS (K, D) -> PROBABILITIES (B, K), CLIP's own; ATTENTION (B, K), the head's,
    where it attends; ENTROPY and DOCTOR (B, 1), as `vilu.kernels.HeadOutput` defines them.

    Raises:
        ValueError: a head that is folded over one class set; its layout must be "plain".
    """

    def __init__(self, folded: FoldedHead) -> None:
        super().__init__()
        if folded.layout != "plain":
            raise ValueError("candidates of each request's own need layout='plain': a folded bank has one class set's")
        self.folded = folded

    @property
    def outputs(self) -> dict[str, list[int | str]]:
        """Name -> shape without the batch."""
        attention: dict[str, list[int | str]] = {} if self.folded.attended is None else {"ATTENTION": ["classes"]}
        return {"PROBABILITIES": ["classes"], **attention, "ENTROPY": [1], "DOCTOR": [1]}

    def forward(self, image_embedding: Tensor, text_embeddings: Tensor) -> tuple[Tensor, ...]:
        head, v, t = self.folded, image_embedding, text_embeddings
        similarity = v @ t.T
        log_p = torch.log_softmax(head.logit_scale * similarity, dim=-1)
        p = log_p.exp()
        # K is a number of the graph's input; at K = 1 the entropy is 0 over anything.
        spread = torch.full((), t.shape[0], dtype=p.dtype, device=p.device).log().clamp(min=math.log(2))
        g = (p * p).sum(dim=-1, keepdim=True)
        scores = (p * log_p).sum(dim=-1, keepdim=True) / spread, -(1 - g) / g
        if head.attended is None:
            return p, *scores
        logits = head.attention_scale * similarity
        if head.query_map is not None:
            logits = v @ head.query_map.T @ t.T
        return p, torch.softmax(logits, dim=-1), *scores


def write_details(folded: FoldedHead, path: Path) -> None:
    """The graph of what lies behind an answer as an ONNX file, for any B and K."""
    graph, t = DetailsGraph(folded), folded.text_embeddings
    examples = (t[:1].repeat(3, 1), t[:1].repeat(4, 1))
    write_graph(graph, examples, path, ("IMAGE_EMBEDDING", "TEXT_EMBEDDINGS"), graph.outputs)
