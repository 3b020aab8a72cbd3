"""`make bench-serving`: what a prediction costs here and in other servers, and what is held to it.

* models: the three models, made here, as bundles and as the ONNX files that every server serves;
* loadgen.c, load: the client, and its figures;
* venvs, servers/: an environment for each server, and the peers' programs;
* cast: servers as processes, and whether they all say the same;
* scene: a control plane with its broker, and real agents before it;
* process: CPU and memory of a tree of processes;
* speed, paced, batch, inside, memory, starts, updates, swaps, soak: what is measured, each on its own;
* figures, bars: what it comes to, and what it is held to;
* page, plot: docs/benchmarks/serving.md and its pictures.
"""
