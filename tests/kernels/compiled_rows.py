"""Compiles every shipped variant of the Triton row passes ahead of time, without a GPU; run by test_rows_triton.py.

`python -m tests.kernels.compiled_rows` prints registers, spills and shared memory of each.
"""

import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # triton warns where it is not set

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from bebop.kernels import rows_triton

ARCHITECTURES = {80: "sm_80", 90: "sm_90a", 100: "sm_100a"}
SHARED_BYTES = 227 * 1024
SUMS = ("ALPHA", "KL", "REVERSE_KL", "TARGET_ENTROPY", "DRAFT_ENTROPY")
TERMS = ("BELOW", "P", "LOG_RATIO", "TOKEN")
INTEGERS = ("index", "tokens")
LOGITS = ("x", "z", "t")


# What the objectives of LOSSES and the evaluation ask for, and everything at once.
ASKED_SUMS = [("ALPHA",), ("ALPHA", "KL"), ("ALPHA", "REVERSE_KL"), ("ALPHA", "KL", "TARGET_ENTROPY"), SUMS]
ASKED_TERMS = [("BELOW",), ("BELOW", "P"), ("P",), ("TOKEN",), ("BELOW", "TOKEN"), ("LOG_RATIO",), TERMS]


def variants() -> Iterator[tuple[str, object, dict[str, bool], str, str]]:
    """Name, kernel, flags, logits dtype and output dtype. The op's logits are fp32."""
    for logits in ("fp32", "bf16", "fp16"):
        yield "log_sum_exp", rows_triton.log_sum_exp_kernel, {}, logits, "fp32"
        for wanted in ASKED_SUMS if logits == "fp32" else [SUMS]:
            yield "statistics", rows_triton.statistics_kernel, {flag: flag in wanted for flag in SUMS}, logits, "fp32"
        for wanted in ASKED_TERMS if logits == "fp32" else [TERMS]:
            for out in ("fp32", "bf16", "fp16"):
                yield "gradient", rows_triton.gradient_kernel, {flag: flag in wanted for flag in TERMS}, logits, out


def compile_one(kernel, flags: dict[str, bool], logits: str, out: str, architecture: int, aligned: bool) -> dict[str, int]:
    """Registers, spilled bytes and shared memory of one variant on one architecture.

    aligned: the vocabulary and the rows' strides are multiples of 16, as real ones are; loads are then wide.
    """
    tiles = rows_triton.GRADIENT if kernel is rows_triton.gradient_kernel else rows_triton.REDUCTION
    constants = flags | {"BLOCK": tiles["BLOCK"]}
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name == "V" or name.startswith("stride"):
            signature[name] = "i32"
        elif name in INTEGERS:
            signature[name] = "*i64"
        else:
            dtype = logits if name in LOGITS else out if name == "out" else "fp64" if name == "total_out" else "fp32"
            signature[name] = f"*{dtype}"
    divisible = ("*", "i") if aligned else ("*",)
    attributes = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if signature[name].startswith(divisible)
    }
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(k),): v for k, v in constants.items()},
        attrs=attributes,
    )
    found = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": tiles["num_warps"]})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(found.asm["ptx"])
        said = subprocess.run(
            [get_ptxas(architecture).path, "-v", f"--gpu-name={ARCHITECTURES[architecture]}", path, "-o", os.devnull],
            capture_output=True, text=True, check=True,
        ).stderr  # fmt: skip
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", said))
    (registers,) = re.findall(r"Used (\d+) registers", said)
    return {"registers": int(registers), "spilled": spills, "shared": found.metadata.shared}


def main() -> int:
    bad = 0
    for architecture, aligned in itertools.product(ARCHITECTURES, (True, False)):
        for name, kernel, flags, logits, out in variants():
            found = compile_one(kernel, flags, logits, out, architecture, aligned)
            on = "+".join(flag.lower() for flag, is_on in flags.items() if is_on)
            kind = f"{name:12} {logits}->{out} {'aligned' if aligned else 'odd':8} {on:50}"
            print(f"sm_{architecture} {kind}", *(f"{k} {v}" for k, v in found.items()))
            bad += found["spilled"] > 0 or found["shared"] > SHARED_BYTES
    print(f"{bad} variants spill or take more than {SHARED_BYTES} bytes of shared memory")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
