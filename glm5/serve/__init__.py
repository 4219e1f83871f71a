"""Serve: the HTTP face of an engine."""

from glm5.serve.app import Recorder, create_app
from glm5.serve.errors import ApiError
from glm5.serve.http import serve
from glm5.serve.limits import Limits

__all__ = ["ApiError", "Limits", "Recorder", "create_app", "serve"]
