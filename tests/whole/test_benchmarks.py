"""The script for a machine with an accelerator runs on any: its answers agree with NumPy's."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

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
