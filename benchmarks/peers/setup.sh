#!/usr/bin/env bash
# Makes the environments of the systems that maxsep is compared with, under the folder given:
#
#     PY312=python3.12 PY311=python3.11 benchmarks/peers/setup.sh peers
#     python -m maxsep.bench train --peers peers
#
# PY312 and PY311 name the interpreters.
set -euo pipefail

[ $# = 1 ] || { echo "error: usage: setup.sh FOLDER" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
folder=$(cd "$1" && pwd)

environment() { # NAME WANTED-VERSION INTERPRETER
  local found
  found=$("$3" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || echo "none")
  [ "$found" = "$2" ] || { echo "error: $3: got Python $found; takes $2 (set PY${2/./})" >&2; exit 2; }
  echo "$1: $folder/$1"
  "$3" -m venv "$folder/$1"
  "$folder/$1/bin/python" -m pip install --quiet --disable-pip-version-check -r "$here/$1.txt"
}

environment maxtext 3.12 "${PY312:-python3.12}"
environment transformers 3.11 "${PY311:-python3.11}"
