"""Discovery in files per second, and seconds per volume: medvit, dcm2niix and the readers of MONAI on the same files.

    python scripts/benchmarks/ingest.py --files 10000 --repeats 5 --output ingest.json
    python scripts/benchmarks/ingest.py FOLDER

Without a folder, series of CT and MR are written to a temporary one: headers of about 80 elements, those of MR with
90 kB of private data; small images to discover, and one series of full size to read. Of a folder its largest series is
read. Files are in the disk's cache: everything runs once, unmeasured, before it is measured.

Discovery: medvit groups, orders and proves volumes; pydicom only reads every header; dcm2niix only lists the files
(``-q y``); SimpleITK lists the series of every folder. Memory is the peak of a process of its own, beyond its imports.
Volumes: from a folder into an array, and from a folder to a NIfTI file, without compression where dcm2niix has none.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pydicom
from measure import environment, interleaved
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from medvit.data.reader import read_volume
from medvit.data.study import discover
from medvit.writers.convert import convert

OURS = "medvit"
_SLICES = 200  # of each series
_CLASSES = {"CT": "1.2.840.10008.5.1.4.1.1.2", "MR": "1.2.840.10008.5.1.4.1.1.4"}
_CSA = 90_000  # bytes of private data in a Siemens MR header

# What scanners write besides what an image needs, by keyword; most of it is never looked at.
_TEXT = "AccessionNumber InstitutionName StationName StudyDescription ManufacturerModelName DeviceSerialNumber"
_DATES = "StudyDate SeriesDate AcquisitionDate ContentDate InstanceCreationDate DateOfLastCalibration PatientBirthDate"
_TIMES = "StudyTime SeriesTime AcquisitionTime ContentTime InstanceCreationTime TimeOfLastCalibration"
_NAMES = "ReferringPhysicianName PerformingPhysicianName OperatorsName PatientName"
_NUMBERS = "PatientSize PatientWeight KVP DataCollectionDiameter ReconstructionDiameter DistanceSourceToDetector"
_MORE_NUMBERS = "DistanceSourceToPatient TableHeight FocalSpots GeneratorPower WindowCenter WindowWidth RescaleSlope"
_INTEGERS = "ExposureTime XRayTubeCurrent Exposure AcquisitionNumber SeriesNumber"
_MR = "RepetitionTime EchoTime InversionTime FlipAngle MagneticFieldStrength SpacingBetweenSlices PixelBandwidth"
_CODES = "BodyPartExamined RotationDirection ScanOptions PatientSex FilterType"


def template(modality: str, size: int, series: int) -> Dataset:
    """One slice of a series, without what tells it from the others."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = _CLASSES[modality]
    ds.SpecificCharacterSet, ds.Modality, ds.ImageType = "ISO_IR 100", modality, ["ORIGINAL", "PRIMARY", "AXIAL"]
    values = {
        **dict.fromkeys(_TEXT.split(), "text of scanners"),
        **dict.fromkeys(_DATES.split(), "20240131"),
        **dict.fromkeys(_TIMES.split(), "101112.500000"),
        **dict.fromkeys(_NAMES.split(), "Family^Given"),
        **dict.fromkeys(f"{_NUMBERS} {_MORE_NUMBERS}".split(), "1"),
        **dict.fromkeys(_INTEGERS.split(), str(series + 1)),
        **dict.fromkeys(_CODES.split(), "CODE"),
        **(dict.fromkeys(_MR.split(), "2.5") if modality == "MR" else {"ConvolutionKernel": "B70f"}),
        **{"ReferencedStudySequence": [_reference()], "ReferencedImageSequence": [_reference()] * 3},
        **{"RequestAttributesSequence": [_reference()], "ProcedureCodeSequence": [_reference()]},
        **{"SeriesDescription": f"{modality} 1.5 mm", "ProtocolName": "Protocol", "PatientID": "12345678"},
        **{"StudyInstanceUID": "1.2.3", "SeriesInstanceUID": generate_uid(), "FrameOfReferenceUID": "1.2.3.4"},
        **{"ImageOrientationPatient": list("100010"), "PixelSpacing": ["0.68359375"] * 2, "SliceThickness": "1.5"},
        **{"SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2", "Rows": size, "Columns": size},
        **{"BitsAllocated": 16, "BitsStored": 12, "HighBit": 11, "PixelRepresentation": 0, "RescaleIntercept": "-1024"},
    }
    for keyword, value in values.items():
        setattr(ds, keyword, value)
    if modality == "MR":
        private = ds.private_block(0x0029, "SIEMENS CSA HEADER", create=True)
        private.add_new(0x10, "OB", b"SV10" + bytes(_CSA // 9))
        private.add_new(0x20, "OB", b"SV10" + bytes(_CSA - _CSA // 9))
    return ds


def _reference() -> Dataset:
    ds = Dataset()
    ds.ReferencedSOPClassUID, ds.ReferencedSOPInstanceUID = _CLASSES["CT"], generate_uid()
    return ds


def write_series(folder: Path, modality: str, size: int, slices: int, series: int = 0) -> None:
    """Write the files of one series of noise."""
    folder.mkdir(parents=True)
    ds = template(modality, size, series)
    random = np.random.default_rng(series)
    for k in range(slices):
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        ds.InstanceNumber, ds.SliceLocation = str(k + 1), f"{1.5 * k:g}"
        ds.ImagePositionPatient = ["-175.123", "-180.5", f"{1.5 * k:g}"]
        ds.PixelData = random.integers(0, 4096, (size, size), dtype=np.uint16).tobytes()
        ds.save_as(folder / f"{slices - k:05d}", enforce_file_format=True)


def synthesise(folder: Path, files: int, size: int) -> None:
    """Write ``files`` files as series of CT and MR in turn."""
    for number, first in enumerate(range(0, files, _SLICES)):
        slices = min(_SLICES, files - first)
        write_series(folder / f"series{number:04d}", ("CT", "MR")[number % 2], size, slices, number)


def measure_discovery(folder: Path, repeats: int) -> dict[str, Any]:
    """Files per second of each way, and the memory of ours."""
    count = sum(len(names) for _, _, names in os.walk(folder))
    calls: dict[str, Callable[[], object]] = {
        f"{OURS}, 1 process": lambda: discover(folder, processes=1),
        f"{OURS}, 2 processes": lambda: discover(folder, processes=2),
        "pydicom, headers only": lambda: [pydicom.dcmread(path, stop_before_pixels=True) for path in _below(folder)],
    }
    if tool := _dcm2niix():
        calls["dcm2niix, list of files"] = lambda: _run(tool, "-q", "y", "-d", "9", str(folder))
    if find_spec("SimpleITK"):
        calls["SimpleITK, list of series"] = lambda: _series_by_itk(folder)
    seconds = {name: median(found) for name, found in interleaved(calls, repeats).items()}
    return {
        "files": count,
        "series": len(discover(folder).series),
        "files_per_second": {name: count / taken for name, taken in seconds.items()},
        "peak_bytes": {f"{OURS}, {n} process{'es' * (n > 1)}": _peak_memory(folder, n) for n in (1, 2)},
    }


def measure_volume(folder: Path, repeats: int) -> dict[str, Any]:
    """Seconds to read the only series of a folder, and to convert it."""
    from monai.data import ITKReader, PydicomReader

    def monai(kind: Any) -> np.ndarray:
        reader = kind()
        return np.asarray(reader.get_data(reader.read(folder))[0])

    read: dict[str, Callable[[], object]] = {
        OURS: lambda: read_volume(folder).array,
        f"{OURS}, discovered before": lambda: series.read().array,
        "MONAI PydicomReader": lambda: monai(PydicomReader),
    }
    if find_spec("itk"):
        read["MONAI ITKReader"] = lambda: monai(ITKReader)
    if find_spec("SimpleITK"):
        read["SimpleITK"] = lambda: _read_by_itk(folder)
    (series,) = discover(folder).series
    with tempfile.TemporaryDirectory() as target:
        written: dict[str, Callable[[], object]] = {
            f"{OURS} convert, .nii.gz": lambda: list(convert(discover(folder), Path(target), overwrite=True))
        }
        if tool := _dcm2niix():
            options = ("-w", "1", "-b", "n", "-f", "volume", "-o", target, str(folder))
            written["dcm2niix -z y, .nii.gz"] = lambda: _run(tool, "-z", "y", *options)
            written["dcm2niix -z n, .nii"] = lambda: _run(tool, "-z", "n", *options)
        seconds = {
            kind: {name: median(found) for name, found in interleaved(calls, repeats).items()}
            for kind, calls in (("read", read), ("convert", written))
        }
    difference = float(np.abs(series.read().array - monai(PydicomReader)).max())
    return {"shape": list(series.space.shape), "seconds": seconds, "max_difference": difference}


def largest_series(folder: Path, target: Path) -> None:
    """Links to the files of the volume with most slices."""
    usable = [one for one in discover(folder).series if one.kind == "dicom" and one.placed and one.problem is None]
    if not usable:
        raise SystemExit(f"{folder}: needs a DICOM series that makes a volume, none was found; choose another folder")
    target.mkdir()
    for number, file in enumerate(max(usable, key=lambda one: len(one.files)).origins):
        (target / f"{number:06d}").symlink_to(file)


def table(discovery: dict[str, Any], volume: dict[str, Any]) -> str:
    """For people."""
    lines = [f"| discovery of {discovery['files']} files | files/s | peak memory, MB |", "|---|---|---|"]
    for name, rate in discovery["files_per_second"].items():
        memory = discovery["peak_bytes"].get(name)
        lines.append(f"| {name} | {rate:.0f} | {'' if memory is None else f'{memory / 1e6:.0f}'} |")
    lines += ["", f"| volume of {' x '.join(map(str, volume['shape']))} | | s |", "|---|---|---|"]
    for kind, ways in volume["seconds"].items():
        lines += [f"| {kind} | {name} | {taken:.3f} |" for name, taken in ways.items()]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="files to take instead of synthetic ones")
    parser.add_argument("--files", type=int, default=10_000, help="synthetic files to discover (default 10000)")
    parser.add_argument("--matrix", type=int, default=32, help="side of their images (default 32)")
    parser.add_argument("--slices", type=int, default=200, help="of the synthetic volume to read (default 200)")
    parser.add_argument("--size", type=int, default=512, help="side of its slices (default 512)")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved repetitions (default 5)")
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")  # readers remark on every file
    with tempfile.TemporaryDirectory() as temporary:
        many, one = options.folder or Path(temporary, "many"), Path(temporary, "one")
        if options.folder is None:
            synthesise(many, options.files, options.matrix)
            write_series(one, "CT", options.size, options.slices)
        else:
            largest_series(many, one)
        discovery = measure_discovery(many, options.repeats)
        volume = measure_volume(one, options.repeats)
    result = {**environment(), "processors": _processors(), "discovery": discovery, "volume": volume}
    print(f"\n{table(discovery, volume)}\n\n{result['device']}, {result['processors']} processors")
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _below(folder: Path) -> Iterator[Path]:
    return (Path(root, name) for root, _, names in os.walk(folder) for name in names)


def _series_by_itk(folder: Path) -> int:
    from SimpleITK import ImageSeriesReader

    return sum(len(ImageSeriesReader.GetGDCMSeriesIDs(root)) for root, _, names in os.walk(folder) if names)


def _read_by_itk(folder: Path) -> object:
    from SimpleITK import ImageSeriesReader

    reader = ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return reader.Execute()


_PEAK = """
import sys
from pathlib import Path
import medvit.data.study as study
high = lambda: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = high()
study.discover(Path(sys.argv[1]), processes=int(sys.argv[2]))
print((high() - before) * 1024)
"""


def _peak_memory(folder: Path, processes: int) -> int | None:
    """Of the process that discovers, without those it starts; None where the system does not tell."""
    if not Path("/proc/self/status").is_file():
        return None
    command = [sys.executable, "-c", _PEAK, str(folder), str(processes)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _dcm2niix() -> str | None:
    beside = Path(sys.executable).with_name("dcm2niix")
    return str(beside) if beside.is_file() else shutil.which("dcm2niix")


def _run(*command: str) -> None:
    # what it returns is no success or failure of listing
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    main()
