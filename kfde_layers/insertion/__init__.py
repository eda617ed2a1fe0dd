"""Put attention blocks into a network that already exists."""

from kfde_layers.insertion.attaching import insert, remove
from kfde_layers.insertion.points import Point, insertion_points

__all__ = ["Point", "insert", "insertion_points", "remove"]
