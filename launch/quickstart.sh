#!/usr/bin/env bash
# From a bare machine to a trained model: environment, ReLoRA on the builtin corpus, export, check.
#   bash launch/quickstart.sh [key=value ...]
# Two CPU processes, or every GPU. Results are in runs/quickstart, or in output_dir=DIR.
set -euo pipefail
# shellcheck source=launch/environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

output_dir=runs/quickstart
for argument in "$@"; do
  case "$argument" in output_dir=*) output_dir="${argument#output_dir=}" ;; esac
done

if [ "${DS_ACCELERATOR:-}" = cpu ]; then processes=2; else processes="$(nvidia-smi -L | wc -l)"; fi

deepspeed -q --num_gpus "$processes" --master_port "${MASTER_PORT:-29511}" \
  launch/pretrain.py configs/run/quickstart.yaml "$@"

echo
echo "perplexity of the checkpoint and of its export on the validation set:"
python tools/evaluate.py --checkpoint "$output_dir"/checkpoints --data builtin --seq-length 128
python tools/evaluate.py --checkpoint "$output_dir"/hf --data builtin --seq-length 128
echo "loss curve: $output_dir/plots/loss.png"
