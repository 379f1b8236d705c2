"""A run that is killed again and again ends as one that was left alone."""

import random
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from tests.training.processes import STRATEGIES, finish, start
from tests.training.test_trainer import make_config, trained

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("strategy", "kills"), [(None, 20), ("ddp", 4), ("zero2", 4)])
def test_killed_at_random_moments_a_run_ends_with_the_same_head(strategy, kills, tmp_path):
    """SIGKILL, often while a checkpoint is being written: bit for bit, on two processes up to rounding.

    Two processes add up in an order that is not always the same.
    """
    processes = 1 if strategy is None else 2
    launch = None if strategy is None else STRATEGIES / f"{strategy}.yaml"
    config = make_config(tmp_path, "qwen2", max_steps=40, save_every=2, evaluate_every=10)
    for _ in range(2):  # the first waits for the server's imports too
        shutil.rmtree(config.output, ignore_errors=True)
        began = time.monotonic()
        assert finish(start(config, launch, processes)) == [0] * processes
        seconds = time.monotonic() - began
    whole = trained(config)
    shutil.rmtree(config.output)

    checkpoints = Path(config.output) / "checkpoints"
    moments = random.Random(0)
    killed, in_a_save, finished = 0, 0, 0
    while killed < kills or not finished:
        config.resume = "auto" if list(checkpoints.glob("step-??????")) else ""
        began_at, saving = time.time(), False
        started = start(config, launch, processes)
        if killed < kills:
            # Every second time earlier if it saves before.
            until = time.monotonic() + moments.uniform(0, seconds)
            while started[0].is_alive() and time.monotonic() < until:
                if killed % 2 and _is_saving(checkpoints, began_at):
                    saving = True
                    break
                time.sleep(0.0005)
            for process in started:
                process.kill()
        codes = finish(started)
        if codes == [0] * processes:
            for name, tensor in whole.items():
                exactly = {"atol": 0, "rtol": 0} if processes == 1 else {"atol": 1e-6, "rtol": 1e-5}
                torch.testing.assert_close(trained(config)[name], tensor, **exactly)
            shutil.rmtree(config.output)
            finished += 1
        else:
            assert -signal.SIGKILL in codes
            killed += 1
            in_a_save += saving
    if strategy is None:
        assert in_a_save >= 3


def _is_saving(checkpoints: Path, since: float) -> bool:
    """Whether a checkpoint is half written, and not by an earlier run."""
    for path in checkpoints.glob("*.partial/*"):
        with suppress(FileNotFoundError):  # renamed or removed at this moment
            if path.stat().st_mtime > since:
                return True
    return False
