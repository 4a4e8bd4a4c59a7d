"""Online softmax: the state that one pass over class-set rows keeps, and what all kernels share.

Let s_j = v · t_j and x_j = logit_scale · s_j. CLIP's softmax p = softmax(x) has the state

    m = max x,  argmax s (the lowest index on ties),  best = max s
    r = Σ e^{x-m} over all rows but one that reaches m, so Σ e^{x-m} = 1 + r, and r is exact where p rounds to 1
    l2 = Σ e^{2(x-m)},  le = Σ e^{x-m} (x-m)

When m rises by g: r ← e^{-g} (1 + r), l2 ← e^{-2g} l2, le ← e^{-g} (le - g (1 + r)). An empty state has m = LOWEST and
r = 0, and e^{-g} = 0 removes it. The attention's softmax α keeps its own maximum, sum and weighted sum of values.
States of disjoint rows merge by the same rule, so the rows may be split anywhere.

The answer is max p = 1 / (1 + r), Σ p² = l2 / (1 + r)², Σ p log p = le / (1 + r) - log(1 + r) and
log((1 - max p) / max p) = log r.
"""

# Triton reads these functions as its own language; l is the formula's letter.
# ruff: noqa: E741

from __future__ import annotations

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.runtime import interpreter

from vilu.head import LOWEST_LOG_ODDS
from vilu.kernels import plan

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

if INTERPRETED.value:
    # Triton 3.6 interprets a scalar as an array of one element, which NumPy 2.4 refuses as a loop bound.
    _patch = interpreter._patch_lang_tensor

    def _patch_with_index(tensor: Any, scope: Any) -> None:
        _patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = _patch_with_index

# Slots of a state in scratch, each an array (images, splits).
MAX = tl.constexpr(plan.STATE_SLOTS.index("max"))
REST = tl.constexpr(plan.STATE_SLOTS.index("rest"))
SQUARES = tl.constexpr(plan.STATE_SLOTS.index("squares"))
ENTROPY = tl.constexpr(plan.STATE_SLOTS.index("entropy"))
BEST = tl.constexpr(plan.STATE_SLOTS.index("best"))
INDEX = tl.constexpr(plan.STATE_SLOTS.index("index"))
ATTENTION_MAX = tl.constexpr(plan.STATE_SLOTS.index("attention_max"))
ATTENTION_SUM = tl.constexpr(plan.STATE_SLOTS.index("attention_sum"))

LOWEST = tl.constexpr(-1e38)  # below any logit, and finite: a difference of two is never NaN
FAR = tl.constexpr(0x7FFFFFFF)
LEAST_ODDS = tl.constexpr(math.exp(LOWEST_LOG_ODDS))

COUNTERS = tl.constexpr(plan.COUNTERS)
aligned = triton.constexpr_function(plan.aligned)


class State(NamedTuple):
    """CLIP's softmax states (formulas above): tensors of one shape, argmax int32, the others float32."""

    m: tl.tensor
    r: tl.tensor
    l2: tl.tensor
    le: tl.tensor
    best: tl.tensor
    argmax: tl.tensor


class AttentionState(NamedTuple):
    """The attention's softmax states: ma the largest logit, la = Σ e^{logit - ma}; float32 tensors of one shape."""

    ma: tl.tensor
    la: tl.tensor


@triton.jit
def empty_state(SHAPE: tl.constexpr) -> State:
    """States of no rows, in this shape."""
    zero = tl.zeros(SHAPE, tl.float32)
    best = tl.full(SHAPE, float("-inf"), tl.float32)
    return State(tl.full(SHAPE, LOWEST, tl.float32), zero, zero, zero, best, tl.full(SHAPE, FAR, tl.int32))


@triton.jit
def empty_attention(SHAPE: tl.constexpr) -> AttentionState:
    """The attention's states of no rows, in this shape."""
    return AttentionState(tl.full(SHAPE, LOWEST, tl.float32), tl.zeros(SHAPE, tl.float32))


@triton.jit
def start_dependents(PDL: tl.constexpr) -> None:
    """Programmatic dependent launch: the next kernel may start, and load what no kernel writes."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait_for_inputs(PDL: tl.constexpr) -> None:
    """Wait until the kernels before this one are done and their stores can be read."""
    if PDL:
        gdc_wait()


@triton.jit
def signal(counter: tl.tensor) -> None:
    """Count this program as done: whoever has seen the count sees what all its warps have stored."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release", scope="gpu")


@triton.jit
def _count(counter: tl.tensor) -> tl.tensor:
    if INTERPRETED:
        return tl.load(counter)
    return tl.inline_asm_elementwise(
        "ld.acquire.gpu.global.b32 $0, [$1];", "=r,l,~{memory}", [counter], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def wait_for_count(counter: tl.tensor, n: tl.constexpr) -> None:
    """Wait until n programs have counted themselves. Every thread looks for itself, so no warp waits for another."""
    seen = _count(counter)
    while seen < n:
        seen = _count(counter)


@triton.jit
def clear_counters(counters: tl.tensor, b: tl.tensor, m_b: tl.tensor) -> None:
    """Zero the counters of images b [N], for the kernel after this one."""
    c = tl.arange(0, COUNTERS)
    zero = tl.zeros((b.shape[0], COUNTERS), tl.float32)
    tl.store(counters + b[:, None] * COUNTERS + c[None, :], zero, m_b[:, None])


@triton.jit
def row_tile(p_row: tl.tensor, m_row: tl.tensor, N: tl.constexpr, L: tl.constexpr) -> tl.tensor:
    """Rows of N numbers at pointers p_row [R], as [R, chunks, L].

    With at least as many rows as warps, Triton gives each warp whole rows: it spreads lanes over L, warps over R.
    """
    k = tl.arange(0, triton.next_power_of_2(N) // L)[None, :, None] * L + tl.arange(0, L)[None, None, :]
    return tl.load(p_row[:, None, None] + k, m_row[:, None, None] & (k < N), 0.0)


@triton.jit
def row_sum(x: tl.tensor) -> tl.tensor:
    """Sums [R] of the rows of a `row_tile`."""
    return tl.sum(tl.sum(x, 1), 1)


@triton.jit
def _high(x: tl.tensor) -> tl.tensor:
    """Float32 numbers with the 13 low bits cleared: what tf32 holds."""
    return (x.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)


@triton.jit
def dot(a: tl.tensor, b: tl.tensor, acc: tl.tensor) -> tl.tensor:
    """acc + a @ b in float32.

    Float32 factors are each the sum of two tf32 numbers, of which three products count: a single one has an error that
    a logit scale of 100 would show.
    """
    if INTERPRETED:  # it keeps bfloat16 as its bits, and multiplies them as integers
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    elif a.dtype == tl.float32:
        high_a = _high(a)
        high_b = _high(b)
        acc = tl.dot(a - high_a, high_b, acc, input_precision="tf32")
        acc = tl.dot(high_a, b - high_b, acc, input_precision="tf32")
        acc = tl.dot(high_a, high_b, acc, input_precision="tf32")
    else:
        acc = tl.dot(a, b, acc)
    return acc


@triton.jit
def remainder(x: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """What rounding to a type takes from x, in that type: x.to(dtype) + remainder(x, dtype) is x in twice the bits."""
    return (x - x.to(dtype).to(tl.float32)).to(dtype)


@triton.jit
def columns(
    p_row: tl.tensor, m_row: tl.tensor, k: tl.tensor, N: tl.constexpr, BLOCK: tl.constexpr
) -> tl.tensor:  # fmt: skip
    """Columns k to k + BLOCK of rows of N numbers at pointers p_row [R, 1], as [R, BLOCK]."""
    c = k + tl.arange(0, BLOCK)
    return tl.load(p_row + c[None, :], m_row[:, None] & (c < N)[None, :], 0.0)


@triton.jit
def slices(
    p_row: tl.tensor, m_row: tl.tensor, k: tl.tensor, N: tl.constexpr, SLICES: tl.constexpr, BLOCK_D: tl.constexpr
) -> tl.tensor:  # fmt: skip
    """Columns k to k + BLOCK_D of rows of N numbers at pointers p_row [R], as [SLICES, R, BLOCK_D / SLICES].

    A product of two such tiles has a slice in each warp, so that no warp repeats what another does in a small tile.
    """
    S: tl.constexpr = BLOCK_D // SLICES
    d = k + tl.arange(0, SLICES)[:, None, None] * S + tl.arange(0, S)[None, None, :]
    return tl.load(p_row[None, :, None] + d, m_row[None, :, None] & (d < N), 0.0)


@triton.constexpr_function
def _halvings(n: int) -> int:
    """How often a power of two can be halved."""
    return n.bit_length() - 1


@triton.jit
def sum_slices(part: tl.tensor) -> tl.tensor:
    """Sums [R, N] of part [SLICES, R, N] over the slices.

    In halves: Triton then brings a sum's terms into one thread in one exchange, which `tl.sum` between warps does not.
    """
    x = tl.permute(part, (1, 2, 0))
    for _ in tl.static_range(_halvings(part.shape[0])):
        x = tl.reshape(x, (x.shape[0], x.shape[1], x.shape[2] // 2, 2))
        a, b = tl.split(x)
        x = a + b
    return tl.reshape(x, (x.shape[0], x.shape[1]))


@triton.jit
def _wait_for_product(acc: tl.tensor) -> tl.tensor:
    """acc, as a value that Triton has to wait for."""
    if INTERPRETED:
        return acc
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [acc], dtype=tl.float32, is_pure=False, pack=1)


@triton.jit
def tile_dot(
    acc: tl.tensor, p_x: tl.tensor, m_x: tl.tensor, p_w: tl.tensor, m_w: tl.tensor,
    N_IN: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr, SLICES: tl.constexpr, LOW: tl.constexpr = False,
) -> tl.tensor:  # fmt: skip
    """acc [BLOCK_M, BLOCK_N] + x @ w.T, for rows of N_IN numbers of x at pointers p_x [BLOCK_M], of w at p_w [BLOCK_N].

    x is rounded to w's type; LOW: its `remainder` is multiplied as well. SLICES: of BLOCK_D, see `slices`; 1 leaves the
    tile to Triton, which has warps repeat each other where it is small.
    """
    dtype: tl.constexpr = p_w.dtype.element_ty
    if SLICES == 1:
        d = tl.arange(0, BLOCK_D)
        for k in tl.range(0, N_IN, BLOCK_D, num_stages=STAGES):
            m_d = k + d < N_IN
            # [BLOCK_M, BLOCK_D], [BLOCK_D, BLOCK_N]
            b_x = tl.load(p_x[:, None] + k + d[None, :], m_x[:, None] & m_d[None, :], 0.0)
            b_w = tl.load(p_w[None, :] + k + d[:, None], m_w[None, :] & m_d[:, None], 0.0)
            acc = dot(b_x.to(dtype), b_w, acc)
            if LOW:
                acc = dot(remainder(b_x, dtype), b_w, acc)
            if acc.shape[0] >= 64 and p_x.dtype.element_ty != dtype:
                # A wgmma, which Triton takes from 64 rows on, reads converted numbers from registers; Triton 3.6 would
                # write the next ones there while it still does (triton-lang/triton#9433).
                acc = _wait_for_product(acc)
    else:
        part = tl.zeros((SLICES, acc.shape[0], acc.shape[1]), tl.float32)
        for k in tl.range(0, N_IN, BLOCK_D, num_stages=STAGES):
            b_x = slices(p_x, m_x, k, N_IN, SLICES, BLOCK_D)
            b_w = tl.permute(slices(p_w, m_w, k, N_IN, SLICES, BLOCK_D), (0, 2, 1))
            part = dot(b_x.to(dtype), b_w, part)
            if LOW:
                part = dot(remainder(b_x, dtype), b_w, part)
        acc += sum_slices(part)
    return acc


@triton.jit
def relu(x: tl.tensor) -> tl.tensor:
    # Not maximum(x, 0), which would turn NaN into 0.
    return tl.where(x < 0, 0.0, x)


@triton.jit
def update(state: State, s: tl.tensor, row: tl.tensor, live: tl.tensor, logit_scale: tl.tensor) -> State:
    """The states after one more similarity s [N], of class `row` [N], in those that are live [N]."""
    better = live & (s > state.best)
    best = tl.where(better, s, state.best)
    argmax = tl.where(better, row, state.argmax)
    x = s * logit_scale
    top = tl.maximum(state.m, tl.where(live, x, LOWEST))
    g = top - state.m
    c = tl.exp(-g)
    d = tl.where(live, x - top, 0.0)
    e = tl.where(live, tl.exp(d), 0.0)
    r = tl.where(g > 0, c * (1 + state.r), state.r + e)
    return State(top, r, c * c * state.l2 + e * e, c * (state.le - g * (1 + state.r)) + e * d, best, argmax)


@triton.jit
def _merge_two(
    m1: tl.tensor, r1: tl.tensor, q1: tl.tensor, e1: tl.tensor, best1: tl.tensor, i1: tl.tensor, a1: tl.tensor,
    s1: tl.tensor, m2: tl.tensor, r2: tl.tensor, q2: tl.tensor, e2: tl.tensor, best2: tl.tensor, i2: tl.tensor,
    a2: tl.tensor, s2: tl.tensor,
) -> tl.tensor:  # fmt: skip
    """The state of the rows of two states."""
    g1 = tl.maximum(m2 - m1, 0.0)
    g2 = tl.maximum(m1 - m2, 0.0)
    c1 = tl.exp(-g1)
    c2 = tl.exp(-g2)
    l1 = tl.where(m1 > LOWEST, 1 + r1, 0.0)
    l2 = tl.where(m2 > LOWEST, 1 + r2, 0.0)
    first = m1 >= m2  # it holds the row that r leaves out
    rest = tl.where(first, r1 + c2 * l2, r2 + c1 * l1)
    entropy = c1 * (e1 - g1 * l1) + c2 * (e2 - g2 * l2)
    wins = (best1 > best2) | ((best1 == best2) & (i1 < i2))
    a = tl.maximum(a1, a2)
    s = s1 * tl.exp(a1 - a) + s2 * tl.exp(a2 - a)
    best = tl.where(wins, best1, best2)
    return tl.maximum(m1, m2), rest, c1 * c1 * q1 + c2 * c2 * q2, entropy, best, tl.where(wins, i1, i2), a, s


@triton.jit
def merge(state: State, attention: AttentionState) -> tl.tensor:
    """One State and one AttentionState from N of each, in one exchange between warps."""
    m, r, l2, le, best, argmax = state
    ma, la = attention
    if INTERPRETED:  # it would call `_merge_two` for every pair, from Python
        slot = tl.arange(0, m.shape[0])
        top = tl.max(m, 0)
        g = top - m
        c = tl.exp(-g)
        l = tl.where(m > LOWEST, 1 + r, 0.0)
        holder = tl.min(tl.where(m == top, slot, FAR), 0)
        others = tl.sum(tl.where(slot == holder, r, c * l), 0)
        win = tl.max(best, 0)
        first = tl.min(tl.where(best == win, argmax, FAR), 0)
        a = tl.max(ma, 0)
        total = tl.sum(la * tl.exp(ma - a), 0)
        entropy = tl.sum(c * (le - g * l), 0)
        return State(top, others, tl.sum(c * c * l2, 0), entropy, win, first), AttentionState(a, total)
    m, r, l2, le, best, argmax, ma, la = tl.reduce((m, r, l2, le, best, argmax, ma, la), 0, _merge_two)
    return State(m, r, l2, le, best, argmax), AttentionState(ma, la)


@triton.jit
def load_state(state: tl.tensor, place: tl.tensor, n: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """One state of CLIP's from those at `place` [N] in scratch, slots of n numbers each."""
    states = State(
        tl.load(state + MAX * n + place, mask, LOWEST),
        tl.load(state + REST * n + place, mask, 0.0),
        tl.load(state + SQUARES * n + place, mask, 0.0),
        tl.load(state + ENTROPY * n + place, mask, 0.0),
        tl.load(state + BEST * n + place, mask, float("-inf")),
        tl.where(mask, tl.load(state + INDEX * n + place, mask, 0.0).to(tl.int32, bitcast=True), FAR),
    )
    merged, _ = merge(states, empty_attention(place.shape))
    return merged


@triton.jit
def store_state(state: tl.tensor, place: tl.tensor, n: tl.tensor, mask: tl.tensor, b_state: State) -> None:
    """Write CLIP's states to scratch, slots of n numbers each, at `place`."""
    tl.store(state + MAX * n + place, b_state.m, mask)
    tl.store(state + REST * n + place, b_state.r, mask)
    tl.store(state + SQUARES * n + place, b_state.l2, mask)
    tl.store(state + ENTROPY * n + place, b_state.le, mask)
    tl.store(state + BEST * n + place, b_state.best, mask)
    tl.store(state + INDEX * n + place, b_state.argmax.to(tl.float32, bitcast=True), mask)


@triton.jit
def store_attention(
    state: tl.tensor, place: tl.tensor, n: tl.tensor, mask: tl.tensor, b_attention: AttentionState
) -> None:  # fmt: skip
    """Write the attention's states to scratch, slots of n numbers each, at `place`."""
    tl.store(state + ATTENTION_MAX * n + place, b_attention.ma, mask)
    tl.store(state + ATTENTION_SUM * n + place, b_attention.la, mask)
