import errno
import fcntl

import pytest

from bebop.data.append import GrowingRolloutFile
from bebop.data.rollouts import Rollout, RolloutHeader, read_rollouts, write_rollouts
from bebop.errors import InputError
from tests.full_disk import full_disk

HEADER = RolloutHeader(model="m", tokenizer_hash="abc", vocab_size=50, temperature=0.7, sampling={"seed": 1, "top": None})
ROLLOUTS = [Rollout([1, 2], [3, 4, 2]), Rollout([1], [9] * 5, "length", "math"), Rollout([4], [2])]


@pytest.fixture
def output(tmp_path):
    return tmp_path / "new" / "rollouts.jsonl"


def test_rollouts_are_there_at_once_and_the_file_when_it_is_complete(output):
    file = GrowingRolloutFile(output, HEADER)
    for number, rollout in enumerate(ROLLOUTS):
        file.append(number, rollout)
        assert read_rollouts(file.partial) == (HEADER, ROLLOUTS[: number + 1])
    assert not output.exists()
    file.complete()
    assert read_rollouts(output) == (HEADER, ROLLOUTS)
    assert [p.name for p in output.parent.iterdir()] == ["rollouts.jsonl"]


@pytest.mark.parametrize("cut", [0, 1, 20, 60])
def test_a_killed_run_goes_on_behind_the_last_whole_line(cut, output):
    """The last line lost its end, the line break alone or more."""
    file = GrowingRolloutFile(output, HEADER)
    for number, rollout in [(5, ROLLOUTS[0]), (3, ROLLOUTS[1]), (5, ROLLOUTS[2])]:
        file.append(number, rollout)
    if cut:
        file.partial.write_bytes(file.partial.read_bytes()[:-cut])
    del file  # as the process it was in
    again = GrowingRolloutFile(output, HEADER)
    assert again.written == ({5: 1, 3: 1} if cut else {5: 2, 3: 1})
    if cut:
        again.append(5, ROLLOUTS[2])
    again.complete()
    assert read_rollouts(output) == (HEADER, ROLLOUTS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 1.0}, "begun with temperature = 0.7, now it is 1.0"),
        ({"model": "n"}, "begun with model = 'm', now it is 'n'"),
        ({"sampling": {"seed": 2, "top": None}}, "begun with seed = 1, now it is 2"),
        ({"sampling": {"seed": 1, "top": None, "more": 3}}, "begun with more = None, now it is 3"),
        ({"sampling": {"top": None}}, "begun with seed = 1, now it is None"),
    ],
)
def test_other_settings_are_refused_by_name(changes, message, output):
    GrowingRolloutFile(output, HEADER).append(0, ROLLOUTS[0])
    other = RolloutHeader(**{name: getattr(HEADER, name) for name in HEADER.__dataclass_fields__} | changes)
    before = (output.parent / "rollouts.jsonl.partial").read_bytes()
    with pytest.raises(InputError, match=f"{message}; .* remove the file"):
        GrowingRolloutFile(output, other)
    assert (output.parent / "rollouts.jsonl.partial").read_bytes() == before


def test_a_file_without_rollouts_binds_nobody(output):
    write_rollouts(output.with_name("rollouts.jsonl.partial"), HEADER, [])
    other = RolloutHeader("m", "abc", 50, 1.0)
    file = GrowingRolloutFile(output, other)
    file.append(0, ROLLOUTS[0])
    assert read_rollouts(file.partial) == (other, ROLLOUTS[:1])


def test_damage_within_the_file_is_refused(output):
    file = GrowingRolloutFile(output, HEADER)
    file.append(0, ROLLOUTS[0])
    file.append(1, ROLLOUTS[1])
    lines = file.partial.read_bytes().split(b"\n")
    lines[1] = lines[1][:10] + b"\0" * 9
    file.partial.write_bytes(b"\n".join(lines))
    del file
    with pytest.raises(InputError, match=r"partial:2 is damaged; remove"):
        GrowingRolloutFile(output, HEADER)


def test_names_that_cannot_be_used_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"ends in '.parquet'; expected .jsonl"):
        GrowingRolloutFile(tmp_path / "r.parquet", HEADER)
    (tmp_path / "r.jsonl").touch()
    with pytest.raises(InputError, match="exists; choose another name"):
        GrowingRolloutFile(tmp_path / "r.jsonl", HEADER)


@pytest.mark.parametrize("rollouts", [0, 1])
def test_a_second_run_is_refused_while_the_first_one_writes(rollouts, output):
    """Whether it starts before the first rollout of the other, or behind it."""
    with GrowingRolloutFile(output, HEADER) as first:
        for number in range(rollouts):
            first.append(number, ROLLOUTS[number])
        with pytest.raises(InputError, match="is being written by another run"):
            GrowingRolloutFile(output, HEADER)
        first.append(rollouts, ROLLOUTS[rollouts])
        first.complete()
    assert read_rollouts(output) == (HEADER, ROLLOUTS[: rollouts + 1])


def test_without_locks_a_warning_says_so(output, monkeypatch, caplog):
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with GrowingRolloutFile(output, HEADER) as file:
        file.append(0, ROLLOUTS[0])
        file.complete()
    assert "cannot be locked (Function not implemented)" in caplog.text
    assert read_rollouts(output) == (HEADER, ROLLOUTS[:1])


def test_a_file_that_was_completed_while_it_was_opened_is_left_alone(output, monkeypatch):
    """A run that waited for no lock must not write into what the other has finished."""
    with GrowingRolloutFile(output, HEADER) as first:
        first.append(0, ROLLOUTS[0])
    lock = fcntl.flock

    def flock(file, operation):
        output.with_name("rollouts.jsonl.partial").rename(output)
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(InputError, match="is being written by another run"):
        GrowingRolloutFile(output, HEADER)
    assert read_rollouts(output) == (HEADER, ROLLOUTS[:1])


def test_a_file_that_another_program_wrote_meanwhile_stays(output):
    """And what was sampled stays too."""
    file = GrowingRolloutFile(output, HEADER)
    file.append(0, ROLLOUTS[0])
    write_rollouts(output, HEADER, ROLLOUTS[1:])
    with pytest.raises(InputError, match="has appeared meanwhile; move it away"):
        file.complete()
    assert read_rollouts(output) == (HEADER, ROLLOUTS[1:])
    assert read_rollouts(file.partial) == (HEADER, ROLLOUTS[:1])


def test_without_a_rollout_nothing_is_left(output):
    with GrowingRolloutFile(output, HEADER) as file:
        assert file.partial.exists()
    assert not list(output.parent.iterdir())


@pytest.mark.parametrize(("size", "whole"), [(20, 0), (400, 2)])
def test_a_full_disk_leaves_what_is_whole_or_nothing(size, whole, output):
    """Within the header, and within the third rollout."""
    file = GrowingRolloutFile(output, HEADER)
    for number in range(whole):
        file.append(number, ROLLOUTS[number])
    with pytest.raises(InputError, match=r"partial cannot be written .* make room"), full_disk(size), file:
        file.append(whole, ROLLOUTS[whole])
    assert file.written.total() == whole
    assert file.partial.exists() == (whole > 0)
    again = GrowingRolloutFile(output, HEADER)
    for number in range(again.written.total(), 3):
        again.append(number, ROLLOUTS[number])
    again.complete()
    assert read_rollouts(output) == (HEADER, ROLLOUTS)
