from resmem_lm.text.descriptions import documents
from resmem_lm.text.documents import prepare_documents
from resmem_lm.text.shards import SPLITS, read_shard, shard_paths
from resmem_lm.workdir.run import Run

METADATA = "Metadata-Version: 2.1\nName: {name}\nVersion: 1\n{text}"


def install(folder, name, text):
    (folder / f"{name}-1.dist-info").mkdir(parents=True)
    (folder / f"{name}-1.dist-info" / "METADATA").write_text(METADATA.format(name=name, text=text), encoding="utf-8")


def test_every_described_distribution_is_one_document_in_the_order_of_names(tmp_path, monkeypatch):
    for name, text in {
        "in_the_body": "\n# Títle\n\nText: of two lines.\nThe other.\n",
        "in_a_header": "Description: One line.\n        Another.\n",
        "without": "",
        "blank": "\n \n",
        "unknown": "\nUNKNOWN\n",
        "numpy": "\nShadows the real one.\n",
    }.items():
        install(tmp_path, name, text)
    monkeypatch.syspath_prepend(tmp_path)
    found = dict(pairs := list(documents()))
    assert [name for name, _ in pairs] == sorted(found)
    assert len(pairs) == len(found)
    assert found["in_the_body"] == "# Títle\n\nText: of two lines.\nThe other.\n"
    assert [line.strip() for line in found["in_a_header"].splitlines()] == ["One line.", "Another."]
    assert found["numpy"] == "Shadows the real one.\n"
    assert not found.keys() & {"without", "blank", "unknown"}
    assert len(found) > 20


def test_descriptions_are_a_text_that_can_be_prepared(tmp_path):
    counts = prepare_documents(tmp_path, text="descriptions", validation_fraction=0.1, test_fraction=0.2, shards=2)["documents"]
    prepared = {d.id: d.text for split in SPLITS for path in shard_paths(Run(tmp_path), split) for d in read_shard(path)}
    given = dict(documents())
    assert prepared.items() <= given.items()
    assert len(prepared) == sum(counts[split] for split in SPLITS) == len(given) - counts["duplicate"]
