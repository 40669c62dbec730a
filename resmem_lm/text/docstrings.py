"""The text that every installation has: docstrings of the standard library and of our direct dependencies.

One module is one document: its docstrings in the order of the source. They are found with `ast`; nothing is
imported. Test modules are left out. A docstring that is nearly the same as one seen before is dropped, because
a sibling class in another module (in another split, perhaps) often repeats it word for word.
"""

import ast
import importlib.metadata
import inspect
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

from resmem_lm.text.duplicates import mark_duplicates

TEST_FOLDERS = {"test", "tests", "testing", "idle_test"}


def _is_test(path: Path) -> bool:
    return bool(TEST_FOLDERS.intersection(path.parts)) or path.stem.startswith("test_") or path.stem.endswith("_test")


def module_files() -> Iterator[tuple[str, Path]]:
    """(document id, path) of every module of the standard library and of this package's direct dependencies."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        inside = path.relative_to(library)
        if not {"site-packages", "dist-packages"}.intersection(inside.parts) and not _is_test(inside):
            yield f"python/{inside}", path
    for line in sorted(importlib.metadata.requires("resmem_lm") or []):
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        distribution = importlib.metadata.distribution(requirement.name)
        for file in sorted(distribution.files or []):
            if file.suffix == ".py" and ".." not in file.parts and not _is_test(Path(file)):
                yield str(file), Path(str(distribution.locate_file(file)))


def _docstrings(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    # Constants of a block's first statement only: ast.walk would visit every expression, ten times the work.
    first = node.body[0] if node.body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        yield inspect.cleandoc(first.value.value)
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child)


def module_docstrings(path: Path) -> list[str]:
    """The non-empty docstrings of one source file, in order; none if this Python cannot parse it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escapes
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return []
    # A docstring may spell half of a surrogate pair, which no file can hold.
    return [text.encode(errors="replace").decode() for text in _docstrings(tree) if text]


def documents(*, duplicate_threshold: float) -> Iterator[tuple[str, str]]:
    """(id, text) of every module with docstrings, near-duplicate docstrings dropped."""
    docstrings = ((name, text) for name, path in module_files() for text in module_docstrings(path))
    labelled = (((name, text), text) for name, text in docstrings)
    current: str | None = None
    kept: list[str] = []
    for (name, text), duplicate in mark_duplicates(labelled, threshold=duplicate_threshold):
        if name != current:
            if current is not None and kept:
                yield current, "\n\n".join(kept)
            current, kept = name, []
        if not duplicate:
            kept.append(text)
    if current is not None and kept:
        yield current, "\n\n".join(kept)
