"""DLPack tensors through ctypes, both ways with torch."""

import pytest
import torch

from vilu.kernels import dlpack


def test_dlpack_both_ways_with_torch():
    for dtype, name in (
        (torch.float32, "fp32"),
        (torch.float16, "fp16"),
        (torch.bfloat16, "bf16"),
        (torch.int32, "i32"),
    ):
        tensor = torch.arange(6).reshape(2, 3).to(dtype)
        view = dlpack.view(torch.utils.dlpack.to_dlpack(tensor))
        assert view == dlpack.View(tensor.data_ptr(), (2, 3), name, None)

        class Owner:
            alive = True

            def __del__(self):
                Owner.alive = False

        borrowed = torch.utils.dlpack.from_dlpack(dlpack.lend(view, Owner()))
        assert torch.equal(borrowed, tensor)
        assert borrowed.data_ptr() == tensor.data_ptr()
        assert Owner.alive
        del borrowed
        assert not Owner.alive
    capsule = torch.utils.dlpack.to_dlpack(tensor)
    torch.utils.dlpack.from_dlpack(capsule)
    with pytest.raises(ValueError, match="consumed before"):
        dlpack.view(capsule)
    with pytest.raises(ValueError, match="not contiguous"):
        dlpack.view(torch.utils.dlpack.to_dlpack(tensor.T))
    with pytest.raises(ValueError, match="expected i32, fp32"):
        dlpack.view(torch.utils.dlpack.to_dlpack(tensor.double()))
