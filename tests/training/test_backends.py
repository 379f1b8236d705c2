"""A training run has the same curve whichever implementation of the row passes works on it."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml

from tests.training.test_trainer import make_config, records

CHILD = """
import runpy, sys, torch
from bebop.kernels.rows import row_passes
assert row_passes(torch.device("cpu"), torch.float32).__name__.endswith(sys.argv.pop(1))
runpy.run_path("recipes/train_mtp.py", run_name="__main__")
"""


def test_the_curve_is_the_same_with_triton(tmp_path):
    curves = {}
    config = make_config(tmp_path, "qwen2", loss="e2e_tv + 0.1 expected_rounds", max_steps=4, tokens_per_micro_batch=100)
    for interpret in ("0", "1"):
        mine = replace(config, output=str(tmp_path / f"run{interpret}"))
        path = tmp_path / f"{interpret}.yaml"
        path.write_text(yaml.safe_dump(vars(mine)))
        subprocess.run(
            [sys.executable, "-c", CHILD, "rows_triton" if interpret == "1" else "rows_torch", "--config", path],
            env=os.environ | {"TRITON_INTERPRET": interpret, "TRITON_DEFAULT_FP_FUSION": "1"},
            check=True,
            capture_output=True,
        )
        curves[interpret] = [(r["loss"], r["accept_length"], r["grad_norm"]) for r in records(mine, "training")]
    assert len(curves["0"]) == 4
    assert curves["0"][0][0] != pytest.approx(curves["0"][-1][0], rel=1e-3), "the run learns something"
    for torch_step, triton_step in zip(curves["0"], curves["1"], strict=True):
        assert triton_step == pytest.approx(torch_step, rel=1e-3)
