"""recipes/evaluate_mtp.py from files to report."""

import json
import re
from pathlib import Path

import pytest
import torch

from bebop.backbone import Backbone
from bebop.data.rollouts import Rollout, RolloutHeader, read_rollouts, tokenizer_hash, write_rollouts
from bebop.errors import InputError
from bebop.evaluation.acceptance import evaluate
from bebop.evaluation.decoding import speculative_decode
from bebop.evaluation.study import Study, run_study
from bebop.heads.loading import head_for, save_head
from tests.rollouts import VOCABULARY, make_tokenizer, write_tiny_rollouts
from tests.tiny_models import make_checkpoint


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """A tiny model with a native head, the same head as a run leaves it, and texts that the model sampled."""
    directory = tmp_path_factory.mktemp("study")
    model = make_checkpoint(directory / "model", "qwen2", native_head=True)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(model)
    backbone = Backbone.load(str(model), torch.float32)
    head, _ = head_for(backbone)
    save_head(head, directory / "head", {"backbone": str(model), "draft_steps": 2, "temperature": 1.0})
    found = {"model": model, "head": directory / "head"}
    generator = torch.Generator().manual_seed(0)
    for temperature in (0.7, 1.0, 1.3):
        prompts = torch.randint(3, 131, (48, 4), generator=generator).tolist()
        texts = speculative_decode(head, backbone, prompts, steps=2, max_tokens=60, temperature=temperature).texts
        header = RolloutHeader(str(model), tokenizer_hash(tokenizer), VOCABULARY, temperature)
        rollouts = [
            Rollout(p, t, "length", ("math", "code")[i % 2]) for i, (p, t) in enumerate(zip(prompts, texts, strict=True))
        ]
        found[str(temperature)] = directory / f"at-{temperature}.jsonl"
        write_rollouts(found[str(temperature)], header, rollouts)
    return found


def make_study(files, tmp_path, **changes) -> Study:
    options = {"head": str(files["head"]), "rollouts": [files["1.0"]], "resamples": 200, "dtype": "fp32"}
    return Study(output=tmp_path / "evaluation", **(options | changes))


def test_report_holds_what_was_found(files, tmp_path):
    study = make_study(files, tmp_path, rollouts=[files[t] for t in ("0.7", "1.0", "1.3")], checkpoints=2)
    run_study(study)
    result = json.loads((study.output / "evaluation.json").read_text())
    assert list(result["sets"]) == ["at-0.7", "at-1.0", "at-1.3"]
    one = result["sets"]["at-1.0"]
    backbone = Backbone.load(str(files["model"]), torch.float32)
    head, _ = head_for(backbone)
    rollouts = read_rollouts(files["1.0"])[1]
    expected = evaluate(head, backbone, rollouts, steps=2, temperature=1.0, compute_dtype=torch.float32)
    sampled = one["rules"]["rejection_sampling"]
    assert [value for value, _, _ in sampled["alpha"]] == pytest.approx(expected.alpha, abs=1e-5)
    assert sampled["accept_length_realised"][0] == pytest.approx(expected.accept_length, abs=1e-5)
    greedy = one["rules"]["target_only"]
    assert greedy["accept_length_realised"][0] == pytest.approx(expected.accept_length_target_only, abs=1e-5)
    assert set(one["by_source"]) == {"math", "code"}
    assert set(result["over_sets"]) == {"rejection_sampling", "target_only"}
    change = [row["rules"]["rejection_sampling"]["served"][-1]["accept_length"][0] for row in result["sets"].values()]
    parts = result["decomposition"]
    assert parts["entropy_driven"][2] + parts["mismatch_driven"][2] == pytest.approx((change[2] - change[0]) / 2)

    page = (study.output / "report.html").read_text()
    assert not re.search(r"(src|href)=\"(?!data:)", page), "the page needs something beside it"
    assert "<script" not in page
    images = sorted(p.stem for p in study.output.glob("*.png"))
    assert images == ["by_entropy", "by_position", "decomposition", "over_sets", "served"]
    assert page.count("data:image/png;base64,") == len(images)


def test_predicted_is_what_the_decoder_counts(files, tmp_path):
    """Fresh texts from the same prompts: three standard errors of both sides."""
    result = run_study(make_study(files, tmp_path, decode=48))
    one = result["sets"]["at-1.0"]
    for served, counted in zip(one["rules"]["rejection_sampling"]["served"], one["decoded"], strict=True):
        assert counted["rounds"] > 1000
        for predicted, share in zip(served["acceptance"], counted["acceptance"], strict=True):
            error = ((predicted.high - predicted.low) / 3.92) ** 2 + share * (1 - share) / counted["rounds"]
            assert abs(predicted.value - share) < 3 * error**0.5


def test_several_temperatures_in_one_run(files, tmp_path, caplog):
    result = run_study(make_study(files, tmp_path, temperatures=[1.0, 0.7]))
    assert list(result["sets"]) == ["at-1.0 at 1.0", "at-1.0 at 0.7"]
    assert "sampled at temperature 1.0 and is scored at 0.7" in caplog.text
    assert "biased" in caplog.text
    cold, warm = (result["sets"][f"at-1.0 at {t}"]["target_entropy"].value for t in (0.7, 1.0))
    assert cold < warm


def test_texts_that_were_not_sampled_are_refused(files, tmp_path):
    header, rollouts = read_rollouts(files["1.0"])
    header.temperature = 0.0
    write_rollouts(tmp_path / "greedy.jsonl", header, rollouts)
    with pytest.raises(InputError, match=r"was sampled at temperature 0\.0"):
        run_study(make_study(files, tmp_path, rollouts=[tmp_path / "greedy.jsonl"]))


def test_a_model_without_a_head_of_its_own_is_refused(tmp_path):
    """A cold start would be scored as if it were one."""
    model = make_checkpoint(tmp_path / "model", "qwen2")
    rollouts = [write_tiny_rollouts(tmp_path / "rollouts.jsonl", model)]
    with pytest.raises(InputError, match="model has no head of its own to evaluate; give --head"):
        run_study(Study(head="auto", backbone=[str(model)], rollouts=rollouts, output=tmp_path / "out", dtype="fp32"))
    assert not (tmp_path / "out").exists()


def test_native_head_needs_no_run(tmp_path):
    model = make_checkpoint(tmp_path / "model", "qwen3_5_text", native_head=True)
    rollouts = write_tiny_rollouts(tmp_path / "rollouts.jsonl", model)
    result = run_study(
        Study(head="auto", backbone=[str(model)], rollouts=[rollouts], output=tmp_path / "out", resamples=100, dtype="fp32")
    )
    assert result["sets"]["rollouts"]["chains"] > 100
