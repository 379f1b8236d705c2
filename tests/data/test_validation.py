import json
import sys
from dataclasses import replace

import pytest

from bebop.data.rollouts import Rollout, RolloutHeader, tokenizer_hash, write_rollouts
from bebop.data.validation import validate
from bebop.errors import InputError
from recipes.validate_rollouts import main
from tests.rollouts import VOCABULARY, make_tokenizer
from tests.tiny_models import make_checkpoint

HEADER = RolloutHeader("m", tokenizer_hash(make_tokenizer()), VOCABULARY, 1.0)
OPTIONS = {"draft_steps": 3, "tokens_per_micro_batch": 42, "held_out_share": 0.6}
ROLLOUTS = [
    Rollout([1] * 2, [5, 6, 7, 130], "stop", "math"),
    Rollout([1] * 4, [5, 6, 9], "length", "code"),
    Rollout([1] * 2, [5, 6, 7, 130], "stop", "math"),
    Rollout([1] * 8, list(range(10, 23)), "length", "math"),
]


@pytest.fixture
def path(tmp_path):
    write_rollouts(tmp_path / "a.jsonl", HEADER, ROLLOUTS[:2])
    write_rollouts(tmp_path / "b.parquet", HEADER, ROLLOUTS[2:])
    return tmp_path / "*"


def test_numbers_of_small_rollouts(path):
    found = validate([path], **OPTIONS)
    assert [f.rpartition("/")[2] for f in found.files] == ["a.jsonl", "b.parquet"]
    assert (found.rollouts, found.tokens, found.held_out) == (4, 16 + 24, 3)
    assert found.supervised_share == 24 / 40
    assert found.prompt_lengths == {0: 2, 5: 2, 25: 2, 50: 2, 75: 4, 95: 8, 99: 8, 100: 8}
    assert found.response_lengths[50] == 4
    assert found.prompt_histogram == {2: 2, 4: 1, 8: 1}
    assert found.response_histogram == {2: 1, 4: 2, 8: 1}
    assert found.finish_reasons == {"stop": 2, "length": 2}
    assert found.sources == {"math": 3, "code": 1}
    assert found.duplicates == 1
    assert found.too_short == 1, "three tokens have no room for three drafts and the token they start from"
    assert list(found.token_counts.items())[:5] == [(5, 3), (6, 3), (7, 2), (130, 2), (9, 1)]
    assert sum(found.token_counts.values()) == 24
    assert found.token_texts == {}
    # Documents of 6, 7, 6 and 21 tokens. Packed: rows of 21 and 7 + 6 + 6 make a batch. One a row: 21 and 7, then 6 and 6.
    assert found.padding_share["packed"] == pytest.approx(1 - 40 / 42)
    assert found.padding_share["one_a_row"] == pytest.approx(1 - 40 / (42 + 12))
    assert found.problems == found.warnings == []


def test_degenerate_and_converted_text_is_warned_of(tmp_path):
    header = replace(HEADER, sampling={"converted_from": ["chats"]})
    write_rollouts(tmp_path / "r.jsonl", header, [Rollout([i], [9, 9, 4, 5, 6]) for i in range(8)])
    found = validate([tmp_path / "r.jsonl"], **OPTIONS)
    assert found.problems == []
    assert found.warnings[0].startswith("token 9 ")
    assert "40% of all responses" in found.warnings[0]
    assert "r.jsonl: converted from chats" in found.warnings[1]


def test_all_problems_with_a_model_are_said(path, tmp_path):
    model = make_checkpoint(tmp_path / "models" / "m", "qwen2", vocab_size=140, max_position_embeddings=20)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens("new")
    tokenizer.save_pretrained(model)
    found = validate([path], **OPTIONS | {"draft_steps": 13}, model=str(model))
    expected = (
        "the backbone has 140",
        "another tokenizer",
        "b.parquet, row 1: 21 tokens",
        "training response has 13 tokens, too few for 13 draft steps",
        "held-out response has 4 tokens, too few for 13 draft steps",
    )
    assert len(found.problems) == len(expected)
    assert all(part in problem for part, problem in zip(expected, found.problems, strict=True))
    assert next(iter(found.token_texts.items())) == (5, "w5")


def test_a_run_without_held_out_rollouts_is_a_problem(path):
    """As it is for the run itself, at the share that was asked for."""
    found = validate([path], **OPTIONS | {"held_out_share": 0.0})
    assert [problem.partition(" at ")[0].rpartition(": ")[2] for problem in found.problems] == [
        "of 4 rollouts none is held-out"
    ]


def test_recipe_prints_and_ends_with_the_verdict(path, tmp_path, monkeypatch, capsys):
    numbers, plot = tmp_path / "new" / "numbers.json", tmp_path / "new" / "plot.png"
    options = ["--json", str(numbers), "--plot", str(plot), "--held-out-share", "0.6"]
    monkeypatch.setattr(sys, "argv", ["validate_rollouts.py", str(path), *options])
    main()
    assert plot.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "math 3, code 1" in printed
    assert "█" * 40 in printed
    found = json.loads(numbers.read_text())
    assert (found["tokens"], found["token_counts"]["5"]) == (40, 3)

    monkeypatch.setattr(sys, "argv", [*sys.argv, "--draft-steps", "13"])
    with pytest.raises(SystemExit, match=r"error: .*too few for 13 draft steps"):
        main()


def test_files_that_cannot_be_read_are_refused(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="does not exist"):
        validate([tmp_path / "nothing"], **OPTIONS)
    monkeypatch.setattr(sys, "argv", ["validate_rollouts.py", "nothing", "--draft-steps", "0"])
    with pytest.raises(SystemExit, match="error: --draft-steps is 0, expected 1 or more"):
        main()
