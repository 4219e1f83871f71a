"""`/v1/models` as both packages read it, under all names; and which pages of other sites may ask."""

import anthropic
import openai
import pytest
from chat_client import USER
from fastapi.testclient import TestClient
from speaker import ScriptedModel, speaker_tokenizer

from glm5.engine import Engine
from glm5.errors import InputError, TextError
from glm5.serve import create_app
from glm5.serve.host_check import OWN_NAMES
from glm5.text import Tokenizer

SITE = "https://chat.example"


def client_of(**settings):
    app = create_app(Engine(ScriptedModel("</think>ok"), speaker_tokenizer()), model_name="tiny", **settings)
    return TestClient(app, base_url="http://localhost", raise_server_exceptions=False)


def test_both_packages_list_the_model_under_all_its_names():
    client = client_of(aliases=["small", "org/other"])
    ours = openai.OpenAI(base_url="http://localhost/v1", api_key="x", http_client=client, max_retries=0)
    theirs = anthropic.Anthropic(base_url="http://localhost", api_key="x", http_client=client, max_retries=0)
    names = ["tiny", "small", "org/other"]
    assert [model.id for model in ours.models.list()] == [model.id for model in theirs.models.list()] == names
    assert ours.models.retrieve("org/other").id == "org/other"
    model = theirs.models.retrieve("small")
    assert (model.type, model.display_name) == ("model", "small")
    assert model.max_input_tokens == model.max_tokens == ours.models.retrieve("small").max_model_len == 512
    assert int(model.created_at.timestamp()) == ours.models.retrieve("small").created
    for name in names:  # the reply says which model it is
        answer = ours.chat.completions.create(model=name, messages=USER)
        assert (answer.model, answer.choices[0].message.content) == ("tiny", "ok")
    with pytest.raises(openai.NotFoundError, match="ask for 'tiny' or 'small' or 'org/other'"):
        ours.chat.completions.create(model="large", messages=USER)


def preflight(client, origin=SITE, **headers):
    asked = {"Origin": origin, "Access-Control-Request-Method": "POST",
             "Access-Control-Request-Headers": "authorization, content-type, x-session-id", **headers}  # fmt: skip
    return client.options("/v1/chat/completions", headers=asked)


def test_no_other_site_may_ask_unless_it_is_named():
    closed = client_of()
    assert preflight(closed).status_code == 405
    assert "access-control-allow-origin" not in closed.get("/v1/models", headers={"Origin": SITE}).headers


def test_pages_of_a_named_site_may_ask_with_their_key():
    client = client_of(origins=[SITE], api_key="secret")
    allowed = preflight(client)
    assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == SITE
    assert "authorization" in allowed.headers["access-control-allow-headers"]
    assert "access-control-allow-credentials" not in allowed.headers
    assert preflight(client, origin="https://evil.example").status_code == 400
    for key, status in (("secret", 200), ("wrong", 401)):  # the page can read the refusal too
        answer = client.get("/v1/models", headers={"Origin": SITE, "Authorization": f"Bearer {key}"})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, SITE)


def test_the_check_of_the_host_stays():
    client = client_of(origins=["*"], hosts=OWN_NAMES)
    assert preflight(client).status_code == 200
    assert preflight(client, Host="evil.example").status_code == 421


@pytest.mark.parametrize("origin", ["chat.example", "https://chat.example/", "ftp://x", "null", ""])
def test_what_is_no_origin_is_refused(origin):
    with pytest.raises(InputError, match="is no origin; give"):
        client_of(origins=[origin])


def test_a_model_whose_chat_template_is_broken_is_not_served(tmp_path):
    speaker_tokenizer().save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{% for x in %}")
    with pytest.raises(TextError, match=r"No conversation could be served: the chat template .* Repair the model's"):
        create_app(Engine(ScriptedModel("ok"), Tokenizer.from_pretrained(tmp_path)))
