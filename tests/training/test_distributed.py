"""Two processes train the head that one trains, under every strategy that recipes/accelerate has a configuration for."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from bebop.training.trainer import train
from tests.training.processes import STRATEGIES, finish, start
from tests.training.test_trainer import make_config, records, trained

# Below 1e5 weights ZeRO-3 leaves a tensor whole, and a tiny head has nothing larger.
SPLIT_ALL = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}

pytestmark = pytest.mark.slow


def strategy_file(name: str, folder: Path) -> Path:
    if name != "zero3, all split":
        return STRATEGIES / f"{name}.yaml"
    (folder / "deepspeed.json").write_text(json.dumps(SPLIT_ALL))
    text = (STRATEGIES / "zero3.yaml").read_text().partition("mixed_precision:")[0]
    text += f"deepspeed_config:\n  deepspeed_config_file: {folder}/deepspeed.json\n  zero3_init_flag: false\n"
    (folder / "zero3.yaml").write_text(text)
    return folder / "zero3.yaml"


def run(config, strategy: Path | None, processes: int = 2) -> None:
    assert finish(start(config, strategy, processes)) == [0] * processes


@pytest.fixture(scope="module", params=["qwen2", "qwen3_5_moe_text"])
def single(request, tmp_path_factory):
    """A run of one process, four micro-batches a step."""
    config = make_config(tmp_path_factory.mktemp(request.param), request.param, accumulate=4, tokens_per_micro_batch=100)
    train(config)
    return config


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero2", "zero3", "zero3, all split"])
def test_two_processes_train_the_same_head_as_one(strategy, single, tmp_path):
    """The same micro-batches, half of each step's on either process: same data, same normaliser, same head.

    In two runs, the second from the first one's checkpoint.
    """
    double = dataclasses.replace(single, accumulate=2, output=str(tmp_path / "double"), max_steps=4)
    run(double, strategy_file(strategy, tmp_path))
    double.max_steps, double.resume = 6, "auto"
    run(double, strategy_file(strategy, tmp_path))
    assert [r["chains"] for r in records(double, "training")] == [r["chains"] for r in records(single, "training")]
    assert [r["grad_norm"] for r in records(double, "training")] == pytest.approx(
        [r["grad_norm"] for r in records(single, "training")], rel=1e-4
    )
    for name, tensor in trained(single).items():
        torch.testing.assert_close(trained(double)[name], tensor, atol=2e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero2", "zero3"])
def test_a_full_disk_ends_all_processes_and_leaves_the_checkpoint_before(strategy, tmp_path):
    """FSDP2 writes from every process, in another format than the others."""
    config = make_config(tmp_path, "qwen2", max_steps=2, save_every=1)
    run(config, strategy_file(strategy, tmp_path))
    config.max_steps, config.resume = 4, "auto"
    assert finish(start(config, strategy_file(strategy, tmp_path), 2, largest_file=20_000)) == [1, 1]
    assert "step-000003 cannot be written" in (tmp_path / "error.txt").read_text()
    assert sorted(p.name for p in (Path(config.output) / "checkpoints").iterdir()) == ["step-000001", "step-000002"]
    run(config, strategy_file(strategy, tmp_path))
