"""The README's commands one after another on a tiny model, as a user types them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.rollouts import CHAT_TEMPLATE, make_tokenizer
from tests.tiny_models import make_model

ROOT = Path(__file__).parents[1]


def run(*command: str) -> str:
    # Arguments of `python -m`, so that the environment's own accelerate is used.
    result = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_generate_train_export(kind, tmp_path):
    model = make_model(kind)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.3)  # flat distributions, so that turns end
    model.save_pretrained(tmp_path / "model")
    make_tokenizer(CHAT_TEMPLATE).save_pretrained(tmp_path / "model")
    paths = {name: str(tmp_path / name) for name in ("model", "rollouts.jsonl", "run", "export")}

    output = run(
        "recipes/generate_rollouts.py", "--model", paths["model"], "--output", paths["rollouts.jsonl"], "--count", "60",
        "--batch-size", "64", "--max-response-tokens", "30", "--temperature", "0.8",
    )  # fmt: skip
    assert "wrote 60 rollouts" in output

    output = run(
        "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "recipes/train_mtp.py", "--backbone", paths["model"],
        "--rollouts", paths["rollouts.jsonl"], "--output", paths["run"], "--temperature", "0.8", "--max_steps", "20",
        "--cold_start_steps", "10", "--learning_rate", "3e-3", "--tokens_per_micro_batch", "400",
        "--held_out_share", "0.2", "--draft_steps", "2",
    )  # fmt: skip
    assert "accept length (with bonus token)" in output
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["after"]["accept_length"] > report["before"]["accept_length"]
    assert len(report["after"]["alpha"]) == 2

    output = run(
        "recipes/export_mtp.py", "--head", paths["run"] + "/head", "--target", paths["model"], "--output", paths["export"]
    )
    assert f"vllm serve {paths['export']}" in output
    assert '"num_speculative_tokens": 2' in output
    assert "sample at temperature 0.8" in output
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 1
