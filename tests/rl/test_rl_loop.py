"""The synchronous loop: accounts, provenance of tokens, invariance, exact resume, and that it learns."""

import io
import json
import math

import pytest
import torch
from rich.console import Console
from speaker import speaker_model, speaker_tokenizer

import glm5
from glm5.engine import Engine
from glm5.envs import EnvironmentFailure, Reward, Task
from glm5.errors import ConfigError, RunError
from glm5.optim import OptimizerConfig
from glm5.rl.losses import IcePop
from glm5.rl.plain.ledger import Ledger
from glm5.rl.plain.loop import RLConfig, TaskQueue, train_policy
from glm5.rl.plain.records import Group
from glm5.rl.plain.rollout import Sampler, Ticket
from glm5.rl.plain.update import Lesson, backward, sampled_logprobs, select
from glm5.scoring import Grade
from glm5.train.run_directory import exclusive


class Letters:
    """Reward for an answer that holds an "e"; breaks for chosen tasks as many times as told."""

    name = "letters"

    def __init__(self, broken=None, stop_at=None):
        self.broken = dict(broken or {})
        self.stop_at = stop_at

    def task(self, seed, index):
        if index == self.stop_at:
            self.stop_at = None
            raise KeyboardInterrupt
        return Task(f"letters-{seed}-{index}", ({"role": "user", "content": f"{index % 5}"},), "e", "one")

    def score(self, task, response):
        index = int(task.id.split("-")[-1])
        if self.broken.get(index, 0) > 0:
            self.broken[index] -= 1
            raise EnvironmentFailure("the lights went out")
        said = "e" in (response["content"] or "")
        return Reward(float(said), Grade("correct" if said else "incorrect", "an e" if said else "no e"))


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    directory = tmp_path_factory.mktemp("parent")
    glm5.save_model(speaker_model(), directory, speaker_tokenizer())
    return directory


def config_of(parent, **changes):
    values = {"steps": 4, "prompts_per_step": 3, "group_size": 4, "max_tokens": 6, "checkpoint_every": 2, "rows": 5}
    return RLConfig(parent=parent, **{**values, **changes})


def groups_of(env, tickets, *, group_size=6, version=0):
    engine = Engine(speaker_model(), speaker_tokenizer(), version=version)
    sampler = Sampler(engine, env, seed=0, group_size=group_size, max_tokens=6, thinking=False)
    return sampler.sample(tickets)


def test_sampled_ids_logprobs_and_versions_reach_the_loss_untouched():
    groups = groups_of(Letters(), [Ticket(0), Ticket(7)], version=5)
    samples = [sample for group in groups for sample in group.samples]
    assert len({sample.id for sample in samples}) == 12
    for sample in samples:
        assert set(sample.completion.versions) == {5} and sample.staleness(8) == 3
        assert sample.prompt_ids == tuple(
            speaker_tokenizer().apply_chat_template(sample.task.messages, enable_thinking=False)
        )
    logprobs_N = sampled_logprobs(speaker_model(), samples, "sparse")
    engine_N = torch.tensor([x for sample in samples for x in sample.completion.logprobs])
    torch.testing.assert_close(logprobs_N, engine_N, atol=2e-5, rtol=0)


def test_micro_batches_add_up_to_the_gradient_of_the_whole():
    groups = groups_of(Letters(), [Ticket(0), Ticket(1)])
    lessons = [Lesson(sample, (-1.0) ** i) for i, sample in enumerate(s for group in groups for s in group.samples)]
    gradients = []
    for rows in (1, 5, 100):
        model = speaker_model()
        values = backward(model, lessons, IcePop(), normalisation="sequence-mean", attention="sparse", rows=rows)
        gradients.append((values, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    for values, gradient in gradients[1:]:
        assert values["mismatch"] == pytest.approx(gradients[0][0]["mismatch"], abs=1e-6)
        for name, grad in gradient.items():
            torch.testing.assert_close(grad, gradients[0][1][name], atol=1e-5, rtol=1e-3)


def test_a_step_raises_the_chance_of_what_was_better():
    model = speaker_model()
    samples = [sample for group in groups_of(Letters(), [Ticket(0)]) for sample in group.samples]
    better, worse = samples[0], samples[2]
    lessons = [Lesson(better, 1.0), Lesson(worse, -1.0)]
    before = [float(sampled_logprobs(model, [s], "sparse").sum().detach()) for s in (better, worse)]
    backward(model, lessons, IcePop(), normalisation="token-mean", attention="sparse", rows=2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.01 * parameter.grad
    after = [float(sampled_logprobs(model, [s], "sparse").sum().detach()) for s in (better, worse)]
    assert after[0] > before[0] and after[1] < before[1]


def test_every_sample_ends_exactly_once():
    samples = groups_of(Letters(), [Ticket(0)])[0].samples
    ledger = Ledger(samples)
    with pytest.raises(RuntimeError, match="6 samples have no fate"):
        ledger.metrics()
    ledger.trained(samples[0])
    ledger.requeued(samples[1])
    for sample in samples[2:]:
        ledger.dropped(sample, "too old")
    assert ledger.metrics() == {"sampled": 6, "trained": 1, "requeued": 1, "dropped": {"too old": 4}}
    with pytest.raises(RuntimeError, match="already trained, it cannot be requeued"):
        ledger.requeued(samples[0])
    with pytest.raises(RuntimeError, match="sampled twice"):
        Ledger([samples[0], samples[0]])


def test_failed_groups_are_sampled_again_and_equal_groups_are_dropped():
    mixed, failed = groups_of(Letters({3: 1}), [Ticket(2), Ticket(3)])
    for rewards, reason in [((1.0, 1.0), "all right"), ((0.0, 0.0), "all wrong")]:
        same = Group(9, 0, tuple(_with_reward(s, r) for s, r in zip(mixed.samples, rewards, strict=False)))
        ledger = Ledger(same.samples)
        assert select([same], ledger, normalise=True, max_attempts=3) == ([], [])
        assert ledger.metrics()["dropped"] == {reason: 2}
    ledger = Ledger(failed.samples)
    assert select([failed], ledger, normalise=True, max_attempts=2) == ([], [Ticket(3, 1)])
    assert ledger.metrics()["requeued"] == 6
    last = Group(3, 1, failed.samples)
    ledger = Ledger(last.samples)
    assert select([last], ledger, normalise=True, max_attempts=2) == ([], [])
    assert ledger.metrics()["dropped"] == {"environment failure": 6}


def _with_reward(sample, value):
    return type(sample)(sample.task, sample.prompt_ids, sample.completion, Reward(value, Grade("correct", "")), "ok")


def test_queue():
    queue = TaskQueue()
    assert [t.task_index for t in queue.take(3)] == [0, 1, 2]
    queue.put_back([Ticket(1, 1)])
    again = TaskQueue.after([{"step": 0, **queue.state()}])
    assert again.take(2) == [Ticket(1, 1), Ticket(3, 0)] == queue.take(2)


def test_a_killed_and_resumed_run_is_the_same_run(parent, tmp_path):
    config = config_of(parent, steps=5)
    whole = train_policy(config, Letters({4: 1}), tmp_path / "whole")
    environment = Letters({4: 1}, stop_at=10)  # in the fourth step, after the checkpoint behind the second
    with pytest.raises(KeyboardInterrupt):
        train_policy(config, environment, tmp_path / "killed")
    with pytest.raises(RunError, match="already holds a run"):
        train_policy(config, environment, tmp_path / "killed")
    killed = train_policy(config, environment, tmp_path / "killed", resume=True)
    metrics = (whole.path / "metrics.jsonl").read_text()
    assert (killed.path / "metrics.jsonl").read_text() == metrics
    ours, theirs = (glm5.load_model(run.model_directory, dtype=torch.float32).state_dict() for run in (whole, killed))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    lines = [json.loads(line) for line in metrics.splitlines()]
    assert sum(line["requeued"] for line in lines) == 4
    for line in lines:
        assert line["sampled"] == 12 == line["trained"] + line["requeued"] + sum(line["dropped"].values())
        assert line.get("mismatch", 0) < 1e-5 and line.get("masked", 0) == 0
    assert train_policy(config, Letters(), tmp_path / "killed", resume=True).finished
    samples = (killed.path / "samples" / "step-00000001.jsonl").read_text().splitlines()
    assert {json.loads(line)["fate"].split(":")[0] for line in samples} <= {"trained", "dropped", "requeued"}
    assert "<svg" in (killed.path / "report.html").read_text()


def test_it_learns(parent, tmp_path):
    optimizer = OptimizerConfig(name="adamw", lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0)
    config = config_of(
        parent, steps=40, prompts_per_step=4, group_size=8, checkpoint_every=40, rows=64, optimizer=optimizer
    )
    run = train_policy(config, Letters(), tmp_path / "run")
    rewards = [line["reward"] for line in run.read("metrics")]
    # Three seeds went from about 0.4 to 0.99; after half of the steps they lay anywhere between 0.5 and 0.9.
    assert sum(rewards[:5]) / 5 < 0.6 and sum(rewards[-5:]) / 5 > 0.9


def test_frozen_parts_do_not_move(parent, tmp_path):
    run = train_policy(config_of(parent, steps=2), Letters(), tmp_path / "run")
    before, after = (glm5.load_model(d, dtype=torch.float32).state_dict() for d in (parent, run.model_directory))
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert "lm_head.weight" in moved
    assert not {name for name in moved if ".indexer." in name or "e_score_correction_bias" in name}


def test_a_run_that_lost_lines_does_not_go_on_at_a_wrong_task(parent, tmp_path):
    config = config_of(parent)
    with pytest.raises(KeyboardInterrupt):
        train_policy(config, Letters(stop_at=9), tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().splitlines(keepends=True)[0])
    with pytest.raises(RunError, match="lacks lines of the 2 steps before the newest checkpoint"):
        train_policy(config, Letters(), tmp_path / "run", resume=True)


def test_gradients_are_clipped_before_the_step(parent, tmp_path):
    """A gradient far below AdamW's epsilon moves nothing."""
    run = train_policy(config_of(parent, steps=2, clip_norm=1e-12), Letters(), tmp_path / "run")
    assert max(line.get("grad_norm", 0.0) for line in run.read("metrics")) > 1e-3
    before, after = (glm5.load_model(d, dtype=torch.float32).state_dict() for d in (parent, run.model_directory))
    assert max((tensor - before[name]).abs().max().item() for name, tensor in after.items()) < 1e-6


def test_progress_shows_the_reward_and_a_finished_run_has_its_report(parent, tmp_path, monkeypatch):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    with monkeypatch.context() as patch:
        patch.setattr("glm5.rl.plain.loop.write_rl_report", lambda path: path.died)
        with pytest.raises(AttributeError):
            train_policy(config_of(parent, steps=1), Letters(), tmp_path / "run", console=console)
    assert "reward 0." in screen.getvalue() and "loss" not in screen.getvalue()
    run = train_policy(config_of(parent, steps=1), Letters(), tmp_path / "run", resume=True)
    assert run.finished and (run.path / "report.html").exists()


@pytest.mark.parametrize(("field", "value"), [
    ("group_size", 1), ("steps", 0), ("steps", 2.5), ("prompts_per_step", 0), ("rows", 0), ("keep_checkpoints", 0),
    ("seed", -1), ("clip_norm", -1), ("clip_norm", math.nan), ("attention", "spares"), ("normalisation", "mean"),
])  # fmt: skip
def test_wrong_settings_are_refused(parent, field, value):
    with pytest.raises(ConfigError, match=f"{field} is {value!r}"):
        config_of(parent, **{field: value})


def test_a_second_process_is_kept_out(parent, tmp_path):
    with exclusive(tmp_path / "run"), pytest.raises(RunError, match="run is being trained by another process"):
        train_policy(config_of(parent), Letters(), tmp_path / "run")
    assert train_policy(config_of(parent, steps=1), Letters(), tmp_path / "run").finished
