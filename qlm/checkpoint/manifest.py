"""`manifest.json`: what an output was made from and how, and hashes by which any later change to it can be seen.

safetensors files carry no checksum; a flipped bit in a weight is otherwise invisible. The manifest holds facts only
that are the same in every run with the same inputs: no times, dates, hosts or absolute paths. It protects itself:
`checksum` is the SHA-256 of its own text without that field, and the file must be exactly the text that qlm writes for
its content.

It shows damage and mix-ups. It is no signature: whoever can write to the folder can write a manifest that fits.
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qlm.checkpoint import strict_json
from qlm.checkpoint.files import MARKER, file_facts, sha256_file
from qlm.checkpoint.folder import ModelFolder, is_plain_name
from qlm.errors import DataError, MissingInput

__all__ = ["NAME", "build", "input_facts", "is_made", "read", "sha256_file", "verify"]

NAME = MARKER
FORMAT = 1
# There where bits were chosen by a budget, where something was done to blocks as a whole, and with an adapter: facts of its
# training, and which model it belongs to.
_CHOICE, _BLOCKS, _TRAINING, _BASE = "choice", "blocks", "training", "base"
_KEYS = frozenset(
    {
        "format",
        "qlm",
        "recipe",
        "inputs",
        "outputs",
        "versions",
        "seed",
        "threads",
        "layers",
        "bos",
        "config",
        "checksum",
    }
)


def build(
    *,
    qlm: str,
    recipe: Mapping[str, Any],
    inputs: Mapping[str, Mapping[str, Any]],
    outputs: Mapping[str, Mapping[str, Any]],
    versions: Mapping[str, str],
    seed: int,
    threads: int,
    layers: Mapping[str, Any],
    bos: Any,
    config: Mapping[str, Any],
    choice: Mapping[str, Any] | None = None,
    blocks: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    base: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The manifest as JSON values; write it with `PartialFolder.write_json(manifest.NAME, ...)`, keys sorted.

    Args:
        qlm: qlm's version.
        recipe: the resolved recipe.
        inputs: {name: {"bytes", "sha256"}} of every file that was read (`input_facts`).
        outputs: the same of every other file of the output (`PartialFolder.facts`).
        versions: of the packages whose numbers are in the output.
        threads: number of CPU threads; sums in another order give other bits.
        layers: {linear: facts}: method used, bits, damp used, relative error.
        bos: the BOS rule that calibration and evaluation followed.
        config: key values of the model's config.
        choice: where bits were chosen by a budget, what is known of that.
        blocks: {block: facts} of those that were smoothed, or in which something was learned.
        training: of an adapter: trainable parameters, tokens, precision, optimizer, losses.
        base: of an adapter: "files", facts as in `inputs` of the model's files that it was trained on, and "float_files", of the float
            ones that these were quantized from, as far as that is known.
    """
    content: dict[str, Any] = {
        "format": FORMAT,
        "qlm": qlm,
        "recipe": dict(recipe),
        "inputs": {name: dict(facts) for name, facts in inputs.items()},
        "outputs": {name: dict(facts) for name, facts in outputs.items()},
        "versions": dict(versions),
        "seed": seed,
        "threads": threads,
        "layers": dict(layers),
        "bos": bos,
        "config": dict(config),
        **({_CHOICE: dict(choice)} if choice is not None else {}),
        **({_BLOCKS: dict(blocks)} if blocks else {}),
        **({_TRAINING: dict(training)} if training is not None else {}),
        **({_BASE: dict(base)} if base is not None else {}),
    }
    return {**content, "checksum": _checksum(content)}


def input_facts(files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """{name: {"bytes", "sha256"}} of the files, which must have different names. Reads every byte of them."""
    facts: dict[str, dict[str, Any]] = {}
    for file in files:
        if file.name in facts:
            raise ValueError(f"two input files are called {file.name}")
        facts[file.name] = file_facts(file)
    return facts


def is_made(output: Path, identity: Mapping[str, Any]) -> bool:
    """Whether the output is there already, complete and made from the same. Another's is PartialFolder's to refuse.

    Raises:
        DataError: it has changed since it was written.
    """
    if not (output / NAME).is_file():
        return False
    try:
        verify(output)
    except DataError as error:
        raise DataError(f"{error}; --force makes the output anew") from None
    written = read(output)
    return all(written[key] == value for key, value in identity.items())


def read(folder: str | Path) -> dict[str, Any]:
    """The manifest of an output, known to be what qlm wrote. Raises DataError if it is not."""
    return _read(ModelFolder(Path(folder)))


def verify(folder: str | Path) -> list[str]:
    """Hash every file of an output and compare it with the manifest.

    Returns:
        A summary, line by line.

    Raises:
        MissingInput: no such folder, or it has no manifest.
        DataError: a file is changed, missing or extra, or the manifest itself is changed; the first such problem.
    """
    path = Path(folder)
    if not path.is_dir():
        raise MissingInput(f"{path}: no such folder")
    opened = ModelFolder(path)
    if opened.path(NAME) is None:
        raise MissingInput(
            f"{path}: has no {NAME}, so there is nothing to verify it against; qlm writes one with every output"
        )
    manifest = _read(opened)
    outputs = manifest["outputs"]
    present = set(opened.names()) - {NAME}
    for name in sorted(outputs.keys() - present):
        raise DataError(f"{path / name}: missing; {NAME} lists it")
    for name in sorted(present - outputs.keys()):
        raise DataError(f"{path / name}: not listed in {NAME}; it was added or renamed after the output was written")
    total = 0
    for name in sorted(outputs):
        real = opened.real_path(name)
        facts = file_facts(real) if real is not None else {}
        for key in ("bytes", "sha256"):
            if facts.get(key) != outputs[name][key]:
                raise DataError(
                    f"{path / name}: changed: its {key} is {facts.get(key)}, {NAME} says {outputs[name][key]}"
                )
        total += facts["bytes"]
    return [
        f"{path}: {len(outputs)} files, {total} bytes, all as written by qlm {manifest['qlm']}",
        f"{len(manifest['inputs'])} input files and {len(manifest['layers'])} layers on record",
    ]


def _read(folder: ModelFolder) -> dict[str, Any]:
    """The manifest, after checking that it is exactly what qlm wrote."""
    source = str(folder.folder / NAME)
    data = folder.read(NAME, strict_json.MAX_JSON_BYTES)
    manifest = strict_json.load_object(data, source)
    if manifest.get("format") != FORMAT:
        raise DataError(f"{source}: format is {manifest.get('format')!r}; this version of qlm reads format {FORMAT}")
    content = {key: value for key, value in manifest.items() if key != "checksum"}
    if (
        manifest.keys() - {_CHOICE, _BLOCKS, _TRAINING, _BASE} != _KEYS
        or manifest["checksum"] != _checksum(content)
        or strict_json.dumps(manifest) != data
    ):
        raise DataError(f"{source}: changed: its content does not agree with its checksum")
    if not isinstance(manifest["outputs"], dict) or not all(
        is_plain_name(name) and isinstance(facts, dict) and facts.keys() == {"bytes", "sha256"}
        for name, facts in manifest["outputs"].items()
    ):
        raise DataError(f"{source}: outputs must map plain file names to bytes and sha256")
    return manifest


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(strict_json.dumps(dict(content))).hexdigest()
