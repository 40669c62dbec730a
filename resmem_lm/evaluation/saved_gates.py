"""Save the fitted gates of a work directory, and load them for texts that are not part of it."""

import io
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epy

from resmem_lm.errors import UserError
from resmem_lm.evaluation.adaptive import Adaptive, Gate
from resmem_lm.evaluation.features import FEATURES, Features
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import Record, write_bytes

with epy.lazy_imports():
    from resmem_lm.evaluation import gate_network


def _features_of(sources: list[str]) -> Record:
    """Return the names of a gate's features, as JSON has them."""
    value: Record = json.loads(json.dumps({source: FEATURES.get(source) for source in ("deepnet", *sources)}))
    return value


def save_gates(run: Run, methods: dict[str, Adaptive]) -> None:
    """Write WORKDIR/gates.npz: for each method the arrays of its gate, its bandwidth, and the names of its features."""
    arrays: dict[str, np.ndarray] = {}
    facts: Record = {}
    for name, (gate, sigma, sources) in methods.items():
        facts[name] = {"sigma": sigma, "sources": sources, "features": _features_of(list(sources))}
        arrays |= {f"{name}/{number}": np.asarray(leaf) for number, leaf in enumerate(jax.tree.leaves(gate))}
    content = io.BytesIO()
    arrays["facts"] = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    np.savez(content, **arrays)  # type: ignore[arg-type]
    write_bytes(run.gates, content.getvalue())


def load_gate(run: Run, name: str) -> Adaptive:
    """Return the gate of a method. Raise UserError if there is none, or if it was fitted with other features."""
    fix = f"delete {run.results} and {run.record_path('evaluate')}, and run `resmem evaluate`"
    if not run.gates.exists():
        raise UserError(f"{run.gates} is missing: {fix}")
    with np.load(io.BytesIO(run.gates.read_bytes()), allow_pickle=False) as saved:
        facts = json.loads(saved["facts"].tobytes()).get(name)
        if facts is None:
            raise UserError(f"{run.gates} has no gate of {name}: {fix}")
        if facts["features"] != _features_of(facts["sources"]):
            raise UserError(f"{run.gates} was fitted with other features: {fix}")
        of_column, of_query = (sum(len(FEATURES[source][place]) for source in facts["features"]) for place in (0, 1))
        empty = Features(jnp.zeros(of_column), jnp.zeros(of_query))
        structure: Any = jax.tree.structure(Gate(gate_network.initial_weights(of_column, of_query, 0), empty, empty))
        leaves = [saved[f"{name}/{number}"] for number in range(structure.num_leaves)]
    return Adaptive(jax.tree.unflatten(structure, leaves), facts["sigma"], tuple(facts["sources"]))
