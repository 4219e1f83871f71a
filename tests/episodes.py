"""Playing an episode with prepared messages, as a model would."""

import asyncio


def said(content="", *calls, reasoning=None):
    """An assistant message; `calls` are (name, arguments as JSON text)."""
    message = {"role": "assistant", "content": content or None, "reasoning_content": reasoning, "tool_calls": []}
    for number, (name, arguments) in enumerate(calls):
        function = {"name": name, "arguments": arguments}
        message["tool_calls"].append({"id": f"call_{number}", "type": "function", "function": function})
    return message


async def played(environment, task, messages):
    """The observations and the reward of an episode in which the model says `messages`."""
    episode = environment.episode(task)
    try:
        seen = [await episode.reset()]
        for message in messages:
            assert not seen[-1].done
            seen.append(await episode.step(message))
        return seen, await episode.score()
    finally:
        await episode.close()


def play(environment, task, *messages):
    """`played`, to its end."""
    return asyncio.run(played(environment, task, messages))


def assert_pure(environment, count=20):
    """Tasks follow from (seed, index), and seeds and indices tell them apart."""
    tasks = [environment.task(3, i) for i in range(count)]
    assert tasks == [environment.task(3, i) for i in range(count)]
    others = [environment.task(4, i) for i in range(count)]
    assert len({task.id for task in tasks + others}) == 2 * count
    assert [task.messages for task in tasks] != [task.messages for task in others]
