//! Inputs of linear layers by one calibrated scale: what is calibrated, and whether what other runtimes are given computes
//! what the artefact does (ascend.md §5.2, §5.4; methods.md §10.4).

use std::path::Path;

use half::bf16;
use qrmc_ir::{BinaryOp, Func, Grain, Op, QuantSpec, Tensor, ValueId, WeightSource, extract, interp};
use qrmc_lowering::artefact::Artefact;
use qrmc_passes::{Calibration, Unit};
use qrmc_runtime::engine::CpuEngine;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use crate::formats::{integers, stored};
use crate::passes::{compile, windows};
use crate::run::{ok, run};
use crate::support::{Source, TINY, data, import};

pub(crate) const MODEL: &str = "fixtures/qwen2-bias-tied";

/// The inputs that have codes: their scheme, the name of their scale, and how many linear layers read each.
fn coded(unit: &Unit, at: usize) -> Vec<(QuantSpec, String, usize)> {
    let f = unit.module.func(unit.module.layers()[at]);
    let (users, mut out) = (f.users(), Vec::new());
    for n in &f.nodes {
        let Op::QCast(spec) = n.op else { continue };
        let Some(scale) = f.as_weight(n.ins[1]).filter(|_| spec.grain == Grain::Tensor) else { continue };
        let cast = &f.nodes[users[n.outs[0].0 as usize][0]];
        let readers = &users[cast.outs[0].0 as usize];
        assert!(readers.iter().all(|&r| matches!(f.nodes[r].op, Op::MatMul { .. })));
        out.push((spec, unit.module.weight(scale).name.clone(), readers.len()));
    }
    out
}

/// Values of each layer of a float model on each window, by the interpreter: `each` gets the layer, and what `wanted` says.
pub(crate) fn walk(
    calibration: &Calibration,
    wanted: impl Fn(&Func) -> Vec<ValueId>,
    mut each: impl FnMut(usize, &[Tensor]),
) {
    let model = import(MODEL);
    let (m, source) = (model.module, Source(model.source.weights));
    let width = (m.facts.kv_heads * m.facts.head_dim) as usize;
    let embed = m.func(m.find_func("embed").unwrap());
    for w in &calibration.windows {
        let ids = Tensor::i32([1, w.len()], w.clone());
        let mut x = interp::run(&m, embed, &source, &[ids], &embed.results).unwrap().remove(0);
        for (at, layer) in m.layers().into_iter().enumerate() {
            let f = m.func(layer);
            let mut wanted = wanted(f);
            wanted.push(f.results[0]);
            let empty = Tensor::zeros([1, 0, width]);
            let args = [x, Tensor::i32([w.len()], (0..w.len() as i32).collect()), empty.clone(), empty];
            let mut values = interp::run(&m, f, &source, &args, &wanted).unwrap();
            x = values.pop().unwrap();
            each(at, &values);
        }
    }
}

/// The smallest and the largest value of each input of linear layers of each layer of a float model, and 0.
fn ends(calibration: &Calibration) -> Vec<Vec<(f32, f32)>> {
    let mut out: Vec<Vec<(f32, f32)>> = Vec::new();
    let inputs = |f: &Func| {
        let mut wanted: Vec<ValueId> = Vec::new();
        for n in f.nodes.iter().filter(|n| n.op == Op::MatMul { trans_b: true }) {
            if f.weight_behind(n.ins[1]).is_some() && !wanted.contains(&n.ins[0]) {
                wanted.push(n.ins[0]);
            }
        }
        wanted
    };
    walk(calibration, inputs, |at, values| {
        out.resize(out.len().max(at + 1), Vec::new());
        out[at].resize(values.len(), (0.0, 0.0));
        for (ends, t) in out[at].iter_mut().zip(values) {
            *ends = t.as_f32().unwrap().iter().fold(*ends, |(low, high), v| (low.min(*v), high.max(*v)));
        }
    });
    out
}

#[test]
fn a_scale_is_the_largest_magnitude_over_127() {
    let calibration = windows(256, 3, 16);
    let (unit, ..) = compile(MODEL, "static-inputs{scale=f32}", &calibration);
    let (rounded, ..) = compile(MODEL, "static-inputs", &calibration);
    let (zeroed, ..) = compile(MODEL, "static-inputs{scale=f32,sym=false}", &calibration);
    for (at, ends) in ends(&calibration).iter().enumerate() {
        let inputs = coded(&unit, at);
        // q, k and v share one, and gate and up.
        assert_eq!(inputs.iter().map(|i| i.2).collect::<Vec<_>>(), [3, 1, 2, 1]);
        for (((spec, name, _), (asym, ..)), (low, high)) in inputs.iter().zip(coded(&zeroed, at)).zip(ends) {
            let scale = |unit: &Unit| unit.weights.read(name).unwrap().as_f32().unwrap().to_vec();
            assert_eq!(*spec, QuantSpec::sym(8, Grain::Tensor));
            let (have, most) = (scale(&unit)[0], high.max(-low));
            assert!((have * 127.0 - most).abs() < 1e-5 * most, "{name}: {have} for {most}");
            assert_eq!(scale(&rounded), [bf16::from_f32(have).to_f32()], "{name}");
            assert_eq!(asym, QuantSpec::asym(8, Grain::Tensor));
            let (step, range) = (scale(&zeroed)[0], high - low);
            assert!((step * 255.0 - range).abs() < 1e-5 * range, "{name}: {step} for {range}");
            let zero = zeroed.weights.read(&name.replace(".scale", ".zero")).unwrap();
            assert_eq!(integers(&zero, 0), [(-low / step).round_ties_even() as u32], "{name}");
        }
    }
}

#[test]
fn what_is_left_out_stays_for_annotate() {
    let pass = "static-inputs{skip=[k_proj,layer1.down_proj]},annotate{w=8,a=8,a_sym=true,group=row},rtn";
    let (unit, ..) = compile(MODEL, pass, &windows(256, 1, 8));
    for (at, want) in [(0, vec![2, 1, 2, 1]), (1, vec![2, 1, 2])] {
        assert_eq!(coded(&unit, at).iter().map(|i| i.2).collect::<Vec<_>>(), want);
        let f = unit.module.func(unit.module.layers()[at]);
        let tokens =
            f.nodes.iter().filter(|n| matches!(n.op, Op::FakeQuant(s, _) if s.grain == Grain::Token));
        assert_eq!(tokens.count(), 5 - want.len(), "{at}");
    }
}

/// Compiles the shipped model on little text.
pub(crate) fn compiled(d: &Path, pass: &str, out: &str) {
    let (model, text) = (data(TINY), data("wikitext-2-train-sample.txt"));
    let args = ["compile", model.to_str().unwrap(), "--pass", pass, "--calib", text.to_str().unwrap()];
    ok(d, &[&args[..], &["--nsamples", "2", "--seqlen", "64", "-o", out]].concat());
}

/// Values and shape of a tensor of a file.
pub(crate) fn get(file: &Path, name: &str) -> (Vec<f64>, Vec<usize>) {
    let bytes = std::fs::read(file).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let view = file.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}"));
    let values = match view.dtype() {
        Dtype::I8 => view.data().iter().map(|&b| f64::from(b as i8)).collect(),
        // Floats in the low half.
        Dtype::I64 => {
            let wide = |b: &[u8]| i64::from_le_bytes(b.try_into().unwrap());
            view.data()
                .chunks(8)
                .map(|b| f64::from(f32::from_bits(u32::try_from(wide(b)).unwrap())))
                .collect()
        }
        Dtype::I32 => {
            view.data().chunks(4).map(|b| f64::from(i32::from_le_bytes(b.try_into().unwrap()))).collect()
        }
        dtype => {
            let elem = match dtype {
                Dtype::F32 => qrmc_ir::Elem::F32,
                Dtype::BF16 => qrmc_ir::Elem::BF16,
                Dtype::F16 => qrmc_ir::Elem::F16,
                other => panic!("{name} is {other:?}"),
            };
            let t = Tensor::from_le_bytes(elem, view.shape(), view.data()).unwrap();
            t.as_f32().unwrap().iter().map(|&x| f64::from(x)).collect()
        }
    };
    (values, view.shape().to_vec())
}

/// What an artefact computes of the input, before it is rounded, of a linear layer with a bias.
fn computed(a: &Artefact, f: &Func, linear: &str, x: &Tensor) -> Vec<f64> {
    let of = |n: &&qrmc_ir::Node| {
        let weight = n.ins.get(1).and_then(|w| f.weight_behind(*w));
        matches!(n.op, Op::MatMul { .. })
            && weight.is_some_and(|w| a.module.weight(w).name.starts_with(linear))
    };
    let product = f.nodes.iter().find(of).unwrap();
    let codes = f.def_node(f.def_node(product.ins[0]).unwrap().ins[0]).unwrap();
    let biased = f.nodes.iter().find(|n| n.op == Op::Binary(BinaryOp::Add) && n.ins[0] == product.outs[0]);
    let part = extract(&a.module, f, "part", &[codes.ins[0]], &biased.unwrap().outs).unwrap();
    let out = qrmc_ir::Engine::run(&CpuEngine::new(2).unwrap(), &a.module, &part, a, &[x]).unwrap();
    out[0].as_f32().unwrap().iter().map(|&y| f64::from(y)).collect()
}

#[test]
fn exports_compute_what_the_artefact_does() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    for (options, ty, dtype) in [
        ("scale=bf16", "bf16", Dtype::F32),
        ("scale=f16", "f16", Dtype::I64),
        ("scale=bf16,sym=false", "bf16", Dtype::F32),
    ] {
        let pass = format!("static-inputs{{{options}}},annotate{{w=8,group=row,sym=true,scale={ty}}},rtn");
        compiled(d, &pass, "a");
        exported(d, options.contains("sym=false"), dtype);
    }
}

/// Exports the artefact `a`, and holds what the files say against what it computes.
fn exported(d: &Path, zero: bool, dtype: Dtype) {
    ok(d, &["check", "a", "--parity"]);
    let said = ok(d, &["export", "a", "--format", "ascend", "-o", "x"]);
    assert!(said.contains("multiples of deq_scale"), "{said}");
    ok(d, &["check", "x", "--target", "vllm-ascend", "--tp", "1,2"]);
    ok(d, &["export", "a", "--format", "compressed-tensors", "-o", "c"]);
    ok(d, &["check", "c", "--target", "vllm"]);
    let json =
        |path: &str| -> Value { serde_json::from_slice(&std::fs::read(d.join(path)).unwrap()).unwrap() };
    let description = json("x/quant_model_description.json");
    assert_eq!(description["model_quant_type"], "W8A8");
    let half = dtype == Dtype::I64;
    assert_eq!(json("x/config.json")["torch_dtype"], if half { "float16" } else { "bfloat16" });
    let quantization = &json("c/config.json")["quantization_config"];
    assert_eq!(quantization["format"], "int-quantized");
    let inputs = &quantization["config_groups"]["group_0"]["input_activations"];
    let symmetric = (!zero).to_string();
    for (key, want) in
        [("num_bits", "8"), ("strategy", "\"tensor\""), ("dynamic", "false"), ("symmetric", &symmetric)]
    {
        assert_eq!(inputs[key].to_string(), want, "{key}");
    }
    let (npu, ct) = (d.join("x/quant_model_weights.safetensors"), d.join("c/model.safetensors"));
    let a = Artefact::map(&d.join("a")).unwrap();
    let (layer, tokens) = (1, 8);
    let f = a.module.func(a.module.layers()[layer]);
    for linear in ["q_proj", "k_proj"] {
        let name = format!("model.layers.{layer}.self_attn.{linear}");
        let of = |file: &Path, part: &str| get(file, &format!("{name}.{part}"));
        for part in ["weight", "input_scale", "input_offset", "deq_scale", "quant_bias"] {
            assert_eq!(description[format!("{name}.{part}")], "W8A8", "{part}");
        }
        assert_eq!(description[format!("{name}.bias")], "FLOAT");
        let (weight, shape) = of(&npu, "weight");
        let (rows, cols) = (shape[0], shape[1]);
        let (scale, one) = of(&npu, "input_scale");
        let (offset, shape) = of(&npu, "input_offset");
        assert_eq!((one, shape, zero), (vec![1], vec![1], offset[0] != 0.0));
        let (deq, quant_bias) = (of(&npu, "deq_scale"), of(&npu, "quant_bias"));
        assert_eq!((&deq.1, &quant_bias.1), (&vec![rows], &vec![rows]));
        let bytes = std::fs::read(&npu).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(file.tensor(&format!("{name}.deq_scale")).unwrap().dtype(), dtype);
        assert_eq!(of(&ct, "weight").0, weight);
        assert_eq!(of(&ct, "input_scale"), (scale.clone(), vec![1]));
        if zero {
            assert_eq!(of(&ct, "input_zero_point"), (offset.clone(), vec![1]));
        }
        let (weight_scale, bias) = (of(&ct, "weight_scale").0, of(&ct, "bias").0);
        // A fifth more than the codes reach: the ends are cut off.
        let draws = qrmc_passes::seeded_tokens(5, tokens * cols, 1 << 16);
        let draw = |r: &i32| ((f64::from(*r) / 32768.0 - 1.0) * 1.2 * 127.0 - offset[0]) * scale[0];
        let x: Vec<f32> = draws.as_i32().unwrap().iter().map(|r| draw(r) as f32).collect();
        let want = computed(&a, f, &name, &Tensor::f32([1, tokens, cols], x.clone()));
        let largest = want.iter().fold(0.0f64, |m, y| m.max(y.abs()));
        let code = |x: &f32| {
            (f64::from(*x) * (1.0 / scale[0]) + offset[0]).round_ties_even().clamp(-128.0, 127.0) as i64
        };
        let codes: Vec<i64> = x.iter().map(code).collect();
        assert!(codes.contains(&127) && codes.contains(&-128));
        for (t, codes) in codes.chunks(cols).enumerate() {
            for n in 0..rows {
                let row = &weight[n * cols..][..cols];
                let sum = |offset: i64| -> i64 {
                    codes.iter().zip(row).map(|(q, w)| (q - offset) * *w as i64).sum()
                };
                let y = want[t * rows + n];
                let operator = (sum(0) + quant_bias.0[n] as i64) as f64 * deq.0[n];
                // Half a unit of the bias, and the sums of the artefact in f32.
                assert!((operator - y).abs() <= 0.5 * deq.0[n] + 1e-6 * largest, "{name}: {operator} {y}");
                let float = sum(offset[0] as i64) as f64 * scale[0] * weight_scale[n] + bias[n];
                assert!((float - y).abs() <= 1e-6 * largest, "{name}: {float} for {y}");
            }
        }
    }
}

/// The scales and zero points of the inputs of each layer, in the order in which these are rounded.
fn calibrated(path: &Path) -> Vec<(QuantSpec, Vec<Tensor>)> {
    let a = Artefact::map(path).unwrap();
    let mut out = Vec::new();
    for f in a.module.layers().into_iter().map(|l| a.module.func(l)) {
        for n in &f.nodes {
            let Op::QCast(spec) = n.op else { continue };
            let side = |v: &ValueId| a.read(&a.module.weight(f.as_weight(*v).unwrap()).name).unwrap();
            out.push((spec, n.ins[1..].iter().map(side).collect()));
        }
    }
    out
}

#[test]
fn exports_come_back_with_their_scales() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    compiled(d, "static-inputs,annotate{w=8,group=row,sym=true,scale=bf16},rtn", "own");
    let asym = data("quantized/ct-int-w8a8-static-asym");
    ok(d, &["compile", asym.to_str().unwrap(), "-o", "asym"]);
    for from in ["own", "asym"] {
        ok(d, &["export", from, "--format", "compressed-tensors", "-o", "x"]);
        ok(d, &["check", "x", "--target", "vllm"]);
        ok(d, &["compile", "x", "-o", "back"]);
        assert_eq!(stored(&d.join("back")), stored(&d.join(from)), "{from}");
        let want = calibrated(&d.join(from));
        assert!(!want.is_empty());
        assert_eq!(calibrated(&d.join("back")), want, "{from}");
        let logits = |path: &str| {
            let a = Artefact::map(&d.join(path)).unwrap();
            let ids = qrmc_passes::seeded_tokens(1, 12, 200);
            qrmc_passes::forward(&CpuEngine::new(2).unwrap(), &a.module, &a, &ids).unwrap()
        };
        assert_eq!(logits("back"), logits(from), "{from}");
        ok(d, &["check", "back", "--parity"]);
    }
    // As floats, for other passes.
    let s = run(d, &["compile", "x", "--pass", "rtn{bits=8,group=32}", "-o", "again"]);
    assert!(
        s.code == 0 && s.err.contains("the rounding of inputs that it asks for is left out"),
        "{}",
        s.err
    );
    // The tensors of the checkpoint itself.
    for part in ["weight", "weight_scale", "input_scale", "input_zero_point"] {
        let name = format!("model.layers.1.mlp.gate_proj.{part}");
        let file = |path: &Path| get(&path.join("model.safetensors"), &name);
        assert_eq!(file(&d.join("x")), file(&asym), "{part}");
    }
}

#[test]
fn what_has_no_place_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let weights = "annotate{w=8,group=row,sym=true,scale=bf16},rtn";
    compiled(d, &format!("static-inputs,{weights}"), "a");
    for format in ["fake", "gptq", "gptq-v2", "awq", "gguf"] {
        let s = run(d, &["export", "a", "--format", format, "-o", "x"]);
        let said =
            s.err.contains("rounded to i8<tensor, bf16>") && s.err.contains("say nothing of activations");
        assert!(s.code == 4 && said, "{format}: {}", s.err);
    }
    for (pass, format, want) in [
        (
            "static-inputs,annotate{w=8,group=row,sym=true,scale=bf16,skip=down_proj},rtn",
            "compressed-tensors",
            "model.layers.0.mlp.down_proj: its input is rounded to i8<tensor, bf16>, and its weight has no codes",
        ),
        (
            "static-inputs{scale=f32},annotate{w=8,group=row,sym=true},rtn",
            "ascend",
            "is no bf16, the type of the model, to which the loader rounds it",
        ),
        (
            "static-inputs{bits=4},annotate{w=4,group=row,sym=true},rtn",
            "ascend",
            "W4A4 with one calibrated scale",
        ),
        ("static-keys,annotate{w=8,group=row,sym=true},rtn", "ascend", "no checkpoint has a place for it"),
    ] {
        compiled(d, pass, "a");
        let s = run(d, &["export", "a", "--format", format, "-o", "x"]);
        assert!(s.code == 4 && s.err.contains(want), "{pass}: {}", s.err);
    }
    let (model, text) = (data(TINY), data("wikitext-2-train-sample.txt"));
    let (model, text) = (model.to_str().unwrap(), text.to_str().unwrap());
    for (pass, target, code, want) in [
        (
            "annotate{w=8,a=8,group=row},static-inputs,rtn",
            "cpu",
            1,
            "the input of q_proj, k_proj, v_proj is rounded already",
        ),
        ("static-inputs{scale=f32},annotate{w=8,group=row,sym=true},rtn", "vllm-ascend", 4, "scales of f32"),
        (
            "static-inputs,annotate{w=4,group=row,sym=true},rtn",
            "vllm-ascend",
            4,
            "rounded to i8<tensor, bf16>",
        ),
    ] {
        // Refused before any text is read.
        let s = run(d, &["compile", model, "--pass", pass, "--calib", text, "--target", target, "-o", "b"]);
        assert!(s.code == code && s.err.contains(want), "{pass}: {} {}", s.code, s.err);
        assert!(!s.err.contains("windows of"), "{pass}: {}", s.err);
    }
    let pass = "static-inputs,annotate{w=8,group=row,sym=true},rtn";
    let args = ["compile", model, "--pass", pass, "--calib", text, "--target", "vllm-ascend", "-o", "b"];
    ok(d, &[&args[..], &["--nsamples", "1", "--seqlen", "32"]].concat());
}
