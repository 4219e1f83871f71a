"""How much the model is asked to think: into the prompt where the model's own template says it, nowhere else."""

import pytest
from chat_client import USER, prompts_of
from fastapi.testclient import TestClient
from speaker import ScriptedModel, speaker_tokenizer

from glm5 import Tokenizer
from glm5.engine import Engine
from glm5.errors import TextError
from glm5.serve import create_app
from glm5.text.template import CHAT_TEMPLATE, takes_effort

THEIRS = "{# a published one #}" + CHAT_TEMPLATE
BODIES = {
    "chat/completions": lambda effort: {"messages": USER, "reasoning_effort": effort},
    "responses": lambda effort: {"input": USER, "reasoning": {"effort": effort}},
    "messages": lambda effort: {"messages": USER, "max_tokens": 9, "thinking": {"type": "adaptive"},
                                "output_config": {"effort": effort}},
}  # fmt: skip


def prompt(path, template, effort):
    tokenizer = Tokenizer(speaker_tokenizer().backend, template)
    engine = Engine(ScriptedModel("hm</think>ok"), tokenizer)
    client = TestClient(create_app(engine, model_name="tiny"))
    prompts = prompts_of(client)
    answer = client.post(f"/v1/{path}", json={"model": "tiny", **BODIES[path](effort)})
    assert answer.status_code == 200, answer.text
    return prompts[0]


@pytest.mark.parametrize("path", list(BODIES))
@pytest.mark.parametrize("effort", ["low", "high", "max", "medium", "xhigh"])
def test_the_effort_is_said_by_the_models_own_template(path, effort):
    said = f"<|system|>Reasoning Effort: {effort.capitalize()}"
    assert (said in prompt(path, THEIRS, effort)) is (effort in ("low", "high", "max"))
    assert "Effort" not in prompt(path, CHAT_TEMPLATE, effort)


def test_a_broken_template_is_not_served():
    tokenizer = Tokenizer(speaker_tokenizer().backend, "{% if reasoning_effort %}")
    with pytest.raises(TextError, match="cannot render this conversation"):
        create_app(Engine(ScriptedModel("ok"), tokenizer), model_name="tiny")


def test_a_conversation_that_a_template_cannot_render_is_said_so():
    tokenizer = Tokenizer(speaker_tokenizer().backend, "{% if messages | length > 1 %}{{ nothing() }}{% endif %}")
    app = create_app(Engine(ScriptedModel("ok"), tokenizer), model_name="tiny")
    client = TestClient(app, raise_server_exceptions=False)
    for effort in ({}, {"reasoning_effort": "high"}):
        answer = client.post("/v1/chat/completions", json={"model": "tiny", "messages": USER * 2, **effort})
        assert answer.status_code == 400 and "cannot render this conversation" in answer.json()["error"]["message"]


def test_which_templates_say_it():
    assert takes_effort(THEIRS) and not takes_effort(CHAT_TEMPLATE) and not takes_effort("{{ messages }}")
