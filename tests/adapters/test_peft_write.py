"""Which names extract gives PEFT for modules: as few as mean exactly those."""

from __future__ import annotations

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from lorasurgery.adapters.peft_write import exact_suffixes, exact_targets


@pytest.mark.parametrize(
    ("chosen", "others", "names"),
    [({"a.q", "b.q"}, {"b.k"}, ["q"]),
     ({"a.q"}, {"b.q"}, ["a.q"]),
     ({"a.to_out.0", "b.to_out.0"}, {"a.ff.2"}, ["to_out.0"]),
     ({"a.to_out.0"}, {"b.to_out.0"}, ["a.to_out.0"]),
     # b's own `net.0` has no tensors: an activation that PEFT would refuse
     ({"a.net.0", "a.net.2"}, {"b.net.2"}, ["a.net.0", "a.net.2"]),
     ({"layers.0", "layers.1"}, set(), ["layers.0", "layers.1"]),
     ({"a.net.0.0"}, {"a.net.1.0"}, ["net.0.0"])],
    ids=str,
)  # fmt: skip
def test_names_mean_exactly_the_chosen_modules(chosen: set[str], others: set[str], names: list[str]) -> None:
    """One ending for all where it catches nothing else, whole paths where it would, digits never alone."""
    assert exact_suffixes(chosen, chosen | others) == names
    config = LoraConfig(target_modules=names)
    assert all(check_target_module_exists(config, path) for path in chosen)
    assert not any(check_target_module_exists(config, path) for path in others)


def test_a_path_that_ends_another_is_an_expression() -> None:
    """PEFT's names can't mean `proj_out` without `blocks.0.proj_out`; an expression on the whole path can."""
    targets = exact_targets({"proj_out", "x.q"}, {"proj_out", "blocks.0.proj_out", "x.q"})
    config = LoraConfig(target_modules=targets)
    assert check_target_module_exists(config, "proj_out")
    assert check_target_module_exists(config, "x.q")
    assert not check_target_module_exists(config, "blocks.0.proj_out")
    assert not check_target_module_exists(config, "xxq")


def test_saved_modules_are_told_apart_by_any_ending() -> None:
    """modules_to_save matches any ending, so `norm` would also mean layer_norm."""
    paths = {"a.norm", "a.layer_norm"}
    assert exact_suffixes({"a.norm"}, paths, whole_parts=False) == ["a.norm"]
