"""A gateway behind a real port, agents' clients, and what they ask."""

from contextlib import contextmanager
from dataclasses import dataclass

import anthropic
import httpx
import openai
from live_server import live
from speaker import speaker_model, speaker_tokenizer

from glm5.engine import Engine
from glm5.rl.gateway import Sessions, create_gateway
from glm5.rl.records import Ticket, Turn

OFF = {"chat_template_kwargs": {"enable_thinking": False}}
USER = [{"role": "user", "content": "What is 12 + 30?"}]
TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}


@dataclass
class Gateway:
    """What a test needs of a running one."""

    url: str
    sessions: Sessions

    def openai(self, session):
        """A client that only knows a base URL, as an unchanged program."""
        return openai.OpenAI(base_url=f"{self.url}/s/{session}/v1", api_key="none", max_retries=0)

    def anthropic(self, session):
        return anthropic.Anthropic(base_url=f"{self.url}/s/{session}", api_key="none", max_retries=0)

    def post(self, path, **body):
        return httpx.post(f"{self.url}/rl/sessions{path}", json=body, timeout=120)

    def reward(self, session, value, **body):
        return self.post(f"/{session}/reward", value=value, **body)

    def turns(self, session):
        """As recorded so far."""
        return [recorded.turn for recorded in self.sessions.find(session).turns]


@contextmanager
def gateway(directory, *, source=None, api_key=None, **options):
    """A gateway over a speaker with random weights."""
    engine = source or Engine(speaker_model(positions=2048), speaker_tokenizer(), strict=True)
    sessions = Sessions(directory, **options)
    try:
        with live(create_gateway(engine, sessions, model_name="tiny", api_key=api_key)) as url:
            yield Gateway(url, sessions)
    finally:
        sessions.close()
        if source is None:
            engine.close()


def ask(client, messages, **fields):
    """One answer of a chat."""
    fields = {"max_tokens": 12, "seed": 1, "extra_body": OFF, **fields}
    return client.chat.completions.create(model="tiny", messages=messages, **fields)


def full(turn):
    return turn.prompt_ids + turn.output_ids


def add_turn(sessions, name, output=(5, 6), prompt=(1, 2)):
    """A turn without a server."""
    session = sessions._open[name].session
    turn = Turn(prompt, output, (-0.5,) * len(output), (3,) * len(output), "stop")
    sessions._write(name, session.turn_event(turn, learnt=True))


def rollout(sessions, name):
    return sessions.find(name).rollout(Ticket("gateway", 0))
