"""DICOM files whose pixels are stored in every way, shared by tests (``from pixels_synthetic import ...``)."""

from __future__ import annotations

import numpy as np
import pydicom
import SimpleITK as sitk
from data_synthetic import slice_dataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import (
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

ENCODED = [RLELossless, JPEGLSLossless, JPEG2000Lossless, JPEGLosslessSV1]
# named, since GDCM, which comes first, can abort the interpreter
_ENCODERS = {RLELossless: "pydicom", JPEGLSLossless: "pyjpegls", JPEG2000Lossless: "pylibjpeg"}


def grey(shape=(3, 5, 7), dtype=np.uint16, bits=12, seed=0):
    """Random stored values (frames, rows, columns) over the whole range of ``bits``."""
    low, high = (-(1 << bits - 1), 1 << bits - 1) if np.dtype(dtype).kind == "i" else (0, 1 << bits)
    return np.random.default_rng(seed).integers(low, high, shape, dtype=np.int64).astype(dtype)


def dataset(frames, bits=None, **tags):
    """A data set of ``frames`` (frames, rows, columns) or (frames, rows, columns, 3)."""
    ds = slice_dataset(np.zeros(frames.shape[2:0:-1], np.uint8))
    ds.BitsAllocated = 8 * frames.dtype.itemsize
    ds.BitsStored = bits or ds.BitsAllocated
    ds.HighBit, ds.PixelRepresentation = ds.BitsStored - 1, int(frames.dtype.kind == "i")
    if frames.ndim == 4:
        ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PlanarConfiguration = 3, "RGB", 0
    ds.NumberOfFrames = len(frames)
    data = np.ascontiguousarray(frames).tobytes()
    ds.add_new(0x7FE00010, "OB" if ds.BitsAllocated == 8 else "OW", data + b"\0" * (len(data) % 2))
    for keyword, value in tags.items():
        if value is None:
            del ds[keyword]
        else:
            setattr(ds, keyword, value)
    return ds


def save(path, ds, syntax=ExplicitVRLittleEndian):
    ds.file_meta.TransferSyntaxUID = syntax
    little = syntax != ExplicitVRBigEndian
    pydicom.dcmwrite(path, ds, implicit_vr=syntax == ImplicitVRLittleEndian, little_endian=little)
    return path


def compressed(ds, syntax, frames):
    """``ds`` with the encoded ``frames``."""
    ds.PixelData = encapsulate(frames)
    ds["PixelData"].VR = "OB"
    ds["PixelData"].is_undefined_length = True
    ds.file_meta.TransferSyntaxUID = syntax
    return ds


def lossless_jpeg(tmp_path, frame):
    """One frame as lossless JPEG, encoded by SimpleITK."""
    writer = sitk.ImageFileWriter()
    writer.SetFileName(str(tmp_path / "lossless.dcm"))
    writer.UseCompressionOn()
    writer.SetCompressor("JPEG")
    writer.Execute(sitk.GetImageFromArray(frame, isVector=frame.ndim == 3))
    ds = pydicom.dcmread(tmp_path / "lossless.dcm")
    assert ds.file_meta.TransferSyntaxUID == JPEGLosslessSV1
    return next(generate_frames(ds.PixelData, number_of_frames=1))


def encoded(tmp_path, frames, syntax, bits):
    """Data set and encoded frames."""
    ds = dataset(frames, bits)
    if syntax == JPEGLosslessSV1:
        streams = [lossless_jpeg(tmp_path, frame.view(f"u{frame.itemsize}")) for frame in frames]
        return compressed(ds, syntax, streams), streams
    plugin = _ENCODERS[syntax]
    ds.compress(syntax, encoding_plugin=plugin, generate_instance_uid=False)
    return ds, list(generate_frames(ds.PixelData, number_of_frames=len(frames)))
