"""Benchmarks of the layers and models. Run the commands from the root of a checkout, `python -m benchmarks.<name>`.

Commands: `bench_layers` and `bench_models` measure time and memory, `memory` measures memory alone, `gpu_check` does
everything that needs a GPU, `report` turns results into a page.

Parts: `candidates` makes the modules to measure, `textbook` has the equations in plain PyTorch, `calls` runs a module
forward and backward, `timing` times calls, `agreement` compares results, `device_checks` checks the layers on a device.
`schema` describes a result file, `arguments` and `common` hold what the commands share,
`targets` judges results, `plots` draws them.
"""
