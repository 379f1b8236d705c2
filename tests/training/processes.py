"""Runs in processes of their own, one or several under a strategy of recipes/accelerate, on a CPU."""

import multiprocessing
import os
import socket
import sys
from contextlib import nullcontext
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate import PartialState
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.utils import DistributedType

from bebop.errors import InputError
from bebop.training.config import TrainConfig
from bebop.training.trainer import train
from tests.full_disk import full_disk

STRATEGIES = Path(__file__).parents[2] / "recipes" / "accelerate"


def start(
    config: TrainConfig, strategy: Path | None = None, processes: int = 1, largest_file: int | None = None
) -> list[BaseProcess]:
    """One process in which nothing of accelerate is set; or so many, as `accelerate launch --config_file` starts them.

    Their disk is full where a file would have more than `largest_file` bytes. What is refused as input is written to
    error.txt beside the output.
    """
    # Children of a server that has imported all this and computed nothing: they start at once, and in a clean state.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "deepspeed"])
    environments: list[dict[str, str]] = [{}]
    if strategy is not None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        shared = launch_environment(strategy, processes)
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
        shared |= {"LOCAL_WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"}
        environments = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    started = [context.Process(target=_train, args=(config, environment, largest_file)) for environment in environments]
    for process in started:
        process.start()
    return started


def finish(started: list[BaseProcess], seconds: float = 300) -> list[int | None]:
    """Exit codes; processes that wait for each other for ever are killed, and fail the test."""
    for process in started:
        process.join(seconds)
    waiting = [process for process in started if process.is_alive()]
    for process in waiting:
        process.kill()
        process.join()
    assert not waiting, f"{len(waiting)} of {len(started)} processes did not end in {seconds} s"
    return [process.exitcode for process in started]


def launch_environment(strategy: Path, processes: int) -> dict[str, str]:
    """What `accelerate launch` adds to the environment of the processes it starts."""
    arguments = ["--config_file", str(strategy), "--num_processes", str(processes), "script.py"]
    found: dict[str, str] = {}
    with patch("torch.distributed.run.run", lambda _: found.update(os.environ)):
        launch_command(launch_command_parser().parse_args(arguments))
    return {name: value for name, value in found.items() if os.environ.get(name) != value}


def _train(config: TrainConfig, environment: dict[str, str], largest_file: int | None) -> None:
    os.environ |= environment
    if environment:
        torch.set_num_threads(1)
        # accelerate starts FSDP and DeepSpeed on accelerators alone. What it asks is which backend and kind of device there
        # are; told gloo and a GPU that is called "cpu", it goes on as it would.
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        on_accelerators = {"ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"} & environment.keys()
        kind = DistributedType.MULTI_GPU if on_accelerators else DistributedType.MULTI_CPU
        PartialState._prepare_backend = lambda self, *_, **__: ("gloo", kind)
    with nullcontext() if largest_file is None else full_disk(largest_file):
        try:
            train(config)
        except InputError as error:
            (Path(config.output).parent / "error.txt").write_text(str(error))
            sys.exit(1)
