"""One case through preprocessing, network and postprocessing: from files to a label map on the source grid."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from torch import Tensor

from medvit.data.labels import LabelMap, Structure
from medvit.data.space import Space
from medvit.data.volume import Source
from medvit.errors import MedvitError


class Predictor:
    """Segments one case at a time.

    Args:
        preprocessing: MONAI dictionary transform from ``{"image": path or paths}`` to a MetaTensor ``(C, i, j, k)``,
            loaded with :class:`medvit.data.VolumeReader`, whose meta data remember the source.
        network: ``(b, C, *roi)`` to logits ``(b, K, *roi)``; moved to ``device`` and set to evaluation by the caller.
        inferer: MONAI inferer, called as ``inferer(inputs, network)``.
        postprocessing: MONAI dictionary transform from logits ``pred`` to labels ``(1, *source shape)``.
        structures: what the labels mean.
        device: where the network runs.
    """

    def __init__(
        self,
        preprocessing: Callable[[Any], Any],
        network: Callable[..., Tensor],
        inferer: Callable[..., Tensor],
        postprocessing: Callable[[Any], Any],
        structures: Sequence[Structure],
        device: torch.device | str = "cpu",
    ):
        self.preprocessing, self.network, self.inferer = preprocessing, network, inferer
        self.postprocessing, self.structures, self.device = postprocessing, tuple(structures), torch.device(device)

    def __call__(self, case: Mapping[str, Any]) -> LabelMap:
        """Label map of one case on the grid of its files.

        Args:
            case: ``{"image": path or paths, "case": name}`` and perhaps ``"notes"`` about the image, as
                :func:`medvit.data.list_cases` gives.

        Raises:
            MedvitError: the case cannot be read or placed; MONAI wraps it, see :func:`root_cause`.
        """
        item = self.preprocessing(dict(case))
        image = item["image"]
        with repeatable():
            logits = self.inferer(image[None].to(self.device), self.network)[0]
        labels: MetaTensor = self.postprocessing({**item, "pred": logits})["pred"]
        meta = image.meta
        array = np.asarray(labels.cpu())[0]
        affine = np.asarray(torch.as_tensor(meta["original_affine"]), dtype=np.float64)
        source = Source(
            kind=str(meta["medvit_kind"]),
            files=tuple(Path(file) for file in meta["medvit_files"]),
            modality=str(meta["modality"]),
            study_uid=str(meta["study_uid"]),
            series_uid=str(meta["series_uid"]),
            name=str(case["case"]),
            frames=tuple(int(number) for number in meta["medvit_frames"]),
            mosaic=bool(meta["medvit_mosaic"]),
        )
        space = Space.from_affine(array.shape, affine, meta.get("frame_of_reference"), str(meta["medvit_unit"]))
        notes = dict.fromkeys((*case.get("notes", ()), *str(meta["medvit_notes"]).splitlines()))
        return LabelMap(array, space, source, self.structures, tuple(notes))


@contextmanager
def repeatable() -> Iterator[None]:
    """Inference that gives one answer per image, whichever way the process was started."""
    exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    with torch.inference_mode(), exact:
        yield


def root_cause(error: BaseException) -> BaseException:
    """The medvit error that ``error`` was raised from (MONAI wraps what a transform raises), else the first cause."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    return next((e for e in chain if isinstance(e, MedvitError)), chain[-1])
