"""GPTQModel's own loader."""

import importlib.metadata

import load_transformers
from gptqmodel import BACKEND, GPTQModel
from transformers import AutoConfig

VERSION = f"gptqmodel {importlib.metadata.version('gptqmodel')}"
FORK = False


def modes(_):
    """The kernel that GPTQModel chooses, and the one that de-quantizes as the format says."""
    return ["", "torch"]


class Client(load_transformers.Client):
    """An export on the CPU, loaded by GPTQModel, with its choice of a kernel or a named one."""

    def __init__(self, folder, mode):
        # Left to itself, GPTQModel rounds everything to bfloat16 on the CPU.
        dtype = AutoConfig.from_pretrained(folder).dtype
        model = GPTQModel.load(folder, device="cpu", backend=mode or BACKEND.AUTO, dtype=dtype)
        self.model = model.model.eval()
        self.dtype = str(self.model.dtype).removeprefix("torch.")
