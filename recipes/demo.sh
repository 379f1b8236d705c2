#!/usr/bin/env bash
# The README's steps one after another; what an earlier run finished is kept and used again.
set -euo pipefail
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

step() {  # step RESULT COMMAND...: run the command unless its result is there
    local result="$1"; shift
    if [ -e "$result" ]; then
        echo "== $result is there; used again (remove it to make it anew)"
    else
        echo "== $*"
        "$@"
    fi
}

resume=""
if compgen -G "demo/run/checkpoints/step-??????" > /dev/null; then resume="--resume auto"; fi

step "demo/backbone" python recipes/fetch_demo_backbone.py --output "demo/backbone"
step "demo/rollouts.jsonl" python recipes/generate_rollouts.py --model "demo/backbone" --output "demo/rollouts.jsonl" \
    --count 600 --temperature 0.6 --max-response-tokens 192 --batch-size 160
# shellcheck disable=SC2086  # resume is empty or two words
step "demo/run/report.json" accelerate launch --quiet recipes/train_mtp.py --config recipes/configs/demo.yaml $resume
step "demo/export" python recipes/export_mtp.py --head "demo/run/head" --target "demo/backbone" --output "demo/export"
