"""GPTQModel's own loader."""

import importlib.metadata

import load_transformers
from gptqmodel import BACKEND, GPTQModel
from transformers import AutoConfig

VERSION = f"gptqmodel {importlib.metadata.version('gptqmodel')}"
TARGET = "gptqmodel"
FORK = False


# Exports of SmolLM2 that are loaded: one of each format, since on one thread each takes minutes.
LARGE = [("awq", "W4 g64"), ("gptq", "W4 g64 sym")]


def modes(case):
    """The kernel that GPTQModel chooses: for 4 bits one for CPUs, so that the one that de-quantizes is asked for, too."""
    if case["format"] == "compressed-tensors":
        return []
    if case["model"] != "tiny":
        return [""] if (case["format"], case["scheme"]) in LARGE else []
    return ["", "torch"] if case["scheme"].startswith("W4") else [""]


class Client(load_transformers.Client):
    """An export on the CPU, loaded by GPTQModel, with its choice of a kernel or a named one."""

    def __init__(self, folder, mode):
        # Left to itself, GPTQModel rounds everything to bfloat16 on the CPU.
        dtype = AutoConfig.from_pretrained(folder).dtype
        model = GPTQModel.load(folder, device="cpu", backend=mode or BACKEND.AUTO, dtype=dtype)
        self.model = model.model.eval()
        self.dtype = str(self.model.dtype).removeprefix("torch.")
