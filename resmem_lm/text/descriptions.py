"""Descriptions, mostly READMEs, of the installed packages: a text that every installation has."""

import importlib.metadata
from collections.abc import Iterator


def documents() -> Iterator[tuple[str, str]]:
    """Yield (name, description) of every installed distribution with a description, sorted by name."""
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        metadata = distribution.metadata.json
        name, text = str(metadata.get("name") or ""), str(metadata.get("description") or "")
        # Older versions of setuptools write "UNKNOWN" for no description. Python imports the first of two distributions of one name.
        if name and text.strip() not in ("", "UNKNOWN"):
            # A UTF-8 file cannot hold half of a surrogate pair.
            found.setdefault(name, text.encode(errors="replace").decode())
    yield from sorted(found.items())
