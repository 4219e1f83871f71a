"""Two agent programs as their authors write them: a base URL, a model name, a tool loop. They know of no training."""

import json

import anthropic
import openai

TURNS = 3
TASK = "Turn."
TOOLS = {"left": "You turned left.", "right": "You turned right."}
OPENAI = openai.OpenAI(base_url="http://127.0.0.1", api_key="none", max_retries=0)
ANTHROPIC = anthropic.Anthropic(base_url="http://127.0.0.1", api_key="none", max_retries=0)
SCHEMA = {"type": "object", "properties": {}}


def openai_agent(base_url):
    """Asks, runs the tools that are called, asks again. Gives the names of what was called."""
    client = OPENAI.with_options(base_url=f"{base_url}/v1")
    tools = [{"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in TOOLS]
    messages, called = [{"role": "user", "content": TASK}], []
    for _ in range(TURNS):
        reply = client.chat.completions.create(
            model="tiny", messages=messages, tools=tools, max_tokens=24, temperature=0, reasoning_effort="none"
        )
        message = reply.choices[0].message
        messages.append(message)
        if not message.tool_calls:
            break
        for call in message.tool_calls:
            json.loads(call.function.arguments)
            called.append(call.function.name)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": TOOLS.get(call.function.name, "?")})
    return called


def anthropic_agent(base_url):
    """The same with the other package, streamed."""
    client = ANTHROPIC.with_options(base_url=base_url)
    tools = [{"name": name, "input_schema": SCHEMA} for name in TOOLS]
    messages, called = [{"role": "user", "content": TASK}], []
    for _ in range(TURNS):
        with client.messages.stream(model="tiny", messages=messages, tools=tools, max_tokens=24) as events:
            reply = events.get_final_message()
        calls = [block for block in reply.content if block.type == "tool_use"]
        if not calls:
            break
        called += [call.name for call in calls]
        results = [
            {"type": "tool_result", "tool_use_id": call.id, "content": TOOLS.get(call.name, "?")} for call in calls
        ]
        messages += [{"role": "assistant", "content": reply.content}, {"role": "user", "content": results}]
    return called
