#!/usr/bin/env bash
# SwitchLoRA with switching off, on and four times as frequent, against full-rank and LoRA with a
# warm start, ReLoRA and SLTrain: equal tokens on the builtin corpus, two seeds, at r = h/4 and h/2. About
# three minutes per run on two CPU cores; runs that are complete are not repeated.
#   bash launch/compare_switchlora.sh [SEED...] [key=value...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/environment.sh

seeds=() extra=()
for argument in "$@"; do
  case "$argument" in *=*) extra+=("$argument") ;; *) seeds+=("$argument") ;; esac
done
[ "${#seeds[@]}" -gt 0 ] || seeds=(1 2)

train() { # NAME SEED OVERRIDE...
  local directory="runs/compare_switchlora/$1_seed$2"
  if ! grep -q '"status": "completed"' "$directory/summary.json" 2>/dev/null; then
    python launch/pretrain.py configs/run/quickstart.yaml "output_dir=$directory" \
      "train.seed=$2" train.global_batch_size=8 train.micro_batch_size=8 "${@:3}" "${extra[@]}"
  fi
}

for seed in "${seeds[@]}"; do
  # every rate is the best of three or more, a factor of two apart, tried at r = 32 with one seed
  train "full" "$seed" 'method={name: full}' optimizer.adapter_lr=1.5e-3
  train sltrain_r32 "$seed" optimizer.adapter_lr=3.0e-3 \
    'method={name: sltrain, rank: 32, scale: 1.0, sparsity: 0.03}'
  train relora_r32 "$seed"
  for rank in 32 64; do
    train "lora_warm_r$rank" "$seed" optimizer.adapter_lr=5.0e-3 \
      "method={name: lora, rank: $rank, alpha: 32, warm_start_steps: 240, warm_start_lr: 1.5e-3}"
    # the same initialisation and scale, and no switches
    train "switch_off_r$rank" "$seed" optimizer.adapter_lr=1.0e-2 \
      "method={name: lora, rank: $rank, init: balanced}"
    train "switch_on_r$rank" "$seed" optimizer.adapter_lr=1.0e-2 \
      "method={name: switchlora, rank: $rank}"
    train "switch_4x_r$rank" "$seed" optimizer.adapter_lr=1.0e-2 \
      "method={name: switchlora, rank: $rank, interval: 10}"
  done
done

grep -H '"eval/perplexity"' runs/compare_switchlora/*/summary.json
