"""Peak memory of a piece of work, by the device's own account."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch


def peak_extra_bytes(work: Callable[[], object], device: str = "cpu") -> int:
    """Most memory that `work` takes beyond what is held before it, in bytes.

    On a GPU from torch's allocator, on a Linux CPU from the resident set's high-water mark: run `work` before, so that
    libraries are loaded and kernels compiled.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # what is free but kept would hide what `work` takes
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _resident("VmRSS")
    work()
    return _resident("VmHWM") - before


def _resident(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")
