"""The Triton row passes without a GPU. The interpreter and the compiler exclude each other, hence processes of their own."""

import os
import subprocess
import sys


def run(module: list[str], **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *module],
        env=os.environ | environment | {"TRITON_DEFAULT_FP_FUSION": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]


def test_interpreted():
    run(["pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/interpreted_rows.py"], TRITON_INTERPRET="1")


def test_compiled_ahead_of_time():
    """Every shipped variant for sm_80, sm_90 and sm_100, with no spilled register."""
    run(["tests.kernels.compiled_rows"], TRITON_INTERPRET="0")
