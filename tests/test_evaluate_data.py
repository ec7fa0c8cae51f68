"""Data of the evaluation: folders of images and maps, their labels, and what is refused."""

from __future__ import annotations

from pathlib import Path

import extras
import numpy as np
import pytest

if (reason := extras.why_no_train()) is not None:
    pytest.skip(reason, allow_module_level=True)

import prepare_clickme
import torch
from evaluating.data import FolderOfMaps, ImageSet
from evaluations import Small, network, rho, run, write_folder, write_shards
from PIL import Image

from harmonizer_ext.clickme import ClickMe, ClickMeWebDataset


def test_folder_of_images_and_maps(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, 6)
    images = FolderOfMaps(folder)
    assert [images[i].label for i in range(6)] == [0, 0, 1, 1, 2, 2]
    sample = images[1]  # images/0/3.png
    expected = np.array(Image.open(folder / "images/0/3.png"))
    np.testing.assert_array_equal(sample.image.permute(1, 2, 0), expected)
    np.testing.assert_array_equal(sample.heatmap[0], np.load(folder / "maps/0/3.npy"))
    evaluation = run([network(size=32)], ImageSet(folder))
    assert len(rho(evaluation, "small")) == 6
    prepared = ImageSet(folder).at(32)[1]
    assert prepared.image.shape == (3, 32, 32)
    assert prepared.heatmap.shape == (1, 32, 32)


def test_labels_of_a_folder(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, 3)
    (folder / "classes.txt").write_text("1\n2\n0\n")
    assert [FolderOfMaps(folder)[i].label for i in range(3)] == [2, 0, 1]
    (folder / "labels.csv").write_text("name,label\n0/0,7\n1/1,8\n2/2,9\n")
    assert [FolderOfMaps(folder)[i].label for i in range(3)] == [7, 8, 9]
    (folder / "labels.csv").write_text("name,label\n0/0,7\n")
    with pytest.raises(ValueError, match=r"expected a label for every image.*none for 2.*'1/1'"):
        FolderOfMaps(folder)
    (folder / "labels.csv").write_text("file,class\n0/0,7\n")
    with pytest.raises(ValueError, match="expected columns name,label"):
        FolderOfMaps(folder)


def test_bad_folders(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", 3)
    np.save(folder / "maps/1/1.npy", np.zeros((40, 50)))
    with pytest.raises(ValueError, match=r"in the proportions of its image.*50x40, got.*40x50"):
        FolderOfMaps(folder)[1]
    np.save(folder / "maps/1/1.npy", np.zeros((50, 40, 3)))
    with pytest.raises(ValueError, match=r"expected a map \(H, W\) of numbers"):
        FolderOfMaps(folder)[1]
    Image.new("RGB", (40, 50), "red").save(folder / "maps/0/0.png")
    with pytest.raises(ValueError, match="expected a grey map, got colours"):
        FolderOfMaps(folder)[0]
    (folder / "maps/2/2.png").unlink()
    with pytest.raises(ValueError, match=r"expected a map for every image.*none for 1.*'2/2'"):
        FolderOfMaps(folder)
    with pytest.raises(FileNotFoundError, match=r"data: expected .tfrecords, .tar, .npz or .pth"):
        ImageSet(tmp_path / "nothing")


def test_folders_of_imagenets_classes_have_its_numbers(tmp_path: Path) -> None:
    """A part of ImageNet, as Clicktionary is: the place among its own folders says nothing."""
    folder = write_folder(tmp_path, 3)
    names = ["n02086240", "n03100240", "n15075141"]  # Shih-Tzu, convertible, toilet tissue
    for number, name in enumerate(names):
        for part in ("images", "maps"):
            (folder / part / str(number)).rename(folder / part / name)
    images = ImageSet(folder)
    assert [images.at(32)[i].label for i in range(3)] == [155, 511, 999]
    assert images.alphabetical is None
    (folder / "classes.txt").write_text("\n".join(reversed(names)))
    assert [FolderOfMaps(folder)[i].label for i in range(3)] == [2, 1, 0]
    (folder / "classes.txt").unlink()
    for part in ("images", "maps"):
        (folder / part / names[1]).rename(folder / part / "n00000001")
    with pytest.raises(ValueError, match=r"got 1 others, the first is n00000001; .*classes.txt"):
        FolderOfMaps(folder)


def test_alphabetical_order_serves_networks_of_so_many_classes(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, 3)
    for part in ("images", "maps"):
        (folder / part / "0").rename(folder / part / "zebra")
    with pytest.raises(ValueError, match=r"for each of the 1000 classes of small, got 3, whose al"):
        run([network(size=32)], ImageSet(folder))
    three = network(size=32)
    three.model = Small(classes=3)
    assert len(rho(run([three], ImageSet(folder)), "small")) == 3
    assert [FolderOfMaps(folder)[i].label for i in range(3)] == [0, 1, 2]
    assert FolderOfMaps(folder)._files[2][0].parent.name == "zebra"


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, 2)
    np.save(folder / "maps/0/0.npy", np.zeros((50, 40)))
    with pytest.raises(ValueError, match=r"one file of a name, got .*0/0\.npy and .*0/0\.png"):
        FolderOfMaps(folder)


def test_labels_below_zero_are_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, 2)
    (folder / "labels.csv").write_text("name,label\n0/0,3\n1/1,-1\n")
    with pytest.raises(ValueError, match=r"expected labels from 0 to 999, .* got -1"):
        run([network(size=32)], ImageSet(folder))


def test_small_maps_are_enlarged_to_their_images(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, 1)
    small = np.arange(20.0).reshape(5, 4)
    (folder / "maps/0/0.png").unlink()
    np.save(folder / "maps/0/0.npy", small)
    heatmap = FolderOfMaps(folder)[0].heatmap
    assert heatmap.shape == (1, 50, 40)
    np.testing.assert_allclose(heatmap.mean(), small.mean(), rtol=1e-5)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ "tfrecords" and "tar": the same images in both."""
    folder = tmp_path_factory.mktemp("clickme")
    write_shards(folder / "tfrecords", 7)
    arguments = ["convert", str(folder / "tfrecords"), "--output", str(folder / "tar")]
    assert prepare_clickme.main(arguments) == 0
    return folder


@pytest.mark.parametrize("size", [224, 64])
def test_webdataset_shards_are_the_tfrecords(shards: Path, size: int) -> None:
    images, expected = ImageSet(shards / "tar"), ImageSet(shards / "tfrecords")
    assert len(images) == len(expected) == 7
    for row in range(7):
        for a, b in zip(images.at(size)[row], expected.at(size)[row], strict=True):
            assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
    streamed = [sample.label for sample in ClickMeWebDataset(shards / "tar")]
    assert streamed == [images.at(size)[row].label for row in range(7)]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_evaluation_of_webdataset_shards(shards: Path, workers: int) -> None:
    results = [
        run([network()], ImageSet(shards / kind, max_images=5), workers=workers, gallery=True)
        for kind in ("tar", "tfrecords")
    ]
    assert torch.equal(rho(results[0], "small"), rho(results[1], "small"))
    assert not rho(results[0], "small").isnan().any()


def test_damaged_webdataset_shards(shards: Path, tmp_path: Path) -> None:
    whole = (shards / "tar/val-0.tar").read_bytes()
    path = tmp_path / "val-0.tar"
    path.write_bytes(whole[:2000])
    with pytest.raises(ValueError, match=r"val-0.tar is no whole tar archive: it ends within"):
        ImageSet(path)
    path.write_bytes(b"x" * 2000)
    with pytest.raises(ValueError, match=r"val-0.tar: expected a whole tar archive, got"):
        ImageSet(path)
    path.write_bytes(whole)
    manifest = (shards / "tar/manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(manifest.replace('"samples": 3', '"samples": 4'))
    with pytest.raises(ValueError, match=r"has 3 samples, manifest.json says 4"):
        ImageSet(path)


def test_files_of_one_image_each(shards: Path, tmp_path: Path) -> None:
    for number, sample in enumerate(ClickMe(shards / "tfrecords", preprocess=None)):
        np.savez(
            tmp_path / f"{number}.npz",
            image=sample.image.permute(1, 2, 0).numpy(),
            heatmap=sample.heatmap[0].numpy(),
            label=np.int64(sample.label),
        )
    files, expected = (
        run([network()], ImageSet(path)) for path in (tmp_path, shards / "tfrecords")
    )
    assert torch.equal(rho(files, "small"), rho(expected, "small"))
