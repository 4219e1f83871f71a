"""Anthropic's blocks of calls whose arguments are JSON that Python cannot hold."""

from __future__ import annotations

import json

import pytest

from glm5.errors import InputError
from glm5.serve.content_blocks import ContentBlocks


def blocks_of(arguments):
    blocks = ContentBlocks()
    call = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    list(blocks.feed([{"tool_calls": [call]}]))
    list(blocks.close())
    return blocks.blocks


@pytest.mark.parametrize("value", ["1e400", "[-1e999]", "9" * 5000])
def test_numbers_that_no_reply_can_hold_are_refused_by_a_sentence(value):
    with pytest.raises(InputError, match="too large or has thousands of digits"):
        blocks_of(f'{{"x": {value}}}')


def test_other_numbers_stay_what_they_are():
    (block,) = blocks_of('{"x": [1e308, 12, -0.5]}')
    assert block["input"] == {"x": [1e308, 12, -0.5]} and json.dumps(block, allow_nan=False)
