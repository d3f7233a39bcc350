#!/usr/bin/env bash
# Set up .venv, then run the tests; arguments go to pytest, such as: bash scripts/test.sh -k resume
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup requirements.txt tests/requirements.txt
exec .venv/bin/python -m pytest tests "$@"
