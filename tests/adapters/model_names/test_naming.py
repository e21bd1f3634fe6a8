"""What may stand before a model's own names: known wrappers, and a model's own type, but not any short word."""

from __future__ import annotations

import pytest

from lorasurgery.adapters.model_names.naming import BaseNames
from lorasurgery.checkpoint.header import TensorInfo

NAME = "layer.0.dense.weight"


def names(model_type: str) -> BaseNames:
    """A base whose tensors have no prefix."""
    return BaseNames({NAME: TensorInfo(NAME, "F32", (2, 2), 0, 16)}, {"model_type": model_type}, "base")


@pytest.mark.parametrize(
    ("wrapper", "model_type", "found"),
    [("vit", "", True), ("esm", "", True), ("xyz", "", False),  # three letters that the table has, and others
     ("mpt", "mpt", True), ("mpt", "", False), ("opt", "opt", True), ("gpt", "openai-gpt", True),
     ("t5", "t5", False), ("t5", "mt5", False), ("pt", "mpt", False), ("t", "mpt", False),  # two letters say too little
     ("xlm_roberta", "xlm-roberta", True), ("model", "", True), ("modle", "", False)],
)  # fmt: skip
def test_wrappers(wrapper: str, model_type: str, found: bool) -> None:
    """A path with a wrapper before it finds the tensor; a misspelt or short word before it doesn't."""
    assert names(model_type).find(f"{wrapper}.layer.0.dense") == (NAME if found else None)


def test_wrappers_in_one_another() -> None:
    """Up to seven may lie in one another, and each of them must be one."""
    base = names("mpt")
    assert base.find("base_model.model.mpt.layer.0.dense") == NAME
    assert base.find("base_model.xyz.mpt.layer.0.dense") is None
    assert base.find("model." * 7 + "layer.0.dense") == NAME
    assert base.find("model." * 8 + "layer.0.dense") is None
