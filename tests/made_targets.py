"""A target definition for tests of headers, masks and spaces: of nothing, but valid."""

from dpal.targets.header import TargetDefinition

GRID = (8, 4)  # patches of a base view
DEFINITION = TargetDefinition(
    teacher={"name": "vit", "weights": "aa"},
    views={"seed": 0},
    grid=GRID,
    composite_grid=(8, 8),
    codec="int8",
    manifest="mm",
    backgrounds="bb",
    calibration_images=16,
)
