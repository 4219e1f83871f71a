"""What a `ModelConfig` must satisfy: types and ranges of single fields, then what fields demand of each other.

Every function raises `ConfigError` with a sentence that names the field, its value and what it may be.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from glm5.errors import ConfigError

if TYPE_CHECKING:
    from glm5.config.model_config import ModelConfig

_AT_LEAST_ONE = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "q_lora_rank", "kv_lora_rank",
    "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "intermediate_size", "moe_intermediate_size",
    "n_routed_experts", "num_experts_per_tok", "index_n_heads", "index_head_dim", "index_topk",
    "max_position_embeddings", "n_group", "topk_group", "index_topk_freq",
)  # fmt: skip
_AT_LEAST_ZERO = ("n_shared_experts", "first_k_dense_replace", "num_nextn_predict_layers", "index_skip_topk_offset")
_OPTIONAL = ("index_topk_freq", "first_k_dense_replace")
_SWITCHES = ("norm_topk_prob", "index_share_for_mtp_iteration", "rope_interleave", "indexer_rope_interleave")
_BUILT_AT_ONE_VALUE = {
    "hidden_act": "silu", "scoring_func": "sigmoid", "topk_method": "noaux_tc", "tie_word_embeddings": False,
    "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0, "moe_layer_freq": 1,
}  # fmt: skip


def check_fields(config: ModelConfig) -> None:
    """Each field by itself; runs before anything is derived from them."""
    for names, least in ((_AT_LEAST_ONE, 1), (_AT_LEAST_ZERO, 0)):
        for name in names:
            value = getattr(config, name)
            if value is None and name in _OPTIONAL:
                continue
            if not _is_whole(value) or value < least:
                raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least {least}.")
    for name in ("rms_norm_eps", "latent_norm_eps", "routed_scaling_factor", "initializer_range"):
        check_positive(name, getattr(config, name))
    for name in _SWITCHES:
        if not isinstance(getattr(config, name), bool):
            raise ConfigError(f"{name} is {getattr(config, name)!r}; it must be true or false.")
    for name, built in (*_BUILT_AT_ONE_VALUE.items(), ("num_key_value_heads", config.num_attention_heads)):
        if getattr(config, name) != built:
            raise ConfigError(f"{name} is {getattr(config, name)!r}; GLM-5 has {built!r} and nothing else is built.")
    for name in ("mlp_layer_types", "indexer_types"):
        if not isinstance(getattr(config, name), tuple):
            raise ConfigError(f"{name} is {getattr(config, name)!r}; it must be a list with one entry per layer.")
    pattern = config.index_topk_pattern
    if pattern is not None and (not isinstance(pattern, str) or set(pattern) - set("FS")):
        raise ConfigError(f"index_topk_pattern is {pattern!r}; write one F (full) or S (shared) per layer.")
    if config.mtp_hidden not in ("after_norm", "before_norm"):
        raise ConfigError(f"mtp_hidden is {config.mtp_hidden!r}; use 'after_norm' or 'before_norm'.")
    if not isinstance(config.dtype, str):
        raise ConfigError(f"dtype is {config.dtype!r}; it must be a name such as 'bfloat16'.")
    _check_tokens(config)
    _check_rope(config)
    _check_quantization(config)


def check_widths(config: ModelConfig) -> None:
    """Widths of rotary and indexer heads, and experts against their groups."""
    if config.qk_rope_head_dim % 2:
        raise ConfigError(f"qk_rope_head_dim is {config.qk_rope_head_dim}; rotary pairs need an even width.")
    if config.index_head_dim < config.qk_rope_head_dim:
        raise ConfigError(
            f"index_head_dim ({config.index_head_dim}) is smaller than qk_rope_head_dim ({config.qk_rope_head_dim}); "
            "the indexer rotates its first qk_rope_head_dim dimensions, so make it at least as wide."
        )
    experts, chosen = config.n_routed_experts, config.num_experts_per_tok
    if chosen > experts:
        raise ConfigError(f"num_experts_per_tok ({chosen}) exceeds n_routed_experts ({experts}).")
    if experts % config.n_group:
        raise ConfigError(f"n_routed_experts ({experts}) does not split into n_group={config.n_group}.")
    if config.topk_group > config.n_group:
        raise ConfigError(f"topk_group ({config.topk_group}) exceeds n_group ({config.n_group}).")
    group_size = experts // config.n_group
    if config.n_group > 1 and group_size < 2:
        raise ConfigError(f"n_group={config.n_group} leaves {group_size} expert(s) a group; a group needs two.")
    if chosen > group_size * config.topk_group:
        raise ConfigError(
            f"num_experts_per_tok ({chosen}) exceeds the {group_size * config.topk_group} experts "
            f"of topk_group={config.topk_group} groups."
        )


def check_layers(config: ModelConfig) -> None:
    """The lists that name a kind for every layer."""
    for name, kinds in (("mlp_layer_types", ("dense", "sparse")), ("indexer_types", ("full", "shared"))):
        types = getattr(config, name)
        if len(types) != config.num_hidden_layers:
            raise ConfigError(
                f"{name} lists {len(types)} layers, but num_hidden_layers is {config.num_hidden_layers}; "
                "list every layer once, or leave the list empty to derive it."
            )
        wrong = next((t for t in types if t not in kinds), None)
        if wrong is not None:
            raise ConfigError(f"{name} holds {wrong!r}; each entry is {kinds[0]!r} or {kinds[1]!r}.")
    if config.indexer_types[0] != "full":
        raise ConfigError("indexer_types starts with 'shared'; the first layer has no earlier selection to share.")


def check_positive(name: str, value: Any) -> None:
    """A finite number above zero."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:  # NaN fails the comparison
        raise ConfigError(f"{name} is {value!r}; it must be a positive number.")


def check_object(name: str, value: Any) -> None:
    """A JSON object."""
    if not isinstance(value, dict):
        raise ConfigError(f"{name} is {value!r}; it must be an object of fields.")


def check_rope_type(rope: dict[str, Any]) -> None:
    """Plain rotary embedding, under the newer key or the older one."""
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise ConfigError(f"rope_type {rope_type!r} is not built; GLM-5 uses plain rotary embedding ('default').")


def _check_tokens(config: ModelConfig) -> None:
    for name in ("bos_token_id", "pad_token_id", "eos_token_id"):
        value = getattr(config, name)
        several = name == "eos_token_id" and isinstance(value, tuple)
        for token in value if several else () if value is None else (value,):
            if not _is_whole(token):
                raise ConfigError(f"{name} holds {token!r}; a token id is a whole number.")
            if not 0 <= token < config.vocab_size:
                raise ConfigError(f"{name}: special token id {token} is outside the vocabulary of {config.vocab_size}.")


def _check_rope(config: ModelConfig) -> None:
    check_object("rope_parameters", config.rope_parameters)
    check_rope_type(config.rope_parameters)
    check_positive("rope_theta", config.rope_parameters.get("rope_theta"))


def _check_quantization(config: ModelConfig) -> None:
    """FP8 in the published form: e4m3 with one scale per block. INT4 in our own: groups of inputs of a row."""
    if config.quantization_config is None:
        return
    check_object("quantization_config", config.quantization_config)
    method, fmt = config.quantization_config.get("quant_method"), config.quantization_config.get("fmt", "e4m3")
    if method == "glm5-int4":
        group = config.quantization_config.get("group_size")
        if not isinstance(group, int) or isinstance(group, bool) or group < 2:
            raise ConfigError(f"group_size in quantization_config is {group!r}; it must be a whole number above 1.")
        return
    if (method, fmt) != ("fp8", "e4m3"):
        raise ConfigError(
            f"quantization_config states {method!r} {fmt!r}; only 'fp8' with 'e4m3' is read (and "
            "'glm5-int4', our own): use the BF16 or FP8 release of the model."
        )
    block = config.quantization_config.get("weight_block_size")
    if not isinstance(block, list | tuple) or len(block) != 2 or not all(_is_whole(b) and b > 0 for b in block):
        raise ConfigError(f"weight_block_size in quantization_config is {block!r}; it must be two whole numbers.")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
