"""What a run ran on, for whoever wants to repeat it."""

import importlib.metadata
import platform
import subprocess
import sys
from typing import Any

import torch
from accelerate import Accelerator

_PACKAGES = ("bebop-mtp", "torch", "triton", "transformers", "accelerate", "deepspeed", "safetensors")


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """Versions, machine, strategy, command line, and the revision of the git repository it was started in, if any."""
    device = accelerator.device
    installed = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions() if d.metadata["Name"]}
    return {
        "command": sys.argv,
        "git_revision": _git("rev-parse", "HEAD"),
        "git_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "packages": {name: installed[name] for name in _PACKAGES if name in installed},
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or device.type,
        "strategy": accelerator.distributed_type.value,
        "processes": accelerator.num_processes,
    }


def _git(*arguments: str) -> str | None:
    try:
        found = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() if found.returncode == 0 else None
