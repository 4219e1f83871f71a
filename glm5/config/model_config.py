"""`ModelConfig`: the shape of a GLM-5 model, under the field names of Hugging Face's `glm_moe_dsa`.

Reads and writes `config.json` of GLM-5, 5.1 and 5.2. Fields that this project adds have defaults that reproduce the
published models: `latent_norm_eps` (the two norms inside MLA run at 1e-6, as `transformers` builds them, not at
`rms_norm_eps`) and `mtp_hidden` (which trunk state the multi-token-prediction layer reads).

Traps handled here: `head_dim` in the file is 64 in GLM-5 and 192 in GLM-5.2 and means nothing (rotary uses
`qk_rope_head_dim`); `rope_theta` may stand at the top level or inside `rope_parameters`; IndexShare may be given as a
list, as a pattern string or as a frequency and offset.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from glm5.errors import ConfigError, did_you_mean

INDEXER_LETTERS = {"F": "full", "S": "shared"}

# Hugging Face bookkeeping that has no meaning here but is kept, so that a file read and written again is whole.
_IGNORED_FIELDS = {"head_dim", "qk_head_dim", "num_local_experts", "architectures", "model_type", "rope_theta",
                   "rope_scaling", "torch_dtype", "layer_types"}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape and numerics of one model. Frozen; use `dataclasses.replace` to change a field (it validates again)."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    # Multi-head latent attention (widths per head unless they end in _rank)
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    # Feed-forward and experts
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int = 1
    first_k_dense_replace: int = 3
    mlp_layer_types: tuple[str, ...] = ()
    """"dense" or "sparse" per layer; empty means: the first `first_k_dense_replace` layers are dense."""
    routed_scaling_factor: float = 2.5
    norm_topk_prob: bool = True
    n_group: int = 1
    topk_group: int = 1
    # DeepSeek sparse attention
    index_n_heads: int = 32
    index_head_dim: int = 128
    index_topk: int = 2048
    indexer_types: tuple[str, ...] = ()
    """"full" or "shared" per layer; empty means: derived from the pattern, or from frequency and offset."""
    index_topk_freq: int = 1
    index_skip_topk_offset: int = 2
    index_topk_pattern: str | None = None
    index_share_for_mtp_iteration: bool = False
    # Rotary embedding
    rope_parameters: dict[str, Any] = field(default_factory=lambda: {"rope_theta": 1_000_000, "rope_type": "default"})
    rope_interleave: bool = True
    indexer_rope_interleave: bool = True
    max_position_embeddings: int = 202_752
    # Numerics and initialisation
    rms_norm_eps: float = 1e-5
    latent_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    # Multi-token prediction
    num_nextn_predict_layers: int = 0
    mtp_hidden: Literal["after_norm", "before_norm"] = "after_norm"
    # Tokens
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    # Storage
    dtype: str = "bfloat16"
    quantization_config: dict[str, Any] | None = None
    # Published fields that are accepted at one value only (checked below)
    num_key_value_heads: int = 0
    hidden_act: str = "silu"
    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: float = 0.0
    moe_layer_freq: int = 1
    extra: dict[str, Any] = field(default_factory=dict)
    """Fields of a `config.json` that this project does not use; written back unchanged."""

    # ---- construction -------------------------------------------------------------------------------------------
    def __post_init__(self) -> None:
        for name in ("mlp_layer_types", "indexer_types"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if isinstance(self.eos_token_id, list):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        if not self.num_key_value_heads:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if not self.mlp_layer_types:
            dense = min(self.first_k_dense_replace, self.num_hidden_layers)
            types = ("dense",) * dense + ("sparse",) * (self.num_hidden_layers - dense)
            object.__setattr__(self, "mlp_layer_types", types)
        if not self.indexer_types:
            object.__setattr__(self, "indexer_types", self._derived_indexer_types())
        self._validate()

    def _derived_indexer_types(self) -> tuple[str, ...]:
        """IndexShare schedule: the pattern if there is one, else full where max(i - offset + 1, 0) % freq == 0."""
        if self.index_topk_pattern is not None:
            unknown = sorted(set(self.index_topk_pattern) - set(INDEXER_LETTERS))
            if unknown:
                raise ConfigError(f"index_topk_pattern holds {unknown[0]!r}; use only F (full) and S (shared).")
            return tuple(INDEXER_LETTERS[letter] for letter in self.index_topk_pattern)
        freq, offset = max(self.index_topk_freq, 1), self.index_skip_topk_offset
        return tuple("full" if max(i - offset + 1, 0) % freq == 0 else "shared" for i in range(self.num_hidden_layers))

    @classmethod
    def from_preset(cls, name: str) -> ModelConfig:
        """A preset by name: published (`glm-5`, `glm-5.1`, `glm-5.2`) or small (`nano`, `micro`, `mini`)."""
        from glm5.config.presets import PRESETS

        if name not in PRESETS:
            known = ", ".join(PRESETS)
            raise ConfigError(f"There is no preset {name!r}; known presets: {known}.{did_you_mean(name, PRESETS)}")
        return PRESETS[name]()

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> ModelConfig:
        """Reads `config.json` of a Hugging Face model directory."""
        path = Path(directory) / "config.json"
        if not path.is_file():
            raise ConfigError(f"{path} does not exist; give a directory that holds a config.json, or a preset name.")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not valid JSON ({error}); download or write it again.") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{path} holds a {type(values).__name__}, not an object of fields; write it again.")
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Builds a config from the fields of a `config.json`; unknown architectures are refused."""
        model_type = values.get("model_type", "glm_moe_dsa")
        if model_type != "glm_moe_dsa":
            raise ConfigError(
                f"model_type {model_type!r} is not GLM-5; this project runs 'glm_moe_dsa' (GLM-5, 5.1, 5.2) only."
            )
        known = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        fields: dict[str, Any] = {}
        extra: dict[str, Any] = {}
        for name, value in values.items():
            if name in known:
                if value is not None:
                    fields[name] = value
            elif name not in _IGNORED_FIELDS:
                given = {known_name for known_name, v in values.items() if v is not None}
                near = did_you_mean(name, known - given, cutoff=0.85)
                if near:
                    raise ConfigError(f"Unknown config field {name!r}.{near}")
                extra[name] = value
        if "num_local_experts" in values:
            fields.setdefault("n_routed_experts", values["num_local_experts"])
        if values.get("torch_dtype") is not None:
            fields.setdefault("dtype", values["torch_dtype"])
        fields["rope_parameters"] = _rope_parameters(values)
        if isinstance(fields.get("index_topk_pattern"), list):
            fields["indexer_types"] = tuple(fields.pop("index_topk_pattern"))
        required = {
            f.name
            for f in dataclasses.fields(cls)
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        }
        missing = sorted(required - fields.keys())
        if missing:
            raise ConfigError(f"config.json lacks {', '.join(missing)}; add the field(s) or start from a preset.")
        return cls(**fields, extra=extra)

    # ---- writing ------------------------------------------------------------------------------------------------
    def to_dict(self) -> dict[str, Any]:
        """The fields of a `config.json` that `transformers` reads."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "extra"}
        values = {name: list(v) if isinstance(v, tuple) else v for name, v in values.items() if v is not None}
        values.update(
            self.extra,
            architectures=["GlmMoeDsaForCausalLM"],
            model_type="glm_moe_dsa",
            head_dim=self.qk_rope_head_dim,
            qk_head_dim=self.qk_head_dim,
        )
        return dict(sorted(values.items()))

    def to_json(self) -> str:
        """`config.json` as text, fields sorted, with a final newline."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    # ---- derived ------------------------------------------------------------------------------------------------
    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key head: the part without rotation, then the rotated part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def rope_theta(self) -> float:
        """Base of the rotary frequencies."""
        return float(self.rope_parameters["rope_theta"])

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The end-of-turn tokens as a tuple (empty when none is set)."""
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    def num_parameters(self, *, mtp: bool = False, active: bool = False) -> int:
        """Weights and router-bias buffers by the closed form; `active` counts those that one token touches.

        The active count holds the output head but not the input embedding, of which a token reads one row.
        """
        from glm5.config.parameters import count_parameters

        counts = count_parameters(self)
        total = counts.active if active else counts.total
        if mtp:
            total += counts.mtp_active if active else counts.mtp
        return total

    # ---- checks -------------------------------------------------------------------------------------------------
    def _validate(self) -> None:
        positive = (
            "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "q_lora_rank", "kv_lora_rank",
            "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "intermediate_size", "moe_intermediate_size",
            "n_routed_experts", "num_experts_per_tok", "index_n_heads", "index_head_dim", "index_topk",
            "max_position_embeddings", "n_group", "topk_group",
        )  # fmt: skip
        for name in positive:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least 1.")
        for name in ("n_shared_experts", "first_k_dense_replace", "num_nextn_predict_layers"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least 0.")
        only = {
            "num_key_value_heads": self.num_attention_heads, "hidden_act": "silu", "scoring_func": "sigmoid",
            "topk_method": "noaux_tc", "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
            "attention_dropout": 0.0, "moe_layer_freq": 1,
        }  # fmt: skip
        for name, value in only.items():
            if getattr(self, name) != value:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; GLM-5 has {value!r} and nothing else is built.")
        if self.qk_rope_head_dim % 2:
            raise ConfigError(f"qk_rope_head_dim is {self.qk_rope_head_dim}; rotary pairs need an even width.")
        if self.index_head_dim < self.qk_rope_head_dim:
            raise ConfigError(
                f"index_head_dim ({self.index_head_dim}) is smaller than qk_rope_head_dim ({self.qk_rope_head_dim}); "
                "the indexer rotates its first qk_rope_head_dim dimensions, so make it at least as wide."
            )
        if self.num_experts_per_tok > self.n_routed_experts:
            raise ConfigError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) exceeds n_routed_experts ({self.n_routed_experts})."
            )
        self._validate_groups()
        self._validate_layers()
        self._validate_rope()
        for token in (self.bos_token_id, self.pad_token_id, *self.eos_token_ids):
            if token is not None and not 0 <= token < self.vocab_size:
                raise ConfigError(f"special token id {token} is outside the vocabulary of {self.vocab_size}.")
        if self.mtp_hidden not in ("after_norm", "before_norm"):
            raise ConfigError(f"mtp_hidden is {self.mtp_hidden!r}; use 'after_norm' or 'before_norm'.")

    def _validate_groups(self) -> None:
        if self.n_routed_experts % self.n_group:
            raise ConfigError(f"n_routed_experts ({self.n_routed_experts}) does not split into n_group={self.n_group}.")
        if self.topk_group > self.n_group:
            raise ConfigError(f"topk_group ({self.topk_group}) exceeds n_group ({self.n_group}).")
        group_size = self.n_routed_experts // self.n_group
        if self.n_group > 1 and group_size < 2:
            raise ConfigError(f"n_group={self.n_group} leaves {group_size} expert(s) a group; a group needs two.")
        if self.num_experts_per_tok > group_size * self.topk_group:
            raise ConfigError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) exceeds the {group_size * self.topk_group} experts "
                f"of topk_group={self.topk_group} groups."
            )

    def _validate_layers(self) -> None:
        for name, kinds in (("mlp_layer_types", ("dense", "sparse")), ("indexer_types", ("full", "shared"))):
            types = getattr(self, name)
            if len(types) != self.num_hidden_layers:
                raise ConfigError(
                    f"{name} lists {len(types)} layers, but num_hidden_layers is {self.num_hidden_layers}."
                )
            wrong = next((t for t in types if t not in kinds), None)
            if wrong is not None:
                raise ConfigError(f"{name} holds {wrong!r}; each entry is {kinds[0]!r} or {kinds[1]!r}.")
        if self.indexer_types[0] != "full":
            raise ConfigError("indexer_types starts with 'shared'; the first layer has no earlier selection to share.")

    def _validate_rope(self) -> None:
        rope_type = self.rope_parameters.get("rope_type", "default")
        if rope_type != "default":
            raise ConfigError(f"rope_type {rope_type!r} is not built; GLM-5 uses plain rotary embedding ('default').")
        theta = self.rope_parameters.get("rope_theta")
        if not isinstance(theta, int | float) or theta <= 0:
            raise ConfigError(f"rope_theta is {theta!r}; it must be a positive number.")


def _rope_parameters(values: dict[str, Any]) -> dict[str, Any]:
    """`rope_parameters` from its new place, or from the older `rope_theta` and `rope_scaling`."""
    rope = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    if "type" in rope:
        rope.setdefault("rope_type", rope.pop("type"))
    rope.setdefault("rope_type", "default")
    rope.setdefault("rope_theta", values.get("rope_theta", 1_000_000))
    return rope
