"""The examples of docs/environments.md run, and are as short as the page says."""

import re
from pathlib import Path

from episodes import play, said

PAGE = (Path(__file__).parents[2] / "docs/environments.md").read_text(encoding="utf-8")


def test_the_examples_run_and_their_lines_are_counted():
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[1:]
    lines = [sum(bool(line.strip()) for line in block.splitlines()) for block in blocks]
    assert lines == list(map(int, re.findall(r"\((\d+) lines\)", PAGE))) and len(blocks) == 2
    for block in blocks:
        names = {}
        exec(block, names)
        env = names["environment"]
        task = env.task(0, 0)
        assert play(env, task, said(task.answer))[1].value > 0.9
