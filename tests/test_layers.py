"""The rooms of riemvae stand in an order, and nothing imports upwards: read from the source."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

import riemvae

PACKAGE = Path(riemvae.__file__).parent

# From the top: a room imports from the rows above its own, and from its own row unless the row is split. What
# the rooms of a row import from each other must not close a circle.
ROWS = [
    ("_atomic", "_checks", "_masks", "_modes", "_recipe", "_seeding", "_tasks"),
    ("geometry",),
    ("distributions",),
    ("flows",),
    ("networks",),
    ("priors", "likelihoods"),
    ("guides",),
    ("sampling",),
    ("inference",),
    ("autoencoder", "longitudinal"),
    ("persistence", "data", "evaluation"),
    ("zoo", "augment", "demo", "benchmark", "cli", "__main__"),
]
SPLIT = [("priors", "likelihoods")]
ROW = {room: index for index, row in enumerate(ROWS) for room in row}

# What a room must not import from outside the package.
OUTSIDE = {
    "geometry": {"pyro", "zuko", "lightning", "sklearn"},
    "distributions": {"lightning", "sklearn"},
    "_checks": {"pyro", "zuko", "lightning", "sklearn", "geoopt", "arviz"},
    "_recipe": {"pyro", "zuko", "lightning", "sklearn", "geoopt", "arviz"},
}


def imported_names(path: Path, package: Path) -> list[tuple[int, str]]:
    """Line and dotted name of every import in a file, in functions and behind TYPE_CHECKING too."""
    parts = [package.name, *path.relative_to(package).with_suffix("").parts]
    inside = parts[:-1]  # the package that a relative import starts from, for a module and for __init__ alike
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = inside[: len(inside) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            # `from riemvae import guides` names a room by its alias
            found += [(node.lineno, ".".join([*base, alias.name])) for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                found.append((node.lineno, node.args[0].value))
    return found


def wrong_arrows(package: Path) -> list[str]:
    """Every import in ``package`` that the order of the rooms forbids, as readable lines."""
    wrong = []
    inner: dict[str, set[str]] = {}
    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(package)
        room = relative.parts[0].removesuffix(".py")
        if room == "__init__":
            continue  # the front door shows all rooms
        if room not in ROW:
            wrong.append(f"{relative}: the room {room!r} has no row in this file's table")
            continue
        for line, name in imported_names(path, package):
            top, _, rest = name.partition(".")
            where = f"{relative}:{line}: {room} imports {name}"
            if top in OUTSIDE.get(room, ()):
                wrong.append(f"{where}, which this room does without")
            if top != package.name:
                continue
            target = rest.split(".")[0]
            if target == room:
                continue
            if target not in ROW:
                wrong.append(f"{where}, the front door: import the room itself")
            elif ROW[target] > ROW[room]:
                wrong.append(f"{where}, which is below it")
            elif ROW[target] == ROW[room]:
                inner.setdefault(room, set()).add(target)
                if any(room in row and target in row for row in SPLIT):
                    wrong.append(f"{where}, its neighbour")
    try:
        graphlib.TopologicalSorter(inner).prepare()
    except graphlib.CycleError as error:
        wrong.append("circle: " + " -> ".join(error.args[1]))
    return wrong


def test_no_import_points_up():
    assert wrong_arrows(PACKAGE) == []


def test_the_reader_sees_the_package():
    read = [name for path in PACKAGE.rglob("*.py") for _, name in imported_names(path, PACKAGE)]
    assert sum(name.split(".")[0] == "riemvae" for name in read) > 0
    assert sum(name.split(".")[0] == "torch" for name in read) > 0


def plant(tmp_path: Path, files: dict[str, str]) -> Path:
    package = tmp_path / "riemvae"
    for name, source in files.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return package


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("geometry/bad.py", "from riemvae.guides import GaussianGuide\n"),
        ("geometry/bad.py", "import riemvae.networks.mlp as m\n"),
        ("geometry/bad.py", "from ..networks import MLP\n"),
        ("geometry/deep/bad.py", "from ...networks import MLP\n"),
        ("geometry/__init__.py", "from ..networks import MLP\n"),
        ("geometry/bad.py", "from riemvae import zoo\n"),
        ("geometry/bad.py", "from .. import zoo\n"),
        ("geometry/bad.py", "def f():\n    from riemvae.inference.fit import fit\n"),
        ("geometry/bad.py", "if TYPE_CHECKING:\n    import riemvae.data\n"),
        ("geometry/bad.py", "import importlib\nm = importlib.import_module('riemvae.zoo')\n"),
        ("geometry/bad.py", "import pyro.distributions as dist\n"),
        ("geometry/bad.py", "import riemvae as rv\n"),
        ("inference/bad.py", "from riemvae import VAE\n"),
        ("inference/bad.py", "from riemvae.data import batches\n"),
        ("guides/bad.py", "from riemvae.inference import log_weights\n"),
        ("priors/bad.py", "from riemvae.likelihoods import Bernoulli\n"),
        ("likelihoods/bad.py", "from ..priors import VampPrior\n"),
        ("autoencoder.py", "from . import zoo\n"),
        ("_checks.py", "from riemvae.geometry import Metric\n"),
        ("cellar/bad.py", "import torch\n"),
    ],
)
def test_a_planted_bad_import_is_found(tmp_path, name, source):
    wrong = wrong_arrows(plant(tmp_path, {name: source}))
    assert len(wrong) == 1
    assert wrong[0].startswith(str(Path(name)))


def test_a_circle_within_a_row_is_found(tmp_path):
    files = {"zoo/a.py": "from riemvae.augment import b\n", "augment/b.py": "from ..zoo import a\n"}
    (wrong,) = wrong_arrows(plant(tmp_path, files))
    assert wrong.startswith("circle: ")


def test_good_imports_pass(tmp_path):
    files = {
        "__init__.py": "from riemvae.zoo import build\nfrom .guides import GaussianGuide\n",
        "_checks.py": "import torch\n",
        "geometry/metric.py": "import geoopt\nfrom .._checks import check_count\nfrom . import linalg\n",
        "guides/deep/gaussian.py": "import pyro\nfrom ... import geometry\nfrom ..frames import Frame\n",
        "zoo/recipes.py": "from riemvae import data, inference\nfrom riemvae.autoencoder import VAE\n",
        "cli.py": "def main():\n    from riemvae.zoo import build\n",
    }
    assert wrong_arrows(plant(tmp_path, files)) == []
