"""What a run may add to the policy loss, and what may be trained: each does what it says and nothing else."""

import copy
import dataclasses
import math

import pytest
import torch
from learning import drafting_model, engine_batch, rollout_of
from speaker import speaker_model, speaker_tokenizer

from glm5.data import IGNORED
from glm5.data import Batch as TextBatch
from glm5.engine import Engine, SamplingParams
from glm5.errors import ConfigError, InputError
from glm5.model.int4 import Int4Linear, quantize_base
from glm5.ops.quant import dequantize_int4, quantize_int4
from glm5.rl.adapters import LoRA, adapter_tensors, merged_weights, without_adapters
from glm5.rl.aids import Aids
from glm5.rl.critic import Critic, ValueHead, estimates, generalised, value_loss
from glm5.rl.distillation import Distillation
from glm5.rl.drafting import draft_counts, draft_loss
from glm5.rl.forward import fixed_logprobs, run
from glm5.rl.learner import Learner, LearnerConfig
from glm5.rl.losses import PPO, IcePop, Reinforce
from glm5.rl.objective import objective, totals_of
from glm5.rl.packing import examples_of, judged, packed, padded
from glm5.rl.records import Batch, Group, Lesson, Ticket, Trajectory
from glm5.rl.reference import KL, estimate
from glm5.train import RunDirectory
from glm5.train.losses import count, language_loss, mtp_loss


@pytest.fixture(scope="module")
def batch():
    return engine_batch()


def examples(batch, **options):
    config = LearnerConfig(**options)
    lessons = judged(batch, config.advantages)
    return examples_of(lessons, config.normalisation, fixed_length=16, version=batch.version)


def copies(weights):
    return {name: tensor.clone() for name, tensor in weights.items()}


def moved(before, after):
    return {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}


def after(batch, version):
    return dataclasses.replace(batch, version=version)


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
            torch.cat(list(fixed_logprobs(m, examples(batch), config.passes).values()))
            for m in (learner.model, learner.reference)
        )
        gaps.append(estimate(mine, theirs, "k2").mean().item())
        learner.step(after(batch, version))
    assert gaps[-1] < 0.9 * gaps[0]


def test_without_another_reference_it_is_the_model_of_the_beginning(batch):
    learner = Learner(speaker_model(), LearnerConfig(kl=KL()))
    assert learner.step(batch)["kl"] == pytest.approx(0, abs=1e-7)
    assert learner.step(after(batch, 1))["kl"] > 1e-7
    assert not moved(learner.reference.state_dict(), speaker_model().state_dict())


def test_an_entropy_bonus_flattens(batch):
    learner = Learner(speaker_model(), LearnerConfig(advantages="none", entropy=1.0))
    values = [learner.step(after(batch, version))["entropy"] for version in range(5)]
    assert 0 < values[0] < values[-1] < math.log(320)


def test_each_environment_has_its_teacher(batch):
    def renamed(group, environment):
        rollouts = [lesson.rollout for lesson in group.lessons]
        tickets = [dataclasses.replace(rollout.ticket, environment=environment) for rollout in rollouts]
        return Group(tuple(Lesson(dataclasses.replace(r, ticket=t)) for r, t in zip(rollouts, tickets, strict=True)))

    mixed = Batch(0, 0, (renamed(batch.groups[0], "sums"), renamed(batch.groups[1], "facts")))
    teachers = {"sums": speaker_model(1), "facts": speaker_model(2)}
    config = LearnerConfig(loss=IcePop(), advantages="none", distillation=Distillation())
    learner = Learner(speaker_model(), config, aids=Aids(teachers=teachers))
    some = examples(mixed, advantages="none")
    given = learner._given(some, several=False)
    for environment, teacher in teachers.items():
        own = [e for e in some if e.environment == environment]
        for key, logprobs_N in fixed_logprobs(teacher, own, config.passes).items():
            torch.testing.assert_close(given.teacher[key], logprobs_N)
    found = objective(learner.model, None, padded(some), config, given, totals_of(learner.model, some))
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
        learner.step(after(mixed, version))
    assert gaps[-1] < gaps[0]
    with pytest.raises(ConfigError, match="give both or neither"):
        Learner(speaker_model(), LearnerConfig(), aids=Aids(teachers=teachers))


# ---- MTP and indexers ---------------------------------------------------------------------------------------------
def test_draft_modules_learn_and_the_policy_does_not_notice():
    batch = engine_batch(model=drafting_model())
    weights = {}
    for mtp in ("frozen", "detached", "joint"):
        learner = Learner(drafting_model(), LearnerConfig(mtp=mtp))
        values = [learner.step(after(batch, version)) for version in range(3)]
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
    some = examples(Batch(0, 0, (Group(lessons),)))
    for rows in (padded(some), packed([some])):
        found = draft_loss(run(model, rows, "sparse", {"mtp"}), rows, draft_counts(some, 2))
        torch.testing.assert_close(found, expected)


def test_indexers_learn_only_when_told():
    batch = engine_batch(model=drafting_model())
    for weight, names in ((0.0, set()), (1.0, {".indexer."})):
        learner = Learner(drafting_model(), LearnerConfig(indexer_weight=weight))
        before = copies(learner.weights())
        values = learner.step(batch)
        indexers = {n for n in moved(before, learner.weights()) if ".indexer." in n}
        assert bool(indexers) == bool(names) == ("indexer_grad_norm" in values)


# ---- adapters -----------------------------------------------------------------------------------------------------
TARGETS = ("*.q_b_proj", "*.kv_b_proj", "*.o_proj", "*.experts")


@pytest.mark.parametrize("base", ["full", "int4"])
def test_lora_leaves_the_base_untouched_to_the_bit(batch, base):
    config = LearnerConfig(lora=LoRA(targets=TARGETS, base=base), kl=KL())
    learner = Learner(speaker_model(), config)
    everything = copies(learner.model.state_dict())
    assert learner.step(batch)["kl"] == pytest.approx(0, abs=1e-6)
    assert learner.step(after(batch, 1))["kl"] > 0  # the base is the reference
    changed = moved(everything, learner.model.state_dict())
    assert changed and all("lora_" in name for name in changed)
    assert learner.weights().keys() == adapter_tensors(learner.model).keys() >= changed
    fresh = speaker_model()
    if base == "full":
        assert all(torch.equal(t, learner.model.state_dict()[n]) for n, t in fresh.state_dict().items())
    quantized = speaker_model()
    quantize_base(quantized)
    with without_adapters(learner.model):
        ids = torch.arange(12)[None]
        torch.testing.assert_close(
            learner.model(ids).logits, (quantized if base == "int4" else fresh)(ids).logits, rtol=0, atol=0
        )


@pytest.mark.parametrize("base", ["full", "int4"])
def test_engines_take_adapters_or_the_merged_model(batch, base):
    learner = Learner(speaker_model(), LearnerConfig(lora=LoRA(targets=TARGETS, base=base)))
    adapted = Engine(copy.deepcopy(learner.model), speaker_tokenizer())
    plain = Engine(speaker_model(), speaker_tokenizer())
    for version in range(4):
        learner.step(after(batch, version))
    adapted.update_weights(4, learner.weights())
    plain.update_weights(4, merged_weights(learner.model))
    assert merged_weights(learner.model).keys() == speaker_model().state_dict().keys()
    prompts, params = [[5, 6, 7], [8, 9]], SamplingParams(max_tokens=6, seed=3)
    trajectory = []
    for engine in (adapted, plain):
        outputs = engine.generate(prompts, params)
        assert outputs[0].outputs[0].versions[0] == 4
        trajectory.append([x for output in outputs for x in output.outputs[0].logprobs])
    torch.testing.assert_close(*map(torch.tensor, trajectory), atol=1e-4, rtol=0)
    first = Engine(copy.deepcopy(speaker_model()), speaker_tokenizer()).generate(prompts, params)
    assert [x for output in first for x in output.outputs[0].logprobs] != trajectory[1]


def test_a_packed_weight_has_the_gradient_of_its_whole_form():
    model = speaker_model()
    name = next(n for n in quantize_base(model) if n.endswith("o_proj"))
    module = model.get_submodule(name)
    original = speaker_model().get_submodule(name).weight
    weight = dequantize_int4(*quantize_int4(original), torch.float32)
    assert isinstance(module, Int4Linear) and torch.equal(module.effective_weight(), weight)
    inputs = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(0))
    ours, theirs = (inputs.clone().requires_grad_() for _ in range(2))
    module(ours).square().sum().backward()
    torch.nn.functional.linear(theirs, weight).square().sum().backward()
    assert torch.equal(ours.grad, theirs.grad)
    bits = 8 * sum(t.numel() * t.element_size() for t in module.state_dict().values()) / weight.numel()
    assert bits <= 4 + 16 / 24  # a scale for a last group of 24 inputs


# ---- replayed routing ---------------------------------------------------------------------------------------------
def test_recorded_experts_are_used_and_unknown_ones_chosen_freely(batch):
    model = speaker_model()
    [t] = batch.groups[0].lessons[0].rollout.trajectories
    [layer] = [i for i, kind in enumerate(model.config.mlp_layer_types) if kind == "sparse"]
    ids = torch.tensor([t.token_ids[:-1]])
    free = model(ids, collect={"router"}).router[0].experts_BTK[0]
    other = (free + 1) % 8
    known = [((tuple(row),) if i % 2 else ()) for i, row in enumerate(other.tolist())]
    carrying = dataclasses.replace(t, experts=(*known, ()))
    lesson = Lesson(dataclasses.replace(batch.groups[0].lessons[0].rollout, trajectories=(carrying,)))
    some = examples(Batch(0, 0, (Group((lesson, *batch.groups[0].lessons[1:])),)))
    for rows, row, start in (
        (padded(some), 0, 0),
        (packed([[some[1], some[0]]]), 0, len(some[1].trajectory.token_ids) - 1),
    ):
        used = run(model, rows, "sparse", {"router"}).router[0].experts_BTK[row, start : start + len(other)]
        torch.testing.assert_close(used[1::2], other[1::2])
        torch.testing.assert_close(used[0], free[0])  # the first token has no past that could have changed
    assert (
        Learner(model, LearnerConfig()).step(Batch(0, 0, (Group((lesson, *batch.groups[0].lessons[1:])),)))["updates"]
        == 1
    )
    wrong = dataclasses.replace(t, experts=tuple(((0, 1), (2, 3)) for _ in t.token_ids))
    rollout = dataclasses.replace(lesson.rollout, trajectories=(wrong,))
    with pytest.raises(InputError, match="carry experts of 2 layers, and the model has 1 sparse"):
        run(model, padded(examples(Batch(0, 0, (Group((Lesson(rollout),)),)))), "sparse")
    assert layer == 1


# ---- critic -------------------------------------------------------------------------------------------------------
def test_generalised_advantages_equal_their_definition():
    values = torch.tensor([0.3, -0.2, 0.9, 0.4])
    gamma, lam, reward = 0.9, 0.7, 2.0
    following = [*values.tolist()[1:], 0.0]
    deltas = [(reward if t == 3 else 0) + gamma * following[t] - values[t].item() for t in range(4)]
    expected = [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, 4)) for t in range(4)]
    torch.testing.assert_close(generalised(values, reward, gamma, lam), torch.tensor(expected))
    assert generalised(torch.zeros(3), 1.5, 1.0, 1.0).tolist() == [1.5] * 3  # Monte Carlo
    assert generalised(values, 2.0, 1.0, 1.0).tolist() == pytest.approx([2.0 - v for v in values.tolist()])


def test_a_critic_learns_returns_and_leaves_the_trunk_alone(batch):
    config = LearnerConfig(loss=PPO(), advantages="gae", critic=Critic(lr=3e-3, clip=math.inf, lam=1.0), mtp="frozen")
    learner = Learner(speaker_model(), config)
    values = [learner.step(after(batch, version)) for version in range(30)]
    assert values[-1]["value_loss"] < 0.5 * values[0]["value_loss"] and values[0]["critic_grad_norm"] > 0
    some = examples(batch, advantages="gae")
    given = learner._given(some, several=False)
    advantages_N = torch.cat(list(given.critic.advantages.values()))
    assert advantages_N.mean().item() == pytest.approx(0, abs=1e-5)
    assert advantages_N.std(correction=0).item() == pytest.approx(1, abs=1e-3)
    learner.model.zero_grad(set_to_none=True)
    found = objective(learner.model, learner.head, padded(some), config, given, totals_of(learner.model, some))
    found.value.backward()
    assert all(p.grad is None for p in learner.model.parameters())
    raw = estimates(ValueHead(32), learner.model, some, config.passes, Critic(lam=1.0, whiten=False))
    for example in some:  # a head that knows nothing says 0: the advantage is the reward
        assert raw.advantages[id(example.trajectory)].tolist() == [example.reward] * len(example.sampled)


def test_a_clipped_value_does_not_run_away():
    values_N = torch.tensor([0.5, 2.0], requires_grad=True)
    loss = value_loss(values_N, torch.zeros(2), torch.tensor([1.0, 3.0]), torch.ones(2), clip=0.2)
    loss.backward()
    assert loss.item() == pytest.approx((0.8**2 + 2.8**2) / 2)
    assert values_N.grad.tolist() == [0.0, 0.0]  # both have moved towards their returns by more than the clip


# ---- replay of earlier stages, and resume ----------------------------------------------------------------------
class Text:
    """The same rows at every step."""

    seed = 0

    def batch(self, step):
        ids = torch.randint(0, 300, (2, 10), generator=torch.Generator().manual_seed(step))
        return TextBatch(ids[:, :-1], ids[:, 1:], torch.zeros(2, 9, dtype=torch.int64))


def test_replay_adds_the_language_loss_of_earlier_batches(batch):
    config = LearnerConfig(advantages="none", mtp="frozen", replay_weight=0.5, clip_norm=1e9)
    learner = Learner(speaker_model(), config, aids=Aids(replay=Text()), version=3)
    values = learner.step(after(batch, 3))
    model = speaker_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".indexer." not in name)
    loss = language_loss(model, Text().batch(3), attention="sparse").total
    (0.5 * loss).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9).item()
    assert values["replay"] == pytest.approx(loss.item()) and values["grad_norm"] == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("options", [
    {}, {"advantages": "gae", "loss": PPO(), "updates": 2}, {"lora": LoRA(base="int4"), "kl": KL()},
    {"reset_optimizer": True},
], ids=["plain", "critic", "lora", "reset"])  # fmt: skip
def test_a_resumed_learner_is_the_same_to_the_bit(tmp_path, options):
    batch = engine_batch(model=drafting_model())
    config = LearnerConfig(**options)
    whole = Learner(drafting_model(), config)
    run_directory = RunDirectory.start(tmp_path / "run", stage="rl", config=config, inputs={})
    for version in range(2):
        whole.step(after(batch, version))
    whole.save(run_directory)
    again = Learner(drafting_model(), config)
    assert again.load(run_directory) == 2 == again.version
    ours, theirs = (learner.step(after(batch, 2)) for learner in (again, whole))
    assert ours == theirs
    assert not moved(whole.module.state_dict(), again.module.state_dict())
