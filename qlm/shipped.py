"""The recipes that come with qlm: in the package when it was installed, beside it in a clone."""

import os
from pathlib import Path

from qlm.checkpoint.files import write_file
from qlm.errors import CannotCreate, UsageError


def _folder() -> Path:
    here = Path(__file__).resolve().parent
    installed = here / "_recipes"
    return installed if installed.is_dir() else here.parent / "recipes"


def list_recipes() -> list[str]:
    """Their names, such as `opt-125m/gptq-4bit`; and those of accelerate's configurations beside them."""
    folder = _folder()
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))


def copy_recipe(name: str, to: Path) -> Path:
    """Copy one to a file or into a folder.

    Raises:
        UsageError: no such recipe. CannotCreate: the file is there already.
    """
    names = list_recipes()
    name = name.removesuffix(".yaml")
    if name not in names:
        import difflib

        close = difflib.get_close_matches(name, names, n=1)
        raise UsageError(
            f"no recipe {name!r}; `qlm recipes` lists them" + (f"; did you mean {close[0]}?" if close else "")
        )
    target = to / f"{name.replace('/', '-')}.yaml" if to.is_dir() else to
    if os.path.lexists(target):
        raise CannotCreate(f"{target}: exists already; give another name")
    write_file(target, (_folder() / f"{name}.yaml").read_bytes())
    return target
