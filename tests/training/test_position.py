import pytest
from accelerate import Accelerator

from bebop.errors import InputError
from bebop.training import position
from bebop.training.position import backbone_hash, check_agreement

MINE = {"rollouts": "ab12", "seed": 0}


def test_processes_that_see_other_files_are_named(monkeypatch):
    """As where a pattern matches other files on another node."""
    monkeypatch.setattr(position, "gathered", lambda mine: [mine, mine, mine | {"rollouts": "cd34"}])
    with pytest.raises(
        InputError, match="process 2 has rollouts = cd34, process 0 has ab12; all must see the same files and"
    ):
        check_agreement(Accelerator(cpu=True), MINE)


def test_a_hash_of_parts_covers_those_of_other_processes(monkeypatch):
    """Where weights are split, another process's part may be all that differs."""
    accelerator = Accelerator(cpu=True)
    whole = backbone_hash(accelerator, {"weight": "1"})
    monkeypatch.setattr(position, "splits_weights", lambda _: True)
    hashes = set()
    for other in ("part 1", "part 2"):
        monkeypatch.setattr(position, "gathered", lambda mine, other=other: [mine, other])
        hashes.add(backbone_hash(accelerator, {"weight": "1"}))
    assert len(hashes | {whole}) == 3
