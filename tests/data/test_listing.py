import pytest

from medvit.data.listing import listed_images
from medvit.errors import NothingFound

TABLE = """case_id,image,split,kind,age
a,images/a.png,train,virus,5
b,images/b.png,train,normal,7.5
c,images/c.png,val,bacteria,9
"""


@pytest.fixture
def folder(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name / "images").mkdir(parents=True)
        (tmp_path / name / "cases.csv").write_text("\ufeff" + TABLE, encoding="utf-8")
        for case in "abc":
            (tmp_path / name / f"images/{case}.png").touch()
    return tmp_path


def test_cases_of_several_sets(folder):
    cases = listed_images(folder, ["one", "two"])
    assert [case["case"] for case in cases] == ["a", "b", "a", "b"]
    assert cases[3] == {"image": str(folder / "two/images/b.png"), "case": "b"}
    assert len(listed_images(folder / "one", splits=["train", "val"])) == 3


def test_labels(folder):
    chosen = {"kind": ["virus", "bacteria"]}
    cases = listed_images(
        folder, ["one"], splits=["train", "val"], where=chosen, label="kind", classes={"virus": 1, "bacteria": 0}
    )
    assert [(case["case"], case["label"]) for case in cases] == [("a", 1), ("c", 0)]
    assert [case["label"] for case in listed_images(folder, ["one"], label="age")] == [5.0, 7.5]
    several = {"virus": 1, "bacteria": 0, "normal": None, "other": 2}
    rows = listed_images(folder, ["one"], splits=["train", "val"], label="kind", classes=several, separator="|")
    assert [case["label"] for case in rows] == [[0, 1, 0], [0, 0, 0], [1, 0, 0]]
    table = folder / "two/cases.csv"
    table.write_text(table.read_text(encoding="utf-8").replace("virus,5", "virus|bacteria,5"), encoding="utf-8")
    assert listed_images(folder, ["two"], label="kind", classes=several, separator="|")[0]["label"] == [1, 1, 0]
    with pytest.raises(ValueError, match=r"kind 'bacteria' is none of \['normal', 'virus'\]"):
        listed_images(folder, ["two"], label="kind", classes={"virus": 0, "normal": None}, separator="|")
    grouped = listed_images(folder, ["one"], group="kind")
    assert [case["group"] for case in grouped] == ["virus", "normal"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sets": ["three"]}, r"three.cases.csv: no such table; dataset_dir must hold .* docs/pretraining.md says how"),
        ({"splits": ["test"]}, r"no case in splits \['test'\] of one"),
        ({"where": {"kind": ["x"]}}, r"with \{'kind': \['x'\]\}"),
        ({"group": "patient"}, "lacks the columns patient; it has"),
        ({"label": "sex"}, "lacks the columns sex; it has case_id, image, split, kind, age"),
    ],
)
def test_nothing_to_train_on_is_told(folder, arguments, message):
    with pytest.raises(NothingFound, match=message):
        listed_images(folder, **({"sets": ["one"]} | arguments))


def test_a_file_that_is_not_there(folder):
    (folder / "one/images/b.png").unlink()
    with pytest.raises(NothingFound, match=r"b.png: no such file"):
        listed_images(folder, ["one"])


def test_a_label_that_no_class_has(folder):
    with pytest.raises(ValueError, match=r"kind 'normal' is none of \['virus'\]; leave it out"):
        listed_images(folder, ["one"], label="kind", classes={"virus": 1})
