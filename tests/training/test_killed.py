"""A run that is killed again and again ends as one that was left alone."""

import multiprocessing
import random
import shutil
import signal
import time
from pathlib import Path

import torch

from bebop.training.config import TrainConfig
from bebop.training.trainer import train
from tests.training.test_trainer import make_config, trained

KILLS = 20


def start(config: TrainConfig) -> multiprocessing.Process:
    # Children of a server that has imported all this and computed nothing: they start at once, and in a clean state.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=train, args=(config,))
    process.start()
    return process


def test_killed_at_random_moments_a_run_ends_with_the_same_head(tmp_path):
    """SIGKILL, every second time while a checkpoint is being written."""
    config = make_config(tmp_path, "qwen2", max_steps=40, save_every=2, evaluate_every=10)
    for _ in range(2):  # the first waits for the server's imports too
        shutil.rmtree(config.output, ignore_errors=True)
        began = time.monotonic()
        process = start(config)
        process.join()
        assert process.exitcode == 0
        seconds = time.monotonic() - began
    whole = trained(config)
    shutil.rmtree(config.output)

    checkpoints = Path(config.output) / "checkpoints"
    moments = random.Random(0)
    killed, in_a_save, finished = 0, 0, 0
    while killed < KILLS or not finished:
        config.resume = "auto" if list(checkpoints.glob("step-??????")) else ""
        process = start(config)
        if killed < KILLS:
            until = time.monotonic() + moments.uniform(0, seconds)
            while process.is_alive() and time.monotonic() < until:
                if killed % 2 and list(checkpoints.glob("*.partial/*")):
                    in_a_save += 1
                    break
                time.sleep(0.0005)
            process.kill()
        process.join()
        if process.exitcode == 0:
            assert all(torch.equal(tensor, trained(config)[name]) for name, tensor in whole.items())
            shutil.rmtree(config.output)
            finished += 1
        else:
            assert process.exitcode == -signal.SIGKILL
            killed += 1
    assert in_a_save >= 3
