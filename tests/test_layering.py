"""Imports point down, each heavy dependency has one door, and what must never be used is not there."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "qlm"

# From the top. A module may import those of lower rows.
ROWS = (
    {"cli"},
    {"run"},
    {"evaluate", "generate", "bench", "finetune", "merge", "plan", "training.plan", "report", "doctor", "shipped", "gpu_bench"},
    {"training.loop", "training.job", "training.language_loss", "training.loss", "training.report"},
    {
        "quantize", "sensitivity", "blocks", "smoothing", "tune", "stream", "training.data", "calibrate", "adapters", "load",
        "engine", "static_decoder",
    },
    {"tokenizer"},
    {"training.state", "training.watchdog", "training.signals"},
    {"backends", "checkpoint"},
    {"kernels", "numerics"},
    {"formats"},
    {"arch", "recipe", "strict_yaml", "figure", "training.line_chart", "training", "memory", "errors"},
)  # fmt: skip
# Imports inside a row. `kernels` and `numerics` are not among them: each checks the other in tests.
INSIDE_A_ROW = {
    ("generate", "evaluate"),
    ("report", "evaluate"),
    ("gpu_bench", "bench"),
    ("merge", "evaluate"),
    ("training.plan", "plan"),
    ("finetune", "training.plan"),
    ("blocks", "smoothing"),
    ("blocks", "stream"),
    ("blocks", "load"),
    ("blocks", "tune"),
    ("tune", "calibrate"),
    ("tune", "stream"),
    ("quantize", "blocks"),
    ("quantize", "calibrate"),
    ("quantize", "sensitivity"),
    ("quantize", "stream"),
    ("sensitivity", "blocks"),
    ("sensitivity", "calibrate"),
    ("sensitivity", "load"),
    ("sensitivity", "stream"),
    ("stream", "calibrate"),
    ("training.data", "calibrate"),
    ("training.loop", "training.job"),
    ("training.loop", "training.language_loss"),
    ("training.loop", "training.loss"),
    ("training.loss", "training.language_loss"),
    ("quantize", "load"),
    ("adapters", "load"),
    ("training.line_chart", "figure"),
    ("recipe", "arch"),
    ("recipe", "errors"),
    ("recipe", "strict_yaml"),
    ("strict_yaml", "errors"),
}
# The only modules that import a heavy dependency.
DOORS = {
    "bitsandbytes": {"qlm.backends.nf4_linear"},
    "optimum": {"qlm.backends.quanto"},
    "compressed_tensors": set(),
    "triton": {f"qlm.kernels.cuda.{name}" for name in ("gptq", "int8", "columns", "cut", "rounding", "tune")},
    "rich": {"qlm.cli", "qlm.report"},
    "typer": {"qlm.cli", "qlm.report"},
    "datasets": {"qlm.calibrate"},
    "huggingface_hub": {"qlm.checkpoint.hub"},
    "accelerate": {"qlm.load"},
    "tokenizers": {"qlm.tokenizer"},
    # Beside load.py: the Trainer, what changes logits before a token is drawn, caches, and the check of its forward pass.
    "transformers": {"qlm.load", "qlm.training.loop", "qlm.generate", "qlm.static_decoder", "qlm.engine.reference"},
    "pydantic": {"qlm.recipe.quantize", "qlm.recipe.finetune", "qlm.recipe.words"},
    "ruamel": {"qlm.strict_yaml"},
    "peft": {"qlm.adapters"},
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): ast.parse(path.read_text("utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


def imports(module: str) -> set[str]:
    """Everything that a module imports, anywhere in it, by its full name: "qlm.load.load" for `from qlm.load import load`."""
    found = set()
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import in line {node.lineno}"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def layer(name: str) -> str:
    """The part of "qlm.backends.base.Scheme" that the table names: "backends"; of qlm.training, whose files lie in several rows, the file."""
    first, *more = name.split(".")[1:]
    return f"{first}.{more[0]}" if first == "training" and more else first


def edges() -> dict[tuple[str, str], str]:
    """(importer, imported) by layer, with one place where it happens."""
    return {
        (layer(module), layer(name)): f"{module} imports {name}"
        for module in MODULES
        if module != "qlm"
        for name in imports(module)
        if name.startswith("qlm.") and layer(module) != layer(name)
    }


def test_every_module_is_in_the_table() -> None:
    named = {layer(module) for module in MODULES if module != "qlm"}
    assert named <= set().union(*ROWS)
    assert set().union(*ROWS) <= named


def test_imports_point_down() -> None:
    row = {name: number for number, names in enumerate(ROWS) for name in names}
    wrong = [
        place
        for (above, below), place in edges().items()
        if row[above] >= row[below] and (above, below) not in INSIDE_A_ROW
    ]
    assert wrong == []


def test_no_edge_is_listed_in_vain() -> None:
    assert edges().keys() >= INSIDE_A_ROW
    assert all(any({above, below} <= names for names in ROWS) for above, below in INSIDE_A_ROW)


def test_one_door_for_each_heavy_dependency() -> None:
    for package, doors in DOORS.items():
        users = {module for module in MODULES if any(name.split(".")[0] == package for name in imports(module))}
        assert users <= doors, package
    missing = {door for doors in DOORS.values() for door in doors} - MODULES.keys()
    assert missing == set()


def test_every_dependency_is_declared() -> None:
    """Everything that is imported is the standard library's or in pyproject.toml."""
    declared = set(re.findall(r'^    "([\w.-]+)[><=\[]', (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    package_of = {"ruamel": "ruamel.yaml", "pydantic_core": "pydantic", "optimum": "optimum-quanto"}
    optional = re.findall(r'^quanto = \["([\w-]+)', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    for module in MODULES:
        for name in {name.split(".")[0] for name in imports(module)} - {"qlm"} - sys.stdlib_module_names:
            assert package_of.get(name, name) in declared | set(optional), f"{module} imports {name}"


@pytest.mark.parametrize(
    "module",
    [
        "qlm", "qlm.cli", "qlm.errors", "qlm.recipe", "qlm.strict_yaml", "qlm.arch", "qlm.formats",
        "qlm.checkpoint.causal_lm", "qlm.checkpoint.files", "qlm.checkpoint.manifest", "qlm.tokenizer",
        "qlm.engine.engine", "qlm.engine.runtime", "qlm.bench", "qlm.report", "qlm.training",
    ],
)  # fmt: skip
def test_light_modules_import_no_torch(module: str) -> None:
    """Nothing heavy in what these import at their top, nor in what that imports."""
    code = (
        f"import sys; import {module}; heavy = {{'torch', 'transformers', 'datasets', 'bitsandbytes', 'optimum', 'accelerate',"
        " 'huggingface_hub', 'tokenizers', 'peft'} & sys.modules.keys(); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


IMPORT_DOES_NOTHING = """
import logging, os, signal, sys, threading, warnings
events = []
def watch(event, arguments):
    if event == "open" and arguments[1] is not None and any(c in str(arguments[1]) for c in "wax+"):
        events.append((event, arguments[0]))
    elif event.startswith(("socket.", "subprocess.", "os.putenv", "os.system", "os.mkdir", "os.remove", "os.rename")):
        events.append((event, arguments))
sys.dont_write_bytecode = True
before = dict(os.environ), list(sys.path), os.getcwd(), list(warnings.filters), threading.active_count()
handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)]
root = list(logging.getLogger().handlers), logging.getLogger().level
sys.addaudithook(watch)
%s
assert not events, events
assert before == (dict(os.environ), list(sys.path), os.getcwd(), list(warnings.filters), threading.active_count())
assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)]
assert root == (list(logging.getLogger().handlers), logging.getLogger().level)
"""


@pytest.mark.parametrize("statement", ["import qlm", "import qlm.recipe, qlm.errors, qlm.arch"])
def test_import_does_nothing(statement: str, tmp_path: Path) -> None:
    """No torch, no file written, no process, no network, no change to environment, signals, warnings or logging."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_DOES_NOTHING % statement + "assert 'torch' not in sys.modules"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_importing_every_module_sets_nothing(tmp_path: Path) -> None:
    """torch and others do things at import; qlm's own modules change neither environment nor signals, logging or threads."""
    dependencies = {
        "torch",
        "safetensors.torch",
        "rich.progress",
        "typer",
        "pydantic",
        "ruamel.yaml",
        "numpy",
        "triton",
    }
    code = "\n".join(f"import {name}" for name in sorted(dependencies)) + IMPORT_DOES_NOTHING % "\n".join(
        f"import {name}" for name in MODULES
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_public_names() -> None:
    import qlm

    assert {name: getattr(qlm, name).__name__ for name in qlm.__all__} == {name: name for name in qlm.__all__}
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        qlm.quantise  # noqa: B018


FORBIDDEN_CALLS = {
    ("torch", "load"),
    ("pickle", "load"),
    ("pickle", "loads"),
    ("numpy", "load"),
    ("os", "system"),
    ("importlib", "exec_module"),
}
FORBIDDEN_NAMES = re.compile(r"Auto(Model\w*|Config|Tokenizer|Processor)|Unpickler|eval|exec|compile|__import__")


def test_no_code_from_a_checkpoint_can_run() -> None:
    for module, tree in MODULES.items():
        assert not {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"} & {
            name.split(".")[0] for name in imports(module)
        }, module
        assert not {"torch.load", "numpy.load", "os.system", "os.popen"} & imports(module), module
        for node in ast.walk(tree):
            place = f"{module}, line {getattr(node, 'lineno', '?')}"
            if isinstance(node, ast.Name):
                assert not FORBIDDEN_NAMES.fullmatch(node.id), place
            elif isinstance(node, ast.Attribute):
                # `model.eval()` and `re.compile` are other things than the built-in functions.
                assert not re.fullmatch(r"Auto(Model\w*|Config|Tokenizer|Processor)", node.attr), place
                if isinstance(node.value, ast.Name):
                    assert (node.value.id, node.attr) not in FORBIDDEN_CALLS, place
            elif isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert isinstance(node.value, ast.Constant), place
                assert node.value.value is False, place


@pytest.mark.parametrize("text", ["import pickle\n", "trust_remote_code=True", "from_pretrained("])
def test_words_that_are_nowhere(text: str) -> None:
    for module in MODULES:
        path = ROOT / (module.replace(".", "/") + ".py")
        path = path if path.exists() else ROOT / module.replace(".", "/") / "__init__.py"
        assert text not in path.read_text("utf-8"), module
