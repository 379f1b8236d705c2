"""What a run asks of the machine: fast bf16, all cores, seconds by part."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator


def native_bf16(device: torch.device) -> bool:
    """Whether bf16 products are faster than fp32 ones on this device."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, "get_capabilities", dict[str, bool])()
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def use_all_cores(accelerator: Accelerator) -> None:
    """`accelerate launch` sets OMP_NUM_THREADS=1 unless told otherwise, which halves a run on two cores.

    To use fewer, restrict the process (taskset, a container), which this respects.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if accelerator.device.type == "cpu" and accelerator.num_processes == 1 and torch.get_num_threads() < cores:
        torch.set_num_threads(cores)


class Clock:
    """Seconds spent in the named parts of a step."""

    def __init__(self, device: torch.device):
        self.device = device
        self.spent: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        self._wait()
        started = time.perf_counter()
        yield
        self._wait()
        self.spent[part] = self.spent.get(part, 0.0) + time.perf_counter() - started

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
