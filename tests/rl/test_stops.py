"""Stops in rollouts: which tokens are learnt from, what is read, and that nothing else changes."""

import asyncio
import json
import shutil
from dataclasses import replace

import httpx
import lockstep_runs
import pytest
import torch
from scripted import ADD, Chat, ScriptedSource, brief_model
from speaker import speaker_tokenizer

import glm5
from glm5.engine import Engine
from glm5.envs import EpisodeLimits
from glm5.errors import ConfigError
from glm5.rl.config import RLRunConfig
from glm5.rl.event_log import Unfinished
from glm5.rl.fleet import FleetConfig, SupervisedFleet
from glm5.rl.fleet.external import ServerExecutor
from glm5.rl.gateway.learning import outside
from glm5.rl.lockstep import train_in_lockstep
from glm5.rl.orchestrator import train_rl
from glm5.rl.records import Ticket
from glm5.rl.replay import batches_of
from glm5.rl.rollout_config import RolloutConfig
from glm5.rl.runner import play
from glm5.rl.stops import SpokenText
from glm5.serve.backend import Backend
from glm5.serve.backend_api import backend_api

TOKENIZER = speaker_tokenizer()
QUESTION = {"role": "user", "content": "And then?"}
CALL = "<tool_call>add<arg_key>a</arg_key><arg_value>3</arg_value></tool_call>"


def rollout_of(texts, environment=None, source=None, **options):
    config = RolloutConfig(thinking=True, **options)
    source = source or ScriptedSource(*texts)
    return asyncio.run(play(Ticket("chat", 0), environment or Chat(QUESTION), source, config)), source


def test_the_turn_is_all_tokens_to_the_end_of_the_stop_and_the_next_goes_on_behind_them():
    texts = ["Hm.</think>I run f(1); and so on<|user|>", "Ah.</think>No more<|user|>"]
    rollout, source = rollout_of(texts, stop=(";", "never"))
    first, second = rollout.turns
    assert TOKENIZER.decode(first.output_ids) == "Hm.</think>I run f(1);" and first.finish_reason == "stop"
    assert first.logprobs == (-0.5,) * len(first.output_ids) and source.streams[0].closed
    assert rollout.messages[1]["content"] == "I run f(1);" and rollout.messages[-1]["content"] == "No more"
    # The question comes right behind the stop; all that was sampled is trained once, in one trajectory.
    said = first.prompt_ids + first.output_ids
    assert second.prompt_ids[: len(said)] == said
    assert TOKENIZER.decode(second.prompt_ids[len(said) :]) == "<|user|>And then?<|assistant|><think>"
    [trajectory] = rollout.trajectories
    assert trajectory.num_sampled == len(first.output_ids + second.output_ids)
    assert rollout.outcome == "ok"

    before, _ = rollout_of(texts, stop=(";",), keep_stop=False)  # the same tokens, read otherwise
    assert before.messages[1]["content"] == "I run f(1)"
    assert (before.turns, before.trajectories) == (rollout.turns, rollout.trajectories)


def test_a_thought_may_hold_the_text_of_a_stop():
    rollout, _ = rollout_of(["f(1); then</think>f(2); and<|user|>", "</think>No more<|user|>"], stop=(";",))
    assert TOKENIZER.decode(rollout.turns[0].output_ids) == "f(1); then</think>f(2);"
    assert rollout.messages[1]["reasoning_content"] == "f(1); then" and rollout.messages[1]["content"] == "f(2);"
    call = f"I; run{CALL[: -len('</tool_call>')]};</tool_call><|observation|>"  # a call ends the thought
    rollout, _ = rollout_of([call, "</think>No more<|user|>"], Chat(QUESTION, tools=(ADD,)), stop=(";",))
    assert TOKENIZER.decode(rollout.turns[0].output_ids) == call[: call.index("</tool_call>")]


def test_a_token_that_goes_on_behind_the_stop_stays_whole():
    longest = max((TOKENIZER.decode([i]) for i in TOKENIZER.encode("The answer is")), key=len)
    assert len(longest) > 2
    stop = longest[:2]
    rollout, _ = rollout_of([f"</think>1{longest} more<|user|>", "</think>2<|user|>"], stop=(stop,))
    first, second = rollout.turns
    assert TOKENIZER.decode(first.output_ids) == f"</think>1{longest}"
    assert rollout.messages[1]["content"].strip() == f"1{stop}".strip()
    assert second.prompt_ids[: len(first.prompt_ids + first.output_ids)] == first.prompt_ids + first.output_ids
    assert len(rollout.trajectories) == 1


def test_a_call_ends_with_its_token_and_is_read_as_one():
    end = TOKENIZER.token_to_id("</tool_call>")
    result, texts = {"role": "tool", "content": "4"}, [f"</think>{CALL}and more<|user|>", "</think>4<|user|>"]
    source = ScriptedSource(*texts)
    stream = source.stream

    def engine_like(prompt_ids, params, **options):
        """An engine ends at the tokens that it is told."""
        made = stream(prompt_ids, params, **options)
        ids = [delta.token_id for delta in made.deltas]
        at = next((i for i, token in enumerate(ids) if token in params.stop_token_ids), None)
        if at is not None:
            made.deltas[at:] = [replace(made.deltas[at], finish_reason="stop")]
        return made

    source.stream = engine_like
    environment = Chat(result, tools=(ADD,))
    rollout, _ = rollout_of(texts, environment, source, stop_token_ids=(end,))
    first, second = rollout.turns
    assert first.output_ids[-1] == end and source.params[0].stop_token_ids == (end,)
    assert rollout.messages[1]["tool_calls"][0]["function"]["name"] == "add"
    said = first.prompt_ids + first.output_ids
    assert second.prompt_ids[: len(said)] == said
    assert TOKENIZER.decode(second.prompt_ids[len(said) :]).startswith("<|observation|>")
    [trajectory] = rollout.trajectories
    assert trajectory.num_sampled == rollout.num_sampled == len(first.output_ids + second.output_ids)


def test_a_turn_that_the_model_closes_is_as_without_stops():
    texts = ["</think>4<|user|>", "</think>5<|observation|>"]
    assert rollout_of(texts)[0] == rollout_of(texts, stop=("zzz",), stop_token_ids=(7,))[0]


def test_a_stop_is_found_however_its_tokens_cut_it():
    for stop in ("a é", "é b", "ü", "🙂"):
        text = SpokenText(TOKENIZER, (stop,))
        ids = TOKENIZER.encode("x a é b ü 🙂 z")
        taken = next(number for number, token in enumerate(ids, 1) if text.take([token]))
        assert TOKENIZER.decode(ids[:taken]).endswith(stop) and text.whole().endswith(stop)
    text = SpokenText(TOKENIZER, ("a é b c",))
    assert not text.take(TOKENIZER.encode("x a é b")) and text.whole() == "x a é b"  # nothing stays held back


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    directory = tmp_path_factory.mktemp("parent")
    glm5.save_model(brief_model(), directory, speaker_tokenizer())
    return directory


def test_a_turn_with_a_stop_goes_on_from_any_token():
    """The stop is of two characters, so that it may begin before the interruption and end behind it."""
    engine = Engine(brief_model(), TOKENIZER, strict=True, num_blocks=32)
    environment = Chat(QUESTION, limits=EpisodeLimits(turns=2))
    free = RolloutConfig(max_tokens=16, report_every=1)
    whole = asyncio.run(play(Ticket("chat", 0), environment, engine, free))
    pieces = [TOKENIZER.decode([token]) for token in whole.turns[0].output_ids]
    at = next(i for i in range(4, 15) if pieces[i].isascii() and pieces[i + 1].isascii() and pieces[i].isprintable())
    config = replace(free, stop=(pieces[at][-1] + pieces[at + 1][0],))

    known, reports = Unfinished(), []

    def note(ticket, number, first, turn):
        known.add(known.news(ticket, number, first, turn))
        reports.append(known.turns(ticket))

    stopped = asyncio.run(play(Ticket("chat", 0), environment, engine, config, progress=note))
    length = len(stopped.turns[0].output_ids)
    assert 1 < length <= at + 2 and stopped.turns[0].output_ids == whole.turns[0].output_ids[:length]
    assert stopped.turns[0].logprobs == whole.turns[0].logprobs[:length]  # those of the same draws without a stop
    for turns in reports:
        again = asyncio.run(play(Ticket("chat", 0), environment, engine, config, resume_from=turns))
        assert (again.turns, again.trajectories, again.messages) == (
            stopped.turns, stopped.trajectories, stopped.messages,
        )  # fmt: skip
    engine.close()


def test_a_strict_run_with_stops_is_exact_and_the_same_after_a_kill(parent, tmp_path):
    config = lockstep_runs.config_of(parent, steps=4)
    config = replace(config, rollout=replace(config.rollout, stop=("e", "th"), stop_token_ids=(70,)))
    whole = train_in_lockstep(config, [lockstep_runs.chat()], tmp_path / "whole")
    found, _ = lockstep_runs.differences(config, whole)
    assert len(found) > 100 and torch.equal(found, torch.zeros_like(found))
    turns = [turn for batch in batches_of(whole.path / "journal") for r in batch.rollouts for turn in r.turns]
    ended = {turn.output_ids[-1] in TOKENIZER.eos_ids for turn in turns if turn.finish_reason == "stop"}
    assert ended == {True, False}, "some end by the model, some by a stop"

    killed = tmp_path / "killed"
    shutil.copytree(whole.path, killed)
    shutil.rmtree(killed / "model")
    shutil.rmtree(killed / "checkpoints")
    lines = (killed / "journal").read_bytes().splitlines(keepends=True)
    (killed / "journal").write_bytes(b"".join(lines[: len(lines) // 2]))
    again = train_in_lockstep(config, [lockstep_runs.chat()], killed, resume=True)
    assert again.read("metrics") == whole.read("metrics")
    theirs = glm5.load_model(whole.model_directory).state_dict()
    assert all(t.equal(theirs[n]) for n, t in glm5.load_model(again.model_directory).state_dict().items())


def test_servers_are_left_at_the_stop(parent):
    ids, given = TOKENIZER.encode("</think>I run f(1); and so on, for long"), []

    async def tokens():
        for number, token in enumerate(ids, 1):
            given.append(token)
            finish = {"type": "length"} if number == len(ids) else None
            meta = {
                "completion_tokens": number,
                "finish_reason": finish,
                "output_token_logprobs": [[-0.5, token, None]],
            }
            yield f"data: {json.dumps({'output_ids': [token], 'meta_info': meta})}\n\n".encode()
            await asyncio.sleep(600 if ";" in TOKENIZER.decode(given[:-2]) else 0)

    async def handler(request):
        if request.url.path == "/health":
            return httpx.Response(200)
        return httpx.Response(200, headers={"content-type": "text/event-stream"}, content=tokens())

    async def story():
        backend = Backend("http://s", parent, backend_api("sglang"), transport=httpx.MockTransport(handler))
        fleet = SupervisedFleet(ServerExecutor([backend]), 1, tokenizer=backend.tokenizer, config=FleetConfig())
        await fleet.start()
        try:
            return await play(Ticket("chat", 0), Chat(), fleet, RolloutConfig(thinking=True, stop=(";",)))
        finally:
            await fleet.close()

    rollout = asyncio.run(story())
    [turn] = rollout.turns
    assert turn.finish_reason == "stop" and TOKENIZER.decode(turn.output_ids) == "</think>I run f(1);"
    assert rollout.messages[-1]["content"] == "I run f(1);" and len(given) < len(ids)


def test_what_cannot_be_is_refused_in_a_sentence(tmp_path):
    for options, says in (
        ({"stop": "abc"}, "rollout.stop is 'abc'; give a tuple"),
        ({"stop": ("a", "")}, "at least one character"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids is"),
        ({"top_p": 0.9}, r"rollout.top_p is 0.9, but rollouts are sampled from the whole distribution.*temperature"),
        ({"top_k": 50}, "rollout.top_k is 50"),
        ({"min_p": 0.05}, "rollout.min_p is 0.05"),
    ):
        with pytest.raises(ConfigError, match=says):
            RolloutConfig(**options)
    with pytest.raises(ConfigError, match="say themselves where answers stop"):
        outside(RLRunConfig(parent=tmp_path, rollout=RolloutConfig(stop=("x",))), patience=1.0)


@pytest.mark.parametrize("train", [train_rl, train_in_lockstep])
def test_a_token_that_the_model_does_not_have_leaves_no_run_behind(parent, tmp_path, train):
    size = glm5.ModelConfig.from_pretrained(parent).vocab_size
    config = lockstep_runs.config_of(parent, steps=1)
    config = replace(config, rollout=replace(config.rollout, stop_token_ids=(size - 1, size)))
    with pytest.raises(ConfigError, match=f"stop_token_ids has {size}, but the parent's tokens are 0 to {size - 1};"):
        train(config, [lockstep_runs.chat()], tmp_path / "run")
    assert not (tmp_path / "run").exists()
    config.rollout.check_vocabulary(size + 1)
