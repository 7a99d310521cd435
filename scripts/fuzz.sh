#!/usr/bin/env bash
# Runs every fuzz target of the tree for the given time each (default 20s).
# go test fuzzes one target at a time, so they are listed first.
set -euo pipefail
cd "$(dirname "$0")/.."
time=${1:-20s}
git grep -lE '^func Fuzz[A-Z]' -- '*_test.go' | while read -r file; do
  package=./$(dirname "$file")
  grep -oE '^func Fuzz[A-Za-z0-9_]+' "$file" | awk '{print $2}' | while read -r target; do
    echo "== $package $target"
    # Minimising is bounded: it would take the whole time of a target with large seeds.
    go test -run '^$' -fuzz "^$target\$" -fuzztime "$time" -fuzzminimizetime 100x "$package" </dev/null
  done
done
