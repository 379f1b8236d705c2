"""An exported native head in the real llama.cpp: it is drafted with, and accepted as often as predicted."""

from collections.abc import Iterator

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


@pytest.fixture(scope="module")
def converted(qwen3_5, tmp_path_factory) -> Case:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    engine_python("gguf_model.py", qwen3_5.export, path)
    return Case(qwen3_5.target, path, qwen3_5.prompts, qwen3_5.temperature, dtype="float32")


@torch.no_grad()
def truncated_statistics(export: str, texts: list[Rollout], steps: int) -> Iterator[ChainStats]:
    """Chain statistics at temperature 1 with the draft distribution cut to its likeliest tokens, from whole logits."""
    backbone = Backbone.load(export, torch.float32)
    head, _ = head_for(backbone)
    for plan in plan_micro_batches([len(text) for text in texts], 4096, backbone.packs_documents):
        batch = make_batch(plan, texts)
        places = {"tokens": batch.tokens, "documents": batch.documents, "positions": batch.positions}
        states = backbone.hidden_states(batch.tokens, batch.documents, batch.positions)
        drafts, targets, chains = draft(
            head, backbone, states, **places, supervised=batch.supervised, steps=steps, compute_dtype=torch.float32
        )
        logits = drafts @ backbone.lm_head_weight.T
        least = logits.topk(DRAFT_TOP_K).values[..., -1:]
        log_q = logits.masked_fill(logits < least, -torch.inf).log_softmax(-1)
        log_p = (targets @ backbone.lm_head_weight.T).log_softmax(-1)[chains.target_rows]
        of_token = chains.tokens.unsqueeze(-1)
        yield ChainStats(
            chains.valid,
            batch.documents.flatten(),
            alpha=torch.minimum(log_q, log_p).exp().sum(-1),
            log_q=log_q.gather(-1, of_token).squeeze(-1),
            log_p=log_p.gather(-1, of_token).squeeze(-1),
        )


@pytest.mark.parametrize("draft_steps", [1, 3])
def test_counted_acceptance_is_the_predicted_one(qwen3_5, converted, draft_steps):
    served = converted.serve(WORKER, converted.export, draft_steps)
    statistics = truncated_statistics(str(qwen3_5.export), converted.texts(served), draft_steps)
    compare("llama.cpp, qwen3_5", served.runs[0], predict_engine_counts(statistics), draft_steps)


def test_greedy_text_is_that_of_the_target_alone(converted):
    drafted = converted.serve(WORKER, converted.export, 3).runs[1]
    alone = converted.serve(WORKER, converted.export, 0).runs[0]
    assert sum(drafted["accepted"]) > 0
    check_greedy(converted, drafted["texts"], alone["texts"])
