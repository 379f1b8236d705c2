import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

import bebop.data.server
from bebop.data.prompts import Prompt
from bebop.data.rollouts import read_rollouts
from bebop.data.served import ServerSampling, answer_prompts_on_server, generate_rollouts_on_server
from bebop.data.server import find_server
from bebop.errors import InputError
from bebop.sampling import draw
from recipes import generate_rollouts as recipe
from tests.data.sampling_server import serving
from tests.rollouts import CHAT_TEMPLATE, make_tokenizer
from tests.tiny_models import make_model

ROOT = Path(__file__).parents[2]
EOS, USER, ASSISTANT, END = 2, 128, 129, 130


def echo(prompt, _):
    return [prompt[0], EOS]


def sampling_on(server, **options):
    return ServerSampling(
        **{
            "server": find_server(server.url),
            "vocab_size": 131,
            "temperature": 1.0,
            "stop": [EOS],
            "max_response_tokens": 12,
            "concurrency": 8,
            "seed": 0,
        }
        | options
    )


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_every_prompt_is_answered_as_often_as_asked(engine):
    """Though the server drops connections and is busy now and then."""
    prompts = [Prompt(i, [10 + i], f"source {i}") for i in range(20) for _ in range(2)]
    kept = []
    with serving(echo, engine) as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(bebop.data.server, "_FIRST_WAIT", 0.001)
        server.faults.extend([None, "drop", 429, None, 500, "drop", None, 503])
        answer_prompts_on_server(
            sampling_on(server), prompts, Counter({3: 2, 4: 1}), lambda number, rollout: kept.append((number, rollout))
        )
    assert Counter(number for number, _ in kept) == Counter(dict.fromkeys(range(20), 2)) - Counter({3: 2, 4: 1})
    for number, rollout in kept:
        assert (rollout.prompt_ids, rollout.response_ids) == ([10 + number], [10 + number, EOS])
        assert (rollout.finish_reason, rollout.source) == ("stop", f"source {number}")


def test_no_two_requests_have_one_seed_also_after_a_stop():
    """The same seed for two answers to one prompt would give one answer twice."""
    prompts = [Prompt(0, [10])] * 12
    with serving(echo) as server:
        for written in (Counter(), Counter({0: 3})):
            answer_prompts_on_server(sampling_on(server), prompts, written, lambda *_: None)
        assert len({request["seed"] for request in server.requests}) == len(server.requests) == 21
        seeds = [request["seed"] for request in server.requests]
        answer_prompts_on_server(sampling_on(server), prompts, Counter(), lambda *_: None)
        assert sorted(seeds[:12]) == sorted(request["seed"] for request in server.requests[21:])


@pytest.fixture(scope="module")
def model():
    model = make_model("qwen2", eos_token_id=EOS).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(0.3)  # flat distributions, so that turns end
    return model


def sampler_of(model):
    @torch.no_grad()
    def sample(prompt, request):
        generator = torch.Generator().manual_seed(request["seed"])
        ids, ends = list(prompt), {EOS, *request["stop_token_ids"]}
        while len(ids) - len(prompt) < request["max_tokens"] and (len(ids) == len(prompt) or ids[-1] not in ends):
            logits = model(torch.tensor([ids])).logits[:, -1]
            ids.append(int(draw((logits / request["temperature"]).softmax(-1), generator)))
        return ids[len(prompt) :]

    return sample


@torch.no_grad()
def test_self_written_rollouts_have_the_form_of_those_in_process(model):
    kept = {}
    with serving(sampler_of(model)) as server:
        generate_rollouts_on_server(
            sampling_on(server, temperature=1e-4),
            make_tokenizer(CHAT_TEMPLATE),
            count=20,
            prompt_temperature=1.0,
            max_prompt_tokens=60,
            written=Counter([0, 7]),
            keep=kept.__setitem__,
        )
    assert sorted(kept) == [n for n in range(20) if n not in (0, 7)]
    assert len({tuple(rollout.prompt_ids) for rollout in kept.values()}) == 18
    for rollout in kept.values():
        prompt, response = rollout.prompt_ids, rollout.response_ids
        assert (prompt[0], prompt[-2:]) == (USER, [END, ASSISTANT])
        assert 1 <= len(prompt) - 3 < 60
        assert not {END, EOS} & {*prompt[1:-2], *response[:-1]}
        assert rollout.finish_reason == ("stop" if response[-1] in (END, EOS) else "length")
        logits = model(torch.tensor([prompt + response])).logits
        assert logits[0, len(prompt) - 1 : -1].argmax(-1).tolist() == response


def test_a_model_that_never_ends_a_prompt_is_refused():
    with serving(lambda *_: [9, 9]) as server, pytest.raises(InputError, match="none ended within 2 tokens"):
        generate_rollouts_on_server(
            sampling_on(server),
            make_tokenizer(CHAT_TEMPLATE),
            count=5,
            prompt_temperature=1.0,
            max_prompt_tokens=2,
            written=Counter(),
            keep=lambda *_: None,
        )


def run_recipe(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["generate_rollouts.py", *map(str, arguments)])
    recipe.main()


@pytest.fixture
def checkpoint(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    make_tokenizer(CHAT_TEMPLATE).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_killed_run_goes_on_and_answers_every_prompt_once(checkpoint, tmp_path, monkeypatch, capsys):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt_ids": [10 + i]}) + "\n" for i in range(60)))
    output = tmp_path / "rollouts.jsonl"
    partial = tmp_path / "rollouts.jsonl.partial"
    with serving(echo) as server:
        arguments = [
            "--model", checkpoint, "--output", output, "--prompts", tmp_path / "prompts.jsonl", "--server", server.url,
            "--max-response-tokens", "30", "--concurrency", "4",
        ]  # fmt: skip
        server.delay = 0.1
        process = subprocess.Popen(
            [sys.executable, "recipes/generate_rollouts.py", *map(str, arguments)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stderr=subprocess.DEVNULL,
        )
        while not (partial.exists() and partial.read_bytes().count(b"\n") > 10):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        partial.write_bytes(partial.read_bytes()[:-5])
        server.delay = 0
        # The weights are not read where a server has them.
        monkeypatch.setattr(recipe.Backbone, "load", None)
        with pytest.raises(SystemExit, match=r"begun with temperature = 1\.0, now it is 0\.5"):
            run_recipe(monkeypatch, *arguments, "--temperature", "0.5")
        run_recipe(monkeypatch, *arguments)
    assert "going on from there" in capsys.readouterr().out
    header, rollouts = read_rollouts(output)
    assert sorted(rollout.prompt_ids for rollout in rollouts) == [[10 + i] for i in range(60)]
    assert (header.vocab_size, header.sampling["served_model"], header.sampling["count"]) == (131, "tiny", 60)
    assert not partial.exists()


def test_a_run_that_is_interrupted_says_how_to_go_on(checkpoint, tmp_path, monkeypatch, capsys):
    arguments = ["--model", checkpoint, "--output", tmp_path / "r.jsonl", "--count", "9", "--batch-size", "8"]
    arguments += ["--max-response-tokens", "30"]
    append = recipe.GrowingRolloutFile.append

    def interrupted(file, number, rollout):
        append(file, number, rollout)
        if file.written.total() == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(recipe.GrowingRolloutFile, "append", interrupted)
        with pytest.raises(SystemExit, match="130"):
            run_recipe(patch, *arguments)
    assert "3 rollouts are kept in" in capsys.readouterr().err
    run_recipe(monkeypatch, *arguments)
    run_recipe(monkeypatch, *arguments[:3], tmp_path / "whole.jsonl", *arguments[4:])
    assert (tmp_path / "r.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    assert len(read_rollouts(tmp_path / "r.jsonl")[1]) == 9


def test_given_prompts_in_process_and_what_is_said_of_them(checkpoint, tmp_path, monkeypatch, capsys):
    (tmp_path / "p.txt").write_text("w1\nw2 w3\n" + "w4 " * 300 + "\n")
    run_recipe(
        monkeypatch, "--model", checkpoint, "--output", tmp_path / "r.jsonl", "--prompts", tmp_path / "p.txt",
        "--count", "9", "--samples-per-prompt", "2", "--max-response-tokens", "8",
    )  # fmt: skip
    said = capsys.readouterr().out
    assert "left out 1 prompts that are longer than 248 tokens" in said
    assert "has 2 prompts: 4 rollouts will be written instead of 9" in said
    _, rollouts = read_rollouts(tmp_path / "r.jsonl")
    turns = [[USER, 1, END, ASSISTANT], [USER, 2, 3, END, ASSISTANT]]
    assert sorted(rollout.prompt_ids for rollout in rollouts) == sorted(turns * 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples-per-prompt", "2"], "--samples-per-prompt has no meaning without --prompts; give that too"),
        (["--served-model", "x"], "--served-model has no meaning without --server; give that too"),
        (["--server", "u", "--batch-size", "8"], "--batch-size has no meaning with --server; leave one of them out"),
        (["--prompts", "p", "--max-prompt-tokens", "8"], "--max-prompt-tokens has no meaning with --prompts; leave one"),
        (["--count", "0"], "--count is 0, expected a number above 0"),
        (["--server", "http://127.0.0.1:9"], "no server answers"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_is_written(arguments, message, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=message):
        run_recipe(monkeypatch, "--model", tmp_path, "--output", tmp_path / "r.jsonl", *arguments)
    assert not list(tmp_path.iterdir())
