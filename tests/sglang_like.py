"""A stand-in for SGLang: its words, without a model."""

import asyncio
import json

import httpx


def sglang_like(seen, hold_at=None):
    """Answers token 40 + length of the input, one at a time and slowly; takes weights.

    hold_at: tokens after which an answer waits until weights have come.
    """

    async def tokens(body):
        ids, rows = body["input_ids"], []
        for number in range(1, body["sampling_params"]["max_new_tokens"] + 1):
            await asyncio.sleep(0.002)
            while number == hold_at and not any(path == "/update_weights_from_disk" for path, _ in seen):
                await asyncio.sleep(0.002)
            token = 40 + (len(ids) + number) % 200
            rows.append([-0.5, token, None])
            finish = {"type": "length"} if number == body["sampling_params"]["max_new_tokens"] else None
            meta = {"completion_tokens": number, "finish_reason": finish, "output_token_logprobs": rows[-1:]}
            yield f"data: {json.dumps({'output_ids': [token], 'meta_info': meta})}\n\n".encode()

    async def handler(request):
        if request.url.path == "/health":
            return httpx.Response(200)
        body = json.loads(request.content)
        seen.append((request.url.path, body))
        if request.url.path == "/update_weights_from_disk":
            return httpx.Response(200, json={"success": True})
        return httpx.Response(200, headers={"content-type": "text/event-stream"}, content=tokens(body))

    return httpx.MockTransport(handler)
