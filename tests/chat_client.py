"""A client of `/v1/chat/completions` over a scripted model, and its usual request."""

import json

from fastapi.testclient import TestClient
from speaker import ScriptedModel, speaker_tokenizer

from glm5.engine import Engine
from glm5.serve import create_app

USER = [{"role": "user", "content": "What is 12 + 30?"}]
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "note": {"type": "string"}}},
    },
}


def client_of(text="", *, limits=None, recorder=None, model=None, api_key=None, hosts=None):
    engine = Engine(model or ScriptedModel(text), speaker_tokenizer())
    app = create_app(engine, model_name="tiny", limits=limits, recorder=recorder, api_key=api_key, hosts=hosts)
    return TestClient(app, raise_server_exceptions=False)


def prompts_of(client):
    """A list that gets the text of every prompt that the server samples from."""
    engine, prompts = client.app.state.service.source, []
    stream = engine.stream

    def watched(prompt_ids, *rest, **more):
        prompts.append(engine.tokenizer.decode(prompt_ids))
        return stream(prompt_ids, *rest, **more)

    engine.stream = watched
    return prompts


def ask(client, **fields):
    body = json.dumps({"model": "tiny", "messages": USER, **fields})
    return client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
