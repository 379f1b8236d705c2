"""A trained and exported head per family."""

import pytest
from transformers import AutoTokenizer

from bebop.data.rollouts import Rollout
from tests.demo import demo_backbone
from tests.engines.cases import MEASURED, Case, serve
from tests.engines.heads import english, train_and_export, train_tiny_backbone

PROMPTS = 64


def pytest_terminal_summary(terminalreporter):
    """Counted and predicted acceptance, as a table for the documentation."""
    if not MEASURED:
        return
    terminalreporter.section("acceptance per draft: counted by the engine / predicted from its texts")
    for line in MEASURED:
        pairs = zip(line.counted, line.predicted.acceptance, strict=True)
        shown = "   ".join(f"{counted:.4f} / {predicted:.4f}" for counted, predicted in pairs)
        terminalreporter.write_line(f"{line.label:24} K={line.draft_steps} {line.drafts:6,} drafts   {shown}")


def tiny_case(folder, kind: str) -> Case:
    """A tiny model of three linear-attention layers and one of full attention, and a native head, trained on bytes."""
    target = train_tiny_backbone(folder / "target", kind)
    text = list(english().encode())
    texts = [Rollout(text[i : i + 8], text[i + 8 : i + 96]) for i in range(0, len(text) - 96, 48)]
    train_and_export(target, texts, folder, temperature=1.0, steps=80, learning_rate=2e-3)
    prompts = [text[i : i + 12] for i in range(0, PROMPTS * 40, 40)]
    return Case(target, folder / "export", prompts, temperature=1.0)


@pytest.fixture(scope="session")
def qwen3_5(tmp_path_factory) -> Case:
    return tiny_case(tmp_path_factory.mktemp("qwen3_5"), "qwen3_5_text")


@pytest.fixture(scope="session")
def qwen3_5_moe(tmp_path_factory) -> Case:
    return tiny_case(tmp_path_factory.mktemp("qwen3_5_moe"), "qwen3_5_moe_text")


@pytest.fixture(scope="session")
def qwen3_next(tmp_path_factory) -> Case:
    return tiny_case(tmp_path_factory.mktemp("qwen3_next"), "qwen3_next")


@pytest.fixture(scope="session")
def mimo(tmp_path_factory) -> Case:
    """The demo's real 135M model, and a head of the MiMo layout trained on texts that vLLM sampled from it."""
    folder, target = tmp_path_factory.mktemp("mimo"), demo_backbone()
    ids = AutoTokenizer.from_pretrained(target).encode(english())
    prompts = [ids[i : i + 24] for i in range(0, PROMPTS * 24, 24)]
    run = {"prompts": prompts, "temperature": 0.7, "max_tokens": 100}
    sampled = serve("vllm_worker.py", target, 0, "float32", [run], folder).runs[0]["texts"]
    texts = [Rollout(prompt, text) for prompt, text in zip(prompts, sampled, strict=True)]
    train_and_export(target, texts, folder, temperature=0.7, steps=40, learning_rate=1e-3)
    return Case(target, folder / "export", prompts, temperature=0.7, dtype="float32")


@pytest.fixture
def case(request) -> Case:
    """The case that a test names in its parameters."""
    return request.getfixturevalue(request.param)
