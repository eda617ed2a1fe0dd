import os

import torch
from hypothesis import settings

# No deadline: the first call of an operator loads it, and machines differ. In CI the same examples every time.
settings.register_profile("kfde", deadline=None, max_examples=50, derandomize=bool(os.environ.get("CI")))
settings.load_profile("kfde")

torch.set_num_threads(1)  # the tensors are tiny: a second thread would only get in the way
