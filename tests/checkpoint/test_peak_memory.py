"""Loading needs the model and one shard; conversion needs one shard. Measured on a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import glm5

# 43M weights: 172 MB in fp32, so that one copy too many cannot hide in the slack.
CONFIG = glm5.ModelConfig(
    vocab_size=8192, hidden_size=512, num_hidden_layers=3, num_attention_heads=4, q_lora_rank=64, kv_lora_rank=64,
    qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=32, intermediate_size=512, moe_intermediate_size=512,
    n_routed_experts=20, num_experts_per_tok=2, first_k_dense_replace=1, index_n_heads=16, index_head_dim=32,
    index_topk=64, dtype="float32",
)  # fmt: skip
SHARD_BYTES = 20_000_000
SLACK_BYTES = 12_000_000

MEASURE = """
import json, re, sys
from pathlib import Path
import glm5, torch
from glm5.checkpoint import convert_checkpoint

def peak():
    # Not ru_maxrss: a child starts with its parent's.
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

source, shard_bytes, small = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
glm5.load_model(small)  # what Python imports on first use is not what is measured
convert_checkpoint(small, source.with_name("small"), "bf16")
start = peak()
convert_checkpoint(source, source.with_name("converted"), "bf16", max_shard_bytes=shard_bytes)
converted = peak()
model = glm5.load_model(source, torch.float32)
print(json.dumps({"convert": converted - start, "load": peak() - start}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from Linux's /proc")
def test_peaks(saved: Path, tmp_path: Path) -> None:
    model = glm5.GLM5(CONFIG)
    num_bytes = sum(t.nbytes for t in model.state_dict().values())
    assert num_bytes > 170_000_000
    glm5.save_model(model, tmp_path / "m", max_shard_bytes=SHARD_BYTES)
    del model
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "m"), str(SHARD_BYTES), str(saved)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    peak = json.loads(result.stdout)
    print({name: f"{value / 1e6:.0f} MB" for name, value in peak.items()}, f"model {num_bytes / 1e6:.0f} MB")
    assert peak["load"] <= num_bytes + SHARD_BYTES + SLACK_BYTES
    # A new shard draws on at most three old ones, one open at a time, and one tensor is converted.
    assert peak["convert"] <= 2 * SHARD_BYTES + SLACK_BYTES
