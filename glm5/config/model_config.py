"""`ModelConfig`: the shape of a GLM-5 model, under the field names of Hugging Face's `glm_moe_dsa`.

Reads and writes `config.json` of GLM-5, 5.1 and 5.2. Fields that this project adds have defaults that reproduce the
published models: `latent_norm_eps` (the two norms inside MLA run at 1e-6, as `transformers` builds them, not at
`rms_norm_eps`) and `mtp_hidden` (which trunk state the multi-token-prediction layer reads).

Traps handled here: `head_dim` in the file is 64 in GLM-5 and 192 in GLM-5.2 and means nothing (rotary uses
`qk_rope_head_dim`); `rope_theta` may stand at the top level or inside `rope_parameters`; IndexShare may be given as a
list, as a pattern string or as a frequency and offset. Where a list and what it could be derived from are both given,
they must agree.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from glm5.config.validation import check_fields, check_layers, check_object, check_rope_type, check_widths
from glm5.errors import ConfigError, did_you_mean

INDEXER_LETTERS = {"F": "full", "S": "shared"}

# Hugging Face bookkeeping that has no meaning here but is kept, so that a file read and written again is whole.
_IGNORED_FIELDS = {"head_dim", "qk_head_dim", "num_local_experts", "architectures", "model_type", "rope_theta",
                   "rope_scaling", "torch_dtype", "layer_types"}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape and numerics of one model. Frozen; use `dataclasses.replace` to change a field (it validates again).

    `mlp_layer_types` and `indexer_types` are derived when they are empty and are full ever after. So a replacement of
    what they derive from (`num_hidden_layers`, `first_k_dense_replace`, `index_topk_freq`, `index_skip_topk_offset`,
    `index_topk_pattern`) empties them too: `replace(config, index_topk_freq=4, indexer_types=())`. Without that it is
    refused wherever the list says something else. The other way round, a list that replaces the derived one needs
    `index_topk_freq=None` (or `first_k_dense_replace=None`) beside it.
    """

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
    first_k_dense_replace: int | None = None
    """Dense layers before the first sparse one; None means: counted from `mlp_layer_types`, or 3 without a list."""
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
    index_topk_freq: int | None = None
    """Every how many layers one selects, after the first `index_skip_topk_offset`; None means: every layer, or as
    `indexer_types` says."""
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
        for name in ("mlp_layer_types", "indexer_types", "eos_token_id"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.num_key_value_heads:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        check_fields(self)
        check_widths(self)
        for name, derived in (
            ("mlp_layer_types", self._derived_mlp_layer_types()),
            ("indexer_types", self._derived_indexer_types()),
        ):
            if not getattr(self, name):
                object.__setattr__(self, name, derived)
        check_layers(self)
        self._compare_lists_with_their_sources()

    def _derived_mlp_layer_types(self) -> tuple[str, ...]:
        dense = 3 if self.first_k_dense_replace is None else self.first_k_dense_replace
        return tuple("dense" if i < dense else "sparse" for i in range(self.num_hidden_layers))

    def _derived_indexer_types(self) -> tuple[str, ...]:
        """IndexShare schedule: the pattern if there is one, else full where max(i - offset + 1, 0) % freq == 0."""
        if self.index_topk_pattern is not None:
            return tuple(INDEXER_LETTERS[letter] for letter in self.index_topk_pattern)
        freq, offset = self.index_topk_freq or 1, self.index_skip_topk_offset
        return tuple("full" if max(i - offset + 1, 0) % freq == 0 else "shared" for i in range(self.num_hidden_layers))

    def _compare_lists_with_their_sources(self) -> None:
        """A list wins over nothing that was given beside it: the two say the same, or the config is refused."""
        dense = next((i for i, kind in enumerate(self.mlp_layer_types) if kind != "dense"), self.num_hidden_layers)
        given = self.first_k_dense_replace
        if given is not None and min(given, self.num_hidden_layers) != dense:
            raise ConfigError(
                f"first_k_dense_replace is {given}, but mlp_layer_types begins with {dense} dense layer(s); "
                "leave mlp_layer_types empty to derive it, or first_k_dense_replace unset."
            )
        object.__setattr__(self, "first_k_dense_replace", dense)
        source = "index_topk_freq" if self.index_topk_pattern is None else "index_topk_pattern"
        if getattr(self, source) is not None and self.indexer_types != self._derived_indexer_types():
            raise ConfigError(
                f"indexer_types differs from what {source}={getattr(self, source)!r} makes of "
                f"{self.num_hidden_layers} layers (index_skip_topk_offset={self.index_skip_topk_offset}); "
                f"leave indexer_types empty to derive it, or {source} unset."
            )

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
        try:
            return cls.from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Builds a config from the fields of a `config.json`; unknown architectures are refused.

        Beside `mlp_layer_types` a `first_k_dense_replace` of 3 says nothing: `transformers` writes this default always.
        """
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
        if fields.get("mlp_layer_types") and fields.get("first_k_dense_replace") == 3:
            del fields["first_k_dense_replace"]
        if isinstance(fields.get("index_topk_pattern"), list):  # of "full" and "shared"
            letters = {kind: letter for letter, kind in INDEXER_LETTERS.items()}
            fields["index_topk_pattern"] = "".join(letters.get(str(kind), "?") for kind in fields["index_topk_pattern"])
        required = {
            f.name
            for f in dataclasses.fields(cls)
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        }
        missing = sorted(required - fields.keys())
        if missing:
            raise ConfigError(f"The config lacks {', '.join(missing)}; add the field(s) or start from a preset.")
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
    def sparse_layers(self) -> tuple[int, ...]:
        """The layers with routed experts, without MTP modules."""
        return tuple(layer for layer, kind in enumerate(self.mlp_layer_types) if kind == "sparse")

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


def _rope_parameters(values: dict[str, Any]) -> dict[str, Any]:
    """`rope_parameters` from its new place, or from the older `rope_theta` and `rope_scaling`."""
    for name in ("rope_parameters", "rope_scaling"):
        if values.get(name) is not None:
            check_object(name, values[name])
            check_rope_type(values[name])  # both, for one that is not read could ask for something else
    rope = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    rope.pop("type", None)
    rope.setdefault("rope_type", "default")
    rope.setdefault("rope_theta", values.get("rope_theta", 1_000_000))
    return rope
