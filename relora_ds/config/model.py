"""Architecture of a LLaMA model, in the keys of the Hugging Face `LlamaConfig`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from relora_ds.config.base import NonNegativeFloat, PositiveFloat, PositiveInt, Section

TokenId = Annotated[int, Field(ge=0)]
Width = Annotated[int, Field(gt=0, le=2**22)]
"""A dimension of a weight. The largest vocabularies and models stay well below."""


def _as_tuple(value: object) -> object:
    """A list, which is what JSON has, in the form that strict validation takes."""
    return tuple(value) if isinstance(value, list) else value


_Factor = Annotated[float, Field(ge=1, allow_inf_nan=False)]


class LinearRope(Section):
    """Positions divided by a factor."""

    rope_type: Literal["linear"]
    """Names the kind."""
    factor: _Factor
    """Divides every frequency."""


class Llama3Rope(Section):
    """Llama 3.1's: long wavelengths divided by a factor, short ones kept, a ramp in between."""

    rope_type: Literal["llama3"]
    """Names the kind."""
    factor: _Factor
    """Divides the frequencies of long wavelengths."""
    low_freq_factor: PositiveFloat
    """Wavelengths above the original length over this are long."""
    high_freq_factor: PositiveFloat
    """Wavelengths below the original length over this are short."""
    original_max_position_embeddings: PositiveInt
    """Positions before the extension."""


class YarnRope(Section):
    """YaRN (Peng et al., arXiv 2309.00071): interpolation by wavelength, and warmer attention."""

    rope_type: Literal["yarn"]
    """Names the kind."""
    factor: _Factor
    """Divides the frequencies of long wavelengths."""
    original_max_position_embeddings: PositiveInt
    """Positions before the extension."""
    attention_factor: PositiveFloat | None = None
    """Multiplies queries and keys; None for the paper's function of `factor`."""
    beta_fast: PositiveFloat = 32.0
    """Turns over the original length above which a frequency is kept."""
    beta_slow: PositiveFloat = 1.0
    """Turns below which it is divided."""
    mscale: NonNegativeFloat | None = None
    """DeepSeek's numerator of `attention_factor`."""
    mscale_all_dim: NonNegativeFloat | None = None
    """DeepSeek's denominator of `attention_factor`."""
    truncate: bool = True
    """Round the ends of the ramp to whole dimensions."""


RopeScaling = LinearRope | Llama3Rope | YarnRope
"""How rotary frequencies are changed for longer contexts than a model was first trained on."""


class ModelConfig(Section):
    """A decoder-only LLaMA: RMSNorm, rotary positions, SwiGLU, grouped-query attention.

    `load.read_model_config` builds it from an HF `config.json`, old or new spelling.
    """

    vocab_size: Width
    """Rows of the embedding and of the head."""
    hidden_size: Width
    """Width of the residual stream."""
    intermediate_size: Width
    """Width of the gated MLP."""
    num_hidden_layers: Annotated[int, Field(gt=0, le=1000)]
    """Decoder layers."""
    num_attention_heads: Width
    """Query heads."""
    num_key_value_heads: Width
    """Key and value heads; fewer than query heads is grouped-query attention."""
    head_dim: Width
    """Width of one head; even, because rotary positions turn pairs."""
    max_position_embeddings: PositiveInt = 2048
    """Longest sequence; `train.seq_length` may not exceed it."""
    initializer_range: PositiveFloat = 0.02
    """Standard deviation of the initial weights."""
    rms_norm_eps: PositiveFloat = 1.0e-6
    """Added to the mean square inside RMSNorm."""
    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: Annotated[RopeScaling, Field(discriminator="rope_type")] | None = None
    """Change of the rotary frequencies; None for none."""
    tie_word_embeddings: bool = False
    """The head shares the embedding's weight."""
    attention_bias: bool = False
    """Biases in q, k, v and o projections."""
    mlp_bias: bool = False
    """Biases in gate, up and down projections."""
    hidden_act: Literal["silu"] = "silu"
    """Activation of the gated MLP."""
    bos_token_id: TokenId | None = 1
    """Kept for the export."""
    eos_token_id: Annotated[
        TokenId | Annotated[tuple[TokenId, ...], Field(min_length=1)] | None,
        BeforeValidator(_as_tuple),
    ] = 2
    """Kept for the export; generation ends at any of several."""
    pad_token_id: TokenId | None = None
    """Kept for the export; no row is zeroed because of it."""


def projection_shapes(architecture: ModelConfig) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of the seven projections of a layer, by name within it."""
    width, inner = architecture.hidden_size, architecture.intermediate_size
    queries = architecture.num_attention_heads * architecture.head_dim
    keys = architecture.num_key_value_heads * architecture.head_dim
    return {
        "self_attn.q_proj": (queries, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
