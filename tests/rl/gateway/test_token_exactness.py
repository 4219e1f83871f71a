"""Requests over the wire: what extends a recorded conversation extends its tokens, and what does not branches."""

import itertools
import threading

import pytest
from gateway_tools import OFF, TOOL, ask, full, gateway
from speaker import ScriptedModel, speaker_tokenizer

from glm5.engine import Engine
from glm5.rl.records import Ticket

USER = {"role": "user", "content": "What is 12 + 30?"}
MORE = {"role": "user", "content": "and the fox?"}
THINK = {"chat_template_kwargs": {"enable_thinking": True}}
END = "<|user|>"


@pytest.fixture(scope="module")
def random(tmp_path_factory):
    """Random weights: hardly anything that they say is tokenised again as it was sampled."""
    with gateway(tmp_path_factory.mktemp("random")) as running:
        yield running


def scripted(directory, text):
    return gateway(directory, source=Engine(ScriptedModel(text), speaker_tokenizer()))


def rollout(running, session, value=1.0):
    assert running.reward(session, value).status_code == 200
    return running.sessions.find(session).rollout(Ticket("gateway", 0))


def emitted(rollout):
    return sorted(token for t in rollout.turns for token in zip(t.output_ids, t.logprobs, t.versions, strict=True))


def trained(rollout):
    return sorted(
        token[:3]
        for t in rollout.trajectories
        for token in zip(t.token_ids, t.logprobs, t.versions, t.sampled, strict=True)
        if token[3]
    )


def test_a_growing_conversation_is_one_trajectory_of_sampled_tokens(random):
    client, messages = random.openai("chat"), [USER]
    for _ in range(4):
        answer = ask(client, messages).choices[0].message
        messages = [*messages, answer.model_dump(exclude_none=True), MORE]
    turns = random.turns("chat")
    for earlier, later in itertools.pairwise(turns):
        assert later.prompt_ids[: len(full(earlier))] == full(earlier) and earlier.finish_reason == "length"
    plain = speaker_tokenizer().apply_chat_template(messages[:-2], enable_thinking=False, escape_special=True)
    retokenised = tuple(plain) != turns[-1].prompt_ids
    assert retokenised, "the text gives other tokens, so this test would notice a gateway that goes through text"
    found = rollout(random, "chat")
    (only,) = found.trajectories
    assert only.num_sampled == 48 and emitted(found) == trained(found)
    assert len(found.messages) == 8 and found.messages[-1]["role"] == "assistant"


def test_an_answer_that_its_client_stops_is_recorded_and_trained_to_the_token_that_completes_the_stop(tmp_path):
    with scripted(tmp_path, "I run f(1); and so on") as running:
        client = running.openai("stopped")
        answer = ask(client, [USER], stop=[";"], max_tokens=60).choices[0]
        assert answer.finish_reason == "stop" and answer.message.content == "I run f(1)"
        ask(client, [USER, answer.message.model_dump(exclude_none=True), MORE], stop=["never"], max_tokens=4)
        first, second = running.turns("stopped")
        assert speaker_tokenizer().decode(first.output_ids) == "I run f(1);" and first.finish_reason == "stop"
        assert second.prompt_ids[: len(full(first))] != full(first)  # the client knows of no ";"
        found = rollout(running, "stopped")
        assert len(found.trajectories) == 2 and emitted(found) == trained(found)


def test_whole_and_streamed_answers_of_all_three_protocols_are_continued(tmp_path):
    with scripted(tmp_path, "the fox\n\n jumps") as running:
        client = running.openai("s")
        text = "".join(
            c.choices[0].delta.content or "" for c in ask(client, [USER], stream=True, max_tokens=60) if c.choices
        )
        ask(client, [USER, {"role": "assistant", "content": text}, MORE], max_tokens=60)
        off = {"reasoning": {"effort": "none"}, "max_output_tokens": 60}
        first = client.responses.create(model="tiny", input="hello", **off)
        client.responses.create(model="tiny", input="more", previous_response_id=first.id, **off)
        agent = running.anthropic("s")
        reply = agent.messages.create(model="tiny", max_tokens=60, messages=[USER])
        agent.messages.create(
            model="tiny", max_tokens=60, messages=[USER, {"role": "assistant", "content": reply.content}, MORE]
        )
        turns = running.turns("s")
        for earlier, later in [turns[0:2], turns[2:4], turns[4:6]]:
            assert later.prompt_ids[: len(full(earlier))] == full(earlier)
        assert len(rollout(running, "s").trajectories) == 3


@pytest.mark.parametrize("stream", [False, True])
def test_calls_and_thoughts_are_continued_with_their_end_token(tmp_path, stream):
    tokenizer = speaker_tokenizer()
    said = "the fox</think>\n\nThe answer is <tool_call>add<arg_key>a</arg_key><arg_value>12</arg_value></tool_call>"
    with scripted(tmp_path, said) as running:
        agent, messages = running.anthropic("s"), [USER]
        tool = {"name": "add", "input_schema": TOOL["function"]["parameters"]}
        asked = {
            "model": "tiny",
            "max_tokens": 200,
            "thinking": {"type": "enabled", "budget_tokens": 1024},
            "tools": [tool],
        }
        for _ in range(2):
            if stream:
                with agent.messages.stream(messages=messages, **asked) as events:
                    reply = events.get_final_message()
            else:
                reply = agent.messages.create(messages=messages, **asked)
            call = reply.content[-1]
            assert call.type == "tool_use" and call.input == {"a": 12}
            result = {"type": "tool_result", "tool_use_id": call.id, "content": "42"}
            messages += [{"role": "assistant", "content": reply.content}, {"role": "user", "content": [result]}]
        one, two = running.turns("s")
        # The model ended its turn with a role token of its own choice; the conversation goes on with another.
        assert (
            one.output_ids[-1] == tokenizer.token_to_id(END) and two.prompt_ids[: len(full(one)) - 1] == full(one)[:-1]
        )
        assert two.prompt_ids[len(full(one)) - 1] == tokenizer.token_to_id("<|observation|>")
        found = rollout(running, "s")
        assert [t.num_sampled for t in found.trajectories] == [len(one.output_ids), len(two.output_ids)]
        assert emitted(found) == trained(found)


def test_a_stripped_thought_branches_and_keeps_the_sampled_answer(tmp_path):
    tokenizer = speaker_tokenizer()
    with scripted(tmp_path, "the fox</think>jumps  over") as running:
        client = running.openai("s")
        answer = ask(client, [USER], extra_body=THINK, max_tokens=60).choices[0].message
        assert (answer.reasoning_content, answer.content) == ("the fox", "jumps  over")
        stripped = {"role": "assistant", "content": answer.content}
        kept = {**stripped, "reasoning_content": answer.reasoning_content}
        for messages in ([USER, stripped, MORE], [USER, kept, MORE], [USER, kept, {"role": "tool", "content": "1"}]):
            ask(client, messages, extra_body=THINK, max_tokens=60)
        one, client_stripped, template_cleared, whole = running.turns("s")
        end = one.output_ids.index(tokenizer.token_to_id("</think>"))
        shown = (*one.prompt_ids[:-1], *one.output_ids[end:])
        assert (
            client_stripped.prompt_ids[: len(shown)] == shown
            and client_stripped.prompt_ids == template_cleared.prompt_ids
        )
        assert whole.prompt_ids[: len(full(one)) - 1] == full(one)[:-1]
        found = rollout(running, "s")
        assert len(found.trajectories) == 4 and emitted(found) == trained(found)


def test_compaction_and_sub_agents_branch_with_the_tokens_of_the_answers_that_stay(random):
    client, messages = random.openai("compact"), [{"role": "system", "content": "be brief"}, USER]
    for _ in range(3):
        messages += [ask(client, messages).choices[0].message.model_dump(exclude_none=True), MORE]
    last_answer = random.turns("compact")[-1].output_ids
    compacted = [{"role": "user", "content": "so far: a fox"}, *messages[-2:]]
    ask(client, compacted)
    ask(client, [{"role": "system", "content": "you count"}, USER])  # a sub-agent
    ask(client, messages)  # the first one goes on
    tree = random.turns("compact")
    size = len(last_answer) - (last_answer[-1] in speaker_tokenizer().eos_ids)
    assert any(tree[3].prompt_ids[i : i + size] == last_answer[:size] for i in range(len(tree[3].prompt_ids)))
    assert tree[5].prompt_ids[: len(full(tree[2]))] == full(tree[2])
    found = rollout(random, "compact")
    lengths = [len(turn.output_ids) for turn in tree]
    assert [t.num_sampled for t in found.trajectories] == [*lengths[3:5], sum(lengths[:3]) + lengths[5]]
    assert emitted(found) == trained(found)


def test_an_edited_answer_is_context_and_not_trained(random):
    client = random.openai("edit")
    answer = ask(client, [USER]).choices[0].message.content
    ask(client, [USER, {"role": "assistant", "content": answer + " not"}, MORE])
    one, two = random.turns("edit")
    assert two.prompt_ids[: len(one.prompt_ids)] == one.prompt_ids and two.prompt_ids[: len(full(one))] != full(one)
    assert [t.num_sampled for t in rollout(random, "edit").trajectories] == [12, 12]


def test_parallel_requests_of_a_session_are_branches_of_what_they_share(random):
    client = random.openai("parallel")
    messages = [USER, ask(client, [USER]).choices[0].message.model_dump(exclude_none=True), MORE]
    calls = [threading.Thread(target=ask, args=(client, messages), kwargs={"seed": seed}) for seed in range(4)]
    for call in calls:
        call.start()
    for call in calls:
        call.join()
    ask(client, messages, n=2, seed=9)
    found = rollout(random, "parallel")
    assert [t.num_sampled for t in found.trajectories] == [24, 12, 12, 12, 12, 12] and emitted(found) == trained(found)


def test_what_a_temperature_or_a_grammar_chose_is_context(random):
    client = random.openai("settings")
    for fields in ({"temperature": 0.5}, {"top_p": 0.9}, {"tools": [TOOL], "tool_choice": "required", "max_tokens": 60},
                   {"extra_body": {**OFF, "top_k": 3}}, {"presence_penalty": 0.1},
                   {"extra_body": {**OFF, "bad_words": ["the"]}}, {}):  # fmt: skip
        answer = ask(client, [USER], **fields).choices[0].message
    ask(client, [USER, answer.model_dump(exclude_none=True), MORE])
    session = random.sessions.find("settings")
    assert [recorded.learnt for recorded in session.turns] == [False] * 6 + [True] * 2
    (only,) = rollout(random, "settings").trajectories
    assert only.num_sampled == 24


def test_an_answer_that_a_stop_string_cut_is_not_spliced(tmp_path):
    with scripted(tmp_path, "one two three") as running:
        client = running.openai("s")
        answer = ask(client, [USER], stop=[" three"], max_tokens=60).choices[0].message
        ask(client, [USER, {"role": "assistant", "content": answer.content}, MORE])
        one, two = running.turns("s")
        assert "three" in speaker_tokenizer().decode(one.output_ids)
        assert "three" not in speaker_tokenizer().decode(two.prompt_ids)
