"""Embeddings computed once and kept: vectors by case, and which weights made them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as as_bytes
from torch import Tensor, nn

from medvit.adapt.fingerprint import state_sha256
from medvit.errors import UnreadableFile, WeightsMismatch

Read = Callable[[Tensor], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Embeddings:
    """Vectors of N cases.

    Args:
        vectors: by name, ``(N, D)`` float32 on the CPU; D may differ between names.
        cases: N names, all different.
        encoder_sha256: of the encoder's weights, see :func:`~medvit.adapt.fingerprint.state_sha256`.

    Raises:
        ValueError: vectors that are not finite or not one per case, a case that comes twice.
    """

    vectors: dict[str, Tensor]
    cases: tuple[str, ...]
    encoder_sha256: str

    def __post_init__(self) -> None:
        if len(set(self.cases)) != len(self.cases):
            twice = sorted({case for case in self.cases if self.cases.count(case) > 1})
            raise ValueError(f"every case must come once, got {', '.join(twice[:5])} several times")
        for name, values in self.vectors.items():
            if values.dim() != 2 or len(values) != len(self.cases):
                raise ValueError(
                    f"{name} must hold one vector for each of {len(self.cases)} cases, got shape {tuple(values.shape)}"
                )
            bad = (~values.isfinite().all(dim=1)).nonzero().flatten().tolist()
            if bad:
                raise ValueError(f"{name} must be finite, it is not for {', '.join(self.cases[i] for i in bad[:5])}")

    def of(self, cases: Sequence[str], name: str = "embed") -> Tensor:
        """Vectors ``(len(cases), D)`` of these cases, in their order.

        Raises:
            ValueError: a case without a vector, or no vectors of this name.
        """
        if name not in self.vectors:
            raise ValueError(f"there are the vectors {', '.join(self.vectors)}, none named {name!r}")
        place = {case: i for i, case in enumerate(self.cases)}
        missing = [case for case in cases if case not in place]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(cases)} cases have no vector, among them {', '.join(missing[:5])}"
            )
        return self.vectors[name][[place[case] for case in cases]]

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all, over one that exists; equal embeddings give equal bytes."""
        path = Path(path)
        part = path.with_name(path.name + ".part")
        metadata = {"cases": json.dumps(self.cases), "encoder_sha256": self.encoder_sha256}
        data = as_bytes({name: values.contiguous() for name, values in self.vectors.items()}, metadata)
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.dumps(json.loads(data[8:end]), sort_keys=True).encode()  # safetensors orders metadata at random
        header += b" " * (-len(header) % 8)
        part.write_bytes(len(header).to_bytes(8, "little") + header + data[end:])
        part.replace(path)

    @classmethod
    def load(cls, path: str | Path, encoder: nn.Module | None = None) -> Embeddings:
        """Read what :meth:`save` wrote.

        Args:
            path: the file.
            encoder: refuse embeddings that other weights than this encoder's have made; None: take any.

        Raises:
            UnreadableFile: no such file, or no embeddings in it.
            WeightsMismatch: embeddings of another encoder.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                vectors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            found = cls(vectors, tuple(json.loads(metadata["cases"])), metadata["encoder_sha256"])
        except KeyError as error:
            raise UnreadableFile(path, f"holds no embeddings: its metadata lacks {error}") from error
        except (OSError, SafetensorError, ValueError) as error:
            raise UnreadableFile(path, f"holds no embeddings that can be read ({error})") from error
        if encoder is not None and (expected := state_sha256(encoder.state_dict())) != found.encoder_sha256:
            raise WeightsMismatch(
                f"{path}: made by weights of sha256 {found.encoder_sha256}, but this encoder's are {expected}; "
                "compute the embeddings anew"
            )
        return found


def extract(
    encoder: nn.Module, batches: Iterable[tuple[Sequence[str], Tensor]], read: Read | None = None
) -> Embeddings:
    """Embed images, in evaluation mode and without gradients; the modes of all modules are put back afterwards.

    Args:
        encoder: of the contract of :class:`~medvit.models.encoder.Encoder`; images are moved to its device.
        batches: names of B cases with their images ``(B, C, *spatial)``.
        read: images to vectors ``(B, D)`` by name; None: the encoder's own summary, as ``"embed"``.

    Raises:
        ValueError: no batch, other numbers of names and images, see also :class:`Embeddings`.
    """
    network: Any = encoder
    modes = [(module, module.training) for module in encoder.modules()]
    first = next(encoder.parameters(), None)
    cases: list[str] = []
    parts: dict[str, list[Tensor]] = {}
    encoder.eval()
    try:
        with torch.no_grad():
            for names, images in batches:
                if len(names) != len(images):
                    raise ValueError(f"a batch needs one name per image, got {len(names)} for {len(images)} images")
                images = images if first is None else images.to(first.device)
                for key, values in (read(images) if read else {"embed": network.embed(images)}).items():
                    parts.setdefault(key, []).append(values.float().cpu())
                cases += names
    finally:
        for module, mode in modes:
            module.training = mode
    if not cases:
        raise ValueError("there is nothing to embed: no batch came")
    vectors = {key: torch.cat(values) for key, values in parts.items()}
    return Embeddings(vectors, tuple(cases), state_sha256(encoder.state_dict()))
