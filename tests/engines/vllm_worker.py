"""Serves a directory in vLLM and writes what it sampled and counted; runs in the engine environment.

python vllm_worker.py JOB.json RESULT.json, with JOB = {model, draft_steps (0: no speculation), dtype, max_length,
runs: [{prompts: [[ids]], temperature, max_tokens}]} and RESULT = {runs: [{texts: [[ids]], drafts, accepted: [per
position]}], not_loaded: {class of a model: [its parameters that no tensor of the checkpoint went into]}}.
The logits of the first draft of every prompt of a greedy run go to RESULT.pt, [prompts, V].
"""

import json
import sys
from pathlib import Path

import torch
from vllm import LLM, SamplingParams
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer


class FirstDrafts:
    """The draft model's logits at the first greedy draft step that covers all prompts at once."""

    def __init__(self):
        self.prompts, self.logits = 0, None
        greedy_sample = SpecDecodeBaseProposer._greedy_sample

        def recording(proposer, hidden_states):
            if self.logits is None and len(hidden_states) == self.prompts:
                self.logits = proposer.model.compute_logits(hidden_states).float().clone()
            return greedy_sample(proposer, hidden_states)

        SpecDecodeBaseProposer._greedy_sample = recording


def watch_loading() -> dict[str, list[str]]:
    """Parameters that stay as they were initialised, by model class; vLLM's own check exempts all Linear weights."""
    not_loaded: dict[str, list[str]] = {}
    track = DefaultModelLoader.track_weights_loading

    def recording(loader, model, loaded_weights, **options):
        names = {name for name, _ in model.named_parameters()}
        not_loaded[type(model).__name__] = sorted(names - loaded_weights)
        return track(loader, model, loaded_weights, **options)

    DefaultModelLoader.track_weights_loading = recording
    return not_loaded


def counters(llm) -> tuple[int, list[int]]:
    drafts, accepted = 0, []
    for metric in llm.get_metrics():
        if metric.name == "vllm:spec_decode_num_drafts":
            drafts = metric.value
        elif metric.name == "vllm:spec_decode_num_accepted_tokens_per_pos":
            accepted = list(metric.values)
    return drafts, accepted


def main(job: dict, result: Path) -> None:
    first, not_loaded = FirstDrafts(), watch_loading()
    speculative = {
        "method": "mtp", "num_speculative_tokens": job["draft_steps"], "draft_sample_method": "probabilistic"
    }  # fmt: skip
    llm = LLM(
        job["model"],
        dtype=job["dtype"],
        enforce_eager=True,
        enable_prefix_caching=False,
        disable_log_stats=False,
        max_model_len=job["max_length"],
        max_num_seqs=128,
        speculative_config=speculative if job["draft_steps"] else None,
        skip_tokenizer_init=True,
        seed=0,
    )
    results = []
    for run in job["runs"]:
        before = counters(llm)
        first.prompts = len(run["prompts"]) if run["temperature"] == 0 else 0
        sampling = SamplingParams(
            temperature=run["temperature"], max_tokens=run["max_tokens"], ignore_eos=True, detokenize=False, seed=None
        )
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in run["prompts"]], sampling, use_tqdm=False)
        drafts, accepted = counters(llm)
        results.append(
            {
                "texts": [list(output.outputs[0].token_ids) for output in outputs],
                "drafts": drafts - before[0],
                "accepted": [a - b for a, b in zip(accepted, before[1] or [0] * len(accepted), strict=True)],
            }
        )
    if first.logits is not None:
        torch.save(first.logits, result.with_suffix(".pt"))
    result.write_text(json.dumps({"runs": results, "not_loaded": not_loaded}))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
