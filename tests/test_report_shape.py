"""report_shape.py: a report.json of ours has its shape; whatever else has it can be drawn, and what has not is named by its place."""

import copy
import json

import pytest
from report_world import write_run
from tiny import tiny_store

import report
from report_read import read_run
from report_shape import PARTS, sound_parts
from shapes import fault

ODD = (None, True, "x", "", -1, 0, 1.5, float("nan"), 1e99, -1e99, 10**30, 10**17, [], [[]], [1], [1, "x"], {}, {"x": 1}, {"x": []})
DRAW = {"data": report.data_section, "quality": report.quality_section, "samples": report.users_section}


@pytest.fixture(scope="module", params=[True, False], ids=["times", "no times"])
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shape") / "one"
    write_run(folder, store=tiny_store(num_users=120, num_items=20, seed=5, has_time=request.param))
    return read_run(folder)


def places(tree, before=()):
    """The place of every value in a tree; of lists those of the first and the last."""
    yield before
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from places(value, (*before, key))
    elif isinstance(tree, list):
        for n in sorted({0, len(tree) - 1}) if tree else ():
            yield from places(tree[n], (*before, n))


def changed(tree, place, value):
    """A copy of a tree with another value at a place."""
    tree = copy.deepcopy(tree)
    inner = tree
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return tree


def test_what_we_write_has_the_shape(run):
    assert run.faults == {} and set(PARTS) <= set(run.report)


@pytest.mark.parametrize("part", PARTS)
def test_each_value_of_another_kind_is_a_fault_or_can_be_drawn(run, part):
    """Nothing is caught while a section is drawn, so that a value that passes and cannot be drawn fails here."""
    tree = copy.deepcopy(run.report[part])
    if part == "samples":  # two users and their items stand for all
        tree["users"] = tree["users"][:: max(1, len(tree["users"]) - 1)]
        tree["items"] = dict(list(tree["items"].items())[:2])
    faults = 0
    for place in places(tree):
        for value in ODD:
            other = changed({part: tree}, (part, *place), value)
            kept, wrong = sound_parts(run.report | other)
            faults += bool(wrong)
            if not wrong:
                DRAW[part](run._replace(report=json.loads(json.dumps(kept))))
    assert faults > 300


@pytest.mark.parametrize("part", PARTS)
def test_a_value_that_is_missing_is_named_or_is_not_needed(run, part):
    tree = {part: run.report[part]}
    for place in list(places(run.report[part]))[1:]:
        *before, last = (part, *place)
        inner = copied = copy.deepcopy(tree)
        for key in before:
            inner = inner[key]
        if isinstance(inner, dict):
            del inner[last]
            words = fault(copied[part], PARTS[part], part)
            assert not words or words.endswith(f"has no {last}"), (place, words)
            if not words:
                DRAW[part](run._replace(report=run.report | copied))


@pytest.mark.parametrize(("place", "value", "words"), [
    (("data", "lengths", "p10"), "x", "data.lengths.p10: expected a number, found 'x'"),
    (("data", "lengths", "counts"), [1], "data.lengths.counts: expected a list of 10, found a list of 1"),
    (("data", "actions"), [], "data.actions: expected an object, found a list of 0"),
    (("quality", "slices", 0, "num_users"), -1, "quality.slices[0].num_users: expected a whole number of 0 or more, found -1"),
    (("samples", "users", 1, "next", "time"), True, "samples.users[1].next.time: expected a number, found true"),
])  # fmt: skip
def test_faults_name_place_and_both_sides(run, place, value, words):
    kept, faults = sound_parts(changed(run.report, place, value))
    assert faults == {place[0]: words} and place[0] not in kept and len(kept) == len(run.report) - 1


def test_an_object_of_something_else_is_left_alone():
    assert sound_parts({}) == ({}, {}) and sound_parts({"fingerprint": 3}) == ({"fingerprint": 3}, {})
