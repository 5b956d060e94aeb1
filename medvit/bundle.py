"""MONAI bundles: finding them, checking them, and turning their configuration into objects.

A bundle is a folder with ``configs/metadata.json``, ``configs/inference.json`` and ``models/model.pt``; see MONAI's
bundle specification. medvit's own facts stand in the metadata under ``"medvit"``: ``weights_sha256`` and, where labels
are drawn, ``structures`` (codes and colours of each). Names of labels and classes are the ``channel_def`` of ``pred``;
an embedding (``format`` ``latent``) has none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medvit.data.labels import Structure
from medvit.errors import BundleError, MedvitError, WeightsMismatch

if TYPE_CHECKING:
    import torch
    from torch import nn

    from medvit.inference.batch import FolderRunner

WEIGHTS = "models/model.pt"
_NEEDED = ("configs/metadata.json", "configs/inference.json", WEIGHTS, "LICENSE", "docs/README.md")


def bundle_folders() -> list[Path]:
    """Folders searched for bundles by name: those in ``MEDVIT_BUNDLES``, then the ones that came with medvit."""
    given = [Path(p) for p in os.environ.get("MEDVIT_BUNDLES", "").split(os.pathsep) if p]
    package = Path(__file__).resolve().parent
    # a wheel carries the bundles inside the package, a checkout beside it
    return [p for p in (*given, package / "_bundles", package.parent / "bundles") if p.is_dir()]


def list_bundles() -> list[Bundle]:
    """Every bundle in :func:`bundle_folders`, by name; the first of a name wins."""
    found: dict[str, Bundle] = {}
    for folder in bundle_folders():
        for path in sorted(folder.iterdir()):
            if (path / "configs/metadata.json").is_file():
                found.setdefault(path.name, Bundle(path))
    return [found[name] for name in sorted(found)]


def find_bundle(name_or_path: str | Path) -> Bundle:
    """A bundle by its folder, or by its name among :func:`list_bundles`.

    Raises:
        BundleError: neither is there; the message lists the known names.
    """
    path = Path(name_or_path)
    if (path / "configs/metadata.json").is_file():
        return Bundle(path.resolve())
    known = {bundle.name: bundle for bundle in list_bundles()}
    if str(name_or_path) in known:
        return known[str(name_or_path)]
    raise BundleError(
        f"{name_or_path}: no such bundle; give a folder that holds configs/metadata.json, or one of: "
        + (", ".join(known) or "none are installed")
    )


def locate(name: str) -> str:
    """Root of the bundle called ``name``, for ``bundle_root`` in its configs.

    That is the current folder, or one in it, if it is a bundle of that name; else the installed one. Its weights are
    checked against the sha256 in the config's metadata all the same.

    Raises:
        BundleError: no bundle of that name; pass ``--bundle_root``.
    """
    here = Path.cwd()
    if here.name == name and (here / "configs/metadata.json").is_file():
        return str(here)
    try:
        return str(find_bundle(name).root)
    except BundleError as error:
        raise BundleError(f"{error}; or pass --bundle_root") from None


def select_device(name: str = "auto") -> torch.device:
    """``"auto"`` (CUDA where there is one, else the CPU) or any name torch knows.

    Raises:
        BundleError: CUDA is asked for and absent, or the name is unknown.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BundleError(f"device {name!r} is unknown to torch; use auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BundleError(f"device {name!r} needs a CUDA GPU and torch sees none; use auto or cpu")
    return device


def load_network(
    network: nn.Module, bundle_root: str | Path, checkpoint: str, sha256: str, device: torch.device | str = "cpu"
) -> nn.Module:
    """Put a bundle's weights into its network, every key accounted for, and make it ready for inference.

    Args:
        network: freshly built, changed in place.
        bundle_root: the bundle's folder.
        checkpoint: weights, relative to it.
        sha256: what the metadata says the file hashes to.
        device: where the network goes.

    Raises:
        WeightsMismatch: no file, another hash, other keys or shapes.
    """
    from medvit.models.weights import load_weights, read_state

    path = Path(bundle_root) / checkpoint
    state = read_state(path, sha256)
    try:
        load_weights(network, state)
    except WeightsMismatch as error:
        raise WeightsMismatch(f"{path}: {error}") from None
    return network.to(device).eval()


def structures(metadata: Mapping[str, Any]) -> tuple[Structure, ...]:
    """What the labels of a segmentation bundle mean: names from ``channel_def``, codes from ``medvit.structures``.

    Raises:
        BundleError: one of them is absent, or they disagree about the labels.
    """
    try:
        names = metadata["network_data_format"]["outputs"]["pred"]["channel_def"]
        codes = metadata["medvit"]["structures"]
    except KeyError as error:
        raise BundleError(
            f"the metadata lack {error}: needed are the channel_def of pred and medvit.structures"
        ) from None
    if set(codes) != set(names) - {"0"}:
        raise BundleError(
            f"medvit.structures must describe every label of channel_def but 0: {sorted(set(names) - {'0'})}, "
            f"got {sorted(codes)}"
        )
    return Structure.from_metadata({label: {"name": names[label], **codes[label]} for label in codes})


def folder_runner(
    dataset: Any,
    network: nn.Module,
    inferer: Any,
    postprocessing: Any,
    metadata: Mapping[str, Any],
    output_dir: str | Path,
    formats: Sequence[str],
    existing: str,
    device: torch.device | str,
    settings: Mapping[str, Any],
) -> FolderRunner:
    """The evaluator of a segmentation bundle's inference config: every case of ``dataset``, one at a time.

    Args:
        dataset: MONAI ``Dataset`` whose ``data`` are cases (see :func:`medvit.data.list_cases`) and whose ``transform``
            is the preprocessing.
        network: with its weights, on ``device``.
        inferer: see :class:`~medvit.inference.predictor.Predictor`.
        postprocessing: likewise.
        metadata: the bundle's, for the structures and for what the manifest says of the bundle.
        output_dir: see :class:`~medvit.inference.batch.FolderRunner`.
        formats: see :func:`~medvit.inference.formats.make_writers`.
        existing: see :class:`~medvit.inference.batch.FolderRunner`.
        device: where the network is.
        settings: what else decides about the results, such as overlap and precision; for the manifest. Resuming with
            others, or with other formats, is refused.
    """
    from medvit.inference.batch import FolderRunner
    from medvit.inference.formats import make_writers
    from medvit.inference.predictor import Predictor

    predictor = Predictor(dataset.transform, network, inferer, postprocessing, structures(metadata), device)
    provenance = _provenance(metadata, device, settings, formats)
    writers = make_writers(formats, provenance["bundle"], provenance["bundle_version"])
    return FolderRunner(dataset.data, predictor, writers, output_dir, existing=existing, provenance=provenance)


def classes(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the classes of a bundle that classifies, in the order of its logits: the ``channel_def`` of ``pred``.

    A bundle whose ``pred`` is an embedding, of the format ``latent``, has none.

    Raises:
        BundleError: it is absent or does not name every channel.
    """
    pred = metadata.get("network_data_format", {}).get("outputs", {}).get("pred", {})
    if pred.get("format") == "latent":
        return ()
    names = pred.get("channel_def", {})
    if not names or list(names) != [str(n) for n in range(int(pred.get("num_channels", 0)))]:
        raise BundleError(f"the channel_def of pred must name its channels 0, 1 and so on, got {names}")
    return tuple(names.values())


def vector_runner(
    dataset: Any,
    network: nn.Module,
    inferer: Any,
    postprocessing: Any,
    metadata: Mapping[str, Any],
    output_dir: str | Path,
    formats: Sequence[str],
    existing: str,
    device: torch.device | str,
    settings: Mapping[str, Any],
) -> FolderRunner:
    """The evaluator of a bundle that classifies or embeds images: as :func:`folder_runner`, but with tables.

    Args:
        dataset: as there.
        network: ``(1, C, *spatial)`` to logits ``(1, K)`` or an embedding; for the formats ``"embedding"`` and
            ``"patches"`` with an encoder of medvit's contract, see :func:`medvit.models.heads.as_encoder`.
        inferer: MONAI inferer, called as ``inferer(inputs, network)``.
        postprocessing: MONAI dictionary transform from logits ``pred`` ``(K,)`` to probabilities ``(K,)``; used for
            the format ``"scores"`` alone.
        metadata: the bundle's, for the names of the classes and for the manifest.
        output_dir: as there.
        formats: see :func:`~medvit.inference.formats.make_vector_writers`.
        existing: as there.
        device: as there.
        settings: as there.
    """
    from medvit.adapt.embeddings import Embeddings
    from medvit.adapt.fingerprint import state_sha256
    from medvit.inference.batch import FolderRunner
    from medvit.inference.formats import make_vector_writers
    from medvit.inference.vectors import EMBEDDING, PATCHES, SCORES, VectorPredictor, VectorReport
    from medvit.models.heads import as_encoder

    names = classes(metadata)
    writers = make_vector_writers(formats, names)
    heads: dict[str, Any] = {}
    report = VectorReport(names)
    if SCORES in formats:
        heads[SCORES] = lambda images: postprocessing({"pred": inferer(images, network)[0]})["pred"]
    encoder: Any = as_encoder(network) if {EMBEDDING, PATCHES} & set(formats) else None
    if PATCHES in formats:
        heads[PATCHES] = lambda images: inferer(images, lambda batch: encoder(batch)[-1])[0]  # the coarsest map
    if EMBEDDING in formats:
        heads[EMBEDDING] = lambda images: inferer(images, encoder.embed)[0]
        sha256 = state_sha256(encoder.state_dict())
        report = VectorReport(
            names, lambda cases, vectors, path: Embeddings(vectors, tuple(cases), sha256).save(path), sha256
        )
    return FolderRunner(
        dataset.data,
        VectorPredictor(dataset.transform, heads, device),
        writers,
        output_dir,
        existing=existing,
        provenance=_provenance(metadata, device, settings, formats),
        report=report,
    )


def _provenance(
    metadata: Mapping[str, Any], device: torch.device | str, settings: Mapping[str, Any], formats: Sequence[str]
) -> dict[str, Any]:
    """What the manifest says of the bundle and how it was run."""
    from importlib.metadata import version

    return {
        "bundle": str(metadata["name"]),
        "bundle_version": str(metadata["version"]),
        "weights_sha256": metadata["medvit"]["weights_sha256"],
        "device": str(device),
        "settings": {**settings, "formats": list(formats)},
        "versions": {package: version(package) for package in ("medvit", "monai", "torch")},
    }


@dataclass(frozen=True)
class Bundle:
    """A bundle folder.

    Args:
        root: the folder.
    """

    root: Path

    @property
    def name(self) -> str:
        """The folder's name, by which tools know the bundle."""
        return self.root.name

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """``configs/metadata.json``.

        Raises:
            BundleError: it is absent or no JSON object.
        """
        path = self.root / "configs/metadata.json"
        try:
            metadata = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BundleError(f"{path}: cannot be read ({error})") from error
        if not isinstance(metadata, dict):
            raise BundleError(f"{path}: must hold a JSON object, got {type(metadata).__name__}")
        return metadata

    def parser(self, *stems: str, **overrides: Any) -> Any:
        """MONAI ``ConfigParser`` over the configs ``stems`` (default inference), each over those before it.

        Args:
            *stems: names below ``configs/`` without ``.json``.
            **overrides: new values of top-level keys.

        Raises:
            BundleError: no such config, an override that is no top-level key, or a text that MONAI takes for syntax.
        """
        from monai.bundle import ConfigParser

        parser = ConfigParser()
        paths = [self.root / "configs" / f"{stem}.json" for stem in stems or ("inference",)]
        try:
            parser.read_config([str(path) for path in paths])
            parser.read_meta(str(self.root / "configs/metadata.json"))
        except (OSError, ValueError) as error:
            raise BundleError(f"{self.root}: the configuration cannot be read ({error})") from error
        for key, value in {"bundle_root": self.root, **overrides}.items():
            if key not in parser.get():
                raise BundleError(
                    f"{paths[0]}: has no key {key!r} to override; it has {', '.join(sorted(parser.get()))}"
                )
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str) and ("#" in text or text[:1] in ("$", "@", "%")):
                    raise BundleError(
                        f"{text!r}: MONAI reads '#', and '$', '@' or '%' in front, as syntax; give a pathlib.Path"
                    )
            parser[key] = value
        return parser

    def runner(self, **overrides: Any) -> FolderRunner:
        """The runner of ``inference.json`` with ``overrides`` of its top-level keys.

        Raises:
            MedvitError: configuration, weights or inputs do not serve; MONAI's wrapping is removed.
        """
        from medvit.inference.batch import FolderRunner

        runner = self._build("evaluator", **overrides)
        if not isinstance(runner, FolderRunner):
            raise BundleError(
                f"{self.root}: its evaluator must be a medvit.bundle.folder_runner, got {type(runner).__name__}; "
                "run this bundle with python -m monai.bundle run"
            )
        return runner

    def network(self) -> nn.Module:
        """The network of ``inference.json`` with the bundle's weights, on the CPU, in evaluation mode."""
        network: nn.Module = self._build("network", device="cpu")
        return network

    def _build(self, key: str, **overrides: Any) -> Any:
        from medvit.inference.predictor import root_cause

        try:
            return self.parser(**overrides).get_parsed_content(key)
        except Exception as error:
            cause = root_cause(error)
            if isinstance(cause, MedvitError):
                raise cause from cause.__cause__
            reason = f"{type(cause).__name__}: {cause}"
            raise BundleError(f"{self.root}: {key!r} of its configuration cannot be built ({reason})") from error

    def verify(self) -> Iterator[tuple[str, str | None]]:
        """Check the bundle piece by piece; yields the name of each check and what is wrong, or None."""
        yield from ((name, self._attempt(check)) for name, check in self._checks().items())

    def _checks(self) -> dict[str, Any]:
        return {
            "files": self._check_files,
            "metadata": self._check_metadata,
            "weights": self._check_weights,
            "network": self._check_network,
            "configs agree": self._check_agreement,
        }

    @staticmethod
    def _attempt(check: Any) -> str | None:
        try:
            check()
        except Exception as error:
            return str(error) if isinstance(error, MedvitError) else f"{type(error).__name__}: {error}"
        return None

    def _check_files(self) -> None:
        absent = [name for name in _NEEDED if not (self.root / name).is_file()]
        if absent:
            raise BundleError(f"{self.root}: lacks {', '.join(absent)}")

    def _check_metadata(self) -> None:
        if self.metadata.get("name") != self.name:
            raise BundleError(f"the metadata call the bundle {self.metadata.get('name')!r}, its folder {self.name!r}")
        if self.metadata.get("version") not in self.metadata.get("changelog", {}):
            raise BundleError(f"version {self.metadata.get('version')!r} is not in the changelog")
        (classes if self._gives_vectors else structures)(self.metadata)

    @property
    def _gives_vectors(self) -> bool:
        """Whether the network gives a vector per image and no label map, by MONAI's words for it."""
        outputs = self.metadata.get("network_data_format", {}).get("outputs", {})
        return outputs.get("pred", {}).get("type") in ("probabilities", "tuples")

    def _check_weights(self) -> None:
        from medvit.models.weights import read_state

        sha256 = self.metadata.get("medvit", {}).get("weights_sha256")
        if not sha256:
            raise BundleError("the metadata must hold medvit.weights_sha256, which the weights are checked against")
        read_state(self.root / WEIGHTS, sha256)

    def _check_network(self) -> None:
        import torch

        network = self.network()
        # a network that takes images of two ranks describes the other one in a format of its own
        for shapes in [value for key, value in self.metadata.items() if key.endswith("_data_format")]:
            image, pred = shapes["inputs"]["image"], shapes["outputs"]["pred"]
            size = [n if isinstance(n, int) else 64 for n in image["spatial_shape"]]
            with torch.inference_mode():
                out = network(torch.zeros(1, image["num_channels"], *size))
            expected = (1, pred["num_channels"], *(() if self._gives_vectors else size))
            if tuple(out.shape) != expected:
                raise BundleError(f"by the metadata the network returns {expected}, it returns {tuple(out.shape)}")
            if not out.isfinite().all():
                raise BundleError("the network returns NaN or infinity for an image of zeros")

    def _check_agreement(self) -> None:
        if not (self.root / "configs/train.json").is_file():
            return
        train, inference = self.parser("train").get(), self.parser().get()
        for key in ("network_def", "roi_size"):
            if train.get(key) != inference.get(key):
                raise BundleError(f"train.json and inference.json disagree about {key}")
