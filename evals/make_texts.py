"""Cut the project's texts out of Debian's packages: calibration, held-out and training text, disjoint by document.

    apt-get install python3.11-doc dict-jargon dict-devil libpython3.11-stdlib
    python evals/make_texts.py TRAINING_DIR

writes calibration_data/{english,python}.txt and evals/texts/{english,python}.txt, which are committed, and
TRAINING_DIR/{english,python}.jsonl (one document a line), which train_tiny.py reads and nobody else.

English is the Python documentation's sources (PSF licence), the Jargon File and The Devil's Dictionary (public domain);
Python is the standard library (PSF licence). A document is one file or one dictionary entry. Its split is decided by the
SHA-256 of its name alone, so that adding a document moves no other one.
"""

import gzip
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTATION = Path("/usr/share/doc/python3.11/html/_sources")
DICTIONARIES = Path("/usr/share/dictd")
STANDARD_LIBRARY = Path("/usr/lib/python3.11")

HELD_OUT_BYTES = 450_000
CALIBRATION_BYTES = 900_000
# One change log of 400 kB would be most of the held-out text; longer documents than this serve for training only.
LONGEST_DOCUMENT_BYTES = 60_000

# Character tables that differ in a few bytes each, and a copy of the documentation: they would leak between the splits.
LEFT_OUT = {"encodings", "pydoc_data", "__pycache__"}

DICT_DIGITS = {c: i for i, c in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")}


def dict_number(digits: str) -> int:
    """A number of dictd's index: base 64, most significant digit first."""
    value = 0
    for digit in digits:
        value = value * 64 + DICT_DIGITS[digit]
    return value


def dictionary_entries(name: str) -> Iterator[tuple[str, str]]:
    """The entries of one dictd dictionary, each once (several head words may point at one entry)."""
    data = gzip.decompress((DICTIONARIES / f"{name}.dict.dz").read_bytes())
    places = set()
    for line in (DICTIONARIES / f"{name}.index").read_text("utf-8").splitlines():
        word, offset, length = line.split("\t")[:3]
        if not word.startswith("00"):
            places.add((dict_number(offset), dict_number(length)))
    for offset, length in sorted(places):
        yield f"{name}:{offset}", data[offset : offset + length].decode("utf-8", "replace").strip() + "\n"


def files(folder: Path, pattern: str) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.rglob(pattern)):
        if path.is_symlink() or not LEFT_OUT.isdisjoint(path.parts):
            continue
        text = path.read_text("utf-8", errors="replace").strip()
        if len(text) > 200:
            yield str(path.relative_to(folder)), text + "\n"


def split(documents: list[tuple[str, str]]) -> dict[str, list[str]]:
    """Held-out first, then calibration, then everything else, in the order of the names' hashes."""
    parts: dict[str, list[str]] = {"held_out": [], "calibration": [], "training": []}
    sizes = {"held_out": 0, "calibration": 0}
    limits = {"held_out": HELD_OUT_BYTES, "calibration": CALIBRATION_BYTES}
    for _, text in sorted(documents, key=lambda item: hashlib.sha256(item[0].encode()).digest()):
        size = len(text.encode())
        part = "training"
        if size <= LONGEST_DOCUMENT_BYTES:
            part = next((p for p in sizes if sizes[p] + size <= limits[p]), "training")
        parts[part].append(text)
        if part in sizes:
            sizes[part] += size
    return parts


def main(training_dir: Path) -> None:
    english = [*files(DOCUMENTATION, "*.rst.txt"), *dictionary_entries("jargon"), *dictionary_entries("devil")]
    python = list(files(STANDARD_LIBRARY, "*.py"))
    training_dir.mkdir(parents=True, exist_ok=True)
    for language, documents in (("english", english), ("python", python)):
        parts = split(documents)
        (ROOT / "calibration_data" / f"{language}.txt").write_text("\n\n".join(parts["calibration"]), "utf-8")
        (ROOT / "evals" / "texts" / f"{language}.txt").write_text("\n\n".join(parts["held_out"]), "utf-8")
        with open(training_dir / f"{language}.jsonl", "w", encoding="utf-8") as out:
            out.writelines(json.dumps({"text": text}) + "\n" for text in parts["training"])
        print(language, {part: (len(texts), sum(len(t.encode()) for t in texts)) for part, texts in parts.items()})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
