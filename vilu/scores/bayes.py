"""BayesVLM: a Laplace posterior over CLIP's two projection matrices, carried through the cosine to the answer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vilu.embeddings import BLOCK, Embeddings
from vilu.errors import UserError
from vilu.scores.base import Score, probabilities


@dataclass(frozen=True)
class Posterior:
    """The covariance A⁻¹ ⊗ B⁻¹ of one projection matrix, in the form that predictions need.

    a_root: (P, P) with a_root a_rootᵀ = A⁻¹.
    b_diagonal: (D,), the diagonal of B⁻¹.
    prior_precision: λ.
    """

    a_root: Tensor
    b_diagonal: Tensor
    prior_precision: float

    def variance(self, activation: Tensor) -> Tensor:
        """The variance (N, D) of each output of the projection, (aᵀ A⁻¹ a) (B⁻¹)_ii, for activations (N, P)."""
        if activation.shape[1] != len(self.a_root):
            raise UserError(f"BayesVLM was fitted on activations {len(self.a_root)} wide, got {activation.shape[1]}")
        root = self.a_root.to(activation.device)
        return (activation @ root).square().sum(dim=1, keepdim=True) * self.b_diagonal.to(activation.device)


class BayesVLM(Score):
    """The probability of CLIP's answer, with the uncertainty of its two projection matrices integrated out.

    With un-normalised outputs μ (image) and ν (text), their variances S and T (`Posterior.variance`),
    N_s = Σ μ² + S and N_t = Σ ν² + T (ProbCosine):

        mean = s · Σ μν / √(N_s N_t)      var = s² · Σ [(μ² + S) T + S ν²] / (N_s N_t)
        confidence = softmax(mean / √(1 + π/8 · var))[argmax_j v · t_j]

    Posterior precision of a projection: (√τ A + √λ I) ⊗ (√τ B + √λ I), A = Σ a aᵀ / √n from its inputs,
    B = Σ H / √n from the Gauss-Newton blocks H of InfoNCE at its outputs (`gauss_newton`).
    Both `fit` and `confidence` need `Embeddings` with activation and output. Fit it on image-text pairs
    (labels None); with labels, each image is paired with its class's text.

    Args:
        pseudo_data: τ, the number of pairs that the posterior counts as.
        prior_precision: λ for both matrices; None: for each matrix, the λ with the highest marginal likelihood.
        candidates: number of pairs compared with each other, the K of InfoNCE; the last group may be smaller.

    Raises:
        UserError: an option out of range, or embeddings without activation and output.

    Reference: Baumann et al., "Post-hoc Probabilistic Vision-Language Models" (arXiv 2412.06014), sections
    3.2 and 3.3, with the diagonal covariance of its code.
    """

    name = "BayesVLM"
    needs_fit = True

    def __init__(
        self, pseudo_data: float = 10.0, prior_precision: float | None = None, candidates: int = 32768
    ) -> None:
        for label, value in (("pseudo_data", pseudo_data), ("prior_precision", prior_precision)):
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"BayesVLM: {label} must be positive and finite, got {value}")
        if candidates < 2:
            raise UserError(f"BayesVLM: candidates must be at least 2, got {candidates}")
        self.pseudo_data = pseudo_data
        self.prior_precision = prior_precision
        self.candidates = candidates

    def _fit(self, image: Embeddings, labels: Tensor | None, text: Embeddings, scale: float) -> None:
        if len(image) < 2:
            raise UserError(f"BayesVLM needs at least 2 pairs, got {len(image)}")
        own = text if labels is None else text[labels]
        self.image_posterior = self._posterior(image, own, scale, "image")
        self.text_posterior = self._posterior(own, image, scale, "text")

    def _posterior(self, source: Embeddings, target: Embeddings, scale: float, side: str) -> Posterior:
        activation, output = (part.double() for part in _projection(source, side))
        directions = target.normalised.double()
        count = len(output)
        b = torch.zeros(output.shape[1], output.shape[1], dtype=torch.float64, device=output.device)
        for i in range(0, count, self.candidates):
            group = slice(i, i + self.candidates)
            for rows in output[group].split(BLOCK):
                b += gauss_newton(rows, directions[group], scale)
        gram = activation.T @ activation
        a_values, a_vectors = _eigen(gram / math.sqrt(count))
        b_values, b_vectors = _eigen(b / math.sqrt(count))
        prior = self.prior_precision
        if prior is None:
            # The layer has no bias: its smallest weight matrix that maps these inputs to these outputs.
            weight = torch.linalg.pinv(gram, hermitian=True) @ (activation.T @ output)
            prior = best_prior_precision(a_values, b_values, float(weight.square().sum()), self.pseudo_data)
        a_values = math.sqrt(self.pseudo_data) * a_values + math.sqrt(prior)
        b_values = math.sqrt(self.pseudo_data) * b_values + math.sqrt(prior)
        return Posterior(
            a_root=(a_vectors / a_values.sqrt()).float(),
            b_diagonal=(b_vectors.square() / b_values).sum(dim=1).float(),
            prior_precision=prior,
        )

    def _confidence(self, image: Embeddings, text: Embeddings, scale: float) -> Tensor:
        mean, variance = self.prob_cosine(image, text, scale)
        answer = (image.normalised @ text.normalised.T).argmax(dim=-1, keepdim=True)
        p = torch.softmax(mean / torch.sqrt(1 + math.pi / 8 * variance), dim=-1)
        return p.gather(1, answer).squeeze(1)

    def prob_cosine(self, image: Embeddings, text: Embeddings, scale: float) -> tuple[Tensor, Tensor]:
        """The mean and the variance of the logits, each (B, K)."""
        a, mu = _projection(image, "image")
        c, nu = _projection(text, "text")
        s, t = self.image_posterior.variance(a), self.text_posterior.variance(c)
        second_s, second_t = mu.square() + s, nu.square() + t
        norm = second_s.sum(dim=1, keepdim=True) * second_t.sum(dim=1)
        mean = scale * (mu @ nu.T) / norm.sqrt()
        return mean, scale**2 * (second_s @ t.T + s @ nu.square().T) / norm


def gauss_newton(output: Tensor, directions: Tensor, scale: float) -> Tensor:
    """Σ_i J_i Tᵀ(diag(p_i) − p_i p_iᵀ)T J_i · scale², the Gauss-Newton block (D, D) of InfoNCE at the outputs.

    J_i = (I − u_i u_iᵀ) / |x_i| is the Jacobian of x / |x|, u_i = x_i / |x_i|, p_i = softmax(scale · T u_i).
    The sum is multiplied out into matrix products over the batch, so that no (B, D, D) tensor is formed.

    Args:
        output: (B, D), un-normalised, x_i.
        directions: (K, D), L2-normalised rows of T, the candidates.
        scale: CLIP's logit scale.
    """
    norm = output.norm(dim=1, keepdim=True)
    u = output / norm
    p = probabilities(u, directions, scale)
    weight = norm.pow(-2)
    mean = p @ directions
    # m_i = M_i u_i and u_iᵀ M_i u_i, with M_i = Tᵀ(diag(p_i) − p_i p_iᵀ)T
    m = (p * (u @ directions.T)) @ directions - mean * (mean * u).sum(dim=1, keepdim=True)
    along = (u * m).sum(dim=1, keepdim=True)
    middle = (directions * (weight * p).sum(dim=0)[:, None]).T @ directions - (weight * mean).T @ mean
    cross = (weight * u).T @ m
    return scale**2 * (middle - cross - cross.T + (weight * along * u).T @ u)


def best_prior_precision(a_values: Tensor, b_values: Tensor, weight_norm: float, pseudo_data: float) -> float:
    """The λ in [1e-4, 1e8] with the highest Laplace marginal likelihood.

    log p(λ) = ½ [P D log λ − λ |W|² − log det((√τ A + √λ I) ⊗ (√τ B + √λ I))] + constant, with
    log det(X ⊗ Y) = D log det X + P log det Y.

    Args:
        a_values: (P,), eigenvalues of A.
        b_values: (D,), eigenvalues of B.
        weight_norm: |W|², the squared Frobenius norm of the projection matrix.
        pseudo_data: τ.
    """
    from scipy.optimize import minimize_scalar

    root = math.sqrt(pseudo_data)
    size_a, size_b = len(a_values), len(b_values)

    def negative(log_prior: float) -> float:
        prior = math.exp(log_prior)
        log_det = size_b * (root * a_values + math.sqrt(prior)).log().sum()
        log_det = log_det + size_a * (root * b_values + math.sqrt(prior)).log().sum()
        return float(log_det) + prior * weight_norm - size_a * size_b * log_prior

    return math.exp(minimize_scalar(negative, bounds=(math.log(1e-4), math.log(1e8)), method="bounded").x)


def _projection(embeddings: Embeddings, side: str) -> tuple[Tensor, Tensor]:
    if embeddings.activation is None or embeddings.output is None:
        raise UserError(f"BayesVLM needs the {side} projection's inputs and outputs: give Embeddings that hold them")
    if (embeddings.output == 0).all(dim=1).any():
        raise UserError(f"BayesVLM: an {side} output is zero and has no direction")
    return embeddings.activation, embeddings.output


def _eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, not below 0, and eigenvectors of a symmetric positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return values.clamp(min=0), vectors
