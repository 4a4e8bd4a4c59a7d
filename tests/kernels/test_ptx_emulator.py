"""What the PTX emulator itself must find, on a kernel of twenty lines by which one block sends another a message."""

import numpy as np
import pytest

from tests.kernels.ptx_emulator import Kernel, Memory, RaceError

# Block 0 writes a number a thread and counts itself; block 1 waits for the count and reads what its other warp wrote.
MESSAGE = """
.visible .entry message(
	.param .u64 .ptr .global .align 16 numbers,
	.param .u64 .ptr .global .align 16 counter
)
.reqntid 64
{
	.reg .pred %p<4>;
	.reg .b32 %r<8>;
	.reg .b64 %rd<8>;
	ld.param.b64 %rd1, [numbers];
	ld.param.b64 %rd2, [counter];
	mov.u32 %r1, %ctaid.x;
	mov.u32 %r2, %tid.x;
	mul.wide.u32 %rd3, %r2, 4;
	add.s64 %rd4, %rd1, %rd3;
	setp.ne.b32 %p1, %r1, 0;
	@%p1 bra $WAIT;
	st.global.b32 [ %rd4 + 0 ], { %r2 };
	bar.sync 0;
	setp.eq.b32 %p2, %r2, 0;
	mov.b32 %r3, 1;
	@%p2 atom.global.gpu.release.add.u32 %r4, [ %rd2 + 0 ], %r3;
	ret;
$WAIT:
	ld.acquire.gpu.global.b32 %r5, [%rd2];
	setp.lt.s32 %p3, %r5, 1;
	@%p3 bra $WAIT;
	xor.b32 %r6, %r2, 33;
	mul.wide.u32 %rd5, %r6, 4;
	add.s64 %rd6, %rd1, %rd5;
	ld.global.b32 { %r7 }, [ %rd6 + 0 ];
	ret;
}
"""


def run(ptx: str, **options) -> None:
    memory = Memory()
    numbers, counter = memory.new(256), memory.new(256)
    memory.tensors[1][:] = 0
    Kernel(ptx).run(memory, (2,), [numbers, counter], 0, **options)
    assert memory.get(numbers, np.uint32, 64).tolist() == list(range(64))


def test_a_message_between_blocks_is_no_race():
    for seed in range(8):
        run(MESSAGE, seed=seed)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("ld.acquire", "ld.relaxed"),
        ("gpu.release", "gpu.relaxed"),
        ("\tbar.sync 0;\n", ""),
        ("ld.acquire.gpu.global", "ld.global"),
    ],
)
def test_a_message_without_one_part_is_a_race_in_every_order(old, new):
    assert old in MESSAGE
    for seed in range(8):
        with pytest.raises(RaceError, match=r"at the same time|without an atomic"):
            run(MESSAGE.replace(old, new), seed=seed)


def test_blocks_that_wait_for_a_later_one_are_found():
    with pytest.raises(AssertionError, match="wait for each other for ever"):
        run(MESSAGE, at_once=-1)
