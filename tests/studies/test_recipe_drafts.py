"""Accept length of drafts: the batched count of `benchmarks.recipe` against one prefix at a time, and its two ends."""

from __future__ import annotations

import dataclasses

import torch

from benchmarks.recipe import DRAFTS, Arm, accept_lengths, model_config
from glm5.config import ModelConfig
from glm5.model import GLM5, initialize_


def model() -> GLM5:
    config = dataclasses.replace(ModelConfig.from_preset("nano"), vocab_size=16, num_hidden_layers=2,
                                 mlp_layer_types=(), indexer_types=())  # fmt: skip
    made = GLM5(config).eval()
    initialize_(made, 0.3, seed=1)
    with torch.no_grad():
        made.lm_head.weight[2:] = 0  # three tokens that are ever said: drafts are right now and then
    return made


def prefixes(rows: int = 24) -> torch.Tensor:
    return torch.randint(0, 16, (rows, 12), generator=torch.Generator().manual_seed(0))


def test_a_model_that_always_says_one_token_accepts_every_draft():
    constant = model()
    with torch.no_grad():
        constant.lm_head.weight.zero_()
    assert accept_lengths(constant, prefixes()).tolist() == [DRAFTS + 1] * 24


def test_batched_counts_are_those_of_one_prefix_at_a_time():
    made, rows = model(), prefixes()
    expected = []
    for row in rows:
        ids = row.tolist()
        with torch.no_grad():
            ids.append(int(made(torch.tensor([ids]), attention="dense").logits[0, -1].argmax()))
            accepted = 0
            for draft in range(DRAFTS):
                made.mtp_steps = draft + 1
                out = made(torch.tensor([ids]), attention="dense", collect={"mtp"})
                drafted = int(out.mtp_logits[draft][0, len(row) - 1].argmax())
                if drafted != int(out.logits[0, -1].argmax()):
                    break
                accepted += 1
                ids.append(drafted)
        expected.append(1 + accepted)
    assert len(set(expected)) > 1
    assert accept_lengths(made, rows).tolist() == expected


def test_the_dense_arm_has_as_many_active_weights():
    experts, dense = (model_config(Arm(name="", dense=dense)) for dense in (False, True))
    counts = [config.num_parameters(active=True) for config in (experts, dense)]
    assert abs(counts[0] / counts[1] - 1) < 0.01
    assert set(dense.mlp_layer_types) == {"dense"}
