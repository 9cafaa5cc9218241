"""New token ids into text, as it comes: whole characters, nothing of a stop string, nothing after the end."""

from collections.abc import Callable, Collection, Sequence

# What a decoder writes for bytes that are no character, among them the first bytes of one whose rest is still to come.
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextWriter:
    """The text of one sequence, token by token.

    The text ends before the first stop string, wherever tokens begin and end: the one that is complete first, the longest
    of those that end at the same character. What could still become a stop string, and characters of which bytes are
    missing, wait until it is known what they are.

    Attributes:
        ended: an EOS or a stop string has come; further tokens are ignored.
        text: what has been passed on so far; all of the text after `end()`.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        end_ids: Collection[int],
        stop: Sequence[str] = (),
        write: Callable[[str], None] | None = None,
    ) -> None:
        """
        Args:
            decode: the tokenizer's, special tokens left out.
            end_ids: ids of EOS.
            stop: texts that end the text.
            write: called with each piece of text, none of them empty.
        """
        self._decode, self._end_ids, self._stop, self._write = decode, frozenset(end_ids), tuple(stop), write
        self.ended = False
        self._pieces: list[str] = []
        # Ids whose text is not complete yet, and how many characters of it are; those before them, for decoders to which
        # the beginning of a text is special, and their text's length.
        self._waiting: list[int] = []
        self._taken = 0
        self._context: list[int] = []
        self._context_length = 0
        self._held = ""  # characters that may begin a stop string

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def put(self, index: int) -> None:
        """The next token."""
        if self.ended:
            return
        if index in self._end_ids:
            self.ended = True
            return
        self._waiting.append(index)
        text = self._waiting_text()
        complete = text.rstrip(REPLACEMENT)
        self._pass_on(complete[self._taken :])
        self._taken = max(self._taken, len(complete))
        if text and len(complete) == len(text):
            self._context, self._waiting, self._taken = self._waiting, [], 0
            self._context_length = len(self._decode(self._context))

    def end(self) -> str:
        """No more tokens will come: pass on what waited. Returns the whole text."""
        rest, self._waiting = self._waiting_text()[self._taken :] if self._waiting else "", []
        self._pass_on(rest)
        self._emit(self._held)
        self._held, self.ended = "", True
        return self.text

    def _waiting_text(self) -> str:
        return self._decode([*self._context, *self._waiting])[self._context_length :]

    def _pass_on(self, piece: str) -> None:
        self._held += piece
        found = [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self._emit(self._held[: min(found)[1]])
            self._held, self._waiting, self.ended = "", [], True
            return
        longest = min(max(map(len, self._stop), default=1) - 1, len(self._held))
        keep = next((n for n in range(longest, 0, -1) if any(s.startswith(self._held[-n:]) for s in self._stop)), 0)
        ready = len(self._held) - keep
        self._emit(self._held[:ready])
        self._held = self._held[ready:]

    def _emit(self, piece: str) -> None:
        if piece:
            self._pieces.append(piece)
            if self._write is not None:
                self._write(piece)
