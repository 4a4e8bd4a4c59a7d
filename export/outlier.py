"""The graph of the outlier score: how unlike the training images an image is, in one product."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vilu.outlier import Outlier

FILE = "outlier.onnx"  # of every model that gives the score or takes it into ACCEPT
OUTLIER_SCORE = "OUTLIER_SCORE"


class OutlierGraph(nn.Module):
    """IMAGE_EMBEDDING (B, D) -> OUTLIER_SCORE (B, 1), as `vilu.outlier.Outlier` defines it.

    The score is 1 − max_c p_c · w / |w| with w = F (v − m). The rows of F and of P F together, (D + K, D), give w and
    every p_c · w in one product. P F is multiplied in float64 and rounded once.

    Attributes:
        threshold: highest score that counts as inside the class set; None where it was not calibrated.
    """

    mean: Tensor
    weight: Tensor

    def __init__(self, outlier: Outlier) -> None:
        super().__init__()
        self.threshold = outlier.threshold
        factor = outlier.factor.detach().double()
        self.register_buffer("mean", outlier.mean.detach().float().clone())
        self.register_buffer("weight", torch.cat([factor, outlier.prototypes.detach().double() @ factor]).float())

    def forward(self, image_embedding: Tensor) -> Tensor:
        dim = self.mean.shape[0]
        products = (image_embedding - self.mean) @ self.weight.T
        length = torch.linalg.vector_norm(products[:, :dim], dim=1, keepdim=True).clamp(min=1e-12)
        return 1 - products[:, dim:].amax(dim=1, keepdim=True) / length
