"""Serves a GGUF file in llama.cpp and writes what it sampled and counted; runs in the engine environment.

python llama_worker.py JOB.json RESULT.json, with JOB as in vllm_worker.py, `model` a GGUF file, and RESULT's runs.
"""

import json
import re
import sys
import urllib.request
from pathlib import Path

import xllamacpp


def post(server, path: str, body: dict) -> dict:
    request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode())
    return json.loads(urllib.request.urlopen(request).read())


def counters(server) -> tuple[int, list[int]]:
    text = urllib.request.urlopen(server.listening_address + "/metrics").read().decode()
    drafts = re.search(r"^llamacpp:spec_decode_num_drafts_total (\d+)", text, re.M)
    accepted = re.findall(r"^llamacpp:spec_decode_num_accepted_tokens_per_pos_total\{.*\} (\d+)", text, re.M)
    return int(drafts[1]), [int(count) for count in accepted]


def main(job: dict, result: Path) -> None:
    params = xllamacpp.CommonParams()
    params.model.path = job["model"]
    params.n_ctx = job["max_length"]
    params.n_parallel = 1
    params.endpoint_metrics = True
    if job["draft_steps"]:
        params.load_mtp = True
        params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_MTP]
        params.speculative.draft.n_max = job["draft_steps"]
        params.speculative.draft.p_min = 0.0
        params.speculative.draft.probabilistic = True
    server = xllamacpp.Server(params)
    results = []
    for run in job["runs"]:
        before = counters(server)
        texts = []
        for seed, prompt in enumerate(run["prompts"]):
            body = {
                "prompt": prompt, "n_predict": run["max_tokens"], "temperature": run["temperature"], "seed": seed,
                "samplers": ["temperature"], "ignore_eos": True, "return_tokens": True, "cache_prompt": False,
            }  # fmt: skip
            texts.append(post(server, "/completion", body)["tokens"])
        drafts, accepted = counters(server)
        accepted = [a - b for a, b in zip(accepted, before[1] or [0] * len(accepted), strict=True)]
        results.append({"texts": texts, "drafts": drafts - before[0], "accepted": accepted})
    result.write_text(json.dumps({"runs": results}))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
