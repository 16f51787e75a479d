"""The pictures of the gallery: `python docs/pictures.py [NAME ...]` makes them again by the scripts
themselves, of the examples named or of all."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

HERE = Path(__file__).parent
EXAMPLES = HERE.parent / "examples"
WIDTH = 1200  # pixels at most
COLOURS = 128


def make(name: str) -> Path:
    """Run one example and keep its picture, with few colours: a third of the bytes."""
    from PIL import Image  # comes with matplotlib

    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    path = HERE / "_static" / f"{name}.png"
    module.main(path)
    with Image.open(path) as image:
        whole = image.convert("RGB")
    if whole.width > WIDTH:
        whole = whole.resize((WIDTH, round(whole.height * WIDTH / whole.width)), Image.LANCZOS)
    whole.quantize(COLOURS).save(path, optimize=True)
    return path


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted(path.stem for path in EXAMPLES.glob("*.py")):
        print(f"\n{make(name)}")
