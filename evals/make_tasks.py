"""Small labelled tasks, one for each kind of head, made by rule from the texts in calibration_data/ and evals/texts/.

    python evals/make_tasks.py FOLDER

writes `<task>.jsonl` to learn from, cut from the calibration texts, and `<task>-held-out.jsonl` to measure on, from the held-out ones, which
share no document with them; the same bytes every time. They show that heads learn, and are no benchmark: every label follows from
the characters of the text by the rule below, and nobody has judged it.

sequence-classification: which of the two texts a passage is from, `english` (documentation and two dictionaries, code samples included) or
    `python` (source files, comments and docstrings included). As many of the one as of the other.
token-classification: words of English passages. `NUMBER`: begins with a digit. `MARKUP`: begins with one of ` * : | = .. ``CAPITAL``: begins with a
    capital letter and does not begin a sentence. `O`: all others. A causal model sees a word's beginning and what is before, and the
    rules look no further.
question-answering: English passages with at least two of five kinds of expression: a literal (``x``), a reference (:func:`x`),
    emphasis (*x*), a cross-reference ({x}), and words in parentheses. The question names one kind; the answer is the first expression
    of that kind with its marks, since a causal model cannot know before the closing one that it ends.
"""

import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PARTS = {"": "calibration_data", "-held-out": "evals/texts"}
# Samples of each task to learn from and to measure on, at most.
COUNTS = {"": 2000, "-held-out": 400}
SHORTEST, LONGEST = 120, 480  # characters of a passage
SEQUENCE_LABELS = ("english", "python")
TOKEN_LABELS = ("O", "CAPITAL", "NUMBER", "MARKUP")
EXPRESSIONS = {
    "Which literal is first?": re.compile(r"``[^`]+``"),
    "Which reference is first?": re.compile(r":[a-z]+(?::[a-z]+)?:`[^`]+`"),
    "Which emphasis is first?": re.compile(r"(?<![*\w])\*[^*\s][^*]{0,60}\*(?!\*)"),
    "Which cross-reference is first?": re.compile(r"\{[^{}]{2,60}\}"),
    "Which parentheses are first?": re.compile(r"\([^()`]{3,60}\)"),
}


def passages(text: str) -> list[str]:
    """Paragraphs of a fit length, each once, in the order of their hashes, which is as good as drawn by chance."""
    found = {part.strip("\n") for part in re.split(r"\n[ \t]*\n", text)}
    return sorted((part for part in found if SHORTEST <= len(part) <= LONGEST), key=digest)


def digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def texts_with_labels(texts: dict[str, str], count: int) -> Iterator[dict[str, Any]]:
    """As many passages of each language, mixed."""
    chosen = [(part, label) for label in SEQUENCE_LABELS for part in passages(texts[label])[: count // 2]]
    for part, label in sorted(chosen, key=lambda pair: digest(pair[0])):
        yield {"text": part, "label": label}


def word_label(word: str, before: str | None) -> str:
    """The label of a word; `before` is the word before it, None at the beginning."""
    if word[0] in "0123456789":
        return "NUMBER"
    if word[0] in "`*:|=" or word.startswith(".."):
        return "MARKUP"
    if word[0].isupper() and before is not None and before[-1] not in ".:!?":
        return "CAPITAL"
    return "O"


def labelled_words(texts: dict[str, str], count: int) -> Iterator[dict[str, Any]]:
    for part in passages(texts["english"])[:count]:
        words = part.split()
        befores = [None, *words]
        yield {
            "tokens": words,
            "labels": [word_label(word, before) for word, before in zip(words, befores, strict=False)],
        }


def questions(texts: dict[str, str], count: int) -> Iterator[dict[str, Any]]:
    made = 0
    for part in passages(texts["english"]):
        context = " ".join(part.split())
        found = [(question, expression.search(context)) for question, expression in EXPRESSIONS.items()]
        there = [(question, match) for question, match in found if match is not None]
        if len(there) < 2:
            continue
        # The hash: which one is asked for must not follow from what the passage says.
        question, match = there[digest(context)[0] % len(there)]
        yield {"question": question, "context": context, "answer": match[0], "answer_start": match.start()}
        made += 1
        if made == count:
            return


TASKS = {
    "sequence-classification": texts_with_labels,
    "token-classification": labelled_words,
    "question-answering": questions,
}


def write(folder: Path) -> dict[str, int]:
    """Write all files into a folder, which is made; gives the number of samples in each."""
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for suffix, source in PARTS.items():
        texts = {name: (ROOT / source / f"{name}.txt").read_text("utf-8") for name in SEQUENCE_LABELS}
        for task, make in TASKS.items():
            name = f"{task}{suffix}.jsonl"
            written[name] = write_lines(folder / name, make(texts, COUNTS[suffix]))
    return written


def write_lines(path: Path, samples: Iterable[dict[str, Any]]) -> int:
    lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples]
    path.write_text("".join(lines), "utf-8")
    return len(lines)


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit((__doc__ or "").strip())
    print(json.dumps(write(Path(sys.argv[1]))))


if __name__ == "__main__":
    main()
