import json

import pytest

from bebop.data.rollouts import Rollout, RolloutHeader, check_rollouts, read_rollouts, split_held_out, write_rollouts
from bebop.errors import InputError

HEADER = RolloutHeader(model="m", tokenizer_hash="abc", vocab_size=50, temperature=0.7, sampling={"seed": 1})
ROLLOUTS = [Rollout([1, 2], [3, 4, 2]), Rollout([1], [9] * 5, "length")]


def test_round_trip(tmp_path):
    path = tmp_path / "new" / "rollouts.jsonl"
    assert write_rollouts(path, HEADER, ROLLOUTS) == 2
    assert read_rollouts(path) == (HEADER, ROLLOUTS)
    assert [p.name for p in path.parent.iterdir()] == ["rollouts.jsonl"]


def test_file_appears_only_when_complete(tmp_path):
    path = tmp_path / "rollouts.jsonl"

    def breaks_off():
        yield ROLLOUTS[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_rollouts(path, HEADER, breaks_off())
    assert list(tmp_path.iterdir()) == []


def _record(**changes):
    return json.dumps({"prompt_ids": [1], "response_ids": [2]} | changes)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["nonsense"], r":1: not JSON"),
        ([_record()], r":1: expected a header"),
        (["HEADER"], "has a header but no rollouts"),
        (["HEADER", _record(), '{"prompt_ids": [1], "respo'], r":3: .*truncated"),
        (["HEADER", _record(response_ids=[])], r":2: response_ids is empty"),
        (["HEADER", '{"prompt_ids": [1]}'], r":2: response_ids is missing"),
        (["HEADER", _record(prompt_ids=[50])], r":2: prompt_ids has an id that is no integer from 0 to 49"),
        (["HEADER", _record(response_ids=["a"])], r":2: response_ids has an id"),
        (["HEADER", _record(response_ids=[True])], r":2: response_ids has an id"),
        ([json.dumps({"bebop_rollouts": 1, **vars(HEADER)} | {"vocab_size": "50"}), _record()], r":1: vocab_size is '50'"),
        (["HEADER", "[1, 2]"], r":2: expected a JSON object"),
        (["HEADER", _record(source=3)], r":2: source is 3, expected a string"),
        (['{"bebop_rollouts": 1, "model": "m"}', _record()], r":1: the header does not fit"),
    ],
)
def test_damaged_files_are_refused_with_the_line(lines, message, tmp_path):
    path = tmp_path / "rollouts.jsonl"
    write_rollouts(path, HEADER, [])
    header = path.read_text().strip()
    text = "\n".join(header if line == "HEADER" else line for line in lines)
    path.write_text(text if text.endswith("respo") else text + "\n")
    with pytest.raises(InputError, match=message):
        read_rollouts(path)


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_rollouts(tmp_path / "nothing.jsonl")


class _Tokenizer:
    def get_vocab(self):
        return {"a": 0, "b": 1}


def test_rollouts_of_another_model_are_refused(tmp_path):
    from bebop.data.rollouts import tokenizer_hash

    own = RolloutHeader("m", tokenizer_hash(_Tokenizer()), 50, 0.7)
    options = {"vocab_size": 50, "tokenizer": _Tokenizer(), "max_length": 6}
    path = tmp_path / "r.jsonl"
    check_rollouts(path, own, ROLLOUTS, **options)
    with pytest.raises(InputError, match="vocabulary of 50, the backbone has 60"):
        check_rollouts(path, own, ROLLOUTS, **options | {"vocab_size": 60})
    with pytest.raises(InputError, match="another tokenizer"):
        check_rollouts(path, HEADER, ROLLOUTS, **options)
    with pytest.raises(InputError, match=r"r.jsonl:3: 6 tokens, longer than the 5"):
        check_rollouts(path, own, ROLLOUTS, **options | {"max_length": 5})


def test_held_out_side_depends_on_the_text_alone():
    rollouts = [Rollout([i], [i, i + 1]) for i in range(1000)]
    train, held_out = split_held_out(rollouts, 0.2)
    assert len(train) + len(held_out) == 1000
    assert 150 < len(held_out) < 250
    again = split_held_out([*rollouts[::-1], Rollout([5000], [1])], 0.2)[1]
    assert {r.key for r in held_out} <= {r.key for r in again}
    assert split_held_out(rollouts, 0.0)[1] == []
