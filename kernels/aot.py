"""Compile the fused head's kernels ahead of time: cubins, weights and a manifest for `launch.py`. It needs no GPU.

A folder holds `manifest.json`, `weights.bin` and a cubin for each compute capability, kernel and, where a kernel reads
the image embedding, type of that. The manifest has the launch settings that the cubins were compiled with, what each
uses of the chip, and the SHA-256 of every file.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource

from vilu import atomic
from vilu.errors import UserError
from vilu.kernels import fused
from vilu.kernels.folding import FoldedHead
from vilu.kernels.launch import FORMAT, PDL_ARCH
from vilu.kernels.plan import Kernel, Variant, all_kernels, tuned

# Shared memory one block may have, bytes: CUDA C++ Programming Guide, technical specifications per compute capability.
# 8.0 has 163 KB, but what is built for it also runs on the rest of 8.x, and as PTX on 12.1, which have 99 KB.
SHARED_LIMIT = {80: 99 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
TENSOR_MEMORY_LIMIT = 512  # columns; Triton turns a kernel that wants more into a bare trap
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
STORED = ("t", "query", "predicted", "attended", "packed")
NUMBERS = {"B": "i32", "K": "i32", "n_s": "i32", "logit_scale": "fp32", "attention_scale": "fp32", "prior": "fp32"}


@dataclass(frozen=True)
class Compiled:
    """One cubin and what it uses of the chip.

    registers: of a thread.
    spilled: bytes of a thread's stack, where registers spill to.
    shared: bytes of shared memory of a block.
    arguments: (value's name, type) in the order of the launch.
    """

    cubin: bytes
    ptx: str
    symbol: str
    num_warps: int
    registers: int
    spilled: int
    shared: int
    arguments: tuple[tuple[str, str], ...]


def compile_kernel(kernel: Kernel, variant: Variant, arch: int, *, stored: torch.dtype, image: torch.dtype) -> Compiled:
    """Compile one kernel for a compute capability.

    Args:
        stored: the class set's type, and that of every weight.
        image: the image embedding's type.

    Raises:
        UserError: a compute capability that is not in SHARED_LIMIT, or a kernel too large for it.
    """
    if arch not in SHARED_LIMIT:
        raise UserError(f"cuda-arch {arch}: expected one of {', '.join(map(str, SHARED_LIMIT))}")
    function = fused.KERNELS[kernel.function]
    constants = dict(kernel.constants)
    absent = {
        "query": not variant.projected,
        "predicted": not ("predicted" in variant.parts and variant.folded),
        "attended": not ("attended" in variant.parts and variant.folded),
        "offsets": not constants.get("RAGGED"),
    }
    signature = {}
    for name in function.arg_names:
        if absent.get(name, False):
            constants[name] = None
        if name in constants:
            signature[name] = "constexpr"
        elif name in NUMBERS:
            signature[name] = NUMBERS[name]
        elif name in STORED:
            signature[name] = "*" + TYPES[stored]
        else:
            signature[name] = {"v": "*" + TYPES[image], "index": "*i32", "offsets": "*i32"}.get(name, "*fp32")
    places = [(i,) for i, name in enumerate(function.arg_names) if signature[name].startswith("*")]
    source = ASTSource(function, signature, constants, {place: [["tt.divisibility", 16]] for place in places})
    target = GPUTarget("cuda", arch, 32)
    made = triton.compile(source, target=target, options={"num_warps": kernel.num_warps, "maxnreg": kernel.registers})
    tensor_memory = getattr(made.metadata, "tmem_size", 0) or 0
    if made.metadata.shared > SHARED_LIMIT[arch] or tensor_memory > TENSOR_MEMORY_LIMIT:
        raise UserError(
            f"kernel {kernel.name} on compute capability {arch}: needs {made.metadata.shared} bytes of shared memory "
            f"(limit {SHARED_LIMIT[arch]}), {tensor_memory} columns of tensor memory (limit {TENSOR_MEMORY_LIMIT})"
        )
    assert made.metadata.global_scratch_size == made.metadata.profile_scratch_size == 0
    registers, spilled = _usage(made.asm["cubin"])
    arguments = tuple((name, kind) for name, kind in signature.items() if kind != "constexpr")
    return Compiled(
        cubin=made.asm["cubin"],
        ptx=made.asm["ptx"],
        symbol=made.metadata.name,
        num_warps=kernel.num_warps,
        registers=registers,
        spilled=spilled,
        shared=made.metadata.shared,
        arguments=arguments,
    )


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack (where spills go) of a thread, as NVIDIA's own cuobjdump reads them."""
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", run.stdout)
    assert found, run.stdout
    return int(found[1]), int(found[2]) + int(found[3])


def variants(
    folded: FoldedHead, arch: int, image_types: Iterable[torch.dtype]
) -> Iterator[tuple[str, Callable[[], Compiled]]]:
    """(name, compile) of every cubin that this head may need on a compute capability; each call can be pickled.

    A kernel that reads the image embedding has a cubin for each of its types, named after the type.
    """
    variant, stored = folded.variant, folded.text_embeddings.dtype
    shared_softmax = variant.shares_softmax(folded.logit_scale, folded.attention_scale)
    for kernel in all_kernels(variant, tuned(arch, variant), shared_softmax=shared_softmax, pdl=arch >= PDL_ARCH):
        reads_image = "v" in fused.KERNELS[kernel.function].arg_names
        for image in image_types if reads_image else [stored]:
            name = f"{kernel.name}-{TYPES[image]}" if reads_image else kernel.name
            yield name, functools.partial(compile_kernel, kernel, variant, arch, stored=stored, image=image)


def build(
    folded: FoldedHead,
    archs: Sequence[int],
    output: Path,
    *,
    image_types: Sequence[torch.dtype] = (),
    progress: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Compile every kernel for every compute capability into the folder `output`, replaced whole; its manifest.

    Args:
        image_types: types of the image embedding; by default float32 and the class set's own type.
        progress: called with a line after each compute capability.

    Raises:
        UserError: an unknown compute capability, or a kernel that does not fit one; nothing is written then. So too
            under TRITON_INTERPRET, which leaves nothing to compile.

    The oldest build also keeps its PTX where that is of 8.x: a GPU without cubins of its own runs it.
    """
    if fused.INTERPRETED:
        raise UserError("TRITON_INTERPRET is set: nothing can be compiled while it is")
    variant = folded.variant
    stored = folded.text_embeddings.dtype
    with atomic.folder(output) as work:
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "triton": triton.__version__,
            "variant": asdict(variant),
            "stored": TYPES[stored],
            "logit_scale": folded.logit_scale,
            "attention_scale": folded.attention_scale,
            "prior": folded.prior or 0.0,
            "classes": len(folded.text_embeddings),
            "weights": _write_weights(folded, work / "weights.bin"),
            "archs": {},
        }
        for arch in archs:
            made: dict[str, Any] = {}
            portable = arch == min(archs) and arch < PDL_ARCH
            # One after the other: CPython 3.11 fails at random where two threads parse source, as Triton does.
            for name, make in variants(folded, arch, image_types or dict.fromkeys((torch.float32, stored))):
                done = asdict(make())
                cubin, ptx = done.pop("cubin"), done.pop("ptx")
                made[name] = _write(work / f"{name}-sm{arch}.cubin", cubin) | done
                if portable:
                    made[name]["ptx"] = _write(work / f"{name}-sm{arch}.ptx", ptx.encode() + b"\0")
            manifest["archs"][str(arch)] = {"settings": tuned(arch, variant), "portable": portable, "kernels": made}
            progress(f"compiling for sm_{arch}")
        (work / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
    return manifest


def _write_weights(folded: FoldedHead, path: Path) -> dict[str, Any]:
    """Write the kernels' tensors, each from a multiple of 256 bytes; where they lie, and the file's hash."""
    tensors = folded.kernel_tensors()
    tensors["t"] = tensors.pop("text_embeddings")
    data, at = bytearray(), {}
    for name, tensor in sorted(tensors.items()):
        if tensor is not None:
            data += bytes(-len(data) % 256)
            at[name] = len(data)
            data += tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return _write(path, bytes(data)) | {"at": at}


def _write(path: Path, data: bytes) -> dict[str, Any]:
    path.write_bytes(data)
    return {"file": path.name, "sha256": hashlib.sha256(data).hexdigest()}
