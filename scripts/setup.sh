# Sourced by run.sh and test.sh: makes .venv beside tgdpo.py (once) and installs the requirements files given to `setup`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

setup() {
    local python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "$python is $("$python" --version 2>&1); Python 3.10 or newer is needed: PYTHON=python3.12 bash $0" >&2; exit 2; }
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    local file arguments=()
    for file in "$@"; do arguments+=(-r "$file"); done
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "${arguments[@]}"
}
