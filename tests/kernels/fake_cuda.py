"""A stand-in for cuda.bindings.driver where there is no GPU.

Device memory is host memory. A launch is decoded as the real driver does it, from the cubin's own parameter table; the
last kernel of a batch writes the answer, which the folded head computes in PyTorch.
"""

# ruff: noqa: N802

import ctypes
import hashlib
import re
import struct
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from cuda.bindings import driver
from triton.backends.nvidia import compiler as nvidia

from vilu.kernels import FoldedHead


def parameters(cubin: bytes) -> list[tuple[int, int]]:
    """(offset, size) of every parameter of the cubin's kernel, in order, as NVIDIA's cuobjdump reads them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
        dump = subprocess.run([tool, "-elf", file.name], capture_output=True, text=True, check=True).stdout
    rows = re.findall(r"Ordinal : (\w+)\s+Offset  : (\w+)\s+Size    : (\w+)", dump)
    found = {int(ordinal, 16): (int(offset, 16), int(size, 16)) for ordinal, offset, size in rows}
    return [found[i] for i in range(len(found))]


class FakeDriver:
    CUdevice_attribute = driver.CUdevice_attribute
    CUfunction_attribute = driver.CUfunction_attribute
    CUstream_flags = driver.CUstream_flags
    CUlaunchConfig = driver.CUlaunchConfig
    CUlaunchAttribute = driver.CUlaunchAttribute
    CUlaunchAttributeValue = driver.CUlaunchAttributeValue
    CUlaunchAttributeID = driver.CUlaunchAttributeID

    def __init__(self, folded: FoldedHead, manifest: dict, arch: tuple[int, int] = (9, 0)) -> None:
        self.folded, self.arch = folded, arch
        kernels = manifest["archs"][str(10 * arch[0] + arch[1])]["kernels"]
        self.arguments = {name: [argument for argument, _ in entry["arguments"]] for name, entry in kernels.items()}
        self.threads = {name: 32 * entry["num_warps"] for name, entry in kernels.items()}
        self.names = {entry["sha256"]: name for name, entry in kernels.items()}
        self.symbols = {name: entry["symbol"] for name, entry in kernels.items()}
        self.stream = driver.CUstream(7)
        self.seen: dict[str, int] = {}
        self.memory: dict[int, np.ndarray] = {}
        self.launched: list[str] = []
        self.copied: list[tuple[int, int, int]] = []

    def cuInit(self, flags):
        return (0,)

    def cuGetErrorString(self, code):
        return 0, b"it failed"

    def cuDeviceGet(self, ordinal):
        return 0, ordinal

    def cuDevicePrimaryCtxRetain(self, device):
        return 0, "context"

    def cuCtxSetCurrent(self, context):
        return (0,)

    def cuDeviceGetAttribute(self, name, device):
        names = self.CUdevice_attribute
        return 0, {
            names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: self.arch[0],
            names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: self.arch[1],
            names.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: 132,
        }[name]

    def cuStreamCreate(self, flags):
        return 0, self.stream

    def cuStreamSynchronize(self, stream):
        assert stream is self.stream
        return (0,)

    def cuMemAlloc(self, size):
        memory = np.full(size + 256, 0xFF, np.uint8)  # every float of it is NaN
        address = -(-memory.ctypes.data // 256) * 256
        self.memory[address] = memory
        return 0, address

    def cuMemFree(self, address):
        del self.memory[address]
        return (0,)

    def cuMemcpyHtoD(self, target, source, size):
        ctypes.memmove(target, source, size)
        return (0,)

    def cuMemcpyAsync(self, target, source, size, stream):
        assert stream is self.stream
        self.copied.append((target, source, size))
        ctypes.memmove(target, source, size)
        return (0,)

    def cuMemsetD32Async(self, address, value, count, stream):
        ctypes.memset(address, value, 4 * count)
        return (0,)

    def cuModuleLoadData(self, cubin):
        return 0, SimpleNamespace(cubin=cubin)

    def cuModuleGetFunction(self, module, symbol):
        name = self.names[hashlib.sha256(module.cubin).hexdigest()]
        assert symbol.decode() == self.symbols[name]
        return 0, SimpleNamespace(name=name, parameters=parameters(module.cubin), shared=0)

    def cuFuncSetAttribute(self, function, attribute, value):
        function.shared = value
        return (0,)

    def cuLaunchKernelEx(self, config, function, packed, extra):
        assert (int(config.hStream), extra, config.sharedMemBytes) == (7, 0, function.shared)
        assert (config.blockDimX, config.blockDimY, config.blockDimZ) == (self.threads[function.name], 1, 1)
        assert min(config.gridDimX, config.gridDimY, config.gridDimZ) >= 1
        first = not self.launched or self.launched[-1].startswith("tail")
        assert config.numAttrs == (0 if first or self.arch < (9, 0) else 1), "the first launch waits for all before it"
        values, kinds = packed
        names = self.arguments[function.name]
        assert len(values) == len(kinds) == len(names) + 2 == len(function.parameters)
        block = bytearray(sum(function.parameters[-1]))
        for value, kind, (offset, size) in zip(values, kinds, function.parameters, strict=True):
            assert ctypes.sizeof(kind) == size
            block[offset : offset + size] = bytes(kind(value))
        sent = {name: self._read(block, *at) for name, at in zip(names, function.parameters, strict=False)}
        self.launched.append(function.name)
        self._check_weights(sent)
        self.seen = sent if first else self.seen | sent
        if function.name.startswith("tail"):
            self._answer(self.seen, sent["B"])
        return (0,)

    @staticmethod
    def _read(block: bytearray, offset: int, size: int) -> int:
        return int.from_bytes(block[offset : offset + size], "little")

    def _check_weights(self, sent: dict[str, int]) -> None:
        folded = self.folded
        query = folded.keys if folded.layout == "folded" else folded.query_map
        weights = {"t": folded.text_embeddings, "query": query, "packed": folded.packed, "predicted": folded.predicted}
        for name in weights.keys() & sent.keys():
            want = weights[name].numpy()
            got = np.ctypeslib.as_array((ctypes.c_float * want.size).from_address(sent[name])).reshape(want.shape)
            assert np.array_equal(got, want), name
        if "prior" in sent:
            assert struct.pack("<I", sent["prior"]) == struct.pack("<f", folded.prior or 0.0)

    def _answer(self, sent: dict[str, int], images: int) -> None:
        dim = self.folded.text_embeddings.shape[1]
        v = np.ctypeslib.as_array((ctypes.c_float * (images * dim)).from_address(sent["v"])).reshape(images, dim)
        out = self.folded(torch.from_numpy(v.copy()))
        columns = (out.failure_probability, out.confidence, out.entropy, out.doctor)
        scores, index = torch.stack(columns).numpy(), out.class_index.int().numpy()
        ctypes.memmove(sent["scores"], scores.ctypes.data, scores.nbytes)
        ctypes.memmove(sent["index"], index.ctypes.data, index.nbytes)
