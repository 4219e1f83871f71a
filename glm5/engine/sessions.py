"""What a session's name says: `GROUP//MEMBER` is a member of a group, anything else stands for itself.

Members of a group begin with the same prompt, as the samples of one task in reinforcement learning do. They share
cached prefixes, and whoever places requests keeps them together; each is still a session of its own.
"""

from __future__ import annotations


def group_of(session_id: str) -> str:
    """The group of a session, or the session itself when it is in none."""
    return session_id.rpartition("//")[0] or session_id
