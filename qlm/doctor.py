"""Is this environment fit: versions, hardware, which kernels run, and does transformers compute what the papers say."""

import importlib.metadata
import platform
from typing import Any

import torch

from qlm.calibrate import calibration_dtype
from qlm.engine.reference import self_check
from qlm.errors import QlmError
from qlm.kernels import cpu
from qlm.kernels.ops import kernel

PACKAGES = (
    "qlm", "torch", "transformers", "tokenizers", "safetensors", "bitsandbytes", "accelerate", "datasets", "huggingface_hub",
    "compressed-tensors", "optimum-quanto", "peft", "flash-attn", "triton",
)  # fmt: skip
CPU_FEATURES = (
    "avx2",
    "avx_vnni",
    "avx512_f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "dotprod",
)
# Largest difference of logits of order 1 in fp32, from the order of summation alone.
REFERENCE_TOLERANCE = 1e-4


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_kernels() -> dict[str, str]:
    """The library of CPU kernels: where it is, what it can run; or why not."""
    if not cpu.available():
        return {"library": cpu.why_not_available()}
    try:
        native = cpu.library()
    except QlmError as error:
        return {"library": str(error)}
    return {
        "library": str(native.path),
        "instruction set": f"{native.isa}; this machine runs {', '.join(native.supported)} of {', '.join(native.compiled)}",
        "threads": str(cpu.default_threads()),
    }


def examine() -> dict[str, Any]:
    """The report that `qlm doctor` prints; `verdict` is "healthy" or says what is wrong."""
    capabilities = torch.cpu.get_capabilities()
    differences = self_check()
    wrong = {name: difference for name, difference in differences.items() if not difference <= REFERENCE_TOLERANCE}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "python": platform.python_version(),
        "packages": {package: _version(package) for package in PACKAGES},
        "cpu": str(capabilities.get("cpu_name", platform.processor() or platform.machine())),
        "cpu features": " ".join(name for name in CPU_FEATURES if capabilities.get(name)) or "none known",
        "threads": str(torch.get_num_threads()),
        "cuda": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU",
        "kernels": {
            "int8_linear": kernel("int8_linear", device),
            "gptq_linear": kernel("gptq_linear", device),
            "nf4": kernel("nf4_linear", device, otherwise="bitsandbytes: dequantize, then multiply"),
            "calibration": f"blocks in {str(calibration_dtype('cpu')).removeprefix('torch.')}, Hessians in float32",
        },
        "CPU kernels": _cpu_kernels(),
        "reference check (largest logit difference from transformers)": {
            name: f"{difference:.1e}" for name, difference in differences.items()
        },
        "verdict": "healthy"
        if not wrong
        else f"transformers {_version('transformers')} computes wrong logits: {sorted(wrong)}",
    }
