"""The commands and programs that README, docs and the pages of bundles print, run as they are printed.

The rule: a block fenced ``bash`` or ``python`` is run, in a scratch folder that looks like a checkout after quickstart,
with medvit's environment on the PATH. A block fenced ``console`` needs minutes, or data that are not part of the
project: of its commands the options and the files of this repository are checked. There are no other fences.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from medvit.cli import app

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("bundles/*/docs/*.md")])
FENCES = {"bash", "python", "console"}
TRAIN = "bundles/hippocampus_swin_unetr/configs/train.json"


def blocks(path: Path, kind: str) -> list[tuple[str, str]]:
    """(document and line, code) of every block of one kind."""
    text = path.read_text(encoding="utf-8")
    found = re.finditer(rf"^```{kind}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [(f"{path.relative_to(ROOT)}:{text[: m.start(1)].count(chr(10)) + 1}", m[1]) for m in found]


def everything(kind: str) -> list[tuple[str, str]]:
    return [block for path in DOCUMENTS for block in blocks(path, kind)]


def run(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    quiet = {"PATH": tools, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **quiet}, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a checkout in which quickstart has run, as far as documents refer to it."""
    pytest.importorskip("nilearn", reason="the demo study needs nilearn")
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "bundles").symlink_to(ROOT / "bundles")
    study = folder / "quickstart-output/study"
    made = run([sys.executable, str(ROOT / "scripts/make_demo_study.py"), str(study)], folder)
    assert made.returncode == 0, made.stderr
    return folder


def test_every_fence_is_of_a_kind_that_is_checked() -> None:
    for path in DOCUMENTS:
        opened = re.findall(r"^```(.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[::2]
        assert set(opened) <= FENCES, path


@pytest.fixture(scope="module")
def after_commands(checkout: Path) -> Path:
    """The checkout after every shell block of the documents, in their order."""
    found = everything("bash")
    assert found
    for where, code in found:
        done = run(["bash", "-euo", "pipefail", "-c", code], checkout)
        assert done.returncode == 0, f"{where}: exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return checkout


def test_shell_commands_leave_what_the_readme_lists(after_commands: Path) -> None:
    written = {path.name for path in (after_commands / "results").rglob("*") if path.is_file()}
    rows = re.findall(r"^\| (`.+`) \|", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    listed = [name.removeprefix("<image>") for row in rows for name in re.findall(r"`([^`]+)`", row)]
    assert len(listed) == 6
    assert [name for name in listed if not any(file.endswith(name) for file in written)] == []
    assert [file for file in written if not file.endswith(tuple(listed))] == []


def test_both_doors_lead_to_the_same_masks(after_commands: Path) -> None:
    ours, monais = after_commands / "results", after_commands / "results-monai"
    masks = sorted(path.relative_to(ours) for path in ours.rglob("*_seg.nii.gz"))
    assert len(masks) == 3
    for mask in masks:
        assert (ours / mask).read_bytes() == (monais / mask).read_bytes(), mask


def test_python_programs_run(checkout: Path) -> None:
    # One process for all, since importing MONAI takes seconds; each block has its own names. A traceback shows where.
    found = everything("python")
    assert found
    program = "import sys, json\nfor where, code in json.load(open(sys.argv[1])):\n"
    program += "    exec(compile(code, where, 'exec'), {'__name__': '__main__'})\n    print('done', where)\n"
    (checkout / "blocks.json").write_text(json.dumps(found))
    done = run([sys.executable, "-c", program, "blocks.json"], checkout)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "left_hippocampus ok" in done.stdout


@pytest.mark.parametrize("broken", ["medvit inspect no-such-folder", "false | cat", "no-such-command\ntrue"])
def test_a_broken_command_would_be_noticed(broken: str, tmp_path: Path) -> None:
    assert run(["bash", "-euo", "pipefail", "-c", broken], tmp_path).returncode != 0


def complaints(command: str) -> list[str]:
    """What is wrong with a command that is not run: options that do not exist, files that are not there."""
    words = shlex.split(re.sub(r"(^|\s)#.*", "", command))  # within a word # is no comment
    if not words:
        return []
    wrong = [word for word in words if word.startswith(("bundles/", "configs/", "scripts/", "./")) and not exists(word)]
    if words[0] == "medvit":
        known, rest = typer.main.get_command(app), words[1:]
        while rest and known and hasattr(known, "commands"):  # medvit weights convert ...
            wrong += [rest[0]] if rest[0] not in known.commands else []
            known, rest = known.commands.get(rest[0]), rest[1:]
        options = {name for parameter in known.params for name in parameter.opts} if known else {}
        wrong += [word for word in words if word.startswith("--") and word.partition("=")[0] not in options]
    elif "monai.bundle" in words:
        wrong += unknown_keys(words[words.index("monai.bundle") + 1 :])
    elif words[0] == "python":
        source = (ROOT / words[1]).read_text(encoding="utf-8") if exists(words[1]) else ""
        wrong += [word for word in words[2:] if word.startswith("--") and f'"{word}"' not in source]
    elif not exists(words[0]):
        wrong.append(words[0])
    return wrong


def exists(path: str) -> bool:
    return (ROOT / path.replace("$PWD/", "")).exists()


def unknown_keys(words: list[str]) -> list[str]:
    """What ``monai.bundle run`` is to run or to override, but no given config has, and configs that are not there."""
    if words[:1] != ["run"]:
        return words[:1]
    named, rest = (words[1:2], words[2:]) if words[1:2] and not words[1].startswith("--") else ([], words[1:])
    options = dict(zip(rest[::2], rest[1::2], strict=True))
    given = options.pop("--config_file").replace("$PWD/", "")
    files = ast.literal_eval(given) if given.startswith("[") else [given]
    if absent := [file for file in files if not exists(file)]:
        return absent
    keys = {key for file in files for key in json.loads((ROOT / file).read_text(encoding="utf-8"))}
    return [word for word in [*named, *options] if word.removeprefix("--").partition("#")[0] not in keys]


def commands(code: str) -> list[str]:
    return code.replace("\\\n", " ").splitlines()


@pytest.mark.parametrize(("where", "code"), everything("console"), ids=lambda value: value.partition("\n")[0])
def test_commands_that_are_not_run_name_what_exists(where: str, code: str) -> None:
    wrong = [problem for command in commands(code) for problem in complaints(command)]
    assert not wrong, where


@pytest.mark.parametrize(
    ("command", "wrong"),
    [
        ("medvit predict hippocampus_swin_unetr in --output out --overwrite", []),
        ("medvit predict hippocampus_swin_unetr in --outptu out", ["--outptu"]),
        ("medvit prdict", ["prdict"]),
        ("medvit weights inspect model.pt --json", []),
        ("medvit weights convrt model.pt", ["convrt"]),
        ("medvit weights convert model.pt --modle mae", ["--modle"]),
        ("./scripts/no-such-script # a comment", ["./scripts/no-such-script", "./scripts/no-such-script"]),
        ("python scripts/freeze_weights.py bundles/hippocampus_swin_unetr x.pt --halve", ["--halve"]),
        ("python -m monai.bundle run --config_file bundles/no/train.json", ["bundles/no/train.json"] * 2),
        ("python -m monai.bundle rum", ["rum"]),
        (f"torchrun -m monai.bundle run --config_file \"['{TRAIN}']\" --seeed 1", ["--seeed"]),
        (f"python -m monai.bundle run --config_file {TRAIN} --seed 1", []),
        ("python -m monai.bundle run probe --config_file configs/finetune/cxr_viral.json --views#contrast 0.0", []),
        (
            "python -m monai.bundle run prbe --config_file configs/finetune/cxr_viral.json --veiws#a 0",
            ["prbe", "--veiws#a"],
        ),
    ],
)
def test_a_wrong_command_would_be_noticed(command: str, wrong: list[str]) -> None:
    assert complaints(command) == wrong
