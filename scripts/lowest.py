"""Print the lowest version of each package that pyproject.toml names, as constraints for pip.

usage: python scripts/lowest.py [EXTRA]
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib


def main() -> None:
    """Print one line a package: the higher bound where two lists name it."""
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lists = [project["dependencies"], *(extras[name] for name in sys.argv[1].split(",") if name)]
    lowest: dict[str, str] = {}
    for requirement in (each for requirements in lists for each in requirements):
        if found := re.match(r"([\w.-]+)>=([\d.]+)", requirement):
            name, version = found.groups()
            lowest[name] = max(lowest.get(name, "0"), version, key=lambda each: [int(part) for part in each.split(".")])
    print("\n".join(f"{name}=={version}" for name, version in lowest.items()))


if __name__ == "__main__":
    main()
