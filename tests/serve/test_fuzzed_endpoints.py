"""schemathesis over the whole OpenAPI document of the app: whatever is sent, no 500 and no hang.

The document is off in a real server; here the test turns it on. The model behind is a script with a short context, so
that every request ends soon.
"""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from speaker import ScriptedModel, speaker_tokenizer

from glm5.engine import Engine
from glm5.serve import create_app

SECONDS = 60.0
REFUSED_FOR_GOOD = "/v1/embeddings"
"""Answers 501, which is no failure."""


def _document():
    app = create_app(Engine(ScriptedModel("</think>ok"), speaker_tokenizer(), max_model_len=64), model_name="tiny")
    app.openapi_url = "/openapi.json"
    app.setup()
    return schemathesis.openapi.from_asgi("/openapi.json", app)


OPERATIONS = [found.ok() for found in _document().get_all_operations()]


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: f"{operation.method} {operation.path}")
def test_no_request_breaks_the_server(operation):
    @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(operation.as_strategy())
    def fuzz(case):
        if isinstance(case.body, dict) and "model" in case.body:
            case.body["model"] = "tiny"  # else nearly all would end at the model's name
        response = case.call(timeout=SECONDS)
        if case.path != REFUSED_FOR_GOOD:
            case.validate_response(response, checks=[not_a_server_error])
        if response.status_code >= 400:
            assert response.json()["error"]["message"]

    fuzz()
