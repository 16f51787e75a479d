"""Benchmarks run: that for a machine with an accelerator on any, and that of a user's own
covariance, whose work is counted."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

from jaxreml.model.covariance.custom import Function

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_gpu_runs_anywhere(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    gpu = importlib.import_module("gpu")
    every = gpu.cases()
    assert len(every) == 6
    monkeypatch.setattr(gpu, "cases", lambda: [own for own in every if own.name == "sleepstudy"])
    assert gpu.main(["--quick", "--json", str(tmp_path / "found.json")]) == 0
    (found,) = json.loads((tmp_path / "found.json").read_text())["studies"]
    assert found["compared"] == 200 and found["not_converged"] == 0
    assert "responses / s" in capsys.readouterr().out
    sys.modules.pop("gpu"), sys.modules.pop("studies", None), sys.modules.pop("common", None)


def test_kernels_agree_with_plain_reml(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = importlib.import_module("kernels")
    assert script.main(["--quick", "--json", str(tmp_path / "found.json")]) == 0
    many, three = json.loads((tmp_path / "found.json").read_text())
    assert many["agree"] and three["agree"] and three["iterations"] <= 12
    sys.modules.pop("kernels"), sys.modules.pop("common", None)


def test_a_covariance_of_ones_own_takes_about_the_work_of_the_built_in(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    own = importlib.import_module("own_covariance")
    (study,) = every = own.studies(quick=True)[:1]
    monkeypatch.setattr(own, "studies", lambda quick: every)
    assert own.main(["--quick", "--json", str(tmp_path / "found.json")]) == 0
    (found,) = json.loads((tmp_path / "found.json").read_text())
    assert found["converged"] and found["apart"] < 1e-8
    assert "times the built-in" in capsys.readouterr().out

    # Times would depend on the machine: the search takes as many steps, and calls the compiled
    # function less than twice for each of all searches and once for each direction of the
    # certificate.
    calls = []
    computed = Function._computed
    monkeypatch.setattr(Function, "_computed", lambda *args: calls.append(1) or computed(*args))
    (_, builtin), (_, ours) = own.fitted(study, "ar1"), own.fitted(study, "own")
    assert ours.n_iter <= builtin.n_iter + 1
    assert 0 < len(calls) <= 8 * ours.n_iter
    sys.modules.pop("own_covariance"), sys.modules.pop("common", None)


@pytest.mark.long
def test_a_pass_of_batches_has_the_loss_of_all_rows(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = importlib.import_module("neural")
    assert script.main(["--quick", "--json", str(tmp_path / "found.json")]) == 0
    (found,) = json.loads((tmp_path / "found.json").read_text())
    assert found["apart"] < 1e-12 and 0 < found["padded"] < 0.1
    sys.modules.pop("neural"), sys.modules.pop("common", None)
