"""Read the docstrings of the standard library and of some dependencies, a text that every installation has.

Each module is one document: its docstrings in source order. Modules are parsed, not imported, and test modules are skipped. Classes often
repeat a docstring of another module, which may be in another split. So near-duplicates of earlier docstrings are dropped.
"""

import ast
import importlib.metadata
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from resmem_lm.text.duplicates import Signatures

# A fixed list, so that a new dependency does not change the text and with it the results of the demo.
# fmt: off
PACKAGES = (
    "apache-beam", "backports.zstd", "beartype", "faiss-cpu", "filelock", "flax", "gin-config", "grain", "jax", "jaxtyping", "jinja2",
    "matplotlib", "numba", "numpy", "optax", "orbax-checkpoint", "packaging", "rensa", "rich", "sentencepiece", "tensorboardX",
    "universal-pathlib",
)
# fmt: on
_TEST_FOLDERS = {"test", "tests", "testing", "idle_test"}


def _is_test(path: Path) -> bool:
    return bool(_TEST_FOLDERS.intersection(path.parts)) or path.stem.startswith("test_") or path.stem.endswith("_test")


def module_files() -> Iterator[tuple[str, Path]]:
    """Yield (document id, path) of every module of the standard library and of `PACKAGES`."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        inside = path.relative_to(library)
        if not {"site-packages", "dist-packages"}.intersection(inside.parts) and not _is_test(inside):
            yield f"python/{inside}", path
    for package in PACKAGES:
        distribution = importlib.metadata.distribution(package)
        for file in sorted(distribution.files or []):
            if file.suffix == ".py" and ".." not in file.parts and not _is_test(Path(file)):
                yield str(file), Path(str(distribution.locate_file(file)))


def _docstrings(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    # Visit statements only. ast.walk visits every expression, which takes ten times as long.
    yield ast.get_docstring(node) or ""
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child)


def module_docstrings(path: Path) -> list[str]:
    """Return the non-empty docstrings of a source file in order. Return an empty list if this Python version cannot parse it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other projects' code
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return []
    # UTF-8 cannot encode half of a surrogate pair.
    return [text.encode(errors="replace").decode() for text in _docstrings(tree) if text]


def documents(*, duplicate_threshold: float) -> Iterator[tuple[str, str]]:
    """Yield (id, text) of every module that has docstrings, without near-duplicate docstrings."""
    signatures = Signatures(duplicate_threshold)
    for name, path in module_files():
        if kept := [text for text in module_docstrings(path) if signatures.add_new(text)]:
            yield name, "\n\n".join(kept)
