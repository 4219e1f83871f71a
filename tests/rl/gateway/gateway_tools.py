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

OFF = {"chat_template_kwargs": {"enable_thinking": False}}
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
        return httpx.post(f"{self.url}/rl/sessions{path}", json=body)

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
