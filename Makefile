# Two commands do everything on a fresh Debian 12 machine, as root:
#   make attach IMAGE=disk.vhdx    install what is missing, build, attach, show the partitions
#   make test                      install what the tests need, run all of them
# Both may be repeated.  `make help` lists the rest.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
IMAGE ?=
SAMPLE := sample.vhdx
CACHE_DIR := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/virtmount

# What running needs, what testing needs on top (Debian package names).
RUN_PACKAGES := gcc libc6-dev python3-dev python3-venv liburing-dev libssl-dev fuse3 libfuse3-3 kmod util-linux fdisk
SAMPLE_PACKAGES := qemu-utils e2fsprogs
TEST_PACKAGES := $(SAMPLE_PACKAGES) qemu-system-x86 seabios busybox-static cpio fio xfsprogs gdisk \
	zstd xz-utils procps psmisc ca-certificates libvhdi-utils p7zip-full 7zip ewf-tools

.PHONY: help build attach test test-host test-vm lint bench fetch-kernels clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 18

# Install the Debian packages that are missing; says nothing when there are none.
define install
@missing=$$(for p in $(1); do dpkg-query -W -f '$${db:Status-Status}' $$p 2>/dev/null \
	| grep -q '^installed$$' || echo $$p; done); \
if [ -n "$$missing" ]; then echo "installing:" $$missing >&2; \
	{ apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y \
	--no-install-recommends $$missing; } >&2; fi
endef

.PHONY: run-packages test-packages
run-packages:
	$(call install,$(RUN_PACKAGES))

test-packages:
	$(call install,$(RUN_PACKAGES) $(TEST_PACKAGES))

$(VENV)/.run: pyproject.toml setup.py native/build_engine.py $(wildcard native/*.c native/*.h) | run-packages
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -q --disable-pip-version-check -e . >&2
	@touch $@

$(VENV)/.test: $(VENV)/.run | test-packages
	@$(BIN)/pip install -q --disable-pip-version-check -e '.[test]' >&2
	@touch $@

build: $(VENV)/.run  ## install what is missing and build the C engine

attach: build  ## attach IMAGE (or a sample) and show its partitions
	@image='$(IMAGE)'; if [ -z "$$image" ]; then $(MAKE) -s $(SAMPLE) && image=$(SAMPLE); fi; \
	name=$$($(BIN)/virtmount list -n -o NAME,IMAGE | while read -r name path; do \
		[ "$$path" != "$$(realpath -- "$$image")" ] || echo "$$name"; done); \
	if [ -n "$$name" ]; then device=/dev/$$name; else device=$$($(BIN)/virtmount attach -- "$$image") || exit; fi; \
	echo "$$device"; lsblk "$$(readlink -f "$$device")"; \
	echo "detach with: $(BIN)/virtmount detach $$device" >&2

# A dynamic VHDX with a partition table and an ext4 file system, for trying things out.
$(SAMPLE):
	$(call install,$(SAMPLE_PACKAGES) $(RUN_PACKAGES))
	@echo "making $@" >&2
	@set -e; rm -f $@.raw; truncate -s 64M $@.raw; \
	echo 'label: gpt\nstart=1MiB, name=sample' | sfdisk -q $@.raw; \
	truncate -s 62M $@.part; mkfs.ext4 -q -L sample $@.part; \
	dd if=$@.part of=$@.raw bs=1M seek=1 conv=notrunc,sparse status=none; rm $@.part; \
	qemu-img convert -O vhdx $@.raw $@; rm $@.raw

test: $(VENV)/.test fetch-kernels lint test-host test-vm  ## install what tests need and run all of them

lint: $(VENV)/.test  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fetch-kernels: $(VENV)/.test  ## fetch the kernels for device tests into the cache
	@$(BIN)/python -m tests.vm --fetch

test-host: $(VENV)/.test  ## everything that runs on this machine's kernel
	$(BIN)/pytest -q -n auto --dist loadfile -m "not device and not alone" tests
	$(BIN)/pytest -q -m "device or alone" tests

# Device tests under the oldest and the newest supported kernel.  An emulated machine with two
# CPUs panics or hangs by itself now and then; its second try has one.
test-vm: $(VENV)/.test  ## ublk device tests in virtual machines
	@for kernel in oldest newest; do for cpus in 2 1; do \
		$(BIN)/python -m tests.vm --kernel $$kernel --cpus $$cpus --memory 4G --timeout 1500 -- \
			$(BIN)/python -m pytest -q -p no:cacheprovider tests/device; status=$$?; \
		[ $$status -eq 125 ] || break; echo "the emulated machine died; once more" >&2; done; \
	[ $$status -eq 0 ] || exit $$status; done

bench: $(VENV)/.test  ## measure against qemu-nbd and losetup in a virtual machine
	$(BIN)/python -m benchmarks.compare

clean:  ## remove what was built (not the kernel cache)
	rm -rf $(VENV) build *.egg-info virtmount/_engine* virtmount/*.so $(SAMPLE)
