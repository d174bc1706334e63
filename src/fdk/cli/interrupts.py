"""Signals that end a command."""

from __future__ import annotations

import signal

# Numbers of the signals that came. Kept, because torch may make a ValueError of what a handler raises.
seen: list[int] = []


def _interrupt(number: int, frame: object) -> None:
    seen.append(number)
    raise KeyboardInterrupt


def install() -> None:
    """A terminated process cleans up as an interrupted one does."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
