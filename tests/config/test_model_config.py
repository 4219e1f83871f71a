"""Presets, published files and exact counts."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from tiny import tiny_config

import glm5
from glm5.config import PRESETS
from glm5.errors import ConfigError

# What zai-org/GLM-5 and GLM-5.2 publish (fields that matter, and the traps).
GLM_5_FILE = {
    "architectures": ["GlmMoeDsaForCausalLM"], "model_type": "glm_moe_dsa", "hidden_size": 6144,
    "num_hidden_layers": 78, "num_attention_heads": 64, "num_key_value_heads": 64, "q_lora_rank": 2048,
    "kv_lora_rank": 512, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "qk_head_dim": 256, "v_head_dim": 256,
    "head_dim": 64, "index_n_heads": 32, "index_head_dim": 128, "index_topk": 2048, "indexer_rope_interleave": True,
    "rope_interleave": True, "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
    "intermediate_size": 12288, "moe_intermediate_size": 2048, "first_k_dense_replace": 3, "moe_layer_freq": 1,
    "n_routed_experts": 256, "num_experts_per_tok": 8, "n_shared_experts": 1, "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True, "n_group": 1, "topk_group": 1,
    "hidden_act": "silu", "vocab_size": 154880, "max_position_embeddings": 202752, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "attention_bias": False, "attention_dropout": 0.0, "initializer_range": 0.02,
    "num_nextn_predict_layers": 1, "eos_token_id": [154820, 154827, 154829], "pad_token_id": 154820,
    "dtype": "bfloat16", "ep_size": 1, "pretraining_tp": 1, "transformers_version": "5.0.2.dev0", "use_cache": True,
}  # fmt: skip
GLM_5_2_FILE = GLM_5_FILE | {
    "max_position_embeddings": 1048576, "head_dim": 192, "rope_theta": 8000000, "rope_parameters": None,
    "index_topk_freq": 4, "index_skip_topk_offset": 3, "index_topk_pattern": None,
    "index_share_for_mtp_iteration": True, "moe_router_dtype": "float32",
    "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 75,
}  # fmt: skip


def test_published_files_are_the_presets():
    assert dataclasses.replace(glm5.ModelConfig.from_dict(GLM_5_FILE), extra={}) == PRESETS["glm-5"]()
    read = glm5.ModelConfig.from_dict(GLM_5_2_FILE)
    preset = PRESETS["glm-5.2"]()
    assert dataclasses.replace(read, extra=preset.extra) == preset
    assert read.rope_theta == 8e6
    assert [i for i, kind in enumerate(read.indexer_types) if kind == "full"] == [0, 1, *range(2, 75, 4)]


def test_fp8_file_keeps_its_quantization_and_unknown_fields(tmp_path):
    quantization = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    (tmp_path / "config.json").write_text(json.dumps(GLM_5_FILE | {"quantization_config": quantization}))
    config = glm5.ModelConfig.from_pretrained(tmp_path)
    assert config.quantization_config == quantization
    written = json.loads(config.to_json())
    assert written["transformers_version"] == "5.0.2.dev0"
    assert written["quantization_config"] == quantization


@pytest.mark.parametrize("name", PRESETS)
def test_written_and_read_again(name, tmp_path):
    config = glm5.ModelConfig.from_preset(name)
    (tmp_path / "config.json").write_text(config.to_json())
    assert glm5.ModelConfig.from_pretrained(tmp_path) == config


@pytest.mark.parametrize("name", PRESETS)
def test_transformers_reads_what_is_written(name, tmp_path):
    from transformers import AutoConfig

    config = glm5.ModelConfig.from_preset(name)
    (tmp_path / "config.json").write_text(config.to_json())
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert type(theirs).__name__ == "GlmMoeDsaConfig"
    assert theirs.indexer_types == list(config.indexer_types)
    assert theirs.mlp_layer_types == list(config.mlp_layer_types)
    assert theirs.rope_parameters["rope_theta"] == config.rope_theta
    assert theirs.head_dim == config.qk_rope_head_dim


def test_published_counts():
    counts = {name: PRESETS[name]() for name in ("glm-5", "glm-5.2", "nano")}
    assert counts["glm-5"].num_parameters() == 743_911_218_432
    assert counts["glm-5"].num_parameters(mtp=True) == 753_864_139_008
    assert counts["glm-5.2"].num_parameters(mtp=True) == 753_329_940_480
    assert counts["glm-5"].num_parameters(active=True) == 40_833_146_112  # 39.88B and the output head
    assert counts["nano"].num_parameters() == 3_600_432


@pytest.mark.parametrize("name", PRESETS)
def test_closed_form_equals_the_modules(name):
    config = glm5.ModelConfig.from_preset(name)
    model = glm5.GLM5(config, device="meta")
    sizes = {n: t.numel() for n, t in [*model.named_parameters(), *model.named_buffers()]}
    assert sum(sizes.values()) == config.num_parameters(mtp=True)
    assert sum(n for name, n in sizes.items() if not name.startswith("mtp.")) == config.num_parameters()
    # A token touches every weight but the embedding, of which it reads a row, and the experts it was not sent to.
    share = config.num_experts_per_tok / config.n_routed_experts
    active = sum(n * (share if ".experts." in name else 1) for name, n in sizes.items() if "embed_tokens" not in name)
    assert active == config.num_parameters(mtp=True, active=True)


def test_index_share_pattern_and_list_agree():
    by_pattern = tiny_config(num_hidden_layers=4, index_topk_pattern="FSFS")
    by_list = tiny_config(num_hidden_layers=4, indexer_types=("full", "shared", "full", "shared"))
    assert by_pattern.indexer_types == by_list.indexer_types
    values = by_pattern.to_dict() | {"indexer_types": None, "index_topk_pattern": ["full", "shared", "full", "shared"]}
    assert glm5.ModelConfig.from_dict(values).indexer_types == by_list.indexer_types


@pytest.mark.parametrize(
    ("config", "change", "sentence"),
    [
        ("nano", {"index_topk_freq": 4}, "indexer_types differs from what index_topk_freq=4 makes of 4 layers"),
        ("nano", {"index_topk_pattern": "FSFS"}, "indexer_types differs from what index_topk_pattern='FSFS' makes"),
        ("glm-5.2", {"index_topk_freq": 1}, "indexer_types differs from what index_topk_freq=1 makes of 78 layers"),
        ("glm-5.2", {"index_skip_topk_offset": 2}, "(index_skip_topk_offset=2); leave indexer_types empty"),
        ("glm-5.2", {"indexer_types": ("full",) * 78}, "or index_topk_freq unset"),
        ("nano", {"first_k_dense_replace": 3}, "first_k_dense_replace is 3, but mlp_layer_types begins with 1 dense"),
        ("nano", {"mlp_layer_types": ("sparse",) * 4}, "first_k_dense_replace is 1, but mlp_layer_types begins with 0"),
        (
            "nano",
            {"num_hidden_layers": 6},
            "lists 4 layers, but num_hidden_layers is 6; list every layer once, or leave",
        ),
    ],
)
def test_a_replacement_that_a_list_contradicts_is_refused(config, change, sentence):
    with pytest.raises(ConfigError) as caught:
        dataclasses.replace(PRESETS[config](), **change)
    assert sentence in str(caught.value)


def test_a_replacement_that_empties_the_list_is_derived_again():
    nano = PRESETS["nano"]()
    shared = dataclasses.replace(nano, index_topk_freq=2, index_skip_topk_offset=1, indexer_types=())
    assert shared.indexer_types == ("full", "shared", "full", "shared")
    assert dataclasses.replace(shared, index_topk_freq=None, indexer_types=()) == dataclasses.replace(
        nano, index_skip_topk_offset=1
    )
    assert dataclasses.replace(nano, first_k_dense_replace=2, mlp_layer_types=()).mlp_layer_types == (
        "dense", "dense", "sparse", "sparse",
    )  # fmt: skip
    listed = dataclasses.replace(nano, first_k_dense_replace=None, mlp_layer_types=("sparse", "dense") * 2)
    assert listed.first_k_dense_replace == 0


def test_an_edited_file_is_refused_and_named(tmp_path):
    values = PRESETS["glm-5.2"]().to_dict() | {"index_topk_freq": 2}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"config\.json: indexer_types differs from what index_topk_freq=2"):
        glm5.ModelConfig.from_pretrained(tmp_path)


def test_the_default_that_transformers_writes_beside_a_list_says_nothing(tmp_path):
    from transformers import GlmMoeDsaConfig

    types = ["dense", "sparse", "dense"]
    GlmMoeDsaConfig(num_hidden_layers=3, mlp_layer_types=types, num_experts_per_tok=2).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["first_k_dense_replace"] == 3
    config = glm5.ModelConfig.from_pretrained(tmp_path)
    assert config.mlp_layer_types == tuple(types) and config.first_k_dense_replace == 1


def test_bf16_model_keeps_the_sensitive_tensors_in_fp32():
    model = glm5.GLM5(tiny_config(), dtype=torch.bfloat16)
    wide = {name for name, t in model.state_dict().items() if t.dtype == torch.float32}
    assert wide == {name for name in model.state_dict() if glm5.model.keeps_fp32(name)}
    assert wide


FP8_BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
BAD_CONFIGS = [
    ({"model_type": "llama"}, "model_type 'llama' is not GLM-5"),
    ({"hidden_sizes": 64, "hidden_size": None}, "Did you mean 'hidden_size'"),
    ({"hidden_size": None}, "lacks hidden_size"),
    ({"hidden_size": 0}, "hidden_size is 0"),
    ({"num_hidden_layers": 2.5}, "num_hidden_layers is 2.5"),
    ({"num_key_value_heads": 1}, "num_key_value_heads is 1"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
    ({"attention_bias": True}, "attention_bias is True"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
    ({"num_experts_per_tok": 9}, "exceeds n_routed_experts"),
    ({"qk_rope_head_dim": 5}, "rotary pairs need an even width"),
    ({"index_head_dim": 2}, "smaller than qk_rope_head_dim"),
    ({"n_group": 3}, "does not split into n_group=3"),
    ({"n_group": 2, "topk_group": 3}, "topk_group (3) exceeds"),
    ({"indexer_types": ["shared", "full"]}, "starts with 'shared'"),
    ({"indexer_types": ["full"]}, "lists 1 layers"),
    ({"mlp_layer_types": ["dense", "wide"]}, "holds 'wide'"),
    ({"mlp_layer_types": 5}, "mlp_layer_types is 5; it must be a list"),
    ({"indexer_types": "full"}, "indexer_types is 'full'; it must be a list"),
    ({"index_topk_pattern": "FX", "indexer_types": None}, "index_topk_pattern is 'FX'; write one F"),
    ({"index_topk_pattern": ["full", "wide"], "indexer_types": None}, "index_topk_pattern is 'F?'; write one F"),
    ({"index_topk_pattern": 5}, "index_topk_pattern is 5; write one F"),
    ({"index_topk_pattern": ["full", "shared"]}, "indexer_types differs from what index_topk_pattern='FS' makes"),
    ({"index_topk_freq": "4"}, "index_topk_freq is '4'; it must be a whole number of at least 1"),
    ({"index_topk_freq": 0}, "index_topk_freq is 0; it must be a whole number of at least 1"),
    ({"index_skip_topk_offset": -1}, "index_skip_topk_offset is -1; it must be a whole number of at least 0"),
    ({"n_shared_experts": True}, "n_shared_experts is True; it must be a whole number"),
    ({"first_k_dense_replace": 2}, "first_k_dense_replace is 2, but mlp_layer_types begins with 1 dense"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'; it must be a positive number"),
    ({"rms_norm_eps": -1}, "rms_norm_eps is -1; it must be a positive number"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; it must be a positive number"),
    ({"latent_norm_eps": "1e-6"}, "latent_norm_eps is '1e-6'; it must be a positive number"),
    ({"latent_norm_eps": 0}, "latent_norm_eps is 0; it must be a positive number"),
    ({"latent_norm_eps": float("inf")}, "latent_norm_eps is inf; it must be a positive number"),
    ({"routed_scaling_factor": "x"}, "routed_scaling_factor is 'x'; it must be a positive number"),
    ({"initializer_range": -0.02}, "initializer_range is -0.02; it must be a positive number"),
    ({"norm_topk_prob": "no"}, "norm_topk_prob is 'no'; it must be true or false"),
    ({"dtype": ["bfloat16"]}, "dtype is ['bfloat16']; it must be a name"),
    ({"quantization_config": "fp8"}, "quantization_config is 'fp8'; it must be an object"),
    ({"quantization_config": {"quant_method": "awq"}}, "quantization_config states 'awq'"),
    ({"quantization_config": FP8_BLOCKS | {"fmt": "e5m2"}}, "states 'fp8' 'e5m2'; only 'fp8' with 'e4m3' is read"),
    (
        {"quantization_config": FP8_BLOCKS | {"weight_block_size": None}},
        "weight_block_size in quantization_config is None",
    ),
    ({"quantization_config": FP8_BLOCKS | {"weight_block_size": [128]}}, "is [128]; it must be two whole numbers"),
    ({"quantization_config": FP8_BLOCKS | {"weight_block_size": [128, "x"]}}, "it must be two whole numbers"),
    ({"rope_parameters": 5}, "rope_parameters is 5; it must be an object"),
    ({"rope_scaling": {"type": "yarn", "factor": 4}}, "rope_type 'yarn'"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "rope_type 'yarn'"),
    ({"rope_parameters": {"rope_theta": float("nan")}}, "rope_theta is nan; it must be a positive number"),
    ({"rope_parameters": {"rope_theta": "1e6"}}, "rope_theta is '1e6'; it must be a positive number"),
    ({"eos_token_id": "7"}, "eos_token_id holds '7'; a token id is a whole number"),
    ({"eos_token_id": ["a"]}, "eos_token_id holds 'a'; a token id is a whole number"),
    ({"pad_token_id": 0.5}, "pad_token_id holds 0.5; a token id is a whole number"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_type 'yarn'"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, "rope_theta is 0"),
    ({"eos_token_id": 97}, "special token id 97"),
    ({"mtp_hidden": "middle"}, "mtp_hidden is 'middle'"),
]


@pytest.mark.parametrize(("change", "sentence"), BAD_CONFIGS, ids=lambda value: str(value)[:40])
def test_bad_configs_are_refused_with_a_sentence(change, sentence):
    with pytest.raises(ConfigError) as caught:
        glm5.ModelConfig.from_dict(tiny_config().to_dict() | change)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"), [(None, "does not exist"), ("{", "is not valid JSON"), ("[1]", "holds a list")]
)
def test_bad_config_files_are_named(tmp_path, text, sentence):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError) as caught:
        glm5.ModelConfig.from_pretrained(tmp_path)
    assert sentence in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'glm-5'"):
        glm5.ModelConfig.from_preset("glm5")
