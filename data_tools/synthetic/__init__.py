"""Synthetic persons with known identity, parts, camera and boxes."""

from data_tools.synthetic.attributes import ATTRIBUTES
from data_tools.synthetic.camera import NUM_CAMERAS
from data_tools.synthetic.canvas import PARTS
from data_tools.synthetic.dataset import dataset_rule, write_dataset
from data_tools.synthetic.scene import Person, Scene, draw_background, draw_person, draw_scene

__all__ = [
    "ATTRIBUTES",
    "NUM_CAMERAS",
    "PARTS",
    "Person",
    "Scene",
    "dataset_rule",
    "draw_background",
    "draw_person",
    "draw_scene",
    "write_dataset",
]
