"""`glm5 plan` from flags to text, its formulas, its JSON, hardware files, and a table of bad inputs."""

import json
import math
import re
from pathlib import Path

import pytest
import tyro

from glm5.cli.plan import PlanOptions, run
from glm5.config import ModelConfig
from glm5.errors import ConfigError, GLM5Error, InputError
from glm5.planner import DEVICES, derive, hardware_from, plan_serving, quantities, shape_of
from glm5.planner.hardware import CLASSES
from glm5.planner.quantity import show
from glm5.planner.serving import Serving

NEAT = {"name": "Card", "kind": "datacenter", "memory_gb": 96, "bandwidth_gb_s": 2000, "bf16_tflops": 400}


def options(*flags: str) -> PlanOptions:
    return tyro.cli(PlanOptions, args=list(flags))


def test_every_shown_formula_gives_its_number() -> None:
    shape = shape_of(ModelConfig.from_preset("glm-5.2"), "glm-5.2")
    load = Serving(context=100_000, concurrency=12, drafts=3, accept_length=2.5, cache_dtype="fp8")
    plan = plan_serving(shape, load, hardware_from("H200x16"))
    shown = [q for q in quantities(plan) if q.formula]
    assert len(shown) > 60
    functions = {"min": min, "max": max, "ceil": math.ceil, "floor": math.floor}
    for quantity in shown:
        value = eval(quantity.substituted, {"__builtins__": {}}, functions)
        assert value == pytest.approx(quantity.value, rel=5e-3, abs=1e-12), quantity.explain()


def test_quantities_nest_and_show() -> None:
    width = derive("width", "B", "a * 2", a=3)
    total = derive("total", "B", "max(width, 4) + more", width=width, more=10)
    assert total.value == 16 and total.substituted == "max(6, 4) + 10"
    assert total.explain().splitlines() == ["total: 16 B", "    = max(width, 4) + more", "    = max(6, 4) + 10"]
    assert show(1_487_822_436_864, "B") == "1,488 GB" and show(0.0346, "s") == "34.6 ms"
    assert show(23_000, "tok/s") == "23,000 tok/s" and show(3.2, "$") == "$3.20"


def test_table_says_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(options("glm-5", "--hardware", "H200x8", "--context", "32768")) == 0
    text = capsys.readouterr().out
    for words in ("It fits", "756.2 GB", "dense attention", "glm-4.7", "H100", "$ per million tokens", "Mac"):
        assert words in text
    assert run(options("glm-5", "--hardware", "H100x8")) == 1
    text = capsys.readouterr().out
    assert "does not fit" in text and "Take H100x16" in text
    assert run(options("glm-5", "--dtype", "int4", "--hardware", "CPU24GB", "--context", "1024", "--no-mtp")) == 0
    assert "runs from disk" in capsys.readouterr().out


def test_json_holds_formulas_and_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(options("--hardware", "B200x8", "--price-per-device-hour", "4", "--json")) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"] is True and plan["parameters"] == 743_911_218_432
    weights = plan["estimate"]["memory"]["weights"]
    assert weights["unit"] == "B" and weights["value"] == pytest.approx(756.2e9, rel=1e-3)
    assert "routed_experts" in weights["formula"] and weights["inputs"]["routed_experts"] > 7e11
    assert plan["estimate"]["output_cost"]["inputs"]["price"] == 4
    assert {o["device"] for o in plan["smallest"]} == {d.name for d in DEVICES}


def test_explain_shows_formulas(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(options("--explain", "--context", "202752")) == 0
    text = capsys.readouterr().out
    assert "= layers * row + indexer_layers * indexer_key\n    = 79 * 1152 + 79 * 256" in text
    assert CLASSES["datacenter"].why in text
    assert run(options("--train", "--parallel.data-shard", "8", "--hardware", "H200x8", "nano", "--explain")) == 0
    assert "= min(tokens, chunk) * vocabulary / tensor * (4 + 4)" in capsys.readouterr().out


def test_training_plan_from_flags(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"pipeline": 13, "context": 32, "expert": 32, "sequence": 131_072}
    flags = [text for name, size in sizes.items() for text in (f"--parallel.{name}", str(size))]
    assert run(options("glm-5", "--train", "--hardware", "H100x416", *flags, "--json")) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["fits"] is True and result["plan"]["pipeline"] == 13
    assert result["optimizer"]["inputs"]["muon"] > result["optimizer"]["inputs"]["adamw"]
    assert run(options("glm-5", "--train", "--hardware", "H100x8", "--parallel.data-shard", "8")) == 1
    assert "does not fit" in capsys.readouterr().out


def test_small_presets_directories_and_the_predecessor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(ModelConfig.from_preset("micro").to_json(), encoding="utf-8")
    for name in ("nano", str(tmp_path), "glm-4.7"):
        assert run(options(name, "--context", "4096", "--json")) == 0
    names = [json.loads(text)["model"] for text in re.split(r"(?<=\n\})\n", capsys.readouterr().out) if text]
    assert names == ["nano", str(tmp_path), "glm-4.7"]


def test_hardware_names_and_files(tmp_path: Path) -> None:
    assert hardware_from("h100X8").name == "H100x8" == hardware_from("H100 x 8").name
    assert hardware_from("Mac-Studio M3 Ultra").count == 1
    path = tmp_path / "card.json"
    path.write_text(json.dumps({**NEAT, "count": 8, "link_gb_s": 100, "node_devices": 8}), encoding="utf-8")
    card = hardware_from(str(path))
    assert card.count == 8 and card.device.memory_gb == 96
    assert card.device.bandwidth_efficiency == CLASSES["datacenter"].bandwidth_efficiency
    assert card.link(8) == pytest.approx((10e-6, 100e9))


def test_every_machine_of_the_table_names_its_source() -> None:
    for device in DEVICES:
        assert re.match(r"datasheet|public reports|measured", device.source), device.name
    assert {d.name for d in DEVICES} >= {"H100", "H200", "B200", "MI300X", "Ascend910C", "RTX5090", "DGXSpark"}
    memory = {d.name: d.memory_gb for d in DEVICES}
    assert (memory["H100"], memory["H200"], memory["B200"], memory["MI300X"]) == (80, 141, 180, 192)


BAD_FLAGS: list[tuple[list[str], str]] = [
    (["gml-5"], "Did you mean 'glm-5'"),
    (["glm-5.3"], "known presets"),
    (["no/such/dir"], "config.json does not exist"),
    (["--hardware", "H10x8"], "Did you mean 'H100'"),
    (["--hardware", "H100x0"], "at least 1"),
    (["--hardware", "H100x-8"], "at least 1"),
    (["--hardware", "TPUv9x8"], "There is no hardware"),
    (["--hardware", "CPU24GBx2"], "no network_gb_s"),
    (["--hardware", "none.json"], "does not exist"),
    (["--dtype", "fp88"], "Did you mean 'fp8'"),
    (["--cache-dtype", "bf61"], "Did you mean 'bf16'"),
    (["--context", "202753"], "202,752 positions"),
    (["glm-5.2", "--context", "1048577"], "1,048,576 positions"),
    (["--context", "0"], "context is 0"),
    (["--concurrency", "0"], "concurrency is 0"),
    (["--price-per-device-hour", "-1"], "price per device-hour"),
    (["--price-per-device-hour", "nan"], "price per device-hour"),
    (["--tensor", "3"], "do not divide into replicas"),
    (["--tensor", "128", "--hardware", "H100x128"], "64 heads do not divide"),
    (["--tensor", "-1"], "at least 1"),
    (["--expert", "512", "--hardware", "H100x512"], "leaves devices without experts"),
    (["--expert", "3", "--hardware", "H100x8"], "experts do not divide"),
    (["--drafts", "3"], "needs an accept_length"),
    (["--drafts", "3", "--accept-length", "5"], "between 1 and 4"),
    (["--drafts", "-1", "--accept-length", "1"], "at least 0"),
    (["--drafts", "1", "--accept-length", "1.5", "--no-mtp"], "no MTP layer"),
    (["--train", "--hardware", "H100x8"], "H100x1 or change the plan"),
    (["--train", "glm-4.7"], "comparison only"),
    (["--train", "--parallel.expert", "3"], "experts do not divide"),
    (["--train", "--parallel.expert", "2", "--hardware", "H100"], "does not divide the 1 devices"),
    (["--train", "--parallel.tensor", "3"], "heads do not divide"),
    (["--train", "--parallel.pipeline", "79"], "cannot fill"),
    (["--train", "--parallel.context", "999999"], "cannot be cut over context"),
    (["--train", "--parallel.data-shard", "0"], "data_shard is 0"),
    (["--train", "--parallel.sequence", "300000"], "positions"),
    (["--train", "--parallel.optimizer", "moun"], "Did you mean 'muon'"),
    (["--train", "--parallel.shard", "ful"], "Did you mean 'full'"),
]


@pytest.mark.parametrize(
    ("flags", "words"), BAD_FLAGS, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_bad_flags_are_refused_with_a_sentence(flags: list[str], words: str) -> None:
    with pytest.raises(GLM5Error, match=re.escape(words)) as caught:
        run(options(*flags))
    assert isinstance(caught.value, InputError | ConfigError)


BAD_FILES: list[tuple[str, str]] = [
    ("{", "not readable JSON"),
    ("[1]", "holds a list"),
    (json.dumps({**NEAT, "memry_gb": 1}), "Did you mean 'memory_gb'"),
    (json.dumps({"name": "Card", "kind": "datacenter"}), "lacks memory_gb, bandwidth_gb_s, bf16_tflops"),
    (json.dumps({**NEAT, "kind": "data-center"}), "Did you mean 'datacenter'"),
    (json.dumps({**NEAT, "memory_gb": "96"}), "give a number"),
    (json.dumps({**NEAT, "memory_gb": -1}), "give a number of at least 0"),
    (json.dumps({**NEAT, "memory_gb": 0}), "must be above 0"),
    (json.dumps({**NEAT, "bandwidth_efficiency": 70}), "at most 1"),
    (json.dumps({**NEAT, "node_devices": 1.5}), "whole number"),
    (json.dumps({**NEAT, "count": "8"}), "whole number of devices"),
    (json.dumps({**NEAT, "count": 2, "node_devices": 8}), "needs the link_gb_s"),
    (json.dumps({**NEAT, "count": 2}), "no network_gb_s"),
]


@pytest.mark.parametrize(("text", "words"), BAD_FILES, ids=[words for _, words in BAD_FILES])
def test_bad_hardware_files_are_refused_with_a_sentence(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "machine.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=re.escape(words)):
        hardware_from(str(path))
