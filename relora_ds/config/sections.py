"""The sections of a run file that every method shares: keys, what they mean, their defaults."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from relora_ds.config.base import (
    FilePath,
    Free,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)


class DataConfig(Section):
    """Where the training and validation tokens come from."""

    source: Literal["files", "builtin"] = "files"
    """What is read. `files`: token files written by `tools/prepare_data.py`. `builtin`: a small
    English corpus built on first use from the documentation that ships with Python, with its own
    tokenizer."""
    train: Free[list[tuple[PositiveFloat, FilePath]] | FilePath | None] = None
    """Token file prefix of the training set, or a blend of them: `[[weight, prefix], ...]`. Weights
    are normalised."""
    valid: Free[FilePath | None] = None
    """Token file prefix of the validation set."""
    valid_share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """In place of `valid`: share of the tokens of every training file that is held out of training
    and is the validation set. Whole documents from all over the file, the same ones in every run; a
    blend is validated in the proportions of its weights."""
    tokenizer: Free[FilePath | None] = None
    """Tokenizer that produced the token files: a SentencePiece model, a `tokenizer.json` of Hugging
    Face's, or a directory with one of them; copied into checkpoints and exports."""
    document_mask: bool = False
    """Documents in a sequence are kept apart: attention and positions end with the token that ends
    a document, and the first token of the next one is no target. `false`: attention crosses the
    ends of documents, and every token is a target."""
    verify: Free[Literal["whole", "ends"]] = "whole"
    """How token files are checked against what was recorded of them before training. `whole`: every
    byte is hashed and every id looked at, shared out over the processes of each host. `ends`: sizes
    and the first and last MiB only, for files that take too long; an altered token in between goes
    unnoticed. Files without a record are always read whole."""
    builtin_vocab_size: Annotated[int, Field(ge=512, le=32000)] = 2048
    """Vocabulary of the tokenizer trained on the builtin corpus."""
    cache_dir: Free[FilePath | None] = None
    """Where the builtin corpus is kept. Default: `$XDG_CACHE_HOME/relora_ds` or
    `~/.cache/relora_ds`."""


class TrainConfig(Section):
    """The optimisation run itself."""

    steps: PositiveInt
    """Optimizer steps of the whole run, a warm start included."""
    seq_length: PositiveInt
    """Tokens per sequence that the model reads (each sample holds one more, the last target)."""
    micro_batch_size: Free[PositiveInt]
    """Sequences per process and forward pass."""
    global_batch_size: PositiveInt
    """Sequences per optimizer step over all processes; the rest is gradient accumulation."""
    seed: NonNegativeInt = 42
    """Seed of every random draw: initialisation, restarts, data order."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Working precision. `bf16` keeps fp32 master copies of whatever is trained, unless
    `master_weights` is off."""
    master_weights: bool = True
    """Keep fp32 copies of trained bf16 weights, which the optimizer updates. `false` saves their 4
    bytes per weight: every update is rounded up or down at random, so that its expectation is the
    fp32 update. Needs `per_layer_update`."""
    base_precision: Literal["auto", "bf16_residual", "fp32", "bf16"] = "auto"
    """How a frozen base weight that a method edits is stored. `auto`: fp32 in fp32 runs, otherwise
    `bf16_residual` (bf16 plus 16 bits that restore the fp32 word exactly). `fp32`: a full-precision
    copy beside the working weight. `bf16`: lossy, edits are rounded away."""
    attention: Free[Literal["auto", "flash", "fa4", "cudnn", "sdpa", "math"]] = "auto"
    """Kernel of the attention. `auto`: the package flash-attn where it can run (CUDA, bf16) and is
    the faster one (before Hopper), otherwise `sdpa`. `sdpa`: torch's own, on Hopper and newer with
    cuDNN's before flash. `flash`: flash-attn 2. `fa4`: flash-attn-4 through torch's switch, on
    Hopper and Blackwell. `cudnn`: cuDNN's. `math`: without fusion, anywhere. A choice by name that
    cannot be met is an error. The backward pass of `cudnn` is not deterministic; `math` always is,
    the others where determinism is asked for, and `auto` and `sdpa` then leave cuDNN out."""
    formulation: Free[Literal["auto", "split", "layer", "step"]] = "auto"
    """How adapted projections compute. `split`: the products of the frozen weight and of the
    factors are added up. `layer`: the weight that they amount to is composed for each product.
    `step`: it is composed once per optimizer step and kept for all micro-batches, at the price of
    the dense weights' memory. `auto`: the fastest by operations and bytes for each shape; keeps
    weights only below ZeRO stage 3 and where all of them take less than an eighth of the device."""
    compile: Free[Literal[False, "layers"]] = False
    """`layers`: torch's compiler makes one kernel each of what a layer computes between its
    products while it trains: norms with the sum before them, rotations, the gate. Equal to `false`
    within rounding; costs up to a minute at the start, and less when it is started again."""
    pad_mlp: Free[Literal["auto", "on", "off"]] = "auto"
    """Compute MLPs at the next multiple of 8 columns, of zeros, where a process's part of
    `intermediate_size` does not fill multiples of 16 bytes: other rows keep a GPU's fast kernels
    from being used. Equal within rounding; weights and whatever is saved stay as they are. `auto`:
    on GPUs, where a micro-batch has 4,096 tokens per process or more, against which copies of
    weights are small."""
    activation_checkpointing: Free[bool] = False
    """Recompute each layer in the backward pass instead of keeping its activations."""
    per_layer_update: bool = False
    """Update each parameter within the backward pass and free its gradient at once, at ZeRO stage
    0. `optimizer.clip` then limits the norm of each parameter's gradient, not the global one. With
    gradient accumulation the updates happen in the last micro-batch and save no memory."""
    gradient_reduction: Literal["micro_batch", "step"] = "micro_batch"
    """When ZeRO stages 2 and 3 sum gradients over processes. `micro_batch`: after each one, so that
    a process keeps its part only. `step`: once per update, which moves 1/k of the bytes with k
    micro-batches and keeps whole gradients of what is trained in between, as stages 0 and 1 do
    anyway; an offloaded optimizer takes them after each one all the same."""
    init_from: Free[FilePath | None] = None
    """Start from these weights instead of a random draw: an HF LLaMA directory or a checkpoint of
    ours (a directory `step_N`, or `checkpoints` for the latest). The step count starts at zero."""
    digest_every: Free[NonNegativeInt] = 100
    """Optimizer steps between checks that all processes still hold the same run; 0 checks only
    after merges and the like. A difference ends the run with exit code 6."""
    deterministic: Free[bool] = True
    """On GPUs: kernels whose sums have a fixed order, so that a resumed run and a second one are
    the same bit for bit. `false` is faster in the backward pass of attention, and the same to the
    rounding of atomics. On CPUs runs are the same either way."""
    tf32: bool = False
    """On GPUs: let matrix products of fp32 runs round their inputs to 10 bits of mantissa. Edits of
    base weights are fp32 products too and lose as much."""
    timeout_minutes: Free[Annotated[float, Field(gt=0, le=1e6)]] = 10.0
    """A collective that takes longer ends the run with exit code 7."""


class MuonConfig(Section):
    """Muon: momentum whose singular values are made equal before it moves a projection."""

    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay rate mu of the momentum."""
    nesterov: bool = True
    """Look ahead along the momentum."""
    steps: Literal["polar_express", "keller"] = "polar_express"
    """Newton-Schulz steps. `polar_express`: eight, whose singular values end within a few per cent
    of each other. `keller`: the five of torch.optim.Muon."""
    shape_factor: Literal["original", "match_rms_adamw", "spectral"] = "original"
    """Factor on the learning rate for m outputs and n inputs. `original`: sqrt(max(1, m / n)).
    `match_rms_adamw`: 0.2 sqrt(max(m, n)), so that AdamW's learning rates can be kept.
    `spectral`: sqrt(m / n)."""


class ScaleConfig(Section):
    """SCALE: gradients normalised by column, with momentum in the head alone."""

    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay rate of the head's momentum."""


class SpectralConfig(Section):
    """Spectral updates: both factors of a projection move along one polar factor of their product's
    change (sMuon, arXiv 2608.14492)."""

    lr: PositiveFloat | None = None
    """Peak learning rate of the factors. Default: `optimizer.adapter_lr` where it is given, which
    is then that of SLTrain's values and of biases too; otherwise 2.5e-2, 1.25e-2 for `switchlora`,
    or 2e-2 if `normalized`."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay rate mu of the momentum that each factor has in place of Adam's two moments."""
    nesterov: bool = True
    """Look ahead along the momentum."""
    normalized: bool = False
    """Divide steps by scale (|A|^2 + |B|^2) / 2 with spectral norms: the weight moves by at most
    the learning rate times sqrt(max(1, m / n)) for m outputs and n inputs, as under Muon."""

    def default_lr(self, plain: float) -> float:
        """The factors' learning rate where none is given.

        Args:
            plain: the method's own, of steps that are not normalized.
        """
        return 2.0e-2 if self.normalized else plain


class OptimizerConfig(Section):
    """AdamW and its learning rates, or an optimizer of whole matrices beside it."""

    name: Literal["adamw", "adamw8bit", "torch_adamw", "fused_adam", "cpu_adam"] = "adamw"
    """Implementation. `adamw`: ours, with exact bias correction per adapter vector. `adamw8bit`:
    ours with moments in eight bits and a scale per 256 elements, 2 bytes per weight for 8.
    `torch_adamw`: torch.optim.AdamW. `fused_adam`, `cpu_adam`: DeepSpeed's kernels (compiled on
    first use)."""
    lr: PositiveFloat = 1.0e-3
    """Peak learning rate of embeddings, head, norms and whatever else is not in a projection."""
    matrix: Literal["muon", "scale"] | None = None
    """Updates weight matrices that are trained whole in AdamW's place. `muon`: the projections of a
    full-rank run or warm start. `scale`: these, and the embedding and head of any method."""
    muon: MuonConfig = MuonConfig()
    """Settings of `matrix: muon`."""
    scale: ScaleConfig = ScaleConfig()
    """Settings of `matrix: scale`."""
    adapter: Literal["spectral"] | None = None
    """Updates the factors lora_A and lora_B in AdamW's place. `spectral`: both together."""
    spectral: SpectralConfig = SpectralConfig()
    """Settings of `adapter: spectral`."""
    adapter_lr: PositiveFloat | None = None
    """Peak learning rate of the adapters (of the dense projections in full-rank runs), and of the
    projections' biases where the model has them. Default: `lr`."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.999,
    )
    """Decay rates of Adam's moments."""
    eps: PositiveFloat = 1.0e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay of trained matrices; vectors such as norms never decay."""
    clip: NonNegativeFloat = 1.0
    """Largest global gradient norm over everything trained; 0 turns clipping off."""

    @property
    def is_ours(self) -> bool:
        """Whether it is one of this program's own, which count steps per adapter vector and can
        update one parameter at a time."""
        return self.name in ("adamw", "adamw8bit")

    def resolved_pair_lr(self, plain: float) -> float:
        """The learning rate of pairs that are updated as one, with its default filled in.

        Args:
            plain: the method's default.
        """
        given = self.adapter_lr if self.spectral.lr is None else self.spectral.lr
        return self.spectral.default_lr(plain) if given is None else given

    @property
    def resolved_adapter_lr(self) -> float:
        """The adapters' learning rate with its default filled in."""
        return self.lr if self.adapter_lr is None else self.adapter_lr


class ScheduleConfig(Section):
    """Learning rate over the run; a method multiplies its own factor in."""

    name: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Course of the learning rate after the warm-up. `cosine`, `linear`: it falls until the last
    step. `constant`: it stays. `wsd` (warm-up, stable, decay): it stays until the last
    `decay_steps`, so that a run can go on from its stable phase as if it had been longer."""
    warmup_steps: NonNegativeInt = 0
    """Linear warm-up from zero; the first update then has a learning rate of zero."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of the peak learning rate that is left at the end of a decay."""
    decay_steps: PositiveInt | None = None
    """Length of the decay of `wsd`. Default: a tenth of the steps."""
    decay_shape: Literal["cosine", "linear", "sqrt"] = "linear"
    """How the rate of `wsd` falls. `sqrt`: by the square root of the share of the decay that is
    over, steeply first."""

    def decay_length(self, steps: int) -> int:
        """Steps of the decay at the end of `wsd`, of `steps` in all."""
        return max(1, steps // 10) if self.decay_steps is None else self.decay_steps

    def stable_steps(self, steps: int) -> int | None:
        """Updates, of `steps`, before the decay of `wsd`; None with another course."""
        return steps - self.decay_length(steps) if self.name == "wsd" else None


class ParallelConfig(Section):
    """How the model is cut over processes, and how often it is there apart."""

    islands: PositiveInt = 1
    """Equal parts of the job, each with copies of the model of its own, that exchange little: see
    the section `islands`. Neighbouring processes are of one island."""

    tensor: PositiveInt = 1
    """Tensor-parallel size: neighbouring processes that share one copy of the model. It divides
    the numbers of attention heads and of key/value heads; everything else is cut as evenly as it
    goes, without padding."""
    low_rank_plan: Literal["auto", "act", "fold"] = "auto"
    """What becomes of the factor that the cut of its weight leaves alone. `act`: it is cut along
    the rank, its states too, and processes exchange r activations per token in every pass. `fold`:
    it is whole on every process and its gradient is summed once per optimizer step, which moves
    fewer bytes and takes more memory and time; for slow links. `auto`: `act` where the size divides
    the rank."""
    sequence: bool = False
    """Cut activations between blocks along the sequence: each process of the tensor-parallel group
    normalises and keeps its part of them. Moves the same bytes and takes less memory."""

    @property
    def sequence_parts(self) -> int:
        """Equal parts that every sequence is cut into which the model reads."""
        return self.tensor if self.sequence else 1


class EvalConfig(Section):
    """Validation during training."""

    protocol: Literal["exact", "galore_compat"] = "exact"
    """What is averaged. `exact`: the loss of every token, over windows of `train.seq_length` that
    follow each other. `galore_compat`: as the published tables of GaLore, SLTrain and those after
    them: a row of `train.seq_length` tokens is the beginning of one document, means of
    micro-batches are added up and divided by one more than there are, and ranks are averaged; up to
    10 million tokens. Its figure depends on micro-batch and processes, and is 1 to 3 % low."""
    every: NonNegativeInt = 500
    """Optimizer steps between evaluations; 0 evaluates only at the end."""
    batches: PositiveInt | None = 50
    """Global batches of `train.global_batch_size` sequences per evaluation; null takes the whole
    set, or all of the protocol."""


class CheckpointConfig(Section):
    """Saving and resuming."""

    every: NonNegativeInt = 500
    """Optimizer steps between checkpoints; 0 saves only at the end."""
    keep: Annotated[int, Field(ge=2)] | None = 3
    """Checkpoints kept, newest first; null keeps all. At least 2: one is always complete."""
    resume: Literal["auto"] | bool | FilePath = "auto"
    """What a run continues. `auto`: the latest checkpoint if there is one. `true`: the latest
    checkpoint, which must exist. `false`: nothing; an earlier run in `output_dir` is moved to
    `previous_N`. A path: that `step_N`."""
    fallback: bool = False
    """Where the latest checkpoint is damaged, or `latest` is lost, go on from the newest whole one
    instead of ending with exit code 4. Updates since then are trained again."""
    asynchronous: bool = False
    """Write checkpoints in the background from a copy of the state in host memory, while training
    goes on; one at a time. The last one of a run is always waited for."""
    on_save_error: Literal["fail", "warn"] = "fail"
    """What happens when a checkpoint cannot be saved, as on a full disk. `fail`: the run ends with
    exit code 4. `warn`: it warns, counts `checkpoint/failed` and tries again when the next one is
    due. The last checkpoint of a run always fails."""
    allow_change: tuple[str, ...] = ()
    """Keys whose value may differ from the resumed checkpoint's, such as `train.steps`."""


class LossSpikeConfig(Section):
    """What happens at a loss or a gradient norm far above the last ones."""

    action: Literal["off", "warn", "stop", "skip", "rollback"] = "off"
    """`off`: nothing, and nothing is measured. `warn`: a line in the log. `stop`, `skip`,
    `rollback`: as for `guards.non_finite`. All but `off` wait for the device in every step."""
    sigma: PositiveFloat = 6.0
    """Standard deviations above the mean of the window that make a spike."""
    window: Annotated[int, Field(ge=8)] = 128
    """Updates that loss and gradient norm are compared with; half of them must be there first."""


class GuardsConfig(Section):
    """What happens at a step that training should not take up."""

    non_finite: Literal["stop", "skip", "rollback"] = "stop"
    """What a loss or gradient that is not finite leads to. `stop`: the run ends with exit code 5 at
    the next line of the log, before anything is saved. `skip`: the update is not applied on any
    process, and the run goes on with the next batch. `rollback`: the run goes back to its newest
    good checkpoint and leaves the batch out. `skip` and `rollback` decide before the update, for
    which every step waits for the device and exchanges 24 bytes per process."""
    loss_spike: LossSpikeConfig = LossSpikeConfig()
    """A loss or gradient norm that is finite, but far above the last ones."""
    max_events: PositiveInt = 10
    """Batches that a run may skip and rollbacks that it may take, together; one more ends it with
    exit code 5."""

    @property
    def decides_before_update(self) -> bool:
        """Whether loss and gradients of every step are looked at before they are used."""
        return self.non_finite != "stop" or self.loss_spike.action != "off"


class WandbConfig(Section):
    """Weights & Biases."""

    mode: Literal["online", "offline", "disabled"] = "disabled"
    """Where metrics go. `disabled` never imports wandb. A server that cannot be reached never stops
    training."""
    project: str = "relora_ds"
    """Name of the wandb project."""
    name: str | None = None
    """Name of the wandb run. Default: the last part of `output_dir`."""


class LogConfig(Section):
    """What is reported, and how often."""

    every: PositiveInt = 10
    """Optimizer steps between metric lines."""
    wandb: WandbConfig = WandbConfig()
    """Weights & Biases."""
    tensorboard: bool = False
    """Also write TensorBoard events to `output_dir/tensorboard`."""
    trackio: str | None = None
    """Project under which Trackio records the run too; null: none."""
    mlflow: str | None = None
    """Experiment under which MLflow records the run too, on the server of `MLFLOW_TRACKING_URI`;
    null: none."""
    profile: tuple[PositiveInt, PositiveInt] | None = None
    """First and last optimizer step, such as [11, 13], of which every process writes a trace to
    `output_dir/traces`: what the host and the device do, for Perfetto or chrome://tracing. Traced
    steps are slower."""
