"""The attention of large batches over large class sets in 16 bits, as two matrix products of their own.

    a = [v; u] · t_j                    `score_tile`: CLIP's softmax state, and weights w_j = 2^{a_j - base} in scratch
    sums = Σ 2^{base - last} w_j value_j    `sum_tile`

`attend_tile` keeps the weights on the chip, but there an image's sums share the registers with both scores, so its
tiles are small. Here each product has a tile of 128 x 256, and the tensor cores of 9.0 read its factors from shared
memory (wgmma). The price is the weights' way through scratch. Logits are in units of log 2 here, and a base, a tile's
running maximum, is rounded up to a whole number: the factors between bases are powers of two and round nothing.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from vilu.kernels.softmax_state import (
    FAR,
    INTERPRETED,
    LOWEST,
    AttentionState,
    State,
    aligned,
    clear_counters,
    dot,
    empty_state,
    start_dependents,
    store_attention,
    store_state,
    wait_for_inputs,
)

LOG2_E = tl.constexpr(1 / math.log(2))
LOG_2 = tl.constexpr(math.log(2))
DEAD = tl.constexpr(-1e30)  # the similarity of a row beyond the class set; its logit is finite too


@triton.jit
def _exp2(x: tl.tensor) -> tl.tensor:
    """2^x in one instruction: results below float32's normal numbers are 0."""
    if INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _natural(x: tl.tensor) -> tl.tensor:
    """A maximum in units of log 2 as a logit; LOWEST, of no row, stays."""
    return tl.where(x > LOWEST, x * LOG_2, LOWEST)


@triton.jit
def _update_scores(b_state: State, b_s: tl.tensor, c_n: tl.tensor, start: tl.tensor) -> State:
    """The states after similarities b_s [BLOCK_M, BLOCK_N], as in `_update_tile`, but in units of log 2."""
    win = tl.max(b_s, 1)
    first = tl.min(tl.where(b_s == win[:, None], c_n[None, :], FAR), 1)
    rises = win > b_state.best
    top = tl.maximum(b_state.m, win)
    g = top - b_state.m
    c = _exp2(-g)
    d = b_s - top[:, None]
    e = _exp2(d)
    others = tl.sum(tl.where(c_n[None, :] == first[:, None], 0.0, e), 1)
    le = c * (b_state.le - g * (1 + b_state.r)) + tl.sum(e * d, 1)
    r = others + tl.where(rises, c * (1 + b_state.r), b_state.r + _exp2(win - top))
    l2 = c * c * b_state.l2 + tl.sum(e * e, 1)
    best = tl.maximum(win, b_state.best)
    return State(top, r, l2, le, best, tl.where(rises, start + first, b_state.argmax))


@triton.jit(do_not_specialize=["B", "K"])
def score_tile(
    x: tl.tensor, t: tl.tensor, query: tl.tensor, weights: tl.tensor, bases: tl.tensor, state: tl.tensor,
    counters: tl.tensor, B: tl.tensor, K: tl.tensor, logit_scale: tl.tensor, attention_scale: tl.tensor,
    D: tl.constexpr, PROJECTED: tl.constexpr, FOLDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """Softmax states, and the attention's weights: grid (2 x tiles of images, splits).

    The first half of the programs multiplies v with t, for CLIP's state; the second half u with t (v with the keys in
    the folded layout, v with t without projections), for the attention's state, weights and bases.
    B and K are rounded up to whole tiles in x (2, B, D), v and u in t's type, rows `aligned` (`project`), and
    in what goes out: weights (K / BLOCK_N, B, BLOCK_N) in t's type, 0 beyond K, and bases (K / BLOCK_N, B) float32.
    state is as in `attend_tile`.
    """
    start_dependents(PDL)
    QUERY: tl.constexpr = PROJECTED and not FOLDED
    dtype: tl.constexpr = t.dtype.element_ty
    ND: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    DP: tl.constexpr = aligned(D)
    tiles = tl.num_programs(0) // 2
    attends = tl.program_id(0) >= tiles
    i_m = (tl.program_id(0) % tiles).to(tl.int64)
    i_s = tl.program_id(1)
    n_s = tl.num_programs(1)
    c_m = tl.arange(0, BLOCK_M)
    c_n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    m_b = i_m * BLOCK_M + c_m < B
    rows = tiles.to(tl.int64) * BLOCK_M
    tile = tl.zeros((), tl.int64) + BLOCK_N * D
    n_k = tl.cdiv(K, BLOCK_N)
    share = tl.cdiv(n_k, n_s)
    lo = i_s * share
    hi = tl.minimum(lo + share, n_k)
    # Addresses are a scalar and offsets that are constant in a thread, which cost it no registers in the loop.
    p_x = x.to(tl.pointer_type(dtype), bitcast=True) + i_m * BLOCK_M * DP
    p_w = weights.to(tl.pointer_type(dtype), bitcast=True) + i_m * BLOCK_M * BLOCK_N
    p_t = t
    factor = attention_scale
    if QUERY:
        p_x += tl.where(attends, rows, 0) * DP
    elif PROJECTED:
        p_t = tl.where(attends, query, t)
    if PROJECTED:
        factor = 1.0
    scale = tl.where(attends, factor, logit_scale) * LOG2_E

    b_state = empty_state((BLOCK_M,))  # of the attention, m and r alone: its maximum and sum
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    wait_for_inputs(PDL)
    # Triton turns zeros that it knows of into a select in every step, for which every step would wait for its product.
    zero = tl.minimum(tl.maximum(logit_scale, 0.0), 0.0)
    # One loop over all chunks of all tiles, so that loads stay in flight while a tile's scores are used.
    for i in tl.range(lo * ND, hi * ND, num_stages=STAGES):
        j = i // ND
        o = i % ND * BLOCK_D
        left = K - j * BLOCK_N  # rows from the tile's first to the class set's end
        m_d = o + d < D
        b_x = tl.load(p_x + o + (c_m[:, None] * DP + d[None, :]), m_b[:, None] & m_d[None, :], 0.0)
        p_row = p_t + j * tile + o
        b_t = tl.load(p_row + (c_n[:, None] * D + d[None, :]), (c_n < left)[:, None] & m_d[None, :], 0.0)
        acc = dot(b_x, tl.trans(b_t), acc)
        if i % ND == ND - 1:
            b_s = acc * scale + tl.where(c_n < left, 0.0, DEAD)[None, :]
            acc = tl.full((BLOCK_M, BLOCK_N), zero, tl.float32)
            if attends:
                top = tl.maximum(b_state.m, tl.ceil(tl.max(b_s, 1)))
                e = _exp2(b_s - top[:, None])
                r = b_state.r * _exp2(b_state.m - top) + tl.sum(e, 1)
                b_state = State(top, r, b_state.l2, b_state.le, b_state.best, b_state.argmax)
                tl.store(p_w + j * rows * BLOCK_N + (c_m[:, None] * BLOCK_N + c_n[None, :]), e.to(dtype))
                tl.store(bases + j * rows + i_m * BLOCK_M + c_m, top)
            else:
                b_state = _update_scores(b_state, b_s, c_n, j * BLOCK_N)

    b = i_m * BLOCK_M + c_m
    place = b * n_s + i_s
    n = B.to(tl.int64) * n_s
    if attends:
        store_attention(state, place, n, m_b, AttentionState(_natural(b_state.m), b_state.r))
    else:
        m = _natural(b_state.m)
        le = b_state.le * LOG_2
        store_state(state, place, n, m_b, State(m, b_state.r, b_state.l2, le, b_state.best, b_state.argmax))
        if i_s == 0:
            clear_counters(counters, b, m_b)


@triton.jit(do_not_specialize=["B", "K"])
def sum_tile(
    t: tl.tensor, attended: tl.tensor, weights: tl.tensor, bases: tl.tensor, sums: tl.tensor,
    B: tl.tensor, K: tl.tensor,
    W: tl.constexpr, FOLDED: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """sums (B, splits, W) float32 of the weights times the values, relative to the split's last base.

    Grid (tiles of BLOCK_M images x tiles of BLOCK_N columns, splits as in `score_tile`, whose BLOCK_N is TILE). BLOCK_D
    rows of values at once, attended (K, W) in the folded layout, else t (K, D).
    """
    start_dependents(PDL)
    dtype: tl.constexpr = t.dtype.element_ty
    NW: tl.constexpr = (W + BLOCK_N - 1) // BLOCK_N
    i_s = tl.program_id(1)
    n_s = tl.num_programs(1)
    i_m = (tl.program_id(0) // NW).to(tl.int64) * BLOCK_M
    c_m = tl.arange(0, BLOCK_M)
    c_d = tl.arange(0, BLOCK_D)
    c_n = tl.arange(0, BLOCK_N)
    i_o = tl.program_id(0) % NW * BLOCK_N
    o = i_o + c_n
    m_o = o < W
    n_k = tl.cdiv(K, TILE)
    share = tl.cdiv(n_k, n_s)
    lo = i_s * share
    hi = tl.minimum(lo + share, n_k)
    rows = tl.cdiv(B, ROWS).to(tl.int64) * ROWS
    p_w = weights.to(tl.pointer_type(dtype), bitcast=True) + i_m * TILE
    p_base = bases + i_m + c_m
    values = attended if FOLDED else t
    width = tl.zeros((), tl.int64) + W
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    wait_for_inputs(PDL)
    for k in tl.range(lo * TILE, hi * TILE, BLOCK_D, num_stages=STAGES):
        j = k // TILE
        b_w = tl.load(p_w + j * (rows - 1) * TILE + k + (c_m[:, None] * TILE + c_d[None, :]))
        p_row = values + k * width + i_o
        b_t = tl.load(p_row + (c_d[:, None] * W + c_n[None, :]), (k + c_d < K)[:, None] & m_o[None, :], 0.0)
        acc = dot(b_w, b_t, acc)
        if (k + BLOCK_D) % TILE == 0:  # the next tile's weights are relative to its own base
            f = tl.load(p_base + j * rows) - tl.load(p_base + tl.minimum(j + 1, hi - 1) * rows)
            acc = acc * _exp2(f)[:, None]
    b = i_m + c_m
    m_b = b < B
    p_o = sums + (b * n_s + i_s)[:, None] * aligned(W) + o[None, :]
    tl.store(p_o, acc, m_b[:, None] & m_o[None, :])
