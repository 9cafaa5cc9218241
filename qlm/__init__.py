"""qlm: quantize, fine-tune, evaluate and run OPT, GPT-NeoX and GPTBigCode models.

Importing it does nothing; each name below is imported when it is first used.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlm.adapters import apply_adapter
    from qlm.bench import Bench, bench
    from qlm.engine.engine import Engine
    from qlm.evaluate import Evaluation, evaluate
    from qlm.finetune import finetune
    from qlm.generate import generate
    from qlm.load import load, load_tokenizer
    from qlm.merge import merge
    from qlm.quantize import quantize, quantize_model
    from qlm.recipe import load_finetune_recipe, load_recipe

__all__ = [
    "Bench",
    "Engine",
    "Evaluation",
    "apply_adapter",
    "bench",
    "evaluate",
    "finetune",
    "generate",
    "load",
    "load_finetune_recipe",
    "load_recipe",
    "load_tokenizer",
    "merge",
    "quantize",
    "quantize_model",
]

_HOMES = {
    "Bench": "bench", "Engine": "engine.engine", "Evaluation": "evaluate", "apply_adapter": "adapters", "bench": "bench",
    "evaluate": "evaluate", "finetune": "finetune", "generate": "generate", "load": "load", "load_finetune_recipe": "recipe",
    "load_recipe": "recipe", "load_tokenizer": "load", "merge": "merge", "quantize": "quantize", "quantize_model": "quantize",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qlm' has no attribute {name!r}")
    return getattr(importlib.import_module(f"qlm.{_HOMES[name]}"), name)


class _Package(ModuleType):
    """Verbs are called like the files that they live in: `qlm.load` is the function, whoever has imported the file before."""

    def __setattr__(self, name: str, value: Any) -> None:
        # The import system binds a submodule to its package's attribute once it is imported, over whatever is there.
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
