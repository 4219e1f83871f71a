"""A policy that samples at another temperature: what engines report, what is learnt, and that both are the same."""

import copy

import pytest
import torch
from learning import drafting_model, engine_batch, examples_from
from scripted import Chat, brief_model
from speaker import speaker_model, speaker_tokenizer

import glm5
from glm5.engine import Engine, SamplingParams
from glm5.engine.strict import packed_strict_logprobs
from glm5.errors import ConfigError
from glm5.rl.admission import SchedulerConfig
from glm5.rl.config import RLRunConfig
from glm5.rl.event_log import events_of
from glm5.rl.executors import engine_servers
from glm5.rl.fleet import InProcessFleet
from glm5.rl.gateway.settings import outside
from glm5.rl.journal import read_journal
from glm5.rl.learner import Learner, LearnerConfig
from glm5.rl.orchestrator import train_rl
from glm5.rl.reference import KL
from glm5.rl.replay import replay_step
from glm5.rl.rollout_config import RolloutConfig
from glm5.rl.strict import strict_differences

HALF = 0.5


@pytest.mark.parametrize("drafts", [0, 1])
def test_engines_report_the_distribution_that_they_sample(drafts):
    model = drafting_model() if drafts else speaker_model()
    engine = Engine(model, speaker_tokenizer(), strict=True, num_blocks=32, num_speculative_tokens=drafts)
    params = SamplingParams(temperature=HALF, max_tokens=12, seed=1, ignore_eos=True)
    [own] = engine.generate([[5, 6, 7]], params)
    [tempered] = engine.generate([[5, 6, 7]], SamplingParams(**{**vars(params), "tempered_logprobs": True}))
    assert own.outputs[0].token_ids == tempered.outputs[0].token_ids
    ids = [5, 6, 7, *own.outputs[0].token_ids]
    for output, temperature in ((own, 1.0), (tempered, HALF)):
        [expected] = packed_strict_logprobs(model, [ids], temperature=temperature)
        assert list(output.outputs[0].logprobs) == expected[2:].tolist()
    logits_TV = model(torch.tensor([ids[:-1]])).logits[0, 2:]
    halved = (logits_TV / HALF).log_softmax(-1)[range(12), ids[3:]]
    torch.testing.assert_close(torch.tensor(tempered.outputs[0].logprobs), halved, rtol=1e-4, atol=1e-5)
    engine.close()


@pytest.mark.parametrize("mtp", ["frozen", "detached", "joint"])
def test_learning_at_a_temperature_is_learning_with_a_scaled_head(mtp):
    """Logits divided by T are those of a model whose last matrix is divided by T; those of drafts, which are sampled
    at the same temperature, too."""
    options = {"kl": KL(coefficient=0.1), "entropy": 0.05, "mtp": mtp}
    examples = examples_from(engine_batch(model=drafting_model()))
    tempered = Learner(drafting_model(), LearnerConfig(**options), temperature=HALF)
    scaled_model = drafting_model()
    with torch.no_grad():
        scaled_model.lm_head.weight /= HALF
    scaled = Learner(scaled_model, LearnerConfig(**options))
    ours, theirs = ({}, {})
    values = [
        learner.backward(examples, learner._given(examples, several=False), seen)
        for learner, seen in ((tempered, ours), (scaled, theirs))
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-4, abs=1e-6)
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in ours) and ours
    for (name, one), (_, other) in zip(tempered.model.named_parameters(), scaled.model.named_parameters(), strict=True):
        if one.grad is not None:
            expected = other.grad / HALF if name == "lm_head.weight" else other.grad
            torch.testing.assert_close(one.grad, expected, rtol=1e-3, atol=1e-5, msg=name)


def test_sampler_and_trainer_of_a_run_are_the_same_to_the_bit(tmp_path):
    glm5.save_model(brief_model(), tmp_path / "parent", speaker_tokenizer())
    config = RLRunConfig(
        parent=tmp_path / "parent", steps=2, rollout=RolloutConfig(max_tokens=8, temperature=HALF),
        scheduler=SchedulerConfig(mode="sync", groups_per_batch=2, group_size=3, max_running=8),
        learner=LearnerConfig(rows=8),
    )  # fmt: skip

    def strict(model, tokenizer, version):
        return InProcessFleet([Engine(copy.deepcopy(model), tokenizer, strict=True, num_blocks=64, version=version)])

    env = Chat(reward=lambda said: len(said[-1]["content"] or "") / 10)
    run = train_rl(config, [env], tmp_path / "run", make_fleet=strict)
    assert all(line["mismatch_max"] < 1e-5 for line in run.read("metrics"))
    assert replay_step(config, run.path, 1).same
    finished = [e.rollout for r in read_journal(run.path / "journal") for e in events_of(r) if e.kind == "finished"]
    first = [t for rollout in finished for t in rollout.trajectories if set(t.versions) <= {-1, 0}]
    parent = glm5.load_model(tmp_path / "parent", dtype=torch.float32)
    differ = {
        at: max(d.abs().max().item() for d in strict_differences(lambda version: parent, first, temperature=at))
        for at in (HALF, 1.0)
    }
    assert first and differ[HALF] == 0.0 < 0.1 < differ[1.0]


def test_where_log_probabilities_are_of_temperature_1_another_is_refused(tmp_path):
    config = RLRunConfig(parent=tmp_path, rollout=RolloutConfig(temperature=HALF))
    with pytest.raises(ConfigError, match="temperature 1"):
        outside(config, patience=1.0)
    with pytest.raises(ConfigError, match="temperature 1"):
        engine_servers(config, ["http://127.0.0.1:9"], tmp_path, tmp_path)
    with pytest.raises(ConfigError, match="temperature"):
        RolloutConfig(temperature=0.0)
