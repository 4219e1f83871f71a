"""A real run's directory is enough to simulate it."""

import pytest
from speaker import speaker_model, speaker_tokenizer

import glm5
from glm5.envs import Reward, SingleTurn, Task
from glm5.errors import InputError
from glm5.rl.admission import SchedulerConfig
from glm5.rl.concurrency import ConcurrencyConfig
from glm5.rl.config import RLRunConfig
from glm5.rl.orchestrator import train_rl
from glm5.rl.rollout_config import RolloutConfig
from glm5.rl.simulation import Measured, RunSettings, SimulationConfig, records_of, settings_of, simulate
from glm5.rl.tasks import Band, Pools, TaskSource
from glm5.scoring import Grade


class Vowels:
    """Reward for an "e"."""

    name = "vowels"

    def task(self, seed, index):
        return Task(f"{self.name}/{seed}/{index}", ({"role": "user", "content": f"{index % 5}"},), "e", "one")

    def score(self, task, response):
        return Reward(float("e" in (response["content"] or "")), Grade("correct", ""))


def test_a_run_is_read_and_simulated(tmp_path):
    glm5.save_model(speaker_model(), tmp_path / "parent", speaker_tokenizer())
    scheduler = SchedulerConfig(mode="sync", groups_per_batch=2, group_size=4, max_running=8)
    adapted = ConcurrencyConfig(least=8, most=9)
    config = RLRunConfig(parent=tmp_path / "parent", steps=3, rollout=RolloutConfig(max_tokens=5), scheduler=scheduler,
                         concurrency=adapted)  # fmt: skip
    environment = SingleTurn(Vowels())
    curriculum = {"band": Band(low=0.0, high=0.9), "pools": Pools(size=40, hard=0.5)}
    source = TaskSource.of(environment, weight=2.0, max_running=3, max_attempts=2, **curriculum)
    run = train_rl(config, [environment], tmp_path / "run", sources=[source])
    assert settings_of(run.path) == RunSettings(scheduler=scheduler, sources=(source,), concurrency=adapted, engines=1)

    records = list(records_of(run.path))
    rollouts = [record for record in records if record["kind"] == "rollout"]
    assert len(rollouts) == 3 * 8 and {len(record["turn_tokens"]) for record in rollouts} == {1}
    steps = [record for record in records if record["kind"] == "train"]
    trained = sum(record["tokens"] for record in steps)
    assert len(steps) == 3 and 0 < trained <= sum(sum(record["turn_tokens"]) for record in rollouts)
    assert [record["kind"] for record in records].count("publish") == 2, "the last weights have nobody to go to"
    made = [record["tokens"] for record in records if record["kind"] == "sampled"]
    assert sum(made) == pytest.approx(sum(sum(record["turn_tokens"]) for record in rollouts), abs=3)

    measured = Measured.from_records(records)
    assert measured.publish_seconds > 0 and measured.points[0][0] <= 8
    assert sum(map(len, measured.workloads["vowels"].groups)) == 24
    it = simulate(SimulationConfig(scheduler=scheduler, batches=40, warmup=2).as_measured(measured))
    assert set(it.staleness) == {0} and it.steps_per_hour > 0

    (run.path / "speed.jsonl").unlink()  # as of a deterministic run
    with pytest.raises(InputError, match="has no step whose times are known: let it go on"):
        list(records_of(run.path))
