# `make help` lists the targets.

GO         ?= go
# For every go test line: -json for machines, -v to see each test.
TESTFLAGS  ?=
# For every fuzz test in test-all. A count, because a time limit that runs out
# on a busy machine looks like a failure.
FUZZTIME   ?= 2000x
# Seeds for each size in simulate.
SIMULATE   ?= 10000
# Minutes for stress.
MINUTES    ?= 1
STATICCHECK = honnef.co/go/tools/cmd/staticcheck@v0.8.2
TARGETS     = linux/amd64 linux/arm64 linux/arm linux/riscv64 darwin/arm64 windows/amd64
# Packages with assembly, or with arithmetic on top of it.
NUMERIC     = ./internal/kernel/... ./tensor/... ./nn/... ./optim/... ./robust/... ./tensordb/... ./function/... ./internal/samebits

.PHONY: help build module test test-all simulate stress bench bench-db lint release generate clean
.DEFAULT_GOAL := help

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

build: ## build ./spirt
	CGO_ENABLED=0 $(GO) build -trimpath -tags lambda.norpc -o spirt ./cmd/spirt

module: ## build ./spirt.so, the module for Redis and Valkey; needs gcc
	CGO_ENABLED=1 $(GO) build -trimpath -buildmode=c-shared -tags redismodule -o spirt.so ./tensordb/redismodule
	@chmod +x spirt.so && rm -f spirt.h

test: ## test everything that needs only Go
	@$(GO) test $(TESTFLAGS) ./...

test-all: ## test with the race detector, whole runs, no assembly, short fuzzing
	@$(GO) test $(TESTFLAGS) -race -tags integration -timeout 15m ./...
	@$(GO) test $(TESTFLAGS) -tags noasm $(NUMERIC)
	@$(MAKE) --no-print-directory simulate SIMULATE=1000
	@grep -rlE '^func Fuzz' --include='*_test.go' . | sort | while read -r file; do \
		for fuzz in $$(sed -n 's/^func \(Fuzz[A-Za-z0-9_]*\).*/\1/p' $$file); do \
			$(GO) test $(TESTFLAGS) -run '^$$' -fuzz "^$$fuzz\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 10x $$(dirname $$file) || exit 1; \
		done || exit 1; \
	done

simulate: build ## simulate SIMULATE seeds for each of three sizes
	./spirt simulate --peers 4 --byzantine 1 --seeds $(SIMULATE)
	./spirt simulate --peers 7 --byzantine 2 --seeds $(SIMULATE)
	./spirt simulate --peers 10 --byzantine 3 --seeds $(SIMULATE)

stress: ## strain the module for MINUTES, with saves, replicas and kills
	STRESS_MINUTES=$(MINUTES) $(GO) test $(TESTFLAGS) -tags integration -count 1 -timeout 60m -run TestStress -v ./tensordb

bench-db: module ## measure the tensor database beside Redis
	$(GO) run ./bench/db

bench: ## measure against PyTorch; writes bench/results/
	@bench/run.sh

lint: ## gofmt, go vet, staticcheck
	@unformatted=$$(gofmt -l .); test -z "$$unformatted" || { echo "run gofmt -w on:" $$unformatted >&2; exit 1; }
	$(GO) vet ./...
	$(GO) vet -tags integration,noasm ./...
	CGO_ENABLED=1 $(GO) vet -tags redismodule ./tensordb/redismodule
	$(GO) run $(STATICCHECK) -tags integration ./...

release: ## build for every system into dist/
	@rm -rf dist && mkdir dist
	@set -e; for target in $(TARGETS); do \
		os=$${target%/*}; arch=$${target#*/}; exe=; test $$os != windows || exe=.exe; \
		for cmd in spirt spirt-function; do \
			echo "dist/$$cmd-$$os-$$arch$$exe"; \
			CGO_ENABLED=0 GOOS=$$os GOARCH=$$arch GOARM=7 $(GO) build -trimpath -tags lambda.norpc -ldflags '-s -w' -o dist/$$cmd-$$os-$$arch$$exe ./cmd/$$cmd; \
		done; \
	done
	@cd dist && sha256sum * > SHA256SUMS

generate: ## write the assembly again
	$(GO) generate ./...

clean: ## remove what the other targets wrote
	rm -rf spirt spirt.so dist bench/results
	$(GO) clean -testcache
