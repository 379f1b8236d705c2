import json
import sys

import pytest

from benchmarks import training_step
from tests.training.test_trainer import make_config


def test_the_naive_step_has_our_loss_and_gradient(tmp_path, monkeypatch, capsys):
    """What is compared in time does the same work; the step in plain PyTorch is an oracle of the whole step."""
    config = make_config(tmp_path, "qwen2", tokens_per_micro_batch=120, dtype="fp32", max_steps=8)
    (tmp_path / "c.yaml").write_text(config.as_yaml())
    options = ["--config", str(tmp_path / "c.yaml"), "--steps", "1", "--output", str(tmp_path / "out" / "step")]
    monkeypatch.setattr(sys, "argv", ["training_step", *options])
    training_step.main()
    report = json.loads((tmp_path / "out" / "step.json").read_text())
    assert len(report["variants"]) == 4
    for name, variant in report["variants"].items():
        assert variant["differs_by"] == pytest.approx({"loss": 0, "grad_norm": 0}, abs=1e-5), name
    assert (tmp_path / "out" / "step.png").exists()
    assert "tokens/s" in capsys.readouterr().out
