"""The HTTP application: one engine behind the endpoints of several protocols.

Each endpoint's file adds its own (`install_...`) over the same `Service`. The app knows nothing of training; it serves
whatever weights the engine has.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from fastapi import FastAPI

from glm5.engine import SamplingDefaults
from glm5.errors import GLM5Error, TextError
from glm5.serve.chat import install_chat
from glm5.serve.completions import install_completions
from glm5.serve.errors import ApiError, install_error_handlers
from glm5.serve.generate import install_generate
from glm5.serve.generation import Source
from glm5.serve.limits import Limits
from glm5.serve.messages import install_messages
from glm5.serve.outside import install_outside
from glm5.serve.page import install_page
from glm5.serve.responses import install_responses
from glm5.serve.service import Recorder, Service
from glm5.text import Tokenizer


def create_app(
    source: Source,
    *,
    model_name: str = "glm5",
    aliases: Sequence[str] = (),
    limits: Limits | None = None,
    recorder: Recorder | None = None,
    api_key: str | None = None,
    hosts: Iterable[str] | None = None,
    origins: Iterable[str] = (),
    defaults: SamplingDefaults = SamplingDefaults(),
) -> FastAPI:
    """The ASGI application over an engine, or over what stands in for one. It must have a tokenizer.

    aliases: more names that the one model may be asked for by. origins: whose pages may use it (`cross_origin`).
    defaults: of sampling, where a request names none.
    hosts: the only names that it answers to (see `CheckHost`); None: any.
    """
    if source.tokenizer is None:
        raise GLM5Error("The server needs a tokenizer; give a model directory that holds tokenizer.json.")
    _check_template(source.tokenizer)
    service = Service(source, source.tokenizer, model_name, limits or Limits(), recorder, defaults, tuple(aliases))
    app = FastAPI(title="glm5", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service = service
    install_outside(app, service, api_key, hosts, origins)
    install_error_handlers(app)
    install_page(app)

    install_models(app, service)
    install_chat(app, service)
    install_completions(app, service)
    install_generate(app, service)
    install_responses(app, service)
    install_messages(app, service)
    return app


def _check_template(tokenizer: Tokenizer) -> None:
    """Refuses a model whose chat template cannot even render a greeting, before anybody asks it."""
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}])
    except TextError as error:
        raise TextError(
            f"No conversation could be served: {error}. Repair the model's chat_template.jinja, or the chat_template "
            "in its tokenizer_config.json; without either this project's own is used."
        ) from None


def install_models(app: FastAPI, service: Service) -> None:
    """Adds the list of the one model under all its names, and what is refused for good."""

    created_at = datetime.fromtimestamp(service.created, UTC).isoformat().replace("+00:00", "Z")

    def model(name: str) -> dict[str, Any]:
        """As OpenAI's clients read it, and Anthropic's."""
        room = service.source.max_model_len
        return {
            "id": name, "object": "model", "created": service.created, "owned_by": "glm5", "max_model_len": room,
            "weight_version": service.source.version, "type": "model", "display_name": name, "created_at": created_at,
            "max_input_tokens": room, "max_tokens": room, "lifecycle": "active",
        }  # fmt: skip

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        names = service.names
        return {"object": "list", "data": [model(name) for name in names], "has_more": False, "first_id": names[0],
                "last_id": names[-1]}  # fmt: skip

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return model(name)

    @app.post("/v1/embeddings")
    async def embeddings() -> None:
        raise ApiError(
            501, "GLM-5 is a generating model and has no embeddings; use an embedding model's own server.",
            code="not_implemented",
        )  # fmt: skip
