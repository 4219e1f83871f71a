"""Routing replay (R3): what the sampler's routers chose is recorded, kept, and chosen again by the trainer."""

import asyncio
import copy
import shutil
from dataclasses import replace

import lockstep_runs
import numpy as np
import pytest
import torch
from chosen_experts import ordered, plain
from learning import engine_batch, rollout_of, sampled
from scripted import Chat, brief_model
from speaker import speaker_model, speaker_tokenizer
from tiny import tiny_model

import glm5
from glm5.engine import Engine, ExpertChoices, SamplingParams
from glm5.envs import EpisodeLimits
from glm5.errors import ConfigError, InputError
from glm5.rl.executors import engine_processes
from glm5.rl.fleet import InProcessFleet
from glm5.rl.forward import fixed_logprobs, run
from glm5.rl.gateway.settings import outside
from glm5.rl.head import said_of
from glm5.rl.learner import Learner, LearnerConfig
from glm5.rl.lockstep import train_in_lockstep
from glm5.rl.orchestrator import train_rl
from glm5.rl.packing import examples_of, judged, packed, padded
from glm5.rl.records import Batch, Group, Lesson, Ticket
from glm5.rl.reference import KL
from glm5.rl.replay import batches_of, replay_step
from glm5.rl.rollout_config import RolloutConfig
from glm5.rl.runner import play
from glm5.rl.strict import strict_differences


def deep_model(seed=0):
    """A speaker with two sparse layers."""
    changes = {"vocab_size": 320, "num_hidden_layers": 3, "num_nextn_predict_layers": 0,
               "max_position_embeddings": 512, "eos_token_id": speaker_tokenizer().eos_ids}  # fmt: skip
    return tiny_model(seed, **changes)


def batch_with(batch, *trajectories):
    """The batch's first rollouts with these trajectories, and nothing else."""
    rollouts = [lesson.rollout for lesson in batch.groups[0].lessons]
    lessons = [Lesson(replace(r, trajectories=(t,))) for r, t in zip(rollouts, trajectories, strict=False)]
    return Batch(0, 0, (Group(tuple(lessons)),))


def examples(batch, **options):
    config = LearnerConfig(**options)
    return examples_of(judged(batch, config.advantages), config.normalisation, fixed_length=16, version=batch.version)


# ---- the trainer --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def batch():
    return engine_batch()


def test_what_is_known_is_chosen_and_the_rest_is_chosen_freely(batch):
    model = speaker_model()
    first, second = (lesson.rollout.trajectories[0] for lesson in batch.groups[0].lessons[:2])
    free = plain(model, first.token_ids)
    other = (free + 1) % 8
    known = len(free) // 2
    carrying = replace(first, experts=ExpertChoices.of(0, other[:known].astype(np.uint8)))
    mixed = batch_with(batch, carrying, second)
    some = examples(mixed)
    inputs = len(second.token_ids) - 1
    for rows, places in (
        (padded(some), [(0, 0), (1, 0)]),
        (packed([[some[1], some[0]]]), [(0, inputs), (0, 0)]),
    ):
        [record] = run(model, rows, "sparse", {"router"}).router
        (row, start), (row2, start2) = places
        used = record.experts_BTK[row, start : start + len(other)].sort(-1).values.numpy()
        np.testing.assert_array_equal(used[:known], np.sort(other[:known, 0]))
        assert rows.experts_BTLK[row, start + known : start + len(other)].eq(-1).all()
        alone = record.experts_BTK[row2, start2 : start2 + inputs].sort(-1).values.numpy()
        np.testing.assert_array_equal(alone, plain(model, second.token_ids)[:, 0])
    assert padded(examples(batch)).experts_BTLK is None
    assert Learner(model, LearnerConfig()).step(mixed)["updates"] == 1
    wrong = replace(first, experts=ExpertChoices.of(0, np.zeros((3, 2, 2), np.uint8)))
    with pytest.raises(InputError, match="carry 2 experts of 2 layers, and the model chooses 2 in 1"):
        run(model, padded(examples(batch_with(batch, wrong))), "sparse")


def test_other_policies_route_freely(batch):
    """What a teacher thinks of a token is its own; the policy of before the batch routes as the sampler did."""
    model, config = speaker_model(), LearnerConfig()
    [t] = batch.groups[0].lessons[0].rollout.trajectories
    other = ((plain(model, t.token_ids) + 1) % 8).astype(np.uint8)
    some = examples(batch_with(batch, replace(t, experts=ExpertChoices.of(0, other))))
    bare = examples(batch_with(batch, t))
    [freely], [policy], [teacher] = (
        fixed_logprobs(model, these, config.passes, replay=replay).values()
        for these, replay in ((bare, True), (some, True), (some, False))
    )
    assert torch.equal(teacher, freely) and not torch.allclose(policy, freely, atol=1e-3)
    given = Learner(model, LearnerConfig(kl=KL(), updates=2))._given(some, several=True)
    assert all(torch.equal(value, policy) for value in given.old.values())
    assert all(torch.equal(value, freely) for value in given.reference.values())


def rows_of(trajectory):
    rollout = rollout_of(Ticket("toy", 0), [trajectory], 1.0)
    return padded(examples(Batch(0, 0, (Group((Lesson(rollout),)),)), advantages="none"))


@pytest.mark.parametrize("numerics", ["router noise", "bfloat16"])
def test_a_trainer_of_other_numerics_routes_as_the_sampler_did(numerics):
    """Where its own routers would choose otherwise. The gradient goes through the weights of the replayed experts."""
    model, prompts = deep_model(), [[5 + i, 60, 7 + i, 81, 9] for i in range(8)]
    params = SamplingParams(max_tokens=40, seed=1, ignore_eos=True, experts_from=0)
    outputs = Engine(model, block_size=8).generate(prompts, params)
    trajectories = [replace(sampled(p, o.outputs[0]), experts=o.experts) for p, o in zip(prompts, outputs, strict=True)]
    trainer = copy.deepcopy(model)
    if numerics == "bfloat16":
        trainer = trainer.to(torch.bfloat16)
    else:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for layer in trainer.model.layers[1:]:
                weight = layer.mlp.gate.weight
                weight += 0.02 * torch.randn(weight.shape, generator=generator)

    mismatch, changed = {}, {}
    for replayed in (True, False):
        differences, wrong = [], []
        for t in trajectories:
            rows = rows_of(t if replayed else replace(t, experts=None))
            with torch.no_grad():
                out = run(trainer, rows, "sparse", {"router"})
            used = torch.stack([record.experts_BTK[0] for record in out.router], dim=1).sort(-1).values.numpy()
            wrong.append((used != ordered(t.experts)).any(-1))
            logprobs_N = said_of(trainer, out, rows.sampled, LearnerConfig().passes).logprobs_N
            differences.append((logprobs_N - torch.tensor(t.logprobs[len(prompts[0]) :])).abs())
        mismatch[replayed], changed[replayed] = torch.cat(differences).mean(), np.concatenate(wrong).mean()
    assert changed[True] == 0 < changed[False]
    assert mismatch[True] < mismatch[False]

    out = run(trainer, rows_of(trajectories[0]), "sparse")
    trainer.lm_head(out.states[0]).square().mean().backward()
    for layer in trainer.model.layers[1:]:
        assert layer.mlp.gate.weight.grad.abs().sum() > 0


def test_where_both_choose_the_same_replay_changes_no_gradient():
    model, prompt = deep_model(), [5, 60, 7, 81, 9]
    [output] = Engine(model).generate([prompt], SamplingParams(max_tokens=20, seed=1, ignore_eos=True, experts_from=0))
    trajectory = sampled(prompt, output.outputs[0])
    gradients = []
    for experts in (None, output.experts):
        model.zero_grad()
        rows = rows_of(replace(trajectory, experts=experts))
        at = rows.sampled
        logits_NV = model.lm_head(run(model, rows, "sparse").states[0][at.rows_N, at.columns_N])
        logits_NV.log_softmax(-1)[:, 7].sum().backward()
        gradients.append([layer.mlp.gate.weight.grad.clone() for layer in model.model.layers[1:]])
    for free, replayed in zip(*gradients, strict=True):
        torch.testing.assert_close(replayed, free, rtol=1e-4, atol=1e-6)
        assert free.abs().max() > 1e-3


# ---- episodes and runs --------------------------------------------------------------------------------------------
def test_an_episode_of_several_turns_tells_of_each_token_once():
    engine = Engine(brief_model(), speaker_tokenizer(), strict=True, num_blocks=64, block_size=8)
    environment = Chat({"role": "user", "content": "Again?"}, {"role": "tool", "content": "4"},
                       limits=EpisodeLimits(turns=3))  # fmt: skip
    config, several = RolloutConfig(seed=5, max_tokens=16, replay_experts=True), 0
    for sample in range(12):
        rollout = asyncio.run(play(Ticket("chat", 0, sample=sample), environment, engine, config))
        several += len(rollout.turns) > 1
        for trajectory in rollout.trajectories:
            np.testing.assert_array_equal(ordered(trajectory.experts), plain(engine.model, trajectory.token_ids))
        if len(rollout.trajectories) == 1:
            assert sum(len(turn.experts) for turn in rollout.turns) == len(rollout.trajectories[0].token_ids) - 1
    assert several > 3 and engine.stats().cached_tokens > 0
    silent = asyncio.run(play(Ticket("chat", 0), environment, engine, replace(config, replay_experts=False)))
    assert silent.turns[0].experts is None and silent.trajectories[0].experts is None
    engine.close()


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    directory = tmp_path_factory.mktemp("parent")
    glm5.save_model(brief_model(), directory, speaker_tokenizer())
    return directory


def replaying(parent, steps=4):
    config = lockstep_runs.config_of(parent, steps)
    return replace(config, rollout=replace(config.rollout, replay_experts=True))


def check_run(config, path):
    """Of every trained token the experts are those of the weights that sampled it, and its log-probability too, to the
    bit; counts the tokens and the trajectories in which the weights changed."""
    learner = Learner(glm5.load_model(config.parent, dtype=torch.float32), config.learner)
    snapshots, tokens, swaps = {}, 0, 0
    for batch in batches_of(path / "journal"):
        snapshots[batch.version] = copy.deepcopy(learner.model).eval()
        trajectories = [t for rollout in batch.rollouts for t in rollout.trajectories]
        for found in strict_differences(snapshots.__getitem__, trajectories):
            assert torch.equal(found, torch.zeros_like(found))
        for t in trajectories:
            choices = {v: plain(snapshots[v], t.token_ids) for v in set(t.versions) if v >= 0}
            recorded = ordered(t.experts)
            assert len(recorded) == len(t.token_ids) - 1
            for i in (i for i, counts in enumerate(t.sampled) if counts):
                np.testing.assert_array_equal(recorded[i - 1], choices[t.versions[i]][i - 1])
            tokens, swaps = tokens + t.num_sampled, swaps + (len(choices) > 1)
        learner.step(batch)
    return tokens, swaps


def test_a_deterministic_run_that_lost_half_its_journal(parent, tmp_path):
    config, path = replaying(parent), tmp_path / "run"
    train_in_lockstep(config, [lockstep_runs.chat()], path)
    whole = lockstep_runs.fingerprint(path)
    shutil.rmtree(path / "model")
    for checkpoint in (path / "checkpoints").iterdir():
        shutil.rmtree(checkpoint)
    lines = (path / "journal").read_bytes().splitlines(keepends=True)
    (path / "journal").write_bytes(b"".join(lines[: len(lines) // 2]))
    train_in_lockstep(config, [lockstep_runs.chat()], path, resume=True)
    assert lockstep_runs.fingerprint(path) == whole
    tokens, swaps = check_run(config, path)
    assert tokens > 300 and swaps > 3
    assert replay_step(config, path, 2).same


def test_a_strict_asynchronous_run(parent, tmp_path):
    def strict_fleet(model, tokenizer, version):
        return InProcessFleet([Engine(copy.deepcopy(model), tokenizer, strict=True, num_blocks=64, version=version)])

    config = replaying(parent, steps=3)
    run = train_rl(config, [lockstep_runs.chat()], tmp_path / "run", make_fleet=strict_fleet)
    assert check_run(config, run.path)[0] > 200


def test_engines_in_processes_send_them(parent, tmp_path):
    config = replaying(parent, steps=2)
    fleet = engine_processes(config, 1, strict=True, num_blocks=64)
    run = train_rl(config, [lockstep_runs.chat()], tmp_path / "run", make_fleet=fleet)
    assert check_run(config, run.path)[0] > 100


def test_outside_agents_are_refused(parent):
    with pytest.raises(ConfigError, match="hold no experts"):
        outside(replaying(parent), patience=1.0)
