"""Publication of weights as immutable, numbered snapshots: shared memory, broadcast, a directory with deltas.

Whichever way: a version is a whole number that grows, what is not newer or damaged is refused with a sentence, and the
reader keeps the weights that it had. The unit is any dict of tensors, a model's or its adapters'.
"""

from glm5.rl.weights.broadcast import BroadcastPublisher, BroadcastSubscriber
from glm5.rl.weights.directory import DirectoryPublisher, DirectorySubscriber
from glm5.rl.weights.layout import Layout
from glm5.rl.weights.shared import SharedPublisher, SharedSubscriber, Snapshot

__all__ = [
    "BroadcastPublisher", "BroadcastSubscriber", "DirectoryPublisher", "DirectorySubscriber", "Layout",
    "SharedPublisher", "SharedSubscriber", "Snapshot",
]  # fmt: skip
