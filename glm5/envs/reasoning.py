"""Every procedural task of `reasoning-gym` (Apache-2.0, extra `envs`), judged by its own verifier.

    environment = SingleTurn(ReasoningGym("chain_sum", {"max_terms": 4}))

A task is made anew from a hash of (seed, index), so nothing is stored and no two streams share their problems by
construction. The split is by the text of the question: what the hash of one puts into "heldout" is never asked in
"train", whatever the seed. The verifier sees what stands in `<answer>` tags, else what `glm5.scoring.extract_answer`
finds. Left out: `composite`, which mixes other tasks (mix environments instead).
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import threading
from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import lru_cache
from typing import Any

import numpy as np

from glm5.data.corpus import Split, is_held_out
from glm5.envs.answer_guard import may_be_shown
from glm5.envs.protocol import EnvironmentFailure, Message, Reward, Task
from glm5.envs.rewards import right_text
from glm5.errors import InputError, did_you_mean
from glm5.scoring import Grade, extract_answer

HELD_OUT_PER_THOUSAND = 200
TRIES = 400
COMPARED = frozenset({"game_of_life_halting"})
"""Tasks whose answers are compared here, but for case: reasoning-gym 0.1.25 takes any text for right."""
OPEN, CLOSE = "<answer>", "</answer>"
_ONE_AT_A_TIME = threading.Lock()


class ReasoningGym:
    """`name`: of the task (`ReasoningGym.names()`). `config`: its settings but seed and size.

    Raises `InputError` for a name or a setting that the package does not have.
    """

    def __init__(self, name: str, config: Mapping[str, Any] | None = None, *, split: Split = "train") -> None:
        if name not in self.names():
            raise InputError(f"reasoning-gym has no task {name!r}.{did_you_mean(name, self.names())}")
        self.task_name, self.split, self.config = name, split, dict(config or {})
        known = sorted({it.name for it in fields(_package().factory.DATASETS[name][1])} - {"seed", "size"})
        for setting in sorted(self.config.keys() - known):
            raise InputError(
                f"reasoning-gym's {name} has no setting {setting!r}.{did_you_mean(setting, known)} It has: "
                f"{', '.join(known)}."
            )
        settings = ",".join(f"{key}={value}" for key, value in sorted(self.config.items()))
        self.name = f"reasoning-gym/{name}/{split}" + (f"/{settings}" if settings else "")
        # Scoring follows the task soon, and the samples of a group share it.
        self._entry = lru_cache(maxsize=256)(self._made)
        self._dataset(0)

    @staticmethod
    def names() -> list[str]:
        """Of all tasks."""
        return sorted(_package().factory.DATASETS.keys() - {"composite"})

    def task(self, seed: int, index: int) -> Task:
        """The category is the task's name."""
        entry, _ = self._entry(seed, index)
        question = {"role": "user", "content": entry["question"]}
        answer = "" if entry["answer"] is None else str(entry["answer"])
        return Task(f"{self.name}/{seed}/{index}", (question,), answer, self.task_name)

    def score(self, task: Task, response: Message) -> Reward:
        """What the package's verifier gives, from 0 to 1."""
        seed, index = map(int, task.id.rsplit("/", 2)[1:])
        entry, dataset = self._entry(seed, index)
        content = response.get("content") or ""
        answer = _tagged(content) or extract_answer(content)
        if not answer:
            return Reward(0.0, Grade("not_attempted", "the response is empty"))
        if not may_be_shown(answer, self.task_name):
            return Reward(0.0, Grade("incorrect", "the verifier would run it as a program", answer))
        if self.task_name in COMPARED:
            return right_text(task, {"content": answer})
        try:
            value = float(dataset.score_answer(answer, entry))
        except Exception as error:
            self._verifier_works(entry, dataset, error)
            return Reward(0.0, Grade("incorrect", f"the verifier could not read it ({type(error).__name__})", answer))
        return Reward(value, Grade("correct" if value >= 1 else "incorrect", f"the verifier gave {value:g}", answer))

    def _verifier_works(self, entry: Mapping[str, Any], dataset: Any, error: Exception) -> None:
        """Some verifiers raise for an answer of the wrong form. One that raises for its own answer is broken."""
        if entry["answer"] is None:
            return
        try:
            dataset.score_answer(entry["answer"], entry)
        except Exception:
            raise EnvironmentFailure(f"the verifier of {self.name} raised {error!r}", "verifier") from error

    def _made(self, seed: int, index: int) -> tuple[dict[str, Any], Any]:
        for trial in range(TRIES):
            digest = hashlib.sha256(f"{self.task_name}/{seed}/{index}/{trial}".encode()).digest()
            number = int.from_bytes(digest[:4], "little") >> 1
            with _global_chance(number):
                dataset = self._dataset(number)
                entry = dataset[0]
            hashed = hashlib.sha256(entry["question"].encode()).hexdigest()
            if is_held_out(hashed, HELD_OUT_PER_THOUSAND) == (self.split == "heldout"):
                return entry, dataset
        raise InputError(f"{TRIES} draws of {self.name} gave no question of its split; allow more different questions.")

    def _dataset(self, seed: int) -> Any:
        try:
            return _package().create_dataset(self.task_name, size=1, seed=seed, **self.config)
        except (TypeError, AssertionError, ValueError) as error:
            raise InputError(f"reasoning-gym's {self.task_name} refuses {self.config}: {error}") from None


@contextlib.contextmanager
def _global_chance(seed: int) -> Iterator[None]:
    """Seeds the generators that a few problems (`codeio`) draw from beside their own, and puts them back.

    They belong to the whole process, so one thread at a time.
    """
    with _ONE_AT_A_TIME:
        before, before_numpy = random.getstate(), np.random.get_state()
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(before)
            np.random.set_state(before_numpy)


def _package() -> Any:
    try:
        import reasoning_gym
    except ImportError:
        raise InputError("these tasks need reasoning-gym: pip install 'glm5[envs]'.") from None
    return reasoning_gym


def _tagged(content: str) -> str:
    """What stands in the last complete pair of tags."""
    end = content.rfind(CLOSE)
    start = content.rfind(OPEN, 0, end) if end >= 0 else -1
    return content[start + len(OPEN) : end].strip() if start >= 0 else ""
