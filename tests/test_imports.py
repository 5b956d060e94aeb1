"""Who may import whom. Two towers (tensors, patients) stand on three base modules; nothing points upwards."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "medvit"
BASE = {"dims", "errors", "registry"}
LAYERS, MODELS = {"kernels", *BASE}, {"kernels", "layers", *BASE}
ENCODERS = {"models", *MODELS}
PATIENT = {"data", "dims", "errors"}
INFERENCE = {"transforms", "writers", *PATIENT}
BUNDLE = {"inference", "pretrain", "adapt", *INFERENCE, *ENCODERS}

# room: the rooms it may import. A new room must be entered here.
ALLOWED = {
    "dims": set(), "errors": set(), "registry": set(),
    "kernels": BASE, "layers": LAYERS, "models": MODELS, "pretrain": ENCODERS, "adapt": {"pretrain", *ENCODERS},
    "data": {"dims", "errors"}, "transforms": PATIENT, "writers": PATIENT, "inference": INFERENCE,
    "bundle": BUNDLE, "terminal": {"errors"}, "adopt": {"bundle", *BUNDLE},
    "cli_weights": {"adopt", "bundle", "terminal", *BUNDLE},
    "cli_evaluate": {"terminal", *BUNDLE},
    "cli": {"bundle", "cli_evaluate", "cli_weights", "terminal", *BUNDLE}, "__init__": {"registry", "errors"},
}  # fmt: skip
# The tensor tower has never heard of a patient, a file or MONAI.
PATIENT_PACKAGES = {"monai", "pydicom", "highdicom", "nibabel", "SimpleITK"}
FORBIDDEN = dict.fromkeys([*BASE, "kernels", "layers", "models"], PATIENT_PACKAGES)


def imported(tree, package):
    """(line, dotted name) of every import in a module of ``package``; ``from .a import b`` becomes ``package.a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            yield from ((node.lineno, ".".join([*parents, *filter(None, [node.module]), a.name])) for a in node.names)


def violations(source, path):
    """Sentences about imports that ``source``, the module at ``path`` (relative to the package), must not have."""
    parts = Path(path).with_suffix("").parts
    room = parts[0]
    if room not in ALLOWED:
        yield f"{path}: {room!r} is in no room of tests/test_imports.py; enter it there with what it may import"
        return
    for line, name in imported(ast.parse(source), ".".join(["medvit", *parts[:-1]])):
        top, _, rest = name.partition(".")
        if top in FORBIDDEN.get(room, ()):
            yield f"{path}:{line}: {room} may not import {top}"
        if top == "medvit":
            target = rest.split(".")[0]
            if target != room and target not in ALLOWED[room]:
                yield f"{path}:{line}: {room} may not import {name}"


MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES)
def test_imports_point_downwards(path):
    assert list(violations((PACKAGE / path).read_text(encoding="utf-8"), path)) == []


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("inference/batch.py", "\nfrom medvit.models import swin", "2: inference may not import medvit.models.swin"),
        ("inference/batch.py", "from medvit import layers", "1: inference may not import medvit.layers"),
        ("data/dicom.py", "def f():\n    import medvit.writers.nifti", "2: data may not import medvit.writers.nifti"),
        ("data/dicom.py", "from ..transforms import resample", "1: data may not import medvit.transforms.resample"),
        ("data/dicom.py", "from .. import bundle", "1: data may not import medvit.bundle"),
        ("layers/conv.py", "from ..models.swin import x", "1: layers may not import medvit.models.swin.x"),
        ("layers/conv.py", "from medvit.data import Space", "1: layers may not import medvit.data.Space"),
        ("kernels/windows.py", "if TYPE_CHECKING:\n    import monai.data", "2: kernels may not import monai"),
        ("errors.py", "from medvit.dims import conv", "1: errors may not import medvit.dims.conv"),
        ("data/slices.py", "from medvit import create_model", "1: data may not import medvit.create_model"),
        ("data/slices.py", "import medvit", "1: data may not import medvit"),
        ("__init__.py", "from medvit.bundle import load", "1: __init__ may not import medvit.bundle.load"),
    ],
)  # fmt: skip
def test_a_violation_is_found(path, source, expected):
    assert list(violations(source, path)) == [f"{path}:{expected}"]


def test_a_new_room_must_be_entered():
    (sentence,) = violations("", "utils.py")
    assert sentence.startswith("utils.py: 'utils' is in no room")


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("inference/batch.py", "import torch, monai\nfrom medvit.data.space import Space\nfrom . import sliding"),
        ("layers/block.py", "from ..kernels.attention import x\nfrom .conv import y\nfrom medvit.dims import conv"),
        ("bundle.py", "from medvit.inference import SlidingWindow\nfrom medvit import registry"),
    ],
)
def test_what_is_allowed_is_not_reported(path, source):
    assert list(violations(source, path)) == []


@pytest.mark.parametrize("module", ["medvit", "medvit.data", "medvit.transforms", "medvit.writers", "medvit.inference"])
def test_packages_import_without_monai(module):
    code = f"import sys, {module}; print(*sorted({{'monai', 'torchvision'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=True)
    assert done.stdout.split() == []
