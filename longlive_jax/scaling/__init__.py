"""What a training step of the transformer takes on devices that are not here, by formula.

`chips` has the devices, `traffic` and `memory` what a device sends and holds, `roofline` the least
time of that, `plans` the meshes of docs/scale.md.
"""
