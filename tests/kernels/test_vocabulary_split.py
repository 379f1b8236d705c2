"""The lm_head split by rows over gloo processes gives every process what one process with the whole of it gets."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from bebop.kernels import STATISTICS, linear_chain_statistics
from bebop.losses import loss_by_name
from tests.chains import make_chains

NAMES = ("e2e_tv + 0.3 ce + 0.2 reverse_kl + 0.1 kl", "expected_rounds")


def compute(name: str, weight: torch.Tensor, group: dist.ProcessGroup | None) -> dict[str, torch.Tensor]:
    chains = make_chains(vocabulary=257, dtype=torch.float64)
    draft = chains.draft_hidden.requires_grad_()
    loss_fn = loss_by_name(name, vocabulary_group=group, temperature=0.7, chunk_bytes=257 * 8 * 30)
    loss = loss_fn(draft, chains.target_hidden, weight, **chains.arguments).loss
    loss.backward()
    stats = linear_chain_statistics(
        draft.detach(), chains.target_hidden, weight, **chains.indices, statistics=STATISTICS, vocabulary_group=group
    )
    return {"loss": loss.detach(), "gradient": draft.grad, **stats.values}


def process(rank: int, sizes: list[int], store: Path, output: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=len(sizes))
    start = sum(sizes[:rank])
    weight = make_chains(vocabulary=257, dtype=torch.float64).weight[start : start + sizes[rank]]
    torch.save([compute(name, weight, dist.group.WORLD) for name in NAMES], output / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("sizes", [[129, 128], [86, 86, 85], [200, 56, 1]], ids=str)
def test_a_split_vocabulary_gives_the_same(sizes, tmp_path):
    mp.spawn(process, (sizes, tmp_path / "store", tmp_path), nprocs=len(sizes))
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(len(sizes))]
    whole = make_chains(vocabulary=257, dtype=torch.float64).weight
    for number, name in enumerate(NAMES):
        expected = compute(name, whole, None)
        for rank in range(len(sizes)):
            for key, value in expected.items():
                torch.testing.assert_close(found[rank][number][key], value, msg=f"{name} {key} of process {rank}")
                assert torch.equal(found[rank][number][key], found[0][number][key]), f"{key} differs between processes"
