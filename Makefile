# make            build bin/sluiced, bin/sluicectl, bin/sluice-fetch and bin/sluice-agent
# make test       install what is missing, then all checks and tests, those in real guests too
# make demo       pass files to and from a real guest and compare them
# make pgo        record anew what the compiler optimises sluiced by, cmd/sluiced/default.pgo, which is committed
# make guest SHARE=DIR [GUEST=uml]    a shell in a guest with DIR at /mnt
# make guest SLUICED=PROGRAM [SHARE=DIR] [ARGS="OPTION..."]    the same with a server of your own, and with options for it
# make bench      compare sluiced with other servers, ten minutes; build/bench/report.md says what came of it (bench/README.md)
# make bench-guest    the same in a guest, with fio, git, tar and others; build/bench-guest/report.md says what came of it
SHELL := /bin/bash
# Where scripts/go.sh puts Go on a machine without one.
export PATH := $(PATH):$(CURDIR)/build/go/bin
GO ?= go
GUEST ?= qemu
SHARE ?=
SLUICED ?= bin/sluiced
ARGS ?=
# Options of the benchmark, as in BENCH="-rounds 10 -conditions p16"; `go run ./bench -help` lists them.
BENCH ?=
STATIC := -tags osusergo,netgo -ldflags '-linkmode external -extldflags "-static"'
FUZZ ?= ./...
FUZZTIME ?= 60s
# The tests with guests, and those of escapes, serve trees of several owners, which takes root.
SUDO := $(if $(filter-out 0,$(shell id -u)),sudo -E env PATH=$(PATH))
GUEST_TESTS := ./test/...

all: build

# One static file. libseccomp is a C library, so this takes a C compiler; `make build-nocgo` does without both, and without seccomp.
# The compiler reads cmd/sluiced/default.pgo by itself (-pgo=auto), and compiles all that sluiced is made of anew when that changes.
build: bin/sluiced bin/sluicectl bin/sluice-fetch bin/sluice-agent
bin/sluiced: FORCE
	@pkg-config --exists libseccomp || { echo "libseccomp is missing: run 'make setup', or 'make build-nocgo' for a sluiced without seccomp" >&2; exit 1; }
	CGO_ENABLED=1 $(GO) build -trimpath $(STATIC) -o $@ ./cmd/sluiced

bin/sluicectl: FORCE
	CGO_ENABLED=0 $(GO) build -trimpath -o $@ ./cmd/sluicectl

# What loads images from registries; sluiced looks for it in its own directory.
bin/sluice-fetch: FORCE
	CGO_ENABLED=0 $(GO) build -trimpath -o $@ ./cmd/sluice-fetch

# For guests, which may be small.
bin/sluice-agent: FORCE
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-s -w' -o $@ ./cmd/sluice-agent

build-nocgo:
	CGO_ENABLED=0 $(GO) build -trimpath -o bin/nocgo/ ./cmd/sluiced

build-arm64:
	GOOS=linux GOARCH=arm64 CGO_ENABLED=0 $(GO) build -trimpath -o bin/arm64/ ./cmd/...

# After a change of the hot path, on a machine that does nothing else; [PGO_SECONDS=4] for each workload.
PGO_SECONDS ?= 4
pgo:
	@scripts/pgo.sh $(PGO_SECONDS)

setup:
	@scripts/setup.sh

# setup, and the servers that others have written, to compare with
peers:
	@scripts/setup.sh --peers

demo: setup build
	@$(GO) run ./internal/testguest/demo -kind $(GUEST) -daemon $(SLUICED)

guest: setup build
	@$(GO) run ./internal/testguest/shell -kind $(GUEST) -daemon $(SLUICED) -share "$(SHARE)" -- $(ARGS)

# As root if possible: sluiced then has its usual sandbox, and system calls can be counted.
bench: peers build
	$(GO) run -exec '$(SUDO)' ./bench $(BENCH)

# Two minutes, for a change that is under way; the intervals say what it has shown.
bench-quick: peers build
	$(GO) run -exec '$(SUDO)' ./bench -slice 60ms -conditions p16,s1,c1 $(BENCH)

test: setup check

check: lint lint-nocgo unit test-guest

# In a fresh clone most of the time is compiling. These are the flags of the programs that the tests build, so that what the checks have
# compiled need not be compiled again; with the profile of cmd/sluiced it would be, so only the daemon of test-guest has that.
FLAGS = $(shell $(GO) env GOFLAGS) -trimpath -tags=osusergo,netgo
lint lint-nocgo unit fuzz: export GOFLAGS = $(FLAGS) -pgo=off
test-guest: export GOFLAGS = $(FLAGS)

lint:
	@files=$$($(GO) tool gofumpt -l .) && [ -z "$$files" ] || { echo "not formatted, run 'go tool gofumpt -w .':" $$files; exit 1; }
	$(GO) vet ./...
	cd examples && $(GO) vet ./...
	$(GO) tool staticcheck ./...
	staticcheck=$$($(GO) tool -n staticcheck) && cd examples && $$staticcheck ./...
	@dead=$$($(GO) tool deadcode -test ./...) && [ -z "$$dead" ] || { echo "dead code:"; echo "$$dead"; exit 1; }

# Without cgo, and for another machine: no file is for only one of these.
lint-nocgo:
	GOOS=linux GOARCH=arm64 CGO_ENABLED=0 $(GO) build -o /dev/null ./cmd/...
	GOOS=linux GOARCH=arm64 CGO_ENABLED=0 $(GO) vet ./...

# lint has vetted the tests.
unit:
	$(GO) test -race -vet=off -timeout 10m $$($(GO) list ./... | grep -v /test/)
	cd examples && $(GO) test -race -vet=off -timeout 10m ./...

# Guests boot and wait: more of them than there are CPUs keep these busy.
test-guest:
	$(GO) test -race -vet=off -count=1 -timeout 15m -parallel $$((2 * $$(nproc))) -exec '$(SUDO)' $(GUEST_TESTS)

# The same in every sandbox, as root and as an ordinary user.
SURROUNDINGS := root+namespace root+chroot user+namespace user+none
test-guest-sandboxes: setup
	@for s in $(SURROUNDINGS); do echo "== $$s"; SLUICE_SURROUNDINGS=$$s $(GO) test -count=1 -timeout 30m -exec '$(SUDO)' $(GUEST_TESTS) || exit 1; done

# Which of the daemon's own rules these tests need: after a change of the rules, or of what the daemon calls.
seccomp-seen: setup
	@dir=$$(mktemp -d) && chmod 777 $$dir && trap "rm -rf $$dir" EXIT && export SLUICE_SECCOMP_TRACE=$$dir && \
	$(GO) test -count=1 -timeout 30m -exec '$(SUDO)' ./test/escape && \
	for s in $(SURROUNDINGS); do SLUICE_SURROUNDINGS=$$s $(GO) test -count=1 -timeout 30m -exec '$(SUDO)' ./test/guest || exit 1; done && \
	$(GO) run ./seccomp/internal/seen $$dir seccomp/testdata/seen-$$($(GO) env GOARCH).txt

# The same with the full sizes: 1 GiB files, all of Go's source tree, a million inodes, 10,000 opens, 1,000 mounts, 20 reboots, longer races; and in each kind of
# guest what test-guest does in User-Mode Linux alone: bundles, read-only and grafted shares, submounts, --no-open, what the host sees,
# each cache policy of files that are replaced, and each end of a machine.
test-guest-full:
	@scripts/setup.sh --full
	SLUICE_FULL=1 $(GO) test -count=1 -timeout 120m -exec '$(SUDO)' -v $(GUEST_TESTS)

fuzz:
	@scripts/fuzz.sh $(FUZZTIME) $(FUZZ)

clean:
	rm -rf bin build

# The benchmark's second level, in a guest; build/bench-guest/report.md says what came of it.
setup-bench:
	@scripts/setup.sh --bench

bench-guest: setup-bench build
	$(GO) run -exec '$(SUDO)' ./bench/guest $(BENCH)

FORCE:
.PHONY: all bench bench-guest bench-quick setup-bench build pgo build-nocgo build-arm64 setup peers demo guest test check lint lint-nocgo unit test-guest test-guest-sandboxes test-guest-full seccomp-seen fuzz clean FORCE
