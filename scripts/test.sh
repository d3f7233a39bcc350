#!/usr/bin/env bash
# Set up .venv, then run the tests, two files at a time; arguments go to pytest: bash scripts/test.sh -k resume
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup requirements.txt tests/requirements.txt
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec .venv/bin/python -m pytest tests -n 2 --dist loadfile "$@"
