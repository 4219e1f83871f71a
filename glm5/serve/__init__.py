"""Serve: the HTTP face of an engine."""

from glm5.serve.access_log import log_json_lines
from glm5.serve.app import create_app
from glm5.serve.errors import ApiError
from glm5.serve.generation import Generation
from glm5.serve.http import is_loopback, serve
from glm5.serve.limits import Limits
from glm5.serve.service import Recorder

__all__ = ["ApiError", "Generation", "Limits", "Recorder", "create_app", "is_loopback", "log_json_lines", "serve"]
