"""Make a small study folder of real anatomy, without a download: the left hippocampus of the MNI152 T1 template.

    python scripts/make_demo_study.py OUT
    python scripts/make_demo_study.py --retina OUT

The template ships inside the nilearn wheel (extra ``demo``). OUT receives

    dicom/0001.dcm ...       an axial and a sagittal series of one fictional patient, mixed in one folder
    left_hippocampus.nii.gz  the same voxels as NIfTI
    ATTRIBUTION.txt          where the template is from, and its licence

With --retina it receives a photograph instead, which ships inside the scikit-image wheel:

    left_eye.jpg             the fundus of a healthy left eye, 1411 x 1411 pixels
    left_eye.txt             where it is from, and its licence

Equal versions of nilearn, pydicom and scikit-image give equal bytes; files of an earlier call are replaced.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from pydicom import Dataset, FileDataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

from medvit.data.space import LPS_TO_RAS
from medvit.writers.base import atomic

# First and last voxel centre, RAS mm: the whole hippocampus and 5 to 7 mm around it, like the crops that the bundle
# hippocampus_swin_unetr was trained on. x is negative, the patient's left: all of those crops look like a left one.
BOX = ((-43, -47, -35), (-7, 1, 10))
# What the columns, rows and slices of each DICOM series point to.
SERIES = {"axial": "LPS", "sagittal": "PIR"}
WHITE = 1000  # stored value of the template's brightest voxel, which is 1

ATTRIBUTION = """\
These images are a crop of the ICBM 2009a nonlinear symmetric T1 template (MNI152), taken from nilearn {version}
(nilearn.datasets.load_mni152_template: brain only, intensities from 0 to 1), stored as whole numbers from 0 to 1000.
The patient in the DICOM headers does not exist.

Fonov VS et al. Unbiased average age-appropriate atlases for pediatric studies. NeuroImage 54(1):313-327, 2011.
Fonov VS et al. Unbiased nonlinear average age-appropriate brain templates from birth to adulthood.
NeuroImage 47(Suppl 1):S102, 2009.

Copyright (C) 1993-2004 Louis Collins, McConnell Brain Imaging Centre, Montreal Neurological Institute, McGill
University. Permission to use, copy, modify, and distribute this software and its documentation for any purpose and
without fee is hereby granted, provided that the above copyright notice appear in all copies. The authors and McGill
University make no representations about the suitability of this software for any purpose. It is provided "as is"
without express or implied warranty. The authors are not responsible for any data loss, equipment damage, property
loss, or injury to subjects or patients resulting from the use or misuse of this software package.
"""

RETINA_ATTRIBUTION = """\
left_eye.jpg is the file retina.jpg of scikit-image {version} (skimage.data.retina), unchanged: a fundus photograph of a
normal left eye by Mikael Häggström, 2014, released under CC0 1.0 (public domain).
https://commons.wikimedia.org/wiki/File:Fundus_photograph_of_normal_left_eye.jpg
"""


def make_study(folder: Path) -> None:
    """Write the demo study into ``folder``, which is created if needed."""
    crop = hippocampus()
    with atomic(folder / "left_hippocampus.nii.gz", overwrite=True) as part:
        part.write_bytes(_gzipped(crop))
    instance = 0
    for number, (name, axes) in enumerate(SERIES.items(), start=1):
        for dataset in dicom_series(crop, f"T1 {name}", number, axes):
            instance += 1
            with atomic(folder / f"dicom/{instance:04}.dcm", overwrite=True) as part:
                dataset.save_as(part, enforce_file_format=True)
    from nilearn import __version__

    with atomic(folder / "ATTRIBUTION.txt", overwrite=True) as part:
        part.write_text(ATTRIBUTION.format(version=__version__), encoding="utf-8")


def make_retina(folder: Path) -> None:
    """Write the demo photograph into ``folder``, which is created if needed."""
    from importlib.metadata import version
    from importlib.resources import files

    with atomic(folder / "left_eye.jpg", overwrite=True) as part:
        part.write_bytes((files("skimage") / "data/retina.jpg").read_bytes())
    with atomic(folder / "left_eye.txt", overwrite=True) as part:
        part.write_text(RETINA_ATTRIBUTION.format(version=version("scikit-image")), encoding="utf-8")


def hippocampus() -> Any:
    """The crop as a nibabel image: int16 ``(i, j, k)``, RAS, 1 mm."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of nilearn's own dependencies
        from nilearn.datasets import load_mni152_template

        template = load_mni152_template(resolution=1)
    first, last = ((np.array(corner) - template.affine[:3, 3]).astype(int) for corner in BOX)
    slices = tuple(slice(a, b + 1) for a, b in zip(first, last, strict=True))
    voxels = np.rint(np.asarray(template.dataobj)[slices] * WHITE).astype(np.int16)
    affine = np.eye(4)
    affine[:3, 3] = BOX[0]
    image = nibabel.Nifti1Image(voxels, affine)
    image.header.set_xyzt_units("mm")
    return image


def dicom_series(image: Any, description: str, number: int, axes: str) -> list[Dataset]:
    """MR Image objects of ``image`` with columns, rows and slices along ``axes``, e.g. ``"LPS"``, in slice order."""
    turned = image.as_reoriented(ornt_transform(io_orientation(image.affine), axcodes2ornt(axes)))
    lps = LPS_TO_RAS @ turned.affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    across, down = (lps[:3, :2] / spacing[:2]).T
    voxels = np.asarray(turned.dataobj)
    datasets = []
    for k in range(voxels.shape[2]):
        dataset = _slice(voxels[:, :, k].T, description, number, k + 1)
        dataset.ImagePositionPatient = [float(v) for v in lps[:3] @ (0, 0, k, 1)]
        dataset.ImageOrientationPatient = [float(v) for v in (*across, *down)]
        dataset.PixelSpacing = [float(spacing[1]), float(spacing[0])]
        dataset.SliceThickness = float(spacing[2])
        datasets.append(dataset)
    return datasets


def _slice(pixels: np.ndarray, description: str, number: int, instance: int) -> FileDataset:
    """One MR image ``(rows, columns)`` of the fictional patient, its place apart."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = MRImageStorage
    meta.MediaStorageSOPInstanceUID = _uid("instance", number, instance)
    dataset = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID = MRImageStorage, meta.MediaStorageSOPInstanceUID
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = _uid("study"), _uid("series", number)
    dataset.FrameOfReferenceUID, dataset.PositionReferenceIndicator = _uid("frame"), ""
    dataset.PatientName, dataset.PatientID = "Demo^Template", "DEMO"
    dataset.PatientBirthDate, dataset.PatientSex = "", "O"
    dataset.StudyDate = dataset.StudyTime = dataset.AccessionNumber = dataset.ReferringPhysicianName = ""
    dataset.StudyID, dataset.StudyDescription = "1", "MNI152 T1 template"
    dataset.Modality, dataset.Manufacturer, dataset.PatientPosition = "MR", "medvit demo", "HFS"
    dataset.BodyPartExamined = "BRAIN"
    dataset.SeriesNumber, dataset.SeriesDescription, dataset.InstanceNumber = number, description, instance
    dataset.ImageType = ["DERIVED", "SECONDARY", "OTHER"]
    dataset.ScanningSequence, dataset.SequenceVariant, dataset.ScanOptions = "RM", "NONE", ""
    dataset.MRAcquisitionType, dataset.EchoTime, dataset.EchoTrainLength = "3D", None, None
    dataset.RepetitionTime = None
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 1
    dataset.WindowCenter, dataset.WindowWidth = WHITE / 2, WHITE
    dataset.PixelData = np.ascontiguousarray(pixels, dtype="<i2").tobytes()
    return dataset


def _uid(*parts: str | int) -> str:
    return generate_uid(entropy_srcs=["medvit demo study", *map(str, parts)])


def _gzipped(image: Any) -> bytes:
    import gzip

    return gzip.compress(image.to_bytes(), mtime=0)


def main() -> None:
    """Parse the command line and make the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the study")
    parser.add_argument("--retina", action="store_true", help="a photograph of a retina instead")
    options = parser.parse_args()
    (make_retina if options.retina else make_study)(options.out)


if __name__ == "__main__":
    main()
