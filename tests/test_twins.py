"""The NumPy and the torch form of a function must read alike, line by line."""

import ast
from pathlib import Path

import pytest

import minillm

PACKAGE = Path(minillm.__file__).parent

# (file, function): why it has no twin.
ALONE = {
    ("calibration.py", "Watched.matmul_np"): "calibration runs in NumPy, for both backends",
    ("quantized_matmul.py", "KernelMatrix.matmul_torch"): "our own kernel, a faster *.matmul_torch",
    ("quantized_matmul.py", "KernelInt8.rows_torch"): "a faster Int8.rows_torch",
    ("quantized_matmul.py", "KernelInt4.rows_torch"): "a faster Int4.rows_torch",
    ("linear.py", "PackedDense.matmul_torch"): "oneDNN's layout, a faster Dense.matmul_torch",
    # Operators of PyTorch, each a faster form of a class that has both; NumPy has none for bytes.
    ("quantized_linear.py", "PackedInt8.matmul_torch"): "a faster Int8.matmul_torch",
    ("quantized_linear.py", "PackedInt8.rows_torch"): "those of the Int8 that it holds",
    ("quantized_linear.py", "PackedInt4.matmul_torch"): "a faster Int4.matmul_torch",
    ("quantized_linear.py", "PackedInt4.rows_torch"): "those of the Int4 that it holds",
    ("quantized_linear.py", "PackedInt8Groups.matmul_torch"): "a faster Int8.matmul_torch",
}


def functions(path):
    """Every function and method of a file, by qualified name, in order."""
    found = {}

    def visit(node, prefix):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                visit(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.FunctionDef):
                found[prefix + child.name] = child

    visit(ast.parse(path.read_text()), "")
    return found


def pairs():
    for path in sorted(PACKAGE.rglob("*.py")):
        found = functions(path)
        for name in found:
            stem, _, ending = name.rpartition("_")
            if ending in ("np", "torch") and (path.name, name) not in ALONE:
                yield pytest.param(path, f"{stem}_np", f"{stem}_torch", id=f"{path.stem}:{name}")


def assigned_names(function):
    return [node.id for node in ast.walk(function)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]


def used_names(function):
    return {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}


@pytest.mark.parametrize("path, name_np, name_torch", list(pairs()))
def test_twins_read_alike(path, name_np, name_torch):
    found = functions(path)
    assert name_np in found and name_torch in found, "a twin is missing"
    names = list(found)
    assert names.index(name_torch) == names.index(name_np) + 1, "torch stands right below NumPy"
    twin_np, twin_torch = found[name_np], found[name_torch]
    assert ast.dump(twin_np.args) == ast.dump(twin_torch.args), "the parameters differ"
    assert assigned_names(twin_np) == assigned_names(twin_torch), "the steps differ"
    assert "torch" not in used_names(twin_np), "torch in the NumPy twin"
    assert "np" not in used_names(twin_torch), "NumPy in the torch twin"


def test_the_rule_has_something_to_hold():
    assert len(list(pairs())) >= 30
    names = {(path.name, name) for path in PACKAGE.rglob("*.py") for name in functions(path)}
    assert names.issuperset(ALONE), "an exemption for a function that is gone"
