"""Print the oldest versions that pyproject.toml allows, as requirements for pip."""

import tomllib
from pathlib import Path

EXTRAS = ("report", "tensorboard")  # what the tests import, beside test tools

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
optional = [entry for extra in EXTRAS for entry in project["optional-dependencies"][extra]]
for requirement in [*project["dependencies"], *optional]:
    name, separator, version = requirement.partition(">=")
    if not separator or "," in version:
        raise SystemExit(f"pyproject.toml: expected `name>=version`, got {requirement!r}")
    print(f"{name}=={version}")
