"""The axes of charts have round numbers, few enough to read and many enough to tell."""

import re

from hypothesis import given
from hypothesis import strategies as st

from glm5.train.charts import line_chart, ticks


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_few_round_and_within(low, span):
    found = ticks(low, low + span)
    assert 2 <= len(found) <= 8
    places = [place for place, _ in found]
    assert all(low - span * 1e-6 <= place <= low + span * (1 + 1e-6) for place in places)
    gap = places[1] - places[0]
    assert f"{gap:.0e}"[0] in "125" and abs(float(f"{gap:.0e}") / gap - 1) < 1e-3


def test_steps_are_whole_numbers():
    assert [text for _, text in ticks(0, 3, whole=True)] == ["0", "1", "2", "3"]
    assert [text for _, text in ticks(0, 599, whole=True)] == ["0", "100", "200", "300", "400", "500"]
    assert ticks(0, 50_000, whole=True)[1][1] == "10,000"


def test_a_logarithmic_axis_names_its_values():
    chart = line_chart([("norm", [(0, 0.06), (1, 0.9)])], label="x", caption="y", log=True)
    assert [t for t in re.findall(r">([\d.]+)</text>", chart) if "." in t] == ["0.1", "0.2", "0.5"]
    assert "</svg>" in line_chart([("norm", [(0, 0.31), (1, 0.32)])], label="x", caption="y", log=True)
