"""Kernels of the first half: project the images, then attend to the class set, split over programs.

    u = query_map v                               plain layout with projections; otherwise no kernel needs u
    hidden = W_1v v + b_1                         the image's share of the MLP's first layer
    α = softmax(u · t_j)                          u · t_j = v · key_j in the folded layout,
                                                  attention_scale · v · t_j without projections
    sums = Σ e^{u·t_j - max} value_j              value_j = t_j, or attended_j in the folded layout

Every program of `attend_image`, and of `attend_tile` (tile_attention.py), leaves its rows' softmax state
(softmax_state.py) and sums in scratch; `tail` (mlp.py) merges them. The split depends on shapes alone, and nothing is
summed by atomics, so a run repeats bit for bit.
"""

# Triton reads these functions as its own language.
# ruff: noqa: SIM102
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from vilu.kernels.softmax_state import (
    LOWEST,
    AttentionState,
    aligned,
    clear_counters,
    empty_attention,
    empty_state,
    merge,
    row_sum,
    row_tile,
    start_dependents,
    store_attention,
    store_state,
    tile_dot,
    update,
    wait_for_inputs,
)


@triton.jit
def _project_rows(
    v: tl.tensor, w: tl.tensor, bias: tl.tensor, y: tl.tensor, b: tl.tensor, m_b: tl.tensor, o: tl.tensor,
    D: tl.constexpr, N_OUT: tl.constexpr, BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr, SLICES: tl.constexpr,
) -> None:  # fmt: skip
    """y[b, o] = w[o] @ v[b] (+ bias[o]), for images b [BLOCK_M] and outputs o [BLOCK_N]."""
    m_o = o < N_OUT
    b_y = tl.zeros((BLOCK_M, o.shape[0]), tl.float32)
    if BLOCK_M == 1:
        k = tl.arange(0, triton.next_power_of_2(D))
        # [BLOCK_N, D]
        b_w = tl.load(w + o[:, None] * D + k[None, :], m_o[:, None] & (k < D)[None, :], 0.0).to(tl.float32)
        b_v = tl.load(v + b[:, None] * D + k[None, :], (k < D)[None, :], 0.0)
        b_y += tl.sum(b_w * b_v.to(w.dtype.element_ty).to(tl.float32), 1)[None, :]
    else:
        b_y = tile_dot(b_y, v + b * D, m_b, w + o * D, m_o, D, BLOCK_D, STAGES, SLICES)
    if BIAS:
        b_y += tl.load(bias + o, m_o, 0.0).to(tl.float32)[None, :]
    tl.store(y + b[:, None] * aligned(N_OUT) + o[None, :], b_y, m_b[:, None] & m_o[None, :])


@triton.jit(do_not_specialize=["B"])
def project(
    v: tl.tensor, query: tl.tensor, packed: tl.tensor, u: tl.tensor, hidden: tl.tensor, x: tl.tensor, B: tl.tensor,
    D: tl.constexpr, H: tl.constexpr, OFFSETS: tl.constexpr, IMAGE: tl.constexpr, QUERY: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
    SLICES: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """u = query_map v where QUERY, and hidden = W_1v v + b_1 where IMAGE.

    Grid (tiles of BLOCK_M images, tiles of BLOCK_N outputs of u, then of hidden). v (B, D); query (D, D); u (B, D) and
    hidden (B, H) float32, rows `aligned`. BLOCK_M = 1 multiplies whole rows without tensor cores.
    ROWS is the BLOCK_M of a `score_tile` that follows, else 0. For it v and then u go to its x, in the weights' type
    and each padded to a multiple of ROWS rows; the grid's first programs copy v.
    """
    start_dependents(PDL)
    b = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_b = b < B
    i_n = tl.program_id(1)
    c_n = tl.arange(0, BLOCK_N)
    NV: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N if ROWS else 0
    NQ: tl.constexpr = NV + ((D + BLOCK_N - 1) // BLOCK_N if QUERY else 0)
    y = u
    if ROWS:
        DP: tl.constexpr = aligned(D)
        p_x = x.to(tl.pointer_type(packed.dtype.element_ty), bitcast=True)
        y = p_x + tl.cdiv(B, ROWS).to(tl.int64) * ROWS * DP
        if i_n < NV:
            o = i_n * BLOCK_N + c_n
            m_v = m_b[:, None] & (o < D)[None, :]
            tl.store(p_x + b[:, None] * DP + o[None, :], tl.load(v + b[:, None] * D + o[None, :], m_v, 0.0), m_v)
    if QUERY:
        if (i_n >= NV) & (i_n < NQ):
            o = (i_n - NV) * BLOCK_N + c_n
            _project_rows(v, query, packed, y, b, m_b, o, D, D, False, BLOCK_M, BLOCK_D, STAGES, SLICES)
    if IMAGE:
        if i_n >= NQ:
            o = (i_n - NQ) * BLOCK_N + c_n
            w = packed + OFFSETS[0]
            _project_rows(v, w, packed + OFFSETS[3], hidden, b, m_b, o, D, H, True, BLOCK_M, BLOCK_D, STAGES, SLICES)


@triton.jit(do_not_specialize=["K"])
def attend_image(
    v: tl.tensor, t: tl.tensor, query: tl.tensor, attended: tl.tensor, offsets: tl.tensor, u: tl.tensor,
    state: tl.tensor, sums: tl.tensor, counters: tl.tensor, K: tl.tensor,
    logit_scale: tl.tensor, attention_scale: tl.tensor,
    D: tl.constexpr, W: tl.constexpr,
    ATTENDED: tl.constexpr, PROJECTED: tl.constexpr, FOLDED: tl.constexpr, RAGGED: tl.constexpr,
    TILE: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """One image per program: grid (images, splits). A tile of the class set has TILE elements.

    v (B, D); t (K, D); query: keys (K, D) when FOLDED; attended (K, W) when FOLDED; offsets (B + 1,) when RAGGED;
    u (B, D) float32; out state (slots, B, splits) and sums (B, splits, W) float32, rows of u and sums `aligned`.
    Every row slot of a tile keeps a state of its own, and they merge once at the end. Tiles are [BLOCK, chunks, L] (see
    `row_tile`). The counters (B, COUNTERS) are zeroed for `tail`.
    """
    start_dependents(PDL)
    i_b = tl.program_id(0).to(tl.int64)
    i_s = tl.program_id(1).to(tl.int64)
    n_b = tl.num_programs(0).to(tl.int64)
    n_s = tl.num_programs(1)

    DP: tl.constexpr = triton.next_power_of_2(D)
    WP: tl.constexpr = triton.next_power_of_2(W)
    BLOCK: tl.constexpr = max(TILE // max(DP, WP), 1)
    LANES: tl.constexpr = 512 // (t.dtype.element_ty.primitive_bitwidth // 8)  # a warp's numbers, at 16 bytes a lane
    L: tl.constexpr = min(DP, LANES)
    LW: tl.constexpr = min(WP, LANES)
    slot = tl.arange(0, BLOCK)

    begin = tl.zeros((), tl.int64)
    end = begin + K
    if RAGGED:
        begin = tl.maximum(tl.load(offsets + i_b).to(tl.int64), 0)
        end = tl.minimum(tl.load(offsets + i_b + 1).to(tl.int64), K.to(tl.int64))
    share = tl.cdiv(tl.cdiv(end - begin, n_s), BLOCK) * BLOCK
    lo = begin + i_s * share
    hi = tl.minimum(lo + share, end)

    # Every slot has the image's numbers beside its own, so that no warp asks another: [BLOCK, DP / L, L].
    b_v = row_tile(v + i_b * D + 0 * slot, slot >= 0, D, L).to(t.dtype.element_ty).to(tl.float32)
    # `tail` waits for this kernel alone, so this one waits for `project`: first where it reads u, else last.
    QUERY: tl.constexpr = ATTENDED and PROJECTED and not FOLDED
    if QUERY:
        wait_for_inputs(PDL)
    if i_s == 0:
        clear_counters(counters, i_b + tl.arange(0, 1), tl.arange(0, 1) == 0)
    b_u = b_v
    if QUERY:
        b_u = row_tile(u + i_b * aligned(D) + 0 * slot, slot >= 0, D, L)

    b_state = empty_state((BLOCK,))
    b_attention = empty_attention((BLOCK,))
    b_sum = tl.zeros((BLOCK, WP // LW, LW), tl.float32)
    for k in tl.range(lo, hi, BLOCK, num_stages=STAGES):
        row = k + slot
        live = row < hi
        b_t = row_tile(t + row * D, live, D, L).to(tl.float32)
        b_s = row_sum(b_t * b_v)
        b_state = update(b_state, b_s, (row - begin).to(tl.int32), live, logit_scale)
        if ATTENDED:
            b_a = b_s * attention_scale
            if PROJECTED and FOLDED:
                b_a = row_sum(row_tile(query + row * D, live, D, L).to(tl.float32) * b_v)
            elif PROJECTED:
                b_a = row_sum(b_t * b_u)
            b_x = b_t
            if FOLDED:
                b_x = row_tile(attended + row * W, live, W, LW).to(tl.float32)
            top = tl.maximum(b_attention.ma, tl.where(live, b_a, LOWEST))
            c = tl.exp(b_attention.ma - top)
            e = tl.where(live, tl.exp(tl.where(live, b_a - top, 0.0)), 0.0)
            b_attention = AttentionState(top, b_attention.la * c + e)
            b_sum = b_sum * c[:, None, None] + e[:, None, None] * b_x

    if not QUERY:
        wait_for_inputs(PDL)
    merged, attention = merge(b_state, b_attention)
    place = i_b * n_s + i_s
    store_state(state, place, n_b * n_s, True, merged)
    if ATTENDED:
        store_attention(state, place, n_b * n_s, True, attention)
        total = tl.sum(b_sum * tl.exp(b_attention.ma - attention.ma)[:, None, None], 0)  # [WP / LW, LW]
        w = tl.arange(0, WP // LW)[:, None] * LW + tl.arange(0, LW)[None, :]
        tl.store(sums + place * aligned(W) + w, total, w < W)
