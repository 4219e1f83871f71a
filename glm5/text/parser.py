"""`AssistantStream`: what GLM-5 writes, split into reasoning, content and tool calls while it is written.

A state machine over characters. What it reports does not depend on how the text was cut into pieces, and
`parse_assistant` is one `feed`, so whole and streamed parsing cannot differ.

    REASONING </think> CONTENT <tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value>...</tool_call> ...

What models really write, and what becomes of it:

* `<tool_call>` inside the reasoning ends the reasoning. A second `</think>` and an echoed first `<think>` are dropped.
* A missing `</tool_call>` or `</arg_value>` is supplied at the next call or at the end; a key without a value is
  dropped, and so is the second value of a key. A call without a name is content.
* A value may contain the tags themselves (an agent that edits this file): a closing tag counts when what follows it
  can follow it, and a doubtful one is settled by the next that counts.
* Unknown tools are kept. String arguments stream as they come; others are typed by their schema; any type if broken.
  Those of a `strict` tool, which a grammar holds, are JSON or text to the letter.
* Blank lines around the content and terminators at the end are dropped; content that is only blank is None.
* Reasoning is exact, so that sending it back gives the same tokens. `reasoning`: it is still open.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from glm5.text.deltas import Delta, Deltas
from glm5.text.messages import prepare_tools
from glm5.text.specials import TERMINATORS
from glm5.text.values import STRING, argument_types, to_json, value_json

Message = dict[str, Any]

_VALUE_END = re.compile(r"</arg_value>|</tool_call>")
# The next twelve characters behind white space; some checkpoints write a newline as two characters.
_AFTER_VALUE = re.compile(r"(?:\\n|\s)*(.{0,12})", re.DOTALL)
_AFTER_CALL = re.compile(r"\s*(.{0,12})", re.DOTALL)


@cache
def _prefixes(tags: tuple[str, ...]) -> tuple[str, ...]:
    """Every proper beginning of a tag, the longest first."""
    return tuple(sorted({tag[:n] for tag in tags for n in range(1, len(tag))}, key=len, reverse=True))


def _any(texts: Sequence[str]) -> str:
    return "(?:" + "|".join(map(re.escape, texts)) + ")"


_TERMINATED = re.compile(rf"(?:{_any(TERMINATORS)}\s*)+")
_MAYBE_TERMINATED = re.compile(rf"(?:{_any(TERMINATORS)}\s*)*{_any(_prefixes(TERMINATORS))}?\Z")


def parse_assistant(
    text: str, tools: Sequence[Mapping[str, Any]] | None = None, thinking: bool = True, seed: str = ""
) -> Message:
    """The message in a whole assistant text: `role`, `reasoning_content`, `content`, `tool_calls` (OpenAI's shape).

    `thinking`: the prompt already ended in `<think>`. `reasoning_content` is None without reasoning and "" when it was
    closed at once; `content` is None if blank; `tool_calls` may be empty; arguments are a JSON string.
    """
    stream = AssistantStream(tools, thinking, seed)
    stream.feed(text)
    return stream.finish()


class AssistantStream:
    """Parses one assistant turn. `feed` pieces, `close` for the rest at the end, `finish` for the whole message."""

    def __init__(
        self,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool = True,
        seed: str = "",
        calls: bool = True,
        begun: bool = False,
    ) -> None:
        """`seed` makes the identities of the calls: that of the response, and they differ between turns. `calls`: False
        where none may be made; the tag is text then. `begun`: the prompt ended inside the content, so it goes on as it
        is written, without reasoning and blank lines first too. Raises `TextError` for a tool without a name."""
        functions = [tool.get("function", tool) for tool in prepare_tools(tools) or []]
        self._parameters = {f["name"]: f.get("parameters") or {} for f in functions}
        self._strict = {f["name"] for f in functions if f.get("strict") is True}
        self._thinking, self._seed = thinking, seed
        self._opens = ("<tool_call>",) if calls else ()
        self._buffer, self._tail = "", ""  # what no state has consumed yet, and what may turn out to be the terminators
        self._taken: list[str] = []  # what a state has consumed of a name or a key that is not whole yet
        self._ended = False
        self._state: Callable[[], bool] = self._in_content if begun else self._start
        self._deltas = Deltas()
        self._reasoning: list[str] | None = None
        self._content = [""] if begun else []  # what is said behind something keeps its blank lines
        self._blank: list[str] = []  # white space that is content only if more content follows
        self._calls: list[dict[str, Any]] = []
        self._fragments: list[str] = []  # the arguments of the open call, as JSON text
        self._open = False  # a call is open
        self._keys: set[str] = set()
        self._key = ""
        self._types: frozenset[str] = frozenset()
        self._value: list[str] = []  # text of a value that is typed when complete
        self._doubt = ""  # the closing tag at the head of the buffer that may be part of the value
        self._seen = 0  # how far the buffer has been searched behind a doubt

    @property
    def reasoning(self) -> bool:
        return self._thinking if self._state == self._start else self._state == self._in_reasoning

    def feed(self, piece: str) -> list[Delta]:
        """Deltas that this piece completes, each in OpenAI's shape: reasoning_content, content or tool_calls."""
        if self._ended:
            raise RuntimeError("this stream has ended; make a new AssistantStream for the next turn")
        self._tail += piece
        held = _MAYBE_TERMINATED.search(self._tail)
        cut = held.start() if held else len(self._tail)
        self._buffer, self._tail = self._buffer + self._tail[:cut], self._tail[cut:]
        return self._run()

    def close(self) -> list[Delta]:
        """Ends the text: the deltas of everything that was held back. Calling it again gives nothing."""
        if self._ended:
            return []
        if not _TERMINATED.match(self._tail):
            self._buffer += self._tail
        self._ended = True
        deltas = self._run()
        if self._open:
            self._close_call()
            deltas += self._deltas.take()
        return deltas

    def finish(self) -> Message:
        """The whole message; everything in it was in the deltas of `feed` and `close`."""
        self.close()
        return {
            "role": "assistant",
            "reasoning_content": None if self._reasoning is None else "".join(self._reasoning),
            "content": "".join(self._content) or None,
            "tool_calls": self._calls,
        }

    # --- the states: each consumes what it can and says whether the next one should go on at once

    def _run(self) -> list[Delta]:
        while self._state():
            pass
        return self._deltas.take()

    def _start(self) -> bool:
        text = self._buffer.lstrip()
        if not self._ended and (not text or text in _prefixes(("<think>", "</think>"))):
            return False
        if text.startswith("<think>"):
            self._thinking, self._buffer = True, text.removeprefix("<think>")
        elif not self._thinking:
            self._buffer = text.removeprefix("</think>") if text.startswith("</think>") else self._buffer
        if self._thinking:
            self._reasoning = []
        self._state = self._in_reasoning if self._thinking else self._in_content
        return True

    def _in_reasoning(self) -> bool:
        text, tag = self._take("</think>", *self._opens)
        if text and self._reasoning is not None:
            self._reasoning.append(text)
            self._deltas.text("reasoning_content", text)
        if tag:
            self._state = self._in_content if tag == "</think>" else self._in_name
        return bool(tag)

    def _in_content(self) -> bool:
        text, tag = self._take(*self._opens, "</think>")
        self._say(text)
        if tag == "<tool_call>":
            self._state = self._in_name
        return bool(tag)

    def _in_name(self) -> bool:
        taken = self._take_whole("<arg_key>", "</tool_call>", "<tool_call>")
        if taken is None:
            return False
        text, tag = taken
        name = (text if tag else text.partition("<")[0]).strip()
        if name:
            self._open_call(name)
            self._after(tag)
        else:
            self._say("<tool_call>" + text if tag else "")
            self._buffer = tag + self._buffer
            self._state = self._in_content
        return bool(tag)

    def _between(self) -> bool:
        _, tag = self._take("<arg_key>", "</tool_call>", "<tool_call>")
        self._after(tag)
        return bool(tag)

    def _in_key(self) -> bool:
        taken = self._take_whole("</arg_key>", "<arg_value>", "</tool_call>")
        if taken is None:
            return False
        text, tag = taken
        self._key = text.strip()
        if tag == "<arg_value>":
            self._open_value()
        elif tag == "</arg_key>":
            self._state = self._before_value
        else:
            self._after(tag)
        return bool(tag)

    def _before_value(self) -> bool:
        _, tag = self._take("<arg_value>", "<arg_key>", "</tool_call>", "<tool_call>")
        if tag == "<arg_value>":
            self._open_value()
        elif tag:
            self._after(tag)
        return bool(tag)

    def _in_value(self) -> bool:
        while found := _VALUE_END.search(self._buffer, self._seen):
            closes = self._closes(found)
            if closes is None:
                self._release(found.start())
                return False
            if closes:
                doubtful = self._doubt and found.group() == "</tool_call>"
                self._cut_value(0 if doubtful else found.start(), self._doubt if doubtful else found.group())
                return True
            if self._doubt:
                self._seen = found.end()
            else:
                self._release(found.start())
                self._doubt, self._seen = found.group(), len(found.group())
        if self._ended:
            self._cut_value(0 if self._doubt else len(self._buffer), self._doubt)
            return bool(self._buffer)
        self._release(len(self._buffer) - self._held("</arg_value>", "</tool_call>"))
        return False

    def _closes(self, found: re.Match[str]) -> bool | None:
        """Whether what follows a closing tag inside a value makes it one; None if more text must decide."""
        value = found.group() == "</arg_value>"
        follows = (_AFTER_VALUE if value else _AFTER_CALL).match(self._buffer, found.end())[1]  # type: ignore[index]
        openers = ("<arg_key>", "</tool_call>", "<tool_call>") if value else ("<tool_call>",)
        if follows.startswith(openers):
            return True
        if self._ended:
            return not follows
        return None if not follows or follows == "\\" or follows in _prefixes(openers) else False

    # --- moves between states

    def _after(self, tag: str) -> None:
        """Goes where a tag leads that stands between arguments; without one, waits there for it."""
        if tag == "<arg_key>":
            self._state = self._in_key
        elif tag:
            self._close_call()
            self._state = self._in_name if tag == "<tool_call>" else self._in_content
        else:
            self._state = self._between

    def _open_call(self, name: str) -> None:
        index = len(self._calls)
        digest = hashlib.sha256(f"{self._seed}/{index}".encode()).hexdigest()[:24]
        call = {"id": f"call_{digest}", "type": "function", "function": {"name": name, "arguments": ""}}
        self._calls.append(call)
        self._deltas.call(index, call)
        self._open, self._keys, self._fragments = True, set(), []

    def _close_call(self) -> None:
        self._argue("}" if self._keys else "{}")
        self._calls[-1]["function"]["arguments"] = "".join(self._fragments)
        self._open = False

    def _open_value(self) -> None:
        self._types = argument_types(self._parameters.get(self._calls[-1]["function"]["name"], {}), self._key)
        self._value, self._doubt, self._seen = [], "", 0
        self._state = self._in_value
        if self._key not in self._keys:
            self._argue(("{" if not self._keys else ", ") + to_json(self._key) + ": ")
            if self._types == STRING:
                self._argue('"')

    def _release(self, end: int) -> None:
        """Moves the buffer up to `end` into the value, unless a doubt holds it back."""
        if self._doubt:
            # Tags at the very end may still grow: look at them again.
            self._seen = max(self._seen, min(end, len(self._buffer) - len("</arg_value>") + 1))
            return
        text, self._buffer = self._buffer[:end], self._buffer[end:]
        if self._types == STRING and self._key not in self._keys:
            self._argue(to_json(text)[1:-1])
        else:
            self._value.append(text)

    def _cut_value(self, end: int, tag: str) -> None:
        """Ends the value at `end`, where `tag` stands."""
        self._doubt = ""
        self._release(end)
        self._buffer = self._buffer[len(tag) :]
        if self._key not in self._keys:
            strict = self._calls[-1]["function"]["name"] in self._strict
            self._argue('"' if self._types == STRING else value_json("".join(self._value), self._types, exact=strict))
            self._keys.add(self._key)
        self._after("" if tag == "</arg_value>" else tag)

    def _argue(self, fragment: str) -> None:
        """A piece of the open call's arguments, as JSON text."""
        self._fragments.append(fragment)
        self._deltas.arguments(len(self._calls) - 1, fragment)

    # --- text in and text out

    def _take(self, *tags: str) -> tuple[str, str]:
        """Consumes the text before the first of the tags, and the tag; "" for the tag while there is none."""
        found = min(((at, tag) for tag in tags if (at := self._buffer.find(tag)) >= 0), default=None)
        end, tag = found or (len(self._buffer) - self._held(*tags), "")
        text, self._buffer = self._buffer[:end], self._buffer[end + len(tag) :]
        return text, tag

    def _take_whole(self, *tags: str) -> tuple[str, str] | None:
        """The same, but gives nothing until the tag, or the end of the text, is there."""
        text, tag = self._take(*tags)
        self._taken.append(text)
        if not tag and not self._ended:
            return None
        text, self._taken = "".join(self._taken), []
        return text, tag

    def _held(self, *tags: str) -> int:
        """How many characters at the end of the buffer may be the beginning of one of the tags."""
        if self._ended:
            return 0
        return next((len(prefix) for prefix in _prefixes(tags) if self._buffer.endswith(prefix)), 0)

    def _say(self, text: str) -> None:
        said = text.rstrip()
        if not said:
            self._blank.append(text)
            return
        said, self._blank = "".join(self._blank) + said, [text[len(said) :]]
        if not self._content:  # drop blank lines at the start, keep the first line's indentation
            body = said.lstrip()
            said = said[: len(said) - len(body)].rpartition("\n")[2] + body
        self._content.append(said)
        self._deltas.text("content", said)
