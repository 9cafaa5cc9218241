"""The three families. `FAMILIES` is the registry: a config's `model_type` to what the family looks like."""

from qlm.arch.gpt_bigcode import GPT_BIGCODE
from qlm.arch.gpt_neox import GPT_NEOX
from qlm.arch.opt import OPT
from qlm.arch.spec import HEADS, FamilySpec, LinearGroup, Task

FAMILIES: dict[str, FamilySpec] = {"opt": OPT, "gpt_neox": GPT_NEOX, "gpt_bigcode": GPT_BIGCODE}

__all__ = ["FAMILIES", "HEADS", "FamilySpec", "LinearGroup", "Task"]
