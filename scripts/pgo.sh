#!/bin/bash
# Record cmd/sluiced/default.pgo, by which `go build` optimises sluiced: what CPU time goes to while bench/drive keeps it busy
# with each workload in turn, many requests at a time and one. usage: pgo.sh [SECONDS]
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-4}
workloads="getattr lookup lookup-cold lookup-miss openrel read4k read128k write4k readdirplus create rename setattr statfs gitstatus"

dir=$(mktemp -d)
trap 'kill "$server" 2>/dev/null || true; rm -rf "$dir"' EXIT
server=
go build -o "$dir/drive" ./bench/drive
# What is recorded is not to depend on the profile that there is.
CGO_ENABLED=1 go build -trimpath -pgo=off -o "$dir/sluiced" ./cmd/sluiced

mkdir "$dir/share"
"$dir/sluiced" --persist --cpu-profile "$dir/profile" --log-level warn --socket-path "$dir/socket" --shared-dir "$dir/share" &
server=$!
until [ -S "$dir/socket" ]; do
	kill -0 "$server"
	sleep 0.1
done
for w in $workloads; do
	"$dir/drive" -socket "$dir/socket" -dir "$dir/share" -workload "$w" -depth 16 -wait poll -time "${seconds}s"
	"$dir/drive" -socket "$dir/socket" -dir "$dir/share" -workload "$w" -depth 1 -wait sleep -time "$((seconds / 2))s"
done
kill "$server"
wait "$server"
# Without comments, mappings and what is seldom: the compiler wants functions and lines alone.
go tool pprof -proto -nodefraction=0.0005 -output=cmd/sluiced/default.pgo "$dir/sluiced" "$dir/profile" 2>/dev/null
ls -l cmd/sluiced/default.pgo
