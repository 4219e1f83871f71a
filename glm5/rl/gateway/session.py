"""One session: an outside agent's episode, as the fold of the events in its record file.

| event | when |
|---|---|
| opened | the first request, or a call that opens the session with its group and task |
| turn | an answer ended: new prompt tokens, sampled tokens with log-probabilities and versions, the messages |
| reward | somebody says what the episode was worth; a final one ends it, but for answers that are under way then |
| closed | the last event: the reward is final, the session was given up, or nothing happened for too long |

Which turns are learnt from: those that were sampled from the model's own distribution and were not broken off. An
answer that its client left, or the server gave up, influenced nothing that can be known, and tokens that a grammar, a
temperature or a penalty chose are not the policy's. Such turns are recorded; in the prompts of others they are context.

A turn is written, and kept, as what it adds to the earlier one that shares the most tokens with its prompt: a client
may drop thoughts, so that no prompt goes on from a whole turn, and what is kept grows with the conversation all the
same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Literal

from glm5.engine import SamplingParams
from glm5.envs import Reward, Task
from glm5.rl.codec import Alike, leading
from glm5.rl.gateway.answers import Answers, Message
from glm5.rl.journal import Record, read_journal
from glm5.rl.kept import last_tokens
from glm5.rl.records import Branch, Outcome, Rollout, Ticket, Turn
from glm5.rl.tree import EpisodeTree
from glm5.scoring import Grade
from glm5.text import Written

ENVIRONMENT = "gateway"
"""What stands where a rollout names its environment."""
State = Literal["open", "finished", "aborted"]


@dataclass(frozen=True, slots=True)
class RecordedTurn:
    """A turn with what was said around it."""

    turn: Turn
    learnt: bool
    """Whether its tokens count in a loss."""
    messages: tuple[Message, ...] = ()
    """The conversation that was answered; none for raw tokens."""
    answer: Message | None = None


@dataclass(frozen=True, slots=True)
class _Kept:
    """A turn without the tokens of its prompt that it shares with an earlier one."""

    follows: int | None
    """The number of that one."""
    shared: int
    recorded: RecordedTurn


class Session:
    """What is known of a session; `apply` is the only thing that changes it."""

    def __init__(self, session_id: str) -> None:
        self.id = session_id
        self.group: str | None = None
        self.task: str | None = None
        self.weights = ""
        """Which weights the versions count from."""
        self.reward: Reward | None = None
        self.state: State = "open"
        self.reason = ""
        """Why it was closed."""
        self.opened_at = self.touched_at = 0.0
        """By the wall clock, in seconds."""
        self.answers = Answers()
        self.tokens = 0
        """All that were recorded: sampled ones, and those of prompts that were not there before."""
        self._kept: list[_Kept] = []
        self._alike = Alike(self._tokens)

    def apply(self, event: Record) -> None:
        """Takes the next event."""
        self.touched_at = event["time"]
        match event["kind"]:
            case "opened":
                self.group, self.task, self.weights = event["group"], event["task"], event["weights"]
                self.opened_at = event["time"]
            case "turn":
                self._add(event)
            case "reward":
                self.reward = _reward(event["value"], event["reason"])
                if event["final"]:
                    self.state, self.reason = "finished", "The reward is final."
            case "closed":
                self.state, self.reason = event["state"], event["reason"]

    # ---- turns --------------------------------------------------------------------------------------------------
    def turn_event(
        self, turn: Turn, *, learnt: bool, messages: Sequence[Message] = (), answer: Message | None = None,
        splice: bool = False,
    ) -> Record:  # fmt: skip
        """The event of a new turn. What an earlier turn holds already is not written again.

        splice: whether the answer may stand in later prompts as it was sampled.
        """
        shared, like = self._alike.most(turn.prompt_ids)
        kept = leading(self._kept[like].recorded.messages, messages) if shared else 0
        return {
            "kind": "turn", "follows": like if shared else None, "shared": shared, "prompt": turn.prompt_ids[shared:],
            "output": turn.output_ids, "logprobs": turn.logprobs,
            "versions": [[v, len(list(run))] for v, run in groupby(turn.versions)], "finish": turn.finish_reason,
            "seconds": round(turn.seconds, 4), "cached": turn.cached_tokens, "learnt": learnt, "kept": kept,
            "messages": list(messages[kept:]), "answer": answer, "splice": splice,
        }  # fmt: skip

    def _add(self, event: Record) -> None:
        follows, shared = event["follows"], event.get("shared", 0)
        if follows is not None and "shared" not in event:  # earlier versions: all of it
            shared = len(self._tokens(follows))
        turn = Turn(
            prompt_ids=tuple(event["prompt"]),
            output_ids=tuple(event["output"]),
            logprobs=tuple(event["logprobs"]),
            versions=tuple(v for v, count in event["versions"] for _ in range(count)),
            finish_reason=event["finish"],
            seconds=event["seconds"],
            cached_tokens=event["cached"],
        )
        kept = () if follows is None else self._kept[follows].recorded.messages[: event["kept"]]
        recorded = RecordedTurn(turn, event["learnt"], (*kept, *event["messages"]), event["answer"])
        self._kept.append(_Kept(follows, shared, recorded))
        self._alike.add()
        self.tokens += len(event["prompt"]) + len(turn.output_ids)
        if event["splice"] and recorded.answer is not None:
            opening = self._tokens(len(self._kept) - 1)[-len(turn.output_ids) - 1]
            self.answers.add(recorded.messages, recorded.answer, Written(opening, turn.output_ids))

    @property
    def num_turns(self) -> int:
        """So far."""
        return len(self._kept)

    @property
    def turns(self) -> list[RecordedTurn]:
        """All of them, with their whole prompts, made each time: they are large where there are many."""
        whole: list[RecordedTurn] = []
        for kept in self._kept:
            rest, before = kept.recorded.turn, () if kept.follows is None else full(whole[kept.follows].turn)
            turn = replace(rest, prompt_ids=before[: kept.shared] + rest.prompt_ids)
            whole.append(replace(kept.recorded, turn=turn))
        return whole

    def _tokens(self, number: int) -> tuple[int, ...]:
        """Prompt and output of a turn."""
        return last_tokens(self._rests(number))

    def _rests(self, number: int | None) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Of a turn and those before it that it shares tokens with: how many, and the rest."""
        while number is not None:
            kept = self._kept[number]
            yield kept.shared, full(kept.recorded.turn)
            number = kept.follows

    # ---- what is learnt from --------------------------------------------------------------------------------------
    @property
    def sampled_tokens(self) -> int:
        """Of all answers."""
        return sum(len(kept.recorded.turn.output_ids) for kept in self._kept)

    @property
    def learnable_tokens(self) -> int:
        """Of the answers that count in a loss."""
        return sum(len(kept.recorded.turn.output_ids) for kept in self._kept if kept.recorded.learnt)

    def rollout(self, ticket: Ticket) -> Rollout:
        """The closed session under the ticket of a place in a group.

        Without a reward it is aborted, never 0, and so is one without an answer: its reward is nobody's. Where no token
        can be learnt from, the scheduler drops it.
        """
        whole = self.turns
        reward = self.reward if whole else None
        failure = self.reason if self.reward is None else "no answer was recorded in it"
        turns = tuple(recorded.turn for recorded in whole if recorded.learnt)
        last = next((recorded for recorded in reversed(whole) if recorded.learnt), None)
        cut = last is not None and last.turn.finish_reason == "length"
        ended: Outcome = "truncated" if cut else "ok"
        said = () if last is None else (*last.messages, *([last.answer] if last.answer else []))
        first = whole[0].messages if whole else ()
        return Rollout(
            ticket=ticket,
            task=Task(self.id, first, "", self.task or self.group or ENVIRONMENT),
            trajectories=EpisodeTree(turns).trajectories(),
            outcome="aborted" if reward is None else ended,
            reward=reward,
            messages=said,
            turns=turns,
            failure=failure if reward is None else "",
            seconds=self.touched_at - self.opened_at,
            branches=branches_of(whole),
        )


def full(turn: Turn) -> tuple[int, ...]:
    """Its prompt and output."""
    return turn.prompt_ids + turn.output_ids


def branches_of(turns: Sequence[RecordedTurn]) -> tuple[Branch, ...]:
    """The conversation of each leaf, with the answers that its prompt holds as they were sampled."""
    learnt = [place for place, recorded in enumerate(turns) if recorded.learnt]
    numbers = {place: number for number, place in enumerate(learnt)}
    tree = EpisodeTree(recorded.turn for recorded in turns)
    found = []
    for leaf in tree.leaves:
        last = turns[leaf]
        said = (*last.messages, *([last.answer] if last.answer else []))
        answers = {len(turns[place].messages): numbers.get(place) for place in tree.chain(leaf)}
        if said:
            found.append(Branch(said, tuple(answers.get(place) for place in range(len(said)))))
    return tuple(found)


def read_session(path: Path) -> Session:
    """The session of a record file. Raises RunError for a damaged one."""
    session = Session(path.stem.partition("-")[2] if path.parent.name == "finished" else path.stem)
    for event in read_journal(path):
        session.apply(event)
    return session


def own_distribution(params: SamplingParams) -> bool:
    """Whether tokens are drawn from the model itself: temperature 1, nothing cut off, added, forbidden or forced."""
    plain = replace(
        params, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0, presence_penalty=0.0,
        frequency_penalty=0.0, logit_bias=None, bad_sequences=(), min_tokens=0, structured_outputs=None,
    )  # fmt: skip
    return plain == (params if params.top_k >= 0 else replace(params, top_k=0))


def _reward(value: float, reason: str) -> Reward:
    return Reward(value, Grade("correct" if value > 0 else "incorrect", reason, judged=False))
