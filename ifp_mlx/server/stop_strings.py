"""Stop strings, matched in the text: tokens' borders often lie elsewhere."""


class StopStrings:
    """Cuts streamed text where one of some strings begins, wherever the tokens' borders are."""

    def __init__(self, stops: tuple[str, ...]):
        self._stops = stops
        self._held = ""  # the end of the text so far, which may be the beginning of a stop

    def feed(self, text: str) -> tuple[str, bool]:
        """Return the text that is certain to stay, and whether a stop string was met."""
        text = self._held + text
        found = [
            (start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0
        ]
        if found:  # the one that is complete first: what follows must not matter
            self._held = ""
            return text[: min(found)[1]], True
        kept = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept], False

    def flush(self) -> str:
        """Return what was held back; the text is over."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of ``text`` begin ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
