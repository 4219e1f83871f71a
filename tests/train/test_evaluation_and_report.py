"""Losses, bits per byte, the sanity lines and the report page, each against an independent computation."""

import itertools
import math
import zlib
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from glm5.data import IGNORED, Batch, open_dataset
from glm5.files import write_json, write_text
from glm5.model import GLM5, initialize_
from glm5.train import evaluate_bits_per_byte, sample_ids, write_report
from glm5.train.evaluate import bigram_bits_per_byte, zlib_bits_per_byte
from glm5.train.losses import mtp_targets, next_token_loss
from glm5.train.run_directory import RunDirectory


@pytest.fixture(scope="module")
def model(tiny):
    _, config = tiny
    model = GLM5(config)
    initialize_(model, 0.3, seed=1)
    return model.eval()


def test_bits_per_byte_equals_a_loop_over_documents(tiny, model):
    """Documents shorter than a row, one at a time, without packing."""
    heldout = open_dataset(tiny[0] / "heldout")
    nats, size = 0.0, 0
    for i in range(len(heldout)):
        ids = torch.from_numpy(heldout.ids(i))
        with torch.no_grad():
            logp = torch.log_softmax(model(ids[None, :-1], attention="dense").logits[0].double(), -1)
        nats -= logp[torch.arange(len(ids) - 1), ids[1:]].sum().item()
        size += int(heldout.byte_counts[i])
    longest = int(heldout.lengths.max())
    found = evaluate_bits_per_byte(model, heldout, length=longest * len(heldout), rows=1)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert found.tokens == int((heldout.lengths - 1).sum()) and found.bytes == size
    cut = evaluate_bits_per_byte(model, heldout, length=7, rows=3)
    assert cut.tokens == found.tokens and cut.bits_per_byte != found.bits_per_byte


def test_bigram_equals_a_dictionary(tiny):
    train, heldout = open_dataset(tiny[0] / "train"), open_dataset(tiny[0] / "heldout")
    vocabulary = train.manifest["vocab_size"]
    pairs = [tuple(p) for i in range(len(train)) for p in np.stack([train.ids(i)[:-1], train.ids(i)[1:]], 1).tolist()]
    both, first = Counter(pairs), Counter(a for a, _ in pairs)
    second, kinds = Counter(b for _, b in pairs), Counter(a for a, _ in both)
    bits = 0.0
    for i in range(len(heldout)):
        ids = heldout.ids(i).tolist()
        for a, b in itertools.pairwise(ids):
            unigram = (second[b] + 1) / (len(pairs) + vocabulary)
            p = (both[a, b] + kinds[a] * unigram) / (first[a] + kinds[a]) if first[a] else unigram
            bits -= math.log2(p)
    assert bigram_bits_per_byte(train, heldout) == pytest.approx(bits / heldout.byte_counts.sum(), rel=1e-9)


def test_zlib_line():
    texts = ["a sentence about rivers. " * 4, "another one. "]
    data = "\n".join(texts).encode()
    assert zlib_bits_per_byte(texts) == 8 * len(zlib.compress(data, 9)) / len(data)
    assert zlib_bits_per_byte(texts, dictionary="a sentence about rivers. another one. ") < zlib_bits_per_byte(texts)


def test_mtp_targets_stop_at_the_end_of_a_document():
    segments = torch.tensor([[0, 0, 0, 1, 1, -1]])
    targets = torch.tensor([[11, 12, 13, 21, 22, IGNORED]])
    batch = Batch(torch.zeros_like(targets), targets, segments)
    assert mtp_targets(batch, 0).tolist() == [[12, 13, IGNORED, 22, IGNORED, IGNORED]]
    assert mtp_targets(batch, 1).tolist() == [[13, IGNORED, IGNORED, IGNORED, IGNORED, IGNORED]]


def test_a_batch_without_targets_has_no_loss():
    logits = torch.randn(1, 3, 5, requires_grad=True)
    loss = next_token_loss(logits, torch.full((1, 3), IGNORED))
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()


def test_greedy_samples_equal_a_loop_without_a_cache(tiny, model):
    ids = [0, 40, 41, 42]
    expected = list(ids)
    with torch.no_grad():
        for _ in range(8):
            expected.append(int(model(torch.tensor([expected]), attention="dense").logits[0, -1].argmax()))
    assert sample_ids(model, ids, max_tokens=8) == expected[4:]
    assert sample_ids(model, ids, max_tokens=8, stop=[expected[6]]) == expected[4:6]
    warm = [sample_ids(model, ids, max_tokens=8, temperature=1.0, seed=s) for s in (1, 1, 2)]
    assert warm[0] == warm[1] != warm[2]


class Links(HTMLParser):
    """Collects every address and every tag of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]


def test_the_report_is_one_page_without_outside_resources(tmp_path):
    run = RunDirectory.start(tmp_path / "<run>", stage="pretrain", config={"a": 1}, inputs={})
    assert "No step has been taken" in write_report(run.path).read_text()
    for step in range(5):
        run.append("metrics", {"step": step, "tokens": 50, "loss": 9.0 - step, "lm": 8.0 - step})
        run.append("speed", {"step": step, "seconds": 1.0, "tokens_per_second": 100})
    write_text(run.path / "samples" / "step-1.txt", "<script>alert('no')</script>")
    page = write_report(run.path).read_text()
    links = Links()
    links.feed(page)
    assert not links.addresses and "script" not in links.tags
    assert links.tags.count("polyline") == 3 and "prefers-color-scheme" in page and "url(" not in page
    assert "9.000 &rarr; 5.000" in page and "&lt;run&gt;" in page and "250 tokens" in page


def test_the_report_shows_what_was_watched(tmp_path):
    run = RunDirectory.start(tmp_path / "run", stage="dsa2", config={}, inputs={})
    for step in range(6):
        line = {"step": step, "tokens": 8, "loss": 5.0 - step, "grad_norm": 10.0**step, "indexer_grad_norm": 0.5}
        line |= {"busiest_expert": 2.0, "heldout_bits_per_byte": 2.0 - step / 10, "indexer_recall": 0.5 + step / 20}
        if step == 3:
            line |= {"loss": None, "grad_norm": None, "skipped": "loss is <nan>"}
        if step % 2 == 0:
            line["expert_load"] = {"1": [step, 8, 0, 0], "2": [2, 2, 2, 2]}
        run.append("metrics", line)
        run.append("speed", {"step": step, "seconds": 1.0, "tokens_per_second": 8})
    recall = {"length": 128, "index_topk": 16, "layers": {"0": {"mass": 0.987, "positions": 0.75}}}
    heldout = {"bits_per_byte": 1.5, "bytes": 1000}
    evaluation = {"heldout": heldout, "row_length": 32, "sanity_lines": {"zlib": 2.5}, "indexer_recall": recall}
    write_json(run.path / "evaluation.json", evaluation)
    page = write_report(run.path).read_text()
    headings = ["Loss", "Bits per byte of held-out text", "Indexer recall", "Load of the experts", "Gradient norm"]
    headings += ["Speed", "Steps that were left out", "Configuration"]
    assert [part.split("</h2>")[0] for part in page.split("<h2>")[1:]] == headings
    assert "loss is &lt;nan&gt;" in page and "0.987" in page and "zlib" in page
    assert page.count("class=heat") == 2 * 3 * 4  # layers, noted steps, experts
    assert "row 1, step 4: 2.67" in page and "row 3, step 2: 1.00" in page
    links = Links()
    links.feed(page)
    assert links.tags.count("polyline") == 1 + 1 + 1 + 1 + 2 + 1


def test_a_page_of_a_large_model_stays_small(tmp_path):
    run = RunDirectory.start(tmp_path / "run", stage="pretrain", config={}, inputs={})
    for step in range(60):
        load = {str(layer): [1] * 256 for layer in range(75)}
        run.append("metrics", {"step": step, "tokens": 1, "loss": 1.0, "busiest_expert": 1.0, "expert_load": load})
        run.append("speed", {"step": step, "seconds": 1.0, "tokens_per_second": 8})
    page = write_report(run.path).read_text()
    assert page.count("class=heat") <= 8 * 64 * 60 and len(page) < 5_000_000
