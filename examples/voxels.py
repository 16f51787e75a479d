"""Where does the brain of patients shrink faster? From NIfTI images to maps of a mixed model.

Forty people, half of them patients, came for up to four scans over three years. Grey matter is
lost with the years in everybody, and in patients faster in the two hippocampi. Scans of one person
are alike, so each voxel of the brain gets a mixed model with a random intercept per person, and
twenty thousand voxels share one design: `Images` reads the scans under a mask, `fit_many` fits all
voxels in one call, and results go back into images. The brains are synthetic, so that the maps can
be compared with the truth.

Run: python examples/voxels.py [PLOT.png [FOLDER]]

The maps go to FOLDER, a temporary one if it is left out.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
from scipy.ndimage import gaussian_filter
from scipy.special import stdtrit
from scipy.stats import false_discovery_control

import jaxreml

SEED = 11
PEOPLE, VISITS = 40, 4
MISSED = 0.15  # share of visits after the first that did not take place
FDR = 0.05  # false discovery rate to control
SHAPE, SIZE = (40, 48, 36), 4.0  # of the images in voxels, and of a voxel in millimetres
HIPPOCAMPUS = (24.0, -18.0, -12.0)  # millimetres from the middle: right, front, up

FORMULA = "~ years * group + age + (1 | person)"
FASTER = "years:group[T.patient]"


def main(path: str | Path | None = None, folder: str | Path | None = None) -> dict:
    """Run the study; the plot goes to `path`, if there is one, and maps to `folder`."""
    rng = np.random.default_rng(SEED)
    truth = simulate_brain()
    with tempfile.TemporaryDirectory() as scans, tempfile.TemporaryDirectory() as other:
        maps = Path(folder or other)
        maps.mkdir(parents=True, exist_ok=True)
        visits = simulate_visits(rng)
        write_scans(rng, visits, truth, Path(scans))

        images = jaxreml.Images(visits["path"], Path(scans) / "mask.nii.gz")
        print(
            f"{images.n} scans of {visits['person'].nunique()} people, "
            f"{len(images.names)} of {images.mask.size} voxels in the mask"
        )
        results = jaxreml.fit_many(FORMULA, visits, images)
        print(f"{int(results.converged.sum())} voxels fitted: {FORMULA}")

        table, accuracy = discover(results, images, truth)
        shares = person_shares(results, images, truth)
        peak = look_closely(results, table, visits, images)
        written = write_maps(results, table, shares, images, maps)
        plot = None if path is None else draw(images, truth, table, shares, Path(path))
        written = {name: nib.load(file).get_fdata() for name, file in written.items()}
    return {
        "results": results,
        "images": images,
        "truth": truth,
        "table": table,
        "shares": shares,
        "peak": peak,
        "maps": written,
        "plot": plot,
        **accuracy,
    }


def affine() -> np.ndarray:
    """From indices of voxels to millimetres from the middle of the images."""
    matrix = np.diag([SIZE, SIZE, SIZE, 1.0])
    matrix[:3, 3] = -SIZE * (np.array(SHAPE) - 1) / 2
    return matrix


def distance(centre: tuple[float, float, float], radii: tuple[float, float, float]) -> np.ndarray:
    """Of each voxel from the centre of an ellipsoid, 1 on its surface."""
    index = np.moveaxis(np.indices(SHAPE), 0, -1)
    place = index @ affine()[:3, :3].T + affine()[:3, 3]
    return np.linalg.norm((place - np.array(centre)) / np.array(radii), axis=-1)


def simulate_brain() -> dict[str, np.ndarray]:
    """What the brain is made of, as volumes: grey matter in per cent and what it depends on."""
    whole = distance((0, 0, 0), (66, 84, 60))
    i, j, k = np.indices(SHAPE)
    folds = whole + 0.05 * np.sin(1.3 * i) * np.sin(1.1 * j) * np.cos(0.9 * k)
    cortex = np.exp(-(((folds - 0.87) / 0.1) ** 2))
    right, front, up = HIPPOCAMPUS
    deep, ventricles = np.zeros(SHAPE), np.zeros(SHAPE)
    for side in (-1, 1):
        deep += distance((side * right, front, up), (10, 17, 9)) < 1
        ventricles += distance((side * 10, -4, 10), (7, 30, 11)) < 1
    grey = gaussian_filter((25 + 50 * cortex + 40 * deep) * (ventricles == 0), 0.6)
    return {
        "mask": whole < 1,
        "grey": np.where(whole < 1, grey, 0.0),
        "years": -0.4 * cortex - 0.2,  # lost per year by everybody
        "age": -0.10 * cortex,  # less per year of age at the first visit
        "faster": -1.5 * gaussian_filter(deep, 0.6) * (deep > 0),  # more by patients
        "person_sd": 1.0 + 3.0 * cortex,
        "noise_sd": np.full(SHAPE, 1.6),
    }


def simulate_visits(rng: np.random.Generator) -> pd.DataFrame:
    """Covariates, a row per scan."""
    person = np.repeat(np.arange(PEOPLE), VISITS)
    visit = np.tile(np.arange(VISITS), PEOPLE)
    came = (visit == 0) | (rng.uniform(size=person.size) > MISSED)
    years = np.where(visit == 0, 0.0, visit + rng.normal(0, 0.1, person.size))
    table = pd.DataFrame(
        {
            "person": [f"sub-{k:02d}" for k in person],
            "visit": visit + 1,
            "years": years.round(2),
            "group": np.where(person % 2, "patient", "control"),
            "age": rng.uniform(60, 80, PEOPLE).round()[person],
        }
    )
    return table[came].reset_index(drop=True)


def write_scans(
    rng: np.random.Generator, visits: pd.DataFrame, truth: dict[str, np.ndarray], folder: Path
) -> None:
    """A NIfTI image per visit, whose path becomes a column, and the mask."""
    nib.save(nib.Nifti1Image(truth["mask"].astype(np.uint8), affine()), folder / "mask.nii.gz")
    people = {name: smooth_noise(rng) for name in visits["person"].unique()}
    paths = []
    for row in visits.itertuples():
        volume = truth["grey"] + truth["years"] * row.years + truth["age"] * (row.age - 70)
        if row.group == "patient":
            volume = volume + truth["faster"] * row.years
        volume = volume + truth["person_sd"] * people[row.person]
        volume = (volume + truth["noise_sd"] * smooth_noise(rng)) * truth["mask"]
        paths.append(folder / f"{row.person}_ses-{row.visit}_grey.nii.gz")
        nib.save(nib.Nifti1Image(volume.astype(np.float32), affine()), paths[-1])
    visits["path"] = paths


def smooth_noise(rng: np.random.Generator) -> np.ndarray:
    """Noise of variance 1 that neighbours share."""
    volume = gaussian_filter(rng.normal(size=SHAPE), 1.0, mode="wrap")
    return volume / volume.std()


def discover(
    results: jaxreml.BatchResults, images: jaxreml.Images, truth: dict[str, np.ndarray]
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Test in each voxel whether patients lose more per year, and compare with the truth."""
    table = images.coordinates().join(
        pd.DataFrame(
            {
                "estimate": results.params[FASTER],
                "t": results.tvalues[FASTER],
                "p_value": results.pvalues[FASTER],
                "true_effect": truth["faster"][images.mask],
            }
        )
    )
    table["q_value"] = false_discovery_control(table["p_value"], method="bh")
    table["discovery"] = table["q_value"] <= FDR
    found, real = table["discovery"], table["true_effect"] < -0.1
    error = (table["estimate"] - table["true_effect"]).abs()
    margin = results.bse[FASTER] * stdtrit(results.df[FASTER], 0.975)
    accuracy = {
        "n_found": int(found.sum()),
        "power": float((found & real).sum() / real.sum()),
        "false_discovery_proportion": float((found & ~real).sum() / max(found.sum(), 1)),
        "coverage": float((error <= margin).mean()),
    }
    print(f"""
Faster loss in patients: {accuracy["n_found"]} voxels at a false discovery rate of {FDR:.0%}
    {accuracy["power"]:.0%} of the {int(real.sum())} voxels of the hippocampi are found
    {accuracy["false_discovery_proportion"]:.1%} of those found lie elsewhere
    95% intervals cover the true effect in {accuracy["coverage"]:.1%} of all voxels

The surest, with their places in millimetres:
{table.sort_values("p_value").head(5).to_string(float_format="{:.3g}".format)}""")
    return table, accuracy


def person_shares(
    results: jaxreml.BatchResults, images: jaxreml.Images, truth: dict[str, np.ndarray]
) -> pd.DataFrame:
    """Share of the variance, beyond the covariates, that is between people."""
    variances = results.variances
    person, noise = truth["person_sd"][images.mask] ** 2, truth["noise_sd"][images.mask] ** 2
    shares = pd.DataFrame(
        {
            "share": variances[("person", "(Intercept)")] / variances.sum(axis=1),
            "true_share": person / (person + noise),
        }
    )
    quartiles = shares["share"].quantile([0.25, 0.5, 0.75])
    print(f"""
People explain {quartiles[0.5]:.0%} of the variance (quartiles {quartiles[0.25]:.0%} to\
 {quartiles[0.75]:.0%} of the voxels);
correlation with the truth {shares["share"].corr(shares["true_share"]):.2f}""")
    return shares


def look_closely(
    results: jaxreml.BatchResults,
    table: pd.DataFrame,
    visits: pd.DataFrame,
    images: jaxreml.Images,
) -> dict[str, Any]:
    """The surest voxel alone: everything that `jaxreml.fit` reports."""
    name = table["p_value"].idxmin()
    alone = results.estimate(name)
    values = images.read(images.names.get_loc(name), images.names.get_loc(name) + 1)[:, 0]
    single = jaxreml.fit(f"grey {FORMULA}", visits.assign(grey=values))
    difference = float(np.max(np.abs(results.params.loc[name] / single.params - 1)))
    print(f"\nThe voxel {name} alone:\n{alone.summary()}")
    return {"voxel": name, "difference": difference}


def write_maps(
    results: jaxreml.BatchResults,
    table: pd.DataFrame,
    shares: pd.DataFrame,
    images: jaxreml.Images,
    folder: Path,
) -> dict[str, Path]:
    """Result maps as NIfTI images; their paths."""
    maps = {
        "faster_estimate": table["estimate"],
        "faster_t": table["t"],
        "faster_found": table["t"].where(table["discovery"], 0.0),
        "person_share": shares["share"],
        "fixed_effects": results.params,  # a volume for each
    }
    paths = {name: folder / f"{name}.nii.gz" for name in maps}
    for name, values in maps.items():
        images.save(values, paths[name])
    print(f"\nMaps in {folder}: {', '.join(path.name for path in paths.values())}")
    return paths


def draw(
    images: jaxreml.Images,
    truth: dict[str, np.ndarray],
    table: pd.DataFrame,
    shares: pd.DataFrame,
    path: Path,
) -> Path | None:
    """Maps in two planes through the hippocampi; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("\nNo plot: it needs matplotlib, pip install 'jaxreml[plots]'")
        return None

    box = tuple(slice(own.min(), own.max() + 1) for own in np.nonzero(images.mask))
    _, j, k = np.round(np.linalg.solve(affine(), [*HIPPOCAMPUS, 1])[:3]).astype(int)
    planes = {
        f"axial, z = {SIZE * k + affine()[2, 3]:.0f} mm": lambda v: v[*box[:2], k].T,
        f"coronal, y = {SIZE * j + affine()[1, 3]:.0f} mm": lambda v: v[box[0], j, box[2]].T,
    }
    limit = float(table["t"].abs().max())
    panels = [
        ("true difference, % per year", truth["faster"][images.mask], "RdBu", (-1.7, 1.7)),
        ("its estimate, % per year", table["estimate"], "RdBu", (-1.7, 1.7)),
        (f"t, FDR {FDR:.0%}", table["t"].where(table["discovery"]), "RdBu", (-limit, limit)),
        ("variance between people", shares["share"], "viridis", (0, 1)),
    ]
    figure = Figure(figsize=(12, 7), layout="constrained")
    heights = [box[1].stop - box[1].start, box[2].stop - box[2].start]
    axes = figure.subplots(2, 4, height_ratios=heights)
    for column, (title, values, colours, limits) in enumerate(panels):
        volume = images.image(values).get_fdata()
        low, high = limits
        for axis, (plane, cut) in zip(axes[:, column], planes.items(), strict=True):
            style = {"origin": "lower", "interpolation": "nearest"}
            anatomy = np.where(cut(images.mask), cut(truth["grey"]), np.nan)
            axis.imshow(anatomy, "gray", vmin=0, vmax=truth["grey"].max(), **style)
            drawn = axis.imshow(cut(volume), colours, vmin=low, vmax=high, **style)
            axis.set(xticks=[], yticks=[], ylabel="" if column else plane)
            axis.set_frame_on(False)
        axes[0, column].set_title(title)
        figure.colorbar(drawn, ax=axes[:, column], location="bottom", shrink=0.8, pad=0.02)
    figure.suptitle(
        f"Grey matter {FORMULA}: {len(images.names)} voxels, {images.n} scans (left is left)"
    )
    figure.savefig(path, dpi=120)
    print(f"\nPlot: {path}")
    return path


if __name__ == "__main__":
    main(*sys.argv[1:3])
