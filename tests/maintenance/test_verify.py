import random
import shutil

import numpy as np
import pytest

from resmem_lm.cli import main
from resmem_lm.maintenance.verify import verify
from resmem_lm.workdir.artifacts import file_facts
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import files_below, read_json, sha256, write_json


def test_a_finished_run_has_no_problems_and_exits_with_0(tiny_run, capsys):
    assert main(["verify", str(tiny_run)]) == 0
    assert capsys.readouterr().out == f"{tiny_run}: no problems found\n"


def test_any_changed_byte_of_any_file_is_found(tiny_copy, capsys):
    rng = random.Random(1)
    files = [file for file in files_below(tiny_copy) if file.stat().st_size]
    for file in rng.sample(files, 12):
        whole = file.read_bytes()
        content = bytearray(whole)
        content[rng.randrange(len(content))] ^= rng.randrange(1, 256)
        file.write_bytes(content)
        problems = verify(Run(tiny_copy))
        assert problems, file
        assert all("\n" not in problem for problem in problems)
        file.write_bytes(whole)
    assert verify(Run(tiny_copy)) == []


def test_a_damaged_checkpoint_is_reported_by_file_and_not_opened(tiny_copy):
    """Orbax would leave other reads pending after a failed read, and Python would warn at exit."""
    files = [file for file in files_below(tiny_copy / "checkpoints") if file.stat().st_size and file.name != "model.json"]
    for file in files:
        file.write_bytes(b"?" * file.stat().st_size)
    problems = verify(Run(tiny_copy))
    assert len(problems) == len(files)
    assert all("was altered: its checksum differs from its record" in problem for problem in problems)
    (checkpoint,) = {file for file in (tiny_copy / "checkpoints").iterdir() if str(file) in problems[0]}
    assert f"delete {checkpoint} and " in problems[0]  # Orbax cannot read a checkpoint in part


def change_rows(workdir, name, change):
    """Change an array of the second shard and update all checksums, so that only the content is wrong."""
    folder = workdir / "datastore"
    manifest = read_json(folder / "manifest.json")
    record = manifest["shards"][1]
    path = folder / record["folder"] / name
    if name.endswith(".npy"):
        array = np.load(path)
        change(array)
        np.save(path, array)
    else:
        path.write_text(change(path.read_text()))
    record["files"] = file_facts(folder / record["folder"])
    write_json(folder / f"{record['folder'].rpartition('.')[0]}.json", record)
    write_json(folder / "manifest.json", manifest)
    for stage in ("build",):
        stage_record = read_json(workdir / f"stages/{stage}.json")
        stage_record["result"]["manifest"] = sha256(folder / "manifest.json")
        write_json(workdir / f"stages/{stage}.json", stage_record)


def set_row(column, value):
    def change(array):
        array[(7, column) if array.ndim == 2 else 7] = value

    return change


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("key_scales.npy", set_row(3, np.nan), "key_scales, row 7: not a finite number"),
        ("log_power_sums.npy", set_row(0, np.inf), "log_power_sums, row 7: not a finite number"),
        ("residual_ids.npy", set_row(0, 60_000), "residual_ids, row 7: an id beyond the vocabulary of 256"),
        ("quantized_residuals.npy", set_row(slice(None), 255), "row 7: its residual does not belong to its token"),
        ("quantized_residuals.npy", lambda array: array[7].sort(), "row 7: its residual does not belong to its token"),
        ("target_log_probability.npy", set_row(0, 0.5), "row 7: its residual does not belong to its token"),
        ("documents.jsonl", lambda text: text.replace('"first_row": 0,', '"first_row": 1,'), "begins at row 1, not at 0"),
        ("documents.jsonl", lambda text: text.partition("\n")[2], "1 documents are only in it or only in train-00001-of-00003.jsonl"),
        ("documents.jsonl", lambda text: text + text.splitlines()[-1] + "\n", "a document is listed twice"),
    ],
)
def test_impossible_rows_are_reported_although_checksums_are_correct(tiny_copy, name, change, message):
    change_rows(tiny_copy, name, change)
    problems = [problem for problem in verify(Run(tiny_copy)) if "neighbors" not in problem]
    assert any(message in problem and "run `resmem build`, which rebuilds this shard" in problem for problem in problems), problems


def test_the_reported_repair_restores_a_shard(tiny_copy, capsys):
    record = read_json(tiny_copy / "datastore/manifest.json")["shards"][0]
    (tiny_copy / "datastore" / record["folder"] / "quantized_keys.npy").write_bytes(b"")
    assert main(["verify", str(tiny_copy)]) == 1
    output = capsys.readouterr().out
    assert "quantized_keys.npy has 0 bytes" in output
    for name in ("datastore/shard-00000-of-00003.json", "stages/build.json"):
        assert str(tiny_copy / name) in output
        (tiny_copy / name).unlink()
    text = read_json(tiny_copy / "stages/documents.json")["settings"]["text"]
    for command in ("build", "index", "evaluate", "report"):
        assert main([command, f"--gin_file={tiny_copy.parent / 'tiny.gin'}", f"--workdir={tiny_copy}", f"--gin.TEXT='{text}'"]) == 0
    assert verify(Run(tiny_copy)) == []


def test_a_missing_file_and_a_file_in_no_record_are_reported(tiny_copy):
    (tiny_copy / "vocabulary/vocabulary.model").unlink()
    (tiny_copy / "datastore/stray.npy").write_bytes(b"stray")
    problems = verify(Run(tiny_copy))
    assert any("vocabulary.model is missing" in problem for problem in problems)
    assert any("stray.npy is not in any record" in problem for problem in problems)


@pytest.mark.parametrize("name", [".documents.tmp/00000.jsonl", "datastore/.rows.npy.1a2b3c4d.tmp"])
def test_partly_written_files_of_a_killed_run_are_no_problem(tiny_copy, name):
    (tiny_copy / name).parent.mkdir(exist_ok=True)
    (tiny_copy / name).write_bytes(b"half")
    assert verify(Run(tiny_copy)) == []


def test_a_manifest_that_names_a_folder_outside_is_refused(tiny_copy, capsys):
    manifest = read_json(tiny_copy / "datastore/manifest.json")
    outside = tiny_copy.parent / "outside"
    shutil.copytree(tiny_copy / "datastore" / manifest["shards"][0]["folder"], outside)
    manifest["shards"][0]["folder"] = "../../outside"
    write_json(tiny_copy / "datastore/manifest.json", manifest)
    assert any("which is outside its folder" in problem for problem in verify(Run(tiny_copy)))
    (tiny_copy / "stages/evaluate.json").unlink()
    text = read_json(tiny_copy / "stages/documents.json")["settings"]["text"]
    assert main(["evaluate", f"--gin_file={tiny_copy.parent / 'tiny.gin'}", f"--workdir={tiny_copy}", f"--gin.TEXT='{text}'"]) == 2
    assert "names '../../outside', which is outside its folder" in capsys.readouterr().err


def test_a_folder_that_is_no_work_directory_is_an_error(tmp_path, capsys):
    assert main(["verify", str(tmp_path)]) == 2
    assert "is not a work directory" in capsys.readouterr().err
