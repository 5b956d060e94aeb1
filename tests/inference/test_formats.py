import re

import pytest

from medvit.cli import Format
from medvit.inference.formats import FORMATS, make_writers
from medvit.inference.vectors import EMBEDDING, PATCHES, SCORES


def test_writers_come_in_the_order_given_each_once():
    writers = make_writers(["overlay", "nifti", "dicom-seg", "nifti"], "net", "1.2")
    assert [writer.suffix for writer in writers] == ["_overlay.png", "_seg.nii.gz", "_seg.dcm"]


def test_the_seg_writer_knows_who_made_the_segmentation():
    (writer,) = make_writers(["dicom-seg"], "net", "1.2")
    assert (writer.algorithm_name, writer.algorithm_version) == ("net", "1.2")


def test_a_report_comes_after_the_segmentation_it_refers_to():
    for formats in (["report", "nifti"], ["report", "nifti", "dicom-seg"]):
        nifti, seg, report = make_writers(formats, "net", "1")
        assert [w.suffix for w in (nifti, seg, report)] == ["_seg.nii.gz", "_seg.dcm", "_report.dcm"]
        assert report.segmentation is seg


def test_no_two_formats_write_the_same_file():
    suffixes = [writer.suffix for writer in make_writers(FORMATS, "net", "1")]
    assert len(set(suffixes)) == len(FORMATS) == 8


@pytest.mark.parametrize("formats", [["nifti", "tiff"], [], ["tiff"]])
def test_unknown_formats_and_none_are_refused(formats):
    with pytest.raises(ValueError, match=re.escape(f"some of {', '.join(FORMATS)}, got {formats}")):
        make_writers(formats, "net", "1")


def test_the_command_line_offers_every_format():
    assert tuple(member.value for member in Format) == (*FORMATS, SCORES, EMBEDDING, PATCHES)
