"""`glm5 chat --url`: a running server answers, refuses, sends odd events and breaks off."""

import http.server
import threading

import pytest
from chat_talk import talk
from fake_chat import CALL, FakeChat, Running

from glm5.cli.chat_source import ChatSettings, ServerSource
from glm5.errors import InputError


def test_a_running_server_answers():
    fake = FakeChat()
    fake.answers["hi"] = ("hm", "Hello.", [CALL])
    fake.key = "secret"
    with Running(fake.app) as url:
        with pytest.raises(InputError, match="The key is wrong or missing"):
            ServerSource(url)
        with pytest.raises(InputError, match="serves fake, not other"):
            ServerSource(url, name="other", key="secret")
        source = ServerSource(f"{url}v1/", key="secret")
        screen, loop = talk(source, ["hi", "and?"], settings=ChatSettings(thinking=False, seed=3))
        fake.failure = (429, "Too many.")
        assert "refused: Too many." in talk(source, ["hi"])[0]
    assert loop.messages[1] == {
        "role": "assistant",
        "content": "Hello.",
        "reasoning_content": "hm",
        "tool_calls": [CALL],
    }
    assert loop.messages[3]["content"] == "You said: and?" and "[5 tokens, " in screen
    first = fake.asked[0]
    assert first["seed"] == 3 and first["chat_template_kwargs"] == {"enable_thinking": False} and "top_p" not in first
    with pytest.raises(InputError, match="cannot be reached"):
        ServerSource(url)
    with pytest.raises(InputError, match="begins with http"):
        ServerSource("localhost:8000")


@pytest.mark.parametrize(
    ("event", "sentence"),
    [
        ("{broken", "what is no event of a chat ({broken)"),
        ("5", "what is no event of a chat (5)"),
        ('{"choices": [{"delta": {"content": ["a"]}}]}', "what is no event of a chat"),
        ('{"choices": [{"delta": {"tool_calls": [{"index": "x"}]}}]}', "what is no event of a chat"),
        ('{"choices": ' + "[" * 100_000, "what is no event of a chat"),
        ('{"error": "out of memory"}', "The server failed: out of memory"),
        ('{"error": {"message": "no\x1b[2J"}}', "what is no event of a chat"),
        ('{"error": {"message": "too\\u001b[2J hot"}}', "The server failed: too\ufffd[2J hot"),
    ],
)
def test_an_odd_event_ends_its_answer_and_not_the_conversation(event, sentence):
    fake = FakeChat()
    fake.odd["odd"] = event
    with Running(fake.app) as url:
        screen, loop = talk(ServerSource(url), ["one", "odd", "two"])
    assert sentence in screen and "\x1b[2J" not in screen
    assert [m["content"] for m in loop.messages] == ["one", "You said: one", "two", "You said: two"]


class Broken(http.server.BaseHTTPRequestHandler):
    """A server whose answers break off within a chunk."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        body = b'{"data": [{"id": "m"}]}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        event = b'data: {"choices": [{"delta": {"content": "so far"}}]}\n\n'
        self.wfile.write(b"%x\r\n%b\r\nfff\r\nda" % (len(event), event))
        self.close_connection = True

    def log_message(self, *_):
        """Silent."""


def test_a_connection_that_breaks_ends_its_answer_alone():
    with http.server.HTTPServer(("127.0.0.1", 0), Broken) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        screen, loop = talk(ServerSource(f"http://127.0.0.1:{server.server_port}"), ["hi"])
        server.shutdown()
    assert "so far" in screen and "ended the connection before the answer was complete" in screen
    assert not loop.messages
    with pytest.raises(InputError, match=r"cannot be reached \(nonnumeric port: 'x'\)"):
        ServerSource("http://localhost:x")
