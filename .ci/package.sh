#!/usr/bin/env bash
# Build the wheel and the sdist into dist/, and step once with each installed where nothing else is but what it requires.
# Usage: .ci/package.sh PYTHON, an interpreter that has hatchling.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$1

rm -rf dist
"$python" -m hatchling build -d dist >/dev/null
bare=$(mktemp -d)
trap 'rm -rf "$bare"' EXIT
"$python" -m venv "$bare/env"
# The backend for the sdist comes first, since constraints do not reach isolated builds.
"$bare/env/bin/python" -m pip --disable-pip-version-check install --quiet -c constraints.txt hatchling
for file in dist/*.whl dist/*.tar.gz; do
    "$bare/env/bin/python" -m pip --disable-pip-version-check install --quiet --no-build-isolation --force-reinstall -c constraints.txt "$file"
    (cd "$bare" && env/bin/python -I -W error - "$(basename "$file")" <<'END'
import sys
from importlib.metadata import version
from importlib.resources import files

import numpy as np
import optimisers as opt

assert version("optimisers") == opt.__version__
assert files("optimisers").joinpath("py.typed").is_file()
model = {"w": np.ones((3, 2)), "b": np.zeros(3)}
state, new = opt.update(opt.setup(opt.AdamW(), model), model, model)
assert not np.array_equal(new["w"], model["w"])
assert "torch" not in sys.modules
assert "site-packages" in opt.__file__
print(f"optimisers {opt.__version__} installs, imports and steps: {sys.argv[1]}")
END
    )
done
