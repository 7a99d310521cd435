# Targets are described in README.md. Everything runs on a fresh machine with
# Go, Node and make; packages of the distribution that tests need are installed
# by scripts/debian-peers.sh.

GO      ?= go
BIN     := bin
PKGS    := ./...
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
LDFLAGS := -s -w -X github.com/relais-mta/relais/shared/buildinfo.version=$(VERSION)

# What users run is static; only the race detector needs cgo.
export CGO_ENABLED := 0
# A test run must not depend on what an earlier one left in the cache.
TESTFLAGS := -count=1

.PHONY: all build run bench bench-deep check generate test unit e2e test-race sim sim-soak sim-mutants fuzz deb test-deb peers soak clean

all: build

build:
	@$(GO) build -trimpath -ldflags '$(LDFLAGS)' -o $(BIN)/ ./relay/cmd/relais-relay ./control/cmd/relais-control

# make run [N=200] [EXIT=1] [SIZE=10k] [DKIM=off] [LAB=open] [SEED=1]
run: build
	@$(GO) run ./scripts/run -bin $(BIN) -n '$(N)' -exit '$(EXIT)' -size '$(SIZE)' -dkim '$(DKIM)' -lab '$(LAB)' -seed '$(SEED)'

# make bench [QUICK=1] [CASES=1k,10k,100k] [SYSTEMS=postfix,haraka,null,relais,relais-dkim] [ROUNDS=3] [SECONDS=8] [DIR=…] [DOC=…] [PROFILE=…]
bench: build
	@scripts/bench-peers.sh '$(SYSTEMS)'
	@$(GO) run ./scripts/bench -bin $(BIN) -quick '$(QUICK)' -cases '$(CASES)' -systems '$(SYSTEMS)' -rounds '$(ROUNDS)' -seconds '$(SECONDS)' -dir '$(DIR)' -doc '$(DOC)' -profile '$(PROFILE)'

# make bench-deep [N=1000000] [DOMAINS=10000] [DIR=…] [PROFILES=…]
bench-deep: build
	@$(GO) run ./scripts/benchdeep -bin $(BIN) -n '$(N)' -domains '$(DOMAINS)' -dir '$(DIR)' -profiles '$(PROFILES)'

check:
	@test -z "$$(gofmt -l $$(git ls-files '*.go'))" || { echo "gofmt: $$(gofmt -l $$(git ls-files '*.go'))"; exit 1; }
	$(GO) vet $(PKGS)
	$(GO) tool staticcheck $(PKGS)
	$(GO) test ./shared/archtest
	$(GO) mod tidy -diff
	$(GO) run ./scripts/protogen -check

generate:
	$(GO) run ./scripts/protogen
	gofmt -w $$(git ls-files '*.go')

peers:
	@scripts/debian-peers.sh
	@scripts/more-peers.sh

test: peers check unit e2e test-deb

# Everything but the end-to-end tests, which start real processes and are run alone.
unit:
	$(GO) test $(TESTFLAGS) $$($(GO) list ./... | grep -v /control/e2e)

e2e: build
	$(GO) test $(TESTFLAGS) -timeout 60m ./control/e2e

# make soak [DURATION=10m] [SEED=1]: kills and power cuts at random moments, by root
DURATION ?= 10m
soak:
	@$(GO) run ./scripts/soak -duration '$(DURATION)' $(if $(SEED),-seed '$(SEED)')

# The packages in which goroutines share memory on the hot path.
test-race:
	CGO_ENABLED=1 $(GO) test -race $(TESTFLAGS) ./relay/engine ./relay/store ./relay/queue ./shared/link ./relay/agent ./relay/delivery

# Random worlds against the limits that relays share: make sim [SEEDS=2000] [SEED=1].
# A failing one prints its seed; SEEDS=1 SEED=n plays it again.
SEEDS ?= 2000
sim:
	$(GO) test $(TESTFLAGS) -timeout 60m -v -run 'TestSeeds$$' ./shared/sim -seeds $(SEEDS) -seed $(or $(SEED),1)

# A thousand relays for a day of their time: make sim-soak [SPAN=24h] [RELAYS=1000] [PACE=4] [SEED=1]
SPAN ?= 24h
RELAYS ?= 1000
PACE ?= 4
sim-soak:
	$(GO) test $(TESTFLAGS) -timeout 24h -v -run 'Test34Soak$$' ./shared/sim -soak $(SPAN) -soak-relays $(RELAYS) -soak-pace $(PACE) -soak-seed $(or $(SEED),1)

# One broken rule at a time, which the scenarios and random worlds must notice.
sim-mutants:
	$(GO) run ./scripts/mutants

FUZZTIME ?= 20s
fuzz:
	scripts/fuzz.sh $(FUZZTIME)

# Debian packages of both programs, into bin/. The same commit gives the same bytes.
deb:
	$(GO) run ./scripts/deb -out $(BIN)

# Installs, starts, upgrades and purges the packages in a Debian of their own,
# booted with systemd-nspawn. Needs root; the first run fetches that Debian.
test-deb:
	@scripts/debian-peers.sh mmdebstrap systemd-container lintian procps
	$(GO) vet -tags deb ./scripts/deb
	$(GO) test $(TESTFLAGS) -tags deb -timeout 20m -v -run TestPackages ./scripts/deb

clean:
	rm -rf $(BIN)
