"""The fused head: CLIP's answer, its scores and P(failure) in one pass over the bank (folding.py is the reference).

For one image v and bank rows t_j, with s_j = v · t_j:

    p = softmax(logit_scale · s)                         CLIP's own answer
    α = softmax(u · t_j), u = query_map v                u · t_j = v · key_j in a folded bank,
                                                         attention_scale · s_j without projections
    h = W_1v v + W_1p t_pred + (W_1a W_V) Σ α_j t_j + b  folded: predicted[pred] and Σ α_j attended_j
    P(failure) = sigmoid(MLP(relu(h)) + prior · log((1 - max p) / max p))

Both softmaxes run online. With m the running maximum of x = logit_scale · s, the state of p is

    r = Σ e^{x-m} over all rows but one that reaches m, so l = Σ e^{x-m} = 1 + r, and r is exact where p rounds to 1
    l2 = Σ e^{2(x-m)},  le = Σ e^{x-m} (x-m),  best = max s,  index (the lowest that reaches best)

and when m rises by g: r ← e^{-g} (1 + r), l2 ← e^{-2g} l2, le ← e^{-g} (le - g l). From it, max p = 1 / l, Σ p² =
l2 / l², Σ p log p = le / l - log l, log((1 - max p) / max p) = log r. A state of no row yet has m = LOWEST and r = 0,
and e^{-g} = 0 forgets it. The attention keeps (m, l, Σ e^{x-m} value_j). States of disjoint rows merge by the same
rule, so the rows may be cut anywhere; the cut depends on shapes alone, and no sum is made by atomics, so a run
repeats bit for bit.

`attend_image` (one program per image and split of the rows; one launch): every row slot of a tile keeps a state of its
own, merged once at the end, so the loop has no exchange between rows. W_1v v is spread over the splits. The last
split to arrive merges and runs the MLP. Images may have row ranges of their own (`offsets`).

`attend_tile` and `combine` (batches): a tile of images shares each tile of rows through the tensor cores and leaves its
states in scratch; `combine` merges them and runs the MLP, 16 images a program. It is a second launch because a scan
program's registers hold (BLOCK_M, D) sums: run by the last scan program to arrive, the MLP would have one program
per BLOCK_M images, where now it has several and reads the weights from L2 on more multiprocessors at once.

Scratch, float32: `STATE` numbers for every (image, split), then the attention's sums for every (image, split), then
the MLP's activations for every image. Where u is formed in the kernel (plain bank with projections), it waits
in the program's own row of sums, which nothing else needs before the end.
"""

# Triton reads these functions as its own language: tuples grow by +, and l is the formula's letter.
# ruff: noqa: B007, E741, RUF005
# mypy: disable-error-code="assignment"

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from vilu.head import LOWEST_LOG_ODDS
from vilu.kernels.plan import Variant, plan_launches, tuned

INTERPRETED = triton.knobs.runtime.interpret

if INTERPRETED:
    # Triton 3.6 interprets a scalar as an array of one element, which NumPy 2.4 refuses as a loop bound.
    _patch = interpreter._patch_lang_tensor

    def _patch_with_index(tensor: Any, scope: Any) -> None:
        _patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = _patch_with_index

STATE = tl.constexpr(8)
LOWEST = tl.constexpr(-1e38)  # below any logit, and finite: a difference of two is never NaN
FAR = tl.constexpr(0x7FFFFFFF)
LEAST_ODDS = tl.constexpr(math.exp(LOWEST_LOG_ODDS))

# The interpreter keeps bfloat16 as its bits, and multiplies them as integers in tl.dot.
WIDEN = tl.constexpr(INTERPRETED)


@triton.jit
def _dot(a: tl.tensor, b: tl.tensor, acc: tl.tensor) -> tl.tensor:
    """acc + a @ b in float32: float32 factors stay float32, which at scale 100 tf32 would not survive."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _merge(m: tl.tensor, r: tl.tensor, l2: tl.tensor, le: tl.tensor, best: tl.tensor, index: tl.tensor) -> tl.tensor:
    """One state of p from the many in vectors [N]."""
    slot = tl.arange(0, m.shape[0])
    top = tl.max(m, 0)
    g = top - m
    c = tl.exp(-g)
    l = tl.where(m > LOWEST, 1 + r, 0.0)
    holder = tl.min(tl.where(m == top, slot, FAR), 0)
    others = tl.sum(tl.where(slot == holder, r, c * l), 0)
    win = tl.max(best, 0)
    first = tl.min(tl.where(best == win, index, FAR), 0)
    return top, others, tl.sum(c * c * l2, 0), tl.sum(c * (le - g * l), 0), win, first


@triton.jit
def _step(x: tl.tensor, live: tl.tensor, m: tl.tensor, r: tl.tensor, l2: tl.tensor, le: tl.tensor) -> tl.tensor:
    """The state of p after one more logit in every slot that is live."""
    top = tl.maximum(m, tl.where(live, x, LOWEST))
    g = top - m
    c = tl.exp(-g)
    d = tl.where(live, x - top, 0.0)
    e = tl.where(live, tl.exp(d), 0.0)
    return top, tl.where(g > 0, c * (1 + r), r + e), c * c * l2 + e * e, c * (le - g * (1 + r)) + e * d


@triton.jit
def _scores(
    scores: tl.tensor,
    index: tl.tensor,
    row: tl.tensor,
    mask: tl.tensor,
    rows: tl.tensor,
    n: tl.tensor,
    finite: tl.tensor,
    logit: tl.tensor,
    prior: tl.tensor,
    r: tl.tensor,
    l2: tl.tensor,
    le: tl.tensor,
    first: tl.tensor,
) -> tl.tensor:
    """Write one image's answer, or a block's: NaN and class 0 where the image is not finite or has no class."""
    nan = float("nan")
    good = finite & (n > 0)
    logit += prior * tl.log(tl.maximum(r, LEAST_ODDS))
    l = 1 + r
    g = l2 / (l * l)
    spread = tl.where(n > 1, tl.log(tl.maximum(n, 2).to(tl.float32)), 1.0)
    tl.store(scores + row, tl.where(good, 1.0 / (1.0 + tl.exp(-logit)), nan), mask)
    tl.store(scores + rows + row, tl.where(good, 1.0 / l, nan), mask)
    tl.store(scores + 2 * rows + row, tl.where(good, (le / l - tl.log(l)) / spread, nan), mask)
    tl.store(scores + 3 * rows + row, tl.where(good, -(1.0 - g) / g, nan), mask)
    tl.store(index + row, tl.where(good, first, 0).to(index.dtype.element_ty), mask)


@triton.jit
def _relu(x: tl.tensor) -> tl.tensor:
    # Not maximum(x, 0), which would turn NaN into 0.
    return tl.where(x < 0, 0.0, x)


@triton.jit
def _matvec(
    b_x: tl.tensor,
    w: tl.tensor,
    y: tl.tensor,
    lo: tl.tensor,
    hi: tl.tensor,
    N_IN: tl.constexpr,
    TILE: tl.constexpr,
    ADD: tl.constexpr,
) -> tl.tensor:
    """y[lo:hi] (+)= w[lo:hi] @ x: x in registers, y in scratch and visible to the whole program on return."""
    PAD: tl.constexpr = triton.next_power_of_2(N_IN)
    BLOCK: tl.constexpr = max(TILE // PAD, 1)
    k = tl.arange(0, PAD)
    for r in range(lo, hi, BLOCK):
        o = r + tl.arange(0, BLOCK)
        m = o < hi
        # [BLOCK, PAD]
        b_w = tl.load(w + o[:, None] * N_IN + k[None, :], m[:, None] & (k < N_IN)[None, :], 0.0)
        b_y = tl.sum(b_w.to(tl.float32) * b_x[None, :], 1)
        if ADD:
            b_y += tl.load(y + o, m, 0.0)
        tl.store(y + o, b_y, m)
    tl.debug_barrier()


@triton.jit
def _tile_dot(
    acc: tl.tensor,
    p_x: tl.tensor,
    m_x: tl.tensor,
    w: tl.tensor,
    o: tl.tensor,
    m_o: tl.tensor,
    N_IN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
) -> tl.tensor:
    """acc [BLOCK_M, BLOCK_N] + x @ w[o].T, for rows of x at pointers p_x [BLOCK_M] and rows o [BLOCK_N] of w."""
    d = tl.arange(0, BLOCK_D)
    for k in tl.range(0, N_IN, BLOCK_D, num_stages=STAGES):
        m_d = k + d < N_IN
        # [BLOCK_M, BLOCK_D], [BLOCK_D, BLOCK_N]
        b_x = tl.load(p_x[:, None] + k + d[None, :], m_x[:, None] & m_d[None, :], 0.0)
        b_w = tl.load(w + o[None, :] * N_IN + k + d[:, None], m_o[None, :] & m_d[:, None], 0.0)
        acc = _dot(b_x.to(w.dtype.element_ty), b_w, acc)
    return acc


@triton.jit(do_not_specialize=["K"])
def attend_image(
    v: tl.tensor, t: tl.tensor, query: tl.tensor, predicted: tl.tensor, attended: tl.tensor, packed: tl.tensor,
    offsets: tl.tensor, scratch: tl.tensor, arrived: tl.tensor, scores: tl.tensor, index: tl.tensor,
    K: tl.tensor, logit_scale: tl.tensor, attention_scale: tl.tensor, prior: tl.tensor,
    D: tl.constexpr, WIDTHS: tl.constexpr, HIDDEN: tl.constexpr, OFFSETS: tl.constexpr,
    IMAGE: tl.constexpr, PREDICTED: tl.constexpr, ATTENDED: tl.constexpr,
    PROJECTED: tl.constexpr, FOLDED: tl.constexpr, RAGGED: tl.constexpr,
    TILE: tl.constexpr, MAX_SPLITS: tl.constexpr, STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """Grid (images, splits).

    v (B, D); t (K, D); query: keys (K, D) when FOLDED, else query_map (D, D); predicted, attended (K, H) when
    FOLDED; packed, OFFSETS: FoldedHead.packed and its offsets; offsets (B + 1) when RAGGED; arrived (B,) int32, all
    zero before and after; scores (4, B); index (B,) int64. TILE: elements of a tile of rows.
    """
    i_b = tl.program_id(0).to(tl.int64)
    i_s = tl.program_id(1).to(tl.int64)
    n_b = tl.num_programs(0).to(tl.int64)
    n_s = tl.num_programs(1)

    H: tl.constexpr = WIDTHS[0]
    HP: tl.constexpr = triton.next_power_of_2(H)
    DP: tl.constexpr = triton.next_power_of_2(D)
    W: tl.constexpr = H if FOLDED else D
    WP: tl.constexpr = triton.next_power_of_2(W)
    WS: tl.constexpr = (W + 15) // 16 * 16
    BLOCK: tl.constexpr = max(TILE // max(DP, WP), 1)
    d = tl.arange(0, DP)
    c_w = tl.arange(0, WP)
    h = tl.arange(0, HP)
    m_d = d < D

    p_state = scratch + (i_b * n_s + i_s) * STATE
    p_sums = scratch + n_b * n_s * STATE + (i_b * n_s + i_s) * WS
    p_hidden = scratch + n_b * n_s * (STATE + WS) + i_b * HIDDEN

    if RAGGED:
        begin = tl.maximum(tl.load(offsets + i_b).to(tl.int64), 0)
        end = tl.minimum(tl.load(offsets + i_b + 1).to(tl.int64), K.to(tl.int64))
    else:
        begin = tl.zeros((), tl.int64)
        end = begin + K
    n = end - begin
    share = tl.cdiv(tl.cdiv(n, n_s), BLOCK) * BLOCK
    lo = begin + i_s * share
    hi = tl.minimum(lo + share, end)

    b_v = tl.load(v + i_b * D + d, m_d, 0.0).to(t.dtype.element_ty).to(tl.float32)  # [DP]
    b_u = b_v
    if ATTENDED and PROJECTED and not FOLDED:
        _matvec(b_v, query, p_sums, 0, D, D, TILE, False)
        b_u = tl.load(p_sums + d, m_d, 0.0)
        tl.debug_barrier()
    if IMAGE:
        rows = tl.cdiv(H, n_s)
        _matvec(b_v, packed + OFFSETS[0], p_hidden, i_s * rows, tl.minimum(i_s * rows + rows, H), D, TILE, False)

    slot = tl.arange(0, BLOCK)
    b_m = tl.full((BLOCK,), LOWEST, tl.float32)
    b_r = tl.zeros((BLOCK,), tl.float32)
    b_l2 = tl.zeros((BLOCK,), tl.float32)
    b_le = tl.zeros((BLOCK,), tl.float32)
    b_best = tl.full((BLOCK,), float("-inf"), tl.float32)
    b_index = tl.full((BLOCK,), FAR, tl.int32)
    b_ma = tl.full((BLOCK,), LOWEST, tl.float32)
    b_la = tl.zeros((BLOCK,), tl.float32)
    b_sum = tl.zeros((BLOCK, WP), tl.float32)
    for k in tl.range(lo, hi, BLOCK, num_stages=STAGES):
        row = k + slot
        live = row < hi
        # [BLOCK, DP]
        b_t = tl.load(t + row[:, None] * D + d[None, :], live[:, None] & m_d[None, :], 0.0).to(tl.float32)
        b_s = tl.sum(b_t * b_v[None, :], 1)
        better = live & (b_s > b_best)
        b_best = tl.where(better, b_s, b_best)
        b_index = tl.where(better, (row - begin).to(tl.int32), b_index)
        b_m, b_r, b_l2, b_le = _step(b_s * logit_scale, live, b_m, b_r, b_l2, b_le)
        if ATTENDED:
            if PROJECTED and FOLDED:
                b_k = tl.load(query + row[:, None] * D + d[None, :], live[:, None] & m_d[None, :], 0.0)
                b_a = tl.sum(b_k.to(tl.float32) * b_v[None, :], 1)
            elif PROJECTED:
                b_a = tl.sum(b_t * b_u[None, :], 1)
            else:
                b_a = b_s * attention_scale
            if FOLDED:
                m_a = live[:, None] & (c_w < W)[None, :]
                b_x = tl.load(attended + row[:, None] * W + c_w[None, :], m_a, 0.0).to(tl.float32)
            else:
                b_x = b_t
            top = tl.maximum(b_ma, tl.where(live, b_a, LOWEST))
            rise = tl.exp(b_ma - top)
            e = tl.where(live, tl.exp(tl.where(live, b_a - top, 0.0)), 0.0)
            b_la = b_la * rise + e
            b_sum = b_sum * rise[:, None] + e[:, None] * b_x
            b_ma = top

    m, r, l2, le, best, first = _merge(b_m, b_r, b_l2, b_le, b_best, b_index)
    tl.store(p_state, m)
    tl.store(p_state + 1, r)
    tl.store(p_state + 2, l2)
    tl.store(p_state + 3, le)
    tl.store(p_state + 4, best)
    tl.store(p_state + 5, first.to(tl.float32, bitcast=True))
    if ATTENDED:
        ma = tl.max(b_ma, 0)
        scale = tl.exp(b_ma - ma)
        tl.store(p_state + 6, ma)
        tl.store(p_state + 7, tl.sum(b_la * scale, 0))
        tl.store(p_sums + c_w, tl.sum(b_sum * scale[:, None], 0), c_w < W)

    # The barrier orders every thread's stores before the one thread's release; the acquire does the same for
    # the loads of whichever program comes last.
    tl.debug_barrier()
    if tl.atomic_add(arrived + i_b, 1, sem="acq_rel", scope="gpu") == n_s - 1:
        tl.store(arrived + i_b, 0)
        split = tl.arange(0, MAX_SPLITS)
        m_s = split < n_s
        p_states = scratch + (i_b * n_s + split) * STATE
        l_m = tl.load(p_states, m_s, LOWEST)
        l_r = tl.load(p_states + 1, m_s, 0.0)
        l_l2 = tl.load(p_states + 2, m_s, 0.0)
        l_le = tl.load(p_states + 3, m_s, 0.0)
        l_best = tl.load(p_states + 4, m_s, float("-inf"))
        l_index = tl.load(p_states + 5, m_s, 0.0).to(tl.int32, bitcast=True)
        l_index = tl.where(m_s, l_index, FAR)
        m, r, l2, le, best, first = _merge(l_m, l_r, l_l2, l_le, l_best, l_index)
        # A row of NaN never beats the first: keep the address inside the bank, the answer is NaN anyway.
        first = tl.where(first == FAR, 0, first)
        pred = tl.minimum(begin + first, K - 1)

        b_h = tl.load(packed + OFFSETS[3] + h, h < H, 0.0).to(tl.float32)  # [HP]
        if IMAGE:
            b_h += tl.load(p_hidden + h, h < H, 0.0)
            tl.debug_barrier()
        if ATTENDED:
            l_ma = tl.load(p_states + 6, m_s, LOWEST)
            ma = tl.max(l_ma, 0)
            la = tl.sum(tl.exp(l_ma - ma) * tl.load(p_states + 7, m_s, 0.0), 0)
            CHUNK: tl.constexpr = max(TILE // WP, 1)
            b_z = tl.zeros((WP,), tl.float32)
            for s in range(0, n_s, CHUNK):
                o = s + tl.arange(0, CHUNK)
                p_o = scratch + n_b * n_s * STATE + (i_b * n_s + o) * WS
                m_o = o < n_s
                fade = tl.exp(tl.load(scratch + (i_b * n_s + o) * STATE + 6, m_o, LOWEST) - ma)
                b_o = tl.load(p_o[:, None] + c_w[None, :], m_o[:, None] & (c_w < W)[None, :], 0.0)
                b_z += tl.sum(b_o * fade[:, None], 0)
            b_z = b_z / la
            if FOLDED:
                b_h += b_z
            else:
                _matvec(b_z, packed + OFFSETS[2], p_hidden, 0, H, D, TILE, False)
        if PREDICTED:
            if FOLDED:
                b_h += tl.load(predicted + pred * H + h, h < H, 0.0).to(tl.float32)
            else:
                b_p = tl.load(t + pred * D + d, m_d, 0.0).to(tl.float32)
                _matvec(b_p, packed + OFFSETS[1], p_hidden, 0, H, D, TILE, ATTENDED)
        if (ATTENDED or PREDICTED) and not FOLDED:
            b_h += tl.load(p_hidden + h, h < H, 0.0)

        p_y = p_hidden + (H + 15) // 16 * 16
        for i in tl.static_range(1, len(WIDTHS) - 1):
            o = tl.arange(0, triton.next_power_of_2(WIDTHS[i]))
            _matvec(_relu(b_h), packed + OFFSETS[2 * i + 2], p_y, 0, WIDTHS[i], WIDTHS[i - 1], TILE, False)
            b_h = tl.load(p_y + o, o < WIDTHS[i], 0.0)
            b_h += tl.load(packed + OFFSETS[2 * i + 3] + o, o < WIDTHS[i], 0.0).to(tl.float32)
            p_y += (WIDTHS[i] + 15) // 16 * 16
        o = tl.arange(0, triton.next_power_of_2(WIDTHS[len(WIDTHS) - 2]))
        m_o = o < WIDTHS[len(WIDTHS) - 2]
        b_w = tl.load(packed + OFFSETS[2 * len(WIDTHS)] + o, m_o, 0.0).to(tl.float32)
        logit = tl.sum(_relu(b_h) * b_w, 0) + tl.load(packed + OFFSETS[2 * len(WIDTHS) + 1]).to(tl.float32)
        finite = tl.min((tl.abs(b_v) < float("inf")).to(tl.int32), 0) > 0
        _scores(scores, index, i_b, True, n_b, n, finite, logit, prior, r, l2, le, first)


@triton.jit(do_not_specialize=["B", "K"])
def attend_tile(
    v: tl.tensor, t: tl.tensor, query: tl.tensor, attended: tl.tensor, scratch: tl.tensor,
    B: tl.tensor, K: tl.tensor, logit_scale: tl.tensor, attention_scale: tl.tensor,
    D: tl.constexpr, WIDTHS: tl.constexpr,
    ATTENDED: tl.constexpr, PROJECTED: tl.constexpr, FOLDED: tl.constexpr, SHARED_SOFTMAX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr,
    RESIDENT: tl.constexpr, STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """Grid (tiles of BLOCK_M images, splits). Arguments as in `attend_image`.

    SHARED_SOFTMAX: the attention weights equal CLIP's probabilities, so one softmax serves both.

    RESIDENT: the images' tile stays on the chip and a plain bank's tile is read once for both products, which
    needs tensor cores that take their factors from shared memory (then BLOCK_W = BLOCK_D); else both are read
    again, chunk by chunk, from L1 and L2.
    """
    i_m = tl.program_id(0).to(tl.int64)
    i_s = tl.program_id(1).to(tl.int64)
    n_s = tl.num_programs(1)
    dtype: tl.constexpr = t.dtype.element_ty

    W: tl.constexpr = WIDTHS[0] if FOLDED else D
    WS: tl.constexpr = (W + 15) // 16 * 16
    ND: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    NW: tl.constexpr = (W + BLOCK_W - 1) // BLOCK_W if ATTENDED else 0
    d = tl.arange(0, BLOCK_D)
    c_w = tl.arange(0, BLOCK_W)
    c_n = tl.arange(0, BLOCK_N)
    b = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_b = b < B
    state = (b * n_s + i_s) * STATE
    sums = n_s.to(tl.int64) * B * STATE + (b * n_s + i_s) * WS

    share = tl.cdiv(tl.cdiv(K, n_s), BLOCK_N) * BLOCK_N
    lo = i_s * share
    hi = tl.minimum(lo + share, K)

    p_v = v + b * D
    p_u = scratch + sums
    if ATTENDED and PROJECTED and not FOLDED:
        for r in range(0, D, BLOCK_D):
            o = r + d
            b_u = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
            b_u = _tile_dot(b_u, p_v, m_b, query, o, o < D, D, BLOCK_D, STAGES)
            tl.store(p_u[:, None] + o[None, :], b_u, m_b[:, None] & (o < D)[None, :])
        tl.debug_barrier()
    b_v = ()
    b_u = ()
    if RESIDENT:
        for i in tl.static_range(ND):
            o = i * BLOCK_D + d
            m_v = m_b[:, None] & (o < D)[None, :]
            b_v = b_v + (tl.load(p_v[:, None] + o[None, :], m_v, 0.0).to(dtype),)
            if ATTENDED and PROJECTED and not FOLDED:
                b_u = b_u + (tl.load(p_u[:, None] + o[None, :], m_v, 0.0).to(dtype),)

    b_m = tl.full((BLOCK_M,), LOWEST, tl.float32)
    b_r = tl.zeros((BLOCK_M,), tl.float32)
    b_l2 = tl.zeros((BLOCK_M,), tl.float32)
    b_le = tl.zeros((BLOCK_M,), tl.float32)
    b_best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    b_index = tl.full((BLOCK_M,), FAR, tl.int32)
    b_ma = tl.full((BLOCK_M,), LOWEST, tl.float32)
    b_la = tl.zeros((BLOCK_M,), tl.float32)
    b_sum = ()
    for i in tl.static_range(NW):
        b_sum = b_sum + (tl.zeros((BLOCK_M, BLOCK_W), tl.float32),)
    for k in tl.range(lo, hi, BLOCK_N, num_stages=STAGES if RESIDENT else 1):
        row = k + c_n
        live = row < hi
        m_l = live[None, :]
        b_t = ()
        b_s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if RESIDENT:
            for i in tl.static_range(ND):
                o = i * BLOCK_D + d
                # [BLOCK_N, BLOCK_D]
                b_c = tl.load(t + row[:, None] * D + o[None, :], live[:, None] & (o < D)[None, :], 0.0)
                b_s = _dot(b_v[i], tl.trans(b_c), b_s)
                b_t = b_t + (b_c,)
        else:
            b_s = _tile_dot(b_s, p_v, m_b, t, row, live, D, BLOCK_D, STAGES)

        b_c = tl.where(m_l, b_s, float("-inf"))
        win = tl.max(b_c, 1)
        first = tl.min(tl.where(b_c == win[:, None], row.to(tl.int32)[None, :], FAR), 1)
        rises = win > b_best
        b_index = tl.where(rises, first, b_index)
        b_best = tl.maximum(win, b_best)
        b_x = b_s * logit_scale
        top = tl.maximum(b_m, tl.max(tl.where(m_l, b_x, LOWEST), 1))
        g = top - b_m
        c = tl.exp(-g)
        d_x = tl.where(m_l, b_x - top[:, None], 0.0)
        e = tl.where(m_l, tl.exp(d_x), 0.0)
        b_le = c * (b_le - g * (1 + b_r)) + tl.sum(e * d_x, 1)
        others = tl.sum(tl.where(row.to(tl.int32)[None, :] == first[:, None], 0.0, e), 1)
        b_r = others + tl.where(rises, c * (1 + b_r), b_r + tl.exp(win * logit_scale - top))
        b_l2 = c * c * b_l2 + tl.sum(e * e, 1)
        b_m = top

        if ATTENDED:
            if not SHARED_SOFTMAX:
                if PROJECTED:
                    b_a = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                    if FOLDED and not RESIDENT:
                        b_a = _tile_dot(b_a, p_v, m_b, query, row, live, D, BLOCK_D, STAGES)
                    elif not RESIDENT:
                        b_a = _tile_dot(b_a, p_u, m_b, t, row, live, D, BLOCK_D, STAGES)
                    else:
                        for i in tl.static_range(ND):
                            if FOLDED:
                                o = i * BLOCK_D + d
                                p_k = query + row[:, None] * D + o[None, :]
                                b_k = tl.load(p_k, live[:, None] & (o < D)[None, :], 0.0)
                                b_a = _dot(b_v[i], tl.trans(b_k), b_a)
                            else:
                                b_a = _dot(b_u[i], tl.trans(b_t[i]), b_a)
                else:
                    b_a = b_s * attention_scale
                top = tl.maximum(b_ma, tl.max(tl.where(m_l, b_a, LOWEST), 1))
                c = tl.exp(b_ma - top)
                e = tl.where(m_l, tl.exp(tl.where(m_l, b_a - top[:, None], 0.0)), 0.0)
                b_la = b_la * c + tl.sum(e, 1)
                b_ma = top
            new = ()
            for i in tl.static_range(NW):
                o = i * BLOCK_W + c_w
                # [BLOCK_N, BLOCK_W]
                if FOLDED:
                    p_w = attended + row[:, None] * W + o[None, :]
                    b_w = tl.load(p_w, live[:, None] & (o < W)[None, :], 0.0)
                elif RESIDENT:
                    b_w = b_t[i]
                else:
                    b_w = tl.load(t + row[:, None] * D + o[None, :], live[:, None] & (o < D)[None, :], 0.0)
                new = new + (_dot(e.to(dtype), b_w, b_sum[i] * c[:, None]),)
            b_sum = new

    if SHARED_SOFTMAX:
        b_ma = b_m
        b_la = 1 + b_r
    # The sums take the place of u, which a slower warp may still be reading.
    tl.debug_barrier()
    p_state = scratch + state
    tl.store(p_state, b_m, m_b)
    tl.store(p_state + 1, b_r, m_b)
    tl.store(p_state + 2, b_l2, m_b)
    tl.store(p_state + 3, b_le, m_b)
    tl.store(p_state + 4, b_best, m_b)
    tl.store(p_state + 5, b_index.to(tl.float32, bitcast=True), m_b)
    if ATTENDED:
        tl.store(p_state + 6, b_ma, m_b)
        tl.store(p_state + 7, b_la, m_b)
    for i in tl.static_range(NW):
        o = i * BLOCK_W + c_w
        tl.store(p_u[:, None] + o[None, :], b_sum[i], m_b[:, None] & (o < W)[None, :])


@triton.jit(do_not_specialize=["B", "K", "n_s"])
def combine(
    v: tl.tensor, t: tl.tensor, predicted: tl.tensor, packed: tl.tensor, scratch: tl.tensor,
    scores: tl.tensor, index: tl.tensor, B: tl.tensor, K: tl.tensor, n_s: tl.tensor, prior: tl.tensor,
    D: tl.constexpr, WIDTHS: tl.constexpr, HIDDEN: tl.constexpr, OFFSETS: tl.constexpr,
    IMAGE: tl.constexpr, PREDICTED: tl.constexpr, ATTENDED: tl.constexpr, FOLDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """Grid (tiles of BLOCK_M images,): merge the n_s states of `attend_tile`, then the MLP."""
    dtype: tl.constexpr = t.dtype.element_ty
    H: tl.constexpr = WIDTHS[0]
    W: tl.constexpr = H if FOLDED else D
    WS: tl.constexpr = (W + 15) // 16 * 16
    d = tl.arange(0, BLOCK_D)
    c_n = tl.arange(0, BLOCK_N)
    b = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_b = b < B
    n_state = B.to(tl.int64) * n_s
    p_hidden = scratch + n_state * (STATE + WS) + b * HIDDEN

    m = tl.full((BLOCK_M,), LOWEST, tl.float32)
    r = tl.zeros((BLOCK_M,), tl.float32)
    l2 = tl.zeros((BLOCK_M,), tl.float32)
    le = tl.zeros((BLOCK_M,), tl.float32)
    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    first = tl.full((BLOCK_M,), FAR, tl.int32)
    ma = tl.full((BLOCK_M,), LOWEST, tl.float32)
    la = tl.zeros((BLOCK_M,), tl.float32)
    for s in range(n_s):
        p_s = scratch + (b * n_s + s) * STATE
        m_s = tl.load(p_s, m_b, LOWEST)
        r_s = tl.load(p_s + 1, m_b, 0.0)
        top = tl.maximum(m, m_s)
        g = top - m
        g_s = top - m_s
        c = tl.exp(-g)
        c_s = tl.exp(-g_s)
        le = c * (le - g * (1 + r)) + c_s * (tl.load(p_s + 3, m_b, 0.0) - g_s * (1 + r_s))
        r = tl.where(g > 0, c * (1 + r) + r_s, r + c_s * (1 + r_s))
        l2 = c * c * l2 + c_s * c_s * tl.load(p_s + 2, m_b, 1.0)
        m = top
        best_s = tl.load(p_s + 4, m_b, 0.0)
        index_s = tl.load(p_s + 5, m_b, 0.0).to(tl.int32, bitcast=True)
        # Splits come in the order of their rows, so an equal later one never wins.
        first = tl.where(best_s > best, index_s, first)
        best = tl.maximum(best_s, best)
        if ATTENDED:
            top = tl.maximum(ma, tl.load(p_s + 6, m_b, LOWEST))
            la = la * tl.exp(ma - top)
            ma = top
            la += tl.exp(tl.load(p_s + 6, m_b, LOWEST) - top) * tl.load(p_s + 7, m_b, 1.0)
    first = tl.where(first == FAR, 0, first)

    # z takes the place of the first split's sums.
    p_z = scratch + n_state * STATE + b * n_s * WS
    if ATTENDED:
        for k in range(0, W, BLOCK_D):
            m_d = m_b[:, None] & (k + d < W)[None, :]
            b_z = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
            for s in range(n_s):
                scale = tl.exp(tl.load(scratch + (b * n_s + s) * STATE + 6, m_b, LOWEST) - ma)
                b_z += tl.load(p_z[:, None] + s * WS + k + d[None, :], m_d, 0.0) * scale[:, None]
            tl.store(p_z[:, None] + k + d[None, :], b_z / la[:, None], m_d)
        tl.debug_barrier()

    for k in range(0, H, BLOCK_N):
        o = k + c_n
        m_o = o < H
        m_h = m_b[:, None] & m_o[None, :]
        b_h = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if IMAGE:
            b_h = _tile_dot(b_h, v + b * D, m_b, packed + OFFSETS[0], o, m_o, D, BLOCK_D, STAGES)
        if PREDICTED:
            pred = first.to(tl.int64)
            if FOLDED:
                b_h += tl.load(predicted + pred[:, None] * H + o[None, :], m_h, 0.0).to(tl.float32)
            else:
                b_h = _tile_dot(b_h, t + pred * D, m_b, packed + OFFSETS[1], o, m_o, D, BLOCK_D, STAGES)
        if ATTENDED:
            if FOLDED:
                b_h += tl.load(p_z[:, None] + o[None, :], m_h, 0.0)
            else:
                b_h = _tile_dot(b_h, p_z, m_b, packed + OFFSETS[2], o, m_o, D, BLOCK_D, STAGES)
        b_h += tl.load(packed + OFFSETS[3] + o, m_o, 0.0).to(tl.float32)[None, :]
        tl.store(p_hidden[:, None] + o[None, :], _relu(b_h), m_h)
    tl.debug_barrier()

    for i in tl.static_range(1, len(WIDTHS) - 1):
        step = (WIDTHS[i - 1] + 15) // 16 * 16
        for k in range(0, WIDTHS[i], BLOCK_N):
            o = k + c_n
            m_o = o < WIDTHS[i]
            b_h = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            b_h = _tile_dot(b_h, p_hidden, m_b, packed + OFFSETS[2 * i + 2], o, m_o, WIDTHS[i - 1], BLOCK_D, STAGES)
            b_h += tl.load(packed + OFFSETS[2 * i + 3] + o, m_o, 0.0).to(tl.float32)[None, :]
            tl.store(p_hidden[:, None] + step + o[None, :], _relu(b_h), m_b[:, None] & m_o[None, :])
        tl.debug_barrier()
        p_hidden += step
    LAST: tl.constexpr = WIDTHS[len(WIDTHS) - 2]
    logit = tl.zeros((BLOCK_M,), tl.float32) + tl.load(packed + OFFSETS[2 * len(WIDTHS) + 1]).to(tl.float32)
    for k in range(0, LAST, BLOCK_N):
        m_o = k + c_n < LAST
        b_h = tl.load(p_hidden[:, None] + k + c_n[None, :], m_b[:, None] & m_o[None, :], 0.0)
        b_w = tl.load(packed + OFFSETS[2 * len(WIDTHS)] + k + c_n, m_o, 0.0).to(tl.float32)
        logit += tl.sum(b_h * b_w[None, :], 1)

    ok = tl.full((BLOCK_M,), 1, tl.int32)
    for k in range(0, D, BLOCK_D):
        b_v = tl.load(v + b[:, None] * D + k + d[None, :], m_b[:, None] & (k + d < D)[None, :], 0.0)
        ok = tl.minimum(ok, tl.min((tl.abs(b_v.to(dtype).to(tl.float32)) < float("inf")).to(tl.int32), 1))
    _scores(scores, index, b, m_b, B, K, ok > 0, logit, prior, r, l2, le, first)


KERNELS = {"attend_image": attend_image, "attend_tile": attend_tile, "combine": combine}


@functools.cache
def _device(index: int) -> tuple[int, int]:
    """Compute capability as one number and multiprocessors; a small made-up device under the interpreter."""
    if INTERPRETED:
        return 0, 3
    p = torch.cuda.get_device_properties(index)
    return p.major * 10 + p.minor, p.multi_processor_count


_arrivals: dict[tuple[int, int, int], Tensor] = {}
_spare: dict[int, Tensor] = {}
SPARE = 1 << 16


def _arrived(device: torch.device, images: int) -> Tensor:
    """Counters of arrivals, zero between launches: one set per stream, whose launches never overlap.

    A launch captured in a CUDA graph may be replayed on any stream, so it takes counters that are never given again,
    from spare ones zeroed by the first launch outside a capture (within one, zeroing would be replayed too).
    """
    if INTERPRETED:
        return torch.zeros(images, dtype=torch.int32, device=device)
    place = device.index or 0
    if torch.cuda.is_current_stream_capturing():
        images = -(-images // 4) * 4  # every set at a multiple of 16 bytes, as the compiled kernel expects
        spare = _spare.get(place)
        if spare is None or len(spare) < images:
            return torch.zeros(images, dtype=torch.int32, device=device)
        _spare[place] = spare[images:]
        return spare[:images]
    if place not in _spare:
        _spare[place] = torch.zeros(SPARE, dtype=torch.int32, device=device)
    key = (place, torch.cuda.current_stream(device).cuda_stream, triton.next_power_of_2(images))
    if key not in _arrivals:
        _arrivals[key] = torch.zeros(key[2], dtype=torch.int32, device=device)
    return _arrivals[key]


class Scales(NamedTuple):
    """The numbers of a folded head: CLIP's factor on v · t, the attention's, and the weight of the prior."""

    logit_scale: float
    attention_scale: float
    prior: float


def launch(
    image_embedding: Tensor, tensors: Mapping[str, Tensor | None], variant: Variant, scales: Scales
) -> tuple[Tensor, Tensor]:
    """scores (4, B) float32 (failure_probability, confidence, entropy, doctor) and class_index (B,) int64.

    Args:
        image_embedding: (B, D), contiguous.
        tensors: those of `FoldedHead.kernel_tensors`, and "offsets", (B + 1,) integers or None; all contiguous and on
            the image embedding's device.
    """
    v, t, offsets = image_embedding, tensors["text_embeddings"], tensors["offsets"]
    assert t is not None
    B, K = len(v), len(t)
    scores = torch.empty((4, B), dtype=torch.float32, device=v.device)
    index = torch.empty((B,), dtype=torch.int64, device=v.device)
    arch, multiprocessors = _device(v.device.index or 0)
    ragged = offsets is not None
    plan = plan_launches(variant, B, K, ragged=ragged, settings=tuned(arch, variant), multiprocessors=multiprocessors)
    values = dict(tensors) | {
        "v": v,
        "t": t,
        "scratch": torch.empty((plan.scratch,), dtype=torch.float32, device=v.device),
        "scores": scores,
        "index": index,
        "B": B,
        "K": K,
        "n_s": plan.splits,
        **scales._asdict(),
    }
    shared_softmax = variant.shares_softmax(scales.logit_scale, scales.attention_scale)
    for kernel in plan.kernels:
        function = KERNELS[kernel.name]
        constants = kernel.constants(variant, ragged=ragged, shared_softmax=shared_softmax)
        if "arrived" in function.arg_names:
            values["arrived"] = _arrived(v.device, B)
        arguments = {name: values[name] for name in function.arg_names if name not in constants}
        options = {} if INTERPRETED else {"num_warps": kernel.num_warps, "maxnreg": kernel.registers}
        function[kernel.grid](**arguments, **constants, **options)
    return scores, index
