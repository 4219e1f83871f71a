"""The bundled model is the one that its card describes, is small, and does what the card says."""

import re

import pytest
import torch
from safetensors.torch import load_file

import glm5
from glm5 import bundled
from glm5.bundled import bundled_model
from glm5.errors import CheckpointError
from glm5.files import sha256_of


@pytest.fixture(scope="module")
def engine():
    return glm5.Engine(bundled_model())


def ask(engine, question):
    prompt = engine.tokenizer.apply_chat_template([{"role": "user", "content": question}])
    (output,) = engine.generate([prompt], glm5.SamplingParams(temperature=0.0, max_tokens=64))
    assert output.finish_reason == "stop"
    return glm5.parse_assistant(output.text)


def test_the_files_are_those_of_the_card_and_small():
    directory = bundled_model()
    card = (directory / "README.md").read_text(encoding="utf-8")
    stated = {name: digest for digest, name in re.findall(r"^([0-9a-f]{64})  (\S+)$", card, re.MULTILINE)}
    files = {path.name: path for path in directory.iterdir() if path.name != "README.md"}
    assert stated == {name: sha256_of(path) for name, path in files.items()}
    assert sum(path.stat().st_size for path in directory.iterdir()) <= 10_000_000
    assert "python -m recipes.nano --threads 1" in card and re.search(r"[0-9a-f]{40}", card)


def test_it_is_the_pinned_preset_in_bfloat16(engine):
    assert engine.config.num_parameters(mtp=False) == 3_600_432
    stored = load_file(next(bundled_model().glob("*.safetensors")))
    assert stored["model.embed_tokens.weight"].dtype == torch.bfloat16


def test_it_answers_as_its_card_says(engine):
    assert ask(engine, "What is 64 + 28?")["content"] == "92"
    assert ask(engine, "I want to know the seat of Dronainico.")["content"] == "Trikwick"
    assert ask(engine, "Please give the currency of Zesestan.")["content"] == "kriligin"
    assert ask(engine, "Hello")["content"] == "I don't know."


def test_an_installation_without_it_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(bundled, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(CheckpointError, match="name a run or a model directory"):
        bundled_model()
