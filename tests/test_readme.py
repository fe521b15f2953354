"""The README's code prints what the README says it prints."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def blocks_that_print():
    """Python blocks of the README that end in a print with its result as a comment: (code, result)."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    return [(code, found[1]) for code in blocks if (found := re.search(r"print\(.*\)  # (.*)\n$", code))]


def test_code_of_the_readme_prints_the_result_beside_it():
    blocks = blocks_that_print()
    assert any("soft_contrastive_loss" in code for code, _ in blocks)
    for code, result in blocks:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
        assert done.stdout.strip() == result, done.stderr
