"""Checks a built wheel: it installs, carries what it should, and imports without Triton, DeepSpeed and wandb.

python -m tests.wheel dist
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

_IMPORT = """
import importlib, pkgutil, sys
for name in ("triton", "deepspeed", "wandb", "gguf"):
    sys.modules[name] = None  # makes `import name` fail
sys.path.insert(0, sys.argv[1])
import bebop
assert bebop.__file__.startswith(sys.argv[1]), bebop.__file__
for module in pkgutil.walk_packages(bebop.__path__, "bebop."):
    if module.name != "bebop.kernels.rows_triton":  # imported only where triton is
        importlib.import_module(module.name)
print("wheel imports:", bebop.__version__, bebop.E2ETVLoss.__name__)
"""


def main() -> None:
    (wheel,) = Path(sys.argv[1]).glob("bebop_mtp-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert any(n.endswith("licenses/LICENSE") for n in names), "the wheel has no licence"
    assert not any(n.startswith("tests/") for n in names), "the wheel carries the tests"
    with tempfile.TemporaryDirectory() as target:
        install = ["-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check", "--target", target, wheel]
        subprocess.run([sys.executable, *install], check=True)
        subprocess.run([sys.executable, "-c", _IMPORT, target], check=True, cwd=target)


if __name__ == "__main__":
    main()
