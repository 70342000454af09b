#!/usr/bin/env bash
# Runs the tests, on a fresh machine too. Arguments go to pytest: bash launch/test.sh tests/test_llm.py -k cache
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/venv.sh "[dev]"
exec .venv/bin/python -m pytest -n 2 -m "not slow and not peer and not gpu" "$@"
