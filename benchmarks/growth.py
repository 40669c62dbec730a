"""Measure peak memory and time of build, index and search for growing numbers of rows. Memory must stay bounded and time grow linearly.

    python -m benchmarks.growth [--rows 100_000 ... 10_000_000] [--index_memory_gib=1.5] [--folder=...]

The text is synthetic and the model tiny (keys of 64 numbers); each stage runs in a process of its own. Memory is the peak of RssAnon of a
process and its children, read every 50 ms. Pages of mapped files have their own column, because the system frees them when another
program needs memory. Takes half an hour on 2 cores and 4 GB of disk.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from resmem_lm.planning.machine import processor
from resmem_lm.workdir.storage import read_json
from tests.tiny import CONFIG

SETTINGS = """
ModelConfig.emb_dim = 64
ModelConfig.head_dim = 32
make_vocabulary.training_lines = 20_000
prepare_documents.validation_fraction = 0.0
prepare_documents.test_fraction = 0.0
prepare_documents.duplicate_threshold = 1.0
STEPS = 10
train.cooldown_steps = 5
search.neighbors = 50
evaluate.ks = (8, 50)
evaluate.sigmas = (1.0,)
evaluate.temperatures = (1.0,)
"""
STAGES = ("build", "index", "search")
ROWS_OF_SHARD = 100_000
CHARACTERS_OF_TOKEN = 4.3


def write_text(path: Path, tokens: int) -> None:
    """Write documents of random sentences, about 170 tokens each."""
    rng = random.Random(0)
    words = ["array", "shard", "query", "token", "window", "index", "model", "row", "returns", "reads", "writes", "finds", "merges", "of"]
    with path.open("w", encoding="utf-8") as file:
        written = 0
        while written < tokens * CHARACTERS_OF_TOKEN:
            text = " ".join(rng.choice(words) + (str(rng.randrange(1000)) if rng.random() < 0.3 else "") for _ in range(120))
            file.write(json.dumps({"text": text}) + "\n")
            written += len(text)


def held(pid: int) -> tuple[int, int]:
    """Return the bytes that a process and its children hold: own memory, and mapped files."""
    own = mapped = 0
    try:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("Rss"))
        own, mapped = (int(status[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))
        children = [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]
    except (OSError, KeyError, ValueError):
        return own, mapped
    parts = [held(child) for child in children]
    return own + sum(part[0] for part in parts), mapped + sum(part[1] for part in parts)


def run(command: str, folder: Path, *extra: str) -> tuple[int, int]:
    """Run a command; return its peak bytes of own memory and of mapped files."""
    arguments = ["--gin_file", str(folder / "growth.gin"), f"--workdir={folder / 'run'}", *extra]
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen([sys.executable, "-m", "resmem_lm", command, *arguments], stdout=log, stderr=log)
        own = mapped = 0
        while process.poll() is None:
            now = held(process.pid)
            own, mapped = max(own, now[0]), max(mapped, now[1])
            time.sleep(0.05)
    if process.returncode:
        raise RuntimeError(f"{command} failed: {(folder / 'log').read_text()[-2000:]}")
    return own, mapped


def fitted(rows: np.ndarray, seconds: np.ndarray) -> str:
    """Return the formula seconds = a + c * rows^b with the least relative error over a grid of exponents b."""
    fits = []
    for exponent in np.arange(0.5, 1.6, 0.01):
        design = np.stack([np.ones_like(rows), (rows / rows[-1]) ** exponent], axis=1) / seconds[:, None]
        solution, *_ = np.linalg.lstsq(design, np.ones_like(rows), rcond=None)
        fits.append((float(np.sum((design @ solution - 1) ** 2)), exponent, solution[0]))
    error, exponent, constant = min(fits)
    return f"seconds = {constant:.1f} + c * rows^{exponent:.2f} (relative error {np.sqrt(error / len(rows)):.1%})"


def main() -> None:
    """Print the measurements, and the exponents fitted to them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 300_000, 1_000_000, 3_000_000, 10_000_000])
    parser.add_argument("--index_memory_gib", type=float, default=1.5)
    parser.add_argument("--folder", help="for temporary files, instead of the system's temporary folder")
    options = parser.parse_args()
    print(f"{processor()}, {os.cpu_count()} cores; memory of an index build: {options.index_memory_gib:g} GiB")
    print(f"{'rows':>11}  {'index shards':>12}  " + "".join(f"{name:>8} s {'own MB':>8} {'mapped':>8}  " for name in STAGES))
    found: list[tuple[int, list[float]]] = []
    for tokens in options.rows:
        with tempfile.TemporaryDirectory(prefix="resmem-growth-", dir=options.folder) as name:
            folder = Path(name)
            write_text(folder / "text.jsonl", tokens)
            shards = max(1, tokens // ROWS_OF_SHARD)
            text = f"prepare_documents.text = '{folder / 'text.jsonl'}'\nprepare_documents.shards = {shards}\n"
            (folder / "growth.gin").write_text(CONFIG + SETTINGS + text)
            run("train", folder)
            memory = [run("build", folder)]
            memory.append(run("index", folder, f"--index_memory_gib={options.index_memory_gib}"))
            memory.append(run("evaluate", folder))
            records = [read_json(folder / "run" / "stages" / f"{stage}.json") for stage in STAGES]
            seconds = [record["seconds"] for record in records]
            found.append((records[0]["result"]["rows"], seconds))
            cells = "".join(f"{s:10.1f} {own / 1e6:8.0f} {mapped / 1e6:8.0f}  " for s, (own, mapped) in zip(seconds, memory, strict=True))
            print(f"{found[-1][0]:11,}  {len(records[1]['result']['shards']):12}  {cells}", flush=True)
    if len(found) > 2:
        rows = np.array([row for row, _ in found], float)
        for number, name in enumerate(STAGES):
            print(f"{name}: {fitted(rows, np.array([times[number] for _, times in found]))}")


if __name__ == "__main__":
    main()
