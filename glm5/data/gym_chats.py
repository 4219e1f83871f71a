"""Conversations from the procedural generators of `reasoning-gym` (Apache-2.0), question and answer as they come.

The package makes problems of a hundred kinds from a seed. Its prompts are long; a small model can use those that stay
under `longest` characters. No reasoning is given, so these teach the form and the easy kinds only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from glm5.data.chat import Chat
from glm5.errors import DataError

SMALL_TASKS = ("letter_counting", "spell_backward", "gcd", "number_sorting")


def gym_chats(seed: int, tasks: Sequence[str] = SMALL_TASKS, *, longest: int = 400, each: int = 500) -> Iterator[Chat]:
    """Endless conversations, the tasks in turn; `each` problems of a task, then others from the next seed."""
    try:
        import reasoning_gym
    except ImportError:
        raise DataError("these problems need reasoning-gym: pip install 'glm5[envs]', or give them no share.") from None
    unknown = [task for task in tasks if task not in reasoning_gym.factory.DATASETS]
    if unknown or not tasks:
        raise DataError(f"reasoning-gym has no task {unknown[0]!r}." if unknown else "name at least one task.")
    while True:
        found = 0
        sets = [reasoning_gym.create_dataset(task, size=each, seed=seed) for task in tasks]
        for items in zip(*sets, strict=True):
            for item in items:
                if len(item["question"]) <= longest:
                    found += 1
                    messages = (
                        {"role": "user", "content": item["question"]},
                        {"role": "assistant", "content": str(item["answer"])},
                    )
                    yield Chat(messages, skill="gym")
        if not found:
            raise DataError(f"no problem of {', '.join(tasks)} is as short as {longest} characters; allow longer ones.")
        seed += 1
