"""One episode: prompts that extend what was sampled, outcomes by kind, resumption from any token."""

import asyncio

import pytest
from scripted import ADD, Chat, ScriptedSource, brief_model
from speaker import speaker_tokenizer

from glm5.engine import Engine
from glm5.envs import EpisodeLimits
from glm5.errors import ConfigError, InputError
from glm5.rl.event_log import Unfinished
from glm5.rl.records import Ticket, Turn
from glm5.rl.rollout_config import RolloutConfig
from glm5.rl.runner import play

TICKET = Ticket("chat", 3, sample=1)
CALL = (
    "I add.</think>Let me see.<tool_call>add<arg_key>a</arg_key><arg_value>3</arg_value>"
    "<arg_key>b</arg_key><arg_value>1</arg_value></tool_call><|observation|>"
)
RESULT = {"role": "tool", "content": "4"}


def rollout_of(environment, source, config=None, **options):
    config = config or RolloutConfig(thinking=True)
    return asyncio.run(play(TICKET, environment, source, config, **options))


def test_tool_turns_are_the_template_to_the_token():
    source = ScriptedSource(CALL, CALL, "So 4.</think>It is 4.<|user|>")
    rollout = rollout_of(Chat(RESULT, [RESULT, RESULT], tools=(ADD,)), source)
    first, second, third = rollout.turns
    assert second.prompt_ids[: len(first.prompt_ids + first.output_ids)] == first.prompt_ids + first.output_ids
    assert third.prompt_ids[: len(second.prompt_ids + second.output_ids)] == second.prompt_ids + second.output_ids
    [trajectory] = rollout.trajectories
    # Role and text of every message, as a server would render them for the next question.
    whole = speaker_tokenizer().apply_chat_template(
        [*rollout.messages, {"role": "user", "content": ""}], [ADD], clear_thinking=False, add_generation_prompt=False
    )
    assert trajectory.token_ids == tuple(whole)
    assert trajectory.num_sampled == sum(len(turn.output_ids) for turn in rollout.turns) == rollout.num_sampled
    assert rollout.messages[1]["tool_calls"][0]["function"]["name"] == "add"
    assert rollout.messages[1]["reasoning_content"] == "I add." and rollout.messages[-1]["content"] == "It is 4."
    assert rollout.outcome == "ok" and rollout.reward.value == 1.0
    assert len({params.seed for params in source.params}) == 3


QUESTION = {"role": "user", "content": "And <|user|> then?"}


def test_thoughts_stay_behind_a_new_question_or_the_tree_branches():
    texts = ("Hm.</think>4.<|user|>", "Ah.</think>5.<|user|>")
    kept = rollout_of(Chat(QUESTION), ScriptedSource(*texts))
    [trajectory] = kept.trajectories
    assert trajectory.token_ids[: len(kept.turns[0].prompt_ids + kept.turns[0].output_ids)] == (
        kept.turns[0].prompt_ids + kept.turns[0].output_ids
    )
    dropped = rollout_of(Chat(QUESTION), ScriptedSource(*texts), RolloutConfig(thinking=True, keep_thoughts=False))
    assert len(dropped.trajectories) == 2
    tokenizer = speaker_tokenizer()
    assert "Hm." not in tokenizer.decode(dropped.turns[1].prompt_ids)
    assert dropped.turns[1].prompt_ids == tuple(
        tokenizer.apply_chat_template(dropped.messages[:3], escape_special=True)
    )
    for rollout in (kept, dropped):
        assert rollout.num_sampled == sum(len(turn.output_ids) for turn in rollout.turns)
        # The question's `<|user|>` is plain text in every prompt.
        assert rollout.turns[1].prompt_ids.count(tokenizer.token_to_id("<|user|>")) == 2


def test_a_turn_that_ended_with_another_role_branches_without_its_last_token():
    rollout = rollout_of(Chat(RESULT), ScriptedSource("</think>4<|user|>", "</think>5<|user|>"))
    first, second = rollout.turns
    said = first.prompt_ids + first.output_ids
    assert second.prompt_ids[: len(said) - 1] == said[:-1]
    assert second.prompt_ids[len(said) - 1] == speaker_tokenizer().token_to_id("<|observation|>")
    assert len(rollout.trajectories) == 2 and rollout.num_sampled == len(first.output_ids) + len(second.output_ids)


def test_limits_of_turns_and_tokens_end_in_a_score():
    forever = [QUESTION] * 9
    rollout = rollout_of(Chat(*forever, limits=EpisodeLimits(turns=2)), ScriptedSource(*["</think>4<|user|>"] * 2))
    assert rollout.outcome == "truncated" and len(rollout.turns) == 2 and rollout.reward is not None
    cut = rollout_of(Chat(), ScriptedSource("</think>4<|user|>"), RolloutConfig(thinking=True, max_tokens=2))
    assert cut.outcome == "truncated" and cut.turns[0].finish_reason == "length" and cut.reward is not None
    first = len(cut.turns[0].prompt_ids)
    full = rollout_of(
        Chat(*forever, limits=EpisodeLimits(turns=9)),
        ScriptedSource(*["</think>4<|user|>"] * 9),
        RolloutConfig(thinking=True, max_episode_tokens=first + 30),
    )
    assert full.outcome == "truncated" and 1 < len(full.turns) < 9
    assert all(len(t.prompt_ids + t.output_ids) <= first + 30 for t in full.turns)


@pytest.mark.parametrize("what", ["task", "reset", "step", "score"])
def test_a_mistake_of_the_environment_is_no_reward(what):
    environment = Chat(broken=what)
    rollout = rollout_of(environment, ScriptedSource("</think>4<|user|>"))
    assert rollout.outcome == "env_failure" and rollout.reward is None
    assert rollout.failure == f"crash: {what}: ZeroDivisionError: the lights went out"
    assert environment.opened == environment.closed == (what != "task")
    assert len(rollout.turns) == (what in ("step", "score"))


def test_other_failures_say_what_happened():
    slow = Chat(slow="step", limits=EpisodeLimits(step_seconds=1.0))
    rollout = rollout_of(slow, ScriptedSource("</think>4<|user|>"))
    assert rollout.outcome == "env_failure" and slow.closed == 1
    assert rollout.failure == "timeout: step took longer than 1 s"
    source = ScriptedSource("</think>4<|user|>", hang_at=1)
    late = rollout_of(Chat(limits=EpisodeLimits(seconds=1.0)), source)
    assert (late.outcome, late.reward) == ("timeout", None) and "longer than 1 s" in late.failure
    assert source.streams[0].closed
    gone = rollout_of(Chat(), ScriptedSource("</think>4"))
    assert gone.outcome == "aborted" and gone.turns[0].finish_reason == "abort"
    nan = rollout_of(Chat(reward=lambda said: float("nan")), ScriptedSource("</think>4<|user|>"))
    assert nan.outcome == "env_failure" and "nan" in nan.failure
    long = rollout_of(Chat(), ScriptedSource("</think>4<|user|>", max_model_len=10))
    assert long.outcome == "env_failure" and "leaves no room for an answer in 10" in long.failure
    assert rollout_of(Chat(broken="close"), ScriptedSource("</think>4<|user|>")).outcome == "ok"


def test_cancellation_ends_the_request_and_closes_the_episode():
    environment, source = Chat(), ScriptedSource("</think>4<|user|>", hang_at=2)

    async def main():
        task = asyncio.create_task(play(TICKET, environment, source, RolloutConfig(thinking=True)))
        while not source.streams:
            await asyncio.sleep(0)
        for _ in range(20):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert source.streams[0].closed and environment.closed == 1


@pytest.fixture(scope="module")
def engine():
    engine = Engine(brief_model(), speaker_tokenizer(), strict=True, num_blocks=32, max_num_seqs=8)
    yield engine
    engine.close()


@pytest.mark.parametrize("replay", [False, True], ids=["plain", "with experts"])
def test_an_episode_goes_on_from_any_token_as_if_never_interrupted(engine, replay):
    config = RolloutConfig(seed=5, max_tokens=16, report_every=1, replay_experts=replay)
    environment = Chat(QUESTION, RESULT, limits=EpisodeLimits(turns=3))
    reports, told, known = [], [], Unfinished()

    def note(ticket, number, first, turn):
        told.append((number, first, turn))
        known.add(known.news(ticket, number, first, turn))
        reports.append(tuple(known.turns(ticket)))

    for sample in range(50):  # until a random model ends its turns by itself, so that there are three
        reports.clear()
        told.clear()
        ticket = Ticket("chat", 0, sample=sample)
        whole = asyncio.run(play(ticket, environment, engine, config, progress=note))
        if len(whole.turns) == 3:
            break
    else:
        pytest.fail("no episode of three turns")
    assert [len(turn.output_ids) for turn in whole.turns] == [
        max(len(turns[n].output_ids) for turns in reports if len(turns) > n) for n in range(3)
    ]
    assert all((turn.experts is not None) is replay for turn in whole.turns)
    each = [(number, first) for number, turn in enumerate(whole.turns) for first in range(len(turn.output_ids))]
    assert [(number, first) for number, first, _ in told] == each, "a report tells of new tokens alone"
    assert all(len(turn.output_ids) == 1 for _, _, turn in told)
    if replay:  # the first report of a turn has the prompt's too, in as far as no turn before has told of them
        assert all(len(turn.experts) == 1 for _, first, turn in told if first)
    for turns in reports:
        again = asyncio.run(play(ticket, environment, engine, config, resume_from=turns))
        assert (again.turns, again.trajectories, again.messages) == (whole.turns, whole.trajectories, whole.messages)
    strange = [Turn((1, 2), (3,), (-1.0,), (0,), "stop")]
    assert asyncio.run(play(ticket, environment, engine, config, resume_from=strange)).turns == whole.turns


def test_wrong_settings_and_sources_are_refused():
    with pytest.raises(ConfigError, match="max_tokens is 0"):
        RolloutConfig(max_tokens=0)
    source = ScriptedSource("x")
    source.tokenizer = None
    with pytest.raises(InputError, match="needs a tokenizer"):
        rollout_of(Chat(), source)
