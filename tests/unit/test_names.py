"""Names that changed since a save, and names that need not have been saved."""

from __future__ import annotations

import itertools
import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.disks import MemoryStorage

from milepost.checkpoint_reader import CheckpointReader
from milepost.checkpoint_writer import CheckpointWriter
from milepost.config import CheckpointWriterConfig
from milepost.errors import ConfigError, MismatchError
from milepost.format.paths import matcher
from milepost.loading.renames import Names
from milepost.types import RankInfo

_paths = itertools.count()


@pytest.fixture(params=["own", "replicated"])
def saved(request):
    """Saves a state, as one rank's own or as two ranks' replicas; returns how to load it."""
    storage = MemoryStorage()
    storage.make_folder("/run")
    size = 1 if request.param == "own" else 2

    def save(state):
        path = f"/run/names{next(_paths)}"
        for rank in range(size):
            writer = CheckpointWriter(
                CheckpointWriterConfig(start_id="start", replicated=["*"]),
                RankInfo(rank, size),
                storage=storage,
            )
            writer.write(path, state)
            writer.close()

        def load(template, **arguments):
            return CheckpointReader(RankInfo(0, size), storage=storage).read(path, template, **arguments)

        return load

    return save


def ones(*shape):
    return torch.ones(shape or (2,))


def zeros(*shape):
    return torch.zeros(shape or (2,))


# -- what cannot be meant --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rename",
    [["a"], "a", {"a": 1}, {1: "a"}, {"a.*": "b"}, {"a": "b.*"}, {"*.a.*": "*.b.*"}, {"a": None}, 3],
)
def test_a_malformed_rename_is_a_config_error(rename):
    """A rename is a dict of texts with a star in both or in none; the error shows an example."""
    with pytest.raises(ConfigError, match="rename must be a dict") as caught:
        Names(rename)
    assert "old.*" in caught.value.hint


def test_two_old_names_for_one_new_name_are_refused():
    """Two saved paths cannot go to one path of the template."""
    with pytest.raises(ConfigError, match="two saved paths one new name"):
        Names({"a": "c", "b": "c"})


@pytest.mark.parametrize("allowed", ["a.*", [1], ["a", None]])
def test_a_malformed_allow_missing_is_a_config_error(allowed):
    """allow_missing is a list of patterns, and a single text is none."""
    with pytest.raises(ConfigError, match="allow_missing must be a list"):
        Names(None, allowed)


def test_a_rename_needs_a_template(saved):
    """Without a template there are no new names."""
    load = saved({"a": ones()})
    with pytest.raises(ConfigError, match="needs a template"):
        load(None, rename={"a": "b"})


@given(st.text("ab.", max_size=4), st.text("ab.", max_size=4), st.text("ab.", min_size=1, max_size=4))
def test_a_star_stands_for_the_same_text_in_both(head, tail, middle):
    """Whatever text the star stands for in the new name, it stands for in the old one."""
    names = Names({f"old{head}*{tail}": f"new{head}*{tail}"})
    assert list(names.old_names(f"new{head}{middle}{tail}")) == [f"old{head}{middle}{tail}"]
    assert list(names.old_names(f"new{head}{tail}")) == []
    assert list(names.old_names(f"old{head}{middle}{tail}")) == []


# -- rename ----------------------------------------------------------------------------------------


def test_one_value_and_whole_branches_are_renamed(saved, caplog):
    """A path without a star renames one value, one with a star all below; the log names every one."""
    load = saved({"old": {"a": ones(), "b": {"c": 2 * ones()}}, "lr": 0.5, "same": 3 * ones()})
    template = {"new": {"a": zeros(), "b": {"c": zeros()}}, "rate": 0.0, "same": zeros()}
    with caplog.at_level(logging.WARNING):
        loaded, missing = load(template, rename={"old.*": "new.*", "lr": "rate"})
    assert missing == []
    assert loaded is template
    assert torch.equal(template["new"]["a"], ones())
    assert torch.equal(template["new"]["b"]["c"], 2 * ones())
    assert template["rate"] == 0.5
    assert torch.equal(template["same"], 3 * ones())
    text = caplog.text
    assert "lr -> rate" in text
    assert "old.a -> new.a" in text
    assert "unexpected" not in text


def test_names_can_be_exchanged(saved):
    """Two values that have exchanged their names since get each what the other's name held."""
    load = saved({"a": ones(), "b": 2 * ones()})
    template = {"a": zeros(), "b": zeros()}
    load(template, rename={"a": "b", "b": "a"}, strict=True)
    assert torch.equal(template["a"], 2 * ones())
    assert torch.equal(template["b"], ones())


def test_a_saved_name_wins_over_a_rename_only_if_that_was_not_saved(saved):
    """A renamed path takes what the old name held if that was saved, else what its own name held."""
    load = saved({"old": ones(), "new": 2 * ones(), "other": 3 * ones()})
    template = {"new": zeros(), "other": zeros()}
    load(template, rename={"old": "new", "gone": "other"})
    assert torch.equal(template["new"], ones())
    assert torch.equal(template["other"], 3 * ones())


def test_a_value_may_move_to_another_branch(saved):
    """A value may have another depth in the template, below dicts that were not saved at all."""
    load = saved({"head": ones(), "deep": {"er": {"w": 2 * ones()}}})
    template = {"model": {"head": {"weight": zeros()}}, "w": zeros()}
    _, missing = load(template, rename={"head": "model.head.weight", "deep.er.w": "w"}, strict=True)
    assert missing == []
    assert torch.equal(template["model"]["head"]["weight"], ones())
    assert torch.equal(template["w"], 2 * ones())


def test_a_renamed_value_must_still_fit(saved):
    """What has another shape under its new name is a misfit that names the new path; nothing is changed."""
    load = saved({"old": ones(3), "x": ones()})
    template = {"new": zeros(2), "x": zeros()}
    with pytest.raises(MismatchError, match=r"new: expected .*2,.* found .*3,"):
        load(template, rename={"old": "new"})
    assert not template["x"].any()


def test_a_rename_of_what_was_not_saved_leaves_it_missing(saved):
    """A new name whose old name was not saved either is missing, as the template names it."""
    load = saved({"a": ones()})
    template = {"a": zeros(), "b": zeros()}
    assert load(template, rename={"c": "b"})[1] == ["b"]
    with pytest.raises(MismatchError, match=r"missing keys \(1\): b"):
        load({"a": zeros(), "b": zeros()}, rename={"c": "b"}, strict=True)


def test_what_is_left_of_a_renamed_branch_is_unexpected(saved, caplog):
    """Of a saved branch from which some was renamed the rest is named in the log, and nothing else."""
    load = saved({"old": {"a": ones(), "b": ones()}})
    with caplog.at_level(logging.WARNING):
        load({"new": {"a": zeros()}}, rename={"old.a": "new.a"})
    assert "unexpected keys in the checkpoint (1): old.b" in caplog.text


def test_items_of_lists_are_renamed(saved, caplog):
    """A rename reaches items of lists as it does entries of dicts, from one list to another, or to a dict."""
    load = saved({"l": [ones(), 2 * ones(), 3], "old": [{"w": 4 * ones()}, {"w": 5 * ones()}]})
    template = {
        "l": [zeros(), zeros(), 0],
        "new": ({"w": zeros()}, {"v": zeros()}),
        "number": 0,
    }
    names = {"l[0]": "l[1]", "l[1]": "l[0]", "l[2]": "number", "old[0]*": "new[0]*", "old[1].w": "new[1].v"}
    with caplog.at_level(logging.WARNING):
        load(template, rename=names, strict=True)
    assert [int(value[0]) for value in template["l"][:2]] == [2, 1]
    assert template["number"] == template["l"][2] == 3
    assert [int(template["new"][0]["w"][0]), int(template["new"][1]["v"][0])] == [4, 5]
    assert "unexpected" not in caplog.text


def test_a_list_may_grow_by_renamed_items(saved):
    """What the template has behind the end of a saved list may have had another name, or else is missing."""
    load = saved({"l": [ones()], "extra": 2 * ones()})
    template = {"l": [zeros(), zeros(), zeros()]}
    assert load(template, rename={"extra": "l[2]"})[1] == ["l[1]"]
    assert [int(value[0]) for value in template["l"]] == [1, 0, 2]
    with pytest.raises(MismatchError, match="l: expected 3 items, found 1"):
        load({"l": [zeros(), zeros(), zeros()]}, rename={"extra": "m[2]"})


@pytest.mark.parametrize("rename", [{"old.*": "new.*"}, {"old": "new"}])
def test_a_renamed_dict_does_not_hide_one_that_had_the_new_name(saved, rename):
    """Where both names were saved, what the old one lacks comes from the new one, however deep."""
    load = saved(
        {"old": {"l": {"w": ones(), "m": {"x": 2}}}, "new": {"l": {"b": 3, "w": 4, "m": {"y": [5]}}}}
    )
    template = {"new": {"l": {"w": zeros(), "b": 0, "m": {"x": 0, "y": [0], "z": 7}}}}
    _, missing = load(template, rename=rename)
    assert missing == ["new.l.m.z"]
    assert template["new"]["l"]["w"][0] == 1
    assert [template["new"]["l"]["b"], template["new"]["l"]["m"]] == [3, {"x": 2, "y": [5], "z": 7}]


def test_a_rename_that_fits_nothing_is_told_of(saved, caplog):
    """One that gave nothing a new name is in the log, once, or in the error; others are not."""
    load = saved({"model": {"w": ones()}, "x": ones()})
    rename = {"model.encodr.*": "model.v*", "model.w": "model.u", "lr": "rate"}
    with caplog.at_level(logging.WARNING):
        load({"model": {"u": zeros()}, "x": zeros()}, rename=rename)
    text = "renames that match nothing (2): model.encodr.* -> model.v*; lr -> rate"
    assert caplog.text.count(text) == 1
    with pytest.raises(MismatchError, match="renames that match nothing") as caught:
        load({"model": {"v": zeros()}, "x": zeros()}, rename=rename, strict=True)
    assert "model.encodr.* -> model.v*; model.w -> model.u; lr -> rate" in str(caught.value)


# -- allow_missing ---------------------------------------------------------------------------------


def test_what_may_be_missing_is_let_pass_and_named(saved, caplog):
    """Allowed paths are neither missing nor an error of strict; they keep their values and are logged."""
    load = saved({"a": ones()})
    template = {"a": zeros(), "head": {"w": 5 * ones(), "b": 6 * ones()}, "step": 7}
    with caplog.at_level(logging.WARNING):
        _, missing = load(template, allow_missing=["head.*", "step"], strict=True)
    assert missing == []
    assert torch.equal(template["a"], ones())
    assert torch.equal(template["head"]["w"], 5 * ones())
    assert template["step"] == 7
    assert "keys that allow_missing permits: head; step" in caplog.text


def test_a_branch_of_which_a_leaf_is_not_allowed_is_missing(saved):
    """A dict that was not saved is let pass only if every leaf of it is allowed."""
    load = saved({"a": ones()})
    template = {"a": zeros(), "head": {"w": zeros(), "b": zeros()}}
    assert load(template, allow_missing=["head.w"])[1] == ["head"]
    with pytest.raises(MismatchError, match=r"missing keys \(1\): head"):
        load(template, allow_missing=["head.w"], strict=True)


def test_what_is_allowed_and_was_saved_is_loaded(saved):
    """A pattern allows absence, and does not keep anything from being loaded or from having to fit."""
    load = saved({"a": ones()})
    template = {"a": zeros()}
    assert load(template, allow_missing=["*"]) == (template, [])
    assert torch.equal(template["a"], ones())
    with pytest.raises(MismatchError, match="does not fit"):
        load({"a": zeros(3)}, allow_missing=["*"])


def test_patterns_tell_capital_letters_apart(saved):
    """A pattern fits a path exactly, also in case."""
    load = saved({"a": ones()})
    assert load({"a": zeros(), "Head": zeros()}, allow_missing=["head"])[1] == ["Head"]
    assert load({"a": zeros(), "Head": zeros()}, allow_missing=["Head"])[1] == []


def test_brackets_in_patterns_stand_for_themselves():
    """A pattern is written as paths are: ``layers[0].*`` is the first layer, not a class of characters."""
    fits = matcher(["layers[0].*"])
    assert fits("layers[0].weight")
    assert not fits("layers0.weight")
    assert not fits("layers[1].weight")
    assert not matcher([])("anything")
