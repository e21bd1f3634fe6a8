"""Which names extract gives PEFT for modules: as few as mean exactly those."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import get_pattern_key

from lorasurgery.adapters.peft.patterns import PatternTable
from lorasurgery.adapters.peft.write import exact_suffixes, exact_targets, rank_fields
from lorasurgery.clients.peft import saved_names


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
    ids=lambda value: "-".join(sorted(value)) or "none",
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


def saved_by_peft(names: list[str], paths: set[str]) -> set[str]:
    """The modules of these paths that PEFT itself wraps for modules_to_save."""
    model = torch.nn.Module()
    for path in sorted(paths):
        parent = model
        for part in path.split(".")[:-1]:
            if not hasattr(parent, part):
                parent.add_module(part, torch.nn.Module())
            parent = getattr(parent, part)
        parent.add_module(path.rpartition(".")[2], torch.nn.LayerNorm(2))
    found = get_peft_model(model, LoraConfig(target_modules="dummy-target-modules", modules_to_save=names))
    wrapped = [n for n, m in found.base_model.model.named_modules() if isinstance(m, ModulesToSaveWrapper)]
    return set(wrapped)


@pytest.mark.parametrize(
    ("chosen", "others"),
    [({"a.norm", "b.norm"}, {"b.k"}), ({"a.norm"}, {"a.layer_norm"}), ({"a.norm"}, {"b.norm"}), ({"norm"}, {"a.k"})],
    ids=lambda value: "-".join(sorted(value)),
)
def test_saved_modules_are_told_apart_by_any_ending(chosen: set[str], others: set[str]) -> None:
    """modules_to_save matches any ending, at a dot or not; the names mean just the chosen modules to PEFT."""
    names, unnamed = saved_names(chosen, chosen | others, [])
    assert not unnamed
    assert saved_by_peft(names, chosen | others) == chosen


def test_a_saved_module_that_no_name_means_alone_is_told() -> None:
    """A path that ends another, and one that would shut a target out, must be stored otherwise."""
    assert saved_names({"norm"}, {"norm", "a.norm"}, []) == ([], {"norm"})
    assert saved_names({"a.norm"}, {"a.norm", "a.norm.linear"}, ["a.norm.linear"]) == ([], {"a.norm"})


PATHS = st.lists(st.sampled_from(["a", "b", "out", "0"]), min_size=1, max_size=4).map(".".join)


def as_peft_has_it(pattern: Mapping[str, float], default: float, path: str) -> float:
    return pattern.get(get_pattern_key(pattern.keys(), path), default)


@given(st.dictionaries(PATHS, st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=8))
def test_every_module_has_its_rank_and_alpha(modules: dict[str, tuple[int, int]]) -> None:
    """PEFT and our own reader take each module's own numbers from the config, though paths end others."""
    ranks, alphas = ({p: pair[i] for p, pair in modules.items()} for i in range(2))
    fields = rank_fields(ranks, {p: float(a) for p, a in alphas.items()})
    for name, default, wanted in (("rank_pattern", "r", ranks), ("alpha_pattern", "lora_alpha", alphas)):
        pattern, rest = fields[name], fields[default]
        ours = PatternTable(pattern, name)
        for path, number in wanted.items():
            assert as_peft_has_it(pattern, rest, path) == number
            assert ours.first(path, rest) == number


def test_peft_builds_the_layers_that_were_meant() -> None:
    """A module at the root whose path ends another's: each gets its own rank in a model."""
    inner = torch.nn.ModuleDict({"out": torch.nn.Linear(8, 8)})
    model = torch.nn.ModuleDict({"out": torch.nn.Linear(8, 8), "block": inner, "other": torch.nn.Linear(8, 8)})
    ranks = {"out": 1, "block.out": 3, "other": 3}
    fields = rank_fields(ranks, {path: float(r) for path, r in ranks.items()})
    made = get_peft_model(model, LoraConfig(target_modules=["out", "other"], **fields))
    found = {
        p.removeprefix("base_model.model."): m.r["default"] for p, m in made.named_modules() if hasattr(m, "lora_A")
    }
    assert found == ranks
