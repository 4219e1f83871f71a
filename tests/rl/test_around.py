"""Sources around others: a server sees of the one behind what it would see of it alone."""

import ast
import asyncio
import copy
from inspect import signature
from pathlib import Path

import httpx
import pytest
from speaker import speaker_model, speaker_tokenizer

import glm5.serve
from glm5.engine import Engine
from glm5.engine.grammar import GrammarCompiler
from glm5.engine.sampling_params import StructuredOutputs
from glm5.rl.around import AroundSource
from glm5.rl.fleet import InProcessFleet
from glm5.rl.fleet.local import Grammars
from glm5.rl.gateway import Sessions
from glm5.rl.gateway.learning import Address, OpenFleet, WhileOpen
from glm5.rl.gateway.sampling import OwnDistribution
from glm5.rl.meter import Meter, Metered
from glm5.serve import create_app
from glm5.serve.generation import Source


def read_of_a_source() -> set[str]:
    """Every attribute that `glm5.serve` reads of a `source`, required or `getattr(source, "name", None)`."""

    def is_source(node):
        return getattr(node, "id", getattr(node, "attr", None)) == "source"

    found = set()
    for path in Path(glm5.serve.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and is_source(node.value):
                found.add(node.attr)
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr" and is_source(node.args[0]):
                found.add(ast.literal_eval(node.args[1]))
    return found


def test_everything_that_a_server_reads_is_handed_on():
    """A new member of the protocol, or a new optional one, is noticed here."""
    read = read_of_a_source()
    required = {name for name in vars(Source) if not name.startswith("_")}
    assert required <= read and {"grammars", "ready", "stats"} <= read, "they are read in another way; look there"
    missing = read - {"stream"} - set(dir(AroundSource))
    assert not missing, f"AroundSource hands on no {', '.join(sorted(missing))}"
    assert all("stream" in vars(kind) for kind in (OwnDistribution, Metered, WhileOpen))


def client_of(app):
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway")


def test_the_compilers_of_several_engines_are_asked_as_one_is():
    for name in ("has", "compile"):
        one, several = (list(signature(getattr(kind, name)).parameters) for kind in (GrammarCompiler, Grammars))
        assert one == several


class Behind:
    """A source with everything."""

    tokenizer, max_model_len, version, grammars = speaker_tokenizer(), 7, 3, object()
    there, failure = True, None

    def stream(self, *arguments, **options):
        raise NotImplementedError

    async def ready(self):
        return self.there

    def stats(self):
        return "stats"


@pytest.mark.parametrize("around", [
    lambda source: AroundSource(source), lambda source: OwnDistribution(Metered(source, Meter())),
])  # fmt: skip
def test_each_member_is_that_of_the_source(around):
    behind = Behind()
    source = around(behind)
    assert source.grammars is behind.grammars and source.stats() == "stats"
    assert (source.max_model_len, source.version, source.tokenizer) == (7, 3, behind.tokenizer)
    assert asyncio.run(source.ready()) is True
    bare = around(object())
    assert bare.grammars is bare.ready is bare.stats is bare.failure is None


def test_health_says_when_what_is_behind_is_away():
    async def story():
        behind = Behind()
        behind.stats = None
        async with client_of(create_app(OwnDistribution(behind), model_name="m")) as client:
            assert (await client.get("/health")).json()["status"] == "ready"
            behind.there = False
            reply = await client.get("/health")
            assert (reply.status_code, reply.json()["status"]) == (503, "backend away")
            behind.failure = "No engine is left"
            reply = await client.get("/health")
            assert (reply.status_code, reply.json()["status"]) == (503, "engine failed")

    asyncio.run(story())


def test_a_gateway_run_serves_as_its_engines_would(tmp_path):
    """Structures are compiled before their requests start, in every engine; the metrics are of all engines."""
    model = speaker_model()
    engines = [Engine(copy.deepcopy(model), speaker_tokenizer(), num_blocks=8) for _ in range(2)]
    opened = OpenFleet(InProcessFleet(engines), Sessions(tmp_path), Address(), 0, Meter(), None)
    yes_or_no = StructuredOutputs(choice=["yes", "no"])

    async def story():
        async with client_of(opened.app) as client:
            body = {"model": "glm5", "prompt": "a", "max_tokens": 4, "structured_outputs": {"choice": ["yes", "no"]}}
            reply = await client.post("/v1/completions", json=body)
            assert reply.json()["choices"][0]["text"] in ("yes", "no"), reply.text
            text = (await client.get("/metrics")).text
            assert "glm5_engine_blocks_total 16.0" in text and "glm5_engine_version 0.0" in text
            sampled = sum(engine.stats().sampled_tokens for engine in engines)
            assert f"glm5_engine_sampled_tokens_total {float(sampled)}" in text and sampled
            assert (await client.get("/health")).status_code == 200
            engines[1].failure = "ZeroDivisionError"
            reply = await client.get("/health")
            assert (reply.status_code, reply.json()["status"]) == (503, "engine failed")
            assert [state.up for state in opened.stats().engines] == [True, False]
            assert opened.failure == "Engine 1 has ended by a mistake of its own (ZeroDivisionError)"
        await opened.source.close()

    asyncio.run(story())
    assert all(engine.grammars.has(yes_or_no) for engine in engines)
    assert opened.stats().engines[0].name == "0"  # of the fleet, as the orchestrator reads it
    opened.sessions.close()
