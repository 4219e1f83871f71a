"""What a run may add to the policy loss, and what may be trained: each does what it says and nothing else."""

import dataclasses
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from learning import at_version, copies, drafting_model, engine_batch, examples_from, moved, reward_of, rollout_of
from speaker import VOCABULARY, speaker_model
from tiny import tiny_model

from glm5.data import IGNORED
from glm5.data import Batch as TextBatch
from glm5.errors import ConfigError, InputError
from glm5.rl.adapters import LoRA
from glm5.rl.aids import Aids
from glm5.rl.aids_config import EVERY
from glm5.rl.config import RLRunConfig
from glm5.rl.critic import Critic
from glm5.rl.distillation import Distillation
from glm5.rl.drafting import draft_counts, draft_loss
from glm5.rl.forward import fixed_logprobs, run
from glm5.rl.learner import Learner, LearnerConfig
from glm5.rl.losses import PPO, IcePop, Reinforce
from glm5.rl.objective import objective, totals_of
from glm5.rl.packing import packed, padded
from glm5.rl.records import Batch, Group, Lesson, Ticket, Trajectory
from glm5.rl.reference import KL, estimate
from glm5.train import RunDirectory
from glm5.train.losses import count, language_loss, mtp_loss


@pytest.fixture(scope="module")
def batch():
    return engine_batch()


# ---- KL, entropy, distillation ------------------------------------------------------------------------------------
def test_the_expected_gradient_of_each_estimator():
    """Summed over all actions by their probability: k1 has none, k2 that of the KL, k3 that of the forward KL."""
    reference_V = torch.tensor([0.5, -0.3, 0.2], dtype=torch.float64).log_softmax(-1)
    expected = {}
    for estimator in ("k1", "k2", "k3"):
        theta_V = torch.tensor([0.1, 0.9, -0.4], dtype=torch.float64, requires_grad=True)
        logprobs_V = theta_V.log_softmax(-1)
        (logprobs_V.detach().exp() * estimate(logprobs_V, reference_V, estimator)).sum().backward()
        expected[estimator] = theta_V.grad
    torch.testing.assert_close(expected["k1"], torch.zeros(3, dtype=torch.float64))
    for estimator, reverse in (("k2", True), ("k3", False)):
        theta_V = torch.tensor([0.1, 0.9, -0.4], dtype=torch.float64, requires_grad=True)
        p_V = theta_V.log_softmax(-1)
        kl = (p_V.exp() * (p_V - reference_V)).sum() if reverse else (reference_V.exp() * (reference_V - p_V)).sum()
        kl.backward()
        torch.testing.assert_close(expected[estimator], theta_V.grad)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_a_kl_term_draws_the_policy_to_the_reference(batch, estimator):
    config = LearnerConfig(loss=Reinforce(), advantages="none", kl=KL(coefficient=1.0, estimator=estimator))
    learner = Learner(speaker_model(), config, aids=Aids(reference=speaker_model(1)))
    gaps = []
    for version in range(12):
        mine, theirs = (
            torch.cat(list(fixed_logprobs(m, examples_from(batch), config.passes).values()))
            for m in (learner.model, learner.reference)
        )
        gaps.append(estimate(mine, theirs, "k2").mean().item())
        learner.step(at_version(batch, version))
    assert gaps[-1] < 0.9 * gaps[0]


def test_without_another_reference_it_is_the_model_of_the_beginning(batch):
    learner = Learner(speaker_model(), LearnerConfig(kl=KL()))
    assert learner.step(batch)["kl"] == pytest.approx(0, abs=1e-7)
    assert learner.step(at_version(batch, 1))["kl"] > 1e-7
    assert not moved(learner.reference.state_dict(), speaker_model().state_dict())


def test_an_entropy_bonus_flattens(batch):
    learner = Learner(speaker_model(), LearnerConfig(advantages="none", entropy=1.0))
    values = [learner.step(at_version(batch, version))["entropy"] for version in range(5)]
    assert 0 < values[0] < values[-1] < math.log(320)


def test_each_environment_has_its_teacher(batch):
    def renamed(group, environment):
        rollouts = [lesson.rollout for lesson in group.lessons]
        tickets = [dataclasses.replace(rollout.ticket, environment=environment) for rollout in rollouts]
        return Group(tuple(Lesson(dataclasses.replace(r, ticket=t)) for r, t in zip(rollouts, tickets, strict=True)))

    mixed = Batch(0, 0, (renamed(batch.groups[0], "sums"), renamed(batch.groups[1], "facts")))
    teachers = {"sums": speaker_model(1), "facts": speaker_model(2)}
    config = LearnerConfig(loss=IcePop(), advantages="none")
    learner = Learner(speaker_model(), config, aids=Aids(teachers=teachers))
    some = examples_from(mixed, advantages="none")
    given = learner._given(some, several=False)
    for environment, teacher in teachers.items():
        own = [e for e in some if e.environment == environment]
        for key, logprobs_N in fixed_logprobs(teacher, own, config.passes).items():
            torch.testing.assert_close(given.teacher[key], logprobs_N)
    totals = totals_of(learner.model, some, config.normalisation)
    found = objective(learner.model, None, padded(some), config, given, totals, config.passes)
    gap = {key: given.teacher[key] for key in given.teacher}
    student = fixed_logprobs(learner.model, some, config.passes)
    weights = {id(e.trajectory): e.weight for e in some}
    expected = -sum((weights[key] * (gap[key] - student[key])).sum() for key in gap)  # ratio 1 at the first update
    assert found.policy.item() == pytest.approx(expected.item(), rel=1e-3)
    with pytest.raises(InputError, match="No teacher for the environment 'toy'; there are teachers for facts, sums"):
        learner.step(batch)
    gaps = []
    for version in range(10):
        student = fixed_logprobs(learner.model, some, config.passes)
        gaps.append(sum((gap[key] - student[key]).square().mean().item() for key in gap))
        learner.step(at_version(mixed, version))
    assert gaps[-1] < gaps[0]
    one = Learner(speaker_model(), config, aids=Aids(teachers={EVERY: speaker_model(1), "facts": speaker_model(2)}))
    for key, logprobs_N in one._given(some, several=False).teacher.items():
        assert torch.equal(logprobs_N, given.teacher[key])


def test_teachers_and_references_of_fewer_tokens_are_refused():
    """Of as many or more they can judge every token; of fewer, some would have no logit."""
    small = tiny_model(0, vocab_size=VOCABULARY - 1)
    larger = tiny_model(0, vocab_size=VOCABULARY + 8, max_position_embeddings=512)
    for aids, what in (
        (Aids(teachers={"sums": speaker_model(), "facts": small}), "The teacher of facts"),
        (Aids(reference=small), "The reference"),
    ):
        with pytest.raises(ConfigError, match=f"{what} has {VOCABULARY - 1} tokens and the policy {VOCABULARY}"):
            Learner(speaker_model(), LearnerConfig(kl=KL()), aids=aids)
    values = Learner(speaker_model(), LearnerConfig(), aids=Aids(teachers={EVERY: larger})).step(engine_batch())
    assert math.isfinite(values["teacher_kl"])


# ---- MTP and indexers ---------------------------------------------------------------------------------------------
def test_draft_modules_learn_and_the_policy_does_not_notice():
    batch = engine_batch(model=drafting_model())
    weights = {}
    for mtp in ("frozen", "detached", "joint"):
        learner = Learner(drafting_model(), LearnerConfig(mtp=mtp))
        values = [learner.step(at_version(batch, version)) for version in range(3)]
        weights[mtp] = learner.weights()
        assert ("mtp" in values[0]) == (mtp != "frozen")
        assert mtp == "frozen" or values[-1]["mtp"] < values[0]["mtp"]
    detached = moved(weights["frozen"], weights["detached"])
    assert detached and all(name.startswith("mtp.") and ".indexer." not in name for name in detached)
    assert "model.embed_tokens.weight" in moved(weights["frozen"], weights["joint"])


def test_the_draft_loss_is_that_of_training():
    ids = torch.randint(0, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    model = drafting_model()
    model.mtp_steps = 2
    text = TextBatch(ids[:, :-1], ids[:, 1:], torch.zeros(2, 11, dtype=torch.int64))
    output = model(text.input_ids_BT, None, text.segment_ids_BT, collect={"mtp"})
    expected = mtp_loss(model, output, text, count(text, 2))
    assert (text.targets_BT != IGNORED).all()
    all_sampled = [
        Trajectory(tuple(row), (False,) + (True,) * 11, (0.0,) * 12, (-1,) + (0,) * 11) for row in ids.tolist()
    ]
    lessons = tuple(Lesson(rollout_of(Ticket("toy", 0, sample=i), [t], i)) for i, t in enumerate(all_sampled))
    some = examples_from(Batch(0, 0, (Group(lessons),)))
    passes = LearnerConfig().passes
    for rows in (padded(some), packed([some])):
        found = draft_loss(model, run(model, rows, "sparse", {"mtp"}), rows, draft_counts(some, 2), passes)
        torch.testing.assert_close(found, expected)


def test_indexers_learn_only_when_told():
    batch = engine_batch(model=drafting_model())
    for weight, names in ((0.0, set()), (1.0, {".indexer."})):
        learner = Learner(drafting_model(), LearnerConfig(indexer_weight=weight))
        before = copies(learner.weights())
        values = learner.step(batch)
        indexers = {n for n in moved(before, learner.weights()) if ".indexer." in n}
        assert bool(indexers) == bool(names) == ("indexer_grad_norm" in values)


def test_indexers_learn_alike_with_drafts_and_without():
    """What learns beside the policy is no share of what the indexers learn."""
    batch, found = engine_batch(model=drafting_model()), {}
    for mtp in ("frozen", "detached"):
        learner = Learner(drafting_model(), LearnerConfig(indexer_weight=1.0, mtp=mtp))
        values = learner.step(batch)
        found[mtp] = values["indexer_kl"], values["indexer_grad_norm"], learner.weights()
    assert found["frozen"][:2] == found["detached"][:2]
    assert all(name.startswith("mtp.") for name in moved(found["frozen"][2], found["detached"][2]))


@pytest.mark.parametrize(("options", "reason"), [
    ({"freeze": ("mtp.*",)}, "say mtp='frozen'"),
    ({"freeze": ("model.*", "lm_head.*")}, "Nothing is left to learn"),
    ({"lora": LoRA(targets=("mtp.*",))}, r"mtp\.\* names MTP modules and indexers alone"),
    ({"lora": LoRA(targets=("*.indexer.*", "mtp.*.o_proj"))}, "Nothing would learn"),
])  # fmt: skip
def test_settings_under_which_a_loss_moves_nothing_are_refused(options, reason):
    with pytest.raises(ConfigError, match=reason):
        Learner(drafting_model(), LearnerConfig(**options))


@pytest.mark.parametrize("options", [
    {"critic": Critic(lr=1e-4)}, {"distillation": Distillation(coefficient=0.5)}, {"replay_weight": 0.5},
    {"fixed_length": 64},
])  # fmt: skip
def test_a_new_run_refuses_settings_that_would_do_nothing(options):
    config = RLRunConfig(parent=Path("parent"), learner=LearnerConfig(**options))
    with pytest.raises(ConfigError, match=f"learner.{next(iter(options))} would do nothing without"):
        config.check_learning(taught=False, replayed=False, drafting=False)
    joint = replace(config, learner=LearnerConfig(lora=LoRA(), mtp="joint"))
    with pytest.raises(ConfigError, match="With LoRA the MTP modules stay as they are"):
        joint.check_learning(taught=False, replayed=False, drafting=True)
    used = replace(config, learner=replace(config.learner, advantages="gae", normalisation="fixed-length"))
    used.check_learning(taught=True, replayed=True, drafting=False)


@pytest.mark.parametrize("options", [
    {"freeze": ("mtp.*",), "mtp": "frozen"}, {"freeze": ("mtp.*",), "mtp": "joint"},
    {"freeze": ("model.*", "lm_head.*"), "mtp": "joint"}, {"freeze": ("model.*",)},
    {"freeze": ("*_proj.*", "*norm*", "*embed*", "lm_head*", "*experts*", "*.gate.*", "*mtp*"), "indexer_weight": 1.0,
     "mtp": "frozen"},
])  # fmt: skip
def test_whatever_is_left_learns(options):
    learner, batch = Learner(drafting_model(), LearnerConfig(**options)), engine_batch(model=drafting_model())
    before = copies(learner.weights())
    learner.step(batch)
    assert moved(before, learner.weights())


# ---- replay of earlier stages, and resume ----------------------------------------------------------------------
class Text:
    """The same rows at every step."""

    seed = 0

    def batch(self, step):
        ids = torch.randint(0, 300, (2, 10), generator=torch.Generator().manual_seed(step))
        return TextBatch(ids[:, :-1], ids[:, 1:], torch.zeros(2, 9, dtype=torch.int64))


@pytest.mark.parametrize("few", [None, 5])
def test_replay_adds_the_language_loss_of_earlier_batches(batch, few):
    """Also where the logits of so few tokens are held at once."""
    config = LearnerConfig(advantages="none", mtp="frozen", replay_weight=0.5, clip_norm=1e9)
    learner = Learner(speaker_model(), config, aids=Aids(replay=Text()), version=3)
    calls = []
    if few is not None:
        learner.passes = dataclasses.replace(learner.passes, logits=few * VOCABULARY)
    learner.model.lm_head.register_forward_hook(lambda module, given, out: calls.append(out.shape[:-1].numel()))
    values = learner.step(at_version(batch, 3))
    assert few is None or max(calls) == few
    model = speaker_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".indexer." not in name)
    loss = language_loss(model, Text().batch(3), attention="sparse").total
    (0.5 * loss).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9).item()
    assert values["replay"] == pytest.approx(loss.item()) and values["grad_norm"] == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("options", [
    {}, {"advantages": "gae", "loss": PPO(), "updates": 2}, {"lora": LoRA(base="int4"), "kl": KL()},
    {"reset_optimizer": True}, {"reset_optimizer": True, "advantages": "gae", "loss": PPO()},
], ids=["plain", "critic", "lora", "reset", "reset beside a critic"])  # fmt: skip
def test_a_resumed_learner_is_the_same_to_the_bit(tmp_path, options):
    batch = engine_batch(model=drafting_model())
    config = LearnerConfig(**options)
    whole = Learner(drafting_model(), config)
    run_directory = RunDirectory.start(tmp_path / "run", stage="rl", config=config, inputs={})
    for version in range(2):
        whole.step(at_version(batch, version))
    whole.save(run_directory)
    again = Learner(drafting_model(), config)
    assert again.load(run_directory) == 2 == again.version
    ours, theirs = (learner.step(at_version(batch, 2)) for learner in (again, whole))
    assert ours == theirs
    assert not moved(whole.module.state_dict(), again.module.state_dict())


def test_masked_answers_count_in_the_baseline_and_not_in_the_loss(batch):
    other = batch.groups[1].lessons[0].rollout.trajectories

    def cut(group, *which, **change):
        """The group with some of its answers cut off, and otherwise as `change` says."""
        lessons = list(group.lessons)
        for i in which:
            lessons[i] = Lesson(dataclasses.replace(lessons[i].rollout, outcome="truncated", **change))
        return Group(tuple(lessons))

    def after(*groups, truncated="mask"):
        learner = Learner(speaker_model(), LearnerConfig(truncated=truncated))
        learner.step(Batch(0, 0, groups))
        return learner

    first, second = batch.groups
    masked = after(cut(first, 1), second)
    assert len(masked.logprobs) == sum(len(group.lessons) for group in batch.groups) - 1
    assert not moved(masked.weights(), after(cut(first, 1, trajectories=other), second).weights())
    assert moved(masked.weights(), after(cut(first, 1, reward=reward_of(0.9)), second).weights())
    assert moved(masked.weights(), after(cut(first, 1), second, truncated="train").weights())
    nothing = after(cut(first, 0, 1, 2, 3))
    assert nothing.version == 1 and not moved(nothing.weights(), speaker_model().state_dict())
    values = Learner(speaker_model(), LearnerConfig(truncated="mask")).step(Batch(0, 0, (cut(first, 1), second)))
    assert values["rollouts"] == 7 and values["reward"] == 3 / 8
    assert values["trained_tokens"] == sum(len(said) for parts in masked.logprobs.values() for said in parts)
