"""Agent programs, unchanged, are served, rewarded and learnt from while they run; and later, from their records."""

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import httpx
import pytest
import torch
from agents import SCHEMA, TASK, TOOLS, anthropic_agent, openai_agent
from gateway_tools import gateway
from tiny import tiny_model

import glm5
from glm5 import Tokenizer
from glm5.engine import Engine, SamplingParams
from glm5.errors import InputError
from glm5.optim import OptimizerConfig
from glm5.rl import run_ends
from glm5.rl.admission import SchedulerConfig
from glm5.rl.config import RLRunConfig
from glm5.rl.gateway import OwnDistribution, Sessions, learning, train_from_gateway, train_from_records
from glm5.rl.gateway.learning import Address
from glm5.rl.learner import Learner, LearnerConfig
from glm5.rl.view.watch import snapshot_of
from glm5.text.template import CHAT_TEMPLATE, render
from glm5.train.run_directory import directory_sha256

FUNCTIONS = [{"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in TOOLS]
USER = {"role": "user", "content": TASK}


def calling(name):
    call = {"type": "function", "function": {"name": name, "arguments": {}}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def conversation(name):
    """What the model is taught: a call, its result, an end."""
    return [USER, calling(name), {"role": "tool", "content": TOOLS[name]}, {"role": "assistant", "content": "Done."}]


@lru_cache
def tokenizer():
    texts = [render(CHAT_TEMPLATE, {"messages": conversation(name), "tools": FUNCTIONS}) for name in TOOLS]
    return Tokenizer.train(texts * 4, 640)


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """A model that turns left as often as right, and knows how calls are written."""
    torch.manual_seed(0)
    model = tiny_model(
        vocab_size=640, num_nextn_predict_layers=0, max_position_embeddings=512, eos_token_id=tokenizer().eos_ids
    )
    rows = [glm5.text.render_for_training(tokenizer(), conversation(name), FUNCTIONS) for name in TOOLS]
    ids, masks = (torch.tensor(part) for part in zip(*rows, strict=True))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.0)
    for _ in range(120):
        loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).logits[masks[:, 1:]], ids[:, 1:][masks[:, 1:]])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    directory = tmp_path_factory.mktemp("parent")
    glm5.save_model(model.eval(), directory, tokenizer())
    return directory


def config_of(parent, **changes):
    optimizer = OptimizerConfig(name="adamw", lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0)
    scheduler = {"groups_per_batch": 1, "group_size": 8, "max_staleness": 8, **changes}
    return RLRunConfig(
        parent=parent,
        steps=12,
        scheduler=SchedulerConfig(**scheduler),
        learner=LearnerConfig(optimizer=optimizer),
        checkpoint_every=3,
    )


class Users:
    """Start the agent again and again, in groups of eight, and say what each attempt was worth."""

    def __init__(self, agent, stop_after=10**9):
        self.agent, self.stop_after = agent, stop_after
        self.rewards = []
        self.http = httpx.Client(timeout=120)  # a machine may be busy with other tests
        self._first = 0

    def begin(self, url):
        """As soon as the gateway is there."""
        self.thread = threading.Thread(target=self._run, args=(url,))
        self.thread.start()

    def _run(self, url):
        with ThreadPoolExecutor(8) as pool:
            try:
                for _ in range(self.stop_after):
                    group = self._first
                    self._first += 1
                    self.rewards += pool.map(self._attempt, [(url, group, sample) for sample in range(8)])
            except Exception as error:  # the run is over and its gateway closed
                self.ended = error

    def _attempt(self, place):
        url, group, sample = place
        opened = self.http.post(f"{url}/rl/sessions", json={"session": f"{group}-{sample}", "group": f"{group}"}).json()
        called = self.agent(url + opened["anthropic_base_url"])
        reward = float(bool(called) and called[0] == "right")
        reply = self.http.post(f"{url}/rl/sessions/{opened['session']}/reward", json={"value": reward})
        assert reply.status_code == 200
        return reward


def mean(values):
    return sum(values) / len(values)


@pytest.mark.parametrize("agent", [openai_agent, anthropic_agent])
def test_an_unchanged_agent_improves_while_it_is_used(parent, tmp_path, agent):
    users = Users(agent)
    run = train_from_gateway(config_of(parent), tmp_path / "run", Address(port=0, name="tiny"), ready=users.begin)
    users.thread.join()
    lines = run.read("metrics")
    assert len(lines) == 12 and max(line["max_staleness"] for line in lines) <= 8
    assert mean(users.rewards[-24:]) > mean(users.rewards[:16]) + 0.25
    speed = run.read("speed")
    busy = [line["tokens_per_second"] > 0 and line["sampler_idle"] < 1 for line in speed]
    assert sum(busy) > len(busy) // 2  # a step may be made of sessions that had all come to their end before it
    assert 0 < max(line["running"] for line in speed) <= 8  # sessions, not the 72 places for them
    assert snapshot_of(run).tokens_per_second == speed[-1]["tokens_per_second"]
    assert run.finished and len(list((run.path / "sessions" / "finished").iterdir())) >= 12 * 8


def test_a_run_whose_engines_cannot_be_made_lets_its_sessions_go(parent, tmp_path):
    def no_engines(model, tokenizer, version):
        raise MemoryError

    with pytest.raises(MemoryError) as held:  # as a notebook does, which keeps the last error with its frames
        train_from_gateway(config_of(parent), tmp_path / "run", Address(port=0), make_fleet=no_engines)
    Sessions(tmp_path / "run" / "sessions").close()
    assert held.value.__traceback__ is not None


# ---- from records ------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def records(parent, tmp_path_factory):
    """Six groups of attempts at the parent's weights, and one that is not complete."""
    directory = tmp_path_factory.mktemp("records")
    engine = Engine(parent)
    source = OwnDistribution(engine)
    with gateway(directory, source=source, own_sampling=True, weights=directory_sha256(parent)) as running:
        users = Users(openai_agent, stop_after=6)
        users.begin(running.url)
        users.thread.join()
        running.post("", session="alone", group="incomplete")
        running.reward("alone", 1.0)
    engine.close()
    return directory


def share_of_right(model):
    """How often the first call turns right, in 64 attempts."""
    engine = Engine(model)
    prompt = tokenizer().apply_chat_template([USER], FUNCTIONS, enable_thinking=False, escape_special=True)
    outputs = engine.generate([prompt] * 4, [SamplingParams(n=16, max_tokens=24, seed=seed) for seed in range(4)])
    engine.close()
    return mean([float(o.text.startswith("<tool_call>right")) for output in outputs for o in output.outputs])


def test_records_are_learnt_from_later_and_a_torn_run_ends_the_same_without_them(
    parent, records, tmp_path, monkeypatch
):
    read = []
    for module in (learning, run_ends):
        monkeypatch.setattr(module, "directory_sha256", lambda path: (read.append(path), directory_sha256(path))[1])
    whole = train_from_records(config_of(parent), records, tmp_path / "whole")
    assert read == [parent] and whole.description["parent"] == directory_sha256(parent)  # once: it may take minutes
    lines = whole.read("metrics")
    assert 3 <= len(lines) <= 6 and [line["max_staleness"] for line in lines] == list(range(len(lines)))
    assert all(line["trained"] == 8 for line in lines) and not any(line["running"] for line in whole.read("speed"))
    assert share_of_right(whole.model_directory) > share_of_right(parent) + 0.25

    step = Learner.step
    monkeypatch.setattr(Learner, "step", lambda self, batch: 1 / 0 if batch.step == 2 else step(self, batch))
    copy = shutil.copytree(records, tmp_path / "records")
    with pytest.raises(ZeroDivisionError):
        train_from_records(config_of(parent), copy, tmp_path / "torn")
    monkeypatch.undo()
    shutil.rmtree(copy)  # the run's journal holds all
    torn = train_from_records(config_of(parent), copy, tmp_path / "torn", resume=True)
    ours, theirs = (glm5.load_model(r.model_directory, dtype=torch.float32).state_dict() for r in (whole, torn))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert (torn.path / "metrics.jsonl").read_text() == (whole.path / "metrics.jsonl").read_text()


def test_records_of_other_weights_and_too_few_of_them_are_refused(parent, records, tmp_path):
    other = tmp_path / "other"
    glm5.save_model(tiny_model(vocab_size=640, num_nextn_predict_layers=0), other, tokenizer())
    with pytest.raises(InputError, match="49 were recorded with other weights than"):
        train_from_records(config_of(other), records, tmp_path / "run")
    with pytest.raises(InputError, match=r"gives no batch of 9 groups .* 1 sessions wait for the rest"):
        train_from_records(config_of(parent, groups_per_batch=9), records, tmp_path / "run")
    with pytest.raises(InputError, match="no recorded sessions in"):
        train_from_records(config_of(parent), tmp_path, tmp_path / "run")
    bounded = train_from_records(config_of(parent, max_staleness=1), records, tmp_path / "bounded")
    assert len(bounded.read("metrics")) == 2
