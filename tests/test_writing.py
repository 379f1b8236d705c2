import os

import pytest

from bebop.errors import InputError
from bebop.writing import complete


def full(_):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_what_was_there_stays_if_the_disk_turns_out_to_be_full_at_the_end(kind, tmp_path, monkeypatch):
    """Some file systems say so no earlier than when a file is to be on the disk."""

    def write(content: str) -> None:
        with complete(tmp_path / "it") as partial:
            if kind == "directory":
                partial.mkdir()
            (partial / "inside" if kind == "directory" else partial).write_text(content)

    def read() -> str:
        return (tmp_path / "it" / "inside" if kind == "directory" else tmp_path / "it").read_text()

    write("old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(InputError, match=r"it cannot be written \(No space left"):
            write("new")
    assert read() == "old"
    write("new")
    assert read() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["it"]


def test_other_files_of_like_names_stay(tmp_path):
    for name in ("it.old", "it.partial"):
        (tmp_path / name).write_text("a user's")
    for _ in range(2):
        with complete(tmp_path / "it") as partial:
            partial.write_text("new")
    assert (tmp_path / "it.old").read_text() == (tmp_path / "it.partial").read_text() == "a user's"
