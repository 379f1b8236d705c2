"""An exported native head in the real llama.cpp: it is drafted with, and accepted as often as predicted."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from bebop.backbone import Backbone
from bebop.data.batches import make_batch, plan_micro_batches
from bebop.data.rollouts import Rollout
from bebop.evaluation.engine_counts import predict_engine_counts
from bebop.heads.draft import draft
from bebop.heads.loading import head_for
from bebop.kernels.stats import ChainStats
from tests.engines.cases import Case, check_greedy, compare, engine_python

pytestmark = pytest.mark.engine
WORKER = "llama_worker.py"
# llama.cpp draws a draft from this many of the head's likeliest tokens, whatever the request's sampling says.
DRAFT_TOP_K = 10
WHOLE = 256


@pytest.fixture(scope="module")
def converted(qwen3_5, tmp_path_factory) -> Case:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    engine_python("gguf_model.py", qwen3_5.export, path)
    return Case(qwen3_5.target, path, qwen3_5.prompts, temperature=1.0, dtype="float32")


@torch.no_grad()
def truncated_statistics(
    export: str, texts: list[Rollout], steps: int, temperature: float, top_k: int
) -> Iterator[ChainStats]:
    """Chain statistics with the draft distribution cut to its likeliest tokens, from whole logits."""
    backbone = Backbone.load(export, torch.float32)
    head, _ = head_for(backbone)
    for plan in plan_micro_batches([len(text) for text in texts], 4096, backbone.packs_documents):
        batch = make_batch(plan, texts)
        places = {"tokens": batch.tokens, "documents": batch.documents, "positions": batch.positions}
        states = backbone.hidden_states(batch.tokens, batch.documents, batch.positions)
        drafts, targets, chains = draft(
            head, backbone, states, **places, supervised=batch.supervised, steps=steps, compute_dtype=torch.float32
        )
        logits = drafts @ backbone.lm_head_weight.T / temperature
        least = logits.topk(top_k).values[..., -1:]
        log_q = logits.masked_fill(logits < least, -torch.inf).log_softmax(-1)
        log_p = (targets @ backbone.lm_head_weight.T / temperature).log_softmax(-1)[chains.target_rows]
        of_token = chains.tokens.unsqueeze(-1)
        yield ChainStats(
            chains.valid,
            batch.documents.flatten(),
            alpha=torch.minimum(log_q, log_p).exp().sum(-1),
            log_q=log_q.gather(-1, of_token).squeeze(-1),
            log_p=log_p.gather(-1, of_token).squeeze(-1),
        )


@pytest.mark.parametrize(("draft_steps", "temperature"), [(1, 1.0), (3, 1.0), (3, 1.5)])
def test_counted_acceptance_is_the_predicted_one(qwen3_5, converted, draft_steps, temperature):
    """At 1.5 the cut to ten tokens matters so much that a prediction without it is far off."""
    case = replace(converted, temperature=temperature, served={})
    served = case.serve(WORKER, case.export, draft_steps)
    texts, export = case.texts(served), str(qwen3_5.export)
    cut, whole = (
        predict_engine_counts(truncated_statistics(export, texts, draft_steps, temperature, top_k))
        for top_k in (DRAFT_TOP_K, WHOLE)
    )
    compare(f"llama.cpp, qwen3_5, T={temperature}", served.runs[0], cut, draft_steps)
    print(f"predicted with the whole draft distribution: {whole.acceptance}")
    if temperature > 1:
        assert whole.acceptance[0] - served.runs[0]["accepted"][0] / served.runs[0]["drafts"] > 0.05


def test_greedy_text_is_that_of_the_target_alone(converted):
    drafted = converted.serve(WORKER, converted.export, 3).runs[1]
    alone = converted.serve(WORKER, converted.export, 0).runs[0]
    assert sum(drafted["accepted"]) > 0
    check_greedy(converted, drafted["texts"], alone["texts"])
