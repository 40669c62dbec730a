"""Check that faults lose nothing: kills, a lost Dask worker, a full disk, changed bytes. Print each fault and its outcome.

    python -m benchmarks.faults [--kills=30] [--bytes=100]

A tiny experiment runs once without a fault, then many times with a fault, each followed by the same command. The outcome must be the same:
every row, every neighbor, every number of results.json, and no file without a record. Takes about 20 minutes on 2 cores. The full disk
needs root (a small tmpfs); Dask needs the extra `dask`. Faults that cannot be tried on this machine are reported.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from etils import epy

import resmem_lm.commands  # noqa: F401 - registers every stage with gin
from resmem_lm.maintenance.verify import verify
from resmem_lm.planning.machine import processor
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import files_below, read_json
from tests.tiny import arguments, write_corpus

with epy.lazy_imports():
    import distributed

LATE = "after the end"
DASK = "--runner=apache_beam.runners.dask.dask_runner.DaskRunner --dask_npartitions=3"


class Experiment:
    """Commands that run one after another in a work directory."""

    def __init__(self, folder: Path, commands: list[list[str]]) -> None:
        self.folder, self.commands = folder, commands

    def start(self, number: int, workdir: Path, *extra: str) -> subprocess.Popen:
        """Start one of the commands, in a process group of its own."""
        command, *rest = self.commands[number]
        settings = [a for a in arguments(self.folder, workdir) if command not in ("delete", "compact") or a.startswith("--workdir")]
        log = (self.folder / "log").open("ab")
        return subprocess.Popen(
            [sys.executable, "-m", "resmem_lm", command, *settings, *rest, *extra], stdout=log, stderr=log, start_new_session=True
        )

    def finish(self, workdir: Path, begin: int = 0) -> None:
        """Run the commands from number `begin` on."""
        for number in range(begin, len(self.commands)):
            if self.start(number, workdir).wait() != 0:
                raise RuntimeError(f"{self.commands[number][0]} failed:\n{(self.folder / 'log').read_text()[-2000:]}")


def outcome(workdir: Path) -> dict[str, str]:
    """Return checksums of all rows and neighbors in order, and of the numbers of results.json."""

    def arrays(folder: str, manifest: str) -> str:
        digest = hashlib.sha256()
        facts = read_json(workdir / folder / manifest)
        shards = facts["shards"] if "shards" in facts else [s for split in ("validation", "test") for s in facts[split]["shards"]]
        for shard in shards:
            for name in sorted(shard["files"]):
                digest.update((workdir / folder / shard["folder"] / name).read_bytes())
        return digest.hexdigest()

    results = read_json(workdir / "results.json")
    numbers = json.dumps({name: results[name] for name in ("splits", "curves", "examples", "datastore")})
    return {
        "rows": arrays("datastore", "manifest.json"),
        "neighbors": arrays("neighbors", "neighbors.json"),
        "results": hashlib.sha256(numbers.encode()).hexdigest(),
    }


def differences(workdir: Path, wanted: dict[str, str]) -> list[str]:
    """Return which outcomes differ, and the problems that `verify` finds."""
    found = outcome(workdir)
    return [name for name in wanted if found[name] != wanted[name]] + verify(Run(workdir))


def running(workdir: Path) -> str:
    """Return the stage that has begun but not finished."""
    records = {path.stem: read_json(path) for path in (workdir / "stages").glob("*.json")} if (workdir / "stages").exists() else {}
    return next((name for name, record in records.items() if not record["finished"]), "between stages")


Kill = tuple[int, str, float]  # number of the command, the stage in which to kill it (or none), and seconds from its beginning


def kills_in_stages(reference: Path, count: int, rng: random.Random) -> list[Kill]:
    """Return kills at random moments, equally many in each stage of `resmem run`."""
    stages = ("train", "build", "index", "search", "evaluate")
    seconds = {stage: read_json(reference / "stages" / f"{stage}.json")["seconds"] for stage in stages}
    return [(0, stage, rng.random() * seconds[stage]) for stage in (stages[trial % len(stages)] for trial in range(count))]


def kills_in_commands(seconds: list[float], count: int, rng: random.Random) -> list[Kill]:
    """Return kills that are spread over the time of all commands."""
    found = []
    for trial in range(count):
        moment, number = (trial + rng.random()) / count * sum(seconds), 0
        while moment > seconds[number]:
            moment, number = moment - seconds[number], number + 1
        found.append((number, "", moment))
    return found


def begun(workdir: Path, stage: str) -> bool:
    """Return whether a stage has begun."""
    path = workdir / "stages" / f"{stage}.json"
    return not stage or path.exists()


def kills(experiment: Experiment, wanted: dict[str, str], moments: list[Kill], prepared: Path | None) -> None:
    """Kill the process group of a command at each of some moments, and run the same command again."""
    where: Counter[str] = Counter()
    bad = []
    for trial, (number, stage, moment) in enumerate(moments):
        workdir = experiment.folder / "killed"
        shutil.rmtree(workdir, ignore_errors=True)
        if prepared:
            shutil.copytree(prepared, workdir)
        for before in range(number):
            experiment.start(before, workdir).wait()
        process = experiment.start(number, workdir)
        while not begun(workdir, stage) and process.poll() is None:
            time.sleep(0.002)
        time.sleep(moment)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        hit = running(workdir) if process.wait() == -signal.SIGKILL else LATE
        where[f"{experiment.commands[number][0]}: {hit}"] += 1
        experiment.finish(workdir, number)
        wrong = differences(workdir, wanted)
        if wrong:
            bad.append(f"{hit} after {moment:.2f} s: {'; '.join(wrong)}")
        print(f"kill {trial + 1} of {len(moments)}, {hit}: {'; '.join(wrong) or 'same'}", file=sys.stderr, flush=True)
    commands = ", ".join(command[0] for command in experiment.commands)
    late = sum(n for name, n in where.items() if name.endswith(LATE))
    print(f"{len(moments) - late} SIGKILLs in {commands} and {late} after their end: {len(moments) - len(bad)} ended the same")
    print("  where: " + ", ".join(f"{stage} {n}" for stage, n in sorted(where.items())), flush=True)
    for line in bad:
        print(f"  NOT the same: {line}")


def lost_dask_worker(experiment: Experiment, wanted: dict[str, str]) -> None:
    """Kill one of two Dask workers when the first shard of the build is published."""
    if importlib.util.find_spec("distributed") is None:
        print("Dask: not tried: install the extra `dask`")
        return
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    workdir = experiment.folder / "dask"
    shutil.rmtree(workdir, ignore_errors=True)
    train = Experiment(experiment.folder, [["train"]])
    train.finish(workdir)
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        build = Experiment(experiment.folder, [["build"]])
        process = build.start(0, workdir, f"--pipeline_options={DASK} --dask_client_address={cluster.scheduler_address}")
        while not list(workdir.glob("datastore/shard-*.????????")) and process.poll() is None:
            time.sleep(0.01)
        victim = next(iter(cluster.workers.values()))
        os.kill(victim.process.pid, signal.SIGKILL)
        code = process.wait()
    experiment.finish(workdir)
    wrong = ([] if code == 0 else [f"build ended with {code}"]) + differences(workdir, wanted)
    print(f"Dask worker killed in the build: {'; '.join(wrong) or 'ended the same'}")


def full_disk(experiment: Experiment, wanted: dict[str, str], sizes: list[int]) -> None:
    """Run on a tmpfs that is too small, then make it larger and run again."""
    place = experiment.folder / "small"
    place.mkdir()
    same = 0
    for kilobytes in sizes:
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", place], capture_output=True, check=False
        ).returncode:
            print("full disk: not tried: mounting a tmpfs needs root")
            return
        try:
            code = experiment.start(0, place / "run").wait()
            last_line = (experiment.folder / "log").read_text().strip().splitlines()[-1]
            subprocess.run(["mount", "-o", "remount,size=500m", place], check=True)
            experiment.finish(place / "run")
            wrong = differences(place / "run", wanted)
            good = code == 2 and last_line.startswith("resmem: no space left on the disk") and not wrong
            same += good
            if not good:
                print(f"  full disk of {kilobytes} kB: exit {code}, {last_line!r}; {'; '.join(wrong) or 'ended the same'}")
        finally:
            subprocess.run(["umount", "--lazy", place], check=True)  # files that verify mapped may still be open
    print(f"full disk, {len(sizes)} sizes: {same} reported in one line and ended the same on a larger disk")


def changed_bytes(workdir: Path, count: int, rng: random.Random) -> None:
    """Change single bytes in random places of random files."""
    files = [file for file in files_below(workdir) if file.stat().st_size]
    found = 0
    for _ in range(count):
        file = rng.choice(files)
        content = bytearray(file.read_bytes())
        place = rng.randrange(len(content))
        content[place] ^= rng.randrange(1, 256)
        whole = file.read_bytes()
        file.write_bytes(content)
        problems = verify(Run(workdir))
        file.write_bytes(whole)
        found += bool(problems)
        if not problems:
            print(f"  not found: byte {place} of {file}")
    print(f"verify finds {found} of {count} changed bytes ({len(files)} files); undamaged: {len(verify(Run(workdir)))} problems")


def main() -> None:
    """Try every fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--bytes", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    print(f"{processor()}; seed {options.seed}")
    with tempfile.TemporaryDirectory(prefix="resmem-faults-") as name:
        folder = Path(name)
        experiment, reference = Experiment(folder, [["run"]]), folder / "reference"
        experiment.finish(reference)
        wanted = outcome(reference)
        changed_bytes(reference, options.bytes, rng)
        kills(experiment, wanted, kills_in_stages(reference, options.kills, rng), None)
        lost_dask_worker(experiment, wanted)
        full_disk(experiment, wanted, [200, 400, 800, 1200, 1600])

        write_corpus(folder / "more.jsonl", 90)  # the first 60 are in the datastore already
        delete = ["delete", f"--document={folder / 'corpus.jsonl'}#7"]
        keeping = Experiment(
            folder, [["build", f"--append={folder / 'more.jsonl'}"], delete, ["compact"], ["index"], ["evaluate"], ["report"]]
        )
        shutil.copytree(reference, folder / "kept")
        times = []
        for number in range(len(keeping.commands)):
            begin = time.monotonic()
            assert keeping.start(number, folder / "kept").wait() == 0
            times.append(time.monotonic() - begin)
        kills(keeping, outcome(folder / "kept"), kills_in_commands(times, max(1, options.kills // 3), rng), reference)


if __name__ == "__main__":
    main()
