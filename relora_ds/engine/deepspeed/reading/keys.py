"""What DeepSpeed reads from its JSON, and what this trainer accepts of it. Data only.

The kinds are `boolean`, `number`, `text` and `section`. A test compares the ZeRO keys with the
installed DeepSpeed, so that a new release cannot add a key unseen.
"""

from __future__ import annotations

from relora_ds.engine.deepspeed.version import SUPPORTED

# Top-level keys of DeepSpeed that this trainer can stand behind, and what they hold
TOP_KEYS = {
    "train_batch_size": "number",
    "train_micro_batch_size_per_gpu": "number",
    "gradient_accumulation_steps": "number",
    "gradient_clipping": "number",
    "steps_per_print": "number",
    "zero_optimization": "section",
    "zero_allow_untested_optimizer": "boolean",
    "zero_force_ds_cpu_optimizer": "boolean",
    "bf16": "section",
    "data_types": "section",
    "communication_data_type": "text",
    "prescale_gradients": "boolean",
    "gradient_predivide_factor": "number",
    "gradient_allreduce_op": "text",
    "wall_clock_breakdown": "boolean",
    "memory_breakdown": "boolean",
    "dump_state": "boolean",
    "disable_python_gc": "boolean",
    "log_level": "text",
    "comms_logger": "section",
    "flops_profiler": "section",
    "aio": "section",
    "timers": "section",
}

# fp16 overflows on gradients of small factors
TOP_CHOICES = {"communication_data_type": ("fp32", "bf16")}

# Top-level keys that DeepSpeed knows and we refuse unless they say {"enabled": false}
_OURS = "the run file owns it: set {} there and remove this block"
_FOREIGN = "{} does not work with low-rank training under this trainer: remove it"
OWNED_KEYS = frozenset(("optimizer", "scheduler"))
"""Blocks that may say what the run file says, or leave it to that."""
REFUSED_KEYS = {
    "fp16": "fp16 overflows where bf16 does not, and is not supported: use train.precision bf16",
    "amp": _OURS.format("train.precision"),
    "torch_autocast": _OURS.format("train.precision"),
    "activation_checkpointing": _OURS.format("train.activation_checkpointing"),
    "tensorboard": _OURS.format("log.tensorboard"),
    "wandb": _OURS.format("log.wandb"),
    "csv_monitor": "metrics.jsonl holds every metric: remove it",
    "comet": "metrics.jsonl holds every metric: remove it",
    "checkpoint": "checkpoints are written by this trainer, not by DeepSpeed's engines: remove it",
    "nebula": "checkpoints are written by this trainer, not by DeepSpeed's engines: remove it",
    "datastates_ckpt": "checkpoints are written by this trainer: remove it",
    "dataloader_drop_last": "data are a function of seed and step, there is no loader: remove it",
    "managed_gradient_accumulation": "accumulation boundaries are DeepSpeed's here: remove it",
    "elasticity": "the batch is fixed by train.global_batch_size: remove it",
    "tensor_parallel": _OURS.format("parallel.tensor"),
    "sparse_gradients": "embeddings have dense gradients here: remove it",
    "compile": "DeepSpeed's compiler passes are not supported: remove it",
    **{
        name: _FOREIGN.format(label)
        for name, label in {
            "autotuning": "autotuning",
            "compression_training": "compression",
            "curriculum_learning": "curriculum learning",
            "data_efficiency": "DeepSpeed's data sampling",
            "pipeline": "pipeline parallelism",
            "hybrid_engine": "the hybrid engine",
            "expert_parallel": "expert parallelism",
            "use_data_before_expert_parallelism": "expert parallelism",
            "progressive_layer_drop": "layer drop",
            "eigenvalue": "the eigenvalue estimate",
            "quantize_training": "quantised training",
            "weight_quantization": "weight quantisation",
            "sparse_attention": "sparse attention",
        }.items()
    },
}

# Every key of DeepSpeedZeroConfig, by the spelling that JSON files use
ZERO_BOOLEANS = frozenset(
    [
        "contiguous_gradients",
        "reduce_scatter",
        "use_multi_rank_bucket_allreduce",
        "allgather_partitions",
        "overlap_comm",
        "compute_grad_norm",
        "load_from_fp32_weights",
        "elastic_checkpoint",
        "cpu_offload_param",
        "cpu_offload_use_pin_memory",
        "cpu_offload",
        "stage3_gather_16bit_weights_on_model_save",
        "stage3_use_all_reduce_for_fetch_params",
        "stage3_allgather_sequential",
        "stage3_gather_fp16_weights_on_model_save",
        "ignore_unused_parameters",
        "legacy_stage1",
        "round_robin_gradients",
        "parameter_alignment",
        "zero_quantized_weights",
        "zero_quantized_nontrainable_weights",
        "zero_quantized_gradients",
        "memory_efficient_linear",
        "pipeline_loading_checkpoint",
        "override_module_apply",
        "log_trace_cache_warnings",
        "enable_sanity_checks",
        "save_muon_momentum_buffer_in_memory",
    ]
)
ZERO_NUMBERS = frozenset(
    [
        "stage",
        "reduce_bucket_size",
        "allgather_bucket_size",
        "sub_group_size",
        "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold",
        "stage3_model_persistence_threshold",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_module_granularity_threshold",
        "zero_hpz_partition_size",
    ]
)
LARGEST_NUMBER = 2**63 - 1
"""DeepSpeed's own word for "no limit"; what is larger fits into no integer of torch."""
ALLOCATED = frozenset(("reduce_bucket_size", "allgather_bucket_size"))
"""Numbers of elements that DeepSpeed allocates or sends at once."""
LARGEST_BUCKET = 10**11
"""More elements than the memory of any device holds."""
ZERO_SECTIONS = frozenset(("offload_param", "offload_optimizer", "zenflow", "leaf_module"))

ZERO_KEYS = {
    **dict.fromkeys(sorted(ZERO_BOOLEANS), "boolean"),
    **dict.fromkeys(sorted(ZERO_NUMBERS), "number"),
    **dict.fromkeys(sorted(ZERO_SECTIONS), "section"),
}

ZERO_REFUSED = {
    "zenflow": "asynchronous optimizer updates have another state layout: remove it",
    "leaf_module": "every projection is gathered by itself here: remove it",
}

# Keys of zero_optimization with the only value that is supported, and why
_ROUNDS = "quantised communication rounds the weights that merges and resumes must reproduce"
ZERO_FIXED: dict[str, tuple[bool | int, str]] = {
    "round_robin_gradients": (
        False,
        f"DeepSpeed {SUPPORTED} then maps parameters to the wrong part of the optimizer state, and "
        "a merge or reset would change other parameters",
    ),
    "load_from_fp32_weights": (True, "a resume from rounded weights is not the same run"),
    "compute_grad_norm": (True, "the gradient norm is clipped and logged"),
    "elastic_checkpoint": (False, "checkpoints are written by this trainer"),
    "pipeline_loading_checkpoint": (False, "checkpoints are written by this trainer"),
    "legacy_stage1": (False, "its state has another layout"),
    "parameter_alignment": (False, "its state has another layout"),
    "cpu_offload": (False, "it is deprecated, offload_optimizer replaces it"),
    "cpu_offload_param": (False, "it is deprecated, offload_param replaces it"),
    "cpu_offload_use_pin_memory": (False, "it is deprecated, offload_optimizer replaces it"),
    "zero_quantized_weights": (False, _ROUNDS),
    "zero_quantized_nontrainable_weights": (False, _ROUNDS),
    "zero_quantized_gradients": (False, _ROUNDS),
    "save_muon_momentum_buffer_in_memory": (False, "Muon is not among optimizer.name"),
}
ONLY_STAGES_1_AND_2 = frozenset(["round_robin_gradients"])
"""Those of them that DeepSpeed does not read at the other stages."""

# Keys of offload_optimizer and offload_param with the only value that is supported, and why
OFFLOAD_FIXED: dict[str, tuple[bool | int, str]] = {
    "ratio": (
        1,
        "DeepSpeed then updates a part of the parameters with an optimizer of its own, whose "
        "moments are in no checkpoint and which no reset reaches",
    ),
    "super_offload": (False, "its state has another layout"),
}

BF16_KEYS = {
    "enabled": "boolean",
    "immediate_grad_update": "boolean",
    "check_grad_overflow": "boolean",
    "bf16_master_weights_and_grads": "boolean",
    "bf16_optimizer_states": "boolean",
}
_LOSES = (
    "masters in bf16 lose every update below half a unit in the last place, and merges and resets "
    "work on fp32 masters and moments; for less memory take optimizer.name adamw8bit, or offload "
    "the optimizer at stage 3"
)
DATA_TYPE_KEYS = {"grad_accum_dtype": "text"}
BF16_FIXED: dict[str, tuple[bool | int, str]] = {
    name: (False, _LOSES) for name in ("bf16_master_weights_and_grads", "bf16_optimizer_states")
}
