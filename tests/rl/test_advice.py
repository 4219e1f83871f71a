"""A run whose model would answer better after thinking says so, once."""

import pytest
from speaker import speaker_model, speaker_tokenizer

import glm5
from glm5.envs import Reward, SingleTurn, Task, single_questions
from glm5.errors import RunError
from glm5.rl.accounts import Accounts
from glm5.rl.admission import SchedulerConfig
from glm5.rl.advice import think_first
from glm5.rl.config import RLRunConfig
from glm5.rl.gateway.rollouts import OutsideAgents
from glm5.rl.gateway.settings import FOREVER, outside
from glm5.rl.lockstep import train_in_lockstep
from glm5.rl.orchestrator import train_rl
from glm5.rl.records import Rollout, Ticket, Turn
from glm5.rl.runner import RolloutConfig
from glm5.rl.tree import EpisodeTree
from glm5.scoring import Grade


def wrong() -> SingleTurn:
    return single_questions("wrong", [("What?", "that")], lambda task, message: 0.0)


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("train", [train_rl, train_in_lockstep])
def test_nearly_all_groups_wrong_without_thinking(tmp_path, caplog, train, thinking):
    glm5.save_model(speaker_model(), tmp_path / "parent", speaker_tokenizer())
    scheduler = SchedulerConfig(groups_per_batch=2, group_size=2, max_running=8)
    rollout = RolloutConfig(max_tokens=2, thinking=thinking)
    config = RLRunConfig(parent=tmp_path / "parent", rollout=rollout, scheduler=scheduler, groups_in_vain=12)
    with pytest.raises(RunError, match="Nothing could be learnt"):
        train(config, [wrong()], tmp_path / "run")
    assert caplog.text.count("a run with --rollout.thinking") == (not thinking)


def test_enough_groups_and_hardly_anything_else():
    accounts = Accounts()

    def settle(reason, samples):
        for _ in range(samples):
            ticket = Ticket("x", accounts.begun)
            accounts.begin(ticket)
            accounts.settle(ticket, "dropped", reason)

    settle("all wrong", 31)
    assert think_first(accounts, 4) is None
    settle("all wrong", 1)
    assert think_first(accounts, 4) is not None
    settle("stale", 4)
    assert think_first(accounts, 4) is None


def test_who_lets_others_play_is_not_told_to_do_what_is_refused(tmp_path, caplog):
    glm5.save_model(speaker_model(), tmp_path / "parent", speaker_tokenizer())
    scheduler = SchedulerConfig(groups_per_batch=2, group_size=2, max_running=8)
    config = outside(
        RLRunConfig(parent=tmp_path / "parent", scheduler=scheduler, groups_in_vain=12), patience=FOREVER
    )  # fmt: skip

    async def play(ticket: Ticket) -> Rollout:
        turn = Turn((1, 2), (3, 4), (-1.0, -1.0), (0, 0), "stop")
        reward = Reward(0.0, Grade("incorrect", "", judged=False))
        return Rollout(ticket, Task(ticket.id, (), "", "g"), EpisodeTree((turn,)).trajectories(), "ok", reward,
                       turns=(turn,))  # fmt: skip

    with pytest.raises(RunError, match="Give the agents easier tasks") as error:
        train_rl(config, [OutsideAgents()], tmp_path / "run", player=play)
    assert "rollout" not in str(error.value).replace("rollouts", "") and "--rollout.thinking" not in caplog.text
