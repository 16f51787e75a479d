"""NIfTI images as responses, and results as images."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import jaxreml
from jaxreml import DataError, Images, fit_many

nib = pytest.importorskip("nibabel")

SHAPE, N = (5, 4, 3), 24
AFFINE = np.array([[-2.0, 0, 0, 10], [0, 2, 0, -20], [0, 0, 3, 5], [0, 0, 0, 1]])


@pytest.fixture(scope="module")
def values():
    """Images, (n, *shape), of numbers that single precision holds."""
    return np.random.default_rng(0).normal(size=(N, *SHAPE)).astype(np.float32)


@pytest.fixture(scope="module")
def inside():
    mask = np.random.default_rng(1).uniform(size=SHAPE) < 0.6
    mask[0, 0, 0] = False
    return mask


@pytest.fixture(scope="module")
def mask(inside):
    return nib.Nifti1Image(inside.astype(np.uint8), AFFINE)


@pytest.fixture(scope="module")
def visits(values, tmp_path_factory):
    """The data, with the paths of the images."""
    folder = tmp_path_factory.mktemp("images")
    paths = []
    for k, volume in enumerate(values):
        paths.append(folder / f"scan{k:02d}.nii{'.gz' if k % 2 else ''}")
        nib.save(nib.Nifti1Image(volume, AFFINE), paths[-1])
    rng = np.random.default_rng(2)
    person = np.repeat([f"p{k}" for k in range(8)], 3)
    columns = {"age": rng.normal(50, 9, N), "person": person, "path": list(map(str, paths))}
    return pd.DataFrame(columns, [f"v{k}" for k in range(N)])


@pytest.fixture(scope="module")
def images(visits, mask):
    return Images(visits["path"], mask)


def test_ways_to_give_images(values, visits, mask, inside, images, tmp_path):
    expected = values[:, inside]
    assert list(images.names) == [f"{i},{j},{k}" for i, j, k in np.argwhere(inside)]
    volumes = [nib.Nifti1Image(volume, AFFINE) for volume in values]
    whole = nib.Nifti1Image(np.moveaxis(values, 0, -1), AFFINE)
    nib.save(whole, tmp_path / "whole.nii.gz")
    nib.save(mask, tmp_path / "mask.nii")
    for found in (
        images,
        Images(list(visits["path"]), tmp_path / "mask.nii"),
        Images(volumes, mask),
        Images([nib.Nifti1Image(volume[..., None], AFFINE) for volume in values], mask),
        Images(whole, mask),
        Images(tmp_path / "whole.nii.gz", str(tmp_path / "mask.nii")),
    ):
        np.testing.assert_array_equal(found.read(0, len(found.names)), expected)
        np.testing.assert_array_equal(found.read(3, 7), expected[:, 3:7])
        assert found.values.dtype == np.float32


def test_a_4d_image_is_read_in_parts(values, mask, inside, monkeypatch):
    monkeypatch.setattr("jaxreml.data.images.BLOCK_BYTES", 8 * values[0].size * 5)
    found = Images(nib.Nifti1Image(np.moveaxis(values, 0, -1), AFFINE), mask)
    np.testing.assert_array_equal(found.read(0, len(found.names)), values[:, inside])


def test_numbers_are_kept_exactly(values, mask, inside, tmp_path):
    counts = (1000 * values).astype(np.int16)
    scaled = nib.Nifti1Image(counts[0], AFFINE)
    scaled.header.set_slope_inter(0.1, 3)
    nib.save(scaled, tmp_path / "scaled.nii")
    double = nib.Nifti1Image(values[0] / 3.0, AFFINE, dtype=np.float64)
    for image, kind in (
        (nib.Nifti1Image(counts[0], AFFINE), np.float32),
        (tmp_path / "scaled.nii", np.float64),
        (nib.Nifti1Image(values[0].astype(float) / 3, AFFINE), np.float64),
        (double, np.float32),
    ):
        found = Images([image], mask)
        loaded = nib.load(image) if not hasattr(image, "dataobj") else image
        assert found.values.dtype == kind
        numbers = np.asanyarray(loaded.dataobj)[inside]
        np.testing.assert_array_equal(found.read(0, len(found.names))[0], numbers)


def test_voxels_are_fitted_and_go_back(values, visits, inside, images, tmp_path):
    formula = "~ age + (1 | person)"
    results = fit_many(formula, visits, images)
    expected = fit_many(formula, visits, values[:, inside].astype(float))
    np.testing.assert_array_equal(results.params, expected.params)
    assert results.responses.equals(images.names)

    images.save(results.tvalues["age"], tmp_path / "t.nii.gz")
    t = nib.load(tmp_path / "t.nii.gz")
    np.testing.assert_array_equal(t.affine, AFFINE)
    np.testing.assert_allclose(t.get_fdata()[inside], expected.tvalues["age"], rtol=1e-6)
    assert np.isnan(t.get_fdata()[~inside]).all()
    some = images.image(results.params["age"].iloc[::-1][:4], fill=0)
    found = some.get_fdata()[inside]
    np.testing.assert_allclose(found[-4:], expected.params["age"][-4:], rtol=1e-6)
    assert not found[:-4].any()
    both = images.image(results.params)
    assert both.shape == (*SHAPE, 2)
    np.testing.assert_allclose(both.get_fdata()[inside], expected.params, rtol=1e-6)
    np.testing.assert_array_equal(images.image(results.status.to_numpy()).get_fdata()[inside], 0)

    fit_many(formula, visits, images, output=tmp_path / "out.parquet", batch_size=10)
    streamed = jaxreml.BatchResults.read_parquet(tmp_path / "out.parquet")
    np.testing.assert_array_equal(streamed.params.to_numpy(), results.params.to_numpy())
    pd.testing.assert_index_equal(streamed.responses, results.responses)
    single = results.estimate(results.responses[2])
    np.testing.assert_allclose(single.params, results.params.iloc[2], rtol=1e-6)


def test_places(images, inside):
    places = images.coordinates()
    np.testing.assert_array_equal(places[["i", "j", "k"]], np.argwhere(inside))
    first = nib.affines.apply_affine(AFFINE, np.argwhere(inside)[0])
    np.testing.assert_allclose(places[["x", "y", "z"]].iloc[0], first)
    pd.testing.assert_frame_equal(images.coordinates(images.names[2:4]), places[2:4])


def test_rows_are_matched_by_labels(visits, mask, images):
    with pytest.raises(DataError, match="same row labels in different orders"):
        fit_many("~ age + (1 | person)", visits.iloc[::-1], images)
    with pytest.raises(DataError, match="the data have 23 rows and the responses 24"):
        fit_many("~ age + (1 | person)", visits.iloc[1:], images)


def moved(image, by):
    affine = AFFINE.copy()
    affine[0, 3] += by
    return nib.Nifti1Image(np.asanyarray(image.dataobj), affine)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda i, m: (i, m.slicer[:4]), r"shape \(5, 4, 3\) and the mask \(4, 4, 3\): resample"),
        (lambda i, m: ([*i, m.slicer[:2]], m), r"image 24 has shape \(2, 4, 3\)"),
        (
            lambda i, m: (i, moved(m, 1)),
            r"scan00.nii' has the shape of the mask and another affine",
        ),
        (lambda i, m: (i, nib.Nifti1Image(np.zeros(SHAPE), AFFINE)), "zero everywhere"),
        (lambda i, m: (i, nib.Nifti1Image(np.full(SHAPE, np.nan), AFFINE)), "not finite"),
        (lambda i, m: (i, nib.Nifti1Image(np.ones((*SHAPE, 2)), AFFINE)), "three dimensions"),
        (lambda i, m: (i, np.ones(SHAPE)), "the mask must be a path or an image .* not ndarray"),
        (lambda i, m: (np.zeros((2, *SHAPE)), m), "image 0 must be a path or an image of nibabel"),
        (lambda i, m: ([], m), "there are no images"),
        (lambda i, m: ("nowhere.nii", m), "'nowhere.nii' cannot be read: No such file"),
        (
            lambda i, m: ([nib.Nifti1Image(np.ones((*SHAPE, 2)), AFFINE)], m),
            r"shape \(5, 4, 3, 2\): give a list of 3-D images, or one 4-D image",
        ),
        (
            lambda i, m: ([nib.Nifti1Image(np.ones(SHAPE, complex), AFFINE)], m),
            "complex128, not re",
        ),
    ],
)
def test_bad_input_is_named(visits, mask, change, said):
    with pytest.raises(DataError, match=said):
        Images(*change(list(visits["path"]), mask))


def test_files_that_are_no_images(mask, visits, tmp_path):
    (tmp_path / "text.nii.gz").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"text.nii.gz' cannot be read"):
        Images([tmp_path / "text.nii.gz"], mask)
    whole = tmp_path / "cut.nii.gz"
    noise = np.random.default_rng(0).normal(size=SHAPE)
    nib.save(nib.Nifti1Image(noise, AFFINE), whole)
    whole.write_bytes(whole.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"cut.nii.gz' cannot be read"):
        Images([whole], mask)


def test_small_moves_are_the_same_space(visits, mask):
    assert Images(visits["path"], moved(mask, 1e-5)).n == N


def test_values_that_are_no_voxels(images):
    with pytest.raises(DataError, match="the mask has no voxel '0,0,0'"):
        images.image(pd.Series([1.0], ["0,0,0"]))
    with pytest.raises(DataError, match=r"values must be \d+, a number or a row for each voxel"):
        images.image(np.ones(3))
