"""The scaling study: the fit recovers a law, predicts within its interval, and the picture is well-formed."""

from __future__ import annotations

import dataclasses
import math
import xml.etree.ElementTree as ElementTree

import pytest

from glm5.config import ModelConfig
from recipes.scaling import ROWS, SIZES, Point, fit, member, svg, table


def points(noise: tuple[float, ...] = (0.0,) * 5) -> list[Point]:
    """Five sizes that lie on 40 C^-0.1, times exp(noise)."""
    made = []
    for (width, layers), error in zip(SIZES, noise, strict=True):
        active = member(width, layers).num_parameters(active=True)
        point = Point(width, layers, active, active, 0.0, 1.0)
        made.append(dataclasses.replace(point, bits_per_byte=40 * point.compute**-0.1 * math.exp(error)))
    return made


def test_an_exact_law_is_recovered_and_predicts_exactly():
    law = fit(points()[:-1])
    assert law.slope == pytest.approx(-0.1)
    assert math.exp(law.intercept) == pytest.approx(40)
    last = points()[-1]
    assert law.predict(last.compute) == pytest.approx((last.bits_per_byte,) * 3)


def test_the_interval_holds_noise_of_the_size_that_it_saw():
    study = points((0.01, -0.01, -0.01, 0.01, 0.02))
    low, middle, high = fit(study[:-1]).predict(study[-1].compute)
    assert low < study[-1].bits_per_byte < high
    assert high / middle == pytest.approx(middle / low)
    # By hand: four residuals of 0.01 or so around the line, two degrees of freedom, Student's t 4.303.
    assert 0.04 < math.log(high / middle) < 0.12


def test_the_family_ends_in_nano():
    nano = dataclasses.replace(ModelConfig.from_preset("nano"), num_nextn_predict_layers=0)
    assert member(*SIZES[-1]) == nano
    active = [member(*size).num_parameters(active=True) for size in SIZES]
    assert active == sorted(active) and active[-1] > 8 * active[0] and ROWS > 0


def test_table_and_picture():
    study = points((0.01, -0.01, 0.0, 0.01, 0.02))
    law = fit(study[:-1])
    lines = table(study, law).splitlines()
    assert len(lines) == 2 + len(study) and "predicted" in lines[-1] and "predicted" not in lines[-2]
    picture = ElementTree.fromstring(svg(study, law))
    circles = [element for element in picture.iter() if element.tag.endswith("circle")]
    assert len(circles) == len(study)
    inside = [0 < float(c.get("cx", "-1")) < 640 and 0 < float(c.get("cy", "-1")) < 400 for c in circles]
    assert all(inside)
