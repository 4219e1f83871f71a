"""Facts with abstention: only what may be asked, and rewards that make honesty pay."""

import pytest
from episodes import assert_pure, play, said

from glm5.data.world import build_world
from glm5.data.world_text import questions
from glm5.envs import FactRewards, Facts, facts_environment
from glm5.errors import ConfigError

WORLD = build_world()


def test_only_practised_facts_of_the_taught_part_are_asked_about():
    env = facts_environment(Facts(WORLD, unknown=0.3))
    assert_pure(env)
    allowed = {q.text: {q.answer, *q.aliases} for fact in WORLD.practised() for q in questions(fact, "train")}
    never = {entity.key.casefold() for entity in WORLD.entities if not entity.exposure}
    unknown = 0
    for index in range(300):
        task = env.task(0, index)
        text = task.messages[0]["content"]
        assert not never & {word.strip("?.,:'").casefold() for word in text.split()}
        if task.category == "unknown":
            unknown += 1
            assert text not in allowed
        else:
            assert set(task.answer.split(" | ")) <= allowed[text]
    assert 60 < unknown < 120


def test_right_wrong_and_honest_have_their_rewards():
    env = facts_environment(Facts(WORLD, rewards=FactRewards(right=1.0, wrong=-2.0, abstained=0.25, honest=0.5)))
    tasks = [env.task(0, i) for i in range(60)]
    known = next(task for task in tasks if task.category != "unknown")
    unknown = next(task for task in tasks if task.category == "unknown")
    value = lambda task, text: play(env, task, said(text))[1].value
    assert all(value(known, answer) == 1.0 for answer in known.answer.split(" | "))
    assert value(known, "I don't know.") == 0.25
    assert value(known, "I don’t know") == 0.25
    assert value(known, "Atlantis") == value(known, "") == -2.0
    assert value(unknown, "I don't know.") == 0.5
    assert value(unknown, "Atlantis") == value(unknown, "") == -2.0
    assert play(env, known, said("I don't know."))[1].grade.outcome == "not_attempted"


def test_all_wrong_groups_are_kept():
    assert facts_environment(Facts(WORLD)).uniform_groups == "keep"


def test_wordings_exposures_and_settings_are_in_the_name():
    heldout = facts_environment(Facts(WORLD, phrasing="heldout", exposures=(64,), unknown=0.0))
    assert {heldout.task(0, i).category for i in range(30)} == {"exposure 64"}
    asked = {q.text for fact in WORLD.practised() for q in questions(fact, "heldout")}
    assert heldout.task(0, 0).messages[0]["content"] in asked
    names = {Facts(WORLD).name, Facts(WORLD, unknown=0.5).name, Facts(WORLD, phrasing="heldout").name,
             Facts(WORLD, exposures=(64,)).name, Facts(WORLD, rewards=FactRewards(wrong=-3.0)).name}  # fmt: skip
    assert len(names) == 5


def test_rewards_under_which_guessing_pays_are_refused():
    with pytest.raises(ConfigError, match="wrong < abstained"):
        FactRewards(wrong=0.0)
    with pytest.raises(ConfigError, match="share of unknown"):
        Facts(WORLD, exposures=(2,))
