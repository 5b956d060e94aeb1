import json
import subprocess
import sys

import numpy as np
import pytest
import typer
from data_synthetic import make_affine, write_nifti
from typer.testing import CliRunner

from medvit.adapt.evaluation import METRICS, Settings, calibration, compare, evaluate
from medvit.adapt.tables import read_table
from medvit.cli_evaluate import METRICS as NAMED
from medvit.cli_evaluate import evaluate as command

app = typer.Typer()
app.command("evaluate")(command)
app.callback()(lambda: None)
FAST = ("--resamples", "200")


def medvit(*arguments, code=0):
    result = CliRunner().invoke(app, ["evaluate", *map(str, arguments)])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def said(result):
    """Standard error on one line: usage errors are drawn in a box, wrapped."""
    return " ".join(result.stderr.replace("│", " ").split())


def cells(result):
    return [line.split("\t") for line in result.stdout.splitlines()]


@pytest.fixture
def run(tmp_path):
    """Twelve cases, half of them positive; scores in order but for two."""
    rows = [
        f"c{i},{int(i >= 6)},{[0.1, 0.2, 0.3, 0.7, 0.35, 0.4, 0.5, 0.6, 0.25, 0.8, 0.9, 0.95][i]},{i / 20}\n"
        for i in range(12)
    ]
    path = tmp_path / "run.csv"
    path.write_text("case_id,label,score,dice\n" + "".join(rows))
    return path


@pytest.fixture
def other(tmp_path, run):
    path = tmp_path / "other.csv"
    header, *rows = run.read_text().splitlines()
    path.write_text(
        "\n".join([header, *[f"{r.rsplit(',', 2)[0]},{(i * 5 % 12) / 12},{0.3}" for i, r in enumerate(rows)]])
    )
    return path


def test_the_default_is_the_area_under_the_curve(run):
    header, row = cells(medvit(run))
    assert header == ["metric", "target", "n", "groups", "value", "95 % interval", "by"]
    (found,) = evaluate(read_table(run), ["auroc"], Settings())
    interval = f"{found['low']:.4f} to {found['high']:.4f}"
    assert row == ["auroc", "-", "12", "-", f"{found['value']:.4f}", interval, "delong"]
    assert found["value"] == pytest.approx(30 / 36)


def test_json_lines_are_the_librarys_rows(run, other):
    lines = medvit(run, "--json", "-m", "auroc", "-m", "dice", "--seed", "4", *FAST).stdout.splitlines()
    settings = Settings(200, 4)
    assert [json.loads(line) for line in lines] == evaluate(read_table(run), ["auroc", "dice"], settings)
    arguments = ("--against", other, "--json", "-m", "ece", "-m", "dice", "--seed", "4", *FAST)
    lines = medvit(run, *arguments).stdout.splitlines()
    assert [json.loads(line) for line in lines] == compare(
        read_table(run), read_table(other), ["ece", "dice"], settings
    )


def test_a_comparison_is_one_table(run, other):
    header, *rows = cells(medvit(run, "--against", other, "-m", "auroc", "-m", "dice", *FAST))
    assert header[7:] == ["against", "difference", "95 % interval", "p", "by", "p (Holm)"]
    (area, dice) = compare(read_table(run), read_table(other), ["auroc", "dice"], Settings(200))
    assert rows[0][7:9] == [f"{area['against']:.4f}", f"{area['difference']:+.4f}"]
    assert rows[0][10:] == [f"{area['p']:.3g}", "delong", f"{area['p_holm']:.3g}"]
    assert rows[1][9] == f"{dice['difference_low']:+.4f} to {dice['difference_high']:+.4f}"
    assert rows[1][11] == "wilcoxon"


def test_calibration_comes_after(run):
    lines = cells(medvit(run, "--calibration"))
    assert lines[2] == ["target", "predicted from", "to", "n", "mean", "observed"]
    bins = [b for _, b in calibration(read_table(run))]
    assert [int(line[3]) for line in lines[3:]] == [b.n for b in bins]
    found = [json.loads(line) for line in medvit(run, "--calibration", "--json").stdout.splitlines()]
    assert found[1:] == [{"calibration": "", **b._asdict()} for b in bins]


def test_a_metric_named_twice_is_printed_once(run):
    assert len(cells(medvit(run, "-m", "auroc", "-m", "auroc"))) == 2


@pytest.fixture
def folders(tmp_path):
    """References of four cases, and what two runs made of them: one is right, one is off by a slice of 2.5 mm."""
    for case in range(4):
        label = np.zeros((12, 12, 12), dtype=np.uint8)
        label[3 : 5 + case, 3:8, 2:8] = 1
        label[9:, 9:, 9:] = 2
        for folder, values in (("truth", label), ("right", label), ("off", np.roll(label, 1, 2))):
            suffix = "" if folder == "truth" else "_seg"
            write_nifti(tmp_path / folder / f"c{case}{suffix}.nii.gz", values, make_affine())
    return tmp_path


def test_folders_of_label_maps_become_a_table_of_cases(folders):
    maps = ("--truth", folders / "truth", "--structures", "one, two")
    found = {}
    for run in ("right", "off"):
        result = medvit(folders / run, *maps, "--write", folders / f"{run}.csv", "--tolerance", 1)
        assert f"4 cases: {folders / run}.csv" in said(result) and not result.stdout
        found[run] = read_table(folders / f"{run}.csv")
    assert list(found["off"].columns) == [
        "case", "one", "two", "surface_dice_one", "surface_dice_two", "hd95_one", "hd95_two"
    ]  # fmt: skip
    assert found["off"].cases == [f"c{i}" for i in range(4)]
    assert found["off"].numbers("one") == pytest.approx(5 / 6) and found["right"].numbers("one") == pytest.approx(1)
    assert found["off"].numbers("hd95_one") == pytest.approx(2.5) and not found["right"].numbers("hd95_one").any()
    assert (found["off"].numbers("surface_dice_one") < 1).all()
    medvit(folders / "off", *maps, "--write", folders / "off.csv", "--tolerance", 2.5)
    assert (read_table(folders / "off.csv").numbers("surface_dice_one") == 1).all()
    compared = medvit(
        folders / "right",
        *maps,
        "--write",
        folders / "right.csv",
        "--against",
        folders / "off.csv",
        "-m",
        "hd95_one",
        *FAST,
    )
    row = dict(zip(*cells(compared), strict=True))
    assert (row["value"], row["against"], row["difference"]) == ("0.0000", "2.5000", "-2.5000")


def test_what_no_image_holds_is_empty_and_what_one_misses_infinitely_far(folders):
    for file in ("truth/c0.nii.gz", "right/c0_seg.nii.gz", "right/c1_seg.nii.gz"):
        write_nifti(folders / file, np.zeros((12, 12, 12), dtype=np.uint8), make_affine())
    table = folders / "t.csv"
    maps = ("--truth", folders / "truth", "--structures", "one", "--write", table)
    medvit(folders / "right", *maps)
    assert table.read_text().splitlines()[:3] == ["case,one,surface_dice_one,hd95_one", "c0,,,", "c1,0,0,inf"]
    assert "line 2: one of case c0 must be a finite number, got ''" in said(medvit(table, "-m", "one", code=1))
    table.write_text(table.read_text().replace("c0,,,\n", ""))
    assert cells(medvit(table, "-m", "one", *FAST))[1][2:5] == ["3", "-", "0.6667"]
    assert "hd95_one of case c1 must be a finite number, got 'inf'" in said(medvit(table, "-m", "hd95_one", code=1))


@pytest.mark.parametrize("names", ["one,one", "one,case"])
def test_names_of_structures_must_make_columns(folders, names):
    said_so = said(
        medvit(folders / "right", "--truth", folders / "truth", "--structures", names, "--write", "t.csv", code=2)
    )
    assert "must be different names, none of case, case_id, group, label, score, split" in said_so


def test_folders_need_names_and_a_file_to_write(folders):
    for options in (("--structures", "one"), ("--write", folders / "t.csv"), ("--structures", ",", "--write", "t.csv")):
        result = medvit(folders / "right", "--truth", folders / "truth", *options, code=2)
        assert "--truth needs --structures, the names of the labels, and --write, a CSV file" in said(result)
    maps = ("--truth", folders / "nothing", "--structures", "one", "--write", folders / "t.csv")
    assert "nothing: holds no label maps" in said(medvit(folders / "right", *maps, code=1))


def test_seeds_decide_the_draws(run):
    same = medvit(run, "-m", "dice", *FAST).stdout
    assert medvit(run, "-m", "dice", *FAST).stdout == same
    assert medvit(run, "-m", "dice", "--seed", "1", *FAST).stdout != same


def test_the_threshold_is_passed_on(run):
    for threshold, expected in ((0.0, "1.0000"), (0.99, "0.0000")):
        assert cells(medvit(run, "-m", "sensitivity", "--threshold", threshold, *FAST))[1][4] == expected


def test_a_split_is_chosen(tmp_path, run):
    header, *rows = run.read_text().splitlines()
    path = tmp_path / "splits.csv"
    path.write_text("\n".join([f"{header},split", *[f"{r},{'test' if i % 3 else 'val'}" for i, r in enumerate(rows)]]))
    assert cells(medvit(path, "--split", "test"))[1][2] == "8"
    assert "has the splits test, val; choose one with --split" in said(medvit(path, code=2))
    assert "--split must be one of test, val for" in said(medvit(path, "--split", "train", code=2))
    assert "--split must be one of none for" in said(medvit(run, "--split", "train", code=2))


def test_perfect_separation_is_remarked_upon(tmp_path):
    path = tmp_path / "perfect.csv"
    path.write_text("case_id,label,score\na,0,1\nb,0,2\nc,1,3\nd,1,4\n")
    result = medvit(path)
    assert "1.0000 to 1.0000" in result.stdout
    assert "where a metric is 0 or 1 its interval may be a point, however few the cases" in said(result)
    assert "its interval may be a point" in said(medvit(path, "-m", "sensitivity", "--json", *FAST))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("case_id,label,score\na,1,0.5\nb,1,0.4\n", "auroc: DeLong's variance needs two cases of each class"),
        ("case_id,label,score\na,1,0.5\nb,0,nan\n", "line 3: score of case b must be a finite number, got 'nan'"),
        ("case_id,label,score\na,1,0.5\nb,0\n", "line 3: needs 3 cells as the header has, got 2"),
        ("label,score\n1,0.5\n", "needs a column case_id, has label, score"),
    ],
)  # fmt: skip
def test_tables_that_cannot_be_evaluated_end_with_one(tmp_path, text, message):
    path = tmp_path / "broken.csv"
    path.write_text(text)
    result = medvit(path, code=1)
    assert f"medvit: {path}: {message}" in result.stderr
    assert result.stdout == ""


def test_missing_files_and_cases_end_with_one(tmp_path, run):
    assert "not readable as a table" in said(medvit(tmp_path / "none.csv", code=1))
    short = tmp_path / "short.csv"
    short.write_text("\n".join(run.read_text().splitlines()[:-1]))
    assert (
        f"{short}: must hold the cases of {run}; it lacks c11, 1 in all"
        in medvit(run, "--against", short, code=1).stderr
    )


def test_wrong_usage_ends_with_two(tmp_path, run):
    assert "--metric must be one of auroc, " in said(medvit(run, "-m", "f1", code=2))
    assert "(case_id, label, score, dice), got 'f1'" in said(medvit(run, "-m", "f1", code=2))
    plain = tmp_path / "plain.csv"
    plain.write_text("case,dice\na,1\nb,0.5\n")
    assert "--metric must name one of the columns case, dice" in said(medvit(plain, code=2))
    medvit(run, "--resamples", "5", code=2)
    medvit(code=2)


def test_the_help_names_every_metric_without_loading_any():
    assert NAMED == METRICS
    code = "import sys, medvit.cli_evaluate; print(*sorted({'numpy', 'scipy', 'torch', 'monai'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
