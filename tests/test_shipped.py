"""Recipes that come with qlm: listed, copied byte for byte, never over another file."""

import os
import stat
from pathlib import Path

import pytest

from qlm import shipped
from qlm.errors import CannotCreate, UsageError
from qlm.recipe import load_any_recipe, load_recipe
from qlm.shipped import copy_recipe, list_recipes
from tests.conftest import ROOT


def test_list_is_what_is_in_the_folder() -> None:
    names = list_recipes()
    assert names == sorted(names)
    assert {f"{name}.yaml" for name in names} == {
        str(path.relative_to(ROOT / "recipes")) for path in (ROOT / "recipes").rglob("*.yaml")
    }
    assert len(names) >= 9 + 4 * 12 + 7


# accelerate's own configurations lie among them, to be copied in the same way.
RECIPES = [name for name in list_recipes() if "/accelerate/" not in name]


@pytest.mark.parametrize("name", RECIPES)
def test_every_one_is_valid_where_it_is_copied(name: str, tmp_path: Path) -> None:
    load_any_recipe(copy_recipe(name, tmp_path))


def test_copies_into_a_folder_or_to_a_file(tmp_path: Path) -> None:
    original = (ROOT / "recipes" / "opt-125m" / "gptq-4bit.yaml").read_bytes()
    for target, written in (
        (tmp_path, tmp_path / "opt-125m-gptq-4bit.yaml"),
        (tmp_path / "mine.yaml", tmp_path / "mine.yaml"),
    ):
        assert copy_recipe("opt-125m/gptq-4bit", target) == written
        assert written.read_bytes() == original
        load_recipe(written)
    assert copy_recipe("opt-125m/gptq-4bit.yaml", tmp_path / "b.yaml").read_bytes() == original
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((tmp_path / "b.yaml").stat().st_mode) == 0o666 & ~umask
    assert {path.name for path in tmp_path.iterdir()} == {"opt-125m-gptq-4bit.yaml", "mine.yaml", "b.yaml"}


@pytest.mark.parametrize(
    ("name", "hint"),
    [("opt-125m/gptq4bit", "did you mean opt-125m/gptq-4bit"), ("Opt-125m/nf4", "did you mean opt-125m/nf4"), ("llama", ""),
     ("", ""), ("../README", ""), ("/etc/passwd", ""), ("opt-125m", "")],
)  # fmt: skip
def test_unknown(name: str, hint: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"no recipe .*{hint}"):
        copy_recipe(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_never_over_another_file(tmp_path: Path) -> None:
    (tmp_path / "opt-125m-nf4.yaml").write_text("mine")
    (tmp_path / "dangling.yaml").symlink_to(tmp_path / "nowhere")
    for target in (tmp_path, tmp_path / "opt-125m-nf4.yaml", tmp_path / "dangling.yaml"):
        with pytest.raises(CannotCreate, match="exists already"):
            copy_recipe("opt-125m/nf4", target)
    assert (tmp_path / "opt-125m-nf4.yaml").read_text() == "mine"
    assert (tmp_path / "dangling.yaml").is_symlink()


def test_nowhere_to_write(tmp_path: Path) -> None:
    with pytest.raises(CannotCreate, match="missing"):
        copy_recipe("opt-125m/nf4", tmp_path / "missing" / "a.yaml")


def test_installed_recipes_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel carries them inside the package, as `_recipes`."""
    (tmp_path / "_recipes" / "a").mkdir(parents=True)
    (tmp_path / "_recipes" / "a" / "b.yaml").write_text("model: x\n")
    monkeypatch.setattr(shipped, "__file__", str(tmp_path / "shipped.py"))
    assert list_recipes() == ["a/b"]
    assert 'recipes" = "qlm/_recipes"' in (ROOT / "pyproject.toml").read_text()
