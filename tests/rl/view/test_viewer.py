"""The viewer's page as a file: nothing is lost on the way into it, and nothing can break out of it."""

import base64
import gzip
import hashlib
import json
import re

import pytest
import torch
from rollouts_made import rollout
from speaker import speaker_model, speaker_tokenizer

from glm5.rl.view import Told, told, trainer_logprobs, write_viewer
from glm5.rl.view.viewer import newest

HOSTILE = "</script><script>window.pwned = 1</script><!-- {{script}} {{index}} <img src=x onerror=window.pwned=1>"


def written(tmp_path, rollouts, **options):
    path = tmp_path / "rollouts.html"
    write_viewer(path, rollouts, speaker_tokenizer(), **options)
    return path.read_text(encoding="utf-8")


def opened(page):
    """The rows and bodies that a page holds."""
    index = json.loads(re.search(r'id="index">(.*?)</script>', page, re.DOTALL)[1])
    chunks = re.findall(r'id="chunk-\d+">(.*?)</script>', page)
    bodies = [json.loads(gzip.decompress(base64.b64decode(chunk))) for chunk in chunks]
    return index, [bodies[row["chunk"]][row["place"]] for row in index["rows"]]


def test_every_token_is_in_the_page_with_all_that_is_known_of_it(tmp_path):
    made = rollout(calls=[("add", '{"a": 12}', "42 déjà vu 日本")], version=3)
    trainer = {made.id: [[-0.125 * i for i in range(made.num_sampled)]]}
    index, (body,) = opened(written(tmp_path, [Told(made, "trained", step=5, weight=2)], trainer=trainer))
    row = index["rows"][0]
    assert (row["fate"], row["step"], row["weight"], row["reward"], row["outcome"]) == ("trained", 5, 2, 1.0, "ok")
    assert (row["tokens"], row["turns"], row["versions"]) == (made.num_sampled, 2, [3, 4]) and index["ratios"]
    (path,), (trajectory,) = body["paths"], made.trajectories
    text = "".join(part if isinstance(part, str) else "".join(part["text"]) for part in path)
    assert text == speaker_tokenizer().decode(list(trajectory.token_ids))
    sampled = [part for part in path if not isinstance(part, str)]
    assert len(sampled) == 2
    logprobs = [x for part in sampled for x in part["logprobs"]]
    assert logprobs == pytest.approx([x for turn in made.turns for x in turn.logprobs], rel=1e-8)
    versions = [version for part in sampled for version, count in part["versions"] for _ in range(count)]
    assert versions == [v for turn in made.turns for v in turn.versions]
    assert [x for part in sampled for x in part["trainer"]] == trainer[made.id][0]
    (branch,) = body["branches"]
    assert branch["messages"] == [dict(m) for m in made.messages] and branch["turns"] == [None, 0, None, 1]
    assert [turn["output"] for turn in body["turns"]] == [len(turn.output_ids) for turn in made.turns]


def test_a_token_is_trained_in_one_path_only(tmp_path):
    made = rollout(calls=[("add", "{}", "42")], fork=True)
    _, (body,) = opened(written(tmp_path, told([made])))
    assert len(body["paths"]) == 2
    assert (
        sum(len(part["text"]) for path in body["paths"] for part in path if not isinstance(part, str))
        == made.num_sampled
    )


def test_hostile_text_stays_inside(tmp_path):
    made = rollout(
        question=HOSTILE, said=HOSTILE, reason=HOSTILE, calls=[(HOSTILE, HOSTILE, HOSTILE)], environment=HOSTILE
    )
    page = written(tmp_path, told([made]), title=HOSTILE)
    assert page.count("<script") == 3 and page.count("</script>") == 3 and "<img" not in page and "<!--" not in page
    _, (body,) = opened(page)
    assert body["branches"][0]["messages"][0]["content"] == HOSTILE
    policy = re.search(r'Content-Security-Policy" content="(.*?)"', page)[1]
    for tag, directive in (("script", "script-src"), ("style", "style-src")):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy and "unsafe" not in policy and "trusted-types" in policy
    assert not re.search(r"https?://|url\(|@import", page.replace("http-equiv", ""))


def test_failures_have_no_reward(tmp_path):
    made = rollout(reward=None, failure="the server is away")
    index, (body,) = opened(written(tmp_path, [Told(made, "dropped", "environment failure")]))
    assert index["rows"][0]["reward"] is None and body["failure"] == "the server is away"
    assert index["rows"][0]["because"] == "environment failure"


def test_of_a_large_run_the_newest_whole_groups_are_shown(tmp_path):
    rollouts = told(rollout(sample, index=index) for index in range(10) for sample in (1, 0))
    each = sum(len(path.token_ids) for path in rollouts[0].rollout.trajectories)
    chosen = newest(rollouts, 3 * 2 * each + each)
    assert [(one.rollout.ticket.task_index, one.rollout.ticket.sample) for one in chosen] == [
        (index, sample) for index in (7, 8, 9) for sample in (0, 1)
    ]
    assert len(newest(rollouts, 1)) == 2
    index, _ = opened(written(tmp_path, rollouts, most_tokens=6 * each))
    assert index["note"] == "6 episodes, the newest of 20; the journal holds them all"


def test_chunks_are_opened_one_by_one(tmp_path):
    index, bodies = opened(
        written(tmp_path, told(rollout(i % 8, index=i // 8, said=f"It is {i}.") for i in range(200)))
    )
    assert index["chunks"] == 4 and len(bodies) == 200
    for row, body in zip(index["rows"], bodies, strict=True):
        number = int(row["id"].split("/")[1]) * 8 + row["sample"]
        assert body["branches"][0]["messages"][-1]["content"] == f"It is {number}."


def test_the_trainers_log_probabilities_are_those_of_a_forward_pass():
    model, made = speaker_model().eval(), rollout(calls=[("add", "{}", "42")], fork=True)
    found = trainer_logprobs(model, [made])[made.id]
    assert [len(path) for path in found] == [trajectory.num_sampled for trajectory in made.trajectories]
    first = made.turns[0]
    ids = torch.tensor([[*first.prompt_ids, *first.output_ids]])
    logprobs = model(ids, attention="sparse").logits.float().log_softmax(-1)
    expected = [logprobs[0, i - 1, ids[0, i]].item() for i in range(len(first.prompt_ids), ids.shape[1])]
    assert found[0] == pytest.approx(expected, abs=1e-5)
