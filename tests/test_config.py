import dataclasses
import importlib.util
import re
import tempfile
from pathlib import Path

import gin
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import resmem_lm.commands  # noqa: F401 - registers every stage with gin
from beam_pipelines.build_datastore import build_datastore
from beam_pipelines.build_index import build_index
from beam_pipelines.search_neighbors import search
from resmem_lm import config
from resmem_lm.errors import UserError
from resmem_lm.evaluation.evaluate import evaluate
from resmem_lm.model.config import ACTIVATIONS, DTYPES, ModelConfig
from resmem_lm.model.train import train
from resmem_lm.text.documents import prepare_documents
from resmem_lm.text.vocabulary import make_vocabulary

REPOSITORY = Path(__file__).parent.parent
DEMO = "configs/demo.gin"
STAGES = {stage.__name__: stage for stage in (prepare_documents, make_vocabulary, train, build_datastore, build_index, search, evaluate)}


def message(call, *args, **kwargs):
    """Return the one-line message of the UserError."""
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def error_of(*bindings, gin_files=(DEMO,)):
    """Return the error of bindings, whether in parsing or in checking the settings of the stages."""

    def read():
        config.parse(list(gin_files), list(bindings))
        for stage in STAGES.values():
            config.parameters(stage)

    return message(read)


def written(folder, text):
    path = folder / "own.gin"
    path.write_text(text, encoding="utf-8")
    return str(path)


# What is read


@gin.register(module="resmem_lm")
@dataclasses.dataclass(frozen=True)
class Part:
    width: int
    names: tuple[str, ...] | list[str] = ("a", "b")
    share: float = 0.5


def use(run: Path, *, part: Part) -> None:
    """Stand in for a stage with a dataclass among its settings, whose fields are still unchecked."""


gin.register(module="resmem_lm")(use)


def test_bindings_override_files_and_later_files_earlier_ones(tmp_path):
    own = written(tmp_path, "STEPS = 7\nmake_vocabulary.size = 8\ntrain.batch_size = 9\n")
    config.parse([DEMO, own], ["STEPS=10", "train.batch_size = 11", "train.batch_size=12"])
    assert config.parameters(train)["steps"] == 10
    assert config.parameters(make_vocabulary)["size"] == 8
    assert config.parameters(train)["batch_size"] == 12


def test_parsing_clears_earlier_settings():
    config.parse([DEMO], ["search.neighbors=7"])
    assert config.parameters(search)["neighbors"] == 7
    config.parse([DEMO], [])
    assert config.parameters(search)["neighbors"] == 50


def test_settings_that_are_not_set_have_their_defaults():
    config.parse([], [])
    assert config.parameters(search) == {"neighbors": 50, "document_neighbors": 16, "recall_queries": 500, "pipeline_options": ""}


@pytest.mark.parametrize("value", ["'notes/*.txt'", "['a.txt', 'b']", "('a.txt',)", "'docstrings'"])
def test_text_may_be_a_string_or_several(value):
    config.parse([DEMO], [f"TEXT={value}"])
    assert config.parameters(prepare_documents)["text"] == eval(value)


def test_integers_are_accepted_as_floats():
    config.parse([DEMO], ["train.learning_rate=1", "evaluate.sigmas=(1, 2)", "Part.share=1", "Part.width=3", "use.part=@Part()"])
    assert config.parameters(train)["learning_rate"] == 1
    assert config.parameters(evaluate)["sigmas"] == (1, 2)
    assert config.parameters(use)["part"] == Part(width=3, share=1)


def test_files_are_found_from_any_folder_and_those_of_the_folder_come_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config.parse([DEMO], [])
    assert config.parameters(make_vocabulary)["size"] == 4096
    (tmp_path / "configs").mkdir()
    (tmp_path / DEMO).write_text("make_vocabulary.size = 17\n")
    config.parse([DEMO], [])
    assert config.parameters(make_vocabulary)["size"] == 17


# emb_dim, num_heads, num_layers, mlp_dim, and whether it is T5 1.1 (gated MLP, separate output matrix).
SHAPES = {
    "mini.gin": (128, 2, 4, 512, False),
    "small_256.gin": (256, 4, 4, 1024, False),
    "t5_small.gin": (512, 8, 6, 2048, False),
    "t5_base.gin": (768, 12, 12, 3072, False),
    "t5_1_1_small.gin": (512, 6, 8, 1024, True),
    "t5_1_1_base.gin": (768, 12, 12, 2048, True),
}


def test_every_model_file_has_its_published_shape():
    found = {}
    for path in (REPOSITORY / "gin" / "models").glob("*.gin"):
        config.parse([DEMO, f"gin/models/{path.name}"], [])
        model = config.parameters(train)["model"]
        gated = model.mlp_activations == ("gelu", "linear") and not model.logits_via_embedding
        assert gated or (model.mlp_activations == ("relu",) and model.logits_via_embedding)
        assert model.head_dim == 64
        found[path.name] = (model.emb_dim, model.num_heads, model.num_layers, model.mlp_dim, gated)
    assert found == SHAPES


def test_the_demo_names_text_and_steps():
    config.parse([DEMO], ["TEXT='a.txt'", "STEPS=3"])
    assert config.parameters(prepare_documents)["text"] == "a.txt"
    assert config.parameters(train)["steps"] == 3
    assert config.parameters(train)["model"].vocab_size == config.parameters(make_vocabulary)["size"]


# The complete configuration, to be read again

FLOATS = st.floats(allow_nan=False, allow_infinity=False)
TEXTS = st.lists(st.text()) | st.lists(st.text()).map(tuple)
SETTINGS = st.fixed_dictionaries(
    {
        "prepare_documents": st.fixed_dictionaries(
            {
                "text": st.text() | TEXTS,
                "validation_fraction": FLOATS,
                "shards": st.integers(),
            }
        ),
        "make_vocabulary": st.fixed_dictionaries({"model": st.none() | st.text()}),
        "build_index": st.fixed_dictionaries({"kind": st.sampled_from(["faiss", "scann", "exact"])}),
        "evaluate": st.fixed_dictionaries({"ks": st.lists(st.integers()), "sigmas": st.lists(FLOATS).map(tuple)}),
        "train": st.fixed_dictionaries(
            {
                "steps": st.integers(),
                "batch_size": st.integers(),
                "sequence_length": st.integers(),
                "model": st.tuples(
                    *[st.integers(1)] * 6,
                    st.lists(st.sampled_from(ACTIVATIONS), min_size=1).map(tuple),
                    st.floats(0, 1, exclude_max=True),
                    st.booleans(),
                    st.sampled_from(DTYPES),
                ),
            }
        ),
    }
)


@settings(max_examples=30)
@given(SETTINGS)
def test_the_complete_configuration_read_again_gives_the_same_settings(wanted):
    wanted["train"]["model"] = ModelConfig(*wanted["train"]["model"])
    with tempfile.TemporaryDirectory() as folder:
        config.parse([written(Path(folder), config.operative(wanted))], [])
    for name, values in wanted.items():
        assert config.parameters(STAGES[name]).items() >= values.items()


def test_the_complete_configuration_names_every_setting():
    config.parse([DEMO], [])
    found = {name: config.parameters(stage) for name, stage in STAGES.items()}
    text = config.operative(found)
    for name, values in found.items():
        for key in values:
            assert re.search(rf"^{name}\.{key} = ", text, re.MULTILINE)
    for field in dataclasses.fields(ModelConfig):
        assert f"ModelConfig.{field.name} = " in text


# What cannot be read


def test_a_missing_file_is_named(tmp_path):
    for files in (["nowhere.gin"], [DEMO, "nowhere.gin"]):
        assert error_of(gin_files=files).startswith("nowhere.gin: Unable to open file: nowhere.gin. Searched config paths:")
    own = written(tmp_path, "include 'nowhere.gin'\n")
    assert re.match(f"{re.escape(own)}: Unable to open file: nowhere.gin. Searched .* line 1", error_of(gin_files=[own]))


@pytest.mark.parametrize(
    ("binding", "reason"),
    [
        ("TXT='a.txt'", "no gin file defines TXT; known: CHECKPOINT, MEMORY_SHARDS, STEPS, TEXT"),
        ("scope/STEPS=3", "no gin file defines scope/STEPS; known: CHECKPOINT, MEMORY_SHARDS, STEPS, TEXT"),
        ("scope/train.steps=3", "no gin file defines scope/train.steps; known: CHECKPOINT, MEMORY_SHARDS, STEPS, TEXT"),
        ("train.batchsize=3", "Configurable 'train' doesn't have a parameter named 'batchsize'."),
        ("search.qux=3", "Configurable 'search' doesn't have a parameter named 'qux'."),
        ("ModelConfig.num_layer=3", "Configurable 'ModelConfig' doesn't have a parameter named 'num_layer'."),
        ("trian.steps=3", "No configurable matching 'trian'."),
        ("train.model=@ModelConf()", "No configurable matching reference '@ModelConf()'."),
    ],
)
def test_an_unknown_name_is_reported_in_the_words_of_gin(binding, reason):
    assert error_of(binding).startswith(f"--gin.{binding}: {reason}")


def test_an_unknown_name_in_a_file_is_reported_with_its_line(tmp_path):
    own = written(tmp_path, "# Mine.\nSTEPS = 3\ntrain.step = %STEPS\n")
    error = error_of(gin_files=[DEMO, own])
    assert error.startswith(f"{own}: Configurable 'train' doesn't have a parameter named 'step'.")
    assert f'In file "{own}", line 3' in error


@pytest.mark.parametrize(
    "binding",
    ["TEXT=notes.txt", "TEXT=notes/*.txt", "TEXT=/notes", "TEXT='notes", "STEPS=", "evaluate.ks=(1, 2", "evaluate.ks=(1, 2))", "=3"],
)
def test_a_value_that_cannot_be_read_is_reported_with_how_to_write_values(binding):
    fix = "write values as in Python, strings in quotes (in a shell \"'...'\")"
    assert re.fullmatch(f"{re.escape(f'--gin.{binding}')}(, line 1)?: .+{re.escape(f': {fix}')}", error_of(binding))


@pytest.mark.parametrize(
    ("text", "line"), [("STEPS = \n", 1), ("STEPS = 3\nTEXT = notes.txt\n", 2), ("STEPS = 3\n\nmake_vocabulary 3\n", 3)]
)
def test_a_line_that_cannot_be_read_is_reported_with_its_number(tmp_path, text, line):
    own = written(tmp_path, text)
    assert error_of(gin_files=[DEMO, own]).startswith(f"{own}, line {line}: ")


@pytest.mark.parametrize("content", ["STEPS = (3\n", "import nowhere_to_be_found\n", "  STEPS = 3\n TEXT = 'a'\n", "\xff"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, content):
    path = tmp_path / "own.gin"
    path.write_bytes(content.encode("latin-1"))
    assert error_of(gin_files=[str(path)]).startswith(str(path))


@pytest.mark.parametrize(
    ("binding", "named", "wanted"),
    [
        ("STEPS='many'", "train.steps = 'many'", "int"),
        ("STEPS=1.5", "train.steps = 1.5", "int"),
        ("STEPS=None", "train.steps = None", "int"),
        ("TEXT=3", "prepare_documents.text = 3", "str | list[str] | tuple[str, ...]"),
        ("TEXT=['a', 3]", "prepare_documents.text = ['a', 3]", "str | list[str] | tuple[str, ...]"),
        ("train.learning_rate='0.1'", "train.learning_rate = '0.1'", "float"),
        ("evaluate.lambdas=1.0", "evaluate.lambdas = 1.0", "tuple[float, ...] | list[float]"),
        ("evaluate.ks=(1, 2, 4, 8, '16')", "evaluate.ks = (1, 2, 4, 8, '16')", "tuple[int, ...] | list[int]"),
        ("build_index.kind='annoy'", "build_index.kind = 'annoy'", "Literal['faiss', 'scann', 'exact']"),
        ("train.model=3", "train.model = 3", "@ModelConfig()"),
        ("train.model=@ModelConfig", f"train.model = {ModelConfig!r}", "@ModelConfig()"),
    ],
)
def test_a_value_of_the_wrong_type_is_reported_with_the_right_one(binding, named, wanted):
    assert error_of(binding) == f"{named} has the wrong type: it must be {wanted}"


@pytest.mark.parametrize(
    ("binding", "error_start"),
    [
        ("num_heads=0", "num_heads = 0: take 1 or more"),
        ("dropout_rate=1.0", "dropout_rate = 1.0: take 0 or more and less than 1"),
        ("dtype='float8'", "dtype = 'float8': choose from float32, bfloat16, float16"),
        ("mlp_activations=('relu', 'gelux')", "mlp_activations = ('relu', 'gelux'): choose from linear, relu, gelu"),
        ("mlp_activations=()", "mlp_activations = (): choose from linear, relu, gelu"),
    ],
)
def test_an_impossible_model_shape_is_reported_in_one_line(binding, error_start):
    error = error_of(f"ModelConfig.{binding}")
    assert error.startswith(f"ModelConfig.{error_start}")
    assert "\n" not in error


@pytest.mark.parametrize(
    ("binding", "error_start"),
    [
        ("Part.width='wide'", "Part.width = 'wide' has the wrong type: it must be int"),
        ("Part.names=('a', 3)", "Part.names = ('a', 3) has the wrong type: it must be tuple[str, ...] | list[str]"),
    ],
)
def test_a_field_of_the_wrong_type_is_reported_with_the_right_one(binding, error_start):
    config.parse([], ["use.part=@Part()", "Part.width=3", binding])
    assert message(config.parameters, use) == error_start


def test_fields_that_are_not_set_are_named():
    config.parse([], ["use.part=@Part()"])
    error = message(config.parameters, use)
    assert error.startswith("use: Part.__init__() missing 1 required positional argument: 'width'")
    assert error.endswith(": set it in a gin file or with --gin.NAME=VALUE")


@pytest.mark.parametrize("name", ["steps", "model"])
def test_a_setting_that_is_not_set_is_named(name):
    values = {"steps": "3", "model": "@ModelConfig()", "learning_rate": "1.0", "batch_size": "8", "sequence_length": "256"}
    del values[name]
    config.parse(["gin/models/mini.gin"], [f"train.{key}={value}" for key, value in values.items()])
    assert message(config.parameters, train) == f"train.{name} is not set: set it in a gin file or with --gin.train.{name}=..."


@pytest.mark.skipif(importlib.util.find_spec("seqio") is not None, reason="SeqIO is installed here")
def test_a_file_for_t5x_without_t5x_is_refused():
    error = message(config.parse, ["gin/t5x/pretrain_t5_small_c4.gin"], [])
    assert "No module named 'seqio'" in error


def test_a_name_that_is_used_but_not_defined_is_reported(tmp_path):
    own = written(tmp_path, "search.neighbors = %NEIGHBORS\n")
    error = error_of(gin_files=[DEMO, own])
    assert error.startswith("search: ")
    assert "'NEIGHBORS'" in error
    assert error.endswith(": set it in a gin file or with --gin.NAME=VALUE")


def test_a_name_that_is_defined_by_itself_is_reported():
    assert error_of("STEPS=%STEPS") == "train: a value refers to itself: look for NAME = %NAME"


NAMES = ["TEXT", "STEPS", "train.steps", "evaluate.ks", "train.model", "ModelConfig.emb_dim", "search.neighbors", "a/b", "x", ""]
VALUES = st.text("()[]{}'\"@%.,/#=:-\\ \n\ta1_é", max_size=8) | st.text(max_size=4)


@settings(max_examples=100)
@given(st.sampled_from(NAMES), st.sampled_from(["=", " = ", ":", " "]), VALUES)
@example("TEXT", "=", "'''")
@example("TEXT", ":", "\x1e")
def test_any_binding_is_read_or_refused_in_one_line(name, sign, value):
    config.parse([DEMO], [])
    try:
        config.parse([DEMO], [f"{name}{sign}{value}"])
        config.parameters(train)
        config.parameters(search)
    except UserError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017 - some bindings are right
