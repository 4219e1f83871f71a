"""What a resumed run may change: more steps at a constant rate, and nothing of what decides what is learnt."""

import dataclasses
import io
import json
import math
import re
import shutil

import lockstep_runs
import pytest
import torch
from learning import at_version, engine_batch
from rich.console import Console
from scripted import Chat, brief_model
from speaker import speaker_model, speaker_tokenizer

import glm5
from glm5.data import Source, build_corpus, tokenize_corpus
from glm5.envs import Arithmetic, SingleTurn, Sums
from glm5.errors import ConfigError, RunError
from glm5.optim import Schedule
from glm5.rl.adapters import LoRA
from glm5.rl.admission import SchedulerConfig
from glm5.rl.aids import Aids
from glm5.rl.aids_config import AidsConfig, Measured
from glm5.rl.concurrency import ConcurrencyConfig
from glm5.rl.config import RLRunConfig
from glm5.rl.event_log import events_of
from glm5.rl.events import Limited
from glm5.rl.executors import engine_processes, engine_settings, one_engine, parent_engine
from glm5.rl.held_out import HeldOut
from glm5.rl.journal import read_journal
from glm5.rl.learner import Learner, LearnerConfig
from glm5.rl.lockstep import train_in_lockstep
from glm5.rl.losses import IcePop
from glm5.rl.orchestrator import train_rl
from glm5.rl.reference import KL
from glm5.rl.replay import replay_step
from glm5.rl.report import write_rl_report
from glm5.rl.rollout_config import RolloutConfig
from glm5.rl.tasks import Band, TaskSource


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    directory = tmp_path_factory.mktemp("parent")
    glm5.save_model(brief_model(), directory, speaker_tokenizer())
    return directory


def config_of(parent, *, steps=2, scheduler=None, learner=None, **changes):
    return RLRunConfig(
        parent=parent,
        steps=steps,
        rollout=RolloutConfig(max_tokens=5),
        scheduler=SchedulerConfig(**{"groups_per_batch": 2, "group_size": 2, "max_running": 8, **(scheduler or {})}),
        learner=LearnerConfig(**{"rows": 5, **(learner or {})}),
        **changes,
    )


def letters():
    """Rewards that differ between answers."""
    return Chat(reward=lambda said: float(len(said[-1]["content"] or "") % 2))


def test_a_finished_run_is_made_longer(parent, tmp_path):
    run = train_rl(config_of(parent), [letters()], tmp_path / "run")
    first = run.read("metrics")
    assert train_rl(config_of(parent), [letters()], run.path, resume=True).read("metrics") == first
    longer = train_rl(config_of(parent, steps=4), [letters()], run.path, resume=True)
    assert longer.finished and longer.description["config"]["steps"] == 4
    assert longer.read("metrics")[:2] == first and [line["step"] for line in longer.read("metrics")] == [0, 1, 2, 3]
    assert [session["settings"]["steps"] for session in longer.description["sessions"]] == [2, 4]
    before, after = (
        glm5.load_model(run.path / name, dtype=torch.float32).state_dict() for name in ("model-2", "model")
    )
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_a_finished_run_keeps_the_record_of_what_it_was_made_with(parent, tmp_path):
    """Who asks for other measures of it and no more steps gets none, so they are not noted either."""
    run = train_rl(config_of(parent, steps=1), [letters()], tmp_path / "run")
    before = (run.path / "run.json").read_bytes()
    texts = [(str(i), f"The answer to {i} is {i * 7 % 13}.") for i in range(20)]
    source = Source("toy", "python", "CC0-1.0", lambda: iter(texts))
    corpus = build_corpus(tmp_path / "corpus", [source], heldout_per_thousand=500)
    data = tokenize_corpus(corpus, "heldout", speaker_tokenizer(), tmp_path / "data")
    measured = AidsConfig(retention=Measured(heldout=(data.directory,)))
    train_rl(config_of(parent, steps=1, aids=measured), [letters()], run.path, resume=True)
    assert (run.path / "run.json").read_bytes() == before


def test_a_run_is_reopened_at_the_same_step_more_than_once(parent, tmp_path, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    run = train_rl(config_of(parent, steps=1), [letters()], tmp_path / "run")
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr("glm5.rl.orchestrator.open_session", stopped)
            with pytest.raises(KeyboardInterrupt):
                train_rl(config_of(parent, steps=2), [letters()], run.path, resume=True)
        train_rl(config_of(parent, steps=1), [letters()], run.path, resume=True)
    names = sorted(path.name for path in run.path.glob("model*"))
    assert names == ["model", "model-1", "model-1-2"]


def test_what_was_measured_of_a_model_is_not_said_of_the_one_that_learnt_on(parent, tmp_path, monkeypatch):
    def killed(run_directory):
        raise KeyboardInterrupt

    path = tmp_path / "run"
    config = config_of(parent, steps=1, held_out=HeldOut(tasks=2))
    train_rl(config, [letters()], path, held_out=[letters()])
    stale = (path / "retention.json").read_text()
    longer = dataclasses.replace(config, steps=2)
    with monkeypatch.context() as patch:
        patch.setattr("glm5.rl.run_ends.write_rl_report", killed)
        with pytest.raises(KeyboardInterrupt):
            train_rl(longer, [letters()], path, resume=True)  # measures nothing
    assert (path / "model").exists() and not (path / "retention.json").exists()
    train_rl(longer, [letters()], path, resume=True)
    page = (path / "report.html").read_text()
    (path / "retention.json").write_text(stale)
    assert write_rl_report(path).read_text() == page


def test_a_deterministic_run_made_longer_is_the_long_run(parent, tmp_path):
    config = lockstep_runs.config_of(parent)
    whole = lockstep_runs.run(parent, tmp_path / "whole", resume=False)
    path = tmp_path / "short"
    train_in_lockstep(dataclasses.replace(config, steps=2), [lockstep_runs.chat()], path)
    train_in_lockstep(config, [lockstep_runs.chat()], path, resume=True)
    assert lockstep_runs.fingerprint(path) == lockstep_runs.fingerprint(whole.path)


class Counted(Chat):
    """How many of its episodes were open at once, at most."""

    most = 0

    def meet(self, what):
        self.most = max(self.most, self.opened - self.closed)


def test_a_run_that_was_too_much_for_its_machine_goes_on_with_less_at_once(parent, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyError

    path, wide, narrow = tmp_path / "run", Counted(reward=letters().reward), Counted(reward=letters().reward)
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", killed)
        with pytest.raises(KeyError):
            train_rl(config_of(parent), [wide], path)
    assert 2 < wide.most <= 8
    less = config_of(parent, scheduler={"max_running": 3}, concurrency=ConcurrencyConfig(least=1, most=2))
    assert train_rl(less, [narrow], path, resume=True).finished and narrow.most == 2
    more = config_of(parent, steps=3, scheduler={"max_running": 9})
    assert train_rl(more, [wide], path, resume=True).finished
    lines = read_journal(path / "journal")
    limits = [event.max_running for line in lines for event in events_of(line) if isinstance(event, Limited)]
    assert limits[0] == 2 and limits[-1] == 9
    assert replay_step(less, path, 1).same


def test_a_deterministic_run_keeps_how_much_is_under_way(parent, tmp_path):
    run = train_in_lockstep(config_of(parent, steps=1), [letters()], tmp_path / "run")
    with pytest.raises(RunError, match=r"another config.scheduler.max_running \(8, now 2\)"):
        train_in_lockstep(config_of(parent, steps=2, scheduler={"max_running": 2}), [letters()], run.path, resume=True)


def test_settings_that_came_after_a_run_began_are_no_difference_while_they_are_at_their_defaults(parent, tmp_path):
    run = train_rl(config_of(parent), [letters()], tmp_path / "run")
    recorded = dict(run.description)
    del recorded["config"]["recompute"], recorded["config"]["rollout"]["keep_thoughts"]
    (run.path / "run.json").write_text(json.dumps(recorded))
    with pytest.raises(RunError, match=r"another config.recompute \(None, now True\)"):
        train_rl(config_of(parent, recompute=True), [letters()], run.path, resume=True)
    assert train_rl(config_of(parent), [letters()], run.path, resume=True).finished


@pytest.mark.parametrize("train", [train_rl, train_in_lockstep])
def test_a_run_of_the_code_that_recorded_less_goes_on_and_is_replayed(parent, tmp_path, train):
    """Neither the class of the loss nor clock and tasks, nor the settings that came since."""
    source = TaskSource.of(letters(), weight=2.0)
    run = train(config_of(parent), [letters()], tmp_path / "run", sources=[source])
    recorded = dict(run.description)
    learner = recorded["config"]["learner"]
    del learner["loss"]["class"], learner["truncated"], learner["pass_tokens"]
    del recorded["config"]["rollout"]["temperature"], recorded["inputs"]["clock"], recorded["inputs"]["tasks of chat"]
    (run.path / "run.json").write_text(json.dumps(recorded))
    assert replay_step(config_of(parent), run.path, 1).same
    for other, says in (({"loss": IcePop()}, r"learner\.loss\."), ({"truncated": "mask"}, "learner.truncated")):
        with pytest.raises(RunError, match=says):
            replay_step(config_of(parent, learner=other), run.path, 1)
        with pytest.raises(RunError, match=says):
            train(config_of(parent, learner=other), [letters()], run.path, sources=[source], resume=True)
    longer = train(config_of(parent, steps=3), [letters()], run.path, sources=[source], resume=True)
    assert len(longer.read("metrics")) == 3


def test_a_batch_without_a_finite_gradient_is_left_out_by_a_resumed_run(parent, tmp_path, monkeypatch):
    def clipped(learner):
        found = clip(learner)
        return found | {"grad_norm": math.nan} if learner.version == 1 else found

    clip = Learner._clip
    monkeypatch.setattr(Learner, "_clip", clipped)
    with pytest.raises(RunError, match=r"grad_norm is nan in batch 1.*resume with on_trouble='skip'"):
        train_rl(config_of(parent), [letters()], tmp_path / "run")
    skipping = config_of(parent, learner={"on_trouble": "skip"})
    run = train_rl(skipping, [letters()], tmp_path / "run", resume=True)
    assert [line["skipped_updates"] for line in run.read("metrics")] == [0, 1]


def test_a_run_whose_batch_took_too_much_memory_goes_on_with_smaller_passes(parent, tmp_path, monkeypatch):
    def passed(learner, *given):
        if learner.version == 1 and learner.passes.tokens > 64:
            raise MemoryError
        return backward(learner, *given)

    backward = Learner.backward
    monkeypatch.setattr(Learner, "backward", passed)
    with pytest.raises(MemoryError):
        train_rl(config_of(parent), [letters()], tmp_path / "run")
    smaller = config_of(parent, learner={"pass_tokens": 64, "logits_mib": 1})
    assert len(train_rl(smaller, [letters()], tmp_path / "run", resume=True).read("metrics")) == 2


def test_a_falling_rate_keeps_its_steps(parent, tmp_path):
    falling = {"learner": {"schedule": Schedule(shape="linear")}}
    run = train_rl(config_of(parent, **falling), [letters()], tmp_path / "run")
    with pytest.raises(RunError, match=r"for 2 steps with a linear rate.*with 3 every step.*new run"):
        train_rl(config_of(parent, steps=3, **falling), [letters()], run.path, resume=True)
    assert run.finished
    assert replay_step(config_of(parent, steps=9, **falling), run.path, 1).same  # the rate is that of the run's steps


def test_how_environments_take_part_is_part_of_the_run(parent, tmp_path):
    source = TaskSource.of(letters(), weight=2.0, band=Band())
    run = train_rl(config_of(parent), [letters()], tmp_path / "run", sources=[source])
    for other, says in (
        (None, r"tasks of chat \('weight=2.0, band=Band.*now 'as by default'"),
        ([dataclasses.replace(source, uniform_groups="keep")], "uniform_groups=keep"),
    ):
        with pytest.raises(RunError, match=says):
            train_rl(config_of(parent), [letters()], run.path, sources=other, resume=True)
    assert train_rl(config_of(parent), [letters()], run.path, sources=[source], resume=True).finished


def test_what_a_resumed_run_learns_from_again_is_said(parent, tmp_path):
    run = train_in_lockstep(config_of(parent), [letters()], tmp_path / "run")
    for part in ("model", "checkpoints"):  # as if killed before there was one
        shutil.rmtree(run.path / part)
    console = Console(file=io.StringIO(), width=200)
    train_in_lockstep(config_of(parent), [letters()], run.path, resume=True, console=console)
    assert "steps 1 to 2 are learnt from again, from the journal" in console.file.getvalue()


def test_the_clock_is_part_of_the_run(parent, tmp_path):
    train_in_lockstep(config_of(parent), [letters()], tmp_path / "exact")
    with pytest.raises(RunError, match=r"another inputs.clock \('deterministic', now 'real'\)"):
        train_rl(config_of(parent), [letters()], tmp_path / "exact", resume=True)


@pytest.mark.parametrize("kind", ["grpo", "dr-grpo", "rloo", "reinforce++-baseline"])
def test_groups_of_one_that_teach_nothing_are_refused(parent, tmp_path, kind):
    config = config_of(parent, scheduler={"group_size": 1}, learner={"advantages": kind})
    with pytest.raises(ConfigError, match=f"{re.escape(kind)} compares.*larger groups"):
        train_rl(config, [letters()], tmp_path / "run")
    assert not (tmp_path / "run").exists()
    config.check_learning(taught=True, replayed=False, drafting=False)
    held = config_of(parent, scheduler={"group_size": 1}, learner={"advantages": kind, "kl": KL()})
    held.check_learning(taught=False, replayed=False, drafting=False)


def test_an_environment_without_a_source_is_refused(parent, tmp_path):
    environments = [SingleTurn(Sums()), SingleTurn(Arithmetic())]
    with pytest.raises(ConfigError, match=r"No task source names arithmetic/.* none of its tasks would be played"):
        train_rl(config_of(parent), environments, tmp_path / "run", sources=[TaskSource.of(environments[0])])
    assert not (tmp_path / "run").exists()


def test_runs_in_which_nothing_moves_the_policy_are_refused(parent, tmp_path):
    nothing = config_of(parent, learner={"advantages": "none", "mtp": "frozen"})
    with pytest.raises(ConfigError, match=r"advantages none the policy learns from teachers.*none of them"):
        train_rl(nothing, [letters()], tmp_path / "run")
    held = config_of(parent, aids=AidsConfig(reference=parent))
    with pytest.raises(ConfigError, match=r"there is no learner\.kl; give it"):
        train_rl(held, [letters()], tmp_path / "run")
    assert not (tmp_path / "run").exists()
    for some, drafting in (({"kl": KL()}, False), ({"entropy": 0.1}, False), ({}, True), ({"mtp": "joint"}, True)):
        learnt = config_of(parent, learner={"advantages": "none", **some})
        learnt.check_learning(taught=False, replayed=False, drafting=drafting)
    frozen = config_of(parent, learner={"advantages": "none", "mtp": "frozen"})
    with pytest.raises(ConfigError, match="advantages none"):
        frozen.check_learning(taught=False, replayed=False, drafting=True)
    nothing.check_learning(taught=True, replayed=False, drafting=False)
    nothing.check_learning(taught=False, replayed=True, drafting=False)


def test_groups_of_one_learn_from_a_teacher_and_from_a_batch(parent, tmp_path):
    one = {"scheduler": {"group_size": 1}}
    teacher = Aids(teachers={"*": speaker_model(1)})
    run = train_rl(config_of(parent, steps=1, **one), [letters()], tmp_path / "taught", aids=teacher)
    assert run.read("metrics")[0]["grad_norm"] > 0
    config = config_of(parent, steps=1, learner={"advantages": "reinforce++"}, scheduler={"group_size": 1})
    assert train_rl(config, [letters()], tmp_path / "batch").finished


def test_engines_have_a_place_for_every_rollout_that_the_concurrency_control_allows(parent):
    config = config_of(parent, concurrency=ConcurrencyConfig(least=1, most=24))
    assert engine_settings(config)["max_num_seqs"] == 24 and engine_settings(config_of(parent))["max_num_seqs"] == 8
    [engine] = one_engine(config)(speaker_model(), speaker_tokenizer(), 0).engines.values()
    fleet = engine_processes(config, 1)(speaker_model(), speaker_tokenizer(), 0)
    there = fleet._executor.build()
    assert [e._core.scheduler.max_num_seqs for e in (engine, there)] == [24, 24]
    engine.close(), there.close()


@pytest.mark.parametrize("sync", ["merged", "adapters"])
def test_an_engine_elsewhere_begins_with_the_rounded_weights_that_the_learner_has(parent, sync):
    lora = LoRA(rank=2, base="int4", sync=sync)
    learner = Learner(glm5.load_model(parent, dtype=torch.float32), LearnerConfig(lora=lora))
    ours = learner.engine_model().state_dict()
    engine = parent_engine(parent, lora, num_blocks=8)
    theirs = engine.model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    if sync == "merged":
        whole = glm5.load_model(parent, dtype=torch.float32).state_dict()
        assert any(not torch.equal(tensor, theirs[name]) for name, tensor in whole.items())
    engine.close()


def test_moments_are_forgotten_at_the_versions_that_engines_take():
    learner = Learner(speaker_model(), LearnerConfig(reset_optimizer=True), publish_every=2)
    batch, held = engine_batch(), []
    for version in range(4):
        learner.step(at_version(batch, version))
        held.append(any(optimizer.state for optimizer in learner.optimizers))
    assert held == [True, False, True, False]
