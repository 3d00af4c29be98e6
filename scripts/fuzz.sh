#!/bin/bash
# Fuzz every target of some packages for a while, as many targets at a time as there are CPUs. usage: fuzz.sh TIME PACKAGE...
#
# `go test -fuzz` would link a package's program anew for each of its targets, and fuzz nothing meanwhile: here each package is
# built once, and fuzzed while the next one is built.
set -euo pipefail

if [ "${1:-}" = --run ]; then # one target, for what follows
	time=$2 program=$3 package=$4 dir=$5 target=$6
	cd "$dir" # testdata is there
	# Go before 1.27 now and then takes it for a failure that the time is over, go.dev/issue/75804, and then says no more than this.
	mistake="^--- FAIL: $target \([0-9.]+s\) context deadline exceeded FAIL\$"
	for _ in 1 2 3; do
		status=0
		"$program" -test.run '^$' -test.fuzz "^$target\$" -test.fuzztime "$time" -test.fuzzminimizetime 20x -test.parallel 1 \
			-test.fuzzcachedir "$(go env GOCACHE)/fuzz/$package" >"$program.$target" 2>&1 || status=$?
		said=$(grep -v '^fuzz: elapsed' "$program.$target" | xargs -d '\n') || true
		[[ $status != 0 && $(tr -s ' ' <<<"$said") =~ $mistake ]] || break
	done
	echo "$package $target: $(grep -o 'execs: [0-9]*' "$program.$target" | tail -n 1)"
	[ $status = 0 ] && exit
	cat "$program.$target"
	exit 255 # xargs stops
fi

cd "$(dirname "$0")/.."
time=$1
shift
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
build() {
	local package dir program
	while read -r package dir; do
		grep -qs '^func Fuzz' "$dir"/*_test.go || continue
		program=$out/${package//\//_}
		go test -c -fuzz . -o "$program" "$package"
		(cd "$dir" && "$program" -test.list '^Fuzz') | sed "s|^|$program $package $dir |"
	done
}
go list -f '{{.ImportPath}} {{.Dir}}' "$@" | build | xargs -L 1 -P "$(nproc)" "$PWD/scripts/fuzz.sh" --run "$time"
