"""A real run's directory is enough to simulate it."""

import pytest
from speaker import speaker_model, speaker_tokenizer

import glm5
from glm5.envs import Reward, SingleTurn, Task
from glm5.errors import InputError
from glm5.rl.admission import SchedulerConfig
from glm5.rl.config import RLRunConfig
from glm5.rl.orchestrator import train_rl
from glm5.rl.rollout_config import RolloutConfig
from glm5.rl.simulation import Measured, SimulationConfig, records_of, settings_of, simulate
from glm5.rl.tasks import TaskSource
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
    config = RLRunConfig(parent=tmp_path / "parent", steps=3, rollout=RolloutConfig(max_tokens=5), scheduler=scheduler)
    environment = SingleTurn(Vowels())
    source = TaskSource.of(environment, weight=2.0, max_running=3, max_attempts=2)
    run = train_rl(config, [environment], tmp_path / "run", sources=[source])
    assert settings_of(run.path) == (scheduler, (source,))

    records = list(records_of(run.path))
    rollouts = [record for record in records if record["kind"] == "rollout"]
    assert len(rollouts) == 3 * 8 and {len(record["turn_tokens"]) for record in rollouts} == {1}
    steps = [record for record in records if record["kind"] == "train"]
    trained = sum(record["tokens"] for record in steps)
    assert len(steps) == 3 and 0 < trained <= sum(sum(record["turn_tokens"]) for record in rollouts)
    engine = [record for record in records if record["kind"] == "engine"]
    assert engine and all(1 <= record["running"] <= 8 for record in engine)

    measured = Measured.from_records(records)
    assert sum(map(len, measured.workloads["vowels"].groups)) == 24
    it = simulate(SimulationConfig(scheduler=scheduler, batches=40, warmup=2).as_measured(measured))
    assert set(it.staleness) == {0} and it.steps_per_hour > 0

    (run.path / "speed.jsonl").unlink()  # as of a deterministic run
    with pytest.raises(InputError, match="has no step whose times are known: let it go on"):
        list(records_of(run.path))
