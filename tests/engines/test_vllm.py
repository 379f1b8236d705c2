"""Exported heads in the real vLLM: they load, and are accepted as often as predicted.

Marked `engine`: `make test-engines` builds the environment that vLLM's CPU build needs and runs these tests.
"""

import json
import os
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from bebop.backbone import Backbone
from bebop.data.rollouts import Rollout
from bebop.evaluation.acceptance import chain_statistics_of
from bebop.evaluation.engine_counts import predict_engine_counts
from bebop.heads.loading import head_for
from tests.engines.heads import bytes_of_docs, train_and_export, train_tiny_backbone

pytestmark = pytest.mark.engine

HERE = Path(__file__).parent
PYTHON = Path(os.environ.get("BEBOP_ENGINE_PYTHON", HERE.parents[1] / ".venv-engines" / "bin" / "python"))
MAX_TOKENS = 160


def serve(model: Path, draft_steps: int, runs: list[dict], folder: Path) -> tuple[list[dict], str]:
    """What vLLM sampled and counted in each run, and its log."""
    assert PYTHON.exists(), f"{PYTHON} does not exist; run `make test-engines`"
    job, result = folder / f"job{draft_steps}.json", folder / f"result{draft_steps}.json"
    settings = {"model": str(model), "draft_steps": draft_steps, "dtype": "bfloat16", "max_length": 256, "runs": runs}
    job.write_text(json.dumps(settings))
    offline = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE)}
    done = subprocess.run(
        [PYTHON, HERE / "vllm_worker.py", job, result], env=os.environ | offline, capture_output=True, text=True
    )
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-6000:]
    return json.loads(result.read_text()), log


@dataclass
class Case:
    """A directory to serve, and what to ask of it."""

    folder: Path
    export: Path
    prompts: list[list[int]]
    temperature: float
    served: dict[int, tuple[list[dict], str]] = field(default_factory=dict)

    def run(self, draft_steps: int) -> tuple[list[dict], str]:
        """Sampled texts with their counters, and the log; served once for all tests."""
        if draft_steps not in self.served:
            sampled = {"prompts": self.prompts, "temperature": self.temperature, "max_tokens": MAX_TOKENS}
            self.served[draft_steps] = serve(self.export, draft_steps, [sampled], self.folder)
        return self.served[draft_steps]


@pytest.fixture(scope="module")
def qwen3_5(tmp_path_factory) -> Case:
    """A tiny Qwen3.5, three linear-attention layers and one of full attention, and a native head, trained on bytes."""
    folder = tmp_path_factory.mktemp("qwen3_5")
    target = train_tiny_backbone(folder / "target", "qwen3_5_text")
    text = bytes_of_docs().tolist()
    texts = [Rollout(text[i : i + 8], text[i + 8 : i + 96]) for i in range(0, len(text) - 96, 48)]
    train_and_export(target, texts, folder, temperature=1.0, steps=80, learning_rate=2e-3)
    prompts = [text[i : i + 12] for i in range(0, 64 * 40, 40)]
    return Case(folder, folder / "export", prompts, temperature=1.0)


@pytest.fixture(params=["qwen3_5"])
def case(request) -> Case:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("draft_steps", [1, 3])
def test_loads_without_a_word_about_weights(case, draft_steps):
    log = case.run(draft_steps)[1]
    about_weights = r"(?i)(weight|tensor|checkpoint).*(missing|not (found|loaded|initiali[sz]ed)|unexpected|skip|ignor)"
    assert not [line for line in log.splitlines() if re.search("WARNING|ERROR", line) and re.search(about_weights, line)]


@pytest.mark.parametrize("draft_steps", [1, 3])
def test_counted_acceptance_is_the_predicted_one(case, draft_steps):
    """From the texts the engine sampled, by our own unroll and statistics, weighted by where rounds start."""
    runs = case.run(draft_steps)[0]
    drafts = sum(r["drafts"] for r in runs)
    counted = [sum(r["accepted"][j] for r in runs) / drafts for j in range(draft_steps)]
    backbone = Backbone.load(str(case.export), torch.float32)
    head, origin = head_for(backbone)
    assert origin == "checkpoint"
    texts = [Rollout(p, t) for r in runs for p, t in zip(case.prompts, r["texts"], strict=True)]
    predicted = predict_engine_counts(
        chain_statistics_of(
            head, backbone, texts, steps=draft_steps, temperature=case.temperature, compute_dtype=torch.float32
        )
    )
    print(f"{case.export.parent.name} K={draft_steps} drafts {drafts} counted {counted} predicted {predicted}")
    assert drafts >= 5000
    assert 0.1 < counted[0] < 0.9
    for j in range(draft_steps):
        error = (predicted.standard_error[j] ** 2 + counted[j] * (1 - counted[j]) / drafts) ** 0.5
        assert abs(counted[j] - predicted.acceptance[j]) < 3 * error, f"draft {j + 1}"
