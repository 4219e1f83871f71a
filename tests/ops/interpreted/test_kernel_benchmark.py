"""The benchmark of the kernels end to end: what it calls is right; of its times nothing is said."""

from __future__ import annotations

from benchmarks.gpu_kernels import Options, measure, table
from glm5.ops.gpu import paged


def test_every_operation_is_compared_and_shown():
    options = Options(
        shape="nano", dtype="float32", storages=("fp8",), contexts=(90,), sequences=2, chunk=20, repeats=1
    )
    rows = list(measure(options, paged, "cpu", bytes_per_second=1e9))
    assert [row.name for row in rows] == ["select", "attend", "prompt"]
    assert [row.differs < 1e-3 for row in rows] == [True] * 3
    for row in rows:
        assert row.share_of_bandwidth > 0 and row.times_faster[0] <= row.times_faster[1] <= row.times_faster[2]
    # Keys: 32 bytes and one scale. Latents: 80 bytes and two scales, of the 64 chosen for each of two tokens.
    seconds = [row.kernels_ms[1] / 1e3 for row in rows]
    read = [round(row.gigabytes_per_second * 1e9 * t) for row, t in zip(rows, seconds, strict=True)]
    assert read == [2 * 90 * 33, 2 * 64 * 82, 90 * 33]
    assert table(rows, "title").row_count == 3
