"""recipes/compare_losses.py on a tiny model, as a user calls it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.rollouts import write_tiny_rollouts
from tests.tiny_models import make_checkpoint

ROOT = Path(__file__).parents[1]
OBJECTIVES = ("ce", "e2e_tv", "lk_hybrid, then e2e_tv", "e2e_tv over temperatures")


@pytest.fixture
def arguments(tmp_path) -> list[str]:
    model = make_checkpoint(tmp_path / "model", "qwen2")
    training = write_tiny_rollouts(tmp_path / "training.jsonl", model)
    held_out = [
        write_tiny_rollouts(tmp_path / f"at-{t}.jsonl", model, count=12, temperature=t, seed=seed)
        for seed, t in enumerate((0.7, 1.0, 1.3), start=5)
    ]
    return [
        "--backbone", str(model), "--rollouts", str(training), "--output", str(tmp_path / "comparison"), "--seeds", "2",
        "--objectives", *OBJECTIVES, "--held-out", *map(str, held_out), "--max_steps", "5", "--dtype", "fp32",
        "--tokens_per_micro_batch", "200", "--held_out_share", "0.2", "--learning_rate", "3e-3", "--cache_states", "true",
    ]  # fmt: skip


def compare(arguments: list[str]) -> subprocess.CompletedProcess:
    command = [sys.executable, "recipes/compare_losses.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_objectives_are_compared_from_one_start_and_again_without_training(arguments, tmp_path):
    done = compare(arguments)
    assert done.returncode == 0, done.stderr
    output = tmp_path / "comparison"
    runs = {path.name: records(path) for path in (output / "runs").iterdir()}
    assert len(runs) == 8
    before = {json.dumps(r[0] | {"step": 0}) for r in runs.values()}
    assert len(before) == 1, "heads do not start alike"
    for seed in (0, 1):
        chains = {
            tuple(x["chains"] for x in r if x["kind"] == "training") for n, r in runs.items() if n.endswith(f"-{seed}")
        }
        assert len(chains) == 1, "batches differ"
    phases = [r["objective"] for r in runs["lk_hybrid-then-e2e_tv-seed-0"] if r["kind"] == "training"]
    assert phases == ["lk_hybrid"] * 2 + ["e2e_tv"] * 3

    result = json.loads((output / "comparison.json").read_text())
    assert list(result["sets"]) == ["at-0.7", "at-1.0", "at-1.3"]
    one = result["sets"]["at-1.0"]
    assert list(one) == list(OBJECTIVES)
    for rule in ("rejection_sampling", "target_only"):
        assert one["ce"][rule]["difference"] == [0.0, 0.0, 0.0]
        lengths = {o: one[o][rule]["of_each_seed"] for o in OBJECTIVES}
        for objective in OBJECTIVES:
            mean = sum(lengths[objective]) / 2
            assert one[objective][rule]["accept_length"][0] == pytest.approx(mean)
            assert one[objective][rule]["difference"][0] == pytest.approx(mean - sum(lengths["ce"]) / 2)
    assert set(result["accept_length_on_entropy"]) == set(OBJECTIVES)
    pages = (output / "report.html").read_text()
    assert pages.count("data:image/png;base64,") == 3
    heads = {n: load_file(output / "runs" / n / "head" / "head.safetensors") for n in runs}
    assert len({h["model.mtp_layers.0.input_proj.weight"].sum().item() for h in heads.values()}) == 8

    # Two heads are measured again, one run of them trained again; all else is kept.
    removed = output / "runs" / "ce-seed-1"
    changed = (removed / "head" / "head.safetensors").stat().st_mtime_ns
    kept = {n: (output / "runs" / n / "report.json").stat().st_mtime_ns for n in runs}
    next((output / "runs" / "e2e_tv-seed-0").glob("measured-at-0.7-*.safetensors")).unlink()
    again = compare(arguments)
    assert again.returncode == 0, again.stderr
    assert "== run" not in again.stdout
    assert changed == (removed / "head" / "head.safetensors").stat().st_mtime_ns
    assert kept == {n: (output / "runs" / n / "report.json").stat().st_mtime_ns for n in runs}
    assert json.loads((output / "comparison.json").read_text()) == result

    other = compare([*arguments, "--learning_rate", "1e-3"])
    assert other.returncode == 1
    assert "was trained with learning_rate 0.003, now asked for learning_rate 0.001; choose another output" in other.stderr
