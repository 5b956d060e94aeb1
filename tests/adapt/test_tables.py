import numpy as np
import pytest

from medvit.adapt.tables import check_same_labels, read_table
from medvit.errors import UnreadableFile


def write(folder, text, name="table.csv"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_table_is_what_the_file_says(tmp_path):
    text = (
        '\ufeffcase_id , label,score,dice,group,split,remark\na,1, 0.75 ,0.5,p1,test,\n\n b,0,-2e-1,1,p2,val,"x, y"\n'
    )
    table = read_table(write(tmp_path, text))
    assert (table.cases, table.groups, table.splits()) == (["a", "b"], ["p1", "p2"], ["test", "val"])
    assert table.numbers("dice").tolist() == [0.5, 1.0]
    found = table.predictions()
    assert (found.kind, found.names) == ("binary", ("",))
    assert (found.labels.tolist(), found.scores.tolist()) == ([[1], [0]], [[0.75], [-0.2]])
    assert table.of_split("val").cases == ["b"]
    assert table.columns["remark"] == ["", "x, y"]


def test_several_classes_and_several_labels(tmp_path):
    classes = read_table(
        write(tmp_path, "case,score_cat,score_dog,label\n1,0.2,0.8,dog\n2,0.7,0.3,dog\n")
    ).predictions()
    assert (classes.kind, classes.names) == ("classes", ("cat", "dog"))
    assert (classes.labels.tolist(), classes.scores.tolist()) == ([[0, 1], [0, 1]], [[0.2, 0.8], [0.7, 0.3]])
    labels = read_table(write(tmp_path, "case,label_x,score_x,score_y,label_y\n1,1,2,3,0\n")).predictions()
    assert (labels.kind, labels.names) == ("labels", ("x", "y"))
    assert (labels.labels.tolist(), labels.scores.tolist()) == ([[1, 0]], [[2, 3]])
    assert read_table(write(tmp_path, "case,dice\n1,0.5\n")).predictions() is None


def test_the_other_table_is_put_in_order(tmp_path):
    first = read_table(write(tmp_path, "case_id,dice\na,1\nb,2\nc,3\n"))
    second = read_table(write(tmp_path, "case_id,dice\nc,30\na,10\nb,20\n", "second.csv"))
    assert second.in_order_of(first).numbers("dice").tolist() == [10, 20, 30]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "needs a header of different names, got nothing"),
        ("case_id,dice,dice\n1,2,3\n", "needs a header of different names, got case_id, dice, dice"),
        ("name,dice\n1,2\n", "needs a column case_id, has name, dice"),
        ("case_id,dice\n", "holds no cases"),
        ("case_id,dice\na,1\nb\n", "line 3: needs 2 cells as the header has, got 1"),
        ("case_id,dice\na,1\n,1\n", "line 3: case_id must not be empty"),
        ("case_id,dice\na,1\nb,1\na,2\n", "every case must come once, a come several times"),
        ("case_id,group\na,1\nb,\n", "line 3: group must not be empty"),
        ('case_id,dice\n"a,1\n', "not readable as a table"),
    ],
)  # fmt: skip
def test_what_is_no_table(tmp_path, text, message):
    with pytest.raises(UnreadableFile, match=message):
        read_table(write(tmp_path, text))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UnreadableFile, match="not readable as a table"):
        read_table(tmp_path / "none.csv")
    (tmp_path / "latin.csv").write_bytes("case_id\nMüller\n".encode("latin-1"))
    with pytest.raises(UnreadableFile, match="not readable as a table"):
        read_table(tmp_path / "latin.csv")


@pytest.mark.parametrize("cell", ["", "nan", "inf", "-inf", "high"])
def test_a_missing_value_is_named_and_never_left_out(tmp_path, cell):
    table = read_table(write(tmp_path, f"case_id,dice,other\na,1,1\n\nb,{cell},1\n"))
    with pytest.raises(UnreadableFile, match=f"line 4: dice of case b must be a finite number, got '{cell}'; fill it"):
        table.numbers("dice")
    assert table.numbers("other").tolist() == [1, 1]  # what is not asked for does not matter
    with pytest.raises(UnreadableFile, match="needs a column hd95, has case_id, dice, other"):
        table.numbers("hd95")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("case,label,score\na,2,0.5\n", "line 2: label of case a must be 0 or 1, got '2'"),
        ("case,label,score\na,1,\n", "line 2: score of case a must be a finite number"),
        ("case,label,score\na,,1\n", "line 2: label of case a must be a finite number"),
        ("case,label\na,1\n", "needs score, or score_NAME for every class, beside label"),
        ("case,label_x\na,1\n", "needs a column score_x"),
        ("case,label,label_x,score_x\na,1,1,1\n", "needs either label or label_NAME, has both"),
        ("case,label,score_x,score_y\na,x,1,1\nb,z,1,1\n", "line 3: label of case b must be one of x, y, got 'z'"),
    ],
)  # fmt: skip
def test_what_are_no_predictions(tmp_path, text, message):
    with pytest.raises(UnreadableFile, match=message):
        read_table(write(tmp_path, text)).predictions()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("case_id,group,dice\na,p,1\n", r"must hold the cases of .*table.csv; it lacks b, 1 in all"),
        ("case_id,group,dice\na,p,1\nb,q,2\nc,q,3\nd,q,3\n", r"it also holds c, d, 2 in all"),
        ("case_id,group,dice\nb,r,2\na,p,1\n", r"must have the groups of .*; that of case b is 'r' here, 'q' there"),
        ("case_id,dice\nb,2\na,1\n", "only one of them has a column group"),
    ],
)  # fmt: skip
def test_tables_of_other_cases_are_refused(tmp_path, text, message):
    first = read_table(write(tmp_path, "case_id,group,dice\na,p,1\nb,q,2\n"))
    with pytest.raises(UnreadableFile, match=rf"second.csv: .*{message}"):
        read_table(write(tmp_path, text, "second.csv")).in_order_of(first)


def test_tables_that_disagree_about_the_truth_are_refused(tmp_path):
    first = read_table(write(tmp_path, "case,label,score\na,1,1\nb,0,2\n"))
    other = read_table(write(tmp_path, "case,label,score\na,1,3\nb,1,2\n", "second.csv"))
    named = read_table(write(tmp_path, "case,label_x,score_x\na,1,3\nb,0,2\n", "third.csv"))
    ours = first.predictions()
    check_same_labels(first, first, ours, ours)
    with pytest.raises(UnreadableFile, match=r"second.csv: must have the labels of .*; that of case b differs"):
        check_same_labels(first, other, ours, other.predictions())
    with pytest.raises(UnreadableFile, match=r"third.csv: must have the labels of .*table.csv: ; it has x"):
        check_same_labels(first, named, ours, named.predictions())
    assert np.array_equal(ours.labels, named.predictions().labels)
