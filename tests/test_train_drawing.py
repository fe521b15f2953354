"""Names and files of figures."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image

from train.drawing import plain_label, write_png


@pytest.mark.parametrize("name", ["sd1x", "_hidden", "a$b$c", "$", "two\nlines"])
def test_any_name_stands_in_a_legend_as_it_is_written(tmp_path: Path, name: str) -> None:
    figure = Figure()
    axes = figure.subplots()
    axes.plot([0, 1], label=plain_label(name))
    (text,) = axes.legend().get_texts()
    assert text.get_text().replace(r"\$", "$").strip() == " ".join(name.split())
    write_png(tmp_path / "figure.png", figure, dpi=20)  # a formula would be parsed here
    with Image.open(tmp_path / "figure.png") as written:
        assert written.size == (128, 96)
    assert [path.name for path in tmp_path.iterdir()] == ["figure.png"]
