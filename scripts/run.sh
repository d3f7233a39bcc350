#!/usr/bin/env bash
# Set up .venv, then run tgdpo.py; without arguments on three words, 15 seconds on a laptop.
#   bash scripts/run.sh                      bash scripts/run.sh --alpha 0.5                      bash scripts/run.sh run.yaml
here=$PWD
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup requirements.txt
script=$PWD/tgdpo.py python=$PWD/.venv/bin/python
cd "$here"   # so that the paths on the command line mean what they say
exec "$python" "$script" "$@"
