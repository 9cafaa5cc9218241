"""recipes/qlora_colab.ipynb: a valid notebook without outputs, whose cells all run on a CPU from a clean kernel, and do what they say.

It runs in a kernel of this interpreter, with its own Jupyter and IPython folders, and writes into tmp_path only.
"""

import ast
import itertools
import json
import math
import os
import re
import struct
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from transformers import GPTNeoXConfig, OPTConfig

from qlm.arch import FAMILIES
from qlm.arch.shapes import causal_lm_shapes, complete_fields
from qlm.checkpoint.manifest import verify
from qlm.plan import plan
from qlm.recipe import FinetuneRecipe, Recipe, load_finetune_recipe
from qlm.recipe.finetune import parse_finetune_recipe
from qlm.training.plan import plan_training
from tests.conftest import ROOT

NOTEBOOK = ROOT / "recipes" / "qlora_colab.ipynb"
# Enough for the demo model to take up the form of the answers.
STEPS = 60
SECONDS_A_CELL = 600


def read() -> Any:
    return nbformat.read(NOTEBOOK, as_version=nbformat.NO_CONVERT)


def code_cells() -> list[Any]:
    return [cell for cell in read().cells if cell.cell_type == "code"]


def test_file_is_valid_and_holds_no_outputs() -> None:
    notebook = read()
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    # Names that say what a cell is, not the random ones that editors give.
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name) and not re.search(r"\d{2}", name) for name in ids)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
            ast.parse(cell.source)
        assert cell.metadata == {}
    assert set(notebook.metadata) == {"accelerator", "colab", "kernelspec", "language_info"}
    assert NOTEBOOK.read_text("utf-8") == json.dumps(notebook_as_stored(), indent=1, ensure_ascii=False) + "\n"


def notebook_as_stored() -> Any:
    return json.loads(NOTEBOOK.read_text("utf-8"))


def test_each_code_cell_is_explained_first() -> None:
    cells = read().cells
    assert cells[0].cell_type == "markdown"
    assert "qlora" in cells[0].source.lower()
    without = [cell.id for before, cell in itertools.pairwise(cells) if cell.cell_type == before.cell_type == "code"]
    assert without == ["merge-gptq"]  # explained with merge-nf4


# The configs of the models that the notebook names for a GPU, as published.
SHAPES: dict[str, Any] = {
    "EleutherAI/pythia-1.4b-deduped": GPTNeoXConfig(
        vocab_size=50304, hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, num_attention_heads=16, bos_token_id=0,
        eos_token_id=0, dtype="float16", architectures=["GPTNeoXForCausalLM"],
    ),
    "facebook/opt-1.3b": OPTConfig(
        hidden_size=2048, ffn_dim=8192, num_hidden_layers=24, num_attention_heads=32, word_embed_proj_dim=2048, dtype="float16",
        architectures=["OPTForCausalLM"],
    ),
}  # fmt: skip


def without_weights(folder: Path, config: Any, tokenizer: str) -> Path:
    """A checkpoint of which the headers alone take room: its weights are a hole in the file."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    (folder / "tokenizer.json").write_text(tokenizer)
    spec, header, end = FAMILIES[config.model_type], {}, 0
    for name, shape in causal_lm_shapes(spec, complete_fields(spec, config.to_dict())).items():
        if name != "lm_head.weight":  # OPT's, which is tied
            begin, end = end, end + 2 * math.prod(shape)
            header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return folder


@pytest.mark.parametrize("model", SHAPES)
def test_a_gpus_settings_need_less_than_it_says(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer_json: str
) -> None:
    """The cells themselves, as they are where nvidia-smi answers, write the recipe; qlm's plan says what that takes. Planned for a CPU, where
    base, adapter, activations and float32 products are all in RAM: a GPU takes most of that over."""
    cells = {cell.id: cell.source for cell in read().cells}
    claimed = re.search(r"within (\d+) GB of memory", cells["title"])
    assert claimed is not None
    most = float(claimed[1]) * 1e9
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("QLM_NOTEBOOK_OUT", str(tmp_path))
    names: dict[str, Any] = {"run": lambda *command: None}
    exec(cells["settings"], names)
    assert (names["CUDA"], names["DEVICE"]) == (True, "cuda")
    assert names["MODEL"] in SHAPES
    assert model in cells["settings-text"] or model == names["MODEL"]
    folder = without_weights(tmp_path / "model", SHAPES[model], tokenizer_json)
    names["MODEL"] = str(folder)
    exec(cells["data"], names)
    exec(cells["recipe"], names)
    needs = plan_training(load_finetune_recipe(tmp_path / "recipe.yaml"))
    assert needs.trainable > 10e6
    # The base, four bits a weight and its embeddings in floats, at the least.
    assert 0.8e9 < needs.memory < most
    # What comes after training: merging measures two models beside each other.
    text = {
        "data": str(ROOT / "evals/texts/english.txt"),
        "length": names["MEASURED_LENGTH"],
        "windows": names["MEASURED_WINDOWS"],
    }
    windows = {"samples": names["CALIBRATION_WINDOWS"], "length": names["CALIBRATION_LENGTH"]}
    calibration = {"data": str(ROOT / "calibration_data/english.txt"), **windows}
    for backend, more in (("nf4", {}), ("gptq", {"calibration": calibration})):
        section = {"model": str(folder), "quantize": {"backend": backend}, "output": str(tmp_path / backend)}
        assert plan(Recipe.model_validate({**section, **more, "evaluate": text})).memory < most


def test_recipes_in_the_text_are_valid() -> None:
    texts = [cell.source for cell in read().cells if cell.cell_type == "markdown"]
    blocks = [block for text in texts for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]
    assert blocks
    for block in blocks:
        assert isinstance(parse_finetune_recipe(block, "notebook"), FinetuneRecipe)


def test_files_that_it_names_are_there() -> None:
    named = {
        path
        for cell in read().cells
        for path in re.findall(r"\b(?:evals|calibration_data|recipes)/[\w./-]*[\w/]", cell.source)
    }
    assert {"evals/checkpoints/tiny-opt", "evals/texts/english.txt", "calibration_data/english.txt"} <= named
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def run(root: Path) -> tuple[dict[str, str], Path]:
    """What each code cell printed, by its id; and the folder that it wrote into."""
    out = root / "out"
    changes = {
        "QLM_NOTEBOOK_STEPS": str(STEPS), "QLM_NOTEBOOK_OUT": str(out), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "JUPYTER_DATA_DIR": str(root / "data"), "JUPYTER_RUNTIME_DIR": str(root / "runtime"),
        "JUPYTER_CONFIG_DIR": str(root / "config"), "IPYTHONDIR": str(root / "ipython"), "JUPYTER_PATH": "",
        # No GPU is seen either where there is one: nvidia-smi is asked by its name.
        "PATH": f"{root / 'bin'}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    (root / "bin").mkdir()
    (root / "bin" / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (root / "bin" / "nvidia-smi").chmod(0o755)
    # A kernel by the name that the notebook asks for, which is this interpreter.
    spec = root / "data" / "kernels" / "python3"
    spec.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (spec / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "Python 3", "language": "python"}))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in changes.items():
            patch.setenv(name, value)
        notebook = read()
        manager = AsyncKernelManager(kernel_name="python3", connection_file=str(root / "connection.json"))
        manager.kernel_spec_manager.ensure_native_kernel = False
        manager.kernel_spec_manager.kernel_dirs = [str(spec.parent)]
        # As Jupyter starts it: in the notebook's own folder.
        client = NotebookClient(
            notebook, km=manager, timeout=SECONDS_A_CELL, resources={"metadata": {"path": str(NOTEBOOK.parent)}}
        )
        client.execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        assert [output for output in cell.outputs if output.output_type == "error"] == [], cell.id
    printed = {
        cell.id: "".join(
            output.text if output.output_type == "stream" else output.get("data", {}).get("text/html", "")
            for output in cell.outputs
            if output.get("name") != "stderr"
        )
        for cell in code
    }
    return printed, out


def every_cell_runs_and_writes_where_it_is_told(printed: dict[str, str], out: Path) -> None:
    assert [name for name, text in printed.items() if not text.strip()] == ["settings"]
    assert "qlm runs on cpu with evals/checkpoints/tiny-opt" in printed["install"]
    assert "pip" not in printed["install"]
    folders = {path.name for path in out.iterdir() if path.is_dir()}
    assert folders == {"adapter", "adapter-base", "merged-nf4", "merged-gptq"}
    for folder in folders:
        assert verify(out / folder)
    assert json.loads((out / "merged-nf4" / "config.json").read_text())["quantization_config"]["load_in_4bit"]


def recipe_that_it_writes(printed: dict[str, str], out: Path) -> None:
    recipe = load_finetune_recipe(out / "recipe.yaml")
    assert (recipe.train.steps, recipe.train.precision) == (STEPS, "auto")
    assert recipe.quantize is not None
    assert recipe.quantize.backend == "nf4"
    assert (out / "recipe.yaml").read_text("utf-8") in printed["recipe"]
    assert f"{out / 'recipe.yaml'}: valid" in printed["recipe"]
    learned, kept = ((out / f"{name}.jsonl").read_text("utf-8").splitlines() for name in ("learned", "kept"))
    assert (len(learned), len(kept)) == (58, 14)
    assert not set(learned) & set(kept)


def in_form(text: str) -> int:
    found = re.search(r"(\d+) of 7 answers have the form that is wanted, \d+ are right", text)
    assert found is not None, text
    return int(found[1])


def the_model_has_learned_something(printed: dict[str, str], out: Path) -> None:
    assert in_form(printed["before"]) == 0
    assert in_form(printed["after"]) >= 3
    metrics = [json.loads(line) for line in (out / "adapter" / "metrics.jsonl").read_text().splitlines()]
    measured = [record["validation_loss"] for record in metrics if "validation_loss" in record]
    assert measured[-1] < measured[0] / 2
    rows = [line.split() for line in printed["metrics"].splitlines() if re.match(r" *\d+ ", line)]
    assert rows[0] == ["0", f"{measured[0]:.4f}"]
    assert rows[-1][0] == str(STEPS)
    assert rows[-1][-1] == f"{measured[-1]:.4f}"
    assert ("data:image/svg+xml" in printed["metrics"]) == (out / "adapter" / "report.html").is_file()


def no_colours_or_bars_fill_a_cell(printed: dict[str, str], out: Path) -> None:
    for name, text in printed.items():
        assert "\x1b" not in text, name
        assert len(text) < 20_000 or name == "metrics", name


def merged_models_are_measured(printed: dict[str, str], out: Path) -> None:
    rows = {line.split()[0]: line.split()[1:] for line in printed["evaluate"].splitlines() if line and line[0] != "$"}
    assert float(rows["original"][0]) > 1
    for name in ("nf4", "gptq"):
        size, perplexity, cost, moved = map(float, rows[name])
        assert 2 < size < 4
        assert perplexity > 1
        # Quantizing costs far less than training has moved the model.
        assert 0 < cost < 0.1
        assert cost < moved / 4


def adapter_answers_the_same_in_plain_transformers(printed: dict[str, str], out: Path) -> None:
    assert in_form(printed["peft"]) >= 3
    same = re.search(r"(\d+) of 7 answers are the same as qlm's", printed["peft"])
    assert same is not None
    # The rest may differ by rounding: qlm's CPU kernels for NF4 have int8 activations.
    assert int(same[1]) >= 4


def test_it_runs_and_does_what_it_says(tmp_path: Path) -> None:
    """One test, so that the notebook runs once, however many processes the tests are shared out to."""
    printed, out = run(tmp_path)
    every_cell_runs_and_writes_where_it_is_told(printed, out)
    recipe_that_it_writes(printed, out)
    the_model_has_learned_something(printed, out)
    no_colours_or_bars_fill_a_cell(printed, out)
    merged_models_are_measured(printed, out)
    adapter_answers_the_same_in_plain_transformers(printed, out)
