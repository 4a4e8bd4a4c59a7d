"""Kernels of the second half: combine the splits, then the MLP as small matrix products over (images, outputs).

    z = Σ_j α_j value_j,  h_1 = relu(hidden + W_1p t_pred + (W_1a W_V) z)      plain layout
    h_1 = relu(hidden + predicted[pred] + z)                                    folded layout
    h_i = relu(W_i h_{i-1} + b_i),  P(failure) = sigmoid(W h + b + prior · log((1 - max p) / max p))

Weights do not depend on the kernels before, so the kernels of few images load them before they wait for their inputs.
"""

# Triton reads these functions as its own language; l is the formula's letter.
# ruff: noqa: E741
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from vilu.kernels.softmax_state import (
    ATTENTION_MAX,
    ATTENTION_SUM,
    BEST,
    ENTROPY,
    FAR,
    INDEX,
    LEAST_ODDS,
    LOWEST,
    MAX,
    REST,
    SQUARES,
    merge,
    relu,
    start_dependents,
    tile_dot,
    wait_for_inputs,
)


@triton.jit
def _store_scores(
    scores: tl.tensor, index: tl.tensor, odds: tl.tensor, i_b: tl.tensor, n_b: tl.tensor, n: tl.tensor,
    good: tl.tensor, prior: tl.tensor, r: tl.tensor, l2: tl.tensor, le: tl.tensor, first: tl.tensor,
) -> None:  # fmt: skip
    """Write one image's class, confidence scores and odds; NaN and class 0 where the answer is not good."""
    nan = float("nan")
    l = 1 + r
    g = l2 / (l * l)
    spread = tl.where(n > 1, tl.log(tl.maximum(n, 2).to(tl.float32)), 1.0)
    tl.store(odds + i_b, tl.where(good, prior * tl.log(tl.maximum(r, LEAST_ODDS)), nan))
    tl.store(scores + n_b + i_b, tl.where(good, 1.0 / l, nan))
    tl.store(scores + 2 * n_b + i_b, tl.where(good, (le / l - tl.log(l)) / spread, nan))
    tl.store(scores + 3 * n_b + i_b, tl.where(good, -(1.0 - g) / g, nan))
    tl.store(index + i_b, tl.where(good, first, 0).to(index.dtype.element_ty))


@triton.jit(do_not_specialize=["K", "n_s"])
def combine(
    v: tl.tensor, t: tl.tensor, predicted: tl.tensor, packed: tl.tensor, offsets: tl.tensor,
    state: tl.tensor, sums: tl.tensor, hidden: tl.tensor, t_pred: tl.tensor, z: tl.tensor, y: tl.tensor,
    odds: tl.tensor, scores: tl.tensor, index: tl.tensor, K: tl.tensor, n_s: tl.tensor, prior: tl.tensor,
    D: tl.constexpr, H: tl.constexpr, OFFSETS: tl.constexpr,
    IMAGE: tl.constexpr, PREDICTED: tl.constexpr, ATTENDED: tl.constexpr, FIRST_LAYER: tl.constexpr,
    RAGGED: tl.constexpr, MAX_SPLITS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_S: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
) -> None:  # fmt: skip
    """Merge an image's splits: grid (images, chunks of CHUNK columns and one more program, for the image's scores).

    state (slots, B, n_s) and sums (B, n_s, W) of `attend_*`; hidden (B, H) of `project`; out scores (4, B), index (B,),
    odds (B,) = prior · log((1 - max p) / max p), NaN where the image is not finite or has no class.
    FIRST_LAYER (folded, or an MLP that sees the image alone): y (B, H) = h_1. Else t_pred and z (B, D) for `mlp_layer`.
    All float32, rows at multiples of 16.
    """
    start_dependents(PDL)
    i_b = tl.program_id(0).to(tl.int64)
    n_b = tl.num_programs(0).to(tl.int64)
    W: tl.constexpr = H if FIRST_LAYER else D
    WS: tl.constexpr = (W + 15) // 16 * 16
    o = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    m_o = o < W
    begin = tl.zeros((), tl.int64)
    end = begin + K
    if RAGGED:
        begin = tl.maximum(tl.load(offsets + i_b).to(tl.int64), 0)
        end = tl.minimum(tl.load(offsets + i_b + 1).to(tl.int64), K.to(tl.int64))
    wait_for_inputs(PDL)

    split = tl.arange(0, MAX_SPLITS)
    m_s = split < n_s
    p_state = state + i_b * n_s + split
    n = n_b * n_s
    if tl.program_id(1) == tl.num_programs(1) - 1:
        _, r, l2, le, _, first = merge(
            tl.load(p_state + MAX * n, m_s, LOWEST),
            tl.load(p_state + REST * n, m_s, 0.0),
            tl.load(p_state + SQUARES * n, m_s, 0.0),
            tl.load(p_state + ENTROPY * n, m_s, 0.0),
            tl.load(p_state + BEST * n, m_s, float("-inf")),
            tl.where(m_s, tl.load(p_state + INDEX * n, m_s, 0.0).to(tl.int32, bitcast=True), FAR),
        )
        d = tl.arange(0, triton.next_power_of_2(D))
        b_v = tl.load(v + i_b * D + d, d < D, 0.0).to(t.dtype.element_ty).to(tl.float32)
        good = (tl.min((tl.abs(b_v) < float("inf")).to(tl.int32), 0) > 0) & (end > begin)
        _store_scores(scores, index, odds, i_b, n_b, end - begin, good, prior, r, l2, le, first)
    else:
        if PREDICTED:
            l_best = tl.load(p_state + BEST * n, m_s, float("-inf"))
            l_index = tl.load(p_state + INDEX * n, m_s, 0.0).to(tl.int32, bitcast=True)
            first = tl.min(tl.where(m_s & (l_best == tl.max(l_best, 0)), l_index, FAR), 0)
            # A row of NaN never beats the first: keep the address inside the class set, the answer is NaN anyway.
            first = tl.where(first == FAR, 0, first)
            pred = tl.maximum(tl.minimum(begin + first, K - 1), 0)
        b_z = tl.zeros((CHUNK,), tl.float32)
        if ATTENDED:
            p_max = state + ATTENTION_MAX * n + i_b * n_s
            l_ma = tl.load(p_max + split, m_s, LOWEST)
            ma = tl.max(l_ma, 0)
            la = tl.sum(tl.exp(l_ma - ma) * tl.load(p_state + ATTENTION_SUM * n, m_s, 0.0), 0)
            b_zs = tl.zeros((BLOCK_S, CHUNK), tl.float32)
            for s in tl.range(0, n_s, BLOCK_S, num_stages=STAGES):
                k = s + tl.arange(0, BLOCK_S)
                m_k = k < n_s
                # [BLOCK_S, CHUNK]
                b_x = tl.load(sums + (i_b * n_s + k)[:, None] * WS + o[None, :], m_k[:, None] & m_o[None, :], 0.0)
                b_zs += b_x * tl.exp(tl.load(p_max + k, m_k, LOWEST) - ma)[:, None]
            b_z = tl.sum(b_zs, 0) / la
        if FIRST_LAYER:
            if IMAGE:
                b_h = tl.load(hidden + i_b * WS + o, m_o, 0.0)
            else:
                b_h = tl.load(packed + OFFSETS[3] + o, m_o, 0.0).to(tl.float32)
            if PREDICTED:
                b_h += tl.load(predicted + pred * H + o, m_o, 0.0).to(tl.float32)
            tl.store(y + i_b * WS + o, relu(b_h + b_z), m_o)
        else:
            if PREDICTED:
                tl.store(t_pred + i_b * WS + o, tl.load(t + pred * D + o, m_o, 0.0).to(tl.float32), m_o)
            if ATTENDED:
                tl.store(z + i_b * WS + o, b_z, m_o)


@triton.jit(do_not_specialize=["B"])
def mlp_layer(
    x: tl.tensor, x2: tl.tensor, packed: tl.tensor, hidden: tl.tensor, y: tl.tensor, B: tl.tensor,
    N_IN: tl.constexpr, N_OUT: tl.constexpr, WEIGHT: tl.constexpr, WEIGHT2: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """y = relu(W x + W2 x2 + bias): grid (tiles of BLOCK_M images, tiles of BLOCK_N outputs).

    x, x2 (B, N_IN), hidden and y (B, N_OUT) float32, rows at multiples of 16. WEIGHT, WEIGHT2, BIAS: where the weights
    start in `packed`. WEIGHT2 is None without a second product; BIAS is None where `hidden` takes its place.
    BLOCK_M = 1 multiplies whole rows without tensor cores.
    """
    start_dependents(PDL)
    b = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_b = b < B
    o = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_o = o < N_OUT
    INS: tl.constexpr = (N_IN + 15) // 16 * 16
    b_y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if BIAS is not None:
        b_y += tl.load(packed + BIAS + o, m_o, 0.0).to(tl.float32)[None, :]
    if BLOCK_M == 1:
        k = tl.arange(0, triton.next_power_of_2(N_IN))
        m_k = k < N_IN
        # [BLOCK_N, N_IN]
        b_w = tl.load(packed + WEIGHT + o[:, None] * N_IN + k[None, :], m_o[:, None] & m_k[None, :], 0.0)
        if WEIGHT2 is not None:
            b_w2 = tl.load(packed + WEIGHT2 + o[:, None] * N_IN + k[None, :], m_o[:, None] & m_k[None, :], 0.0)
        wait_for_inputs(PDL)
        b_x = tl.load(x + b[:, None] * INS + k[None, :], m_k[None, :], 0.0)
        b_p = b_w.to(tl.float32) * b_x
        if WEIGHT2 is not None:
            b_p += b_w2.to(tl.float32) * tl.load(x2 + b[:, None] * INS + k[None, :], m_k[None, :], 0.0)
        b_y += tl.sum(b_p, 1)[None, :]
    else:
        wait_for_inputs(PDL)
        b_y = tile_dot(b_y, x + b * INS, m_b, packed + WEIGHT, o, m_o, N_IN, BLOCK_D, STAGES)
        if WEIGHT2 is not None:
            b_y = tile_dot(b_y, x2 + b * INS, m_b, packed + WEIGHT2, o, m_o, N_IN, BLOCK_D, STAGES)
    p_y = b[:, None] * ((N_OUT + 15) // 16 * 16) + o[None, :]
    m_y = m_b[:, None] & m_o[None, :]
    if BIAS is None:
        b_y += tl.load(hidden + p_y, m_y, 0.0)
    tl.store(y + p_y, relu(b_y), m_y)


@triton.jit(do_not_specialize=["B"])
def mlp_output(
    x: tl.tensor, packed: tl.tensor, odds: tl.tensor, scores: tl.tensor, B: tl.tensor,
    N_IN: tl.constexpr, N_HIDDEN: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    OUT_WEIGHT: tl.constexpr, OUT_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """scores[0] = sigmoid(w · relu(W x + bias) + out_bias + odds): grid (tiles of BLOCK_M images,).

    x (B, N_IN) float32, rows at multiples of 16. WEIGHT, BIAS: the last hidden layer (N_HIDDEN, N_IN) in `packed`, or
    None where x is its output. OUT_WEIGHT, OUT_BIAS: the output layer.
    """
    start_dependents(PDL)
    b = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_b = b < B
    INS: tl.constexpr = (N_IN + 15) // 16 * 16
    o = tl.arange(0, triton.next_power_of_2(N_HIDDEN))
    m_o = o < N_HIDDEN
    w_out = tl.load(packed + OUT_WEIGHT + o, m_o, 0.0).to(tl.float32)
    b_out = tl.load(packed + OUT_BIAS).to(tl.float32)
    if WEIGHT is None:
        wait_for_inputs(PDL)
        b_h = tl.load(x + b[:, None] * INS + o[None, :], m_b[:, None] & m_o[None, :], 0.0)
    else:
        wait_for_inputs(PDL)
        b_h = tl.zeros((BLOCK_M, o.shape[0]), tl.float32) + tl.load(packed + BIAS + o, m_o, 0.0).to(tl.float32)[None, :]
        b_h = relu(tile_dot(b_h, x + b * INS, m_b, packed + WEIGHT, o, m_o, N_IN, BLOCK_D, STAGES))
    logit = tl.sum(b_h * w_out[None, :], 1) + b_out + tl.load(odds + b, m_b, 0.0)
    tl.store(scores + b, 1.0 / (1.0 + tl.exp(-logit)), m_b)
