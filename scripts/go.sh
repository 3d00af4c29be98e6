#!/usr/bin/env bash
# Sees to a go command that can build this module. Debian 12 has none: then one of its backports is unpacked into build/go, which fetches
# the toolchain that go.mod asks for by itself, as every Go since 1.21 does. Nothing is installed.
set -euo pipefail
cd "$(dirname "$0")/.."
fail() { echo "go: $*" >&2; exit 1; }
. scripts/debian.sh

backport=1.23
go=$(command -v go || true)
need=$(sed -n 's/^go \([0-9]*\.[0-9]*\).*/\1/p' go.mod)
[ -z "$(go env GOTOOLCHAIN 2>/dev/null | grep -x local)" ] || least=$need
if [ -n "$go" ]; then
  have=$(GOTOOLCHAIN=local "$go" env GOVERSION) || fail "'go env GOVERSION' failed"
  have=${have#go}
  printf '%s\n' "${least:-1.21}" "${have%%[^0-9.]*}" | sort -V -C && exit 0
  fail "Go ${least:-1.21} or later is needed, $go is $have; take it out of PATH, or see https://go.dev/doc/install"
fi
command -v apt-get >/dev/null || fail "Go $need or later is needed and there is no go command; see https://go.dev/doc/install"
echo "go: fetching Go from Debian's backports into build/go"
mkdir -p build
tmp=$(mktemp -d build/go.XXXXXX)
trap 'rm -rf "$tmp"' EXIT
open_archive "$PWD/$tmp/apt" bookworm-backports
unpack "$tmp/root" bookworm-backports "golang-$backport-go" "golang-$backport-src"
ln -s "../usr/lib/go-$backport/bin/go" "$tmp/root/go"
mkdir "$tmp/root/bin"
mv "$tmp/root/go" "$tmp/root/bin/go"
rm -rf build/go
mv "$tmp/root" build/go
build/go/bin/go version >/dev/null || fail "build/go/bin/go does not run"
