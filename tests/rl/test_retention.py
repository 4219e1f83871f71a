"""What is measured during a run, when, and how forgetting is read off its metrics."""

import copy
import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from held_texts import text_of
from learning import engine_batch, rollout_of
from lockstep_runs import chat
from speaker import speaker_model, speaker_tokenizer

import glm5
from glm5.data import Loader
from glm5.data.world import build_world
from glm5.engine import SamplingParams
from glm5.errors import ConfigError
from glm5.evals.skills import SkillsConfig
from glm5.optim import OptimizerConfig
from glm5.rl.aids import Aids, open_aids
from glm5.rl.aids_config import AidsConfig, Measured
from glm5.rl.config import RLRunConfig
from glm5.rl.learner import Learner, LearnerConfig
from glm5.rl.records import Batch, Group, Lesson
from glm5.rl.reference import KL
from glm5.rl.retention import Retention, bits_per_byte, forgetting, skills
from glm5.rl.run_ends import started_run
from glm5.train.evaluate import evaluate_bits_per_byte
from glm5.train.losses import language_loss
from glm5.train.recorded import RunChanged


@pytest.fixture(scope="module")
def heldout(tmp_path_factory):
    return text_of(tmp_path_factory.mktemp("text"), "fox")


def test_values_join_the_metrics_and_the_model_stays_as_it_was(heldout):
    asked = SkillsConfig(facts=2, sums=2, tools=2, unknown=2, max_tokens=2)
    retention = Retention((bits_per_byte(heldout, "toy"), skills(speaker_tokenizer(), build_world(), asked)), every=5)
    assert [version for version in range(12) if retention.due(version)] == [0, 5, 10]
    model = speaker_model(positions=2048).train()
    values = retention.measure(model)
    expected = evaluate_bits_per_byte(speaker_model(positions=2048), heldout, attention="sparse").bits_per_byte
    assert values["retention/toy/bits_per_byte"] == pytest.approx(expected)
    assert values["retention/sums, unseen numbers"] == 0 and "retention/stops by itself" in values
    assert model.training and torch.is_grad_enabled()


@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_skills_are_asked_under_the_attention_of_the_run(attention, monkeypatch):
    """The indexers of a model before its sparse stage choose at random."""
    said, prompt = [], [*range(5, 45)]

    def asked(engine, world, config):
        said.extend(engine.generate([prompt], [SamplingParams(max_tokens=1, temperature=1.0)])[0].outputs[0].logprobs)
        return SimpleNamespace(skills=()), []

    monkeypatch.setattr("glm5.rl.retention.evaluate_skills", asked)
    monkeypatch.setattr("glm5.rl.aids.open_world", lambda path: build_world())
    aids = open_aids(AidsConfig(retention=Measured(world=Path("world"))), speaker_tokenizer(), attention=attention)
    model = speaker_model()
    aids.measured(model, None)
    expected = {
        kind: model(torch.tensor([prompt]), attention=kind).logits[0, -1].log_softmax(-1)
        for kind in ("dense", "sparse")
    }
    near = {kind: (logprobs_V - said[0]).abs().min().item() < 1e-5 for kind, logprobs_V in expected.items()}
    assert near == {kind: kind == attention for kind in near}


def test_forgetting_is_how_much_worse_the_end_is():
    lines = [
        {"retention/toy/bits_per_byte": 1.5, "retention/sums": 0.75, "reward": 0.1},
        {"reward": 0.2},
        {"retention/toy/bits_per_byte": 1.75, "retention/sums": 0.875},
    ]
    assert forgetting(lines) == {"toy/bits_per_byte": 0.25, "sums": -0.125}
    assert forgetting([{"reward": 1.0}]) == {}


def test_nothing_to_measure_is_refused():
    with pytest.raises(ConfigError, match="something to measure"):
        Retention(())


def test_a_resumed_run_may_be_measured_by_others(heldout, tmp_path):
    glm5.save_model(speaker_model(), tmp_path / "parent", speaker_tokenizer())
    plain, run = RLRunConfig(parent=tmp_path / "parent"), tmp_path / "run"
    measured = dataclasses.replace(plain, aids=AidsConfig(retention=Measured(heldout=(heldout.directory,))))
    for config, known in ((plain, False), (measured, True), (plain, False)):
        with started_run(config, [chat()], run, resume=True) as found:
            assert ("heldout heldout" in found.description["inputs"]) == known
    other = dataclasses.replace(measured, aids=AidsConfig(reference=tmp_path / "parent"))
    with pytest.raises(RunChanged, match="reference"), started_run(other, [chat()], run, resume=True):
        pass


def taught(heldout, steps=80):
    """A model that has read the text, and its batches."""
    model, loader = speaker_model(positions=2048), Loader(heldout, rows=4, length=24, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        language_loss(model, loader.batch(step), attention="sparse").total.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, loader


def test_replay_and_kl_each_hold_what_would_be_forgotten(heldout):
    """The policy is driven to one letter, by rewards that have nothing to do with the text."""
    model, loader = taught(heldout)
    base, end = LearnerConfig(optimizer=OptimizerConfig(name="adamw", lr=3e-3, weight_decay=0.0)), {}
    for name, config, aids in (
        ("nothing", base, Aids()), ("replay", base, Aids(replay=loader)),
        ("kl", dataclasses.replace(base, kl=KL(coefficient=0.5)), Aids()),
    ):  # fmt: skip
        aids = dataclasses.replace(aids, retention=Retention((bits_per_byte(heldout, "toy"),), every=12))
        learner = Learner(copy.deepcopy(model), config, aids=aids)
        lines = []
        for version in range(13):
            batch = engine_batch(((0.0,) * 6,) * 2, version=version, model=copy.deepcopy(learner.model))
            lines.append(learner.step(Batch(version, version, tuple(map(scored, batch.groups)))))
        end[name] = forgetting(lines)["toy/bits_per_byte"], lines[-1]["reward"] - lines[0]["reward"]
    assert all(gained > 0 for _, gained in end.values()), end
    assert end["nothing"][0] > 0.5 and max(end["replay"][0], end["kl"][0]) < 0.5 * end["nothing"][0], end


def scored(group):
    """Reward: the share of tokens that are one of the first 150."""
    lessons = []
    for lesson in group.lessons:
        [t] = lesson.rollout.trajectories
        said = [token for token, counts in zip(t.token_ids, t.sampled, strict=True) if counts]
        lessons.append(Lesson(rollout_of(lesson.rollout.ticket, [t], sum(token < 150 for token in said) / len(said))))
    return Group(tuple(lessons))
