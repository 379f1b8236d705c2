"""Rollouts sampled by a real vLLM server, as recipes/generate_rollouts.py asks it to."""

import os
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch

from bebop.backbone import Backbone
from bebop.data.rollouts import read_rollouts
from recipes import generate_rollouts
from tests.engines.cases import HERE, PYTHON
from tests.rollouts import CHAT_TEMPLATE, VOCABULARY, make_tokenizer
from tests.tiny_models import make_checkpoint

pytestmark = pytest.mark.engine

EOS, USER, ASSISTANT, END = 2, 128, 129, 130
PROMPTS, SAMPLES, TEMPERATURE = [[5, 6, 7], [90, 11, 12, 13]], 1500, 1.5


@contextmanager
def vllm_serving(model: Path, log: Path) -> Iterator[str]:
    """The URL of a server of its own."""
    assert PYTHON.exists(), f"{PYTHON} does not exist; run `make test-engines`"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE)}
    arguments = ["--model", model, "--port", str(port), "--dtype", "float32", "--max-model-len", "256", "--enforce-eager"]
    with log.open("wb") as output:
        server = subprocess.Popen(
            [PYTHON, "-m", "vllm.entrypoints.openai.api_server", *arguments],
            env=os.environ | settings,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            for _ in range(600):
                assert server.poll() is None, log.read_text()[-6000:]
                try:
                    if httpx.get(f"http://127.0.0.1:{port}/health").is_success:
                        break
                except httpx.TransportError:
                    time.sleep(1)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(60)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny Qwen2 in the sizes that vLLM's CPU kernels take. Its generation config is one that a server would heed."""
    directory = make_checkpoint(
        tmp_path_factory.mktemp("served") / "model", "qwen2", hidden_size=128, intermediate_size=128, eos_token_id=EOS
    )
    make_tokenizer(CHAT_TEMPLATE).save_pretrained(directory)
    (directory / "generation_config.json").write_text(
        '{"eos_token_id": 2, "top_k": 3, "temperature": 0.2, "repetition_penalty": 1.5}'
    )
    return directory


@pytest.fixture(scope="module")
def server(model, tmp_path_factory) -> Iterator[str]:
    with vllm_serving(model, tmp_path_factory.mktemp("server") / "log.txt") as url:
        yield url


def generate(monkeypatch, model: Path, output: Path, *arguments: str) -> None:
    options = ["--model", str(model), "--output", str(output), "--temperature", str(TEMPERATURE), *arguments]
    monkeypatch.setattr(sys, "argv", ["generate_rollouts.py", *options])
    generate_rollouts.main()


def test_answers_are_drawn_from_the_models_own_distribution(model, server, tmp_path, monkeypatch):
    """Chi-square of first and second tokens against softmax(logits / T), at five or more expected of a token."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt_ids": {ids}}}\n' for ids in PROMPTS))
    given = ["--prompts", str(prompts), "--samples-per-prompt", str(SAMPLES), "--max-response-tokens", "2"]
    generate(monkeypatch, model, tmp_path / "r.jsonl", "--server", server, *given)
    _, rollouts = read_rollouts(tmp_path / "r.jsonl")
    answers = defaultdict(list)
    for rollout in rollouts:
        answers[tuple(rollout.prompt_ids)].append(rollout.response_ids)
    assert {prompt: len(found) for prompt, found in answers.items()} == {tuple(ids): SAMPLES for ids in PROMPTS}
    language_model = Backbone.load(str(model), torch.float32).model
    for prompt, found in answers.items():
        inputs = torch.tensor([[*prompt, token] for token in range(VOCABULARY)])
        with torch.no_grad():
            first, second = (language_model(inputs).logits[:, -2:].double() / TEMPERATURE).softmax(-1).unbind(1)
        check_counts([ids[0] for ids in found], SAMPLES * first[0])
        goes_on = torch.arange(VOCABULARY) != EOS
        check_counts([ids[1] for ids in found if len(ids) > 1], SAMPLES * (first[0].unsqueeze(1) * second)[goes_on].sum(0))
        assert all((ids[0] == EOS) == (len(ids) == 1) for ids in found)


def check_counts(tokens: Sequence[int], expected: torch.Tensor) -> None:
    """Within five standard deviations of chi-square's mean."""
    counts = torch.bincount(torch.tensor(tokens), minlength=len(expected))
    often = expected >= 5
    assert often.sum() > 30
    chi_square = ((counts - expected)[often] ** 2 / expected[often]).sum()
    freedom = often.sum() - 1
    assert abs(chi_square - freedom) < 5 * (2 * freedom) ** 0.5


def test_the_model_writes_prompts_too(model, server, tmp_path, monkeypatch):
    lengths = ["--count", "40", "--max-prompt-tokens", "100", "--max-response-tokens", "30"]
    generate(monkeypatch, model, tmp_path / "r.jsonl", "--server", server, *lengths)
    header, rollouts = read_rollouts(tmp_path / "r.jsonl")
    assert (header.temperature, header.vocab_size, len(rollouts)) == (TEMPERATURE, VOCABULARY, 40)
    assert len({tuple(rollout.prompt_ids) for rollout in rollouts}) == 40
    for rollout in rollouts:
        assert rollout.prompt_ids[0] == USER
        assert rollout.prompt_ids[-2:] == [END, ASSISTANT]
        assert (rollout.finish_reason == "stop") == (rollout.response_ids[-1] in (EOS, END))
        assert not {EOS, END} & {*rollout.response_ids[:-1]}
    assert {rollout.finish_reason for rollout in rollouts} == {"stop", "length"}
