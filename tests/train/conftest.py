"""A tiny model and a tiny corpus for the training tests."""

import dataclasses

import pytest
from small_runs import pretrain_config

from glm5.config import PRESETS
from glm5.data import Source, build_corpus, chat_documents, tokenize_corpus, write_dataset
from glm5.data.arithmetic import problems
from glm5.text import Tokenizer
from glm5.train import pretrain

WORDS = "lamp keeper stands beside seven grey stones while nobody counts rivers turning north"


def texts() -> list[tuple[str, str]]:
    words = WORDS.split()
    return [
        (str(i), " ".join(words[(i * k + k) % len(words)] for k in range(4 + i % 17)) + f" {i}.") for i in range(200)
    ]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Paths of a tokenizer and of datasets, and a model configuration that fits them."""
    root = tmp_path_factory.mktemp("tiny")
    corpus = build_corpus(
        root / "corpus", [Source("toy", "python", "CC0-1.0", lambda: iter(texts()))], heldout_per_thousand=80
    )
    tokenizer = Tokenizer.train(corpus.texts("train"), 384)
    tokenizer.save(root / "tokenizer")
    tokenize_corpus(corpus, "train", tokenizer, root / "train")
    tokenize_corpus(corpus, "heldout", tokenizer, root / "heldout")
    chat = chat_documents((p.messages() for p in problems(0, 60)), tokenizer)
    write_dataset(root / "chat", chat, tokenizer)
    config = dataclasses.replace(
        PRESETS["nano"](), vocab_size=384, hidden_size=32, num_hidden_layers=2, mlp_layer_types=(), indexer_types=(),
        num_attention_heads=2, num_key_value_heads=0, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8,
        qk_rope_head_dim=8, v_head_dim=8, intermediate_size=32, moe_intermediate_size=16, n_routed_experts=4,
        num_experts_per_tok=2, index_n_heads=4, index_head_dim=16, index_topk=16,
    )  # fmt: skip
    return root, config


@pytest.fixture(scope="session")
def straight(tiny, tmp_path_factory):
    """A finished run of six steps."""
    return pretrain(pretrain_config(tiny), tmp_path_factory.mktemp("straight") / "run")
