"""The files that students fill in, made from the package: signature and docstring, no body.

What a starter imports: whatever signatures and docstrings speak of, whole modules that the
solution uses (`np`, `math`), and those functions of the package that it may call. What the
solution takes from elsewhere by name (`heappush`, say) is its own idea, and is left out.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import re
import textwrap
from pathlib import Path

from ..errors import InputError
from .exercises import all_exercises, course_folder, exercises_of, starter_path
from .submission import defined_names, is_unfilled, parse_submission

HEADER = '''\
{title}

Write code in the place of each `raise NotImplementedError`; the docstring says what it has to do,
and the README beside this file tells the story. Then, from the folder that holds chapters/:

    python -m minillm grade {number}
    python -m minillm generate "Once upon a time" --temperature 0 {flags}\\
        --impl chapters/{chapter}/exercise.py

The first says which checks pass, and what is wrong. The second writes text with the whole engine,
in which your functions have taken the place of its own.{twins}
{letters}"""

from __future__ import annotations
'''

GENERATE_FLAGS = {"11_quantization": "--quantize int4 "}  # without it, nothing would call them

LETTERS = {  # the README's table of shapes
    "B": "sequences", "T": "new tokens of one sequence",
    "S": "visible tokens, cached and new", "N": "flattened new tokens of a whole batch",
    "C": "hidden size", "F": "feed-forward size", "H": "query heads", "K": "key/value heads",
    "D": "head dimension", "V": "vocabulary", "L": "layers", "G": "quantization group",
}


def write_starters():
    """(Re)write the starter of every chapter that has a folder; -> their paths.

    Raises InputError, and writes nothing, if somebody's work would be lost.
    """
    folder = course_folder()
    chapters = dict.fromkeys(each.chapter for each in all_exercises())
    paths = [starter_path(folder, chapter) for chapter in chapters]
    paths = [path for path in paths if path.parent.is_dir()]
    if not paths:
        raise InputError(f"{folder / 'chapters'} has no folder of a chapter with an exercise")
    for path in filter(Path.exists, paths):
        nodes = defined_names(parse_submission(path))
        if any(node and each.name == name and not is_unfilled(node)
               for name, node in nodes.items() for each in exercises_of(path.parent.name)):
            raise InputError(f"{path} has been filled in: move it away, or it would be lost")
    for path in paths:
        path.write_text(starter(path.parent.name), encoding="utf-8")
    return paths


def starter(chapter):
    """The text of a chapter's exercise.py."""
    exercises = exercises_of(chapter)
    return "\n".join([_header(chapter, exercises), _imports(exercises),
                      "\n\n\n".join(map(_stub, exercises)) + "\n"])


def solution(chapter):
    """The starter with the package's own bodies: what graders must let pass."""
    exercises = exercises_of(chapter)
    parts = [_source_lines(each, keep_bodies=True) for each in exercises]
    return "\n".join(['"""minillm\'s own."""\n\nfrom __future__ import annotations\n',
                      _imports(exercises, keep_bodies=True), "\n\n\n".join(parts) + "\n"])


def _header(chapter, exercises):
    twins = [each.twin_name for each in exercises if each.twin_name]
    extra = "" if not twins else (
        f" Done? Write {_listed(twins)} below, in PyTorch, and the same checks run on them.")
    used = {letter for each in exercises
            for shape in re.findall(r"\[([^\]]*)\]", _stub(each))
            for letter in re.findall(r"\b[A-Z]\b", shape)}
    letters = " · ".join(f"{letter} {LETTERS[letter]}" for letter in LETTERS if letter in used)
    text = HEADER.format(
        chapter=chapter, number=chapter.partition("_")[0], twins="\0",
        flags=GENERATE_FLAGS.get(chapter, ""),
        title=textwrap.fill(f'"""Exercise of chapter {chapter}: write '
                            f"{_listed([each.name for each in exercises])}.", 99),
        letters="\n" + textwrap.fill(f"Shapes: {letters}.", 99) + "\n" if letters else "")
    last = "in which your functions have taken the place of its own.\0"
    return text.replace(last, textwrap.fill(last.removesuffix("\0") + extra, 99))


def _listed(names):
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _stub(each):
    return _source_lines(each, keep_bodies=False)


def _source_lines(each, keep_bodies):
    """The exercise's source without its mark, and without its bodies if they are not to be kept."""
    source = inspect.getsource(each.reference)
    lines, node = source.splitlines(), ast.parse(source).body[0]
    decorators = [line for decorator in node.decorator_list
                  if not ast.unparse(decorator).startswith("exercise(")
                  for line in lines[decorator.lineno - 1 : decorator.end_lineno]]
    if keep_bodies:
        return "\n".join([*decorators, *lines[node.lineno - 1 : node.end_lineno]])
    if isinstance(node, ast.ClassDef):
        return "\n".join([*decorators, *_class_stub(lines, node)])
    return "\n".join([*decorators, *_function_stub(lines, node, each.name)])


def _function_stub(lines, node, name):
    """Signature and docstring, as they are written, and the line that is to be replaced."""
    head = [line for line in lines[node.lineno - 1 : _end_of_head(node)]
            if not line.lstrip().startswith("#")]
    indent = " " * (node.col_offset + 4)
    return [*head, f'{indent}raise NotImplementedError("{name} is yours to write")']


def _class_stub(lines, node):
    """Docstring and fields, then the public methods, each to be written."""
    out = lines[node.lineno - 1 : _end_of_head(node)]
    for child in node.body:
        if isinstance(child, ast.AnnAssign):
            out += lines[child.lineno - 1 : child.end_lineno]
        elif isinstance(child, ast.FunctionDef) and (
                child.name == "__init__" or not child.name.startswith("_")):
            first = min([child, *child.decorator_list], key=lambda part: part.lineno).lineno
            out += ["", *lines[first - 1 : child.lineno - 1],
                    *_function_stub(lines, child, f"{node.name}.{child.name}")]
    return out


def _end_of_head(node):
    """The last line of the docstring; where there is none, the line before the body."""
    first = node.body[0]
    return first.end_lineno if ast.get_docstring(node) is not None else first.lineno - 1


def _imports(exercises, keep_bodies=False):
    """The import statements that the exercises of a chapter need, sorted as ruff sorts them."""
    whole, standard, package = set(), {}, {}
    own = {each.name for each in exercises}
    if any(name.endswith("_np") for name in own):  # also where our own body gets by without
        whole.add("import numpy as np")
    for each in exercises:
        module_tree = ast.parse(inspect.getsource(each.module))
        named = _names_in(_source_lines(each, keep_bodies=False))
        body = _names_in(_source_lines(each, keep_bodies=True))
        for name in (named | body) - own - set(dir(builtins)):
            value = vars(each.module).get(name)
            origin = _origin(module_tree, name)
            if value is None or name == "torch":
                continue
            if inspect.ismodule(value):
                whole.add(origin)
            elif origin and not origin[0].startswith("."):
                if keep_bodies or name in named:
                    standard.setdefault(origin[0], set()).add(name)
            else:
                home = "minillm" + origin[0] if origin else each.module.__name__
                package.setdefault(home, set()).add(name)
    third_party = [line for line in whole if "numpy" in line]
    groups = [
        sorted(whole - {*third_party}) + _from_lines(standard), sorted(third_party),
        _from_lines(package),
    ]
    return "\n".join(f"{line}\n" if line == group[-1] else line
                     for group in groups for line in group) + ("\n" if any(groups) else "")


def _names_in(source):
    """Every name that a piece of source speaks of, the examples in its docstrings included."""
    trees = [ast.parse(source)]
    for node in ast.walk(trees[0]):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            examples = re.findall(r"^\s*(?:>>>|\.\.\.) (.*)$", ast.get_docstring(node) or "", re.M)
            trees.append(ast.parse("\n".join(examples)))
    return {node.id for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Name)}


def _origin(tree, name):
    """How a module came by a name: "import numpy as np", (".linear", name), or None: its own."""
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    if isinstance(node, ast.Import):
                        return ast.unparse(ast.Import([alias]))
                    return "." * node.level + (node.module or ""), name
    return None


def _from_lines(names_by_module):
    lines = []
    for module, names in sorted(names_by_module.items()):
        # As ruff sorts: constants, then classes, then functions.
        ordered = sorted(names, key=lambda name: (not name.isupper(), name[0].islower(), name))
        line = f"from {module} import {', '.join(ordered)}"
        if len(line) > 100:
            line = f"from {module} import (\n" + "".join(f"    {n},\n" for n in ordered) + ")"
        lines.append(line)
    return lines
