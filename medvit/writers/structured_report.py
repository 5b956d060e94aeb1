"""A DICOM structured report of volumes (TID 1500): per structure one group of measurements, tied to a SEG's segment."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom import Dataset

from medvit.data.labels import LabelMap
from medvit.data.segmentations import read_dicom_seg
from medvit.errors import OutputError
from medvit.writers.base import atomic, with_suffix
from medvit.writers.dicom_seg import DicomSegWriter
from medvit.writers.dicom_source import concept, dicom_source, numbered, quiet, require_equal

_SERIES_OFFSET = 1300  # behind all images in a viewer's list of series


class ReportWriter:
    """Volumes of DICOM images' structures as a measurement report (Enhanced SR, TID 1500).

    Each structure, also one without voxels, is a volumetric ROI group with its volume in mm³, as in the table of
    volumes, and a reference to its segment. The SEG must have been written before, under the same stem.

    Args:
        segmentation: the writer of the SEG to refer to; it names the algorithm too.
        suffix: what is put behind the stem.
    """

    def __init__(self, segmentation: DicomSegWriter, suffix: str = "_report.dcm"):
        self.segmentation = segmentation
        self.suffix = suffix

    def write(self, label_map: LabelMap, stem: Path, *, overwrite: bool = False) -> Path | None:
        """Write to ``stem`` + suffix and return that path, or None for a source that is not DICOM.

        Raises:
            OutputError: the file cannot be written or exists; the SEG is not there or not of this label map; or the
                image has no volume, as a plain X-ray.
            UnreadableFile: a source file is gone or damaged.
        """
        if label_map.source.kind != "dicom":
            return None
        path = with_suffix(stem, self.suffix)
        with atomic(path, overwrite=overwrite) as part:
            source = dicom_source(label_map)
            if not source.placed:
                raise OutputError(
                    f"{label_map.source.files[0]}: a report of volumes needs an image with a place in the patient, "
                    "but this one has none; see the table of volumes instead"
                )
            seg = _segmentation(with_suffix(stem, self.segmentation.suffix), label_map)
            header = copy.deepcopy(source.header)
            header.SOPClassUID, header.SOPInstanceUID = seg.SOPClassUID, seg.SOPInstanceUID
            header.SeriesInstanceUID = seg.SeriesInstanceUID
            try:
                with quiet():
                    report = self._build(label_map, header, source.header.SeriesInstanceUID)
                    report.save_as(part, enforce_file_format=True)
            except (AttributeError, LookupError, TypeError, ValueError) as error:
                # not quoting the error: it may hold a value of the patient's
                raise OutputError(
                    f"{path}: highdicom cannot make a report of this series ({type(error).__name__} over an attribute "
                    f"of {label_map.source.files[0]}); see the table of volumes instead"
                ) from error
            require_equal(path, part, "report", lambda: _differences(part, label_map))
        return path

    def _build(self, label_map: LabelMap, seg: Dataset, series_uid: str) -> Any:
        """The report; ``seg`` is the header of the SEG, ``series_uid`` that of the images."""
        import highdicom
        from pydicom.sr.codedict import codes

        writer, sr = self.segmentation, highdicom.sr
        observer = sr.DeviceObserverIdentifyingAttributes(
            highdicom.UID(), writer.algorithm_name, "medvit", writer.algorithm_name, writer.algorithm_version
        )
        context = sr.ObservationContext(
            observer_device_context=sr.ObserverContext(codes.DCM.Device, observer),
        )
        groups = [
            sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
                sr.TrackingIdentifier(uid=highdicom.UID(), identifier=structure.name),
                referenced_segment=sr.ReferencedSegment(
                    seg.SOPClassUID,
                    seg.SOPInstanceUID,
                    number,
                    source_series=sr.SourceSeriesForSegmentation(series_uid),
                ),
                finding_type=concept(structure.type),
                finding_category=concept(structure.category),
                algorithm_id=sr.AlgorithmIdentification(writer.algorithm_name, writer.algorithm_version),
                measurements=[sr.Measurement(codes.SCT.Volume, row["volume_mm3"], codes.UCUM.CubicMillimeter)],
            )
            for number, (structure, row) in enumerate(zip(label_map.structures, label_map.volumes(), strict=True), 1)
        ]
        report = sr.MeasurementReport(context, codes.SCT.ImagingProcedure, groups, codes.DCM.ImagingMeasurementReport)
        return sr.EnhancedSR(
            evidence=[seg],
            content=report[0],
            series_instance_uid=highdicom.UID(),
            series_number=_SERIES_OFFSET + abs(int(seg.get("SeriesNumber") or 0)),
            sop_instance_uid=highdicom.UID(),
            instance_number=1,
            manufacturer="medvit",
            manufacturer_model_name=writer.algorithm_name,
            software_versions=writer.algorithm_version,
            device_serial_number=writer.algorithm_version,
            series_description=f"Volumes by {writer.algorithm_name}"[:64],
            is_complete=True,
        )


def _segmentation(path: Path, label_map: LabelMap) -> Dataset:
    """The header of the SEG at ``path``, which must be that of ``label_map``."""
    if not path.is_file():
        raise OutputError(f"{path}: a report refers to the DICOM SEG of this name, but it is not there; write it first")
    found = read_dicom_seg(path, label_map.space)
    if not np.array_equal(found.array, numbered(label_map.array, label_map.structures)):
        raise OutputError(f"{path}: a report needs the DICOM SEG of the same result, but this is another; write both")
    return pydicom.dcmread(path, stop_before_pixels=True)


def _differences(part: Path, label_map: LabelMap) -> list[str]:
    """Structures whose volume in the file is not that of the label map."""
    import highdicom

    report = highdicom.sr.srread(part)
    groups = report.content.get_volumetric_roi_measurement_groups()
    found = [(group.tracking_identifier, group.get_measurements()[0].value) for group in groups]
    expected = [(row["structure"], row["volume_mm3"]) for row in label_map.volumes()]
    return [] if found == expected else ["volumes"]
