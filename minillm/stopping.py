"""When is an answer over, and how much of its text may be shown already?

A stop string can begin in one token and end in another, so text that may turn out to be the
beginning of one is held back until the next token decides. Chapter 06_sampling tells the story.
"""

from __future__ import annotations


class StopStrings:
    """Text in as it comes, text out as soon as no stop string can claim it.

    >>> stop = StopStrings(("###",))
    >>> stop.feed("Yes. #"), stop.feed("1! ##"), stop.feed("# And")
    ('Yes. ', '#1! ', '')
    >>> stop.found
    '###'
    """

    def __init__(self, stop: tuple[str, ...]):
        self.stop = stop
        self.held = ""
        self.found = None  # the stop string that ended the text

    def feed(self, piece, may_stop=True):
        """-> the text that may be shown now. After `found` is set nothing follows.

        The stop string that is complete first wins, of several the longest. may_stop=False lets
        through those that this piece completes.
        """
        text = self.held + piece
        hits = []
        for stop in self.stop if may_stop else ():
            # One that was complete in what is held had been let through.
            start = text.find(stop, max(0, len(self.held) + 1 - len(stop)))
            if start >= 0:
                hits.append((start + len(stop), start, stop))
        if hits:
            _, start, self.found = min(hits)
            self.held = ""
            return text[:start]
        num_held = self._num_undecided(text)
        self.held = text[len(text) - num_held:]
        return text[: len(text) - num_held]

    def flush(self):
        """-> what was held back; for the end of an answer, when nothing can follow."""
        text, self.held = self.held, ""
        return text

    def _num_undecided(self, text):
        """Length of the longest end of `text` that begins a stop string."""
        longest = min(len(text), max(map(len, self.stop), default=1) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self.stop):
                return length
        return 0
