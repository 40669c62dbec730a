import textwrap
from pathlib import Path

import pytest

from resmem_lm.text import docstrings
from resmem_lm.text.docstrings import module_docstrings, module_files

SOURCE = '''
"""Module."""

VARIABLE = 1
"""Not a docstring: it follows a variable."""


class Outer:
    """Class."""

    def method(self):
        """Method,

        with an indented body.
        """

        class Inside:
            """Class in a method."""

    class Inner:
        """Class in a class."""

        async def coroutine(self):
            """Async method."""

            def nested():
                """Function in an async method."""


@decorator
def function():
    """Function."""
    "another string"
    return """no docstring"""


def undocumented():
    def documented():
        """Documented in an undocumented one."""


def empty():
    """   """


def bytes_and_formatted():
    b"""bytes"""
    f"""formatted"""
'''


def write(path, source):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(source), encoding="utf-8")
    return path


def test_docstrings_are_found_at_every_depth_in_the_order_of_the_source(tmp_path):
    assert module_docstrings(write(tmp_path / "a.py", SOURCE)) == [
        "Module.",
        "Class.",
        "Method,\n\nwith an indented body.",
        "Class in a method.",
        "Class in a class.",
        "Async method.",
        "Function in an async method.",
        "Function.",
        "Documented in an undocumented one.",
    ]


@pytest.mark.parametrize(
    "content",
    [b"", b"x = 1", b"def broken(:", b'"""Python 2"""\nprint "x"\n', b'"""nul"""\n\0', b'# coding: nonsense\n"""x"""', b'"""\xff"""'],
)
def test_a_file_that_does_not_parse_or_has_no_docstrings_gives_none(tmp_path, content):
    path = tmp_path / "a.py"
    path.write_bytes(content)
    assert module_docstrings(path) == []


def test_a_file_that_cannot_be_opened_gives_none(tmp_path):
    assert module_docstrings(tmp_path / "missing.py") == []
    assert module_docstrings(tmp_path) == []


def test_invalid_escapes_do_not_warn(tmp_path):
    assert module_docstrings(write(tmp_path / "a.py", '"""A \\d digit."""\n')) == ["A \\d digit."]


def test_declared_encodings_are_used(tmp_path):
    path = tmp_path / "a.py"
    path.write_bytes('# -*- coding: latin-1 -*-\n"""Café"""\n'.encode("latin-1"))
    assert module_docstrings(path) == ["Café"]


def test_a_docstring_can_always_be_written_as_utf_8(tmp_path):
    assert module_docstrings(write(tmp_path / "a.py", r'"""Half of a pair: \ud83d"""')) == ["Half of a pair: ?"]


WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau upsilon phi chi psi omega"


def test_a_module_is_one_document_without_near_duplicate_docstrings(tmp_path, monkeypatch):
    reverse = " ".join(reversed(WORDS.split()))
    modules = {
        "first": f'"""{WORDS}"""\ndef f():\n    """Another docstring."""\n',
        "nothing": "x = 1\n",
        "only_repeated": f'"""{WORDS}, ending differently"""\n',
        "partly_repeated": f'"""{reverse}"""\ndef f():\n    """{WORDS}"""\ndef g():\n    """The last one."""\n',
    }
    files = [(name, write(tmp_path / f"{name}.py", source)) for name, source in modules.items()]
    monkeypatch.setattr(docstrings, "module_files", lambda: iter(files))
    assert list(docstrings.documents(duplicate_threshold=0.7)) == [
        ("first", f"{WORDS}\n\nAnother docstring."),
        ("partly_repeated", f"{reverse}\n\nThe last one."),
    ]


def test_no_modules_give_no_documents(monkeypatch):
    monkeypatch.setattr(docstrings, "module_files", lambda: iter([]))
    assert list(docstrings.documents(duplicate_threshold=0.7)) == []


def test_the_installation_has_modules_of_python_and_of_dependencies_but_no_tests():
    files = dict(module_files())
    assert {"python/argparse.py", "python/json/__init__.py", "flax/linen/linear.py", "jax/__init__.py"} <= files.keys()
    assert all(path.is_file() for path in list(files.values())[::100])
    folders = {folder for name in files for folder in Path(name).parts}
    assert not folders & {"test", "tests", "testing", "site-packages", "idle_test"}
    assert not [name for name in files if Path(name).name.startswith("test_")]
    assert not [name for name in files if name.startswith(("pytest", "hypothesis", "tensorflow"))]
