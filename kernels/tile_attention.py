"""Kernel of the first half for several images: a tile of them attends to the class set.

The formulas, and what the kernel leaves in scratch for `tail`, are those of `attend_image` (attention.py).
"""

# Triton reads these functions as its own language: tuples grow by +.
# ruff: noqa: B007, RUF005
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from vilu.kernels.softmax_state import (
    FAR,
    LOWEST,
    AttentionState,
    State,
    aligned,
    clear_counters,
    columns,
    dot,
    empty_attention,
    empty_state,
    remainder,
    start_dependents,
    store_attention,
    store_state,
    tile_dot,
    wait_for_inputs,
)


@triton.jit
def _load_tiles(p_row: tl.tensor, m_row: tl.tensor, N: tl.constexpr, BLOCK: tl.constexpr) -> tl.tensor:
    """Rows of N numbers at pointers p_row [R, 1], as a tuple of tiles [R, BLOCK]."""
    tiles = ()
    for i in tl.static_range((N + BLOCK - 1) // BLOCK):
        tiles = tiles + (columns(p_row, m_row, i * BLOCK, N, BLOCK),)
    return tiles


@triton.jit
def _round_tiles(tiles: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Tiles rounded to a type, and the `remainder` of each: two tuples."""
    high = ()
    low = ()
    for i in tl.static_range(len(tiles)):
        high = high + (tiles[i].to(dtype),)
        low = low + (remainder(tiles[i], dtype),)
    return high, low


@triton.jit
def _scores(
    b_x: tl.tensor, b_low: tl.tensor, b_w: tl.tensor, p_x: tl.tensor, m_x: tl.tensor,
    w: tl.tensor, row: tl.tensor, live: tl.tensor,
    D: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr, SLICES: tl.constexpr, LOW: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """x @ w[row].T [BLOCK_M, BLOCK_N], for rows of D numbers, those of x at pointers p_x [BLOCK_M].

    Tiles b_x hold x in registers (and b_low its `remainder`), tiles b_w hold w[row]. Without tiles b_x both are read
    from memory; without b_w, w is. LOW: the remainder of x is multiplied as well.
    """
    acc = tl.zeros((m_x.shape[0], row.shape[0]), tl.float32)
    if len(b_x) > 0:
        for i in tl.static_range(len(b_x)):
            b_t = b_w[i] if len(b_w) > 0 else columns(w + row[:, None] * D, live, i * BLOCK_D, D, BLOCK_D)
            acc = dot(b_x[i], tl.trans(b_t), acc)
            if LOW:
                acc = dot(b_low[i], tl.trans(b_t), acc)
    else:
        acc = tile_dot(acc, p_x, m_x, w + row * D, live, D, BLOCK_D, STAGES, SLICES, LOW)
    return acc


@triton.jit
def _score_pairs(
    p_v: tl.tensor, m_v: tl.tensor, t: tl.tensor, keys: tl.tensor, k: tl.tensor, hi: tl.tensor,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr, SLICES: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Products of v with rows k to k + BLOCK_N of t, and with those of keys, each [BLOCK_M, BLOCK_N], in one loop.

    A row of t and its key stand side by side, so that one thread has the product of both.
    """
    slot = tl.arange(0, 2 * BLOCK_N)
    row = k + slot // 2
    p_w = tl.where(slot % 2 == 0, t + row * D, keys + row * D)
    acc = tl.zeros((m_v.shape[0], 2 * BLOCK_N), tl.float32)
    acc = tile_dot(acc, p_v, m_v, p_w, row < hi, D, BLOCK_D, STAGES, SLICES)
    return tl.split(tl.reshape(acc, (m_v.shape[0], BLOCK_N, 2)))


@triton.jit
def _spread(x: tl.tensor) -> tl.tensor:
    """Numbers of the rows of a tile, [BLOCK_M] or [BLOCK_M, BLOCK_N] of equal columns, as a shape that meets it."""
    return x[:, None] if len(x.shape) == 1 else x


@triton.jit
def _update_tile(
    b_state: State, b_s: tl.tensor, row: tl.tensor, m_l: tl.tensor, logit_scale: tl.tensor
) -> tl.tensor:  # fmt: skip
    """The states after similarities b_s [BLOCK_M, BLOCK_N] with classes `row` [BLOCK_N]; also e^{x-m} and e^{-g}.

    e^{x-m} is [BLOCK_M, BLOCK_N]; the states and e^{-g} are [BLOCK_M], or [BLOCK_M, BLOCK_N] of equal columns.
    """
    KEEP: tl.constexpr = len(b_state.m.shape) > 1
    b_c = tl.where(m_l, b_s, float("-inf"))
    win = tl.max(b_c, 1, keep_dims=KEEP)
    first = tl.min(tl.where(b_c == _spread(win), row.to(tl.int32)[None, :], FAR), 1, keep_dims=KEEP)
    rises = win > b_state.best
    argmax = tl.where(rises, first, b_state.argmax)
    best = tl.maximum(win, b_state.best)
    b_x = b_s * logit_scale
    top = tl.maximum(b_state.m, tl.max(tl.where(m_l, b_x, LOWEST), 1, keep_dims=KEEP))
    g = top - b_state.m
    c = tl.exp(-g)
    d_x = tl.where(m_l, b_x - _spread(top), 0.0)
    e = tl.where(m_l, tl.exp(d_x), 0.0)
    le = c * (b_state.le - g * (1 + b_state.r)) + tl.sum(e * d_x, 1, keep_dims=KEEP)
    others = tl.sum(tl.where(row.to(tl.int32)[None, :] == _spread(first), 0.0, e), 1, keep_dims=KEEP)
    r = others + tl.where(rises, c * (1 + b_state.r), b_state.r + tl.exp(win * logit_scale - top))
    l2 = c * c * b_state.l2 + tl.sum(e * e, 1, keep_dims=KEEP)
    return State(top, r, l2, le, best, argmax), e, c


@triton.jit
def _update_attention(b_attention: AttentionState, b_a: tl.tensor, m_l: tl.tensor) -> tl.tensor:
    """The attention's states after logits b_a [BLOCK_M, BLOCK_N]; also the new rows' weights, and the old ones' factor.

    Shapes as in `_update_tile`.
    """
    KEEP: tl.constexpr = len(b_attention.ma.shape) > 1
    top = tl.maximum(b_attention.ma, tl.max(tl.where(m_l, b_a, LOWEST), 1, keep_dims=KEEP))
    c = tl.exp(b_attention.ma - top)
    e = tl.where(m_l, tl.exp(tl.where(m_l, b_a - _spread(top), 0.0)), 0.0)
    return AttentionState(top, b_attention.la * c + tl.sum(e, 1, keep_dims=KEEP)), e, c


@triton.jit
def _add_values(
    b_sum: tl.tensor, e: tl.tensor, c: tl.tensor, b_values: tl.tensor, values: tl.tensor, row: tl.tensor,
    live: tl.tensor, W: tl.constexpr, BLOCK_W: tl.constexpr, LOW: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """c · sums + e @ values[row], for weights e [BLOCK_M, BLOCK_N] and W columns, as tiles [BLOCK_M, BLOCK_W].

    c is [BLOCK_M], or [BLOCK_M, BLOCK_N] of equal columns. Tiles b_values hold values[row]; without them, the rows are
    read from memory. LOW: the `remainder` of e is multiplied as well.
    """
    fall = tl.max(c, 1) if len(c.shape) > 1 else c
    new = ()
    for i in tl.static_range(len(b_sum)):
        b_w = b_values[i] if len(b_values) > 0 else columns(values + row[:, None] * W, live, i * BLOCK_W, W, BLOCK_W)
        acc = dot(e.to(b_w.dtype), b_w, b_sum[i] * fall[:, None])
        if LOW:
            acc = dot(remainder(e, b_w.dtype), b_w, acc)
        new = new + (acc,)
    return new


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
    TWO_PARTS: tl.constexpr = LOW and dtype != tl.float32
    QUERY: tl.constexpr = ATTENDED and PROJECTED and not FOLDED
    NW: tl.constexpr = (W + BLOCK_W - 1) // BLOCK_W if ATTENDED else 0
    BOTH: tl.constexpr = ATTENDED and PROJECTED and FOLDED and not RESIDENT  # both products in one loop
    AHEAD: tl.constexpr = FOLDED and NW == 1  # the values come while the products with t and the keys are formed
    # Slices are added where a warp has all columns of a row: with a state for every column no warp asks another.
    # Without slices a state is [BLOCK_M]: as [BLOCK_M, 1], the layout of a product would hold each number twice.
    COLUMNS: tl.constexpr = SLICES > 1
    SHAPE: tl.constexpr = (BLOCK_M, BLOCK_N) if COLUMNS else (BLOCK_M,)
    c_w = tl.arange(0, BLOCK_W)
    b = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_b = b < B
    share = tl.cdiv(tl.cdiv(K, n_s), BLOCK_N) * BLOCK_N
    lo = i_s * share
    hi = tl.minimum(lo + share, K)

    p_v = v + b * D
    p_u = u + b * aligned(D) if QUERY else p_v
    if QUERY:  # else last, as in `attend_image`
        wait_for_inputs(PDL)
    if i_s == 0:
        clear_counters(counters, b, m_b)
    values = attended if FOLDED else t
    b_v = ()
    b_u = ()
    b_low = ()
    if RESIDENT:
        b_v, _ = _round_tiles(_load_tiles(p_v[:, None], m_b, D, BLOCK_D), dtype)
        if QUERY:
            b_u, b_low = _round_tiles(_load_tiles(p_u[:, None], m_b, D, BLOCK_D), dtype)

    b_state = empty_state(SHAPE)
    b_attention = empty_attention(SHAPE)
    b_sum = ()
    for i in tl.static_range(NW):
        b_sum = b_sum + (tl.zeros((BLOCK_M, BLOCK_W), tl.float32),)
    for k in tl.range(lo, hi, BLOCK_N, num_stages=STAGES if RESIDENT else 1):
        row = k + tl.arange(0, BLOCK_N)
        live = row < hi
        m_l = live[None, :]
        b_t = ()
        b_values = ()
        if AHEAD:
            b_values = _load_tiles(values + row[:, None] * W, live, W, BLOCK_W)
        if RESIDENT:
            b_t = _load_tiles(t + row[:, None] * D, live, D, BLOCK_D)
            if not FOLDED:
                b_values = b_t
        if BOTH:
            b_s, b_a = _score_pairs(p_v, m_b, t, query, k, hi, D, BLOCK_N, BLOCK_D, STAGES, SLICES)
        else:
            b_s = _scores(b_v, (), b_t, p_v, m_b, t, row, live, D, BLOCK_D, STAGES, SLICES, False)
        b_state, e, c = _update_tile(b_state, b_s, row, m_l, logit_scale)
        if ATTENDED:
            if QUERY:
                b_a = _scores(b_u, b_low, b_t, p_u, m_b, t, row, live, D, BLOCK_D, STAGES, SLICES, TWO_PARTS)
            elif PROJECTED and not BOTH:
                b_a = _scores(b_v, (), (), p_v, m_b, query, row, live, D, BLOCK_D, STAGES, SLICES, False)
            elif not PROJECTED:
                b_a = b_s * attention_scale
            if not SHARED_SOFTMAX:
                b_attention, e, c = _update_attention(b_attention, b_a, m_l)
            b_sum = _add_values(b_sum, e, c, b_values, values, row, live, W, BLOCK_W, TWO_PARTS)

    if SHARED_SOFTMAX:
        b_attention = AttentionState(b_state.m, 1 + b_state.r)
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
    store_state(state, p_s, n, m_s, b_state)
    if ATTENDED:
        store_attention(state, p_s, n, m_s, b_attention)
    for i in tl.static_range(NW):
        o = i * BLOCK_W + c_w
        p_o = sums + place[:, None] * aligned(W) + o[None, :]
        tl.store(p_o, b_sum[i], m_b[:, None] & (o < W)[None, :])
