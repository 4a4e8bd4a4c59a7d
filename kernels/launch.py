"""Run the cubins that `aot.build` wrote, through cuda-bindings, without torch, Triton or compilation.

The export copies this file, plan.py and dlpack.py beside the server's model, so they import only each other. A start
reads the folder, loads the cubins of one compute capability and copies the weights to the GPU.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .plan import Variant, plan_launches

FORMAT = 3
PDL_ARCH = 90  # programmatic dependent launch came with compute capability 9.0
KINDS = {"i32": ctypes.c_int, "fp32": ctypes.c_float}


class LaunchError(RuntimeError):
    """A build cannot run here. The message is one line that names the file or the value at fault."""


class Gpu:
    """One GPU, used through CUDA's driver: the primary context, which CUDA's runtime shares, and a stream of its own.

    Addresses are plain integers, sizes are in bytes. Every method raises LaunchError where the driver fails.
    """

    def __init__(self, device: int = 0) -> None:
        from cuda.bindings import driver

        self._driver = driver
        self._ask(driver.cuInit, 0)
        self.device = device
        handle = self._ask(driver.cuDeviceGet, device)
        self._context = self._ask(driver.cuDevicePrimaryCtxRetain, handle)
        self.use()
        names = driver.CUdevice_attribute
        major, minor, self.multiprocessors = (
            self._ask(driver.cuDeviceGetAttribute, name, handle)
            for name in (
                names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
                names.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
            )
        )
        self.arch = major * 10 + minor
        self._stream = self._ask(driver.cuStreamCreate, driver.CUstream_flags.CU_STREAM_NON_BLOCKING.value)

    def use(self) -> None:
        """Make this GPU the calling thread's."""
        self._ask(self._driver.cuCtxSetCurrent, self._context)

    def allocate(self, size: int) -> int:
        return int(self._ask(self._driver.cuMemAlloc, size))

    def free(self, address: int) -> None:
        self._ask(self._driver.cuMemFree, address)

    def write(self, address: int, data: bytes) -> None:
        """Copy from the host and wait for it."""
        self._ask(self._driver.cuMemcpyHtoD, address, data, len(data))

    def copy(self, target: int, source: int, size: int) -> None:
        """Copy on the stream; each address may be of this GPU, of another or of the host."""
        self._ask(self._driver.cuMemcpyAsync, target, source, size, self._stream)

    def zero(self, address: int, numbers: int) -> None:
        """Write this many 32-bit zeros, on the stream."""
        self._ask(self._driver.cuMemsetD32Async, address, 0, numbers, self._stream)

    def synchronize(self) -> None:
        self._ask(self._driver.cuStreamSynchronize, self._stream)

    def load(self, code: bytes, symbol: str, shared: int) -> Any:
        """The kernel `symbol` of a cubin or of PTX, allowed its shared memory (beyond 48 KiB a kernel has to ask)."""
        module = self._ask(self._driver.cuModuleLoadData, code)
        function = self._ask(self._driver.cuModuleGetFunction, module, symbol.encode())
        wish = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self._ask(self._driver.cuFuncSetAttribute, function, wish, shared)
        return function

    def launch(
        self,
        function: Any,
        grid: Sequence[int],
        warps: int,
        shared: int,
        values: Sequence[Any],
        kinds: Sequence[Any],
        *,
        dependent: bool = False,
    ) -> None:
        """Launch on the stream, with arguments `values` of ctypes types `kinds`.

        dependent: the kernel may start before the one ahead of it ends, and waits for it by itself.
        """
        driver, config = self._driver, self._driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = (*grid, 1, 1)[:3]
        config.blockDimX, config.blockDimY, config.blockDimZ = 32 * warps, 1, 1
        config.sharedMemBytes, config.hStream = shared, self._stream
        if dependent:
            attribute, value = driver.CUlaunchAttribute(), driver.CUlaunchAttributeValue()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            value.programmaticStreamSerializationAllowed = 1
            attribute.value = value
            config.attrs, config.numAttrs = [attribute], 1
        self._ask(driver.cuLaunchKernelEx, config, function, (tuple(values), tuple(kinds)), 0)

    def _ask(self, function: Callable[..., tuple[Any, ...]], *arguments: Any) -> Any:
        try:
            code, *values = function(*arguments)
        except RuntimeError as error:  # cuda-bindings found no libcuda, or no such function in it
            raise LaunchError(f"no NVIDIA driver, or one too old: {error}") from None
        except (KeyError, ValueError) as error:  # a code newer than cuda-bindings
            raise LaunchError(f"CUDA: {function.__name__}: {error}") from None
        if int(code):
            text = self._driver.cuGetErrorString(code)[1]  # None for a code newer than this driver
            raise LaunchError(f"CUDA: {text.decode() if text else f'error {int(code)}'}")
        return values[0] if values else None


class CubinHead:
    """A folded head on one GPU, ready to launch.

    Args:
        folder: the folder that `aot.build` wrote.
        gpu: the GPU to run on. Launches follow each other on its stream, so they share scratch memory.

    Raises:
        LaunchError: not a folder of `aot.build`, a file that differs from its hash, a GPU that no cubin was built
            for, or a driver call that fails.
    """

    def __init__(self, folder: Path, gpu: Gpu) -> None:
        self.gpu = gpu
        self.manifest = read_manifest(folder)
        self.variant = Variant.from_json(json.dumps(self.manifest["variant"]))
        built, portable = pick_build(self.manifest, gpu.arch, folder)
        chosen = self.manifest["archs"][str(built)]
        self._settings = tuple((name, tuple(map(tuple, entries))) for name, entries in chosen["settings"])
        self._pdl = built >= PDL_ARCH
        self._kernels = {}
        for name, entry in chosen["kernels"].items():
            code = _read(folder, entry["ptx"] if portable else entry)
            self._kernels[name] = (gpu.load(code, entry["symbol"], entry["shared"]), entry)
        data = _read(folder, self.manifest["weights"])
        base = gpu.allocate(len(data))
        gpu.write(base, data)
        self._weights = {name: base + at for name, at in self.manifest["weights"]["at"].items()}
        self._scratch = self._scratch_size = 0

    def warm_up(self) -> None:
        """Launch every plan once on zeros, so that no request waits for CUDA to load a kernel."""
        batches = [1, 9, 17]  # 8 and 16 are the most images of a form of a kernel
        large = dict(dict(self._settings).get("score_tile", ()))
        if large and self.manifest["classes"] >= large["classes"]:
            batches.append(max(large["images"], 18))
        gpu, most = self.gpu, batches[-1]
        v, scores, index = (gpu.allocate(size) for size in (4 * most * self.variant.dim, 16 * most, 4 * most))
        gpu.zero(v, most * self.variant.dim)
        for images in batches:
            self(v, images, scores, index)
        gpu.synchronize()
        for address in (v, scores, index):
            gpu.free(address)

    def __call__(
        self,
        image_embedding: int,
        images: int,
        scores: int,
        index: int,
        *,
        image_type: str = "fp32",
        offsets: int = 0,
        text: tuple[int, int] | None = None,
    ) -> None:
        """Launch on the GPU's stream; addresses are the GPU's, at multiples of 16, valid until the stream is done.

        Args:
            image_embedding: (images, D), contiguous, of `image_type` ("fp32" or the class set's type).
            scores: (4, images) float32 out: failure_probability, confidence, entropy, doctor.
            index: (images,) int32 out.
            offsets: (images + 1,) int32 where every image has rows of its own.
            text: address and rows of other text embeddings, for an open vocabulary (plain layout only).

        Raises:
            LaunchError: an address that is not aligned, a type that no cubin was built for, or text with the folded
                layout.
        """
        if text is not None and self.variant.folded:
            raise LaunchError("the folded layout belongs to its own class set: build with layout 'plain' for others")
        table, rows = text or (self._weights["t"], self.manifest["classes"])
        for address in (image_embedding, scores, index, offsets, table):
            if address % 16:
                raise LaunchError(f"address {address:#x} is not a multiple of 16")
        if images < 1 or rows < 1:
            raise LaunchError(f"images and rows must be at least 1, got {images} and {rows}")
        logit_scale, attention_scale = self.manifest["logit_scale"], self.manifest["attention_scale"]
        plan = plan_launches(
            self.variant,
            images,
            rows,
            ragged=bool(offsets),
            settings=self._settings,
            multiprocessors=self.gpu.multiprocessors,
            shared_softmax=self.variant.shares_softmax(logit_scale, attention_scale),
            pdl=self._pdl,
        )
        self._reserve(plan.scratch * 4)
        values = self._weights | {name: self._scratch + 4 * start for name, start in plan.regions}
        values |= {
            "v": image_embedding,
            "t": table,
            "offsets": offsets,
            "scores": scores,
            "index": index,
            "B": images,
            "K": rows,
            "n_s": plan.splits,
            "logit_scale": logit_scale,
            "attention_scale": attention_scale,
            "prior": self.manifest["prior"],
        }
        for place, kernel in enumerate(plan.kernels):
            name = kernel.name if kernel.name in self._kernels else f"{kernel.name}-{image_type}"
            if name not in self._kernels:
                raise LaunchError(f"no kernel {name!r}: built for {', '.join(self._kernels)}")
            function, entry = self._kernels[name]
            kinds = [KINDS.get(kind, ctypes.c_void_p) for _, kind in entry["arguments"]]
            # Triton appends two pointers to every kernel's arguments: scratch it may ask for, never here.
            arguments = [values[argument] for argument, _ in entry["arguments"]] + [0, 0]
            kinds += [ctypes.c_void_p] * 2
            self.gpu.launch(
                function, kernel.grid, entry["num_warps"], entry["shared"], arguments, kinds,
                dependent=kernel.waits and place > 0,
            )  # fmt: skip

    def _reserve(self, scratch: int) -> None:
        if scratch > self._scratch_size:
            self.gpu.synchronize()  # an earlier launch may still use what is freed
            if self._scratch:
                self.gpu.free(self._scratch)
            self._scratch, self._scratch_size = self.gpu.allocate(scratch), scratch


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a build. Raises LaunchError naming the file where it is none of this format."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise LaunchError(f"{path}: not a build of the fused head ({error})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise LaunchError(f"{path}: format {FORMAT} expected; export again with this version")
    return manifest


def pick_build(manifest: dict[str, Any], have: int, folder: Path) -> tuple[int, bool]:
    """(compute capability, portable) of the build to run on a GPU.

    Its own cubins, or within 8.x those of an older one (later cubins are compiled for one chip alone). Else the
    portable PTX of an older build, which the driver compiles; it is slower than a cubin of the GPU's own.

    Raises:
        LaunchError: neither is there.
    """
    built = sorted(map(int, manifest["archs"]))
    fits = [arch for arch in built if arch == have or (arch // 10 == have // 10 == 8 and arch < have)]
    if fits:
        return fits[-1], False
    portable = [arch for arch in built if arch < have and manifest["archs"][str(arch)].get("portable")]
    if not portable:
        raise LaunchError(f"{folder}: built for compute capability {', '.join(map(str, built))}, this GPU has {have}")
    return portable[-1], True


def _read(folder: Path, entry: dict[str, Any]) -> bytes:
    path = folder / entry["file"]
    try:
        data = path.read_bytes()
    except OSError as error:
        raise LaunchError(f"{path}: cannot be read ({error})") from None
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise LaunchError(f"{path}: differs from the hash in manifest.json; export again")
    return data
