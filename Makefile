# For people. Each target does all its own set-up; `make` alone says what there is.
.PHONY: help setup demo cluster-demo test lint bench images clean
.DEFAULT_GOAL := help

help: ## say what there is
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 22

setup: ## install what is missing; leaves a working .venv/bin/chrek
	@tools/setup

demo: ## a real inference server: cold start, checkpoint, kill, restore elsewhere
	@examples/demo/run

cluster-demo: ## the same on a real one-node Kubernetes: helm, a Job, a Pod
	@examples/demo/run-cluster

test: ## style, types, layers and all tests
	@tools/test

lint: ## style, types and layers only
	@tools/setup
	@tools/lint

bench: ## ChReK beside stock CRIU: a table and a plot in benchmarks/
	@tools/setup test
	@.venv/bin/python -m pip install -q --disable-pip-version-check -r tools/requirements-bench.txt
	@.venv/bin/python benchmarks/bench.py

images: ## build the agent's image for Kubernetes (docker, podman, nerdctl or buildah)
	@tools/images

clean: ## remove all that was made: containers, mounts, caches, the virtual environment
	@tools/clean
