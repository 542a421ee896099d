"""The moments of a run at which it is killed, in one table."""

from __future__ import annotations

from tests.harness.faults import Call, Doing, File, Moment

_BACKEND = "relora_ds.engine.deepspeed.backend:DeepSpeedBackend"

STARTED = Moment("process group joined", Call("relora_ds.engine.distributed:start", "after"))
MID_ACCUMULATION = Moment("mid-accumulation", Doing("micro-batch"), nth=2)
AFTER_FORWARD = Moment("after a forward pass", Call(f"{_BACKEND}.__call__", "after"))
AFTER_BACKWARD = Moment("after backward", Call(f"{_BACKEND}.backward", "after"), nth=2)
IN_OPTIMIZER = Moment(
    "inside the optimizer", Call("relora_ds.optim.vector_adamw:VectorAdamW.update", "after")
)
AFTER_UPDATE = Moment(
    "after the update", Call("relora_ds.engine.engine:TrainEngine.train_step", "after")
)
AFTER_LINE = Moment(
    "after a line of metrics",
    Call("relora_ds.train.telemetry.telemetry:Telemetry.log", "after"),
)
BEFORE_EVALUATION = Moment("before an evaluation", Doing("evaluate"))
AFTER_EVALUATION = Moment("after an evaluation", Doing("evaluate", "after"))

SAVE_BEGINS = Moment("save begins", Doing("save"))
IN_COPY = Moment(
    "a state half copied", Call("relora_ds.checkpoint.saving.snapshot:HostBuffers.take"), nth=10
)
IN_SHARD = Moment("a shard half written", Call("relora_ds.files.durable:OutputFile.write"), nth=20)
BETWEEN_SHARDS = Moment("between shards", File("open", r"_states\.pt$"), nth=2)
BEFORE_SIDE_FILES = Moment("before side files", File("open", r"/side[^/]*\.safetensors$"))
BEFORE_MANIFEST = Moment("before the manifest", File("open", r"manifest\.json"))
BEFORE_RENAME = Moment("before the checkpoint's rename", File("os.rename", r"/step_\d+$"))
BEFORE_LATEST = Moment("before latest", File("os.rename", r"/latest$"))
BEFORE_PRUNING = Moment("after latest, before pruning", File("os.rename", r"/step_\d+\.stale$"))
IN_PRUNING = Moment("pruning half done", File("os.remove", r"optim_states\.pt$"))
AFTER_SAVE = Moment("after a save", Doing("save", "after"))

BEFORE_RESTORE = Moment(
    "before the state is loaded", Call("relora_ds.checkpoint.resume:restore_phase")
)
AFTER_RESTORE = Moment(
    "after the state was loaded", Call("relora_ds.checkpoint.resume:restore_phase", "after")
)

EXPORT_BEGINS = Moment("export begins", Call("relora_ds.model.hf.directory:write_hf"))
IN_EXPORT = Moment("export half written", File("open", r"/tokenizer\.json$"))
EXPORT_UNNAMED = Moment("export complete but not in place", File("os.rename", r"/hf$"))
BEFORE_SUMMARY = Moment("before summary.json", File("os.rename", r"/summary\.json$"))
BEFORE_PLOT = Moment("before the plot", Call("relora_ds.train.telemetry.plot:plot_run"))

MERGE_BEGINS = Moment("merge begins", Doing("merge"))
IN_MERGE = Moment(
    "half of the layers merged",
    Call("relora_ds.engine.zero.weights:ZeroWeights.add_product"),
    nth=8,
)
BEFORE_RESET = Moment(
    "merged, moments not reset", Call("relora_ds.methods.relora.pruning:reset_moments")
)
AFTER_MERGE = Moment("after a merge", Doing("merge", "after"))
BEFORE_TRANSITION = Moment("before the transition", Doing("transition"))
AFTER_TRANSITION = Moment("after the transition", Doing("transition", "after"))
NEW_ENGINE = Moment("the next phase's engine built", Doing("build", "after"), nth=2)

SWITCH_BEGINS = Moment("switch begins", Doing("switch"))
IN_SWITCH = Moment(
    "half of the vectors switched",
    Call("relora_ds.engine.zero.vectors:ZeroVectors.reset"),
)
AFTER_SWITCH = Moment("after a switch", Doing("switch", "after"))

MAIN_ONLY = frozenset(
    (
        AFTER_LINE,
        BETWEEN_SHARDS,
        BEFORE_SIDE_FILES,
        BEFORE_MANIFEST,
        BEFORE_RENAME,
        BEFORE_LATEST,
        BEFORE_PRUNING,
        IN_PRUNING,
        EXPORT_BEGINS,
        IN_EXPORT,
        EXPORT_UNNAMED,
        BEFORE_SUMMARY,
        BEFORE_PLOT,
    )
)
"""What rank 0 alone goes through."""

RESUMED_ONLY = frozenset((BEFORE_RESTORE, AFTER_RESTORE))
"""What a run that starts at its beginning does not go through."""
