"""The gateway: outside agents are served, their sessions recorded, and learnt from."""

from glm5.rl.gateway.app import create_gateway
from glm5.rl.gateway.learning import Address, train_from_gateway, train_from_records
from glm5.rl.gateway.limits import SessionLimits
from glm5.rl.gateway.reading import FinishedSessions
from glm5.rl.gateway.sampling import OwnDistribution
from glm5.rl.gateway.session import Session, read_session
from glm5.rl.gateway.sessions import Sessions

__all__ = [
    "Address", "FinishedSessions", "OwnDistribution", "Session", "SessionLimits", "Sessions",
    "create_gateway", "read_session", "train_from_gateway", "train_from_records",
]  # fmt: skip
