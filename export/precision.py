"""What a precision is: what it may lose, and which servers can run it. float16.py and int8.py rewrite the graphs.

Logits, softmax, LayerNorm statistics, the last normalisation and the whole head are float32 in all of them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass

from vilu.errors import UserError


@dataclass(frozen=True)
class Budget:
    """What an export may lose against the eager float32 model; a limit that is None is not checked.

    Attributes:
        error: largest absolute difference of any output.
        cosine: least mean cosine between the embeddings of the two.
        agreement: least share of inputs that get the same class, from 0 to 1.
        auc_loss: largest fall of the AUC of failure_probability; 0.003 is 0.3 points.

    Examples:
        >>> BUDGETS["int8"].as_dict()
        {'cosine': 0.99, 'agreement': 0.985, 'auc_loss': 0.003}
    """

    error: float | None
    cosine: float | None
    agreement: float
    auc_loss: float | None = None

    def as_dict(self) -> dict[str, float]:
        """The limits that are checked, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


BUDGETS = {
    "float32": Budget(error=1e-4, cosine=None, agreement=1.0),
    "float16": Budget(error=None, cosine=0.999, agreement=0.995),
    "bfloat16": Budget(error=None, cosine=0.999, agreement=0.995),
    "int8": Budget(error=None, cosine=0.99, agreement=0.985, auc_loss=0.003),
}
# For the head, which is float32 in every precision, and for the joined graph against its own parts.
HEAD_BUDGET = BUDGETS["float32"]
# How far failure_probability may change with the batch that an image is computed in before the report says so.
MAX_BATCH_EFFECT = 1e-6
# Operators that multiply by weights or by one another, where a reduced precision gains speed.
PRODUCTS = ("MatMul", "Gemm", "Conv", "MultiHeadAttention")

PROVIDERS = {"cpu": ("openvino", "cpu"), "gpu": ("cuda", "tensorrt")}


def needs(precision: str, cpu_flags: Collection[str]) -> str:
    """What a processor lacks to run a precision faster than float32; "" where it lacks nothing.

    Args:
        cpu_flags: as /proc/cpuinfo names them. On ARM those are asimddp and bf16.

    Examples:
        >>> needs("int8", {"avx2"})
        'VNNI'
        >>> needs("int8", {"avx2", "avx512_vnni"})
        ''
    """
    hardware = {
        "int8": ("VNNI", {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"}),
        "bfloat16": ("AMX and AVX512-BF16", {"amx_bf16", "avx512_bf16", "bf16"}),
    }
    name, flags = hardware.get(precision, ("", set()))
    return "" if not flags or flags & set(cpu_flags) else name


def check(precision: str, device: str, provider: str, *, has_openvino: bool, has_bfloat16: bool) -> None:
    """Refuse a precision that the servers cannot run, or that this machine cannot measure.

    Raises:
        UserError: the precision or the provider is unknown, or they and the device do not fit together.
    """
    if precision not in BUDGETS:
        raise UserError(f"precision must be one of {', '.join(BUDGETS)}, got {precision!r}")
    if provider not in PROVIDERS[device]:
        raise UserError(f"provider {provider!r} is not for --device {device}: use {' or '.join(PROVIDERS[device])}")
    if provider == "openvino" and not has_openvino:
        raise UserError("provider openvino: OpenVINO is not installed here: pip install openvino")
    if precision == "float16" and device == "cpu":
        raise UserError("float16 is for GPU servers (--device gpu); a CPU has bfloat16 and int8")
    if precision == "bfloat16" and device == "gpu":
        raise UserError("bfloat16 on a GPU: ONNX operator set 20 has no bfloat16 convolution or GELU; use float16")
    if precision == "bfloat16" and provider != "openvino":
        how = "leave out --provider" if has_openvino else "pip install openvino"
        raise UserError(f"bfloat16 on a CPU is OpenVINO's, and the provider is {provider}: {how}")
    if precision == "bfloat16" and not has_bfloat16:
        raise UserError("bfloat16: this CPU has neither AMX nor AVX512-BF16, so nothing can be proven here")
    if precision == "int8" and provider == "cuda":
        raise UserError("int8 on a GPU is TensorRT's: add --provider tensorrt")
