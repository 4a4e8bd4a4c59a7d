"""The second half in one launch: merge the splits, then the MLP, its outputs spread over programs.

    z = Σ_j α_j value_j,  h_1 = relu(W_1v v + W_1p t_pred + (W_1a W_V) z + b_1)     plain layout
    h_1 = relu(W_1v v + predicted[pred] + z + b_1)                                   folded layout
    h_i = relu(W_i h_{i-1} + b_i),  P(failure) = sigmoid(W h + b + prior · log((1 - max p) / max p))

`tail` has a stage for each line, and every program belongs to one stage. It loads what no kernel writes (weights, the
image), waits for the attention, then for the programs of the stage before, which count themselves in scratch. Programs
wait only for programs of lower number, which a GPU starts first; so they need not all fit on it at once.
"""

# Triton reads these functions as its own language: tuples grow by +; l is the formula's letter.
# ruff: noqa: E741, RUF005
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from vilu.kernels.softmax_state import (
    ATTENTION_MAX,
    ATTENTION_SUM,
    BEST,
    COUNTERS,
    FAR,
    INDEX,
    LEAST_ODDS,
    LOWEST,
    State,
    aligned,
    dot,
    load_state,
    relu,
    row_sum,
    row_tile,
    signal,
    slices,
    start_dependents,
    sum_slices,
    tile_dot,
    wait_for_count,
    wait_for_inputs,
)


@triton.jit
def _store_scores(
    scores: tl.tensor, index: tl.tensor, odds: tl.tensor, i_b: tl.tensor, n_b: tl.tensor, n: tl.tensor,
    good: tl.tensor, prior: tl.tensor, b_state: State,
) -> None:  # fmt: skip
    """Write one image's class, confidence scores and odds; NaN and class 0 where the answer is not good."""
    nan = float("nan")
    l = 1 + b_state.r
    g = b_state.l2 / (l * l)
    spread = tl.where(n > 1, tl.log(tl.maximum(n, 2).to(tl.float32)), 1.0)
    tl.store(odds + i_b, tl.where(good, prior * tl.log(tl.maximum(b_state.r, LEAST_ODDS)), nan))
    tl.store(scores + n_b + i_b, tl.where(good, 1.0 / l, nan))
    tl.store(scores + 2 * n_b + i_b, tl.where(good, (b_state.le / l - tl.log(l)) / spread, nan))
    tl.store(scores + 3 * n_b + i_b, tl.where(good, -(1.0 - g) / g, nan))
    tl.store(index + i_b, tl.where(good, b_state.argmax, 0).to(index.dtype.element_ty))


@triton.constexpr_function
def _lanes(n: int, dtype: tl.dtype) -> int:
    """Numbers of a weight's row of n that a warp loads at once, at 16 bytes a lane."""
    return min(triton.next_power_of_2(n), 512 // (dtype.primitive_bitwidth // 8))


@triton.jit
def _row_products(w: tl.tensor, p_x: tl.tensor, yes: tl.tensor, N: tl.constexpr, L: tl.constexpr) -> tl.tensor:
    """w @ x [R], for a `row_tile` w and x at the pointer p_x, where yes. Every warp loads x for itself."""
    zero = tl.zeros((w.shape[0],), tl.int32)
    x = row_tile(p_x + zero, yes & (zero == 0), N, L)
    return row_sum(w.to(tl.float32) * x.to(tl.float32))


@triton.jit
def _image_product(
    acc: tl.tensor, v: tl.tensor, packed: tl.tensor, WEIGHT: tl.constexpr, b: tl.tensor, o: tl.tensor, m_o: tl.tensor,
    N: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """W_1v v + acc [R] for image b, v rounded to the weights' type."""
    dtype: tl.constexpr = packed.dtype.element_ty
    L: tl.constexpr = _lanes(N, dtype)
    w = row_tile(packed + WEIGHT + o * N, m_o, N, L).to(tl.float32)
    zero = tl.zeros(o.shape, tl.int32)
    x = row_tile(v + b * N + zero, zero == 0, N, L)
    return acc + row_sum(w * x.to(dtype).to(tl.float32))


@triton.jit
def _weight_tiles(
    w: tl.tensor, o: tl.tensor, m_o: tl.tensor, N_IN: tl.constexpr, SLICES: tl.constexpr, BLOCK_D: tl.constexpr
) -> tl.tensor:
    """Rows o of w (., N_IN), a tile of `slices` for every BLOCK_D columns."""
    tiles = ()
    for i in tl.static_range((N_IN + BLOCK_D - 1) // BLOCK_D):
        tiles = tiles + (slices(w + o * N_IN, m_o, i * BLOCK_D, N_IN, SLICES, BLOCK_D),)
    return tiles


@triton.jit
def _add_products(
    part: tl.tensor, p_x: tl.tensor, m_x: tl.tensor, tiles: tl.tensor, N_IN: tl.constexpr, SLICES: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """part [SLICES, BLOCK_M, R] + x @ w[o].T, slice by slice, for the `_weight_tiles` of w, in their type."""
    for i in tl.static_range((N_IN + BLOCK_D - 1) // BLOCK_D):
        b_x = slices(p_x, m_x, i * BLOCK_D, N_IN, SLICES, BLOCK_D)
        part = dot(b_x.to(tiles[i].dtype), tl.permute(tiles[i], (0, 2, 1)), part)
    return part


@triton.jit
def _scores(
    v: tl.tensor, t: tl.tensor, state: tl.tensor, odds: tl.tensor, scores: tl.tensor, index: tl.tensor,
    i_b: tl.tensor, B: tl.tensor, n_s: tl.tensor, n: tl.tensor, prior: tl.tensor,
    D: tl.constexpr, MAX_SPLITS: tl.constexpr,
) -> None:  # fmt: skip
    """CLIP's class, scores and odds of image i_b, whose class set has n rows."""
    split = tl.arange(0, MAX_SPLITS)
    places = B.to(tl.int64) * n_s
    b_state = load_state(state, i_b * n_s + split, places, split < n_s)
    d = tl.arange(0, triton.next_power_of_2(D))
    b_v = tl.load(v + i_b * D + d, d < D, 0.0).to(t.dtype.element_ty).to(tl.float32)
    good = (tl.min((tl.abs(b_v) < float("inf")).to(tl.int32), 0) > 0) & (n > 0)
    _store_scores(scores, index, odds, i_b, B, n, good, prior, b_state)


@triton.jit
def _combine(
    t: tl.tensor, predicted: tl.tensor, state: tl.tensor, sums: tl.tensor, t_pred: tl.tensor, z: tl.tensor,
    h: tl.tensor, b_h: tl.tensor, i_b: tl.tensor, o: tl.tensor, begin: tl.tensor, K: tl.tensor, B: tl.tensor,
    n_s: tl.tensor, D: tl.constexpr, H: tl.constexpr, HS: tl.constexpr, PREDICTED: tl.constexpr,
    ATTENDED: tl.constexpr, FIRST_LAYER: tl.constexpr, MAX_SPLITS: tl.constexpr, BLOCK_S: tl.constexpr,
) -> None:  # fmt: skip
    """Columns o [CHUNK] of h_1 where FIRST_LAYER, after the image's share b_h; else of t_pred and z."""
    W: tl.constexpr = H if FIRST_LAYER else D
    WS: tl.constexpr = aligned(W)
    m_o = o < W
    split = tl.arange(0, MAX_SPLITS)
    m_s = split < n_s
    n = B.to(tl.int64) * n_s
    p_state = state + i_b * n_s + split
    if PREDICTED:
        l_best = tl.load(p_state + BEST * n, m_s, float("-inf"))
        l_index = tl.load(p_state + INDEX * n, m_s, 0.0).to(tl.int32, bitcast=True)
        first = tl.min(tl.where(m_s & (l_best == tl.max(l_best, 0)), l_index, FAR), 0)
        # A row of NaN never beats the first: keep the address inside the class set, the answer is NaN anyway.
        first = tl.where(first == FAR, 0, first)
        pred = tl.maximum(tl.minimum(begin + first, K - 1), 0)
        if FIRST_LAYER:
            b_h += tl.load(predicted + pred * H + o, m_o, 0.0).to(tl.float32)
        else:
            tl.store(t_pred + i_b * WS + o, tl.load(t + pred * D + o, m_o, 0.0).to(tl.float32), m_o)
    if ATTENDED:
        p_max = state + ATTENTION_MAX * n + i_b * n_s
        l_ma = tl.load(p_max + split, m_s, LOWEST)
        ma = tl.max(l_ma, 0)
        la = tl.sum(tl.exp(l_ma - ma) * tl.load(p_state + ATTENTION_SUM * n, m_s, 0.0), 0)
        b_zs = tl.zeros((BLOCK_S, o.shape[0]), tl.float32)
        for s in tl.range(0, n_s, BLOCK_S, num_stages=1):
            k = s + tl.arange(0, BLOCK_S)
            m_k = k < n_s
            # [BLOCK_S, CHUNK]
            b_x = tl.load(sums + (i_b * n_s + k)[:, None] * WS + o[None, :], m_k[:, None] & m_o[None, :], 0.0)
            b_zs += b_x * tl.exp(tl.load(p_max + k, m_k, LOWEST) - ma)[:, None]
        b_z = tl.sum(b_zs, 0) / la
        if FIRST_LAYER:
            b_h += b_z
        else:
            tl.store(z + i_b * WS + o, b_z, m_o)
    if FIRST_LAYER:
        tl.store(h + i_b * HS + o, relu(b_h), m_o)


@triton.jit
def _first_layer(
    v: tl.tensor, t_pred: tl.tensor, z: tl.tensor, packed: tl.tensor, h: tl.tensor, counter: tl.tensor, b: tl.tensor,
    B: tl.tensor, o: tl.tensor, D: tl.constexpr, H: tl.constexpr, HS: tl.constexpr, OFFSETS: tl.constexpr,
    IMAGE: tl.constexpr, PREDICTED: tl.constexpr, ATTENDED: tl.constexpr, COUNT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr, SLICES: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """Outputs o of h_1 in the plain layout, for BLOCK_M images from b on."""
    IN: tl.constexpr = aligned(D)
    m_o = o < H
    bias = tl.load(packed + OFFSETS[3] + o, m_o, 0.0).to(tl.float32)
    if BLOCK_M > 1:
        c_b = b + tl.arange(0, BLOCK_M)
        m_b = c_b < B
        b_y = tl.zeros((BLOCK_M, o.shape[0]), tl.float32) + bias[None, :]
        if IMAGE:
            b_y = tile_dot(b_y, v + c_b * D, m_b, packed + OFFSETS[0] + o * D, m_o, D, BLOCK_D, 2, SLICES)
        wait_for_inputs(PDL)
        wait_for_count(counter, COUNT)
        if PREDICTED:
            b_y = tile_dot(b_y, t_pred + c_b * IN, m_b, packed + OFFSETS[1] + o * D, m_o, D, BLOCK_D, 2, SLICES)
        if ATTENDED:
            b_y = tile_dot(b_y, z + c_b * IN, m_b, packed + OFFSETS[2] + o * D, m_o, D, BLOCK_D, 2, SLICES)
        tl.store(h + c_b[:, None] * HS + o[None, :], relu(b_y), m_b[:, None] & m_o[None, :])
    else:
        L: tl.constexpr = _lanes(D, packed.dtype.element_ty)
        w_p = bias
        w_a = bias
        if PREDICTED:
            w_p = row_tile(packed + OFFSETS[1] + o * D, m_o, D, L)
        if ATTENDED:
            w_a = row_tile(packed + OFFSETS[2] + o * D, m_o, D, L)
        y = bias
        if IMAGE:
            y = _image_product(bias, v, packed, OFFSETS[0], b, o, m_o, D)
        wait_for_inputs(PDL)
        wait_for_count(counter, COUNT)
        if PREDICTED:
            y += _row_products(w_p, t_pred + b * IN, b < B, D, L)
        if ATTENDED:
            y += _row_products(w_a, z + b * IN, b < B, D, L)
        tl.store(h + b * HS + o, relu(y), m_o & (b < B))


@triton.jit
def _layer(
    x: tl.tensor, packed: tl.tensor, h: tl.tensor, odds: tl.tensor, scores: tl.tensor, counter: tl.tensor,
    b: tl.tensor, B: tl.tensor, o: tl.tensor, N_IN: tl.constexpr, N_OUT: tl.constexpr, HS: tl.constexpr,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, LAST: tl.constexpr, COUNT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr, SLICES: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """h = relu(W x + bias), outputs o for BLOCK_M images from b on, rows HS apart; where LAST P(failure), to scores."""
    m_o = o < N_OUT
    bias = tl.load(packed + BIAS + o, m_o, 0.0).to(tl.float32)
    if BLOCK_M > 1:
        c_b = b + tl.arange(0, BLOCK_M)
        m_b = c_b < B
        b_y = tl.zeros((BLOCK_M, o.shape[0]), tl.float32) + bias[None, :]
        if N_IN <= 2 * BLOCK_D:  # more weights than that do not fit into registers before the wait
            tiles = _weight_tiles(packed + WEIGHT, o, m_o, N_IN, SLICES, BLOCK_D)
            wait_for_inputs(PDL)
            wait_for_count(counter, COUNT)
            part = tl.zeros((SLICES, BLOCK_M, o.shape[0]), tl.float32)
            b_y += sum_slices(_add_products(part, x + c_b * HS, m_b, tiles, N_IN, SLICES, BLOCK_D))
        else:
            wait_for_inputs(PDL)
            wait_for_count(counter, COUNT)
            b_y = tile_dot(b_y, x + c_b * HS, m_b, packed + WEIGHT + o * N_IN, m_o, N_IN, BLOCK_D, 2, SLICES)
        m_y = m_b[:, None] & m_o[None, :]
        if LAST:
            b_y += tl.load(odds + c_b, m_b, 0.0)[:, None]
            tl.store(scores + c_b[:, None] + o[None, :], 1.0 / (1.0 + tl.exp(-b_y)), m_y)
        else:
            tl.store(h + c_b[:, None] * HS + o[None, :], relu(b_y), m_y)
    else:
        L: tl.constexpr = _lanes(N_IN, packed.dtype.element_ty)
        w = row_tile(packed + WEIGHT + o * N_IN, m_o, N_IN, L)
        wait_for_inputs(PDL)
        wait_for_count(counter, COUNT)
        yes = b < B
        y = bias + _row_products(w, x + b * HS, yes, N_IN, L)
        if LAST:
            y += tl.load(odds + b, yes, 0.0)
            tl.store(scores + b + o, 1.0 / (1.0 + tl.exp(-y)), m_o & yes)
        else:
            tl.store(h + b * HS + o, relu(y), m_o & yes)


@triton.jit(do_not_specialize=["B", "K", "n_s"])
def tail(
    v: tl.tensor, t: tl.tensor, predicted: tl.tensor, packed: tl.tensor, offsets: tl.tensor,
    state: tl.tensor, sums: tl.tensor, hidden: tl.tensor, t_pred: tl.tensor, z: tl.tensor, h: tl.tensor,
    counters: tl.tensor, odds: tl.tensor, scores: tl.tensor, index: tl.tensor,
    B: tl.tensor, K: tl.tensor, n_s: tl.tensor, prior: tl.tensor,
    D: tl.constexpr, WIDTHS: tl.constexpr, OFFSETS: tl.constexpr, IMAGE: tl.constexpr, PREDICTED: tl.constexpr,
    ATTENDED: tl.constexpr, FIRST_LAYER: tl.constexpr, RAGGED: tl.constexpr, MAX_SPLITS: tl.constexpr,
    STARTS: tl.constexpr, PLACES: tl.constexpr, CHUNK: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SLICES: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """Everything after the attention: grid (tiles of BLOCK_M images, STARTS[-1] programs).

    Programs STARTS[i] to STARTS[i + 1] are stage i. Stage 0 merges: for each image one program for its scores, then one
    for every CHUNK columns, which reads BLOCK_S splits at once. Stage i is layer i (layer i + 1 in the folded layout),
    a program for BLOCK_N outputs; the last is the output layer. h (B, PLACES[-1]) holds layer i's outputs from
    PLACES[i - 1] on.
    state (slots, B, n_s) and sums (B, n_s, W) of `attend_*`; hidden (B, H) of `project`, where BLOCK_M > 1; out scores
    (4, B), index (B,), odds (B,) = prior · log((1 - max p) / max p), NaN where the image is not finite or has no class.
    With BLOCK_M > 1 the layers multiply on tensor cores, BLOCK_D columns at once in SLICES; else a warp holds rows of
    weights.
    """
    start_dependents(PDL)
    FIRST: tl.constexpr = 1 if FIRST_LAYER else 0
    H: tl.constexpr = WIDTHS[0]
    HS: tl.constexpr = PLACES[len(PLACES) - 1]
    i_p = tl.program_id(1)
    counter = counters.to(tl.pointer_type(tl.int32), bitcast=True)
    counter += tl.program_id(0).to(tl.int64) * BLOCK_M * COUNTERS
    if i_p < STARTS[1]:
        PER_IMAGE: tl.constexpr = STARTS[1] // BLOCK_M
        i_b = tl.program_id(0).to(tl.int64) * BLOCK_M + i_p // PER_IMAGE
        i_o = i_p % PER_IMAGE
        if i_b < B:
            begin = tl.zeros((), tl.int64)
            end = begin + K
            if RAGGED:
                begin = tl.maximum(tl.load(offsets + i_b).to(tl.int64), 0)
                end = tl.minimum(tl.load(offsets + i_b + 1).to(tl.int64), K.to(tl.int64))
            if i_o == 0:
                wait_for_inputs(PDL)
                _scores(v, t, state, odds, scores, index, i_b, B, n_s, end - begin, prior, D, MAX_SPLITS)
            else:
                o = (i_o - 1) * CHUNK + tl.arange(0, CHUNK)
                b_h = tl.zeros((CHUNK,), tl.float32)
                if FIRST_LAYER and (BLOCK_M == 1 or not IMAGE):
                    b_h += tl.load(packed + OFFSETS[3] + o, o < H, 0.0).to(tl.float32)
                    if IMAGE:
                        b_h = _image_product(b_h, v, packed, OFFSETS[0], i_b, o, o < H, D)
                wait_for_inputs(PDL)
                if FIRST_LAYER and IMAGE and BLOCK_M > 1:
                    b_h += tl.load(hidden + i_b * aligned(H) + o, o < H, 0.0)
                _combine(
                    t, predicted, state, sums, t_pred, z, h, b_h, i_b, o, begin, K, B, n_s, D, H, HS, PREDICTED,
                    ATTENDED, FIRST_LAYER, MAX_SPLITS, BLOCK_S,
                )  # fmt: skip
        else:
            wait_for_inputs(PDL)
        signal(counter)
    else:
        b = tl.program_id(0).to(tl.int64) * BLOCK_M
        for i in tl.static_range(1, len(STARTS) - 1):
            if (i_p >= STARTS[i]) & (i_p < STARTS[i + 1]):
                o = (i_p - STARTS[i]) * BLOCK_N + tl.arange(0, BLOCK_N)
                done = counter + (i - 1)
                COUNT: tl.constexpr = STARTS[i] - STARTS[i - 1]
                LAST: tl.constexpr = i + 2 == len(STARTS)
                if i + FIRST == 1:
                    _first_layer(
                        v, t_pred, z, packed, h, done, b, B, o, D, H, HS, OFFSETS, IMAGE, PREDICTED, ATTENDED,
                        COUNT, BLOCK_M, BLOCK_D, SLICES, PDL,
                    )  # fmt: skip
                else:
                    _layer(
                        h + PLACES[i + FIRST - 2], packed, h + PLACES[i + FIRST - 1], odds, scores, done, b, B, o,
                        WIDTHS[i + FIRST - 2], WIDTHS[i + FIRST - 1], HS, OFFSETS[2 * (i + FIRST)],
                        OFFSETS[2 * (i + FIRST) + 1], LAST, COUNT, BLOCK_M, BLOCK_D, SLICES, PDL,
                    )  # fmt: skip
                if not LAST:
                    signal(counter + i)
