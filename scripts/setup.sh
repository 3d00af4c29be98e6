#!/usr/bin/env bash
# Installs what the build and the tests need on Debian 12: the packages of packages.txt, and the guest kit in build/guest-kit.
# Does nothing, quickly, where everything is there. --bench adds what the benchmark in a guest needs: packages-bench.txt and the peers;
# --full what `make test-guest-full` needs: packages-full.txt.
set -euo pipefail
cd "$(dirname "$0")/.."
fail() { echo "setup: $*" >&2; exit 1; }

scripts/go.sh
export PATH=$PATH:$PWD/build/go/bin
[ "$(go env GOARCH)" = amd64 ] || fail "the guests are amd64 machines; this one is $(go env GOARCH)"
command -v apt-get dpkg-query >/dev/null || fail "this is not Debian (no apt-get); install by hand what scripts/packages*.txt list"

lists=(scripts/packages.txt)
if [ "${1:-}" = --full ]; then
  lists+=(scripts/packages-full.txt)
  shift
elif [ "${1:-}" = --bench ]; then
  lists+=(scripts/packages-bench.txt)
  set -- --peers
fi
missing=()
while read -r package; do
  [ "$(dpkg-query -Wf '${db:Status-Abbrev}' "$package" 2>/dev/null)" = 'ii ' ] || missing+=("$package")
done < <(grep -hv '^#' "${lists[@]}")
if [ ${#missing[@]} -gt 0 ]; then
  root=()
  if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || fail "become root or install sudo, to install: ${missing[*]}"
    root=(sudo)
  fi
  echo "setup: installing ${missing[*]}"
  "${root[@]}" apt-get update -qq || fail "'apt-get update' failed"
  "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${missing[@]}" >/dev/null ||
    fail "apt-get could not install: ${missing[*]}"
fi
exec scripts/guest-kit.sh "$@"
