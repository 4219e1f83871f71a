"""`glm5 chat` in a process of its own: over a pseudo-terminal, and over a pipe."""

import contextlib
import json
import os
import pty
import select
import subprocess
import sys
import time

from chat_talk import lines_of
from fake_chat import FakeChat, Running

from glm5.cli.chat_input import continued, history_file


def test_a_backslash_takes_the_next_line_too(monkeypatch, tmp_path):
    assert continued(lines_of(["one\\", "two\\", "three", "four"])) == "one\ntwo\nthree"
    assert continued(lines_of(["one\\"])) == "one"
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert history_file() == tmp_path / "glm5" / "chat-history"


def test_a_pipe_may_hold_bytes_that_are_no_text(tmp_path):
    """Also where the locale knows ASCII alone: what is wrong in the input, and what cannot be shown, ends nothing."""
    fake = FakeChat()
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    with Running(fake.app) as url:
        program = f"from glm5.cli.chat import *; raise SystemExit(run(ChatOptions(url={url!r})))"
        done = subprocess.run(
            [sys.executable, "-c", program], input=b"\xff\xfe h\xc3\xa9\nmore\n", capture_output=True,
            env={**os.environ, **ascii_only},
        )  # fmt: skip
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert [body["messages"][-1]["content"] for body in fake.asked] == ["\ufffd\ufffd hé", "more"]
    assert b"You said: more" in done.stdout


def test_in_a_real_terminal_lines_are_edited_and_remembered(tmp_path):
    """Several lines with Alt-Enter, the arrow for what was said before, Ctrl-D to end; over a pseudo-terminal."""
    fake = FakeChat()
    with Running(fake.app) as url:
        main, side = pty.openpty()
        program = f"from glm5.cli.chat import *; run(ChatOptions(url={url!r}))"
        environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "TERM": "xterm"}
        process = subprocess.Popen(
            [sys.executable, "-c", program], stdin=side, stdout=side, stderr=side, env=environment
        )
        os.close(side)
        screen = ""

        def until(text):
            nonlocal screen
            end = time.monotonic() + 120
            while text not in screen:
                assert time.monotonic() < end, screen
                if select.select([main], [], [], 1)[0]:
                    screen += os.read(main, 65536).decode(errors="replace")

        until("\x1b[?2004h")
        os.write(main, b"one\x1b\rtwo\r")
        until("tokens/s]")
        screen = screen.partition("tokens/s]")[2]
        until("\x1b[?2004h")  # the editor is there again
        os.write(main, b"\x1b[A\x1b[A\r")  # up to the first of its lines, and from there to the message before
        until("tokens/s]")
        while process.poll() is None:  # the first may come before the next prompt does
            with contextlib.suppress(OSError):  # the terminal is gone once the program is
                os.write(main, b"\x04")
                if select.select([main], [], [], 1)[0]:
                    os.read(main, 65536)
        assert process.returncode == 0
        os.close(main)
    assert [body["messages"][-1]["content"] for body in fake.asked] == ["one\ntwo", "one\ntwo"]
    assert "+one" in (tmp_path / "glm5" / "chat-history").read_text()
    assert json.dumps(fake.asked[0]["stream_options"]) == '{"include_usage": true}'
