"""How does a student's function get into the finished engine?

`using(attention_np=mine)` puts it wherever the package's own is bound: in the module that defines
it, in every module that has imported it, and in classes that hold it as a static method. When the
block ends, also through an exception, everything is as it was.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

from ..errors import InputError
from .exercises import all_exercises

# The engine calls a faster form where there is one. It has the same contract, so it gives way
# too: else a student's function would be plugged in, and never be called.
FASTER_FORMS = {
    "attention_torch": ["attention_sdpa"],
    "masked_attention_torch": ["masked_attention_sdpa"],
    "rms_norm_torch": ["rms_norm_fused"],
    "rope_torch": ["rope_fused"],
    "bpe_encode": ["bpe_encode_fast"],
}


@dataclass
class Plugged:
    """A function or class that stands in the place of the package's own."""

    thing: object
    calls: int = 0


@contextmanager
def using(**replacements):
    """Run the engine on other functions; yields {name: Plugged}, whose `calls` count.

        with minillm.course.using(attention_np=my_attention) as plugged:
            print(llm.generate(["Once upon a time"])[0].text)
        print(plugged["attention_np"].calls)

    Names are those of exercises and of their PyTorch twins. Blocks may be nested. Not for several
    threads: the whole process sees the change. Inside, `minillm.attention.attention_np` *is* your
    function, so one that calls the original must have imported it by name before.
    Which functions an LLM calls depends on its loop: KVCache, and attention_np for every token,
    belong to LLM(batching="none"); the functions of chapter 08 to "static", those of chapters 09
    and 10 to "continuous". Note that NumPy's KVCache calls attention_np for up to 2**18 scores a
    head, and online_softmax_attention_np beyond; they have one contract, so either can stand for
    both. And paged_gather_torch is called only where no kernel reads the blocks in place.
    """
    homes = _homes()
    for name, thing in replacements.items():
        if name not in homes:
            close = difflib.get_close_matches(name, homes, n=1)
            advice = f"did you mean {close[0]}?" if close else f"choose from {', '.join(homes)}"
            raise InputError(f"{name} is no exercise: {advice}")
        if not callable(thing):
            raise InputError(f"{name} is to be replaced by {thing!r}, which cannot be called")
    plugged = {name: Plugged(thing) for name, thing in replacements.items()}
    undo = []
    try:
        for name, entry in plugged.items():
            for target in (name, *FASTER_FORMS.get(name, [])):
                # A new object each time: undoing looks for it, and can meet nothing else.
                stand_in = _counted(entry)
                undo.append((stand_in, getattr(homes[name], target)))
                _replace_everywhere(undo[-1][1], stand_in)
        yield plugged
    finally:
        for stand_in, original in reversed(undo):
            _replace_everywhere(stand_in, original)


def _homes():
    """{name: the module that defines it}, of every exercise and every twin."""
    homes = {}
    for each in all_exercises():
        homes[each.name] = each.module
        if each.twin_name:
            homes[each.twin_name] = each.module
    return homes


def _counted(entry):
    """entry.thing, which counts its calls (a class: its objects) in entry.calls."""
    thing = entry.thing
    if inspect.isclass(thing):
        class Counted(thing):
            def __init__(self, *args, **kwargs):
                entry.calls += 1
                super().__init__(*args, **kwargs)

        return Counted

    @functools.wraps(thing)
    def counted(*args, **kwargs):
        entry.calls += 1
        return thing(*args, **kwargs)

    return counted


def _replace_everywhere(old, new):
    for name, module in list(sys.modules.items()):
        if module is not None and name.partition(".")[0] == "minillm":
            _replace_in(module, old, new)


def _replace_in(owner, old, new):
    for name, value in list(vars(owner).items()):
        # By type(), because isinstance() asks the value itself, and a lazy torch would load.
        if value is old:
            setattr(owner, name, new)
        elif type(value) is staticmethod and value.__func__ is old:
            setattr(owner, name, staticmethod(new))
        elif type(owner) is ModuleType and issubclass(type(value), type) \
                and value.__module__ == owner.__name__:
            _replace_in(value, old, new)
