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


def engine_python(script: str, *arguments: Path) -> None:
    """Run a script of this directory in the engine environment."""
    assert PYTHON.exists(), f"{PYTHON} does not exist; run `make test-engines`"
    # In one process, so that the worker can look at the draft model.
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE)
    }  # fmt: skip
    done = subprocess.run([PYTHON, HERE / script, *arguments], env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


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
    """What an engine sampled and counted.

    Attributes:
        runs: texts, drafts and accepted of each run.
        not_loaded: by class of model, its parameters that nothing was loaded into (vLLM).
        first_logits: of the first drafts of a greedy run, [prompts, V] (vLLM).
    """

    runs: list[dict]
    not_loaded: dict[str, list[str]]
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
    engine_python(worker, job, result)
    found, first = json.loads(result.read_text()), result.with_suffix(".pt")
    return Served(found["runs"], found.get("not_loaded", {}), torch.load(first) if first.exists() else None)


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
    """Greedy texts are the same token by token; in bf16, but for ties.

    An engine verifies K+1 tokens in one pass and generates one at a time, in products of other shapes, which round
    otherwise. Where rounding alone can make either token the best, the texts may part.
    """
    parted, agreed, unexplained = 0, 0, 0
    for prompt, text, other in zip(case.greedy_prompts, with_drafts, without, strict=True):
        if text == other:
            agreed += len(text)
            continue
        parted += 1
        at = next(i for i in range(len(text)) if text[i] != other[i])
        agreed += at
        exact, rounded = last_logits(case.target, prompt + text[:at])
        for token in (text[at], other[at]):
            below, best = (exact.max() - exact[token]).item(), (rounded.argmax(1) == token).float().mean().item()
            print(f"texts part at {at}: token {token}, {below:.4f} below the best, is best in {best:.3f} of all roundings")
            unexplained += best == 0
    print(f"{parted} of {len(without)} greedy texts part at a tie; {agreed} tokens are the same")
    assert unexplained == 0, "there are texts that part where no rounding makes either token the best"
    assert parted == 0 or case.dtype == "bfloat16"
    assert agreed >= 1000


def last_logits(directory: Path, tokens: list[int], roundings: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits behind the last token in fp32, [V], and under so many random roundings to bf16, [roundings, V].

    Whatever enters or leaves a module that has weights is off by up to half a unit in bf16's last place. That includes a
    router: where two experts are nearly equally likely, either may be chosen.
    """
    model = Backbone.load(str(directory), torch.float32).model
    exact = model(torch.tensor([tokens])).logits[0, -1]
    generator = torch.Generator().manual_seed(0)

    def rounded(value):
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        off = torch.rand(value.shape, generator=generator) - 0.5
        return value * (1 + off * torch.finfo(torch.bfloat16).eps)

    for module in model.modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.register_forward_pre_hook(lambda _, inputs: tuple(map(rounded, inputs)))
            module.register_forward_hook(lambda _, __, output: rounded(output))
    return exact, model(torch.tensor([tokens] * roundings)).logits[:, -1]
