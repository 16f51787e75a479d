"""NIfTI images as responses, a voxel each, and voxels' numbers as images."""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from jaxreml.backend.threads import cores
from jaxreml.data.labels import shown
from jaxreml.data.matrices import Array
from jaxreml.errors import DataError

SAME_SPACE = 1e-3  # between affines, in millimetres
BLOCK_BYTES = 256 << 20  # of the volumes of one image that are read together


class Images(Array):
    """Images as responses of `fit_many`: a row per image, a response per voxel of a mask.

    Images are read once, one at a time, into a temporary file that goes with this object, of n
    times as many numbers as the mask has voxels: in single precision where images are stored so or
    as integers of up to 16 bits, else in double.

    Args:
        images: paths of 3-D images (.nii, .nii.gz and what else nibabel reads) or nibabel's images,
            in the order of the rows of the data; a pandas Series of paths, such as a column of the
            data, has its row labels checked with the data's. Or one 4-D image, a row per volume.
        mask: path or image, in the space of the images, not zero in the voxels wanted.

    Attributes:
        names: of the voxels, which are those of the responses: their indices, as in "31,40,12".
        mask: the mask as booleans, in three dimensions.
        affine: of the mask.

    Raises:
        DataError: nibabel is not installed; a file that cannot be read; an image of another shape
            or in another space than the mask; a mask without voxels.

    Examples:
        Twelve images, of four people at three visits (paths of .nii files do as well):

        >>> import nibabel
        >>> voxels = np.random.default_rng(1).normal(size=(12, 4, 4, 3))
        >>> scans = [nibabel.Nifti1Image(volume, np.eye(4)) for volume in voxels]
        >>> mask = nibabel.Nifti1Image(np.ones((4, 4, 3), np.uint8), np.eye(4))
        >>> images = jaxreml.Images(scans, mask)
        >>> visits = pd.DataFrame({"visit": [0, 1, 2] * 4, "person": np.repeat(list("abcd"), 3)})
        >>> results = jaxreml.fit_many("~ visit + (1 | person)", visits, images)
        >>> images.save(results.tvalues["visit"], "t_visit.nii.gz")
    """

    def __init__(self, images: Any, mask: Any):
        nib = _import_nibabel()
        grid = _load(nib, mask, "the mask")
        inside = np.asanyarray(grid.dataobj)
        if inside.ndim == 4 and inside.shape[3] == 1:
            inside = inside[..., 0]
        if inside.ndim != 3:
            raise DataError(f"the mask must have three dimensions, not {inside.shape}")
        if not np.isfinite(inside).all():
            raise DataError("the mask has values that are not finite; it must be 0 or 1")
        self.mask, self.affine = inside != 0, np.asarray(grid.affine, float)
        voxels = np.flatnonzero(self.mask)
        if not voxels.size:
            raise DataError("the mask is zero everywhere: it has no voxels")

        pieces = list(self._pieces(nib, images))
        n = sum(piece.count for piece in pieces)
        if not n:
            raise DataError("there are no images")
        kind = np.result_type(*(piece.kind for piece in pieces))
        self._file = tempfile.TemporaryFile()  # noqa: SIM115, goes with this object
        values = np.memmap(self._file, kind, "w+", shape=(n, voxels.size))
        starts = np.cumsum([0, *(piece.count for piece in pieces)])
        with ThreadPoolExecutor(cores()) as pool:  # zlib works beside Python

            def take(start: int, piece: _Piece) -> None:
                volumes = piece.read()[self.mask].reshape(voxels.size, piece.count)
                values[start : start + piece.count] = volumes.T

            list(pool.map(take, starts, pieces))
        self._voxels = voxels
        index = zip(
            *(own.tolist() for own in np.unravel_index(voxels, self.mask.shape)), strict=True
        )
        super().__init__(values, [f"{i},{j},{k}" for i, j, k in index])
        self.labels = images.index if isinstance(images, pd.Series) else None

    def __repr__(self) -> str:
        n, voxels = self.values.shape
        size = " x ".join(map(str, self.mask.shape))
        return f"<Images: {n} of {size} voxels, {voxels} in the mask>"

    def _pieces(self, nib: Any, images: Any) -> Iterator[_Piece]:
        """What to read, volume by volume, shapes and spaces checked."""
        several = isinstance(images, list | tuple | pd.Series | np.ndarray)
        for k, image in enumerate(images if several else [images]):
            name = f"image {k}" if several else "the image"
            if isinstance(image, str | Path):
                name = repr(str(image))
            loaded = _load(nib, image, name)
            shape = loaded.shape
            if shape[:3] != self.mask.shape:
                raise DataError(
                    f"{name} has shape {shape} and the mask {self.mask.shape}: resample one to the "
                    "other"
                )
            if not np.allclose(loaded.affine, self.affine, rtol=0, atol=SAME_SPACE):
                raise DataError(
                    f"{name} has the shape of the mask and another affine, so that voxels are in "
                    "other places: resample one to the other"
                )
            if len(shape) == 3 or shape[3:] == (1,):
                yield _Piece(1, _kind(loaded), partial(_volumes, loaded, name, None))
            elif len(shape) == 4 and not several:
                size = max(1, BLOCK_BYTES // (8 * self.mask.size))
                for start in range(0, shape[3], size):
                    some = slice(start, min(start + size, shape[3]))
                    count = some.stop - some.start
                    yield _Piece(count, _kind(loaded), partial(_volumes, loaded, name, some))
            else:
                raise DataError(
                    f"{name} has shape {shape}: give a list of 3-D images, or one 4-D image"
                )

    def image(self, values: Any, fill: float = np.nan) -> Any:
        """Numbers of voxels as an image of nibabel in the space of the mask, in single precision.

        Args:
            values: a Series by voxel, such as a column of the results of `fit_many`, which may be
                of some of them only; an array (V,), of all in the order of `names`; or a frame or
                an array (V, k), which gives a 4-D image.
            fill: where there is no voxel.

        Raises:
            DataError: voxels that the mask does not have, or an array of another length.

        Examples:
            >>> import nibabel
            >>> ones = nibabel.Nifti1Image(np.ones((4, 4, 3), np.uint8), np.eye(4))
            >>> images = jaxreml.Images([ones, ones], mask=ones)
            >>> images.image(np.arange(48.0)).shape
            (4, 4, 3)
        """
        nib = _import_nibabel()
        array = np.asarray(values, float)
        labelled = isinstance(values, pd.Series | pd.DataFrame)
        places = self._places(values.index) if labelled else self._voxels
        if array.ndim not in (1, 2) or len(array) != len(places):
            raise DataError(
                f"values must be {len(self.names)}, a number or a row for each voxel, not of shape "
                f"{array.shape}"
            )
        volume = np.full((self.mask.size, *array.shape[1:]), fill, np.float32)
        volume[places] = array
        return nib.Nifti1Image(volume.reshape(*self.mask.shape, *array.shape[1:]), self.affine)

    def save(self, values: Any, path: str | Path, fill: float = np.nan) -> None:
        """Write `image(values, fill)` to a .nii or .nii.gz file.

        Examples:
            >>> import nibabel
            >>> ones = nibabel.Nifti1Image(np.ones((4, 4, 3), np.uint8), np.eye(4))
            >>> images = jaxreml.Images([ones, ones], mask=ones)
            >>> images.save(np.arange(48.0), "map.nii.gz")
        """
        _import_nibabel().save(self.image(values, fill), Path(path))

    def coordinates(self, voxels: Any = None) -> pd.DataFrame:
        """Where voxels are: indices i, j, k and x, y, z of their centres in the affine's space.

        Args:
            voxels: names of responses; all if left out.

        Raises:
            DataError: voxels that the mask does not have.

        Examples:
            >>> import nibabel
            >>> ones = nibabel.Nifti1Image(np.ones((4, 4, 3), np.uint8), np.eye(4))
            >>> images = jaxreml.Images([ones, ones], mask=ones)
            >>> images.coordinates().tail(1).to_dict("list")
            {'i': [3], 'j': [3], 'k': [2], 'x': [3.0], 'y': [3.0], 'z': [2.0]}
        """
        voxels = self.names if voxels is None else pd.Index(voxels)
        index = np.stack(np.unravel_index(self._places(voxels), self.mask.shape), axis=1)
        place = index @ self.affine[:3, :3].T + self.affine[:3, 3]
        columns = dict(zip("ijk", index.T, strict=True)) | dict(zip("xyz", place.T, strict=True))
        return pd.DataFrame(columns, voxels)

    def _places(self, names: pd.Index) -> np.ndarray:
        """Positions of voxels in the flattened mask; DataError for others than the mask's."""
        found = self.names.get_indexer(names)
        if np.any(found < 0):
            raise DataError(f"the mask has no voxel {shown(names[found < 0], 1)}")
        return self._voxels[found]


class _Piece(NamedTuple):
    """Volumes that are read together: how many, of what kind of numbers, and how."""

    count: int
    kind: np.dtype
    read: Callable[[], np.ndarray]


def _import_nibabel() -> Any:
    try:
        import nibabel
    except ImportError:
        raise DataError("images need nibabel: pip install 'jaxreml[images]'") from None
    return nibabel


def _load(nib: Any, image: Any, name: str) -> Any:
    """An image of nibabel, its numbers not read yet."""
    if hasattr(image, "dataobj") and hasattr(image, "affine"):
        return image
    if not isinstance(image, str | Path):
        raise DataError(
            f"{name} must be a path or an image of nibabel, not {type(image).__name__}: an array "
            "needs to say where its voxels are, nibabel.Nifti1Image(array, affine)"
        )
    try:
        return nib.load(image)
    except (OSError, nib.filebasedimages.ImageFileError) as error:
        raise DataError(f"{str(image)!r} cannot be read: {error}") from None


def _kind(image: Any) -> np.dtype:
    """The type to keep its numbers in, exactly."""
    stored = image.dataobj
    if stored.dtype.kind not in "biuf":
        raise DataError(f"an image has numbers of type {stored.dtype}, not real ones")
    scaled = getattr(stored, "slope", 1) != 1 or getattr(stored, "inter", 0) != 0
    return np.dtype(float) if scaled else np.result_type(stored.dtype, np.float32)


def _volumes(image: Any, name: str, some: slice | None) -> np.ndarray:
    """A volume, or some of a 4-D image."""
    try:
        return np.asanyarray(image.dataobj if some is None else image.dataobj[..., some])
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"{name} cannot be read: {error}") from None
