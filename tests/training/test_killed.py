"""A run that is killed again and again ends as one that was left alone."""

import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.training.processes import STRATEGIES, start
from tests.training.test_trainer import make_config, trained

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("strategy", "kills"), [(None, 20), ("ddp", 4), ("zero2", 4)])
def test_killed_at_random_moments_a_run_ends_with_the_same_head(strategy, kills, tmp_path):
    """SIGKILL, every second time while a checkpoint is being written: bit for bit, on two processes up to rounding.

    Two processes add up in an order that is not always the same.
    """
    processes = 1 if strategy is None else 2
    launch = None if strategy is None else STRATEGIES / f"{strategy}.yaml"
    config = make_config(tmp_path, "qwen2", max_steps=40, save_every=2, evaluate_every=10)
    for _ in range(2):  # the first waits for the server's imports too
        shutil.rmtree(config.output, ignore_errors=True)
        began = time.monotonic()
        started = start(config, launch, processes)
        for process in started:
            process.join()
        assert [process.exitcode for process in started] == [0] * processes
        seconds = time.monotonic() - began
    whole = trained(config)
    shutil.rmtree(config.output)

    checkpoints = Path(config.output) / "checkpoints"
    moments = random.Random(0)
    killed, in_a_save, finished = 0, 0, 0
    while killed < kills or not finished:
        config.resume = "auto" if list(checkpoints.glob("step-??????")) else ""
        began_at = time.time()
        started = start(config, launch, processes)
        if killed < kills:
            # Every second time while it saves, whenever that is.
            until = time.monotonic() + (300 if killed % 2 else moments.uniform(0, seconds))
            while started[0].is_alive() and time.monotonic() < until:
                if killed % 2 and any(p.stat().st_mtime > began_at for p in _half_written(checkpoints)):
                    in_a_save += 1
                    break
                time.sleep(0.0005)
            for process in started:
                process.kill()
        for process in started:
            process.join()
        if all(process.exitcode == 0 for process in started):
            for name, tensor in whole.items():
                exactly = {"atol": 0, "rtol": 0} if processes == 1 else {"atol": 1e-6, "rtol": 1e-5}
                torch.testing.assert_close(trained(config)[name], tensor, **exactly)
            shutil.rmtree(config.output)
            finished += 1
        else:
            assert any(process.exitcode == -signal.SIGKILL for process in started)
            killed += 1
    assert in_a_save == kills // 2


def _half_written(checkpoints: Path) -> list[Path]:
    """Files of a checkpoint that is being written; they may be renamed or removed at any moment."""
    return [p for p in checkpoints.glob("*.partial/*") if p.exists()]
