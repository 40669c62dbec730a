"""Read the descriptions (mostly READMEs) of the installed packages, a text that every installation has."""

import importlib.metadata
from collections.abc import Iterator


def documents() -> Iterator[tuple[str, str]]:
    """Yield (name, description) of every installed distribution that has a description, in order of names."""
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        metadata = distribution.metadata.json
        name, text = str(metadata.get("name") or ""), str(metadata.get("description") or "")
        # Older versions of setuptools write "UNKNOWN" if there is no description.
        if name and text.strip() not in ("", "UNKNOWN"):
            # If two distributions have the same name, Python imports the first. UTF-8 cannot encode half of a surrogate pair.
            found.setdefault(name, text.encode(errors="replace").decode())
    yield from sorted(found.items())
