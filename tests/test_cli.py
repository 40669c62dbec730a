import json
import subprocess
import sys

import pytest

from resmem_lm.cli import main

DEMO = "--gin_file=configs/demo.gin"


def run(*arguments, workdir):
    return main([*arguments, f"--workdir={workdir}"])


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "no --gin_file: give one, such as --gin_file=configs/demo.gin"),
        (["--gin_file=nowhere.gin"], "nowhere.gin: Unable to open file: nowhere.gin. Searched config paths:"),
        ([DEMO, "--gin.TXT='a.txt'"], "--gin.TXT='a.txt': no gin file defines TXT; known: CHECKPOINT, MEMORY_SHARDS, STEPS, TEXT"),
        ([DEMO, "--gin.train.step=3"], "--gin.train.step=3: Configurable 'train' doesn't have a parameter named 'step'."),
        ([DEMO, "--gin.TEXT=a.txt"], "--gin.TEXT=a.txt, line 1: malformed node or string"),
        ([DEMO, "--gin.STEPS='many'"], "train.steps = 'many' has the wrong type: it must be int"),
        (
            ["--gin_file=gin/models/mini.gin", "--gin.train.model=@ModelConfig()"],
            "train.steps is not set: set it in a gin file or with --gin.train.steps=...",
        ),
        ([DEMO, "--steps=3"], "unknown argument --steps=3: settings are given as --gin.NAME=VALUE (see resmem train --help)"),
        ([DEMO, "--gin.STEPS"], "unknown argument --gin.STEPS: settings are given as --gin.NAME=VALUE (see resmem train --help)"),
        ([DEMO, "stray"], "unknown argument stray: settings are given as --gin.NAME=VALUE (see resmem train --help)"),
        ([DEMO, "--gin.TEXT='nowhere/*.txt'"], "no text found at 'nowhere/*.txt': TEXT takes files, directories and globs of"),
    ],
)
def test_an_error_that_the_user_can_fix_is_one_line_on_stderr_and_exit_code_2(tmp_path, capsys, arguments, line):
    assert run("train", *arguments, workdir=tmp_path / "run") == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(f"resmem: {line}")
    assert output.err.count("\n") == 1
    assert output.err.endswith("\n")


@pytest.mark.parametrize("arguments", [[], ["--gin_file=nowhere.gin"], [DEMO, "--gin.STEPS='many'"]])
def test_settings_are_refused_before_anything_is_written(tmp_path, arguments):
    assert run("run", *arguments, workdir=tmp_path / "run") == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["build", "index", "evaluate", "report"])
def test_a_command_names_the_stage_it_needs_first(tmp_path, capsys, command):
    assert run(command, DEMO, workdir=tmp_path) == 2
    error = capsys.readouterr().err
    assert "which has not finished: run it first" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("inside", ["", "folder"])
def test_a_workdir_that_is_a_file_is_refused(tmp_path, capsys, inside):
    (tmp_path / "file").write_text("mine")
    assert run("train", DEMO, workdir=tmp_path / "file" / inside) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"resmem: --workdir={tmp_path / 'file' / inside} cannot be written (")
    assert error.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"


def small_text(folder):
    """Write three documents with too few words for the demo's vocabulary, so that `train` stops at the vocabulary."""
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("one one", "two two two", "three three")))
    return path


def test_every_setting_is_checked_before_the_first_stage_runs(tmp_path, capsys):
    text, workdir = small_text(tmp_path), tmp_path / "run"
    settings = [DEMO, f"--gin.TEXT='{text}'", "--gin.train.batch_size=3"]
    assert run("train", *settings, "--gin.make_vocabulary.size=8", workdir=workdir) == 2
    assert "train.batch_size = 3 cannot be shared" in capsys.readouterr().err
    record = (workdir / "stages" / "documents.json").read_bytes()
    complete = (workdir / "config.gin").read_bytes()
    assert run("train", *settings, "--gin.make_vocabulary.size=20", workdir=workdir) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"resmem: {workdir} was made with make_vocabulary.size = 8, now it is 20: take another --workdir, or delete ")
    assert error.count("\n") == 1
    assert (workdir / "stages" / "documents.json").read_bytes() == record
    assert (workdir / "config.gin").read_bytes() == complete


def test_a_device_without_enough_memory_is_reported_in_one_line(tmp_path, capsys):
    settings = [DEMO, f"--gin.TEXT='{small_text(tmp_path)}'", "--gin.make_vocabulary.size=8", f"--gin.ModelConfig.mlp_dim={10**13}"]
    assert run("train", *settings, workdir=tmp_path / "run") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "Out of memory" in error
    assert error.endswith(": take a smaller train.batch_size, train.sequence_length or model")


def test_the_written_configuration_is_taken_by_the_next_command(tmp_path, capsys):
    workdir = tmp_path / "run"
    assert run("train", DEMO, f"--gin.TEXT='{small_text(tmp_path)}'", workdir=workdir) == 2
    before, first = (workdir / "config.gin").read_text(), capsys.readouterr().err
    assert run("train", f"--gin_file={workdir / 'config.gin'}", workdir=workdir) == 2
    assert capsys.readouterr().err == first
    assert (workdir / "config.gin").read_text() == before


def test_configs_are_found_from_any_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("train", DEMO, "--gin.TEXT='nothing'", workdir="run") == 2
    assert "no text found at 'nothing'" in capsys.readouterr().err


def python(*arguments, folder=None):
    """Run a fresh Python and return the finished process."""
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, cwd=folder)


def test_importing_the_package_or_asking_for_help_loads_no_large_library():
    code = """
import sys, time
start = time.perf_counter()
import resmem_lm
seconds = time.perf_counter() - start
import resmem_lm.cli
assert resmem_lm.cli.main(["run", "--help"]) == 0
large = {"jax", "tensorflow", "apache_beam", "flax", "numpy", "matplotlib"} & set(sys.modules)
assert not large, large
assert seconds < 1, seconds
"""
    ended = python("-c", code)
    assert ended.returncode == 0, ended.stderr
    assert "--gin_file" in ended.stdout


def test_commands_on_a_finished_work_directory_load_nothing_that_only_work_needs(tiny_copy):
    code = """
import sys
from jax._src import xla_bridge
from resmem_lm.cli import STAGES, main
for command in STAGES:
    assert main([command, *sys.argv[1:]]) == 0
large = {"apache_beam", "faiss", "flax", "grain", "jinja2", "matplotlib", "numba", "optax", "orbax", "scann", "tensorboardX"}
assert not large & set(sys.modules), large & set(sys.modules)
assert not xla_bridge.backends_are_initialized()
"""
    ended = python("-c", code, f"--gin_file={tiny_copy / 'config.gin'}", f"--workdir={tiny_copy}")
    assert ended.returncode == 0, ended.stderr


def test_the_installed_command_prints_one_line_and_nothing_of_the_libraries_it_loads(tmp_path):
    command = tmp_path / "bin" / "resmem"
    command.parent.mkdir()
    command.write_text("import sys\nfrom resmem_lm.cli import script\nsys.exit(script())\n")
    (tmp_path / "random.py").write_text("raise SystemExit('a file of the user was taken for a library')\n")
    ended = python(str(command), "run", DEMO, "--gin.ModelConfig.emb_dim='wide'", "--workdir=run", folder=tmp_path)
    assert ended.stderr == "resmem: ModelConfig.emb_dim = 'wide' has the wrong type: it must be int\n"
    assert ended.stdout == ""
    assert ended.returncode == 2


@pytest.mark.parametrize("command", [["run", DEMO], ["study", "theory"], ["compact"], ["plan", DEMO]])
def test_a_work_directory_without_a_name_is_refused(command, capsys):
    assert main([*command, "--workdir="]) == 2
    assert capsys.readouterr().err == "resmem: --workdir is empty: name a directory\n"
