#!/usr/bin/env bash
# Everything that docs/experiments.md reports, into runs/experiments; run it from the repository's root, inside .venv.
# What an earlier run finished is kept, so that it can be stopped and started again. Two CPU cores take two to three hours.
set -euo pipefail
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
out="runs/experiments"
mkdir -p "$out"

unless() {  # unless RESULT COMMAND...: run the command if its result is not there
    local result="$1"; shift
    [ -e "$result" ] || { echo "== $*"; "$@"; }
}

sample() {  # sample NAME TEMPERATURE COUNT SEED
    unless "$out/$1.jsonl" python recipes/generate_rollouts.py --model "demo/backbone" --output "$out/$1.jsonl" \
        --temperature "$2" --count "$3" --seed "$4" --max-response-tokens 192 --batch-size 160
}

common=(--backbone "demo/backbone" --rollouts "$out/train.jsonl" --temperature 0.7 --draft_steps 3 --warmup_share 0.05
    --decay cosine --tokens_per_micro_batch 2048 --held_out_share 0.03 --cache_states true)
held_out=("$out"/sampled-at-{0.4,0.7,1.0}.jsonl)
compare() {  # compare NAME OPTION...
    local name="$1"; shift
    echo "== $name"
    python recipes/compare_losses.py "${common[@]}" --output "$out/$name" --held-out "${held_out[@]}" --save_every 1000 "$@"
}

unless "demo/backbone" python recipes/fetch_demo_backbone.py --output "demo/backbone"
sample train 0.7 640 0
for temperature in 0.4 0.7 1.0; do sample "sampled-at-$temperature" "$temperature" 48 7; done

# 1. The paper's setting: a head that was trained before goes on with each objective.
resume=""
if compgen -G "$out/warm/checkpoints/step-??????" > /dev/null; then resume="auto"; fi
unless "$out/warm/report.json" python recipes/train_mtp.py "${common[@]}" --output "$out/warm" --resume "$resume" \
    --loss lk_hybrid --max_steps 200 --learning_rate 2e-3
compare from-trained --head "$out/warm/head" --max_steps 50 --learning_rate 5e-4 --seeds 3

# 2. Predicted against counted, with the head that section 1 started from.
unless "$out/decoded/report.html" python recipes/evaluate_mtp.py --head "$out/warm/head" --output "$out/decoded" --steps 5 \
    --rollouts "$out"/sampled-at-{0.7,1.0}.jsonl --decode 48
