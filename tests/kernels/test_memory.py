"""Memory of the op, in a process of its own: peak resident memory on Linux, after everything is compiled and loaded."""

import subprocess
import sys

import pytest

SCRIPT = """
import gc, sys, torch
from bebop.losses import loss_by_name
from benchmarks.memory import peak_extra_bytes

chains, dtype, loss, chunk_mib = int(sys.argv[1]), getattr(torch, sys.argv[2]), sys.argv[3], int(sys.argv[4])
K, d, V = 3, 256, 49_152
weight = (torch.randn(V, d) * 0.1).to(dtype)
target = torch.randn(chains + K, d).to(dtype)
rows = torch.arange(chains) + torch.arange(1, K + 1)[:, None]
draft = (target[rows] + 0.1 * torch.randn(K, chains, d)).to(dtype).requires_grad_()
arguments = dict(target_rows=rows, tokens=rows % V, valid=torch.ones_like(rows, dtype=torch.bool))
loss_fn = loss_by_name(loss, chunk_bytes=chunk_mib * 2**20)

def step():
    draft.grad = None
    loss_fn(draft, target, weight, **arguments, documents=torch.zeros(chains, dtype=torch.int64)).loss.backward()

step()
step()
draft.grad = None
print(peak_extra_bytes(step))
"""
K, SIZE, CHUNK_MIB = 3, 256, 64


@pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory from /proc")
@pytest.mark.parametrize("chains", [256, 1024])
@pytest.mark.parametrize(
    ("loss", "dtype", "kept"), [("e2e_tv", "bfloat16", 1), ("e2e_tv", "float32", 1), ("expected_rounds", "float32", 1)]
)
def test_peak_is_the_budget_and_the_gradient(chains, loss, dtype, kept):
    """At two sizes of N. The gradient counts twice: what the op keeps, and what backward returns of it."""
    arguments = [str(chains), dtype, loss, str(CHUNK_MIB)]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=True)
    gradients = (kept + 1) * K * chains * SIZE * (2 if dtype == "bfloat16" else 4)
    assert int(done.stdout) <= 1.1 * (CHUNK_MIB * 2**20 + gradients)
