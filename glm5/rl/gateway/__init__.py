"""The gateway: outside agents are served, their sessions recorded, and learnt from."""

from glm5.rl.gateway.app import create_gateway
from glm5.rl.gateway.reading import FinishedSessions
from glm5.rl.gateway.sampling import OwnDistribution
from glm5.rl.gateway.session import Session
from glm5.rl.gateway.sessions import SessionLimits, Sessions, read_session

__all__ = [
    "FinishedSessions", "OwnDistribution", "Session", "SessionLimits", "Sessions", "create_gateway", "read_session",
]  # fmt: skip
