"""The fleet's end of a connection to an engine."""

from multiprocessing import Pipe
from threading import Event

from glm5.rl.fleet import FleetConfig
from glm5.rl.fleet.channel import ChannelMember


class Told:
    """What a member tells its fleet, and what the watch would have heard from it at that moment."""

    def __init__(self):
        self.told, self.reasons = Event(), []

    def lost(self, member, reason):
        self.reasons += [member.trouble(0.0), reason]
        self.told.set()


def test_a_watch_that_looks_while_an_engine_is_lost_hears_the_reason():
    ours, theirs = Pipe()
    events = Told()
    ChannelMember(ours, events, FleetConfig(), weights=tuple, kill=lambda: None, gone=lambda _: True)
    theirs.send(("failed", "a step of its engine failed"))
    assert events.told.wait(120)
    assert events.reasons == ["a step of its engine failed"] * 2
