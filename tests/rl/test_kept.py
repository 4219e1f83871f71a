"""Episodes of many turns: what is kept of them grows with their tokens, not with the square of their turns."""

import asyncio
import gc
import random

from rollouts_made import rollout
from scripted import Chat, ScriptedSource
from thin_rollouts import scheduler

from glm5.rl.admission import SchedulerConfig
from glm5.rl.event_log import Unfinished
from glm5.rl.events import Finished
from glm5.rl.kept import KeptTurns
from glm5.rl.records import Ticket, Turn
from glm5.rl.rollout_config import RolloutConfig
from glm5.rl.runner import play
from glm5.rl.window import Window


def conversation(draw, turns, forget=0.0):
    """Turns that go on from each other; some drop a part of what was said."""
    said, found = (1, 2, 3), []
    for _ in range(turns):
        if draw.random() < forget:
            said = said[: draw.randrange(len(said))]
        prompt = (*said, *(draw.randrange(9) for _ in range(draw.randrange(1, 4))))
        ids = tuple(draw.randrange(9) for _ in range(draw.randrange(1, 5)))
        numbers = tuple(range(len(ids)))
        logprobs = tuple(-0.5 * n for n in numbers)
        found.append(Turn(prompt, ids, logprobs, numbers, "stop", draw.random(), draw.randrange(5)))
        said = prompt + ids
    return found


def test_kept_turns_come_back_whole():
    for seed in range(40):
        turns, kept = conversation(random.Random(seed), 12, forget=0.4), KeptTurns()
        for turn in turns:
            kept.add(turn)
        assert list(kept) == list(kept) == turns and len(kept) == 12
        times = [(turn.seconds, turn.cached_tokens) for turn in turns]
        assert [(turn.seconds, turn.cached_tokens) for turn in kept] == times


def test_turns_that_run_come_back_whole_from_their_pieces():
    ticket = Ticket("chat", 0)
    for seed in range(40):
        turns, known, again = conversation(random.Random(seed), 12, forget=0.4), Unfinished(), Unfinished()
        for number, turn in enumerate(turns):
            piece = known.news(ticket, number, 0, turn)
            known.add(piece)
            again.add(piece)
        assert list(known.turns(ticket)) == list(again.turns(ticket)) == turns
        begun = known.news(ticket, 5, 0, turns[5])  # anew from there
        known.add(begun)
        assert list(known.turns(ticket)) == turns[:6]


def test_what_is_kept_grows_with_the_tokens():
    ticket, turns, kept, known = Ticket("chat", 0), conversation(random.Random(0), 200), KeptTurns(), Unfinished()
    for number, turn in enumerate(turns):
        kept.add(turn)
        known.add(known.news(ticket, number, 0, turn))
    last = len(turns[-1].prompt_ids)
    assert sum(len(turn.prompt_ids) for _, turn in kept._turns) < last
    assert sum(len(said.prompt_ids) for said in known._turns[ticket.id]) < last


def test_an_episode_that_goes_on_holds_no_more_than_its_tokens():
    ticket, config, known, held = Ticket("chat", 0), RolloutConfig(thinking=True), Unfinished(), []

    def reward(said):
        gc.collect()
        held.append(sum(len(it.prompt_ids) for it in gc.get_objects() if type(it) is Turn))
        return 1.0

    chat = Chat(*[{"role": "user", "content": "And?"}] * 39, reward=reward)
    source = ScriptedSource(*["</think>4<|user|>"] * 40)
    note = lambda *report: known.add(known.news(*report))
    live = asyncio.run(play(ticket, chat, source, config, progress=note))
    prompts, messages = [turn.prompt_ids for turn in live.turns], live.messages
    del live
    gone_on = asyncio.run(play(ticket, chat, ScriptedSource(), config, resume_from=known.turns(ticket)))
    assert [turn.prompt_ids for turn in gone_on.turns] == prompts and gone_on.messages == messages
    assert len(prompts) == 40 and max(held) < 4 * len(prompts[-1]) < sum(map(len, prompts)) / 4


def test_groups_and_figures_hold_no_turns():
    made = rollout(environment="e", calls=[("add", {"a": 1}, "2")])
    it = scheduler(SchedulerConfig(mode="sync", group_size=2, groups_per_batch=1))
    (ticket, *_) = it.admit()
    assert it.finished(made) and made in [event.rollout for event in it.take_events() if isinstance(event, Finished)]
    (group,) = it.groups.values()
    held = group.rollouts[ticket.sample]
    assert held.turns == held.messages == () and held.trajectories == made.trajectories and held.reward == made.reward
    window = Window()
    window.add(made)
    assert window._back[0].turns == 2 and len(window._back[0].logprobs) == sum(len(t.logprobs) for t in made.turns)
