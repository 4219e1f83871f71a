"""The learner: equal to the plain update to the bit, and indifferent to rows, packing and order."""

import dataclasses
import math

import pytest
import torch
from learning import at_version, engine_batch, examples_from, rollout_of, task_of
from speaker import speaker_model

from glm5.engine import CompletionOutput
from glm5.errors import ConfigError, InputError, RunError
from glm5.optim import Schedule, build_optimizers
from glm5.rl.advantages import group_advantages
from glm5.rl.learner import Learner, LearnerConfig
from glm5.rl.losses import DDIS, IcePop
from glm5.rl.objective import Given, mismatch
from glm5.rl.packing import examples_of, judged
from glm5.rl.plain.records import Sample
from glm5.rl.plain.update import Lesson as PlainLesson
from glm5.rl.plain.update import backward
from glm5.rl.records import Batch, Group, Lesson, Ticket, Trajectory
from glm5.rl.reference import KL


@pytest.fixture(scope="module")
def batch():
    return engine_batch()


def plain_lesson(lesson, advantage):
    """The same answer as the plain loop knows it."""
    [t] = lesson.rollout.trajectories
    first = t.sampled.index(True)
    completion = CompletionOutput(
        0, t.token_ids[first:], "", t.logprobs[first:], (), t.versions[first:], "stop", None, 0
    )
    return PlainLesson(Sample(task_of(0), t.token_ids[:first], completion, lesson.rollout.reward, "ok"), advantage)


def gradients(learner, batch):
    """Of one step, before clipping can matter; the weights do not move."""
    examples = examples_of(
        judged(batch, learner.config.advantages), learner.config.normalisation, fixed_length=16, version=batch.version
    )
    learner.backward(examples, Given())
    found = {n: p.grad.clone() for n, p in learner.model.named_parameters() if p.grad is not None}
    learner.model.zero_grad(set_to_none=True)
    return found


def assert_same(one, other, **tolerance):
    assert one.keys() == other.keys() and one
    for name, grad in one.items():
        torch.testing.assert_close(grad, other[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.mark.parametrize("rows", [3, 64])
@pytest.mark.parametrize("normalisation", ["sequence-mean", "token-mean"])
def test_a_synchronous_step_equals_the_plain_update_to_the_bit(batch, rows, normalisation):
    config = LearnerConfig(loss=IcePop(), normalisation=normalisation, rows=rows)
    learner, model = Learner(speaker_model(), config), speaker_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".indexer." not in name)
    optimizers = build_optimizers(model, model.config, config.optimizer)
    lessons = [
        plain_lesson(lesson, advantage)
        for group in batch.groups
        for lesson, advantage in zip(group.lessons, group_advantages(group.rewards), strict=True)
    ]
    for version in range(3):
        values = learner.step(dataclasses.replace(batch, version=version))
        theirs = backward(model, lessons, IcePop(), normalisation=normalisation, attention="sparse", rows=rows)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert {name: values[name] for name in theirs} == theirs and values["grad_norm"] == norm > 0
    weights = learner.weights()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert learner.version == 3


@pytest.mark.parametrize("loss", [DDIS(), IcePop()])
def test_rows_packing_and_order_do_not_matter(batch, loss):
    whole = gradients(Learner(speaker_model(), LearnerConfig(loss=loss)), batch)
    shuffled = Batch(0, 0, tuple(Group(tuple(reversed(group.lessons))) for group in reversed(batch.groups)))
    for config in (
        LearnerConfig(loss=loss, rows=1), LearnerConfig(loss=loss, rows=3), LearnerConfig(loss=loss, row_tokens=40),
        LearnerConfig(loss=loss, row_tokens=60, rows=2), LearnerConfig(loss=loss, row_tokens=1),
        LearnerConfig(loss=loss, pass_tokens=50), LearnerConfig(loss=loss, pass_tokens=90, row_tokens=40),
    ):  # fmt: skip
        assert_same(gradients(Learner(speaker_model(), config), batch), whole, atol=1e-5, rtol=1e-3)
        assert_same(gradients(Learner(speaker_model(), config), shuffled), whole, atol=1e-5, rtol=1e-3)


def test_a_repeat_is_a_weight(batch):
    first, *others = batch.groups[0].lessons
    repeated = Batch(0, 0, (Group((Lesson(first.rollout, 3), *others)),))
    written_out = Batch(0, 0, (Group((first, first, first, *others)),))
    for normalisation in ("sequence-mean", "token-mean", "fixed-length"):
        config = LearnerConfig(normalisation=normalisation)
        one, other = (gradients(Learner(speaker_model(), config), b) for b in (repeated, written_out))
        assert_same(one, other, atol=1e-5, rtol=1e-3)


def split(t, at):
    """The trajectory as two: the first ends before `at`, the second trains only what comes from there on."""
    head = Trajectory(t.token_ids[:at], t.sampled[:at], t.logprobs[:at], t.versions[:at])
    return [head, replaced(t, lambda i: i >= at)]


def replaced(t, kept):
    """The trajectory with only the sampled tokens that are `kept` by index."""
    flags = tuple(s and kept(i) for i, s in enumerate(t.sampled))
    return Trajectory(
        t.token_ids,
        flags,
        tuple(x if f else 0.0 for x, f in zip(t.logprobs, flags, strict=True)),
        tuple(x if f else -1 for x, f in zip(t.versions, flags, strict=True)),
    )


def test_with_fan_out_each_sampled_token_counts_once_and_a_rollout_weighs_as_before(batch):
    groups = []
    for group in batch.groups:
        lessons = []
        for lesson in group.lessons:
            [t] = lesson.rollout.trajectories
            last = len(t.token_ids) - 1
            pieces = split(t, last) if lesson.rollout.num_sampled > 1 else [t]
            lessons.append(Lesson(dataclasses.replace(lesson.rollout, trajectories=tuple(pieces))))
        groups.append(Group(tuple(lessons)))
    fanned = Batch(0, 0, tuple(groups))
    examples = examples_of(judged(fanned, "grpo"), "sequence-mean", fixed_length=16, version=0)
    assert len(examples) > 8 and sum(len(e.sampled) for e in examples) == sum(r.num_sampled for r in batch.rollouts)
    assert sum(e.weight * len(e.sampled) for e in examples) == pytest.approx(1)
    for normalisation in ("sequence-mean", "token-mean", "fixed-length"):
        config = LearnerConfig(normalisation=normalisation)
        one, other = (gradients(Learner(speaker_model(), config), b) for b in (fanned, batch))
        assert_same(one, other, atol=1e-5, rtol=1e-3)


def test_several_updates_of_a_batch_share_its_old_policy(batch):
    learner = Learner(speaker_model(), LearnerConfig(loss=IcePop(), updates=2))
    values = learner.step(batch)
    assert learner.version == 1 and values["mismatch"] < 1e-5  # the sampler's weights are those before the batch
    once = Learner(speaker_model(), LearnerConfig(loss=IcePop()))
    once.step(batch)
    other = once.weights()
    assert any(not torch.equal(tensor, other[name]) for name, tensor in learner.weights().items())


def test_a_reset_optimiser_has_forgotten_everything(batch):
    learner = Learner(speaker_model(), LearnerConfig(reset_optimizer=True))
    learner.step(batch)
    assert all(not optimizer.state for optimizer in learner.optimizers)
    fresh = Learner(speaker_model(), LearnerConfig())
    fresh.model.load_state_dict(learner.weights())
    fresh.version = 1
    second = dataclasses.replace(batch, version=1)
    learner.step(second)
    fresh.step(second)
    kept = Learner(speaker_model(), LearnerConfig())
    kept.step(batch)
    kept.step(second)
    same, other = fresh.weights(), kept.weights()
    assert all(torch.equal(tensor, same[name]) for name, tensor in learner.weights().items())
    assert any(not torch.equal(tensor, other[name]) for name, tensor in learner.weights().items())


def test_a_critic_keeps_its_moments(batch):
    """A reset forgets those of the policy: it is the engines' weights that changed, and no value."""
    learner = Learner(speaker_model(), LearnerConfig(reset_optimizer=True, advantages="gae"))
    learner.step(batch)
    kept = {id(p) for optimizer in learner.optimizers for p in optimizer.state}
    assert kept == {id(p) for p in learner.head.parameters()}


def test_a_batch_of_nothing_has_no_reward():
    values = Learner(speaker_model(), LearnerConfig()).step(Batch(0, 0, ()))
    assert "reward" not in values and values["rollouts"] == 0


def test_the_rate_follows_the_schedule_of_the_run_and_not_how_it_was_resumed(batch):
    def rate_behind(version):
        falling = LearnerConfig(schedule=Schedule(shape="linear", warmup_steps=1, final_fraction=0.1))
        learner = Learner(speaker_model(), falling, version=version, steps=4)
        before = {name: tensor.clone() for name, tensor in learner.weights().items()}
        values = learner.step(dataclasses.replace(batch, version=version))
        moved = max((tensor - before[name]).abs().max().item() for name, tensor in learner.weights().items())
        return values["lr"], moved

    rates, moves = zip(*(rate_behind(version) for version in range(4)), strict=True)
    assert rates == pytest.approx((0.5e-4, 1e-4, 0.55e-4, 0.1e-4))
    assert moves == pytest.approx(rates, rel=0.05)  # the first update of AdamW moves a weight by the rate
    with pytest.raises(ConfigError, match="linear schedule needs the number of steps"):
        Learner(speaker_model(), LearnerConfig(schedule=Schedule(shape="linear")))


def test_a_loss_that_is_not_finite_stops_or_skips_before_the_weights_change(batch):
    def learner_of(**options):
        learner = Learner(speaker_model(), LearnerConfig(**options))
        with torch.no_grad():
            learner.model.lm_head.weight[0, 0] = math.nan
        return learner, {name: tensor.clone() for name, tensor in learner.weights().items()}

    learner, before = learner_of()
    with pytest.raises(RunError, match=r"(loss|grad_norm) is nan in batch 0, before it changed the weights"):
        learner.step(batch)
    skipping, _ = learner_of(on_trouble="skip")
    assert skipping.step(batch)["skipped_updates"] == 1
    assert skipping.version == 1 and not skipping.optimizers[0].state
    for one in (learner, skipping):
        assert all(torch.equal(t.nan_to_num(7), before[n].nan_to_num(7)) for n, t in one.weights().items())


def test_trouble_in_a_later_update_is_told_of_that_update(batch):
    learner = Learner(speaker_model(), LearnerConfig(updates=2))
    losses = iter((0.0, math.nan))
    learner.backward = lambda examples, given, before: {"loss": next(losses)}
    with pytest.raises(RunError, match="loss is nan in update 2 of batch 0, before it changed the weights"):
        learner.step(batch)


def test_rewards_without_a_mean_are_told_by_their_rollout():
    """As an older journal may hold them."""
    batch = engine_batch(((1.7e308, 1.7e307), (1.0, 0.0)))
    worst = next(rollout for rollout in batch.rollouts if rollout.reward.value == 1.7e308)
    learner = Learner(speaker_model(), LearnerConfig())
    with pytest.raises(RunError, match=rf"of batch 0 cannot be compared .*the one of {worst.id} is 1\.7e\+308"):
        learner.step(batch)
    assert learner.version == 0


def test_wrong_batches_are_refused(batch):
    learner = Learner(speaker_model(), LearnerConfig(), version=1)
    with pytest.raises(InputError, match="batch is of version 0 and the learner at version 1"):
        learner.step(batch)
    newer = engine_batch(((1.0, 0.0),), version=4)
    with pytest.raises(InputError, match="token of version 4"):
        learner.step(dataclasses.replace(newer, version=1))


def test_metrics_say_what_was_learnt_from():
    batch = dataclasses.replace(engine_batch(version=3), version=5, step=5)
    values = Learner(speaker_model(), LearnerConfig(), version=5).step(batch)
    assert not [name for name in values if name.startswith("mismatch_")]  # what is stale says nothing about it
    assert values["max_staleness"] == values["staleness"] == 2 and values["reward"] == 3 / 8
    assert values["trained_tokens"] == sum(r.num_sampled for r in batch.rollouts) and values["rollouts"] == 8


def test_the_mismatch_of_fresh_tokens_has_a_distribution(batch):
    values = Learner(speaker_model(), LearnerConfig(rows=3)).step(batch)
    assert 0 <= values["mismatch_median"] <= values["mismatch_p99"] <= values["mismatch_max"] < 1e-4
    some = examples_from(batch)
    gaps = iter(range(54))
    before = {id(e.trajectory): torch.tensor([e.trajectory.logprobs[i] + next(gaps) for i in e.sampled]) for e in some}
    expected = {"mismatch_median": 26, "mismatch_p99": 53, "mismatch_max": 53}
    assert mismatch(some, before) == pytest.approx(expected, abs=1e-4)


def test_the_mismatch_of_several_updates_is_that_of_the_batch(batch):
    """Also where only some of them have fresh tokens."""
    stale, fresh = at_version(batch, 2).groups
    fresh = Group(tuple(
        Lesson(dataclasses.replace(lesson.rollout, trajectories=tuple(
            dataclasses.replace(t, versions=tuple(2 if s else -1 for s in t.sampled))
            for t in lesson.rollout.trajectories
        )))
        for lesson in fresh.lessons
    ))  # fmt: skip
    found = []
    for updates in (1, 2):
        model = speaker_model()
        with torch.no_grad():
            model.lm_head.weight.mul_(1.05)
        values = Learner(model, LearnerConfig(updates=updates), version=2).step(Batch(2, 2, (stale, fresh)))
        found.append({name: value for name, value in values.items() if name.startswith("mismatch_")})
    assert found[0]["mismatch_median"] > 1e-3
    assert found[1] == pytest.approx(found[0], rel=1e-3)


def test_figures_are_means_whatever_the_normalisation(batch):
    """Of "fixed-length" the weights add up to what the answers are of that length, and no mean is smaller for it."""
    config = LearnerConfig(normalisation="fixed-length", fixed_length=10_000, entropy=1e-9, kl=KL(coefficient=1e-9))
    values = Learner(speaker_model(), config).step(batch)
    flat = Learner(speaker_model(), dataclasses.replace(config, normalisation="token-mean")).step(batch)
    for name in ("ratio", "surprise", "mismatch", "entropy", "kept_ratio"):
        assert values[name] == pytest.approx(flat[name], rel=1e-4), name
    assert values["ratio"] == pytest.approx(1, abs=1e-3)
    assert abs(values["loss"]) < 0.01 * abs(flat["loss"]) > 0  # that is what is minimised


@pytest.mark.parametrize(("field", "value"), [
    ("rows", 0), ("updates", 0), ("clip_norm", 0), ("advantages", "gpro"), ("normalisation", "mean"),
    ("attention", "spares"), ("on_trouble", "go on"), ("row_tokens", 0), ("fixed_length", 0),
])  # fmt: skip
def test_wrong_settings_are_refused(field, value):
    with pytest.raises(ConfigError, match=f"{field} is {value!r}"):
        LearnerConfig(**{field: value})


def test_a_rollout_without_tokens_counts_in_the_baseline_only(batch):
    silent = rollout_of(Ticket("toy", 0, sample=9), [], 1.0)
    group = Group((*batch.groups[0].lessons, Lesson(silent)))
    lessons = judged(Batch(0, 0, (group,)), "dr-grpo")
    assert len(lessons) == 4 and lessons[0].advantage == pytest.approx(1 - 3 / 5)
