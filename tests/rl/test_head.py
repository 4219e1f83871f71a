"""The output head a piece at a time: the same numbers, and never more positions at once than allowed."""

import dataclasses

import pytest
import torch
from learning import drafting_model, engine_batch, examples_from
from speaker import VOCABULARY, speaker_model

from glm5.errors import ConfigError
from glm5.model import transformer
from glm5.rl.adapters import LoRA
from glm5.rl.aids import Aids
from glm5.rl.forward import fixed_logprobs
from glm5.rl.learner import Learner, LearnerConfig
from glm5.rl.losses import PPO
from glm5.rl.packing import micro_batches
from glm5.rl.reference import KL

FEW = 5
"""Positions at once."""


@pytest.fixture(scope="module")
def batch():
    return engine_batch(model=drafting_model())


def learnt(batch, config, logits=None, **options):
    """Values, gradients, and the positions that the head was given at each call; at most `logits` logits at once."""
    learner = Learner(drafting_model(), config, aids=Aids(teachers={"*": speaker_model(1)}), **options)
    if logits is not None:
        learner.passes = dataclasses.replace(learner.passes, logits=logits)
    calls = []
    learner.model.lm_head.register_forward_hook(lambda module, given, out: calls.append(out.shape[:-1].numel()))
    examples = examples_from(batch, advantages=config.advantages)
    before = {}
    values = learner.backward(examples, learner._given(examples, several=config.updates > 1), before)
    grads = {name: p.grad for name, p in learner.model.named_parameters() if p.grad is not None}
    grads |= {} if learner.head is None else {f"critic.{n}": p.grad for n, p in learner.head.named_parameters()}
    return values, grads, before, calls


@pytest.mark.parametrize("options", [
    {"mtp": "frozen"}, {"mtp": "detached", "row_tokens": 40}, {"mtp": "joint", "entropy": 0.1, "kl": KL()},
    {"advantages": "gae", "loss": PPO(), "updates": 2}, {"indexer_weight": 1.0},
    {"lora": LoRA(base="int4", targets=("*.o_proj", "lm_head")), "kl": KL(coefficient=0.1), "entropy": 0.1},
], ids=["plain", "packed", "joint", "critic", "indexers", "lora"])  # fmt: skip
def test_a_piece_at_a_time_is_the_same(batch, options):
    config = LearnerConfig(**options)
    values, grads, before, all_at_once = learnt(batch, config, temperature=0.7)
    again, same_grads, same_before, pieces = learnt(batch, config, FEW * VOCABULARY, temperature=0.7)
    assert max(pieces) == FEW < max(all_at_once)
    assert again == pytest.approx(values, rel=1e-4, abs=1e-6)
    assert grads and grads.keys() == same_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(same_grads[name], grad, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    for one, other in zip(before.values(), same_before.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_only_tokens_that_are_learnt_from_meet_the_head(batch):
    """Once forward and once backward, of the trunk and of each draft step; prompts and padding never."""
    sampled = sum(rollout.num_sampled for rollout in batch.rollouts)
    _, _, _, calls = learnt(batch, LearnerConfig(mtp="frozen"), FEW * VOCABULARY)
    assert sum(calls) == 2 * sampled
    _, _, _, calls = learnt(batch, LearnerConfig(mtp="detached"), FEW * VOCABULARY)
    assert sum(calls) == 4 * sampled  # every prompt is long enough for a draft of its first answer token


def test_what_fits_is_one_piece_and_says_what_all_logits_say(batch):
    config, sampled = LearnerConfig(mtp="frozen"), sum(rollout.num_sampled for rollout in batch.rollouts)
    _, _, before, calls = learnt(batch, config, sampled * VOCABULARY)
    assert calls == [sampled]
    _, _, _, calls = learnt(batch, config, sampled * VOCABULARY - 1)
    assert len(calls) > 1
    (rows,) = micro_batches(examples_from(batch), config.passes)
    with torch.no_grad():
        logits_BTV = drafting_model()(rows.ids_BT, attention=config.attention).logits
    at = rows.sampled
    logprobs_N = logits_BTV.log_softmax(-1)[at.rows_N, at.columns_N, at.targets_N]
    torch.testing.assert_close(torch.cat(list(before.values())), logprobs_N, rtol=1e-5, atol=1e-6)


def test_the_critic_needs_no_head(batch):
    learner = Learner(drafting_model(), LearnerConfig(advantages="gae", mtp="frozen"))
    learner.model.lm_head.register_forward_hook(lambda *_: pytest.fail("the head ran"))
    examples = examples_from(batch, advantages="gae")
    assert learner._given(examples, several=False).critic is not None


def test_long_rows_of_a_teacher_go_through_the_cache_in_chunks(batch, monkeypatch):
    """As they do where all logits are made: without gradients memory holds the activations of one chunk."""
    model, config = speaker_model(), LearnerConfig()
    few = dataclasses.replace(config.passes, logits=FEW * VOCABULARY)
    whole = fixed_logprobs(model, examples_from(batch), few)
    widths = []
    monkeypatch.setattr(transformer, "CHUNK", 6)
    model.model.layers[0].register_forward_hook(lambda module, given, out: widths.append(given[0].shape[1]))
    chunked = fixed_logprobs(model, examples_from(batch), few)
    assert max(widths) == 6 and len(widths) > 1
    for one, other in zip(whole.values(), chunked.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_the_limit_is_in_mebibytes():
    assert LearnerConfig(logits_mib=3).passes.logits * 4 == 3 << 20
    with pytest.raises(ConfigError, match="logits_mib is 0"):
        LearnerConfig(logits_mib=0)
