"""What a run asks of the machine: fast bf16, all cores, seconds by part."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def native_bf16(device: torch.device) -> bool:
    """Whether bf16 products are faster than fp32 ones on this device."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, "get_capabilities", dict[str, bool])()
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """Of backbone and head: "bf16", "fp32", or "auto", bf16 where the device is made for it."""
    return torch.bfloat16 if name == "bf16" or (name == "auto" and native_bf16(device)) else torch.float32


def use_all_cores(device: torch.device, processes: int = 1) -> None:
    """`accelerate launch` sets OMP_NUM_THREADS=1 unless told otherwise, which halves a run on two cores.

    To use fewer, restrict the process (taskset, a container), which this respects.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if device.type == "cpu" and processes == 1 and torch.get_num_threads() < cores:
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
