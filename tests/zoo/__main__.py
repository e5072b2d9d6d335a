"""Write ``docs/coverage.md``; with ``--check``, only report whether it is up to date."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from tests.zoo.audit import audit
from tests.zoo.coverage import CAPTURED, page

PAGE = Path(__file__).resolve().parents[2] / "docs" / "coverage.md"


def main() -> int:
    """Audit all models."""
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if the page is out of date")
    options = parser.parse_args()
    text = page({entry: audit(entry) for entry in tqdm(CAPTURED, unit="model")})
    if not options.check:
        PAGE.write_text(text)
        print(f"wrote {PAGE.name}")
        return 0
    if PAGE.read_text() != text:
        print("docs/coverage.md is out of date; write it anew with: make coverage")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
