"""A second text that every installation has: the descriptions (mostly READMEs) of the installed packages, one document each."""

import importlib.metadata
from collections.abc import Iterator


def documents() -> Iterator[tuple[str, str]]:
    """(name, description) of every installed distribution, by name; those without are left out."""
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        facts = distribution.metadata.json
        name, text = str(facts.get("name") or ""), str(facts.get("description") or "")
        # "UNKNOWN" is what older setuptools wrote for none. Of two of one name, Python imports the first.
        if name and text.strip() not in ("", "UNKNOWN"):
            # No file can hold half of a surrogate pair.
            found.setdefault(name, text.encode(errors="replace").decode())
    yield from sorted(found.items())
