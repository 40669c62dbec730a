"""Define the paths of a work directory and read the records of its stages.

`WORKDIR/stages/NAME.json` records the settings, the inputs and, once finished, the result of the stage NAME.
"""

import dataclasses
import hashlib
import json
from typing import Any

from resmem_lm.errors import UserError
from resmem_lm.workdir.storage import AnyPath, Record, children, read_json, sha256, to_path, write_json


@dataclasses.dataclass(frozen=True)
class Output:
    """The output of a stage: paths within the work directory.

    `manifest` is a file that lists the checksums of the others. `marker` is a file in every folder that the stage writes. A stage does not
    replace a folder without its marker, because this package did not write that folder.
    """

    paths: tuple[str, ...]
    manifest: str = ""
    marker: str = ""


OUTPUTS = {
    "documents": Output(("documents",), manifest="manifest.json", marker="manifest.json"),
    "vocabulary": Output(("vocabulary",)),
    "train": Output(("checkpoints", "metrics"), marker="model.json"),
    "build": Output(("datastore",), manifest="manifest.json"),
    "index": Output(("index",), manifest="index.json"),
    "search": Output(("neighbors",), manifest="neighbors.json"),
    "evaluate": Output(("results.json", "gates.npz")),
    "report": Output(("report.html",)),
}


def output_of(stage: str) -> Output:
    """Return the output of a stage or of a study."""
    name = stage.removeprefix("study-")
    return OUTPUTS[stage] if stage in OUTPUTS else Output((f"studies/{name}/results.json", f"studies/{name}"))


class Run:
    """A work directory. It is pickled as its address, so that workers on other machines can open it."""

    def __init__(self, path: "str | AnyPath | Run") -> None:
        self.path: AnyPath = path.path if isinstance(path, Run) else to_path(path)
        self.documents = self.path / "documents"
        self.vocabulary = self.path / "vocabulary"
        self.checkpoints = self.path / "checkpoints"
        self.datastore = self.path / "datastore"
        self.index = self.path / "index"
        self.neighbors = self.path / "neighbors"
        self.results = self.path / "results.json"
        self.gates = self.path / "gates.npz"
        self.report = self.path / "report.html"
        self.studies = self.path / "studies"
        self.derived = self.path / "derived"
        self.config = self.path / "config.gin"
        self.stages = self.path / "stages"

    def __str__(self) -> str:
        return str(self.path)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Run) and self.path == other.path

    def __hash__(self) -> int:
        return hash(self.path)

    def __reduce__(self) -> tuple[Any, ...]:
        return Run, (str(self.path.absolute()),)

    def record_path(self, stage: str) -> AnyPath:
        """Return the path of a stage's record."""
        return self.stages / f"{stage}.json"

    def record(self, stage: str) -> Record:
        """Return the record of a stage, empty if the stage has not begun."""
        path = self.record_path(stage)
        return read_json(path) if path.exists() else {}

    def finished(self, stage: str) -> Record:
        """Return the record of a finished stage. Raise UserError if it has not finished."""
        record = self.record(stage)
        if not record.get("finished"):
            raise UserError(f"{self}: the stage {stage} has not finished: run it first")
        return record

    def current(self) -> set[str]:
        """Return the names of the finished stages whose inputs have not changed since."""
        records = {path.stem: read_json(path) for path in children(self.stages, "*.json")}
        digests = {name: digest(record.get("result", {})) for name, record in records.items()}
        return {
            name
            for name, record in records.items()
            if record.get("finished") and all(digests.get(of) == value for of, value in record.get("inputs", {}).items())
        }

    def update_result(self, stage: str, result: Record) -> None:
        """Replace the result of a finished stage after another command changed its output."""
        write_json(self.record_path(stage), read_json(self.record_path(stage)) | {"result": plain(result)})

    def record_config(self) -> None:
        """Record the size and checksum of config.gin for `resmem verify`."""
        facts = {"bytes": self.config.stat().st_size, "sha256": sha256(self.config)}
        write_json(self.record_path("config"), {"finished": True, "files": {"config.gin": facts}})


def digest(result: Record) -> str:
    """Return the SHA-256 of a stage's result. Later stages record it as the identity of their input."""
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()


def plain(value: Any) -> Any:
    """Return a value in JSON's types: dataclasses become objects, tuples become lists."""
    return json.loads(
        json.dumps(value, default=lambda x: dataclasses.asdict(x) if dataclasses.is_dataclass(x) and not isinstance(x, type) else str(x))
    )
