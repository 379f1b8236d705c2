"""Exported heads in the real vLLM: they load, draft what we draft, and are accepted as often as predicted.

Marked `engine`: `make test-engines` builds the environment that vLLM's CPU build needs and runs these tests.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from bebop.backbone import INDEX_FILE, Backbone
from bebop.export.check import check_export
from bebop.heads.loading import head_for
from tests.engines.cases import Case, check_counts, check_greedy, serve

pytestmark = pytest.mark.engine
WORKER = "vllm_worker.py"
SERVED = [("qwen3_5", 1), ("qwen3_5", 3), ("qwen3_5_moe", 3), ("qwen3_next", 3), ("mimo", 1), ("mimo", 3)]
EACH = pytest.mark.parametrize(("case", "draft_steps"), SERVED, indirect=["case"])


@EACH
def test_every_weight_of_the_head_is_loaded(case, draft_steps):
    """vLLM then puts the target's embedding and lm_head in place of the head's."""
    head = drafter(case.serve(WORKER, case.export, draft_steps).not_loaded)
    assert not [name for name in head if not name.endswith(("embed_tokens.weight", "lm_head.weight"))]


def drafter(not_loaded: dict[str, list[str]]) -> list[str]:
    """Of the two models, the one that drafts."""
    (found,) = [names for model, names in not_loaded.items() if "MTP" in model]
    return found


def test_a_missing_weight_is_for_our_check_to_find(qwen3_5, tmp_path):
    """vLLM serves a head without its projection, which stays at its random start; the check names the tensor."""
    shutil.copytree(qwen3_5.export, tmp_path / "export")
    last = max((tmp_path / "export").glob("*.safetensors"))
    tensors = load_file(last)
    del tensors["mtp.fc.weight"]
    save_file(tensors, last, metadata={"format": "pt"})
    index = tmp_path / "export" / INDEX_FILE
    content = json.loads(index.read_text())
    del content["weight_map"]["mtp.fc.weight"]
    index.write_text(json.dumps(content))
    run = {"prompts": [[1, 2]], "temperature": 0.0, "max_tokens": 2}
    served = serve(WORKER, tmp_path / "export", 1, "bfloat16", [run], tmp_path)
    assert "model.fc.weight" in drafter(served.not_loaded)
    assert any("mtp.fc.weight is missing" in problem for problem in check_export(tmp_path / "export").problems)


@EACH
def test_counted_acceptance_is_the_predicted_one(case, draft_steps):
    check_counts(case, case.serve(WORKER, case.export, draft_steps), draft_steps)


@EACH
def test_greedy_text_is_that_of_the_target_alone(case, draft_steps):
    drafted = case.serve(WORKER, case.export, draft_steps).runs[1]
    alone = case.serve(WORKER, case.target, 0).runs[0]
    assert sum(drafted["accepted"]) > 0
    check_greedy(case, drafted["texts"], alone["texts"])


@pytest.mark.parametrize("case", ["qwen3_5", "qwen3_5_moe", "qwen3_next", "mimo"], indirect=True)
@torch.no_grad()
def test_logits_of_the_first_draft_are_ours_and_those_of_transformers(case: Case):
    """Three implementations from one directory: engine, bebop and, for native heads, transformers' MtpModel."""
    served = case.serve(WORKER, case.export, 3)
    assert served.first_logits is not None
    backbone = Backbone.load(str(case.export), torch.float32)
    head, _ = head_for(backbone)
    if backbone.family.name != "mimo":
        mtp = MtpModel.from_pretrained(AutoModelForCausalLM.from_pretrained(case.export, dtype=torch.float32))
    ours = []
    for prompt, text in zip(case.greedy_prompts, served.runs[1]["texts"], strict=True):
        # The pair (state of the prompt's last token, first token the target chose) drafts the second.
        tokens = torch.tensor([prompt + text[:1]])
        positions, documents = torch.arange(tokens.shape[1])[None], torch.zeros_like(tokens)
        hidden = backbone.hidden_states(tokens, documents, positions)
        state = head(hidden, backbone.embed(tokens), documents, positions, 1)[0]
        ours.append(state[0, len(prompt) - 1] @ backbone.lm_head_weight.T)
        if backbone.family.name != "mimo":
            theirs = mtp.forward_layer(0, hidden[:, :-1], positions[:, 1:], MtpCache(), input_ids=tokens[:, 1:])
            torch.testing.assert_close(theirs[0, -1] @ backbone.lm_head_weight.T, ours[-1], atol=1e-4, rtol=1e-4)
    expected = torch.stack(ours)
    error = (served.first_logits - expected).norm(dim=1) / expected.norm(dim=1)
    print(f"first draft's logits, vLLM in {case.dtype} against ours in fp32: off by {error.median():.1e} of their norm")
    assert error.median() < {"bfloat16": 5e-3, "float32": 5e-6}[case.dtype]
    assert error.max() < 10 * error.median()
