"""Plays one episode: messages to tokens, tokens to messages, turn after turn, and the reward at the end.

The conversation is rendered by the chat template once, for the first turn. A later prompt is the earlier prompt, the
tokens that were sampled (never tokenised again) and the template's tokens of the new messages. Where the template
would render what was said before differently (it drops thoughts behind a new question, unless `keep_thoughts`), or the
model ended its turn with another token than the one that the conversation goes on with, the prompt is what a server
would have been sent, and the episode's tree branches.

Whatever goes wrong has its own outcome. A mistake in the environment's code is `env_failure` with the reason
(`glm5.rl.asking`), never a reward of 0. Mistakes of the engine are raised: they are nobody's sample.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable

from glm5.engine import SamplingParams
from glm5.engine.choices import joined
from glm5.envs import Environment, EnvironmentFailure, Episode, Message, Observation, Reward, Task, Tool
from glm5.errors import InputError, RequestFailed
from glm5.rl.asking import Asking, reason_of
from glm5.rl.kept import KeptTurns
from glm5.rl.outage import pauses
from glm5.rl.records import Outcome, Rollout, Ticket, Turn
from glm5.rl.rollout_config import RolloutConfig
from glm5.rl.stops import SpokenText, answer_begins
from glm5.rl.streamed import StreamedTurn
from glm5.rl.tree import EpisodeTree
from glm5.serve.generation import Source
from glm5.text import Tokenizer, parse_assistant

OPEN = ""
"""Finish reason of a turn that still runs."""
Progress = Callable[[Ticket, int, int, Turn], None]
"""Told of a turn by its number, and of its tokens from the given one on, which are new: at its first token, now and
then, and once when it ended. Told from 0 on, a turn and those after it begin anew."""
Away = Callable[[str], None]
"""Told why an environment's server could not be asked, each time before it is asked again."""


async def play(
    ticket: Ticket,
    environment: Environment,
    source: Source,
    config: RolloutConfig,
    *,
    progress: Progress | None = None,
    away: Away | None = None,
    resume_from: Iterable[Turn] = (),
    timed: bool = True,
) -> Rollout:
    """Makes the rollout of a ticket.

    resume_from: turns as `progress` reported them, the last of which may be open; each is asked for when it is due. The
    environment is asked again from the beginning and must answer the same; if it does not, the rollout starts anew.
    timed: whether the environment's time limits count; without, the result depends on no clock. Cancelling the call
    ends the request and closes the episode.
    """
    if source.tokenizer is None:
        raise InputError("Reinforcement learning needs a tokenizer; give a model directory that holds one.")
    tokenizer = source.tokenizer

    def player(known: Iterable[Turn]) -> _Player:
        return _Player(ticket, environment, source, tokenizer, config, progress, away, known, timed)

    try:
        return await player(resume_from).play()
    except _AnotherPath:
        return await player(()).play()


class _AnotherPath(Exception):
    """The environment did not answer as it did before the interruption."""


class _Aborted(Exception):
    """The source gave a request up."""


class _Player:
    """One episode while it is played."""

    def __init__(
        self,
        ticket: Ticket,
        environment: Environment,
        source: Source,
        tokenizer: Tokenizer,
        config: RolloutConfig,
        progress: Progress | None,
        away: Away | None,
        resume_from: Iterable[Turn],
        timed: bool,
    ) -> None:
        self.environment, self.away = environment, away
        self.ticket, self.source, self.tokenizer = ticket, source, tokenizer
        self.config, self.progress, self.known, self.timed = config, progress, iter(resume_from), timed
        limits = environment.limits
        self.most_turns = limits.turns
        self.seconds = config.episode_seconds if limits.seconds is None else limits.seconds
        self.step_seconds = config.step_seconds if limits.step_seconds is None else limits.step_seconds
        self.asking = Asking(environment, self.step_seconds, timed=timed)
        self.asking_seconds = 0.0
        """Of those that were away."""
        self.task = Task(f"{ticket.environment}/{ticket.task_index}", (), "", "")
        self.has_tools = False
        self.messages: list[Message] = []
        self.turns = KeptTurns()

    # ---- from beginning to end ----------------------------------------------------------------------------------
    async def play(self) -> Rollout:
        """The finished rollout, whatever happens but cancellation and mistakes of the source."""
        started = time.perf_counter()
        reward: Reward | None = None
        outcome: Outcome
        failure = ""
        timer = asyncio.timeout(self.seconds if self.timed else None)
        try:
            async with timer:
                episode, tools, first = await self._begun(timer)
                truncated = await self._converse(episode, tools, first)
                reward = await self.asking.score(episode)
                outcome = "truncated" if truncated else "ok"
        except TimeoutError:
            if not timer.expired():
                raise
            reward, outcome, failure = None, "timeout", f"the episode took longer than {self.seconds:g} s"
        except EnvironmentFailure as error:
            reward, outcome, failure = None, "env_failure", reason_of(error.kind, error)
        except RequestFailed as error:
            reward, outcome, failure = None, "env_failure", reason_of("engine", error)
        except _Aborted:
            reward, outcome, failure = None, "aborted", "the engine gave the request up"
        finally:
            await self.asking.close()
        turns = tuple(self.turns)
        return Rollout(
            ticket=self.ticket,
            task=self.task,
            trajectories=EpisodeTree(turns).trajectories(),
            outcome=outcome,
            reward=reward,
            messages=tuple(self.messages),
            turns=turns,
            failure=failure,
            seconds=time.perf_counter() - started,
            tool_seconds=self.asking_seconds + self.asking.seconds,
        )

    async def _begun(self, timer: asyncio.Timeout) -> tuple[Episode, list[Tool], Observation]:
        """An episode, its tools and first messages. Where its server is away, another one is begun after a pause; the
        time of the episode counts from the last."""
        waits = pauses(self.config.outage_seconds if self.timed else 0.0)
        while True:
            try:
                self.task, episode, tools = await self.asking.begin(self.config.seed, self.ticket.task_index)
                return episode, tools, await self.asking.reset(episode)
            except EnvironmentFailure as failure:
                wait = next(waits, None) if failure.kind == "unreachable" else None
                if wait is None:
                    raise
                if self.away is not None:
                    self.away(f"{self.ticket.environment} is away and asked again, {reason_of(failure.kind, failure)}")
            timer.reschedule(None)
            await self.asking.close()
            self.asking_seconds += self.asking.seconds
            self.asking = Asking(self.environment, self.step_seconds, timed=self.timed)
            await asyncio.sleep(wait)
            if self.seconds is not None:
                timer.reschedule(asyncio.get_running_loop().time() + self.seconds)

    async def _converse(self, episode: Episode, tools: list[Tool], first: Observation) -> bool:
        """Turn after turn until the environment has enough, or a limit is met (True)."""
        observation, self.has_tools = first, bool(tools)
        self.messages += observation.messages
        prompt = self._rendered(tools, len(self.messages), answer=True)
        if self._room(prompt) < 1:
            raise EnvironmentFailure(
                f"the first prompt has {len(prompt)} tokens, which leaves no room for an answer in {self._longest}"
            )
        while True:
            turn = await self._sampled(prompt)
            text, closed = self._read(turn)
            message = parse_assistant(text, tools or None, self.config.thinking, f"{self.ticket.id}/{len(self.turns)}")
            self.messages.append(message)
            said = len(self.messages)
            observation = await self.asking.step(episode, message)
            self.messages += observation.messages
            cut = turn.finish_reason == "length"
            if observation.done or cut:
                return cut
            prompt = self._continued(turn, closed, tools, said)
            if len(self.turns) >= self.most_turns or self._room(prompt) < 1:
                return True

    # ---- the model ----------------------------------------------------------------------------------------------
    async def _sampled(self, prompt: tuple[int, ...]) -> Turn:
        """The next turn, from what is known of it on."""
        number, started = len(self.turns), time.perf_counter()
        turn = next(self.known, Turn(prompt, (), (), (), OPEN))
        if turn.prompt_ids != prompt:
            raise _AnotherPath
        if turn.finish_reason == OPEN:
            turn = await self._streamed(number, turn, started)
        self.turns.add(turn)
        if turn.finish_reason == "abort":
            raise _Aborted
        return turn

    async def _streamed(self, number: int, begun: Turn, started: float) -> Turn:
        """The rest of a turn. The random numbers hang on the position alone, so it goes on as if never interrupted."""
        answer, finish_reason, spoken = StreamedTurn(begun, started), OPEN, self._spoken()
        spoken.take(begun.output_ids)
        params = SamplingParams(
            temperature=self.config.temperature,
            tempered_logprobs=self.config.temperature != 1.0,
            max_tokens=self._room(begun.prompt_ids) - len(begun.output_ids),
            stop_token_ids=self.config.stop_token_ids,
            seed=self.ticket.seed(self.config.seed, number),
            experts_from=self._unknown_from(begun) if self.config.replay_experts else None,
        )
        stream = self.source.stream(
            (*begun.prompt_ids, *begun.output_ids), params, session_id=self.ticket.session, priority=0, deadline=None
        )
        try:
            async for delta in stream:
                length, finish_reason = answer.add(delta), delta.finish_reason or OPEN
                if spoken.take([delta.token_id]):
                    finish_reason = "stop"
                due = finish_reason or length == 1 or length % self.config.report_every == 0
                if self.progress is not None and due:
                    self.progress(self.ticket, number, *answer.news(finish_reason))
                if spoken.stopped:
                    break
        finally:
            stream.close()
        return answer.turn(finish_reason or "abort", stream.cached_tokens)

    def _unknown_from(self, begun: Turn) -> int:
        """The first token of a turn whose experts neither it nor a turn before it tells of."""
        tree = EpisodeTree(tuple(self.turns))
        known = joined([tree.experts(tree.extended_by(begun.prompt_ids)), begun.experts])
        return 0 if known is None else known.end

    @property
    def _longest(self) -> int:
        """Tokens of a prompt with its answer."""
        own = self.config.max_episode_tokens
        return self.source.max_model_len if own is None else min(own, self.source.max_model_len)

    def _room(self, prompt: tuple[int, ...]) -> int:
        """Tokens that the next turn may have."""
        return min(self.config.max_tokens, self._longest - len(prompt))

    def _spoken(self) -> SpokenText:
        begin = answer_begins(self.config.thinking, self.has_tools)
        return SpokenText(self.tokenizer, self.config.stop, keep=self.config.keep_stop, begin=begin)

    def _read(self, turn: Turn) -> tuple[str, bool]:
        """What was said, as the engine makes text of tokens; and whether the model closed its turn with the last one,
        which then is no part of it."""
        *before, last = turn.output_ids
        spoken = self._spoken()
        if spoken.take(before) or turn.finish_reason != "stop":
            spoken.take([last])
            return spoken.whole(), False
        if last in self.config.stop_token_ids and last not in self.tokenizer.eos_ids:
            spoken.take([last] if self.config.keep_stop else ())
            return spoken.whole(), False
        met = self._spoken()
        return (met.whole(), False) if met.take(turn.output_ids) else (spoken.whole(), True)

    # ---- prompts ------------------------------------------------------------------------------------------------
    def _rendered(self, tools: list[Tool], count: int, *, answer: bool) -> tuple[int, ...]:
        """The template's tokens of the first `count` messages; `answer`: and of the beginning of the next turn."""
        try:
            return tuple(
                self.tokenizer.apply_chat_template(
                    self.messages[:count],
                    tools or None,
                    add_generation_prompt=answer,
                    enable_thinking=self.config.thinking,
                    clear_thinking=False if self.config.keep_thoughts else None,
                    escape_special=True,
                )
            )
        except Exception as error:
            raise EnvironmentFailure(
                f"messages and tools cannot be rendered: {str(error) or type(error).__name__}"
            ) from error

    def _continued(self, turn: Turn, closed: bool, tools: list[Tool], said: int) -> tuple[int, ...]:
        """The prompt after the messages that came behind the first `said`, the newest of which is the turn's own.

        closed: whether the model closed it with its last token.
        """
        before = self._rendered(tools, said, answer=False)
        whole = self._rendered(tools, len(self.messages), answer=True)
        # Every message begins with a special token, so texts that continue each other do so as tokens too.
        if whole[: len(before)] != before:
            return whole
        added = whole[len(before) :]
        if closed:
            if turn.output_ids[-1] == added[0]:  # the model itself said whose turn is next
                return turn.prompt_ids + turn.output_ids + added[1:]
            return turn.prompt_ids + turn.output_ids[:-1] + added
        return turn.prompt_ids + turn.output_ids + added
