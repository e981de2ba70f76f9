"""`hyspark prepare` from end to end, on images of a few thousand voxels."""

import csv
import errno
import json
import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from nnunetv2_hyspark.cli import prepare as prepare_cli
from nnunetv2_hyspark.cli.console import find_command
from nnunetv2_hyspark.cli.main import main
from nnunetv2_hyspark.data import prepare as prepare_module
from nnunetv2_hyspark.data.prepare import Settings, prepare
from nnunetv2_hyspark.data.volumes import last_line

SHAPE = (12, 20, 24)


def ct_array(seed: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    rng = np.random.default_rng(seed)
    image = np.full(shape, -1000)
    image[:, 4:-4, 4:-4] = 40
    image[:, 8:10, 8:10] = 400
    return (image + rng.integers(-20, 20, shape)).astype(np.int16)


def mr_array(seed: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    rng = np.random.default_rng(seed)
    image = np.abs(rng.normal(0, 10, shape))
    image[2:-2, 4:-4, 4:-4] += 500
    return image.astype(np.float32)


def write(
    path: Path, array: np.ndarray, spacing: tuple[float, float, float] = (3.0, 2.0, 2.5), tilt: float = 0.0
) -> Path:
    image = sitk.GetImageFromArray(array)
    if image.GetDimension() == 3:
        image.SetSpacing(spacing[::-1])
        image.SetOrigin((1.5, -20.25, 7.125))
        c, s = np.cos(tilt), np.sin(tilt)
        image.SetDirection((c, -s, 0, s, c, 0, 0, 0, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path), path.name.endswith(".gz"))
    return path


def write_dicom(
    folder: Path, array: np.ndarray, number: int = 1, modality: str = "CT", positions: list[float] | None = None
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    series, study = generate_uid(), generate_uid()
    rng = np.random.default_rng(number)
    for z, plane in enumerate(array):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = CTImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
        ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        ds.StudyInstanceUID, ds.SeriesInstanceUID = study, series
        ds.Modality, ds.SeriesNumber, ds.InstanceNumber = modality, number, z + 1
        ds.PatientName = "Secret^Name"
        ds.Rows, ds.Columns = plane.shape
        ds.BitsAllocated = ds.BitsStored = 16
        ds.HighBit, ds.PixelRepresentation, ds.SamplesPerPixel = 15, 1, 1
        ds.PhotometricInterpretation = "MONOCHROME2"
        position = positions[z] if positions else 3.0 * z
        ds.ImagePositionPatient, ds.ImageOrientationPatient = [0.0, 0.0, position], [1, 0, 0, 0, 1, 0]
        ds.PixelSpacing, ds.RescaleSlope, ds.RescaleIntercept = [2.0, 2.5], 1, -1000
        ds.PixelData = (plane + 1000).astype(np.int16).tobytes()
        # names that sort differently from the slices
        ds.save_as(folder / f"{number}_{rng.integers(10**9):09d}", enforce_file_format=True)


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    return tmp_path / "nnUNet_raw"


@pytest.fixture
def pile(tmp_path: Path) -> Path:
    folder = tmp_path / "pile"
    for seed in range(3):
        write(folder / f"scan {seed}.nii.gz", ct_array(seed))
    return folder


def settings(*sources: object, **options) -> Settings:
    return Settings(dataset_id=900, name="Pile", sources=tuple(str(source) for source in sources), **options)


def dataset(folder: Path) -> dict:
    return json.loads((folder / "dataset.json").read_text())


def rows(folder: Path) -> list[dict]:
    return json.loads((folder / "prepare_report.json").read_text())["cases"]


def reasons(folder: Path) -> dict[str, str]:
    return {Path(row["files"][0]).name: row["reason"] for row in rows(folder)}


def read_as_nnunet(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images and masks the way nnU-Net finds and reads them."""
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
    from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

    content = dataset(folder)
    reader = determine_reader_writer_from_dataset_json(content, verbose=False)()
    result = {}
    for name, entry in get_filenames_of_train_images_and_targets(str(folder)).items():
        image, properties = reader.read_images(entry["images"])
        mask, mask_properties = reader.read_seg(entry["label"])
        assert image.shape[1:] == mask.shape[1:]
        assert np.allclose(properties["spacing"], mask_properties["spacing"])
        for key in ("origin", "direction"):
            assert np.allclose(properties["sitk_stuff"][key], mask_properties["sitk_stuff"][key])
        assert set(np.unique(mask)) <= {0, 1} and mask.any()
        result[name] = (image, mask)
    return result


def test_pile_of_all_formats(raw: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    write(folder / "a.nii.gz", ct_array(0), tilt=0.3)
    write(folder / "b.nii", ct_array(1, (9, 30, 31)))
    write(folder / "deep/er/c.nrrd", ct_array(2), tilt=0.3)
    write(folder / "deep/d.mha", ct_array(3))
    write_dicom(folder / "study", ct_array(4), number=4)
    write_dicom(folder / "study", ct_array(5), number=5)
    result = prepare(settings(folder))
    cases = read_as_nnunet(result)
    assert set(cases) == {"a", "b", "c", "d", "study_s4", "study_s5"}
    for seed, name in enumerate(("a", "b", "c", "d", "study_s4", "study_s5")):
        shape = (9, 30, 31) if name == "b" else SHAPE
        assert np.array_equal(cases[name][0][0], ct_array(seed, shape)), name
        assert 0.2 < cases[name][1].mean() < 0.8
    content = dataset(result)
    assert content["numTraining"] == 6
    assert content["channel_names"] == {"0": "CT"}
    assert content["labels"] == {"background": 0, "foreground_mask": 1}
    assert "not an annotation" in content["hyspark"]["foreground_mask"]
    assert content["dataset"]["c"]["images"] == [str(folder / "deep/er/c.nrrd")]
    assert sorted(os.listdir(result / "converted")) == ["study_s4_0000.nii.gz", "study_s5_0000.nii.gz"]
    assert "Secret" not in "".join(path.read_text() for path in result.glob("*.json*"))


def test_dicom_geometry_is_kept(raw: Path, tmp_path: Path) -> None:
    write_dicom(tmp_path / "series", ct_array(0))
    result = prepare(settings(tmp_path / "series"))
    image = sitk.ReadImage(str(result / "converted" / "series_s1_0000.nii.gz"))
    assert image.GetSpacing() == pytest.approx((2.5, 2.0, 3.0))
    assert np.array_equal(sitk.GetArrayFromImage(image), ct_array(0))


def test_dicom_that_is_no_volume(raw: Path, tmp_path: Path) -> None:
    folder = tmp_path / "study"
    write_dicom(folder, ct_array(0), number=1)
    write_dicom(folder, ct_array(1), number=2, positions=[3.0 * z + 20 * (z > 6) for z in range(12)])
    write_dicom(folder, ct_array(2), number=3, modality="SEG")
    write_dicom(folder, ct_array(3)[:1], number=4)
    # two phases at the same six positions
    write_dicom(folder, ct_array(5), number=5, positions=[3.0 * (z % 6) for z in range(12)])
    result = prepare(settings(folder, min_slices=6))
    assert set(dataset(result)["dataset"]) == {"study_s1", "study_s5", "study_s5_2"}
    found = {row["files"][0].rsplit("/", 1)[1][0]: row["reason"] for row in rows(result)}
    assert found["2"] == "slices missing or uneven"
    assert found["3"] == "DICOM without readable image"
    assert found["4"] == "2D"


def test_truncated_dicom_series_is_named(raw: Path, pile: Path) -> None:
    write_dicom(pile / "study", ct_array(7))
    victim = sorted((pile / "study").iterdir())[4]
    victim.write_bytes(victim.read_bytes()[:-300])
    result = prepare(settings(pile))
    assert len(dataset(result)["dataset"]) == 3
    found = {row["reason"]: row["files"][0] for row in rows(result) if not row["taken"]}
    assert found["DICOM without readable image"] == str(victim)
    assert "slices missing or uneven" in found


def test_bad_files_are_skipped_and_named(raw: Path, pile: Path, capsys: pytest.CaptureFixture) -> None:
    whole = (pile / "scan 0.nii.gz").read_bytes()
    (pile / "cut.nii.gz").write_bytes(whole[: len(whole) // 2])
    (pile / "empty.nii.gz").write_bytes(b"")
    (pile / "text.nrrd").write_text("hello")
    uncompressed = write(pile / "cut.nii", ct_array(9)).read_bytes()
    (pile / "cut.nii").write_bytes(uncompressed[:-2000])
    # the header's data type is none
    (pile / "type.nii").write_bytes(uncompressed[:70] + (1234).to_bytes(2, "little") + uncompressed[72:])
    write(pile / "flat.mha", ct_array(9)[:1])
    write(pile / "flat2.mha", ct_array(9)[0])
    write(pile / "few.mha", ct_array(9)[:5])
    write(pile / "same.mha", np.full(SHAPE, 7, np.int16))
    nan = mr_array(3)
    nan[3, 3, 3] = np.nan
    write(pile / "nan.mha", nan)
    nan[3, 3, 3] = np.inf
    write(pile / "inf.mha", nan)
    write(pile / "copy.nrrd", ct_array(1))
    write(pile / "few_values.mha", (mr_array(1) > 200).astype(np.uint8))
    write(pile / "sub" / "scan_seg.nii.gz", ct_array(8))
    write(pile / "labelsTr" / "x.nii.gz", ct_array(8))
    (pile / "._scan.nii.gz").write_bytes(b"macOS")
    (pile / "notes.txt").write_text("x")
    result = prepare(settings(pile))
    found = reasons(result)
    assert set(dataset(result)["dataset"]) == {"scan_0", "scan_1", "scan_2"} - {"scan_1"} | {"copy"}
    assert found["scan 1.nii.gz"] == "duplicate" and found["copy.nrrd"] == ""
    for name in ("cut.nii.gz", "cut.nii", "type.nii", "empty.nii.gz", "text.nrrd"):
        assert found[name] == "unreadable", name
    assert found["flat.mha"] == found["flat2.mha"] == "2D"
    assert found["few.mha"] == "too few slices"
    assert found["same.mha"] == "constant"
    assert found["nan.mha"] == found["inf.mha"] == "NaN or infinite"
    assert found["few_values.mha"] == found["scan_seg.nii.gz"] == found["x.nii.gz"] == "label, not a scan"
    assert "._scan.nii.gz" not in found
    output = capsys.readouterr().out
    assert "cut.nii.gz: unreadable" in output
    with open(result / "prepare_report.csv", newline="") as stream:
        assert len(list(csv.DictReader(stream))) == len(rows(result))


@pytest.mark.parametrize("step", ["reject", "foreground_mask", "content_key"])
@pytest.mark.parametrize("error", [RuntimeError("sitk::ERROR:\nno pixels"), OSError("bad sector")])
def test_a_case_that_fails_at_any_step_costs_only_itself(raw: Path, pile: Path, monkeypatch, step, error) -> None:
    original, calls = getattr(prepare_module, step), []

    def fails_once(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise error
        return original(*arguments)

    monkeypatch.setattr(prepare_module, step, fails_once)
    result = prepare(settings(pile))
    assert set(dataset(result)["dataset"]) == {"scan_0", "scan_2"}
    (row,) = [row for row in rows(result) if not row["taken"]]
    assert row["reason"] == "unreadable"
    assert row["detail"] == last_line(error)
    assert not (result / "foreground_masks" / "scan_1.nii.gz").exists()
    prepare(settings(pile))
    assert set(dataset(result)["dataset"]) == {"scan_0", "scan_2"}, "it is not looked at again"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("x.hxx:179:\nFailed to allocate memory for image."),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    ],
)
def test_a_case_for_which_memory_was_lacking_is_tried_again(raw: Path, pile: Path, monkeypatch, error) -> None:
    original, read, lacking = prepare_module.read_channel, [], [True]

    def read_channel(files: tuple[str, ...]):
        read.append(Path(files[0]).name)
        if lacking[0] and read[-1] == "scan 1.nii.gz":
            raise error
        return original(files)

    monkeypatch.setattr(prepare_module, "read_channel", read_channel)
    for _ in range(2):
        result = prepare(settings(pile))
        assert set(dataset(result)["dataset"]) == {"scan_0", "scan_2"}
        (row,) = [row for row in rows(result) if not row["taken"]]
        assert row["reason"] == "unreadable" and row["detail"].startswith("not enough memory for it; run the same")
    lacking[0] = False
    prepare(settings(pile))
    assert set(dataset(result)["dataset"]) == {"scan_0", "scan_1", "scan_2"}
    assert read == [f"scan {number}.nii.gz" for number in (0, 1, 2, 1, 1)]


def test_a_folder_that_cannot_be_written_ends_the_run(raw: Path, pile: Path, monkeypatch) -> None:
    def full(image: sitk.Image, target: Path) -> None:
        raise OSError(errno.ENOSPC, "no room", str(target))

    monkeypatch.setattr(prepare_module, "write_nifti", full)
    with pytest.raises(OSError, match="no room"):
        prepare(settings(pile))


def test_sheared_nifti_is_converted(raw: Path, pile: Path) -> None:
    import nibabel

    source = nibabel.load(pile / "scan 0.nii.gz")
    affine = source.affine.copy()
    affine[0, 1] += 0.4
    other = np.asarray(source.dataobj)[::-1].copy()
    nibabel.save(nibabel.Nifti1Image(other, affine), pile / "sheared.nii.gz")
    result = prepare(settings(pile))
    image = read_as_nnunet(result)["sheared"][0]
    assert np.array_equal(image[0], other.T)


def test_channels_by_name_majority_and_split(raw: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mr"
    for seed in range(2):
        for channel in range(2):
            write(folder / f"p{seed}_{channel:04d}.nii.gz", mr_array(10 * seed + channel))
    write(folder / "single.nii.gz", mr_array(50))
    write(folder / "grids_0000.nii.gz", mr_array(60))
    write(folder / "grids_0001.nii.gz", mr_array(61, (12, 20, 25)))
    result = prepare(settings(folder, modality="T1,T2"))
    assert dataset(result)["channel_names"] == {"0": "T1", "1": "T2"}
    cases = read_as_nnunet(result)
    assert set(cases) == {"p0", "p1"}
    assert cases["p1"][0].shape == (2, *SHAPE)
    assert reasons(result)["single.nii.gz"] == "wrong number of channels"
    assert reasons(result)["grids_0000.nii.gz"] == "channels on different grids"

    one = prepare(replace(settings(folder, channels=1), dataset_id=901))
    assert set(dataset(one)["dataset"]) == {"single"}
    split = prepare(replace(settings(folder, split_channels=True), dataset_id=902))
    assert set(dataset(split)["dataset"]) == {
        *("p0_c0", "p0_c1", "p1_c0", "p1_c1"),
        *("single", "grids_c0", "grids_c1"),
    }


def test_numbered_scans_are_not_channels(raw: Path, tmp_path: Path) -> None:
    for number in range(1, 5):
        write(tmp_path / "ct" / f"scan_{number:04d}.nii.gz", ct_array(number))
    result = prepare(settings(tmp_path / "ct"))
    assert sorted(dataset(result)["dataset"]) == [f"scan_{number:04d}" for number in range(1, 5)]


def test_channels_within_one_file_are_split(raw: Path, tmp_path: Path) -> None:
    volumes = [sitk.ReadImage(str(write(tmp_path / "x.mha", mr_array(seed)))) for seed in range(2)]
    (tmp_path / "in").mkdir()
    sitk.WriteImage(sitk.JoinSeries(volumes), str(tmp_path / "in" / "fourth_axis.nii.gz"))
    sitk.WriteImage(sitk.Compose(volumes[1], volumes[0]), str(tmp_path / "in/vector.nrrd"))
    cases = read_as_nnunet(prepare(settings(tmp_path / "in")))
    assert {name: image.shape for name, (image, _) in cases.items()} == {
        "fourth_axis": (2, *SHAPE),
        "vector": (2, *SHAPE),
    }
    assert np.array_equal(cases["fourth_axis"][0][1], mr_array(1))


def test_several_sources_lists_and_a_labelled_data_set(raw: Path, pile: Path, tmp_path: Path) -> None:
    labelled = raw / "Dataset004_Old"
    write(labelled / "imagesTr" / "a_0000.nii.gz", ct_array(20))
    (labelled / "labelsTr").mkdir()
    (labelled / "labelsTr" / "a.nii.gz").write_text("must never be opened")
    write(labelled / "imagesTs" / "t_0000.nii.gz", ct_array(21))
    (labelled / "dataset.json").write_text(
        json.dumps(
            {
                "channel_names": {"0": "CT"},
                "labels": {"background": 0, "x": 1},
                "numTraining": 1,
                "file_ending": ".nii.gz",
            }
        )
    )
    write(tmp_path / "one.mha", ct_array(30))
    write(tmp_path / "two.mha", ct_array(31))
    write_dicom(tmp_path / "dicom", ct_array(32))
    (tmp_path / "list.csv").write_text("id;image;label;modality\nfirst;one.mha;no.nii;CT\nmissing;gone.mha;;CT\n")
    (tmp_path / "list.json").write_text(json.dumps([{"id": "second", "image": "two.mha"}, "dicom"]))
    sources = (pile, 4, tmp_path / "list.csv", tmp_path / "list.json", tmp_path / "one.mha", pile / "scan 0.nii.gz")
    result = prepare(settings(*sources, exclude=("*scan 2*",)))
    table = dataset(result)["dataset"]
    assert {"pile_scan_0", "pile_scan_1", "Dataset004_a", "Dataset004_t", "dicom_dicom_s1"} < set(table)
    assert len(table) == 7
    assert table["Dataset004_a"]["images"] == ["../Dataset004_Old/imagesTr/a_0000.nii.gz"]
    assert reasons(result)["gone.mha"] == "unreadable"
    assert reasons(result)["scan 2.nii.gz"] == "excluded"
    read_as_nnunet(result)
    without = prepare(replace(settings(4, test_images=False), dataset_id=905))
    assert set(dataset(without)["dataset"]) == {"a"}


def test_a_data_set_of_nnunet_without_labels(raw: Path) -> None:
    folder = raw / "Dataset004_Unlabelled"
    for number, name in enumerate(("a", "b")):
        write(folder / "imagesTr" / f"{name}_0000.nii.gz", mr_array(number))
        write(folder / "imagesTr" / f"{name}_0001.nii.gz", mr_array(10 + number))
    description = {"channel_names": {"0": "T2", "1": "ADC"}, "labels": {"background": 0}, "numTraining": 2}
    (folder / "dataset.json").write_text(json.dumps({**description, "file_ending": ".nii.gz"}))
    result = prepare(settings("Dataset004_Unlabelled"))
    assert dataset(result)["channel_names"] == {"0": "T2", "1": "ADC"}
    cases = read_as_nnunet(result)
    assert set(cases) == {"a", "b"}
    assert np.array_equal(cases["b"][0], np.stack([mr_array(1), mr_array(11)]))
    assert not (folder / "labelsTr").exists()


def test_a_prepared_data_set_is_a_source(raw: Path, pile: Path) -> None:
    write_dicom(pile / "study", ct_array(7))
    first = prepare(settings(pile))
    assert dataset(first)["dataset"]["study_s1"]["images"] == ["converted/study_s1_0000.nii.gz"]
    second = prepare(replace(settings("900"), dataset_id=901, name="Again"))
    table = dataset(second)["dataset"]
    assert set(table) == {"scan_0", "scan_1", "scan_2", "study_s1"}
    assert table["scan_0"]["images"] == [str(pile / "scan 0.nii.gz")]
    assert table["study_s1"]["images"] == ["../Dataset900_Pile/converted/study_s1_0000.nii.gz"]
    assert not any((second / "converted").glob("*"))
    again, before = read_as_nnunet(second), read_as_nnunet(first)
    for name, (image, mask) in before.items():
        assert np.array_equal(again[name][0], image) and np.array_equal(again[name][1], mask)
    assert all(row["taken"] for row in rows(second)) and len(rows(second)) == 4


def test_a_list_with_one_column_per_channel(raw: Path, tmp_path: Path) -> None:
    lines = ["id,t1,t2"]
    for number in range(3):
        for offset, channel in ((0, "t1"), (50, "t2")):
            write(tmp_path / channel / f"{number}.nii.gz", mr_array(number + offset))
        lines.append(f"patient{number},t1/{number}.nii.gz,t2/{number}.nii.gz")
    (tmp_path / "list.csv").write_text("\n".join(lines) + "\n")
    result = prepare(settings(tmp_path / "list.csv"))
    assert dataset(result)["channel_names"] == {"0": "t1", "1": "t2"}
    cases = read_as_nnunet(result)
    assert set(cases) == {"patient0", "patient1", "patient2"}
    assert np.array_equal(cases["patient2"][0], np.stack([mr_array(2), mr_array(52)]))


@pytest.mark.parametrize("titles", ["image,label", "image,second", ""])
def test_titles_of_a_list_may_be_folders_beside_it(raw: Path, tmp_path: Path, titles: str) -> None:
    folders = (titles or "image,label").split(",")
    lines = [titles] if titles else []
    for number in range(2):
        for offset, folder in enumerate(folders):
            write(tmp_path / folder / f"{number}.nii.gz", mr_array(number + 50 * offset))
        lines.append(",".join(f"{folder}/{number}.nii.gz" for folder in folders))
    (tmp_path / "list.csv").write_text("\n".join(lines))
    result = prepare(settings(tmp_path / "list.csv"))
    expected = {"image,label": 1, "image,second": 2, "": 2}[titles]
    assert len(rows(result)) == 2
    assert {len(image) for image, _ in read_as_nnunet(result).values()} == {expected}


def test_one_image_alone_is_told_its_fold(raw: Path, pile: Path, capsys: pytest.CaptureFixture) -> None:
    result = prepare(settings(pile / "scan 1.nii.gz"))
    assert "1 case: train on the fold 'all' (nnU-Net's folds 0 to 4 need 5 cases)." in capsys.readouterr().out
    cases = read_as_nnunet(result)
    assert set(cases) == {"scan_1"} and np.array_equal(cases["scan_1"][0][0], ct_array(1))


def test_same_names_in_many_folders(raw: Path, tmp_path: Path) -> None:
    for seed in range(3):
        write(tmp_path / "bids" / f"sub-{seed}" / "anat" / "t1.nii.gz", mr_array(seed))
    write(tmp_path / "bids" / "lesion.seg" / "lesion seg.scan_x_seg.y.nii.gz", mr_array(9))
    result = prepare(settings(tmp_path / "bids"))
    names = set(dataset(result)["dataset"])
    assert {f"bids_sub-{seed}_anat_t1" for seed in range(3)} < names
    assert not any(name.endswith("_seg") for name in names)


@pytest.mark.parametrize(
    ("arrays", "modality", "expected"),
    [
        ([ct_array(0), ct_array(1)], None, "CT"),
        ([mr_array(0), mr_array(1)], None, "zscore"),
        ([ct_array(0), mr_array(1)], None, "zscore"),
        ([mr_array(0), mr_array(1)], "mr", "MR"),
        ([ct_array(0), mr_array(1)], "CT", "CT"),
        ([ct_array(0), ct_array(1)], "mixed", "zscore"),
    ],
)
def test_modality(raw: Path, tmp_path: Path, capsys, arrays, modality, expected) -> None:
    for number, array in enumerate(arrays):
        write(tmp_path / "in" / f"s{number}.mha", array)
    result = prepare(settings(tmp_path / "in", modality=modality))
    assert dataset(result)["channel_names"] == {"0": expected}
    output = capsys.readouterr().out
    assert "Modality" in output
    assert ("do not look like Hounsfield units (s1)" in output) == (modality == "CT")


def test_second_run_does_only_what_is_missing(raw: Path, pile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = prepare(settings(pile))
    before = {path: path.stat().st_mtime_ns for path in (result / "foreground_masks").iterdir()}
    seen: list[str] = []
    original = prepare_module._process
    monkeypatch.setattr(prepare_module, "_process", lambda task: seen.append(task.id) or original(task))
    prepare(settings(pile))
    assert seen == []
    (result / "foreground_masks" / "scan_1.nii.gz").write_bytes(b"half")
    write(pile / "new.mha", ct_array(40))
    write(pile / "scan 2.nii.gz", ct_array(41))
    prepare(settings(pile))
    assert sorted(seen) == ["new", "scan_1", "scan_2"]
    assert (result / "foreground_masks" / "scan_0.nii.gz").stat().st_mtime_ns == before[
        result / "foreground_masks" / "scan_0.nii.gz"
    ]
    assert len(read_as_nnunet(result)) == 4


def test_interrupted_run_is_continued(raw: Path, pile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = prepare_module._process

    def interrupted(task):
        if task.id == "scan_1":
            raise KeyboardInterrupt
        return original(task)

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "_process", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(settings(pile))
    folder = raw / "Dataset900_Pile"
    assert not (folder / "dataset.json").exists()
    (folder / "foreground_masks" / ".unfinished-1-scan_1.nii.gz").write_bytes(b"half")
    with open(folder / "prepare_journal.jsonl", "a") as stream:
        stream.write('{"place": "half a li')
    seen: list[str] = []
    monkeypatch.setattr(prepare_module, "_process", lambda task: seen.append(task.id) or original(task))
    prepare(settings(pile))
    assert seen == ["scan_1", "scan_2"]
    assert sorted(os.listdir(folder / "foreground_masks")) == ["scan_0.nii.gz", "scan_1.nii.gz", "scan_2.nii.gz"]
    read_as_nnunet(folder)


def test_full_disk_stops_and_nothing_half_written_counts(raw: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(2):
        write_dicom(tmp_path / f"study{number}", ct_array(number, (20, 40, 40)) + rng.integers(0, 99, (20, 40, 40)))

    def small_files_only() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    command = [sys.executable, "-m", "nnunetv2_hyspark.cli.main", "prepare", "-d", "900", "-n", "Pile", "-np", "1"]
    command += ["--from", str(tmp_path / "study0"), str(tmp_path / "study1")]
    root = str(Path(prepare_cli.__file__).parents[2])
    done = subprocess.run(
        command,
        preexec_fn=small_files_only,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": root},
    )
    assert done.returncode != 0
    assert "cannot write it" in done.stderr and "run the same command again" in done.stderr
    folder = raw / "Dataset900_Pile"
    assert not (folder / "dataset.json").exists()
    assert list((folder / "converted").glob("*")) == []
    prepare(settings(tmp_path / "study0", tmp_path / "study1"))
    assert len(read_as_nnunet(folder)) == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_full_disk_at_the_very_end_is_told_in_one_line(raw: Path, pile: Path, capsys: pytest.CaptureFixture) -> None:
    folder = prepare(settings(pile))
    before = (folder / "dataset.json").read_text()
    write(pile / "new.mha", ct_array(40))
    (folder / "dataset.json.unfinished").symlink_to("/dev/full")
    command = ["prepare", "-d", "900", "-n", "Pile", "--from", str(pile), "-np", "1"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "make room and run the same command again" in error and str(folder / "dataset.json") in error
    assert (folder / "dataset.json").read_text() == before
    assert main(command) == 0
    assert "new" in read_as_nnunet(folder)


def test_same_result_with_workers(raw: Path, pile: Path) -> None:
    write_dicom(pile / "study", ct_array(7))
    (pile / "bad.mha").write_text("x")
    alone = dataset(prepare(settings(pile)))
    parallel = dataset(prepare(replace(settings(pile, processes=2), dataset_id=901)))
    assert alone["dataset"] == parallel["dataset"]


def test_id_in_use(raw: Path, pile: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write(other / "o.mha", ct_array(77))
    (raw / "Dataset900_Precious").mkdir()
    with pytest.raises(ValueError, match="900 already belongs to .*Dataset900_Precious"):
        prepare(settings(pile, overwrite=True))
    (raw / "Dataset900_Precious").rename(raw / "Dataset900_Pile")
    (raw / "Dataset900_Pile" / "dataset.json").write_text("{}")
    with pytest.raises(ValueError, match="hyspark prepare did not make"):
        prepare(settings(pile, overwrite=True))
    assert (raw / "Dataset900_Pile" / "dataset.json").read_text() == "{}"
    (raw / "Dataset900_Pile" / "dataset.json").unlink()

    prepare(settings(pile))
    with pytest.raises(ValueError, match="prepared from other sources .*pile"):
        prepare(settings(other))
    extended = prepare(settings(pile, other))
    assert len(dataset(extended)["dataset"]) == 4
    replaced = prepare(settings(other, overwrite=True))
    assert list(dataset(replaced)["dataset"]) == ["o"]
    assert os.listdir(replaced / "foreground_masks") == ["o.nii.gz"]
    with pytest.raises(ValueError, match="its own source"):
        prepare(settings(900, other))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": ("EMPTY",)}, "no scan found in .*it is empty"),
        ({"sources": ("TEXT",)}, "only other files: 1 .txt"),
        ({"sources": ("/no/such/place",)}, "does not exist"),
        ({"sources": ("77",)}, "no nnU-Net data set 77"),
        ({"sources": ("BADLIST",)}, "no column of image paths"),
        ({"sources": ("BADJSON",)}, "not readable JSON"),
        ({"dataset_id": 1000}, "1 to 999"),
        ({"name": "a/b"}, "letters, digits"),
        ({"channels": 2}, "none of the 3 scans"),
        ({"min_slices": 50}, "3 too few slices"),
        ({"modality": "PET,CT"}, "names 2 channels"),
    ],
)
def test_wrong_use_is_answered_in_one_sentence(raw, pile, tmp_path, monkeypatch, change, message) -> None:
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "TEXT").mkdir()
    (tmp_path / "TEXT" / "a.txt").write_text("x")
    (tmp_path / "bad.csv").write_text("patient,age\nx,3\n")
    (tmp_path / "bad.json").write_text("{")
    places = {"EMPTY": "EMPTY", "TEXT": "TEXT", "BADLIST": "bad.csv", "BADJSON": "bad.json"}
    if change.get("sources", ("",))[0] in places:
        change = {"sources": (str(tmp_path / places[change["sources"][0]]),)}
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        prepare(replace(settings(pile), **change))
    assert "\n" not in str(caught.value)


WHOLE = {"channel_names": {"0": "CT"}, "file_ending": ".nii.gz"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "holds a list, expected an object"),
        ({"modality": {"0": "CT"}, "training": []}, "names no file_ending.*nnUNetv2_convert_old_nnUNet_dataset"),
        ({**WHOLE, "file_ending": 3}, "names no file_ending"),
        ({**WHOLE, "channel_names": ["CT"]}, r'gives \["CT"\] as channel_names, expected an object like {"0'),
        ({**WHOLE, "channel_names": {"CT": 0}}, "as channel_names, expected an object like"),
        ({"modality": None, "file_ending": ".nii.gz"}, "gives null as modality"),
        ({**WHOLE, "dataset": ["a"]}, "the dataset in .* is a list, expected an object of cases"),
        ({**WHOLE, "dataset": {"a": {"label": "x"}}}, 'the case a in .* expected an object with a list "images"'),
        ({**WHOLE, "dataset": {"a": ["x"]}}, 'the case a in .* expected an object with a list "images"'),
        ({**WHOLE, "dataset": {"a": {"images": [None]}}}, 'the case a in .* expected an object with a list "images"'),
    ],
)
def test_a_faulty_dataset_json_is_named(raw: Path, content: object, message: str) -> None:
    write(raw / "Dataset004_Old" / "imagesTr" / "a_0000.nii.gz", ct_array(20))
    path = raw / "Dataset004_Old" / "dataset.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as caught:
        prepare(settings(4))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["7", "null", "true", '"a.nii"', "[3]", "[null]", '{"a": true}', '[{"image": 3}]'])
def test_a_json_list_of_other_things_is_named(raw: Path, tmp_path: Path, content: str) -> None:
    path = tmp_path / "list.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"the list {path} holds"):
        prepare(settings(path))


def test_raw_folder_not_set(pile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("nnUNet_raw", raising=False)
    with pytest.raises(FileNotFoundError, match="nnUNet_raw is not set"):
        prepare(settings(pile))


def test_command(raw: Path, pile: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["prepare", "-d", "900", "-n", "Dataset900_Pile", "--from", str(pile), "-np", "1"]
    assert main(arguments) == 0
    output = capsys.readouterr().out
    assert "nnUNetv2_plan_and_preprocess -d 900" in output
    assert "fold 'all'" in output
    assert (raw / "Dataset900_Pile" / "dataset.json").is_file()
    assert main(["prepare", "-d", "900", "-n", "Other", "--from", str(pile)]) != 0
    assert "already belongs to" in capsys.readouterr().err


def run_nnunet(*command: str) -> str:
    variables = {**os.environ, "nnUNet_n_proc_DA": "0" if command[0] == "nnUNetv2_train" else "1"}
    variables["nnUNet_hyspark"] = "base_width=8,head_width=8,pretraining.epochs=1,iterations_per_epoch=2"
    variables["nnUNet_hyspark"] += ",val_iterations_per_epoch=1"
    done = subprocess.run([find_command(command[0]), *command[1:]], capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def plan_and_preprocess(folder: Path, planner: str = "ExperimentPlanner", plans_name: str = "nnUNetPlans") -> list[str]:
    """Names of the preprocessed cases."""
    command = ("nnUNetv2_plan_and_preprocess", "-d", "900", "-c", "3d_fullres", "-np", "2", "-pl", planner)
    assert "mismatch" not in run_nnunet(*command, "--verify_dataset_integrity")
    preprocessed = Path(os.environ["nnUNet_preprocessed"]) / folder.name
    plans = json.loads((preprocessed / f"{plans_name}.json").read_text())
    cases = preprocessed / plans["configurations"]["3d_fullres"]["data_identifier"]
    return sorted(path.name for path in cases.glob("*.pkl"))


@pytest.mark.slow
@pytest.mark.parametrize(("source", "channel"), [("openkbp", "CT"), ("hippocampus", "zscore")])
def test_real_scans_are_planned_and_pretrained_on(
    raw: Path, shared_data: Path, tmp_path: Path, source: str, channel: str
) -> None:
    for path in sorted((shared_data / "data" / source / "images").iterdir())[:6]:
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / path.name).symlink_to(path)
    result = prepare(settings(tmp_path / "in"))
    assert dataset(result)["channel_names"] == {"0": channel}
    plans = "nnUNetHySparKPlans"
    assert len(plan_and_preprocess(result, "HySparKPlanner", plans)) == 6
    if source == "openkbp":  # its crops take minutes on a CPU
        return
    trainer = "HySparKPretrainTrainer"
    run_nnunet("nnUNetv2_train", "900", "3d_fullres", "all", "-tr", trainer, "-p", plans, "-device", "cpu")
    output = tmp_path / "nnUNet_results" / result.name / f"{trainer}__{plans}__3d_fullres" / "fold_all"
    assert (output / "checkpoint_final.pth").is_file()
    assert len(list((output / "validation").glob("*.png"))) == 6


@pytest.mark.slow
def test_nnunet_plans_a_pile_of_all_formats(raw: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    write(folder / "a.nii", ct_array(1), tilt=0.3)
    write(folder / "b.nrrd", ct_array(2), tilt=-0.7)
    write(folder / "c.mha", ct_array(3, (15, 30, 28)))
    write_dicom(folder / "study", ct_array(4))
    assert plan_and_preprocess(prepare(settings(folder))) == ["a.pkl", "b.pkl", "c.pkl", "study_s1.pkl"]
