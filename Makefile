# What a user runs. `make train` and `make test` need Rust and a C compiler alone; with CUDA=1 all is built for NVIDIA GPUs, too,
# which is the default where there is one and nvcc.
.PHONY: all lean train step fork verify evaluate data ask placebo study sweep report board test install dist push test-gpu test-mpi chaos fuzz check check-cuda \
	bench bench-gpu

CUDA ?= $(shell command -v nvcc >/dev/null && nvidia-smi >/dev/null 2>&1 && echo 1)
# train and step: RANKS=N trains in N processes of mpirun, for which grpo-step is built with MPI (docs/scaling.md).
MPI = $(filter-out 0 1,$(RANKS))
FEATURES = $(if $(filter 1,$(CUDA)),--features cuda) $(if $(MPI),--features mpi)
# candle reads GGUF and runs teachers, and is two fifths of the build: a first `make train` goes without, until something else built it.
LEAN = $(if $(wildcard target/release/deps/libcandle_core-*.rlib),,--no-default-features)

all:
	cargo build --release $(FEATURES)

lean:
	cargo build --release $(FEATURES) $(LEAN)

# train: RECIPE=auto or a name in pipelines/recipes/, SEED, NAME, SCORER and every number of the recipe can be set.
# step: one iteration of the run that `make train` with the same RECIPE, SEED and NAME began.
# fork: a new run from a checkpoint of an old one: RUN=old FROM=step_000100 NAME=new, and numbers that differ from there on.
# verify: trains a stretch of a run again, RUN=name FROM=step_000100 TO=step_000200, and compares every byte.
# evaluate: MODEL, a run's export, a directory or a Hub id, on held-out problems of DATA, with the numbers of its run or of RECIPE.
# data: right completions of QUESTIONS=file, N each, by MODEL, in the forms that trainers read; in OUT.
train step fork verify evaluate data: lean
	bash pipelines/$@.sh

# The control: the same run with rewards dealt to the wrong completions must not improve.
placebo: lean
	NAME=$${NAME:-placebo} SCORER="score --placebo $${SEED:-1}" bash pipelines/train.sh

# Variants of the tiny recipe from the same starts, several SEEDS each, JOBS at once, in a ranked table. sweep: numbers; study: what counts.
study sweep: lean
	bash pipelines/bench/study.sh $@

# report: a page about the runs NAME="a b", their curves over one another. board: TensorBoard on all runs.
report: lean
	$(if $(NAME),,$(error usage: make report NAME=run))target/release/evaluate $(addprefix --run runs/,$(NAME)) --recipes pipelines/recipes --html runs/$(firstword $(NAME))/report.html
board:
	@command -v tensorboard >/dev/null || { echo "board: TensorBoard is not installed; pip install tensorboard" >&2; exit 1; }
	tensorboard --logdir runs

# A conversation with MODEL, which is what the last run exported.
ask: lean
	@model=$${MODEL:-$$(ls -td runs/*/export 2>/dev/null | head -n 1)}; \
	target/release/rollout --text --model "$${model:?no run has an export yet; usage: make ask MODEL=...}"

test:
	cargo test --release $(FEATURES)

# Everything below PREFIX; DESTDIR comes before it.
PREFIX ?= /usr/local
install:
	cargo test --release $(FEATURES) --test install -- --prefix "$(abspath $(DESTDIR)$(PREFIX))"

# A tarball of what `make install` installs, for CPUs: of static binaries where musl-gcc and Rust's target for musl are.
HOST = $(shell rustc -vV | sed -n 's/^host: //p')
TARGET ?= $(if $(and $(shell command -v musl-gcc),$(shell rustup target list --installed | grep musl)),$(HOST:gnu=musl),$(HOST))
dist: PACKAGE = grpo-pipes-$(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml)-$(TARGET)
dist:
	rm -rf target/dist && cargo test --release --target $(TARGET) --test install -- --prefix target/dist/$(PACKAGE)
	tar -C target/dist -czf target/dist/$(PACKAGE).tar.gz $(PACKAGE) && ls target/dist/$(PACKAGE).tar.gz

# Uploads a run's model to the Hub: RUN=name REPO=owner/name, and ARGS of export-hf such as '--create private' or --dry-run.
push: lean
	$(if $(and $(RUN),$(REPO)),,$(error usage: make push RUN=name REPO=owner/name))target/release/export-hf runs/$(RUN)/policy --push $(REPO) --metrics runs/$(RUN)/metrics.jsonl \
		--evaluation runs/$(RUN)/eval/after.greedy.json $(ARGS)

# The GPU's tests on the GPU of this machine; without one they say so and pass.
test-gpu:
	cargo test --release --features cuda --test suite gpu:: -- --nocapture

# The tests of training in several processes, started by mpirun. They need an MPI to build with, its mpirun, and libclang.
test-mpi:
	cargo test --release --features mpi --test suite ranks::

# Kills the tiny run N times, all of it or one stage, and compares every file with those of a run that was left alone.
chaos:
	CHAOS=$${N:-100} cargo test --release --test suite killed_at_many_moments -- --nocapture

# Tries FUZZ inputs that are damaged, absurd or hostile on everything that reads files.
fuzz:
	FUZZ=$${FUZZ:-1000000} cargo test --release --test suite fuzz:: -- --nocapture

check:
	cargo fmt --check
	cargo clippy --release --all-targets $(FEATURES) -- -D warnings
	cargo clippy --release $(FEATURES) --no-default-features -- -D warnings
	RUSTDOCFLAGS='-D warnings' cargo doc --release --no-deps $(FEATURES)

# Compiles everything for GPUs, without a GPU, and links all but candle's kernels; without nvcc it first fetches one into target/.
check-cuda:
	bash tests/cuda/check.sh

# PYTHON: a Python with the packages of tests/bench/peers/requirements*.txt; a peer that it lacks is left out.
bench: all
	mkdir -p tests/bench/results
	bash pipelines/bench/run.sh >tests/bench/results/.new
	mv tests/bench/results/.new tests/bench/results/$$(date -u +%F)-cpu.md

# With CUDA=1, on a machine with a GPU; PYTHON as for bench. PARTS=speed|step|precision|learn takes some of it.
bench-gpu: all
	cargo build --release --features cuda --example bench-gpu
	mkdir -p tests/bench/results
	bash pipelines/bench/gpu.sh >tests/bench/results/.new
	mv tests/bench/results/.new tests/bench/results/$$(date -u +%F)-gpu.md
