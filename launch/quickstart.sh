#!/usr/bin/env bash
# From a bare machine to a trained model: environment, ReLoRA on the builtin corpus, export, check.
#   bash launch/quickstart.sh [key=value ...]
# Two CPU processes, or 1, 2, 4 or 8 GPUs; PROCESSES=N asks for N of either. Results are in
# runs/quickstart, or in output_dir=DIR.
set -euo pipefail
# shellcheck source=launch/environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

output_dir=runs/quickstart
for argument in "$@"; do
  case "$argument" in output_dir=*) output_dir="${argument#output_dir=}" ;; esac
done

# The same eight sequences per step on any number of processes: as many of them as divide eight.
processes="${PROCESSES:-0}"
if [ "$processes" -eq 0 ]; then
  for processes in 8 4 2 1; do if [ "$processes" -le "$gpus" ]; then break; fi; done
  if [ "$gpus" -eq 0 ]; then processes=2; fi
fi
micro=$((8 / processes))
micro=$((micro > 4 ? 4 : micro < 1 ? 1 : micro))

slots "$processes"
deepspeed -q "${launcher_slots[@]}" --master_port "${MASTER_PORT:-29511}" \
  launch/pretrain.py configs/run/quickstart.yaml "train.micro_batch_size=$micro" "$@"

echo
echo "perplexity of the checkpoint and of its export on the validation set:"
python tools/evaluate.py --checkpoint "$output_dir"/checkpoints --data builtin --seq-length 128
python tools/evaluate.py --checkpoint "$output_dir"/hf --data builtin --seq-length 128
echo "loss curve: $output_dir/plots/loss.png"
