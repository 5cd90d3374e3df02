"""Makes tests/data/quantized: small checkpoints in each quantized format that qrmc imports, and what torch computes.

Run by hand; the results are in the repository. It needs torch, transformers, safetensors, numpy, `compressed-tensors`
and `gguf`, and the unpacked source archives of `autoawq` and `gptqmodel`, whose packing code is run as published:

    pip install torch transformers safetensors compressed-tensors gguf
    pip download --no-deps --no-binary :all: autoawq gptqmodel     # then unpack both
    python3 tests/scripts/quantized_fixtures.py AUTOAWQ_FOLDER GPTQMODEL_FOLDER

Integers, scales and zero points are drawn at random around the weights of a float fixture, so that no quantizer is
involved; each format's own code packs them, and each format's own code unpacks them again before the logits are
computed. Every folder holds, beside the checkpoint, `reference.safetensors`:

  input_ids [2, 16], logits [2, 16, V]   by transformers in float32 with the unpacked weights
  steps [out, in]                        `code - zero` of the matrix NAMED, as small whole floats
  scale [out, groups]                    its scales
"""
import ast
import importlib
import json
import math
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent / "data"
OUT = ROOT / "quantized"
NAMED = "model.layers.1.mlp.down_proj"
LINEAR = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
          "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


def package(name, folder):
    """A package whose own __init__ is not run, so that one module of it can be loaded alone."""
    module = types.ModuleType(name)
    module.__path__ = [str(folder)]
    sys.modules[name] = module


def autoawq(folder):
    package("awq", folder / "awq")
    for part in ("utils", "modules", "modules.linear"):
        package(f"awq.{part}", folder / "awq" / part.replace(".", "/"))
    utils = types.ModuleType("awq.utils.utils")
    utils.get_best_device = lambda: "cpu"
    sys.modules["awq.utils.utils"] = utils
    module = types.ModuleType("awq.utils.module")
    module.try_import = lambda name: (None, "not there")
    sys.modules["awq.utils.module"] = module
    gemm = importlib.import_module("awq.modules.linear.gemm")
    return gemm.WQLinear_GEMM, importlib.import_module("awq.utils.packing_utils").dequantize_gemm


def functions(path, names, scope):
    """These functions and methods of a source file, compiled as they stand there."""
    tree = ast.parse(path.read_text())
    found = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name in names]
    for n in found:
        n.returns, n.decorator_list = None, []
        for a in n.args.args + n.args.kwonlyargs:
            a.annotation = None
    exec(compile(ast.Module(found, []), str(path), "exec"), scope)
    return [scope[n] for n in names]


def gptqmodel(folder):
    import contextlib
    limits = types.SimpleNamespace(threadpool_limits=lambda n: contextlib.nullcontext())
    package("gptqmodel_utils", folder / "gptqmodel" / "utils")
    planar = importlib.import_module("gptqmodel_utils.planar_packing")
    scope = dict(vars(planar), t=torch, torch=torch, np=np, math=math, nn=torch.nn, transformers=transformers,
                 _ConvNd=torch.nn.modules.conv._ConvNd, THREADPOOLCTL=limits)
    (pack,) = functions(folder / "gptqmodel/nn_modules/qlinear/__init__.py", ["pack_original"], scope)
    names = ["unpack_cols", "pack_cols", "unpack_rows", "_unpack_cols_3bit", "_pack_cols_3bit", "_unpack_rows_3bit",
             "_require_int32_words_for_3bit", "_shift_gptq_qzeros"]
    found = functions(folder / "gptqmodel/utils/model_dequant.py", names, scope)
    return pack, dict(zip(names, found))


class Model:
    """A float fixture on its way to being quantized."""

    def __init__(self, base, name, seed, dtype):
        self.dir = OUT / name
        shutil.rmtree(self.dir, ignore_errors=True)
        self.dir.mkdir(parents=True)
        self.config = json.loads((ROOT / "fixtures" / base / "config.json").read_text())
        self.float = {k: v.float() for k, v in load_file(ROOT / "fixtures" / base / "model.safetensors").items()}
        self.rng = torch.Generator().manual_seed(seed)
        self.tensors, self.values, self.reference = {}, {}, {}
        self.dtype = dtype
        self.config["torch_dtype"] = str(dtype).split(".")[-1]
        for key, x in self.float.items():
            self.tensors[key] = x.to(dtype)
            self.values[key] = x.to(dtype).float()

    def layers(self):
        n = self.config["num_hidden_layers"]
        return [f"model.layers.{i}.{m}" for i in range(n) for m in LINEAR]

    def draw(self, module, bits, group, sym, scale_type, order=None):
        """Codes [out, in], scales and zero points [out, groups] near the float weight, all of them used."""
        w = self.tensors.pop(f"{module}.weight").float()
        rows, cols = w.shape
        group = cols if group == -1 else group
        groups, top = cols // group, 2**bits - 1
        g = torch.arange(cols) // group if order is None else order
        scale = torch.zeros(rows, groups)
        zero = torch.full((rows, groups), 2 ** (bits - 1), dtype=torch.int32)
        if not sym:
            zero = torch.randint(0, top + 1, (rows, groups), generator=self.rng, dtype=torch.int32)
            zero[0, 0], zero[1, 0], zero[-1, -1] = 0, top, 0
        for i in range(groups):
            part = w[:, g == i]
            scale[:, i] = (part.amax(1) - part.amin(1)) / top * (0.75 + 0.5 * torch.rand(rows, generator=self.rng))
        scale = scale.to(scale_type)
        codes = torch.round(w / scale.float()[:, g]) + zero[:, g]
        return codes.clamp(0, top).to(torch.int32), scale, zero, g

    def keep(self, module, codes, scale, zero, g, value):
        """Checks what a format's own code made of the integers, and keeps it for the logits."""
        want = (codes - zero[:, g]).float() * scale.float()[:, g]
        assert torch.equal(value.float(), want), module
        self.values[f"{module}.weight"] = value.float()
        if module == NAMED:
            self.reference["steps"] = (codes - zero[:, g]).float()
            self.reference["scale"] = scale.float()

    def model(self):
        """The model with these values, as transformers computes it in float32."""
        plain = {k: v for k, v in self.config.items() if k not in ("quantization_config", "torch_dtype")}
        config = transformers.AutoConfig.for_model(**plain)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
        missing, extra = model.load_state_dict(self.values, strict=False)
        assert not extra and set(missing) <= {"lm_head.weight"}, (missing, extra)
        model.tie_weights()
        return model

    def ranges(self):
        """The ends of the input of each quantized layer on random tokens, so that others reach beyond them."""
        model, found = self.model(), {}
        for name, module in model.named_modules():
            if name in self.quantized:
                keep = lambda m, args, name=name: found.update({name: (args[0].min(), args[0].max())})
                module.register_forward_pre_hook(keep)
        with torch.no_grad():
            model(torch.randint(3, self.config["vocab_size"], (2, 16), generator=self.rng))
        return found

    def finish(self, quantization, beside=None, hook=None):
        if beside is None:
            self.config["quantization_config"] = quantization
        else:
            (self.dir / beside).write_text(json.dumps(quantization, indent=2) + "\n")
        (self.dir / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")
        tensors = {k: v.contiguous() for k, v in self.tensors.items()}
        save_file(tensors, self.dir / "model.safetensors", metadata={"format": "pt"})
        model = self.model()
        for name, module in model.named_modules():
            if hook is not None and f"{name}.weight" in self.values and name in self.quantized:
                module.register_forward_pre_hook(lambda m, args, name=name: (hook(name, args[0]),))
        ids = torch.randint(3, self.config["vocab_size"], (2, 16), generator=self.rng)
        with torch.no_grad():
            logits = model(ids).logits
        self.reference.update(input_ids=ids, logits=logits.contiguous())
        save_file({k: v.contiguous() for k, v in self.reference.items()}, self.dir / "reference.safetensors")
        size = sum(f.stat().st_size for f in self.dir.iterdir())
        print(f"{self.dir.name}: {size // 1000} kB")


def awq(base, name, seed, group, pack, unpack, quantization, beside=None):
    m = Model(base, name, seed, torch.float16)
    for module in m.layers():
        codes, scale, zero, g = m.draw(module, 4, group, False, torch.float16)
        rows, cols = codes.shape
        # from_linear finds the codes again from values that are exactly on the grid.
        linear = torch.nn.Linear(cols, rows, bias=False)
        linear.weight.data = (codes - zero[:, g]).float() * scale.float()[:, g]
        packed = pack.from_linear(linear, 4, cols if group == -1 else group, scales=scale.t().contiguous(), zeros=zero.t().float())
        value = unpack(packed.qweight, packed.qzeros, packed.scales.float(), 4, packed.group_size)
        m.keep(module, codes, scale, zero, g, value.t())
        for part in ("qweight", "qzeros", "scales"):
            m.tensors[f"{module}.{part}"] = getattr(packed, part)
    m.finish(quantization, beside)


def gptq(base, name, seed, bits, group, sym, code, settings, dtype=torch.float16, order=None, head=False, beside=None):
    pack, f = code
    m = Model(base, name, seed, dtype)
    v1 = settings.get("checkpoint_format", "gptq") == "gptq"
    for module in m.layers() + (["lm_head"] if head else []):
        cols = m.float[f"{module}.weight"].shape[1]
        g = None
        if order is not None:
            g = torch.arange(cols) // group
            g = g[torch.randperm(cols, generator=m.rng)]
        codes, scale, zero, g = m.draw(module, bits, group, sym, dtype, g)
        linear = torch.nn.Linear(cols, codes.shape[0], bias=False)
        linear.weight.data = (codes - zero[:, g]).float() * scale.float()[:, g]
        holder = types.SimpleNamespace(bits=bits, planar=False, maxq=2**bits - 1, pack_factor=32 // bits,
                                       pack_dtype_bits=32, pack_np_math_dtype=np.uint32, pack_np_dtype=np.int32)
        holder.register_buffer = lambda k, v: setattr(holder, k, v)
        pack(holder, linear, scale.float(), zero.float(), g.to(torch.int32))
        # Its constants of whole words for 2, 4 and 8 bits; shifted fields for 3 bits.
        ones = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
        stored = holder.qzeros
        if v1 and bits == 3:
            stored = f["_shift_gptq_qzeros"](stored, bits, delta=-1)
        elif v1:
            stored = (stored.to(torch.int64) - ones[bits]).to(torch.int32)
        back = stored
        if v1:
            back = f["_shift_gptq_qzeros"](stored, 3, delta=1) if bits == 3 else \
                (stored.to(torch.int64) + ones[bits]).to(torch.int32)
        w, z = f["unpack_rows"](holder.qweight, bits), f["unpack_cols"](back, bits)
        value = (w - z[g]).float() * scale.t().float()[g]
        m.keep(module, codes, scale, zero, g, value.t())
        m.tensors.update({f"{module}.qweight": holder.qweight, f"{module}.qzeros": stored,
                          f"{module}.scales": scale.t(), f"{module}.g_idx": g.to(torch.int32)})
    m.finish({"bits": bits, "group_size": group, "sym": sym, **settings}, beside)


def compressed(base, name, seed, fmt, args, dtype, ignore=(), act=None, targets=("Linear",)):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams, compute_dynamic_scales_and_zp
    m = Model(base, name, seed, dtype)
    weights = QuantizationArgs(**args)
    inputs = QuantizationArgs(**act) if act else None
    scheme = QuantizationScheme(targets=list(targets), weights=weights, input_activations=inputs)
    compressor = BaseCompressor.get_value_from_registry(fmt)
    group, half = args.get("group_size", -1), 2 ** (args["num_bits"] - 1)
    m.quantized = [x for x in m.layers() if x not in ignore]
    for module in m.quantized:
        codes, scale, zero, g = m.draw(module, args["num_bits"], group, args["symmetric"], dtype)
        state = {"weight": (codes - zero[:, g]).float() * scale.float()[:, g], "weight_scale": scale.float(),
                 "weight_zero_point": (zero - half).to(torch.int8)}
        packed = compressor.compress(state, scheme)
        value = compressor.decompress(packed, scheme)["weight"]
        m.keep(module, codes, scale, zero, g, value)
        packed["weight_scale"] = scale
        m.tensors.update({f"{module}.{k}": v for k, v in packed.items()})
    hook = None
    if inputs is not None and inputs.dynamic:
        def hook(_, x):
            scale, zero = compute_dynamic_scales_and_zp(x, inputs, torch.nn.Module())
            return fake_quantize(x, scale, zero, inputs)
    elif inputs is not None:
        def hook(name, x):
            scale, zero = (m.tensors[f"{name}.input_{k}"] for k in ("scale", "zero_point"))
            return fake_quantize(x, scale.float(), zero, inputs)
        ranges = m.ranges()
        for module in m.quantized:
            scale, zero = calculate_qparams(*ranges[module], inputs)
            m.tensors.update({f"{module}.input_scale": scale.to(dtype), f"{module}.input_zero_point": zero.to(torch.int8)})
    quantization = {
        "quant_method": "compressed-tensors", "format": fmt, "quantization_status": "compressed",
        "config_groups": {"group_0": json.loads(scheme.model_dump_json())},
        "ignore": ["lm_head", *(r"re:.*layers\.0\..*v_proj$" if "v_proj" in x else x for x in ignore)],
        "kv_cache_scheme": None, "global_compression_ratio": None,
    }
    m.finish(quantization, hook=hook)


def main(awq_folder, gptq_folder):
    pack, unpack = autoawq(Path(awq_folder))
    code = gptqmodel(Path(gptq_folder))
    llama, qwen = "llama-gqa-rope3", "qwen2-bias-tied"
    common = {"quant_method": "awq", "zero_point": True, "version": "gemm"}
    awq(llama, "awq-g32", 1, 32, pack, unpack,
        {**common, "bits": 4, "group_size": 32, "modules_to_not_convert": None})
    awq(qwen, "awq-row-old", 2, -1, pack, unpack,
        {"zero_point": True, "q_group_size": -1, "w_bit": 4, "version": "GEMM"}, beside="quant_config.json")
    new = {"quant_method": "gptq", "desc_act": False, "lm_head": False, "pack_dtype": "int32"}
    gptq(llama, "gptq-w4-sym-old", 3, 4, 32, True, code, {"desc_act": False, "damp_percent": 0.01},
         beside="quantize_config.json")
    gptq(llama, "gptq-w4-asym", 4, 4, 32, False, code, {**new, "checkpoint_format": "gptq"})
    gptq(llama, "gptq-w3-asym", 5, 3, 32, False, code, {**new, "checkpoint_format": "gptq"}, torch.bfloat16)
    gptq(llama, "gptq-v2-w8-actorder", 6, 8, 32, False, code,
         {**new, "desc_act": True, "checkpoint_format": "gptq_v2"}, order=True)
    gptq(llama, "gptq-v2-w2-head", 7, 2, 32, False, code,
         {**new, "lm_head": True, "checkpoint_format": "gptq_v2"}, head=True)
    w4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    skipped = [NAMED.replace("down", "up"), "model.layers.0.self_attn.v_proj"]  # the second by a pattern
    compressed(llama, "ct-pack-w4", 8, "pack-quantized", w4, torch.bfloat16, skipped)
    w3 = {"num_bits": 3, "type": "int", "symmetric": False, "strategy": "channel"}
    compressed(qwen, "ct-pack-w3-asym", 9, "pack-quantized", w3, torch.float16)
    w8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    token = {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "token", "dynamic": True}
    compressed(llama, "ct-int-w8a8", 10, "int-quantized", w8, torch.bfloat16, act=token)
    whole = {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False}
    compressed(qwen, "ct-int-w8a8-static", 12, "int-quantized", w8, torch.float16, act={**whole, "symmetric": True})
    compressed(llama, "ct-int-w8a8-static-asym", 13, "int-quantized", w8, torch.bfloat16,
               act={**whole, "symmetric": False})
    w5 = {"num_bits": 5, "type": "int", "symmetric": False, "strategy": "group", "group_size": 64}
    compressed(llama, "ct-naive-w5-asym", 11, "naive-quantized", w5, torch.float16)


if __name__ == "__main__":
    main(*sys.argv[1:])
