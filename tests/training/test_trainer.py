import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import wandb
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bebop.backbone import Backbone
from bebop.data.rollouts import read_rollouts
from bebop.errors import InputError
from bebop.heads.loading import head_for, native_state_dict, read_head
from bebop.losses import E2ETVLoss
from bebop.training import trainer
from bebop.training.config import TrainConfig
from bebop.training.distribution import make_accelerator
from bebop.training.material import Material
from bebop.training.trainer import train
from tests.rollouts import write_tiny_rollouts
from tests.tiny_models import make_checkpoint


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    return make_config(tmp_path, "qwen2")


def make_config(tmp_path: Path, kind: str, **options) -> TrainConfig:
    model = make_checkpoint(tmp_path / "model", kind, native_head=options.pop("native_head", False))
    defaults = {
        "max_steps": 6, "save_every": 2, "learning_rate": 3e-3, "tokens_per_micro_batch": 200, "held_out_share": 0.2,
        "dtype": "fp32", "warmup_share": 0.0,
    }  # fmt: skip
    return TrainConfig(
        backbone=str(model),
        rollouts=[str(write_tiny_rollouts(tmp_path / "rollouts.jsonl", model))],
        output=str(tmp_path / "run"),
        **(defaults | options),
    )


def records(config: TrainConfig, kind: str) -> list[dict]:
    lines = (Path(config.output) / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


def trained(config: TrainConfig) -> dict[str, torch.Tensor]:
    return read_head(Path(config.output) / "head")[0]


@pytest.mark.parametrize("kind", ["qwen2", "llama", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"])
def test_a_run_moves_every_head_parameter_and_nothing_else(kind, tmp_path):
    config = make_config(tmp_path, kind, max_steps=40, cold_start_loss="lk_hybrid", cold_start_steps=30)
    weights = Path(config.backbone) / "model.safetensors"
    before = weights.read_bytes()
    start = native_state_dict(head_for(Backbone.load(config.backbone, torch.float32))[0])
    train(config)
    assert weights.read_bytes() == before
    end = trained(config)
    assert end.keys() == start.keys()
    still = [name for name in start if torch.equal(start[name], end[name])]
    assert still == []
    evaluations = records(config, "evaluation")
    assert [r["step"] for r in evaluations] == [0, 40]
    assert evaluations[1]["accept_length"] > evaluations[0]["accept_length"]
    report = json.loads((Path(config.output) / "report.json").read_text())
    assert report["after"] == evaluations[1]
    assert (Path(config.output) / "report.png").stat().st_size > 10_000
    assert {r["objective"] for r in records(config, "training")} == {"lk_hybrid", "e2e_tv"}


def test_backbone_embedding_and_lm_head_are_bit_identical_after_training(config, monkeypatch):
    seen = []
    load = Backbone.load.__func__
    monkeypatch.setattr(Backbone, "load", classmethod(lambda cls, *a, **k: seen.append(load(cls, *a, **k)) or seen[-1]))
    train(config)
    stored = load_file(Path(config.backbone) / "model.safetensors")
    state = seen[0].model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in stored.items())


def test_a_native_head_skips_the_cold_start(tmp_path):
    config = make_config(tmp_path, "qwen3_5_text", native_head=True, cold_start_steps=3)
    train(config)
    assert {r["objective"] for r in records(config, "training")} == {"e2e_tv"}


def test_accumulated_micro_batches_normalise_over_the_whole_step(tmp_path):
    """One micro-batch of a step's documents and several with fewer each give the same loss and gradient: the sum over
    valid pairs is divided by the step's pairs, not averaged over micro-batches of unequal size."""
    config = make_config(tmp_path, "qwen2", max_steps=1, tokens_per_micro_batch=10_000, max_grad_norm=1e9)
    train(config)
    whole = records(config, "training")[0]
    small = make_config(tmp_path / "small", "qwen2", max_steps=1, tokens_per_micro_batch=100, max_grad_norm=1e9)
    from bebop.data.batches import plan_micro_batches
    from bebop.data.rollouts import read_rollouts, split_held_out

    lengths = [len(r) for r in split_held_out(read_rollouts(small.rollouts)[1], 0.2)[0]]
    small.accumulate = len(plan_micro_batches(lengths, 100, True, torch.Generator().manual_seed(0)))
    assert small.accumulate > 3
    train(small)
    parts = records(small, "training")[0]
    assert parts["chains"] == whole["chains"]
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    assert parts["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"cache_states": True}, {"temperature_low": 0.5, "temperature_high": 1.5}])
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(options, tmp_path):
    config = make_config(tmp_path, "qwen2", **options)
    train(config)
    whole, metrics = trained(config), records(config, "training")

    stopped = make_config(tmp_path / "again", "qwen2", **options)
    stopped.backbone, stopped.rollouts = config.backbone, config.rollouts
    train(stopped)
    run = Path(stopped.output)
    # As a crash leaves it: the checkpoint of step 4 complete, the next half written, metrics beyond the checkpoint.
    (run / "checkpoints" / "step-000006").rename(run / "checkpoints" / "step-000006.partial")
    for name in ("report.json", "report.png", "head"):
        path = run / name
        path.unlink() if path.is_file() else [*(p.unlink() for p in path.iterdir()), path.rmdir()]
    stopped.resume = "auto"
    train(stopped)
    again = trained(stopped)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert [r["loss"] for r in records(stopped, "training")] == [r["loss"] for r in metrics]


def test_temperatures_of_chains_are_drawn_from_the_range_and_evaluation_keeps_its_own(tmp_path, monkeypatch):
    seen = []
    forward = E2ETVLoss.forward
    monkeypatch.setattr(E2ETVLoss, "forward", lambda *a, **k: seen.append(k["temperature"]) or forward(*a, **k))
    config = make_config(tmp_path, "qwen2", max_steps=3, temperature_low=0.5, temperature_high=1.5)
    train(config)
    drawn = torch.cat(seen)
    assert len(seen) == 3
    assert not torch.equal(seen[0][:50], seen[1][:50])
    assert 0.5 <= drawn.min() < 0.6
    assert 1.4 < drawn.max() <= 1.5
    plain = make_config(tmp_path / "plain", "qwen2", max_steps=3)
    train(plain)
    assert seen[3:] == [None] * 3
    assert records(config, "evaluation")[0] == records(plain, "evaluation")[0]


def test_runs_that_share_model_and_data_end_as_runs_alone(tmp_path):
    options = {"max_steps": 3, "cache_states": True}
    alone = make_config(tmp_path, "qwen2", **options)
    train(alone)
    first, second = (
        dataclasses.replace(alone, output=str(tmp_path / name), loss=loss) for name, loss in (("a", "ce"), ("b", "e2e_tv"))
    )
    material = Material.read(first, make_accelerator(first))
    train(first, material)
    states = material.train_states
    train(second, material)
    assert material.train_states is states, "computed anew"
    assert all(torch.equal(tensor, trained(second)[name]) for name, tensor in trained(alone).items())
    assert any(not torch.equal(tensor, trained(first)[name]) for name, tensor in trained(alone).items())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_leaves_a_checkpoint_to_go_on_from(number, code, config, tmp_path):
    config.max_steps, config.save_every = 100_000, 100_000
    (tmp_path / "c.yaml").write_text(config.as_yaml())
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "recipes/train_mtp.py", "--config", str(tmp_path / "c.yaml")],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    metrics = Path(config.output) / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while (not metrics.exists() or len(metrics.read_text().splitlines()) < 4) and time.monotonic() < deadline:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.2)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == code, output
    assert "go on with --resume auto" in output
    done = records(config, "training")[-1]["step"]
    config.resume, config.max_steps, config.decay = "auto", done + 2, "constant"
    train(config)
    assert [r["step"] for r in records(config, "training")] == list(range(1, done + 3))


def _truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("resume", ["", "auto"])
def test_a_run_that_ended_before_its_first_checkpoint_may_be_started_again(resume, config):
    """With --resume auto by the same command that goes on later."""
    config.resume = resume
    run = Path(config.output)
    for left_behind in ("bebop", "wandb", "checkpoints/step-000002.partial"):
        (run / left_behind).mkdir(parents=True)
    (run / "config.yaml").write_text("left: behind")
    (run / "metrics.jsonl.writing").write_text("{")
    (run / "metrics.jsonl").write_text('{"step": 0, "kind": "evaluation"}\n{"step": 1, "ki')
    config.max_steps = 1
    train(config)
    assert [r["step"] for r in records(config, "evaluation")] == [0, 1]


@pytest.mark.parametrize(("key", "value"), [("seed", 5), ("tokens_per_micro_batch", 100), ("held_out_share", 0.5)])
def test_resuming_with_other_data_is_refused(key, value, config):
    """The steps behind the checkpoint saw other data than this run would have; going on would pretend otherwise."""
    train(config)
    config.resume = "auto"
    setattr(config, key, value)
    with pytest.raises(InputError, match="rollouts" if key == "held_out_share" else key):
        train(config)


def test_resuming_with_other_weights_is_refused(config):
    """As after a merge of adapters: norms, embedding, shapes and tokenizer are the same."""
    train(config)
    path = Path(config.backbone) / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1.01
    save_file(tensors, path, metadata={"format": "pt"})
    config.resume, config.max_steps = "auto", 8
    with pytest.raises(
        InputError, match=r"step-000006 was written with backbone = \w{16}, this run has \w{16}; set it back"
    ):
        train(config)


def test_resuming_to_a_step_before_the_checkpoint_is_refused(config):
    """Its report would be of another head than the one it is for."""
    train(config)
    before = {path: path.read_bytes() for path in Path(config.output).glob("*.*")}
    config.resume, config.max_steps = "auto", 5
    with pytest.raises(InputError, match=r"step-000006 is of step 6, beyond max_steps \(5\)"):
        train(config)
    assert {path: path.read_bytes() for path in Path(config.output).glob("*.*")} == before


def test_resuming_from_an_older_checkpoint_drops_the_newer(config):
    train(config)
    checkpoints = Path(config.output) / "checkpoints"
    assert sorted(p.name for p in checkpoints.iterdir()) == ["step-000004", "step-000006"]
    config.resume, config.max_steps = str(checkpoints / "step-000004"), 5
    train(config)
    assert sorted(p.name for p in checkpoints.iterdir()) == ["step-000004", "step-000005"]


def test_going_on_takes_the_learning_rate_of_the_configuration(config):
    """And all that follows from it: as the uninterrupted run if nothing was changed, which other tests say."""
    config.max_steps, config.warmup_share = 4, 0.0
    train(config)
    config.resume, config.max_steps, config.learning_rate, config.weight_decay = "auto", 6, 1e-5, 0.5
    train(config)
    assert [r["learning_rate"] for r in records(config, "training")] == [3e-3] * 4 + [1e-5] * 2
    state = torch.load(Path(config.output) / "checkpoints" / "step-000006" / "optimizer.bin")
    assert [(g["lr"], g["weight_decay"]) for g in state["param_groups"]] == [(1e-5, 0.5), (1e-5, 0.0)]


def damaged_steps(monkeypatch, *numbers: int) -> None:
    """The loss of these calls is not a number."""
    forward, calls = E2ETVLoss.forward, itertools.count(1)

    def damaged(*arguments, **options):
        loss, stats = forward(*arguments, **options)
        return (loss * float("nan") if next(calls) in numbers else loss), stats

    monkeypatch.setattr(E2ETVLoss, "forward", damaged)


def test_a_step_that_is_not_finite_is_skipped(config, monkeypatch, caplog):
    damaged_steps(monkeypatch, 1, 3, 4)
    train(config)
    assert [r["step"] for r in records(config, "skipped")] == [1, 3, 4]
    assert [r["step"] for r in records(config, "training")] == [2, 5, 6]
    assert all(tensor.isfinite().all() for tensor in trained(config).values())
    assert "step 3 is skipped: loss nan" in caplog.text
    assert any(rollout.key.hex()[:12] in caplog.text for rollout in read_rollouts(config.rollouts)[1])


def test_too_many_such_steps_end_the_run_and_leave_its_checkpoint(config, monkeypatch):
    damaged_steps(monkeypatch, 3, 4, 5)
    with pytest.raises(InputError, match="3 steps in a row had no finite loss and gradient"):
        train(config)
    config.resume = "auto"
    train(config)
    assert [r["step"] for r in records(config, "training")] == [1, 2, 5, 6], "the last checkpoint is that of step 4"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "optimizer.bin").unlink(), "optimizer.bin is missing"),
        (lambda d: _truncate(d / "model.safetensors"), "model.safetensors is not what was written"),
        (lambda d: _truncate(d / "manifest.json"), "no readable manifest.json"),
    ],
)
def test_a_damaged_checkpoint_is_left_aside(damage, message, config, caplog):
    train(config)
    whole = trained(config)
    last = Path(config.output) / "checkpoints" / "step-000006"
    damage(last)
    config.resume = str(last)
    with pytest.raises(InputError, match=message):
        train(config)
    config.resume = "auto"
    train(config)
    assert f"left aside: {last} is" in caplog.text
    assert all(torch.equal(tensor, trained(config)[name]) for name, tensor in whole.items())


def test_the_best_checkpoint_is_kept_beside_the_newest(config, monkeypatch):
    """Though no checkpoint was due after that step, and over a stop; its head can be used as it is."""
    accepted = iter([0.1, 0.2, 0.5, 0.3, 0.4, 0.3, 0.2])  # at the start, and after steps 3, 6, .. 18
    measure = trainer.evaluate
    monkeypatch.setattr(
        trainer, "evaluate", lambda *a, **k: dataclasses.replace(measure(*a, **k), realised=[next(accepted), 0.0, 0.0])
    )
    config.max_steps, config.evaluate_every, config.save_every = 9, 3, 5
    train(config)
    config.resume, config.max_steps = "auto", 18
    train(config)
    kept = {p.name: p for p in (Path(config.output) / "checkpoints").iterdir()}
    assert sorted(kept) == ["step-000006", "step-000015", "step-000018"]
    best, facts = read_head(kept["step-000006"] / "head")
    assert (facts["steps"], facts["family"]) == (6, "mimo")
    head, _ = head_for(Backbone.load(config.backbone, torch.float32), str(kept["step-000006"] / "head"))
    assert native_state_dict(head).keys() == best.keys()
    last, _ = read_head(kept["step-000018"] / "head")
    assert all(torch.equal(tensor, trained(config)[name]) for name, tensor in last.items())
    assert any(not torch.equal(tensor, last[name]) for name, tensor in best.items())


def test_scoring_at_another_temperature_warns(config, caplog):
    config.temperature, config.max_steps = 0.5, 1
    train(config)
    assert "sampled at temperature 1.0 and are scored at 0.5" in caplog.text


@pytest.fixture
def forgetful_wandb():
    """It keeps the environment's settings for the life of a process."""
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.mark.usefixtures("forgetful_wandb")
@pytest.mark.parametrize(("tracker", "files"), [("tensorboard", "bebop/events.*"), ("wandb", "wandb/offline-run-*/*.wandb")])
def test_metrics_reach_the_tracker(tracker, files, config, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    config.tracker, config.max_steps = tracker, 2
    train(config)
    (written,) = Path(config.output).glob(files)
    assert written.stat().st_size > 500
    assert b"training/accept_length" in written.read_bytes()


@pytest.mark.usefixtures("forgetful_wandb")
def test_a_tracker_that_is_not_logged_in_is_refused_before_work_starts(config, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("NETRC", str(tmp_path / "nothing"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setattr(Backbone, "load", None)
    config.tracker = "wandb"
    with pytest.raises(InputError, match=r"not logged in \(no API key\); run `wandb login`"):
        train(config)
    assert not Path(config.output).exists()


def test_a_run_that_goes_on_is_the_same_to_tensorboard(config):
    """Steps that a killed run had logged behind its last checkpoint are not there twice."""
    config.tracker, config.max_steps, config.save_every = "tensorboard", 3, 2
    train(config)
    shutil.rmtree(Path(config.output) / "checkpoints" / "step-000003")
    config.resume, config.max_steps = "auto", 4
    train(config)
    events = EventAccumulator(str(Path(config.output) / "bebop")).Reload()
    assert [event.step for event in events.Scalars("training/loss")] == [1, 2, 3, 4]
    assert [event.step for event in events.Scalars("evaluation/accept_length")] == [0, 4]


@pytest.mark.usefixtures("forgetful_wandb")
def test_a_run_that_goes_on_is_the_same_to_wandb(config, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    config.tracker, config.max_steps = "wandb", 2
    train(config)
    config.resume, config.max_steps = "auto", 3
    train(config)
    names = {path.stem for path in Path(config.output).glob("wandb/offline-run-*/*.wandb")}
    assert names == {f"run-{(Path(config.output) / 'wandb' / 'run_id').read_text()}"}


def test_errors_are_one_line(tmp_path):
    root = Path(__file__).parents[2]
    launch = ["-m", "accelerate.commands.accelerate_cli", "launch", "--quiet", "--cpu"]
    options = ["--backbone", "nothing", "--rollouts", "r", "--output", str(tmp_path / "o")]
    result = subprocess.run(
        [sys.executable, *launch, "recipes/train_mtp.py", *options],
        cwd=root,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    assert result.returncode == 1
    # Before it, the launcher lists the defaults it chose.
    assert "Traceback" not in result.stderr
    assert (
        result.stderr.splitlines()[-1] == "error: rollout file r does not exist; write one with recipes/generate_rollouts.py"
    )
    assert not (tmp_path / "o").exists()


def test_the_metrics_are_those_documented(config):
    config.max_steps = 1
    train(config)
    table = (Path(__file__).parents[2] / "docs" / "training.md").read_text().partition("| metric | |")[2]
    named = set(re.findall(r"`(\w+)`", table))
    named = {name.removesuffix("_k") for name in named} | {f"seconds{name}" for name in named if name.startswith("_")}
    for record in (records(config, "training")[0], records(config, "evaluation")[0]):
        assert record.keys() - named == {"step", "kind"}
