"""Other authors' systems for BreakHis, as timm models. Importing this package registers them.

`bhcnet`, `breastnet`, `ahonet`, `cnn_lstm` and `glnet` hold one system each. The docstring of its class says how far it
is known to be the published one: "exact", "a reconstruction" or "in the spirit of" the paper. `gauss_error` is BHCNet's
schedule of the learning rate. `network` and `trunk` are what the systems share, and `checks` refuses wrong arguments.
"""

from breakhis.baselines import ahonet, bhcnet, breastnet, cnn_lstm, glnet

__all__ = ["ahonet", "bhcnet", "breastnet", "cnn_lstm", "glnet"]
