"""Serves a directory in vLLM and writes what it sampled and counted; runs in the engine environment.

python vllm_worker.py JOB.json RESULT.json, with JOB = {model, draft_steps (0: no speculation), dtype, max_length,
runs: [{prompts: [[ids]], temperature, max_tokens, seed}]} and RESULT = [{texts: [[ids]], drafts, accepted: [per position]}].
"""

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams


def counters(llm) -> tuple[int, list[int]]:
    drafts, accepted = 0, []
    for metric in llm.get_metrics():
        if metric.name == "vllm:spec_decode_num_drafts":
            drafts = metric.value
        elif metric.name == "vllm:spec_decode_num_accepted_tokens_per_pos":
            accepted = list(metric.values)
    return drafts, accepted


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
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
    Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
