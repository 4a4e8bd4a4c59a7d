"""Kernels of the first half: project the image, then attend to the class set, split over programs.

    u = query_map v                               plain layout with projections; otherwise no kernel needs u
    hidden = W_1v v + b_1                         the image's share of the MLP's first layer
    α = softmax(u · t_j)                          u · t_j = v · key_j in the folded layout,
                                                  attention_scale · v · t_j without projections
    sums = Σ e^{u·t_j - max} value_j              value_j = t_j, or attended_j in the folded layout

Every program of `attend_image` and `attend_tile` leaves its rows' softmax state (softmax_state.py) and sums in scratch;
`combine` (mlp.py) merges them. The split depends on shapes alone, and nothing is summed by atomics, so a run
repeats bit for bit.
"""

# Triton reads these functions as its own language: tuples grow by +.
# ruff: noqa: B007, RUF005, SIM102
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from vilu.kernels.softmax_state import (
    FAR,
    LOWEST,
    clear_counters,
    dot,
    merge,
    row_sum,
    row_tile,
    start_dependents,
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
    tl.store(y + b[:, None] * ((N_OUT + 15) // 16 * 16) + o[None, :], b_y, m_b[:, None] & m_o[None, :])


@triton.jit(do_not_specialize=["B"])
def project(
    v: tl.tensor, query: tl.tensor, packed: tl.tensor, u: tl.tensor, hidden: tl.tensor, x: tl.tensor, B: tl.tensor,
    D: tl.constexpr, H: tl.constexpr, OFFSETS: tl.constexpr, IMAGE: tl.constexpr, QUERY: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
    SLICES: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """u = query_map v where QUERY, and hidden = W_1v v + b_1 where IMAGE.

    Grid (tiles of BLOCK_M images, tiles of BLOCK_N outputs of u, then of hidden). v (B, D); query (D, D); u (B, D) and
    hidden (B, H) float32, rows at multiples of 16. BLOCK_M = 1 multiplies whole rows without tensor cores.
    ROWS, for `score_tile`, its BLOCK_M: v, then u go to x (see there) in the weights' type, each padded to a multiple
    of ROWS rows; the first programs copy v.
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
        DP: tl.constexpr = (D + 15) // 16 * 16
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
    u (B, D) float32; out state (slots, B, splits) and sums (B, splits, W) float32, rows at multiples of 16.
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
        b_u = row_tile(u + i_b * ((D + 15) // 16 * 16) + 0 * slot, slot >= 0, D, L)

    b_m = tl.full((BLOCK,), LOWEST, tl.float32)
    b_r = tl.zeros((BLOCK,), tl.float32)
    b_l2 = tl.zeros((BLOCK,), tl.float32)
    b_le = tl.zeros((BLOCK,), tl.float32)
    b_best = tl.full((BLOCK,), float("-inf"), tl.float32)
    b_index = tl.full((BLOCK,), FAR, tl.int32)
    b_ma = tl.full((BLOCK,), LOWEST, tl.float32)
    b_la = tl.zeros((BLOCK,), tl.float32)
    b_sum = tl.zeros((BLOCK, WP // LW, LW), tl.float32)
    for k in tl.range(lo, hi, BLOCK, num_stages=STAGES):
        row = k + slot
        live = row < hi
        b_t = row_tile(t + row * D, live, D, L).to(tl.float32)
        b_s = row_sum(b_t * b_v)
        better = live & (b_s > b_best)
        b_best = tl.where(better, b_s, b_best)
        b_index = tl.where(better, (row - begin).to(tl.int32), b_index)
        b_m, b_r, b_l2, b_le = update(b_s * logit_scale, live, b_m, b_r, b_l2, b_le)
        if ATTENDED:
            b_a = b_s * attention_scale
            if PROJECTED and FOLDED:
                b_a = row_sum(row_tile(query + row * D, live, D, L).to(tl.float32) * b_v)
            elif PROJECTED:
                b_a = row_sum(b_t * b_u)
            b_x = b_t
            if FOLDED:
                b_x = row_tile(attended + row * W, live, W, LW).to(tl.float32)
            top = tl.maximum(b_ma, tl.where(live, b_a, LOWEST))
            rise = tl.exp(b_ma - top)
            e = tl.where(live, tl.exp(tl.where(live, b_a - top, 0.0)), 0.0)
            b_la = b_la * rise + e
            b_sum = b_sum * rise[:, None, None] + e[:, None, None] * b_x
            b_ma = top

    if not QUERY:
        wait_for_inputs(PDL)
    m, r, l2, le, best, first, ma, la = merge(b_m, b_r, b_l2, b_le, b_best, b_index, b_ma, b_la)
    place = i_b * n_s + i_s
    store_state(state, place, n_b * n_s, True, m, r, l2, le, best, first, ma, la, ATTENDED)
    if ATTENDED:
        total = tl.sum(b_sum * tl.exp(b_ma - ma)[:, None, None], 0)  # [WP / LW, LW]
        w = tl.arange(0, WP // LW)[:, None] * LW + tl.arange(0, LW)[None, :]
        tl.store(sums + place * ((W + 15) // 16 * 16) + w, total, w < W)


@triton.jit
def _tile_scores(
    x: tl.tensor, x_low: tl.tensor, b_t: tl.tensor, p_x: tl.tensor, m_x: tl.tensor, w: tl.tensor, row: tl.tensor,
    live: tl.tensor, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
    SLICES: tl.constexpr, RESIDENT: tl.constexpr, LOADED: tl.constexpr, LOW: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """x @ w[row].T [BLOCK_M, BLOCK_N]. RESIDENT: x in registers as tiles of BLOCK_D columns; LOADED: w[row] too."""
    acc = tl.zeros((BLOCK_M, row.shape[0]), tl.float32)
    if RESIDENT:
        d = tl.arange(0, BLOCK_D)
        for i in tl.static_range((D + BLOCK_D - 1) // BLOCK_D):
            if LOADED:
                b_w = b_t[i]
            else:
                o = i * BLOCK_D + d
                b_w = tl.load(w + row[:, None] * D + o[None, :], live[:, None] & (o < D)[None, :], 0.0)
            acc = dot(x[i], tl.trans(b_w), acc)
            if LOW:
                acc = dot(x_low[i], tl.trans(b_w), acc)
    else:
        acc = tile_dot(acc, p_x, m_x, w + row * D, live, D, BLOCK_D, STAGES, SLICES, LOW)
    return acc


@triton.jit
def _tile_pairs(
    p_v: tl.tensor, m_v: tl.tensor, t: tl.tensor, keys: tl.tensor, k: tl.tensor, hi: tl.tensor,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
    SLICES: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Products of v with rows k to k + BLOCK_N of t, and with those of keys, each [BLOCK_M, BLOCK_N], in one loop.

    A row of t and its key stand side by side, so that one thread has the product of both.
    """
    slot = tl.arange(0, 2 * BLOCK_N)
    row = k + slot // 2
    p_w = tl.where(slot % 2 == 0, t + row * D, keys + row * D)
    acc = tl.zeros((BLOCK_M, 2 * BLOCK_N), tl.float32)
    acc = tile_dot(acc, p_v, m_v, p_w, row < hi, D, BLOCK_D, STAGES, SLICES)
    return tl.split(tl.reshape(acc, (BLOCK_M, BLOCK_N, 2)))


@triton.jit
def _spread(x: tl.tensor) -> tl.tensor:
    """Numbers of the rows of a tile, [BLOCK_M] or [BLOCK_M, BLOCK_N], as they meet the tile."""
    return x[:, None] if len(x.shape) == 1 else x


@triton.jit
def _update_tile(
    b_s: tl.tensor, row: tl.tensor, m_l: tl.tensor, logit_scale: tl.tensor,
    b_m: tl.tensor, b_r: tl.tensor, b_l2: tl.tensor, b_le: tl.tensor, b_best: tl.tensor, b_index: tl.tensor,
) -> tl.tensor:  # fmt: skip
    """The states of BLOCK_M images after similarities b_s [BLOCK_M, BLOCK_N]; also e^{x-m} and e^{-g}.

    e^{x-m} is [BLOCK_M, BLOCK_N]; the states and e^{-g} are [BLOCK_M], or [BLOCK_M, BLOCK_N] of equal columns.
    """
    KEEP: tl.constexpr = len(b_m.shape) > 1
    b_c = tl.where(m_l, b_s, float("-inf"))
    win = tl.max(b_c, 1, keep_dims=KEEP)
    first = tl.min(tl.where(b_c == _spread(win), row.to(tl.int32)[None, :], FAR), 1, keep_dims=KEEP)
    rises = win > b_best
    b_index = tl.where(rises, first, b_index)
    b_best = tl.maximum(win, b_best)
    b_x = b_s * logit_scale
    top = tl.maximum(b_m, tl.max(tl.where(m_l, b_x, LOWEST), 1, keep_dims=KEEP))
    g = top - b_m
    c = tl.exp(-g)
    d_x = tl.where(m_l, b_x - _spread(top), 0.0)
    e = tl.where(m_l, tl.exp(d_x), 0.0)
    b_le = c * (b_le - g * (1 + b_r)) + tl.sum(e * d_x, 1, keep_dims=KEEP)
    others = tl.sum(tl.where(row.to(tl.int32)[None, :] == _spread(first), 0.0, e), 1, keep_dims=KEEP)
    b_r = others + tl.where(rises, c * (1 + b_r), b_r + tl.exp(win * logit_scale - top))
    return top, b_r, c * c * b_l2 + tl.sum(e * e, 1, keep_dims=KEEP), b_le, b_best, b_index, e, c


@triton.jit(do_not_specialize=["B", "K"])
def attend_tile(
    v: tl.tensor, t: tl.tensor, query: tl.tensor, attended: tl.tensor, u: tl.tensor,
    state: tl.tensor, sums: tl.tensor, counters: tl.tensor, B: tl.tensor, K: tl.tensor,
    logit_scale: tl.tensor, attention_scale: tl.tensor,
    D: tl.constexpr, W: tl.constexpr,
    ATTENDED: tl.constexpr, PROJECTED: tl.constexpr, FOLDED: tl.constexpr, SHARED_SOFTMAX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr,
    SLICES: tl.constexpr, RESIDENT: tl.constexpr, LOW: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """A tile of images shares each tile of rows, on tensor cores for 16-bit types: grid (tiles of images, splits).

    Arguments as in `attend_image`. SHARED_SOFTMAX: the attention weights equal p, so one softmax serves both.
    RESIDENT: the images' tile stays in registers, and a plain class set's tile is read once for both products (then
    BLOCK_W = BLOCK_D); else both are read again, chunk by chunk. With BLOCK_W >= W the values of the folded layout are
    asked for before the products. LOW: u and the attention weights are multiplied as two 16-bit numbers each, which
    keeps their float32 precision; worth it where the tensor cores wait for memory anyway.
    """
    start_dependents(PDL)
    i_s = tl.program_id(1).to(tl.int64)
    n_s = tl.num_programs(1)
    dtype: tl.constexpr = t.dtype.element_ty
    SPLIT: tl.constexpr = LOW and dtype != tl.float32
    QUERY: tl.constexpr = ATTENDED and PROJECTED and not FOLDED
    ND: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    NW: tl.constexpr = (W + BLOCK_W - 1) // BLOCK_W if ATTENDED else 0
    # Slices are added where a warp has all columns of a row: with a state for every column no warp asks another.
    # Without slices a state is [BLOCK_M]: as [BLOCK_M, 1], the layout of a product would hold each number twice.
    COLUMNS: tl.constexpr = SLICES > 1
    STATE: tl.constexpr = (BLOCK_M, BLOCK_N) if COLUMNS else (BLOCK_M,)
    BOTH: tl.constexpr = ATTENDED and PROJECTED and FOLDED and not RESIDENT  # both products in one loop
    AHEAD: tl.constexpr = FOLDED and NW == 1  # the values come while the products with t and the keys are formed
    d = tl.arange(0, BLOCK_D)
    c_w = tl.arange(0, BLOCK_W)
    b = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_b = b < B
    share = tl.cdiv(tl.cdiv(K, n_s), BLOCK_N) * BLOCK_N
    lo = i_s * share
    hi = tl.minimum(lo + share, K)

    p_v = v + b * D
    p_u = u + b * ((D + 15) // 16 * 16) if QUERY else p_v
    if QUERY:  # else last, as in `attend_image`
        wait_for_inputs(PDL)
    if i_s == 0:
        clear_counters(counters, b, m_b)
    b_v = ()
    b_u = ()
    b_u_low = ()
    if RESIDENT:
        for i in tl.static_range(ND):
            o = i * BLOCK_D + d
            m_v = m_b[:, None] & (o < D)[None, :]
            b_v = b_v + (tl.load(p_v[:, None] + o[None, :], m_v, 0.0).to(dtype),)
            if QUERY:
                x = tl.load(p_u[:, None] + o[None, :], m_v, 0.0)
                b_u = b_u + (x.to(dtype),)
                b_u_low = b_u_low + ((x - x.to(dtype).to(tl.float32)).to(dtype),)

    b_m = tl.full(STATE, LOWEST, tl.float32)
    b_r = tl.zeros(STATE, tl.float32)
    b_l2 = tl.zeros(STATE, tl.float32)
    b_le = tl.zeros(STATE, tl.float32)
    b_best = tl.full(STATE, float("-inf"), tl.float32)
    b_index = tl.full(STATE, FAR, tl.int32)
    b_ma = tl.full(STATE, LOWEST, tl.float32)
    b_la = tl.zeros(STATE, tl.float32)
    b_sum = ()
    for i in tl.static_range(NW):
        b_sum = b_sum + (tl.zeros((BLOCK_M, BLOCK_W), tl.float32),)
    for k in tl.range(lo, hi, BLOCK_N, num_stages=STAGES if RESIDENT else 1):
        row = k + tl.arange(0, BLOCK_N)
        live = row < hi
        m_l = live[None, :]
        b_t = ()
        if AHEAD:
            m_w = live[:, None] & (c_w < W)[None, :]
            b_values = tl.load(attended + row[:, None] * W + c_w[None, :], m_w, 0.0)
        if RESIDENT:
            for i in tl.static_range(ND):
                o = i * BLOCK_D + d
                # [BLOCK_N, BLOCK_D]
                b_t = b_t + (tl.load(t + row[:, None] * D + o[None, :], live[:, None] & (o < D)[None, :], 0.0),)
        if BOTH:
            b_s, b_key = _tile_pairs(p_v, m_b, t, query, k, hi, D, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, SLICES)
        else:
            b_s = _tile_scores(
                b_v, b_v, b_t, p_v, m_b, t, row, live, D, BLOCK_M, BLOCK_D, STAGES, SLICES, RESIDENT, RESIDENT, False
            )
        b_m, b_r, b_l2, b_le, b_best, b_index, e, c = _update_tile(
            b_s, row, m_l, logit_scale, b_m, b_r, b_l2, b_le, b_best, b_index
        )
        if ATTENDED:
            if not SHARED_SOFTMAX:
                b_a = b_s * attention_scale
                if QUERY:
                    b_a = _tile_scores(
                        b_u, b_u_low, b_t, p_u, m_b, t, row, live, D, BLOCK_M, BLOCK_D, STAGES, SLICES, RESIDENT,
                        RESIDENT, SPLIT,
                    )  # fmt: skip
                elif BOTH:
                    b_a = b_key
                elif PROJECTED:
                    b_a = _tile_scores(
                        b_v, b_v, b_t, p_v, m_b, query, row, live, D, BLOCK_M, BLOCK_D, STAGES, SLICES, RESIDENT,
                        False, False,
                    )  # fmt: skip
                top = tl.maximum(b_ma, tl.max(tl.where(m_l, b_a, LOWEST), 1, keep_dims=COLUMNS))
                c = tl.exp(b_ma - top)
                e = tl.where(m_l, tl.exp(tl.where(m_l, b_a - _spread(top), 0.0)), 0.0)
                b_la = b_la * c + tl.sum(e, 1, keep_dims=COLUMNS)
                b_ma = top
            fall = tl.max(c, 1) if COLUMNS else c
            new = ()
            for i in tl.static_range(NW):
                o = i * BLOCK_W + c_w
                # [BLOCK_N, BLOCK_W]
                if AHEAD:
                    b_w = b_values
                elif FOLDED:
                    p_w = attended + row[:, None] * W + o[None, :]
                    b_w = tl.load(p_w, live[:, None] & (o < W)[None, :], 0.0)
                elif RESIDENT:
                    b_w = b_t[i]
                else:
                    b_w = tl.load(t + row[:, None] * D + o[None, :], live[:, None] & (o < D)[None, :], 0.0)
                acc = dot(e.to(dtype), b_w, b_sum[i] * fall[:, None])
                if SPLIT:
                    acc = dot((e - e.to(dtype).to(tl.float32)).to(dtype), b_w, acc)
                new = new + (acc,)
            b_sum = new

    if SHARED_SOFTMAX:
        b_ma = b_m
        b_la = 1 + b_r
    place = b * n_s + i_s
    n = B.to(tl.int64) * n_s
    if not QUERY:
        wait_for_inputs(PDL)
    p_s = place
    m_s = m_b
    if COLUMNS:
        # The first column alone is stored. Addresses that rise with the column keep the layout: a warp has all columns.
        column = tl.arange(0, BLOCK_N)[None, :]
        p_s = place[:, None] + column
        m_s = m_b[:, None] & (column == 0)
    store_state(state, p_s, n, m_s, b_m, b_r, b_l2, b_le, b_best, b_index, b_ma, b_la, ATTENDED)
    for i in tl.static_range(NW):
        o = i * BLOCK_W + c_w
        p_o = sums + place[:, None] * ((W + 15) // 16 * 16) + o[None, :]
        tl.store(p_o, b_sum[i], m_b[:, None] & (o < W)[None, :])
