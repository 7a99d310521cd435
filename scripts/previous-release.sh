#!/usr/bin/env bash
# Keeps the source of a release as the fixture of the upgrade test:
#
#   scripts/previous-release.sh v1.2.3
#
# writes control/e2e/testdata/previous/v1.2.3.tar.gz, with what both programs
# are built from and nothing else, and removes the archive of the release
# before. The same commit gives the same bytes.
set -euo pipefail
cd "$(dirname "$0")/.."
commit=${1:?usage: $0 COMMIT}
name=$(git describe --tags --always --abbrev=7 "$commit")
to=$PWD/control/e2e/testdata/previous

tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
git archive "$commit" | tar -x -C "$tree"
cd "$tree"
{
  echo go.mod
  echo go.sum
  CGO_ENABLED=0 go list -deps -f '{{if .Module}}{{if .Module.Main}}{{$dir := .Dir}}{{range .GoFiles}}{{$dir}}/{{.}}
{{end}}{{range .EmbedFiles}}{{$dir}}/{{.}}
{{end}}{{end}}{{end}}' ./relay/cmd/relais-relay ./control/cmd/relais-control | sed "s#^$tree/##" | grep .
} | LC_ALL=C sort -u > "$tree/.list"
mkdir -p "$to"
rm -f "$to"/*.tar.gz
tar --mtime="$(git -C "$OLDPWD" log -1 --format=@%ct "$commit")" --owner=0 --group=0 --numeric-owner --mode=0644 -cf - -T "$tree/.list" | gzip -9n > "$to/$name.tar.gz"
ls -l "$to/$name.tar.gz"
