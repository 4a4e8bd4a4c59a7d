"""The fused head compiled ahead of time: cubins, weights and a manifest that `launch.py` runs from; no GPU needed here.

A folder holds `manifest.json`, `weights.bin` and one cubin for each (compute capability, kernel, type of the image
embedding, own class sets or one). The manifest carries the launch settings that the cubins were compiled with, what
each uses of the chip, and the SHA-256 of every file.
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
from vilu.kernels.launch import FORMAT
from vilu.kernels.plan import Kernel, Variant, all_kernels, tuned

# Shared memory one block may have, bytes: CUDA C++ Programming Guide, technical specifications per compute capability.
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
TENSOR_MEMORY_LIMIT = 512  # columns; Triton turns a kernel that wants more into a bare trap
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
FIXED = {"scratch": "*fp32", "arrived": "*i32", "scores": "*fp32", "index": "*i32", "offsets": "*i32"}
NUMBERS = {"B": "i32", "K": "i32", "n_s": "i32", "logit_scale": "fp32", "attention_scale": "fp32", "prior": "fp32"}


@dataclass(frozen=True)
class Compiled:
    """One cubin and what it uses: registers a thread, spilled bytes a thread, shared memory a block in bytes."""

    cubin: bytes
    ptx: str
    symbol: str
    num_warps: int
    registers: int
    spilled: int
    shared: int
    arguments: tuple[tuple[str, str], ...]  # name and type, in the order of the launch


def compile_kernel(
    kernel: Kernel,
    variant: Variant,
    arch: int,
    *,
    stored: torch.dtype,
    image: torch.dtype,
    ragged: bool,
    shared_softmax: bool,
) -> Compiled:
    """Compile one kernel for a compute capability.

    Raises:
        UserError: a compute capability that is not in SHARED_LIMIT, or a kernel too large for it.
    """
    if arch not in SHARED_LIMIT:
        raise UserError(f"cuda-arch {arch}: expected one of {', '.join(map(str, SHARED_LIMIT))}")
    function = fused.KERNELS[kernel.name]
    constants = kernel.constants(variant, ragged=ragged, shared_softmax=shared_softmax)
    attended, predicted = "attended" in variant.parts, "predicted" in variant.parts
    absent = {
        "query": not variant.projected,
        "predicted": not (predicted and variant.folded),
        "attended": not (attended and variant.folded),
        "offsets": not ragged,
    }
    signature = {}
    for name in function.arg_names:
        if absent.get(name, False):
            constants[name] = None
        if name in constants:
            signature[name] = "constexpr"
        elif name in NUMBERS:
            signature[name] = NUMBERS[name]
        else:
            signature[name] = FIXED.get(name, "*" + TYPES[image if name == "v" else stored])
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
        made.asm["cubin"],
        made.asm["ptx"],
        made.metadata.name,
        kernel.num_warps,
        registers,
        spilled,
        made.metadata.shared,
        arguments,
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
    """(name, compile) of every cubin that this head may need on a compute capability; each call can be pickled."""
    variant = folded.variant
    for kernel in all_kernels(tuned(arch, variant)):
        for image in image_types:
            for ragged in (False, True) if kernel.name == "attend_image" else (False,):
                name = "-".join([kernel.name, TYPES[image], *(["ragged"] if ragged else [])])
                yield (
                    name,
                    functools.partial(
                        compile_kernel,
                        kernel,
                        variant,
                        arch,
                        stored=folded.text_embeddings.dtype,
                        image=image,
                        ragged=ragged,
                        shared_softmax=variant.shares_softmax(folded.logit_scale, folded.attention_scale),
                    ),
                )


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
        image_types: what the image embedding may come as; by default float32 and the bank's own type.
        progress: called with a line after each compute capability.

    Raises:
        UserError: an unknown compute capability, or a kernel that does not fit one; nothing is written then. So too
            under TRITON_INTERPRET, which leaves nothing to compile.
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
            # One after the other: CPython 3.11 fails at random where two threads parse source, as Triton does.
            for name, make in variants(folded, arch, image_types or dict.fromkeys((torch.float32, stored))):
                done = asdict(make())
                cubin = done.pop("cubin")
                del done["ptx"]
                file = f"{name}-sm{arch}.cubin"
                (work / file).write_bytes(cubin)
                made[name] = {"file": file, "sha256": hashlib.sha256(cubin).hexdigest(), **done}
            manifest["archs"][str(arch)] = {"settings": tuned(arch, variant), "kernels": made}
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
    path.write_bytes(data)
    return {"file": path.name, "sha256": hashlib.sha256(data).hexdigest(), "at": at}
