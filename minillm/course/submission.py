"""A student's file: loaded, or refused in words that say what to do.

Three traps are closed here: a misspelt name (the package's own function would be graded instead),
a file that hands our own function back, and a starter that is not filled in yet.

A submission is one file. It is run, with all that it says outside of functions.
"""

from __future__ import annotations

import ast
import difflib
import linecache
import sys
import traceback
from pathlib import Path
from types import ModuleType

from ..errors import InputError

MODULE_NAME = "submission"  # what __module__ of everything that a student wrote says


def find_submission(path):
    """The file of a submission: itself, or the exercise.py in a folder."""
    path = Path(path)
    if path.is_dir():
        path = path / "exercise.py"
    if not path.is_file():
        raise InputError(f"{path} is not there: name the file with your functions")
    return path.resolve()


def load_submission(path):
    """Run the file as a module.   Raises InputError for whatever keeps it from loading."""
    path = Path(path)
    code = compile(parse_submission(path), str(path), "exec")
    module = ModuleType(MODULE_NAME)
    module.__file__ = str(path)
    sys.modules[MODULE_NAME] = module  # dataclasses and pickle look a class's module up
    try:
        exec(code, vars(module))
    except ModuleNotFoundError as error:
        raise InputError(f"{path.name}{line_of(error, path)}: there is no module {error.name!r}; a "
                         "submission is one file, which may import numpy, torch and "
                         "minillm") from None
    except (Exception, SystemExit) as error:
        raise InputError(f"{path.name} does not load: {describe_error(error, path)}") from None
    return module


def parse_submission(path):
    """The file as a syntax tree, without running it.   Raises InputError if it is not Python."""
    try:
        return ast.parse(Path(path).read_bytes(), str(path))
    except SyntaxError as error:
        line = f": {error.text.strip()}" if error.text else ""
        raise InputError(f"{path.name} line {error.lineno} is not Python ({error.msg}){line}; mend "
                         "that line, or the one above it") from None
    except ValueError as error:  # a NUL byte
        raise InputError(f"{path.name} is not Python: {error}") from None


def defined_names(tree):
    """{name: its node or None} of what the file defines at its top level, by def, class or =."""
    names = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names[node.name] = node
        elif isinstance(node, ast.Assign):
            names.update((target.id, None) for target in node.targets
                         if isinstance(target, ast.Name))
    return names


def handed_in(tree, wanted):
    """Like defined_names. A file that defines none of the names in `wanted` is taken to hand in
    what it imports, and is told that this is not its own; beside own work, imports are tools."""
    names = defined_names(tree)
    if not any(name in names for name in wanted):
        for node in tree.body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names.update((alias.asname or alias.name, None) for alias in node.names)
    return names


def take_function(module, name):
    """What the file calls `name`.   Raises InputError if it is missing, misspelt or not theirs."""
    path = Path(module.__file__)
    thing = vars(module).get(name)
    if thing is None:
        similar = close_name(name, vars(module))
        raise InputError(f"{path.name} has no {name}"
                         + (f": is {similar} misspelt?" if similar else ", which is asked for"))
    if getattr(thing, "__module__", None) != MODULE_NAME or not callable(thing):
        origin = getattr(thing, "__module__", type(thing).__name__)
        raise InputError(f"{name} in {path.name} is not yours, it comes from {origin}: write it "
                         "in this file")
    return thing


def close_name(name, names):
    """The one of `names` that is probably meant by `name`; None if none is similar."""
    return next(iter(difflib.get_close_matches(name, names, n=1, cutoff=0.8)), None)


def is_unfilled(node):
    """True for a def whose body still only raises NotImplementedError, and a class of such."""
    if isinstance(node, ast.ClassDef):
        methods = [child for child in node.body if isinstance(child, ast.FunctionDef)]
        return bool(methods) and all(map(is_unfilled, methods))
    body = [child for child in node.body if not isinstance(child, ast.Expr)]
    return len(body) == 1 and isinstance(body[0], ast.Raise) \
        and "NotImplementedError" in ast.dump(body[0])


def describe_error(error, path):
    """One line: what was raised, and which line of the student's file it came from."""
    message = " ".join(str(error).split())
    text = type(error).__name__ + (f": {message}" if message else "")
    number = _line_number(error, path)
    code = linecache.getline(str(path), number).strip() if number else ""
    return text + line_of(error, path) + (f": {code}" if code else "")


def line_of(error, path):
    number = _line_number(error, path)
    return f" in line {number}" if number else ""


def _line_number(error, path):
    """The innermost line of the student's file on the way to the error; None if there is none."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__)
              if frame.filename == str(path)]
    return frames[-1].lineno if frames else None
