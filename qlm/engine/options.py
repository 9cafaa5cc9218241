"""What a caller may ask of text generation, checked once for both runtimes: the engine, and models of transformers.

Nothing here needs torch. What it refuses: options out of range or without effect, a prompt that leaves no room in the model's
positions, and ids that the model does not have.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qlm.arch import FamilySpec
from qlm.errors import DataError, UsageError


@dataclass(frozen=True)
class Options:
    """The options of `qlm.generate` and `Engine.generate`, whose docstrings explain them. Raises UsageError when made with wrong ones."""

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    repetition_penalty: float
    num_return_sequences: int
    seed: int | None
    greedy: bool
    stop: Sequence[str]

    def __post_init__(self) -> None:
        self._check_ranges()
        if self.greedy:
            self._check_greedy()
        texts = self.stop
        if not isinstance(texts, list | tuple) or not all(isinstance(text, str) and text for text in texts):
            raise UsageError(f"stop {texts!r}: expected a list of texts of at least one character each")

    def _check_ranges(self) -> None:
        whole: tuple[tuple[str, object, int], ...] = (
            ("max_new_tokens", self.max_new_tokens, 1),
            ("num_return_sequences", self.num_return_sequences, 1),
            ("top_k", 1 if self.top_k is None else self.top_k, 1),
            ("seed", 0 if self.seed is None else self.seed, 0),
        )
        for name, value, least in whole:
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 1 << 64:
                raise UsageError(f"{name} {value!r}: expected a whole number of at least {least}")
        real: tuple[tuple[str, object, float, str], ...] = (
            ("temperature", self.temperature, math.inf, "a number above 0 (for the most likely token, take greedy)"),
            ("repetition_penalty", self.repetition_penalty, math.inf, "a number above 0 (1 is off)"),
            ("top_p", 1.0 if self.top_p is None else self.top_p, 1.0, "a number above 0 and at most 1"),
        )
        for name, value, most, expected in real:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and 0.0 < value <= most and value < math.inf):  # type: ignore[operator]
                raise UsageError(f"{name} {value!r}: expected {expected}")

    def _check_greedy(self) -> None:
        sampling = {
            "temperature": self.temperature != 1.0, "top_k": self.top_k is not None, "top_p": self.top_p is not None
        }  # fmt: skip
        given = [name for name, is_given in sampling.items() if is_given]
        if given:
            raise UsageError(f"greedy: {', '.join(given)} would have no effect; leave out one or the other")
        if self.num_return_sequences > 1:
            raise UsageError(f"greedy gives one text; {self.num_return_sequences} sequences would all be the same")

    def check_stream(self, sequences: int) -> None:
        """Raise UsageError unless a call for so many sequences in all can be streamed."""
        if sequences > 1:
            raise UsageError(f"stream: one sequence can be streamed, and {sequences} were asked for")

    def check_prompt(self, ids: Sequence[int], spec: FamilySpec, positions: int, vocabulary: int) -> None:
        """Raise UsageError for a prompt that is empty or too long, DataError for an id that the model does not have."""
        if not ids:
            raise UsageError(f"the prompt is empty: a {spec.model_type} model needs at least one token to start from")
        if len(ids) >= positions:
            raise UsageError(
                f"the prompt has {len(ids)} tokens, and the model {positions} positions: "
                f"expected at most {positions - 1}, so that there is room for a new one"
            )
        if len(ids) + self.max_new_tokens > positions:
            raise UsageError(
                f"max_new_tokens {self.max_new_tokens}: the prompt takes {len(ids)} of the model's {positions} positions; "
                f"at most {positions - len(ids)} are possible"
            )
        if max(ids) >= vocabulary:
            raise DataError(
                f"the prompt has the id {max(ids)}, and the model has {vocabulary}: another model's tokenizer"
            )
