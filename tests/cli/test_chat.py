"""`glm5 chat` over prepared lines: an engine that says a prepared text, commands, and conversations in files."""

import io
import json
from pathlib import Path

import pytest
import torch
import tyro
from chat_talk import Prepared, lines_of, talk
from fake_chat import CALL
from rich.console import Console
from speaker import ScriptedModel, speaker_model, speaker_tokenizer

import glm5
from glm5.cli.chat import ChatOptions, open_source, run
from glm5.cli.chat_loop import ChatLoop, read_conversation
from glm5.cli.chat_source import ChatSettings, EngineSource, Piece
from glm5.engine import Engine, SamplingDefaults
from glm5.errors import InputError


def scripted(text):
    """An engine that says a text, and the prompts that it saw."""
    engine = Engine(ScriptedModel(text), speaker_tokenizer())
    prompts, stream = [], engine.stream
    engine.stream = lambda ids, params: (prompts.append(speaker_tokenizer().decode(ids)), stream(ids, params))[1]
    return EngineSource(engine, "tiny"), prompts


def test_thinking_is_dimmed_and_the_conversation_goes_on():
    source, prompts = scripted("so[b]</think>42 [x]")
    screen, _ = talk(source, ["12 + 30?", "", "and now?", "/exit", "never read"], system="Be brief.")
    assert screen.count("42 [x]") == 2  # markup of the answer is text
    assert "\x1b[2m" in screen.split("42 [x]")[0] and "\x1b[2m42" not in screen
    assert "tokens/s]" in screen
    assert prompts[0] == "[gMASK]<sop><|system|>Be brief.<|user|>12 + 30?<|assistant|><think>"
    assert prompts[1].endswith("12 + 30?<|assistant|></think>42 [x]<|user|>and now?<|assistant|><think>")
    assert len(prompts) == 2


def test_commands():
    source = Prepared()
    lines = """/help|/what|/sytem x|one|/system Be kind.|two|/reset|three|/thinking off|/set temperature 0.5
|/set temperature warm|/set x 1|/set seed 4|/settings|four|/retry|/set temperature default|five"""
    screen, loop = talk(source, lines.split("|"))
    sentences = """/save FILE|no command /what|Did you mean 'system'|system prompt: Be kind.
|temperature cannot be 'warm'|/set takes temperature|thinking False, temperature 0.5"""
    for sentence in sentences.split("|"):
        assert sentence.strip() in screen, sentence
    said = [[message["content"] for message in asked] for asked in source.asked]
    assert said[0] == ["one"] and said[1] == ["Be kind.", "one", "ok", "two"] and said[2] == ["Be kind.", "three"]
    assert said[3] == said[4] == ["Be kind.", "three", "ok", "four"]
    assert source.settings[3] == ChatSettings(thinking=False, temperature=0.5, max_tokens=60, seed=4 + 1)
    assert source.settings[5].temperature is None
    assert [m["content"] for m in loop.messages] == ["three", "ok", "four", "ok", "five", "ok"]


def test_settings_win_over_the_models_advice_and_that_over_the_chats_own():
    engine, seen = Engine(ScriptedModel("</think>ok"), speaker_tokenizer()), []
    stream = engine.stream
    engine.stream = lambda ids, params: (seen.append(params), stream(ids, params))[1]
    for defaults, settings in (
        (SamplingDefaults(), ChatSettings(max_tokens=9)),
        (SamplingDefaults(top_p=0.5, top_k=7), ChatSettings(max_tokens=9)),
        (SamplingDefaults(temperature=0.3), ChatSettings(max_tokens=9, temperature=0.0)),
    ):
        list(EngineSource(engine, "tiny", defaults).stream([{"role": "user", "content": "Hi"}], settings))
    assert [(p.temperature, p.top_p, p.top_k) for p in seen] == [(1.0, 0.95, 0), (1.0, 0.5, 7), (0.0, 0.95, 0)]


def test_a_refusal_leaves_the_conversation_as_it_was():
    source, prompts = scripted("</think>ok")
    screen, loop = talk(source, ["one", "x" * 600, "/retry", "two"])
    assert "context limit is 512" in screen
    assert prompts[-1].endswith("<|user|>one<|assistant|></think>ok<|user|>two<|assistant|><think>")
    assert len(loop.messages) == 4
    assert "no message to answer" in talk(Prepared(), ["/retry"])[0]


def test_ctrl_c_stops_an_answer_and_keeps_what_was_said():
    call = {"tool_calls": [{"index": 0, **CALL, "function": {"name": "f", "arguments": '{"a": '}}]}
    source = Prepared([Piece({"content": "one two"}), Piece(call), KeyboardInterrupt()], [KeyboardInterrupt()])
    screen, _ = talk(source, ["go", "on", "again"])
    assert "[stopped]" in screen
    assert source.asked[1][1] == {"role": "assistant", "content": "one two"}  # the cut-off call is gone
    assert [message["role"] for message in source.asked[2]] == ["user", "assistant", "user", "user"]
    assert source.closed == 3


def test_ctrl_c_at_the_prompt_ends_only_when_pressed_again():
    again = KeyboardInterrupt()
    screen, loop = talk(Prepared(), ["one", again, "two", again, "", again, again, "never read"])
    assert [m["content"] for m in loop.messages] == ["one", "ok", "two", "ok"]
    assert screen.count("Ctrl-D or /exit ends") == 3


def test_two_slashes_begin_a_message_with_one():
    screen, loop = talk(Prepared(), ["/usr/bin what is it?", "//usr/bin what is it?", "// a comment"])
    assert "There is no command /usr/bin." in screen and "// begins a message with a slash" in screen
    assert [m["content"] for m in loop.messages[::2]] == ["/usr/bin what is it?", "/ a comment"]


def test_control_sequences_of_an_answer_do_not_reach_the_terminal():
    attack = "\x1b]0;title\x07 \x9b31m red \x1b[2J"
    call = {"index": 0, "function": {"name": attack, "arguments": "{}"}}
    source = Prepared([Piece({"reasoning_content": attack}), Piece({"content": attack}), Piece({"tool_calls": [call]})])
    screen = io.StringIO()
    loop = ChatLoop(source, ChatSettings(), Console(file=screen), lines_of(["hi"]))
    loop.run()
    assert not {"\x1b", "\x07", "\x9b"} & set(screen.getvalue())
    assert loop.messages[1]["content"] == attack  # kept as it was said


def test_save_and_load(tmp_path):
    file = tmp_path / "talk.json"
    call = Piece({"tool_calls": [{"index": 0, **CALL}]})
    _, first = talk(Prepared([Piece({"reasoning_content": "hm"}), Piece({"content": "é"}), call]),
                    ["hi", f"/save {file}"], system="Be kind.")  # fmt: skip
    assert read_conversation(file) == ("Be kind.", first.messages)
    assert first.messages[1] == {"role": "assistant", "content": "é", "reasoning_content": "hm", "tool_calls": [CALL]}
    screen, second = talk(Prepared(), [f"/load {file}", "more"])
    assert "assistant: é" in screen and second.messages[:2] == first.messages and second.system == "Be kind."
    file.write_text("[]")
    screen, third = talk(Prepared(), ["hi", f"/load {file}", "/load", f"/load {tmp_path}/none", f"/save {tmp_path}"])
    assert screen.count("is no saved conversation") == 2 and "Name a file" in screen
    assert len(third.messages) == 2


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"messages": [{"role": "system"}]}', "message 0 (system) is a NoneType"),
        ('{"messages": [{"role": "user", "content": 5}]}', "message 0 (user) is a int"),
        ('{"messages": {"a": 1}}', "a conversation is a list"),
        ('{"messages": [5]}', "message 0 is a int"),
        ('{"messages": ' + "[" * 100_000, "is no saved conversation"),
        ("5", "is no saved conversation"),
        ("\xff", "is no saved conversation"),
    ],
)
def test_an_odd_file_is_refused_and_the_conversation_goes_on(tmp_path, content, sentence):
    file = tmp_path / "odd.json"
    file.write_bytes(content.encode("latin-1"))
    screen, loop = talk(Prepared(), ["hi", f"/load {file}", "more"])
    assert sentence in screen and [m["content"] for m in loop.messages] == ["hi", "ok", "more", "ok"]


def test_a_file_of_parts_is_loaded_as_text(tmp_path):
    file = tmp_path / "parts.json"
    parts = [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}]
    file.write_text(
        json.dumps({"messages": [{"role": "system", "content": parts}, {"role": "user", "content": parts}]})
    )
    assert read_conversation(file) == ("Be kind.", [{"role": "user", "content": "Be kind."}])
    file.write_text('{"messages": []}')
    assert read_conversation(file) == (None, [])


def test_calls_of_different_turns_have_different_identities():
    _, loop = talk(scripted("</think><tool_call>f</tool_call>")[0], ["one", "two"])
    ids = [call["id"] for message in loop.messages for call in message.get("tool_calls", [])]
    assert len(ids) == len(set(ids)) == 2


def test_a_conversation_needs_a_tokenizer(tmp_path):
    glm5.save_model(speaker_model(), tmp_path)
    with pytest.raises(InputError, match=r"needs a tokenizer.*tokenizer\.json"):
        run(ChatOptions(model=tmp_path))


def test_a_fault_of_the_program_does_not_lose_the_conversation(tmp_path):
    file = tmp_path / "talk.json"
    source = Prepared([Piece({"content": "ok"})], [Piece({"content": "half"}), ZeroDivisionError("odd")])
    screen, loop = talk(source, ["one", "two", f"/save {file}"])
    assert "should not happen: ZeroDivisionError('odd')" in screen
    assert read_conversation(file)[1] == loop.messages and len(loop.messages) == 2


def test_options():
    options = tyro.cli(ChatOptions, args=["runs/a", "--no-thinking", "--temperature", "0"])
    assert options == ChatOptions(model=Path("runs/a"), thinking=False, temperature=0.0)
    with pytest.raises(InputError, match="--draft-tokens is for a model in this process"):
        open_source(ChatOptions(url="http://x", draft_tokens=2))
    with pytest.raises(InputError, match="not both"):
        open_source(ChatOptions(model=Path("a"), url="http://x"))
    with pytest.raises(InputError, match="needs --url"):
        open_source(ChatOptions(model=Path("a"), name="x"))


def test_the_engine_is_made_as_the_options_say(tmp_path):
    glm5.save_model(speaker_model(), tmp_path, speaker_tokenizer())
    args = ["--dtype", "bfloat16", "--cache", "fp8", "--max-model-len", "99"]
    source, _ = open_source(tyro.cli(ChatOptions, args=[str(tmp_path), *args]))
    assert source.engine.max_model_len == 99
    assert {weight.dtype for weight in source.engine.model.parameters()} >= {torch.bfloat16}
    pieces = source.stream([{"role": "user", "content": "Hi"}], ChatSettings(max_tokens=3, seed=1))
    assert list(pieces)[-1].completion_tokens <= 3
