"""What the documents say must be so: links, files, error codes, knobs."""

from __future__ import annotations

import ast
import csv
import importlib
import inspect
import json
import re
import warnings
from pathlib import Path

import pytest

from medvit.errors import MedvitError

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("bundles/*/docs/*.md")])
BUNDLES = sorted(path.parent.parent for path in ROOT.glob("bundles/*/configs/metadata.json"))
CODE = re.compile(r"[a-z]+(-[a-z]+)*")
# where codes of manifests and JSON lines are made
SOURCES = ("data", "inference", "writers")


def document(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose(path: Path) -> str:
    """A document without its code blocks."""
    return re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """Fragments that headings of a document can be linked by."""
    headings = re.findall(r"^#+ (.+)$", prose(path), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def first_column(text: str) -> list[str]:
    """Code-formatted first cells of the tables in ``text``, several of one cell apart."""
    cells = re.findall(r"^\| (`[^|]+`) +\|", text, flags=re.MULTILINE)
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def section(path: Path, start: str, end: str) -> str:
    text = path.read_text(encoding="utf-8")
    assert text.count(start) == 1, f"{path.name} must say {start!r} once"
    return text.split(start)[1].split(end)[0]


@pytest.mark.parametrize("path", DOCUMENTS, ids=document)
def test_links_lead_somewhere(path: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if link.startswith(("https://", "http://")):
            continue
        target, _, fragment = link.partition("#")
        file = (path.parent / target).resolve() if target else path
        if not file.exists() or (fragment and fragment not in anchors(file)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("path", DOCUMENTS, ids=document)
def test_lines_are_short_enough_to_read(path: Path) -> None:
    lines = prose(path).splitlines()
    assert [line for line in lines if len(line) > 125 and not line.startswith("|")] == []


def made_codes() -> set[str]:
    """Every code that medvit can put into a manifest or a JSON line, found in its source."""
    codes = set()
    for room in SOURCES:
        for file in (ROOT / "medvit" / room).glob("*.py"):
            importlib.import_module(f"medvit.{room}.{file.stem}")  # so that __subclasses__ knows its errors
            codes |= codes_in(ast.parse(file.read_text(encoding="utf-8")))
    classes = [MedvitError]
    for one in classes:
        classes += one.__subclasses__()
    return codes | {one.code for one in classes if one.__module__.startswith("medvit.")}


def codes_in(tree: ast.AST) -> set[str]:
    """Codes in calls ``UnreadableSeries(what, code, ...)`` and the like, and in pairs ``code, reason``."""
    found: set[str] = set()
    for node in ast.walk(tree):
        function = node.func if isinstance(node, ast.Call) else None
        name = getattr(function, "id", getattr(function, "attr", ""))
        place = {"UnreadableSeries": 1, "SetAside": 1, "problem": 1, "_record": 1, "_Defect": 0}.get(name)
        if isinstance(node, ast.Call) and place is not None:
            found |= codes_of(node.args[place : place + 1])
        elif isinstance(node, ast.Return) or (isinstance(node, ast.Assign) and assigns_code(node.targets[0])):
            pair = node.value
            if isinstance(pair, ast.Tuple) and len(pair.elts) == 2:
                found |= codes_of(pair.elts[:1])
    return found


def codes_of(nodes: list[ast.expr]) -> set[str]:
    constants = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return {value for value in constants if CODE.fullmatch(value)}


def assigns_code(target: ast.expr) -> bool:
    names = [getattr(part, "id", "") for part in (target.elts if isinstance(target, ast.Tuple) else [target])]
    return "code" in names or "defect" in names


def test_the_scan_for_codes_sees_every_way_of_making_one() -> None:
    source = """
raise UnreadableSeries(name, "one-way", reason)
aside = SetAside(path, "two", "a reason")
work.problem(name, "six", "a reason")
raise _Defect("seven", "a reason")
yield _record("set-aside", "eight", "a reason")
defect = ("three", f"{reason}")
code, reason = "four", ""
def f():
    return "five", reason
    return "Not a code", reason
"""
    assert codes_in(ast.parse(source)) == {"one-way", "two", "three", "four", "five", "six", "seven", "eight"}


def test_every_code_is_explained_and_no_other() -> None:
    text = (ROOT / "docs/errors.md").read_text(encoding="utf-8")
    explained = first_column(text)
    assert len(explained) == len(set(explained))
    assert set(explained) == made_codes() | {"notes"}  # "notes" is a status of images that were used


@pytest.mark.parametrize("name", ["inference", "train"])
def test_every_knob_is_explained_and_no_other(name: str) -> None:
    table = section(ROOT / "docs/bundles.md", f"\n`{name}.json`:\n", "\n## " if name == "train" else "\n`train.json`")
    having = [bundle for bundle in BUNDLES if (bundle / f"configs/{name}.json").is_file()]
    assert set(first_column(table)) == {knob for bundle in having for knob in knobs(bundle, name)}


def knobs(bundle: Path, name: str) -> set[str]:
    """Keys at the top of a bundle's config that a user may set; not every bundle has every one."""
    config = json.loads((bundle / f"configs/{name}.json").read_text(encoding="utf-8"))
    return {
        key
        for key, value in config.items()
        if key not in ("imports", "initialize", "run")
        and not isinstance(value, dict)
        and not str(value).startswith(("$", "@"))
        and not any(isinstance(part, dict) for part in (value if isinstance(value, list) else []))
    }


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda bundle: bundle.name)
def test_the_card_of_a_bundle_names_every_knob(bundle: Path) -> None:
    card = section(bundle / "docs/README.md", "\nKnobs: ", ";")
    assert set(re.findall(r"`(\w+)`", card)) == knobs(bundle, "inference")


def monais_swin_unetr() -> type:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        monai = importlib.import_module("monai")
        networks = importlib.import_module("monai.networks.nets")
    if not monai.__version__.startswith("1.6."):
        pytest.skip(f"the table describes MONAI 1.6, installed is {monai.__version__}")
    network: type = networks.SwinUNETR
    return network


def test_every_argument_of_monais_swin_unetr_is_accounted_for() -> None:
    told = " ".join(first_column(section(ROOT / "docs/swin_unetr.md", "| authors | here | |", "\n## ")))
    arguments = set(inspect.signature(monais_swin_unetr()).parameters)
    explained = {name for name in arguments if re.search(rf"\b{name}\b", told) or name.startswith("hyena_")}
    assert explained == arguments


def test_defaults_in_the_table_are_those_of_both_libraries() -> None:
    from medvit.models.swin_unetr import SwinUNETR

    ours, theirs = inspect.signature(SwinUNETR).parameters, inspect.signature(monais_swin_unetr()).parameters
    table = section(ROOT / "docs/swin_unetr.md", "| authors | here | |", "\n## ")
    defaults = dict(re.findall(r"`(\w+)=([^`]+)`", table))
    assert ours["clamp"].default == ast.literal_eval(defaults.pop("clamp"))
    assert defaults.pop("norm_layer") == "nn.LayerNorm"
    assert len(defaults) > 5
    for name, value in defaults.items():
        assert ours[name].default == theirs[name].default == ast.literal_eval(value), name


def test_the_sizes_of_training_crops_stand_in_the_card() -> None:
    table = ROOT.parent / "shared/data/msd_hippocampus/cases.csv"
    if not table.is_file():
        pytest.skip("the data set is not beside this checkout")
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    sizes = [[int(n) for n in row["shape"].split("x")] for row in rows]
    ranges = " × ".join(f"{min(axis)}-{max(axis)}" for axis in zip(*sizes, strict=True))
    card = (ROOT / "bundles/hippocampus_swin_unetr/docs/README.md").read_text(encoding="utf-8")
    assert f"{ranges} mm" in card
    assert f"{len(rows)} crops" in card
