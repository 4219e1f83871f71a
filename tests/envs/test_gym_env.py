"""Gymnasium's objects, real ones and ones that only look alike."""

import asyncio
import threading

import gymnasium
import pytest
from episodes import play, played, said

from glm5.cli.rl_environments import named_environment
from glm5.envs import EnvironmentFailure, GymEnvironment, gymnasium_environment
from glm5.errors import InputError

WAYS = ["left", "down", "right", "up"]


class Guessing:
    """A text game without gymnasium: find the number."""

    closed = 0

    def reset(self, *, seed):
        self.number = seed % 8
        return "A number below 8.", {}

    def step(self, action):
        if action == "crash":
            raise RuntimeError("the board fell down")
        guess = int(action)
        if guess == self.number:
            return "right", 1.0, True, False, {}
        return ("higher" if guess < self.number else "lower"), -0.125, False, False, {}

    def close(self):
        type(self).closed += 1


def number(text):
    return text if text == "crash" else str(int(text))


guessing = GymEnvironment("guessing", Guessing, instructions="Guess.", action=number)


def test_a_game_is_played_to_its_end_and_rewards_add_up():
    task = guessing.task(0, 0)
    before = Guessing.closed
    low, high, messages = 0, 7, []
    while True:
        middle = (low + high) // 2
        messages.append(said(str(middle)))
        seen, reward = play(guessing, task, *messages)
        if seen[-1].done:
            break
        low, high = (middle + 1, high) if seen[-1].messages[0]["content"] == "higher" else (low, middle - 1)
    assert seen[0].messages == ({"role": "user", "content": "Guess.\n\nA number below 8."},)
    assert reward.value == 1.0 - 0.125 * (len(messages) - 1)
    assert Guessing.closed == before + len(messages)


def test_the_seed_makes_the_task():
    assert len({guessing.task(0, i).id for i in range(9)}) == 9

    def first_reply(index):
        return play(guessing, guessing.task(0, index), said("3"))[0][-1]

    replies = [first_reply(i) for i in range(12)]
    assert replies == [first_reply(i) for i in range(12)] and len(set(map(str, replies))) > 1


def test_a_wrong_action_is_told_and_a_crash_is_a_failure():
    task = guessing.task(0, 0)
    seen, reward = play(guessing, task, said("no idea"))
    assert "no valid action" in seen[-1].messages[0]["content"] and not seen[-1].done and reward.value == 0.0
    with pytest.raises(EnvironmentFailure, match="the board fell down"):
        play(guessing, task, said("crash"))


def test_a_step_does_not_hold_up_other_episodes():
    both = threading.Barrier(2, timeout=120)

    class Meeting(Guessing):
        def step(self, action):
            both.wait()
            return super().step(action)

    env = GymEnvironment("meeting", Meeting)

    async def two():
        return await asyncio.gather(*(played(env, env.task(0, i), [said("1")]) for i in range(2)))

    assert len(asyncio.run(two())) == 2


def test_gymnasium_itself():
    env = GymEnvironment(
        "frozen-lake", lambda: gymnasium.make("FrozenLake-v1", is_slippery=False),
        instructions="Reach 15.", action=lambda text: WAYS.index(text.split()[-1]),
    )  # fmt: skip
    path = [said(f"I go {way}") for way in ("down", "down", "right", "right", "down", "right")]
    seen, reward = play(env, env.task(0, 0), *path)
    assert [o.messages[0]["content"] for o in seen[1:-1]] == ["4", "8", "9", "10", "14"]
    assert seen[-1].done and reward.value == 1.0
    assert play(env, env.task(0, 0), said("I go down"), said("right"))[1].value == 0.0


def test_an_environment_of_gymnasium_by_its_id():
    env = named_environment(
        "gymnasium:FrozenLake-v1:is_slippery=false,actions=left+down+right+up,turns=9@2"
    ).environment
    assert env.name == "gymnasium/FrozenLake-v1/is_slippery=False,turns=9,actions=left+down+right+up"
    path = [said(f"Not left: {way}!") for way in ("Down", "down", "right", "right", "down", "right")]
    seen, reward = play(env, env.task(0, 0), *path)
    first, second = seen[0].messages[0]["content"], seen[1].messages[0]["content"]
    assert first == "Answer with one of: left, down, right, up.\n\n[S]FFF\nFHFH\nFFFH\nHFFG"
    assert second.endswith("SFFF\n[F]HFH\nFFFH\nHFFG")
    assert seen[-1].done and reward.value == 1.0 and env.limits.turns == 9
    wrong, _ = play(env, env.task(0, 0), said("upwards"))
    assert "answer with one of left, down" in wrong[-1].messages[0]["content"]
    numbered = gymnasium_environment("Blackjack-v1")
    assert "Answer with one of: 0, 1." in play(numbered, numbered.task(0, 0))[0][0].messages[0]["content"]
    assert numbered.action("I stick, 0.") == 0 and numbered.action("1") == 1


class Spelling(gymnasium.Env):
    """Takes texts of at most three letters of "abc", and breaks on others, as real ones do."""

    observation_space = gymnasium.spaces.Text(9)
    action_space = gymnasium.spaces.Text(3, charset="abc")

    def reset(self, *, seed=None, options=None):
        return "spell", {}

    def step(self, action):
        assert self.action_space.contains(action)
        return "more", float(len(action)), action == "c", False, {}


class Adventure(Spelling):
    """Takes sentences, though its space says letters and digits: gymnasium's default."""

    action_space = gymnasium.spaces.Text(14)

    def step(self, action):
        return "hall", 1.0, action == "open the door!", False, {}


class Walking(Spelling):
    """Takes steps of -1, 0 and 1."""

    action_space = gymnasium.spaces.Discrete(3, start=-1)

    def step(self, action):
        return "walked", float(action), action == 1, False, {}


@pytest.fixture
def own_games():
    gymnasium.register("Spelling-v0", Spelling)
    gymnasium.register("Walking-v0", Walking)
    gymnasium.register("Adventure-v0", Adventure)
    yield
    for game in ("Spelling-v0", "Walking-v0", "Adventure-v0"):
        del gymnasium.registry[game]


def test_a_text_that_is_no_action_is_told_to_the_model(own_games):
    env = gymnasium_environment("Spelling-v0")
    seen, reward = play(env, env.task(0, 0), said("ab "), said("letters"), said(""), said("c"))
    for told in seen[2:4]:
        assert told.messages[0]["content"] == "That is no valid action: answer with 1 to 3 of the characters abc"
    assert seen[-1].done and reward.value == 3.0


def test_texts_may_be_sentences_where_the_space_names_no_characters(own_games):
    env = gymnasium_environment("Adventure-v0")
    seen, reward = play(env, env.task(0, 0), said(""), said("open the window"), said("open the door!"))
    for told in seen[1:3]:
        assert told.messages[0]["content"] == "That is no valid action: answer with 1 to 14 characters"
    assert seen[-1].done and reward.value == 1.0


def test_actions_may_be_signs_and_negative_numbers(own_games):
    env = gymnasium_environment("Walking-v0")
    seen, reward = play(env, env.task(0, 0), said("-1"), said("0, no: -1."), said("11"), said("1"))
    assert "no valid action: answer with one of -1, 0, 1" in seen[3].messages[0]["content"]
    assert seen[-1].done and reward.value == -1.0
    arrows = gymnasium_environment("FrozenLake-v1", actions=("<", "v", ">", "^"))
    assert [arrows.action(text) for text in ("<", "I go v", "->", "^^", "over >")] == [0, 1, 2, 3, 2]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("gymnasium:FrozenPond-v1", "gymnasium makes no 'FrozenPond-v1'"),
        ("gymnasium:FrozenLake-v1:depth=3", "depth"),
        ("gymnasium:FrozenLake-v1:actions=left+right", "4 different actions, and 2 are named"),
        ("gymnasium:FrozenLake-v1:actions=a+A+b+c", "4 different actions, and 3 are named"),
        ("gymnasium:Pendulum-v1", "of the kind Box"),
    ],
)
def test_what_gymnasium_cannot_be_is_refused(text, says):
    with pytest.raises(InputError, match=says):
        named_environment(text)
