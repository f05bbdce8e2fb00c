"""What is a student asked to write? Whatever carries this mark.

The package is the solution: a chapter's starter is made from the marked function's signature and
docstring, and the student's function takes its place in the engine (`course/`). The mark is an
attribute and nothing else, so that the function stays what it is: its source, its speed, its name.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mark:
    """chapter: "04_attention".   order: its place among the chapter's exercises."""

    chapter: str
    order: int


def exercise(chapter, order=0):
    """Mark a function or a class as an exercise of a chapter.

    Exercises of one file need no `order`: they are met in the order in which they stand there.

    >>> @exercise("04_attention")
    ... def attention_np(q, k, v): ...
    >>> attention_np.exercise
    Mark(chapter='04_attention', order=0)
    """
    def mark(thing):
        thing.exercise = Mark(chapter, order)
        return thing

    return mark
