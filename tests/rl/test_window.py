"""The figures of a step: of what came back since the last batch, and of what is learnt from."""

from glm5.envs import Reward, Task
from glm5.rl.accounts import Accounts
from glm5.rl.records import Batch, Group, Lesson, Rollout, Ticket, Turn
from glm5.rl.tree import EpisodeTree
from glm5.rl.window import Window
from glm5.scoring import Grade


def rollout(sample, reward, versions, environment="one"):
    turn = Turn((1, 2), tuple(range(len(versions))), (-0.5,) * len(versions), versions, "stop")
    scored = None if reward is None else Reward(reward, Grade("correct", ""))
    outcome = "env_failure" if reward is None else "ok"
    task = Task("t", (), "", "")
    return Rollout(
        Ticket(environment, 0, 0, sample), task, EpisodeTree([turn]).trajectories(), outcome, scored, turns=(turn,)
    )


def test_a_window_counts_what_came_back_and_what_is_learnt_apart():
    window, accounts = Window(), Accounts()
    first, second, failed = rollout(0, 1.0, (3, 3)), rollout(1, 0.0, (3, 4, 5)), rollout(2, None, (5,))
    other = rollout(0, 0.5, (5,), environment="two")
    for one in (other, failed, second, first):  # in any order
        accounts.begin(one.ticket)
        window.add(one)
    accounts.settle(failed.ticket, "dropped", "env_failure")
    accounts.settle(other.ticket, "requeued", "stale")
    for one in (first, second):
        accounts.settle(one.ticket, "trained")
    figures = window.close(Batch(5, 5, (Group((Lesson(first), Lesson(second, 2))),)), accounts)
    assert figures["reward"] == 0.5 and figures["rewards"] == {"one": 0.5, "two": 0.5} and figures["scored"] == 3
    assert figures["outcomes"] == {"env_failure": 1, "ok": 3} and figures["tokens"] == 7 and figures["surprise"] == 0.5
    assert figures["staleness"] == {"0": 1, "1": 1, "2": 3}
    assert (figures["sampled"], figures["trained"], figures["requeued"]) == (4, 2, 1)
    assert figures["requeued_because"] == {"stale": 1} and figures["dropped"] == {"env_failure": 1}
    empty = window.close(Batch(6, 6, ()), accounts)
    assert (empty["sampled"], empty["reward"], empty["tokens"], empty["staleness"]) == (0, None, 0, {})
