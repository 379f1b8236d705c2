"""What is served, by which engine, and what is expected of its counters."""

import json
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from bebop.backbone import Backbone
from bebop.data.rollouts import Rollout
from bebop.evaluation.acceptance import chain_statistics_of
from bebop.evaluation.engine_counts import EngineCounts, predict_engine_counts
from bebop.heads.loading import head_for

HERE = Path(__file__).parent
PYTHON = Path(os.environ.get("BEBOP_ENGINE_PYTHON", HERE.parents[1] / ".venv-engines" / "bin" / "python"))
MAX_TOKENS = 160
GREEDY_PROMPTS = 16


def engine_python(script: str, *arguments: Path) -> str:
    """Run a script of this directory in the engine environment; returns what it printed."""
    assert PYTHON.exists(), f"{PYTHON} does not exist; run `make test-engines`"
    # In one process, so that the worker can look at the draft model.
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE)
    }  # fmt: skip
    done = subprocess.run([PYTHON, HERE / script, *arguments], env=os.environ | settings, capture_output=True, text=True)
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-6000:]
    return log


class Measured(NamedTuple):
    """A line of the table that ends `make test-engines`."""

    label: str
    draft_steps: int
    drafts: int
    counted: list[float]
    predicted: EngineCounts


MEASURED: list[Measured] = []


@dataclass
class Served:
    """What an engine sampled and counted, run by run, its log, and the first drafts' logits [prompts, V] of a greedy run."""

    runs: list[dict]
    log: str
    first_logits: torch.Tensor | None


@dataclass
class Case:
    """A target, the export with a trained head, and what to ask of them."""

    target: Path
    export: Path
    prompts: list[list[int]]
    temperature: float
    dtype: str = "bfloat16"
    served: dict[tuple[str, Path, int], Served] = field(default_factory=dict)

    @property
    def greedy_prompts(self) -> list[list[int]]:
        return self.prompts[:GREEDY_PROMPTS]

    def serve(self, worker: str, model: Path, draft_steps: int) -> Served:
        """All prompts sampled, some greedily; once for all tests. Without drafts greedily only."""
        key = (worker, model, draft_steps)
        if key not in self.served:
            runs = [{"prompts": self.greedy_prompts, "temperature": 0.0, "max_tokens": MAX_TOKENS}]
            if draft_steps:
                runs.insert(0, {"prompts": self.prompts, "temperature": self.temperature, "max_tokens": MAX_TOKENS})
            self.served[key] = serve(worker, model, draft_steps, self.dtype, runs, self.export.parent)
        return self.served[key]

    def texts(self, served: Served) -> list[Rollout]:
        return [Rollout(p, t) for p, t in zip(self.prompts, served.runs[0]["texts"], strict=True)]


def serve(worker: str, model: Path, draft_steps: int, dtype: str, runs: list[dict], folder: Path) -> Served:
    job, result = folder / f"{worker}.job.json", folder / f"{worker}.{draft_steps}.json"
    max_length = max(len(prompt) + run["max_tokens"] for run in runs for prompt in run["prompts"]) + 8
    settings = {"model": str(model), "draft_steps": draft_steps, "dtype": dtype, "max_length": max_length, "runs": runs}
    job.write_text(json.dumps(settings))
    log = engine_python(worker, job, result)
    first = result.with_suffix(".pt")
    return Served(json.loads(result.read_text()), log, torch.load(first) if first.exists() else None)


def check_counts(case: Case, served: Served, draft_steps: int) -> None:
    """Counted acceptance per position is the one predicted from the texts that the engine sampled."""
    backbone = Backbone.load(str(case.export), torch.float32)
    head, origin = head_for(backbone)
    assert origin == "checkpoint"
    statistics = chain_statistics_of(
        head,
        backbone,
        case.texts(served),
        steps=draft_steps,
        temperature=case.temperature,
        compute_dtype=torch.float32,
    )
    compare(f"vLLM, {backbone.family.name}", served.runs[0], predict_engine_counts(statistics), draft_steps)


def compare(label: str, sampled: dict, predicted: EngineCounts, draft_steps: int) -> None:
    """Within three standard errors, of the count and of the prediction together."""
    drafts = sampled["drafts"]
    counted = [count / drafts for count in sampled["accepted"]]
    assert len(counted) == draft_steps
    MEASURED.append(Measured(label, draft_steps, drafts, counted, predicted))
    assert drafts >= 5000
    assert 0.1 < counted[0] < 0.9
    for j in range(draft_steps):
        error = (predicted.standard_error[j] ** 2 + counted[j] * (1 - counted[j]) / drafts) ** 0.5
        assert abs(counted[j] - predicted.acceptance[j]) < 3 * error, f"draft {j + 1}"


@torch.no_grad()
def check_greedy(case: Case, with_drafts: list[list[int]], without: list[list[int]]) -> None:
    """Greedy texts are the same token by token, but for ties.

    An engine verifies K+1 tokens in one pass and generates one at a time, in products of other shapes; where the two best
    tokens are closer than the rounding of the engine's dtype either may come out, and the texts part.
    """
    models = [Backbone.load(str(case.target), dtype) for dtype in (torch.float32, getattr(torch, case.dtype))]
    parted = 0
    for prompt, text, other in zip(case.greedy_prompts, with_drafts, without, strict=True):
        if text == other:
            continue
        parted += 1
        at = next(i for i in range(len(text)) if text[i] != other[i])
        exact, rounded = (model.model(torch.tensor([prompt + text[:at]])).logits[0].float() for model in models)
        noise = max((rounded - exact).abs().max().item(), 1e-4)
        best = exact[-1].max()
        print(f"texts part at {at}, {exact[-1, text[at]] - best:.4f} and {exact[-1, other[at]] - best:.4f} below the best")
        assert best - torch.minimum(exact[-1, text[at]], exact[-1, other[at]]) < 2 * noise
    print(f"{parted} of {len(without)} greedy texts part at a tie")
    assert parted <= len(without) / 4
