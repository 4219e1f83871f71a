"""The conversation of `glm5 chat`: lines in, answers out as they come, and the commands that begin with a slash."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from glm5.cli.chat_source import ChatSettings, Message, Source
from glm5.errors import GLM5Error, InputError, TextError, did_you_mean
from glm5.files import replacing
from glm5.text.messages import prepare_messages

HELP = """\
/help              this list
/system [TEXT]     show the system prompt, or set it
/reset             forget the conversation, keep the system prompt
/retry             answer the last message again
/save FILE         write the conversation as JSON
/load FILE         go on with a saved conversation, also one exported from the web page
/thinking on|off   let the model think before it answers
/set NAME VALUE    temperature, top_p, max_tokens, seed; VALUE "default" leaves it to the model
/settings          show the settings
/exit              end; Ctrl-D does too
//TEXT             a message that begins with a slash

Enter sends. Alt-Enter, or a backslash at the end of the line, begins a new line. Ctrl-C stops an answer."""
CONTROL = {code: "\N{REPLACEMENT CHARACTER}" for code in [*range(32), *range(127, 160)] if chr(code) not in "\n\t"}
"""A model's text may hold the control sequences of terminals; what is shown does not."""


class Exit(Exception):
    """The user wants to end."""


class ChatLoop:
    """One conversation in a terminal. `read` gives the user's next text and raises `EOFError` at the end."""

    def __init__(
        self,
        source: Source,
        settings: ChatSettings,
        console: Console,
        read: Callable[[], str],
        system: str | None = None,
    ) -> None:
        self.source, self.settings, self.console, self.read = source, settings, console, read
        self.system = system
        self.messages: list[Message] = []
        self.commands: dict[str, Callable[[str], None]] = {
            "help": self.help, "system": self.set_system, "reset": self.reset, "new": self.reset, "retry": self.retry,
            "save": self.save, "load": self.load, "thinking": self.think, "set": self.set,
            "settings": self.show_settings, "exit": self.exit, "quit": self.exit,
        }  # fmt: skip

    def run(self) -> int:
        """Talks until /exit, Ctrl-D, or Ctrl-C twice at the prompt."""
        interrupted = False
        while True:
            try:
                text = self.read().strip()
            except KeyboardInterrupt:
                if not interrupted:
                    interrupted = True
                    self.note("Ctrl-D or /exit ends; so does Ctrl-C once more.")
                    continue
                self.console.print()
                return 0
            except EOFError:
                self.console.print()
                return 0
            interrupted = False
            try:
                if text.startswith("/") and not text.startswith("//"):
                    self.command(text)
                elif text:
                    self.say(text.removeprefix("/"))
            except Exit:
                return 0
            except KeyboardInterrupt:
                self.note("stopped")
            except (GLM5Error, OSError) as error:  # too long, a path that is none: the conversation stays as it was
                self.note(str(error), "red")
            except Exception as error:  # a fault of ours is no reason to lose a conversation that is not saved
                self.note(
                    f"This should not happen: {error!r}. The conversation stays as it was; /save keeps it.", "red"
                )

    def say(self, text: str) -> None:
        """Asks, and adds question and answer to the conversation; on an error neither."""
        asked = [*self.messages, {"role": "user", "content": text}]
        answer = self.answer(asked)
        self.messages = [*asked, answer] if answer is not None else asked

    def answer(self, messages: list[Message]) -> Message | None:
        """Streams one answer to the console. Ctrl-C stops it and keeps what was said; None if that is nothing."""
        opening = [{"role": "system", "content": self.system}] if self.system else []
        settings = self.settings
        if settings.seed is not None:  # answer k is sampled with seed + k, so that a conversation can be repeated
            turn = sum(message["role"] == "user" for message in messages) - 1
            settings = dataclasses.replace(settings, seed=settings.seed + turn)
        shown = Shown(self.console)
        pieces = self.source.stream([*opening, *messages], settings)
        try:
            for piece in pieces:
                shown.add(piece.delta, piece.completion_tokens)
            shown.end("")
        except KeyboardInterrupt:
            shown.end("stopped")
        except BaseException:
            self.console.print()
            raise
        finally:
            pieces.close()  # ends the sampling
        return shown.message()

    # ---- commands -----------------------------------------------------------------------------------------------
    def command(self, line: str) -> None:
        """Runs a line that begins with a slash."""
        name, _, rest = line[1:].partition(" ")
        if name not in self.commands:
            meant = did_you_mean(name, self.commands)
            raise InputError(f"There is no command /{name}.{meant} /help lists them; // begins a message with a slash.")
        self.commands[name](rest.strip())

    def help(self, _: str) -> None:
        """/help"""
        self.note(HELP)

    def set_system(self, text: str) -> None:
        """/system: shows the prompt without a text, sets it with one."""
        if text:
            self.system = text
        self.note(f"system prompt: {self.system or 'none'}")

    def reset(self, _: str) -> None:
        """/reset"""
        self.messages = []
        self.note("A new conversation.")

    def retry(self, _: str) -> None:
        """/retry: another answer to the last message."""
        last = max((i for i, message in enumerate(self.messages) if message["role"] == "user"), default=None)
        if last is None:
            raise InputError("There is no message to answer yet.")
        asked = self.messages[: last + 1]
        answer = self.answer(asked)
        self.messages = [*asked, answer] if answer is not None else asked

    def save(self, name: str) -> None:
        """/save: the same file that the web page exports."""
        path = _path(name, "save")
        opening = [{"role": "system", "content": self.system}] if self.system else []
        content = {"kind": "conversation", "model": self.source.name, "messages": [*opening, *self.messages]}
        with replacing(path) as file:
            file.write((json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode())
        self.note(f"{len(self.messages)} messages in {path}")

    def load(self, name: str) -> None:
        """/load: replaces the conversation and its system prompt."""
        path = _path(name, "load")
        self.system, self.messages = read_conversation(path)
        for message in self.messages[-2:]:
            self.note(f"{message['role']}: {message.get('content') or ''}")
        self.note(f"{len(self.messages)} messages from {path}")

    def think(self, choice: str) -> None:
        """/thinking on|off"""
        if choice not in ("on", "off"):
            raise InputError("Say /thinking on or /thinking off.")
        self.settings = dataclasses.replace(self.settings, thinking=choice == "on")
        self.note(f"thinking {choice}")

    def set(self, rest: str) -> None:
        """/set NAME VALUE"""
        name, _, value = rest.partition(" ")
        kinds: dict[str, type] = {"temperature": float, "top_p": float, "max_tokens": int, "seed": int}
        if name not in kinds:
            raise InputError(f"/set takes {', '.join(kinds)}.{did_you_mean(name, kinds)}")
        number: Any = None
        try:
            if value.strip() != "default":
                number = kinds[name](value)
        except ValueError:
            raise InputError(f"{name} cannot be {value!r}; give a number, or default.") from None
        self.settings = dataclasses.replace(self.settings, **{name: number})
        self.show_settings("")

    def show_settings(self, _: str) -> None:
        """/settings"""
        values = dataclasses.asdict(self.settings)
        self.note(", ".join(f"{name} {'default' if value is None else value}" for name, value in values.items()))

    def exit(self, _: str) -> None:
        """/exit"""
        raise Exit

    def note(self, text: str, style: str = "dim") -> None:
        """Something that the program says, not the model."""
        self.console.print(text.translate(CONTROL), style=style, markup=False, highlight=False, soft_wrap=True)


class Shown:
    """An answer while it appears: thinking dimmed, then the text, calls as they are written."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.reasoning, self.content = "", ""
        self.calls: list[dict[str, Any]] = []
        self.tokens: int | None = None
        self.started = time.perf_counter()

    def add(self, delta: dict[str, Any], tokens: int | None) -> None:
        """Shows a delta and keeps it."""
        self.tokens = tokens if tokens is not None else self.tokens
        if thought := delta.get("reasoning_content"):
            self.reasoning += thought
            self._print(thought, "dim")
        if text := delta.get("content"):
            self._print("\n\n" if self.reasoning and not self.content else "")
            self.content += text
            self._print(text)
        for call in delta.get("tool_calls") or []:
            self._call(call)

    def _call(self, part: dict[str, Any]) -> None:
        function = part.get("function") or {}
        name, arguments = function.get("name") or "", function.get("arguments") or ""
        if part.get("index", 0) >= len(self.calls):
            call = {"id": part.get("id") or "", "type": "function", "function": {"name": "", "arguments": ""}}
            self.calls.append(call)
            self._print("\n" if self.reasoning or self.content or len(self.calls) > 1 else "")
        known = self.calls[-1]["function"]
        known["name"] += name
        known["arguments"] += arguments
        self._print(name + (" " if name else "") + arguments, "cyan")

    def end(self, why: str) -> None:
        """Ends the line, with the speed if it is known."""
        seconds = time.perf_counter() - self.started
        speed = [f"{self.tokens} tokens", f"{self.tokens / seconds:,.1f} tokens/s"] if self.tokens else []
        self.console.print()
        if figures := ", ".join([why] * bool(why) + speed):
            self.console.print(f"[{figures}]", style="dim", markup=False, highlight=False)

    def message(self) -> Message | None:
        """The assistant's message; a call that was cut off is left out, None if nothing was said."""
        message: Message = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if calls := [call for call in self.calls if _is_json(call["function"]["arguments"])]:
            message["tool_calls"] = calls
        return message if self.content or self.reasoning or calls else None

    def _print(self, text: str, style: str | None = None) -> None:
        self.console.print(
            text.translate(CONTROL), end="", style=style, markup=False, highlight=False, soft_wrap=True
        )  # fmt: skip
        self.console.file.flush()


def read_conversation(path: Path) -> tuple[str | None, list[Message]]:
    """System prompt and messages of a saved conversation, contents in parts as one text. Raises `InputError`."""
    try:
        messages = json.loads(path.read_text(encoding="utf-8"))["messages"]
        prepared = prepare_messages(messages) if messages != [] else []
    except TextError as error:
        raise InputError(f"{path} holds no conversation that can go on: {error}.") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise InputError(
            f"{path} is no saved conversation; /save and the web page's export write such files."
        ) from None
    messages = [{**message, "content": plain["content"]} for message, plain in zip(messages, prepared, strict=True)]
    system = [message["content"] for message in messages if message["role"] == "system"]
    return "\n\n".join(system) or None, [message for message in messages if message["role"] != "system"]


def _path(name: str, verb: str) -> Path:
    if not name:
        raise InputError(f"Name a file: /{verb} conversation.json")
    return Path(name).expanduser()


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
