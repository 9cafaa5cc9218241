"""Wheels for a machine that has a GPU, torch and no network: downloaded here, bitsandbytes cut down to what runs there.

    python evals/gpu_wheels.py FOLDER [--python 3.12] [--cuda 130] [--packages NAME ...]

FOLDER then holds one wheel of each package, in the versions of constraints.txt, and of pydantic_core the one that pydantic asks for; wheels of
other versions are removed, for pip installs nothing where it finds two. bitsandbytes brings a library for each CUDA version, 43 MB in
all; of those only that for `--cuda` stays, beside the CPU's, and RECORD names no other: 3.6 MB. There:

    python3 -m pip install --no-index --no-deps --target site FOLDER/*.whl && export PYTHONPATH=$PWD/site
"""

import argparse
import csv
import io
import re
import subprocess
import sys
import tempfile
import zipfile
from email.parser import Parser
from fnmatch import fnmatch
from pathlib import Path

from shared import ROOT

# What is not there, or too old: transformers' models, bitsandbytes and PEFT for QLoRA, pydantic and ruamel.yaml for recipes, and what these need;
# optimum-quanto, whose sources in C++ and CUDA are compiled there, with ninja and nvcc. flash-attn has no wheel.
PACKAGES = (
    "transformers", "bitsandbytes", "peft", "optimum-quanto", "pydantic", "ruamel.yaml", "typing_extensions", "typing_inspection",
    "annotated_types",
)  # fmt: skip
# The newest glibc that a wheel may ask for; pip takes the tags as they are given, and none between them.
GLIBC_MINOR = 28
PLATFORMS = ("manylinux2014_x86_64", *(f"manylinux_2_{minor}_x86_64" for minor in range(17, GLIBC_MINOR + 1)))


class Refused(Exception):
    """One line for the user."""


def plain(name: str) -> str:
    """A package's name as wheels' file names have it."""
    return re.sub(r"[-_.]+", "_", name).lower()


def version_of(name: str) -> str:
    """The version that constraints.txt holds.

    Raises:
        Refused: none.
    """
    for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines():
        package, found, version = line.partition("==")
        if found and plain(package) == plain(name):
            return version
    raise Refused(f"{name}: not in constraints.txt, which says the version; add it there")


def required(wheel: Path, name: str) -> str:
    """The exact version of another package that the wheel asks for.

    Raises:
        Refused: it asks for none, or for several.
    """
    with zipfile.ZipFile(wheel) as archive:
        (file,) = (entry for entry in archive.namelist() if entry.endswith(".dist-info/METADATA"))
        needs = Parser().parsestr(archive.read(file).decode()).get_all("Requires-Dist") or []
    for need in needs:
        package, found, version = need.partition(";")[0].partition("==")
        if found and plain(package.strip()) == plain(name):
            return version.strip()
    raise Refused(f"{wheel.name}: asks for no exact version of {name}")


def cut(wheel: Path, target: Path, cuda: str) -> None:
    """Write the wheel without the shared libraries that are neither for this CUDA version nor for the CPU.

    Args:
        wheel: one of bitsandbytes. cuda: major and minor version as its libraries' names have it ("130").
    Raises:
        Refused: it holds none for that version.
    """
    keep = (f"*_cuda{cuda}.so", "*_cpu.so")
    with zipfile.ZipFile(wheel) as source:
        libraries = [name for name in source.namelist() if name.endswith(".so")]
        if not any(fnmatch(name, keep[0]) for name in libraries):
            there = ", ".join(sorted(found[1] for name in libraries if (found := re.search(r"_cuda(\d+)\.so$", name))))
            raise Refused(
                f"{wheel.name}: no library for CUDA {cuda}; it has {there or 'none'}: give one of them with --cuda"
            )
        left_out = {name for name in libraries if not any(fnmatch(name, pattern) for pattern in keep)}
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as cut_down:
            for entry in source.infolist():
                if entry.filename in left_out:
                    continue
                data = source.read(entry)
                if entry.filename.endswith(".dist-info/RECORD"):
                    rows = [row for row in csv.reader(io.StringIO(data.decode())) if row and row[0] not in left_out]
                    text = io.StringIO()
                    csv.writer(text, lineterminator="\n").writerows(rows)
                    data = text.getvalue().encode()
                cut_down.writestr(entry, data, zipfile.ZIP_DEFLATED, 9)


def download(name: str, version: str, python: str, folder: Path) -> Path:
    """The package's wheel for that Python on Linux, by pip.

    Raises:
        Refused: pip finds none.
    """
    before = set(folder.glob("*.whl"))
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--python-version", python,
        "--implementation", "cp", *platforms, "--dest", str(folder), f"{name}=={version}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    found = set(folder.glob("*.whl")) - before
    if done.returncode or len(found) != 1:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no wheel came"]
        raise Refused(f"{name} {version} for Python {python}: pip: {lines[-1]}")
    return found.pop()


def put(wheel: Path, folder: Path) -> Path:
    """Move the wheel into the folder, in the place of the package's others."""
    for old in folder.glob("*.whl"):
        if plain(old.name.partition("-")[0]) == plain(wheel.name.partition("-")[0]):
            old.unlink()
    return Path(wheel.rename(folder / wheel.name))


def fill(folder: Path, packages: list[str], python: str, cuda: str) -> list[Path]:
    """The wheels that lie in the folder afterwards.

    Raises:
        Refused: a package has no version here, no wheel, or no library for that CUDA.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wheels = []
    # In the same folder, so that a finished wheel is only renamed.
    with tempfile.TemporaryDirectory(dir=folder) as place:
        for name in packages:
            wheel = download(name, version_of(name), python, Path(place))
            if plain(name) == "pydantic":
                wheels.append(
                    put(download("pydantic_core", required(wheel, "pydantic_core"), python, Path(place)), folder)
                )
            if plain(name) == "bitsandbytes":
                small = Path(place) / "cut" / wheel.name
                small.parent.mkdir()
                cut(wheel, small, cuda)
                wheel = small
            wheels.append(put(wheel, folder))
    return wheels


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("--python", default="3.12", help="of the machine with the GPU")
    arguments.add_argument("--cuda", default="130", help="CUDA version of its torch, without the point")
    arguments.add_argument("--packages", nargs="+", default=list(PACKAGES), help="others than these: %(default)s")
    options = arguments.parse_args()
    try:
        wheels = fill(options.folder, options.packages, options.python, options.cuda.replace(".", ""))
    except Refused as error:
        print(f"gpu_wheels: {error}", file=sys.stderr)
        return 1
    for wheel in sorted(wheels):
        print(f"{wheel.stat().st_size / 1e6:7.2f} MB  {wheel.name}")
    print(f"{sum(wheel.stat().st_size for wheel in wheels) / 1e6:7.2f} MB  in {options.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
