"""The head's graph for an open vocabulary: the candidates are its input, so one run answers over many label sets.

Requests of one batch bring different candidates. All candidates lie one set after another in TEXT_EMBEDDINGS (N, D);
row b of CANDIDATES (B, 2) names the first row of image b's set and the row after its last. The image's answer is the
same as if the other rows were absent.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from vilu.export.graphs import ANSWER, write_graph
from vilu.head import log_odds
from vilu.kernels import FoldedHead


class OpenVocabularyGraph(nn.Module):
    """IMAGE_EMBEDDING (B, D), TEXT_EMBEDDINGS (N, D), CANDIDATES (B, 2) int64 -> the answer, four outputs (B, 1).

    CLASS_INDEX is a row of the N; CONFIDENCE, FAILURE_PROBABILITY and ACCEPT are as HeadGraph's. Every image needs a
    candidate.

    Raises:
        ValueError: the head is folded over one class set; its layout must be "plain".
    """

    def __init__(self, folded: FoldedHead, threshold: float) -> None:
        super().__init__()
        if folded.layout != "plain":
            raise ValueError("an open vocabulary needs a head folded with layout='plain', without a class set")
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


def write_open_vocabulary(folded: FoldedHead, threshold: float, path: Path) -> None:
    """Write the graph as an ONNX file, for any B and N.

    Args:
        folded: the head, with layout "plain".
        threshold: answers with a lower failure probability are accepted.
        path: MODEL/VERSION/NAME.onnx.
    """
    t = folded.text_embeddings
    examples = (t[:1].repeat(3, 1), t[:1].repeat(4, 1), torch.tensor([[0, 4]] * 3))
    write_graph(
        OpenVocabularyGraph(folded, threshold),
        examples,
        path,
        ("IMAGE_EMBEDDING", "TEXT_EMBEDDINGS", "CANDIDATES"),
        {name: [1] for name in ANSWER if name != "LABEL"},
        axes=("batch", "classes", "batch"),
    )
