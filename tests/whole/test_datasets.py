"""The bundled data sets are R's: shape, types, levels, a few values, and honest errors."""

import pandas as pd
import pytest
import watchdog

from jaxreml import datasets

SHAPES = {
    "dyestuff": (30, 2),
    "dyestuff2": (30, 2),
    "sleepstudy": (180, 3),
    "penicillin": (144, 3),
    "pastes": (60, 4),
    "cake": (270, 5),
    "orthodont": (108, 4),
    "machines": (54, 3),
    "oxide": (72, 5),
    "insteval": (73421, 7),
}
# f: float, i: integer, c: categorical, o: ordered categorical
COLUMNS = {
    "dyestuff": {"Batch": "c", "Yield": "f"},
    "dyestuff2": {"Batch": "c", "Yield": "f"},
    "sleepstudy": {"Reaction": "f", "Days": "f", "Subject": "c"},
    "penicillin": {"diameter": "f", "plate": "c", "sample": "c"},
    "pastes": {"strength": "f", "batch": "c", "cask": "c", "sample": "c"},
    "cake": {"replicate": "c", "recipe": "c", "temperature": "o", "angle": "i", "temp": "f"},
    "orthodont": {"distance": "f", "age": "f", "Subject": "c", "Sex": "c"},
    "machines": {"Worker": "c", "Machine": "c", "score": "f"},
    "oxide": {"Source": "c", "Lot": "c", "Wafer": "c", "Site": "c", "Thickness": "f"},
    "insteval": {
        "s": "c",
        "d": "c",
        "studage": "o",
        "lectage": "o",
        "service": "c",
        "dept": "c",
        "y": "i",
    },
}
# Sums over the numeric columns, from R.
SUMS = {
    ("dyestuff", "Yield"): 45825.0,
    ("dyestuff2", "Yield"): 169.968,
    ("sleepstudy", "Reaction"): 53731.4205,
    ("penicillin", "diameter"): 3308.0,
    ("pastes", "strength"): 3603.2,
    ("cake", "angle"): 8673.0,
    ("orthodont", "distance"): 2594.5,
    ("machines", "score"): 3221.1,
    ("oxide", "Thickness"): 144011.0,
    ("insteval", "y"): 235369.0,
}


def kind(column: pd.Series) -> str:
    if isinstance(column.dtype, pd.CategoricalDtype):
        return "o" if column.cat.ordered else "c"
    return column.dtype.kind


def test_names_are_the_documented_ones():
    assert set(datasets.names()) == set(SHAPES) == set(datasets.SOURCES)


@pytest.mark.parametrize("name", SHAPES)
def test_shape_columns_and_types(name):
    frame = datasets.load(name)
    assert frame.shape == SHAPES[name]
    assert {column: kind(frame[column]) for column in frame} == COLUMNS[name]
    assert list(frame) == list(COLUMNS[name])
    assert not frame.isna().any(axis=None)
    assert list(frame.index) == list(range(len(frame)))


@pytest.mark.parametrize("name", SHAPES)
def test_levels_are_strings_that_all_occur(name):
    frame = datasets.load(name)
    for column, sort in COLUMNS[name].items():
        if sort in "co":
            levels = frame[column].cat.categories
            assert all(type(level) is str for level in levels)
            assert set(frame[column]) == set(levels)


@pytest.mark.parametrize(("name", "column"), SUMS)
def test_sums_agree_with_r(name, column):
    assert datasets.load(name)[column].sum() == pytest.approx(SUMS[name, column], rel=1e-12)


def test_known_values():
    sleep = datasets.load("sleepstudy")
    assert sleep.Reaction[:3].tolist() == [249.56, 258.7047, 250.8006]
    assert sleep.Subject[0] == "308"
    assert datasets.load("dyestuff2").Yield[0] == 7.298
    assert datasets.load("oxide").Thickness[:2].tolist() == [2006.0, 1999.0]
    cake = datasets.load("cake")
    assert (cake.temp == cake.temperature.astype(float)).all()


def test_levels_keep_the_order_of_r():
    assert list(datasets.load("orthodont").Sex.cat.categories) == ["Male", "Female"]
    assert list(datasets.load("orthodont").Subject.cat.categories[:3]) == ["M16", "M05", "M02"]
    assert list(datasets.load("machines").Worker.cat.categories) == list("624135")
    assert list(datasets.load("insteval").dept.cat.categories[:3]) == ["15", "5", "10"]
    levels = datasets.load("cake").temperature.cat.categories
    assert list(levels) == ["175", "185", "195", "205", "215", "225"]


def test_each_call_gives_a_fresh_frame():
    first = datasets.load("dyestuff")
    first.loc[0, "Yield"] = -1.0
    assert datasets.load("dyestuff").Yield[0] == 1545.0


def test_name_in_any_case():
    pd.testing.assert_frame_equal(datasets.load("SleepStudy"), datasets.load("sleepstudy"))


def test_unknown_name_says_what_there_is():
    with pytest.raises(ValueError, match="Did you mean 'sleepstudy'") as error:
        datasets.load("sleep_study")
    assert all(name in str(error.value) for name in datasets.names())
    with pytest.raises(ValueError, match="There are: dyestuff"):
        datasets.load("zzz")


@pytest.mark.parametrize("name", SHAPES)
def test_source_names_its_package_and_columns(name):
    title, source, formula = datasets.SOURCES[name]
    assert title
    assert "R package" in source
    assert formula.split(" ~ ")[0] in datasets.load(name)


def test_import_needs_no_pandas():
    # Loaded from its file, so that what the rest of jaxreml imports does not count.
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('d', {datasets.__file__!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "assert 'pandas' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    watchdog.run(code, check=True)
