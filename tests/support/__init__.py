"""Everything that more than one test file needs.

The rule: a helper with a second caller moves here, and test files and conftest files are never imported. This folder
imports `kfde_layers` and other libraries, and no test. `tests/test_architecture.py` checks it.

- `inputs`: random maps, and the sizes that hypothesis draws from.
- `agreement`: outputs, gradients and errors, and the reference of a module.
- `gates`: inputs none of whose gates is near its threshold.
- `cases`: every layer in each of its options.
- `networks`: networks that take a block, and how to prepare them.
- `checkpoints`: a ConvNeXt-V2 and the KFDE model with the same weights, and their files.
- `training`: small networks with a layer in them, and the plain training loop.
- `distributed_worker`, `accelerate_worker`: the code of the processes that train together.
- `kernels`: record the launches of Triton kernels, and compile them without a GPU.
- `servers`, `archives`, `runs`: a server of archives, damaged archives, and runs of the example's scripts.
- `locks`: a process that holds the lock of a folder.
- `pickles`: an object that runs code when it is loaded.
- `parts`: layers computed part by part.
- `hub`: a folder in the place of the Hugging Face Hub.
- `pages`: the code, the tables and the addresses of a page.
- `oracle`: the equations of the paper as plain loops.
- `cells`: the pytest plugin that collects the table of compatibility.
"""
