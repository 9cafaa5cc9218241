"""SIGTERM and Ctrl-C, kept back while something must be finished first."""

import signal
import threading
from types import FrameType
from typing import Any


class Signals:
    """SIGTERM and Ctrl-C, kept until the step in hand is finished and saved. A second one is not kept."""

    def __init__(self) -> None:
        self.number = 0
        self._former: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        # Python lets the main thread alone handle signals.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former[number] = signal.signal(number, self._keep)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former = {}

    def _keep(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            self.__exit__()
            signal.raise_signal(number)
        self.number = number

    def pass_on(self) -> None:
        """To whoever handled them before, now that the run is saved."""
        if self.number:
            signal.raise_signal(self.number)
            raise KeyboardInterrupt
