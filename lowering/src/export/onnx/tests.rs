//! What is written, read back by the rules of the ONNX schema and of the operators.

use std::collections::HashMap;

use onnx_protobuf::tensor_proto::DataType;
use qrmc_ir::{
    Elem, Grain, Module, QuantSpec, RawWeight, ScaleType, TensorType, WeightError, WeightSource, pack, parse,
    verify,
};

use super::*;

mod read;

use read::{Elements, Read, attribute, floats, linear, nbits};

/// A decoder of one layer whose query matrix `@q.codes` is of a scheme. The head is the embedding.
fn decoder(spec: QuantSpec, keys: &str) -> Module {
    let ty = TensorType::new(Elem::Quant(spec), [32, 48]);
    let sides = spec.scale_shape(&ty.shape).unwrap();
    let zero = if spec.zero { format!("weight @q.zero : u8{sides}") } else { String::new() };
    let operand = if spec.zero { ", @q.zero" } else { "" };
    let text = format!(
        "qir 1
fact arch = llama
fact hidden = 48
fact layers = 1
fact heads = 2
fact kv_heads = 1
fact head_dim = 16
fact vocab = 8
fact context = 64
weight @embed : bf16[8, 48]
weight @norm : f32[48]
weight @q.codes : {ty}
weight @q.scale : {}{sides}
{zero}
weight @k : f16[16, 48]
weight @o : f32[48, 32]
func @embed(%ids: i32[B, S]) -> (f32[B, S, 48]) {{
  %y = gather @embed, %ids
  return %y
}}
func @layer0(%x: f32[B, S, 48], %pos: i32[S], %k_past: f32[B, P, 16], %v_past: f32[B, P, 16]) -> (f32[B, S, 48], f32[B, T, 16], f32[B, T, 16]) {{
  %attn_in = rms_norm %x, @norm {{eps = 1e-5}}
  %0 = dcast @q.codes, @q.scale{operand}
  %q_proj = matmul.t %attn_in, %0
  %k_proj = matmul.t %attn_in, @k
  %q_rope = rope %q_proj, %pos {{head_dim = 16, theta = 10000.0}}
  %k_rope = rope %k_proj, %pos {{head_dim = 16, theta = 10000.0}}
  {keys}
  %k_all = cache_append %k_past, %k_new
  %v_all = cache_append %v_past, %k_proj
  %o_in = attention %q_rope, %k_all, %v_all {{heads = 2, kv_heads = 1, scale = 0.25}}
  %attn_out = matmul.t %o_in, @o
  %y = add %x, %attn_out
  return %y, %k_all, %v_all
}}
func @head(%x: f32[B, S, 48]) -> (f32[B, S, 8]) {{
  %logits = matmul.t %x, @embed
  return %logits
}}
func @main(%ids: i32[B, S], %pos: i32[S], %k_past0: f32[B, P, 16], %v_past0: f32[B, P, 16]) -> (f32[B, S, 8], f32[B, T, 16], f32[B, T, 16]) {{
  %0 = call @embed %ids
  %1, %2, %3 = call @layer0 %0, %pos, %k_past0, %v_past0
  %logits = call @head %1
  return %logits, %2, %3
}}
",
        spec.scale
    );
    // An unnamed value that is one is written as it is.
    let text = text.replace("  \n", "");
    let text = if keys.is_empty() { text.replace("%k_new", "%k_rope") } else { text };
    parse(&text).unwrap_or_else(|d| panic!("{d}\n{text}"))
}

/// Weights of any bytes; scales are positive.
struct Bytes(HashMap<String, RawWeight<'static>>);

impl Bytes {
    fn of(module: &Module) -> Self {
        let mut state = 12345u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state >> 8
        };
        let mut one = |ty: &TensorType| -> Vec<u8> {
            let n: usize = ty.shape.as_fixed().unwrap().iter().product();
            let mut float = || (next() % 1000) as f32 / 500.0 + 0.001;
            match ty.elem {
                Elem::F32 => (0..n).flat_map(|_| float().to_le_bytes()).collect(),
                Elem::F16 => (0..n).flat_map(|_| half::f16::from_f32(float()).to_le_bytes()).collect(),
                Elem::BF16 => (0..n).flat_map(|_| half::bf16::from_f32(float()).to_le_bytes()).collect(),
                Elem::Quant(q) => {
                    let rows = ty.shape.as_fixed().unwrap();
                    let mut out = Vec::new();
                    for _ in 0..rows[0] {
                        pack::pack_row(
                            (0..rows[1]).map(|_| (next() % (1 << q.bits)) as u8),
                            q.bits,
                            &mut out,
                        );
                    }
                    out
                }
                _ => (0..n).map(|_| (next() % 4) as u8).collect(),
            }
        };
        let all = module.weights().iter();
        Bytes(
            all.map(|w| (w.name.clone(), RawWeight { ty: w.ty.clone(), bytes: one(&w.ty).into() })).collect(),
        )
    }
}

impl WeightSource for Bytes {
    fn raw(&self, name: &str) -> Result<RawWeight<'_>, WeightError> {
        let w = self.0.get(name).ok_or_else(|| WeightError::new(name, "is not there"))?;
        Ok(RawWeight { ty: w.ty.clone(), bytes: (&w.bytes[..]).into() })
    }
}

/// The same from the stored bytes, by `docs/artefact.md`.
fn stored(w: &Bytes, spec: QuantSpec) -> Elements {
    let codes = pack::unpack(&w.0["q.codes"].bytes, spec, &[32, 48]).unwrap();
    let code = |i: usize| match codes.data() {
        qrmc_ir::Data::I8(v) => i32::from(v[i]),
        qrmc_ir::Data::U8(v) => i32::from(v[i]),
        _ => unreachable!(),
    };
    let scales = w.read("q.scale").unwrap();
    let zeros = w.0.get("q.zero").map(|z| z.bytes.to_vec());
    let at = |i: usize| match spec.grain {
        Grain::Tensor => 0,
        Grain::Row => i / 48,
        Grain::Group(g) => i / g as usize,
        _ => i % 48,
    };
    let zero = |i: usize| zeros.as_ref().map_or(0, |z| i32::from(z[at(i)]));
    (0..32 * 48).map(|i| (code(i), zero(i), scales.as_f32().unwrap()[at(i)])).collect()
}

fn schemes() -> Vec<QuantSpec> {
    let mut out = Vec::new();
    for bits in 2..=8 {
        for grain in [Grain::Tensor, Grain::Row, Grain::Group(8), Grain::Group(16), Grain::Channel] {
            let scale = [ScaleType::F32, ScaleType::F16, ScaleType::BF16][out.len() % 3];
            let both = [QuantSpec::sym(bits, grain), QuantSpec::asym(bits, grain)];
            out.extend(both.map(|s| QuantSpec { scale, ..s }));
        }
    }
    out
}

#[test]
fn every_scheme_comes_back_in_both_forms() {
    for spec in schemes() {
        let module = decoder(spec, "");
        let weights = Bytes::of(&module);
        let want = stored(&weights, spec);
        let standard = Read::of(&module, &weights, Form::Qdq);
        assert_eq!(linear(&standard), want, "{spec}");
        let ort = Read::of(&module, &weights, Form::Ort);
        // Blocks of the operator have at least 16 elements.
        if matches!(spec.grain, Grain::Group(8) | Grain::Channel) {
            assert_eq!(linear(&ort), want, "{spec}");
        } else {
            assert_eq!(ort.count("DequantizeLinear"), 0);
            assert_eq!(nbits(&ort), want, "{spec}");
        }
    }
}

#[test]
fn names_and_operators_of_the_forms() {
    let module = decoder(QuantSpec::asym(4, Grain::Group(16)), "");
    let weights = Bytes::of(&module);
    let names = |r: &Read| -> Vec<String> { r.model.graph.input.iter().map(|i| i.name.clone()).collect() };
    let standard = Read::of(&module, &weights, Form::Qdq);
    let caches = ["past_key_values.0.key", "past_key_values.0.value"];
    assert_eq!(names(&standard), [&["input_ids", "attention_mask", "position_ids"][..], &caches].concat());
    assert!(standard.nodes().iter().all(|n| n.domain.is_empty()));
    let ort = Read::of(&module, &weights, Form::Ort);
    assert_eq!(names(&ort), [&["input_ids", "attention_mask"][..], &caches].concat());
    for r in [&standard, &ort] {
        let outputs: Vec<&str> = r.model.graph.output.iter().map(|o| o.name.as_str()).collect();
        assert_eq!(outputs, ["logits", "present.0.key", "present.0.value"]);
        // Each name of the configuration is an input or output, and the other way round.
        let decoder = &r.genai["model"]["decoder"];
        for (part, have) in
            [("inputs", names(r)), ("outputs", outputs.iter().map(|o| (*o).to_owned()).collect())]
        {
            let named = decoder[part].as_object().unwrap().values();
            let mut named: Vec<String> = named.map(|v| v.as_str().unwrap().replace("%d", "0")).collect();
            let mut have = have.clone();
            named.sort();
            have.sort();
            assert_eq!(named, have, "{part}");
        }
        // The tied table is one initializer, in its stored type.
        let tables: Vec<_> = r.model.graph.initializer.iter().filter(|t| t.name.contains("embed")).collect();
        assert_eq!(tables.len(), 1);
        assert_eq!(r.tensor("embed").1, weights.0["embed"].bytes.to_vec());
        assert_eq!(tables[0].data_type, DataType::BFLOAT16 as i32);
        assert!(r.nodes().iter().any(|n| n.output.iter().any(|o| o == "layer0/attn_in")));
    }
    let fused = ort.only("GroupQueryAttention");
    assert_eq!(attribute(fused, "do_rotary").unwrap().i, 1);
    assert_eq!((ort.count("Softmax"), ort.count("SimplifiedLayerNormalization")), (0, 1));
    // As the definition rounds: position 3 at the second frequency, 10000^(-2/16).
    let cosines = floats(&ort.tensor("cos_cache").1);
    let angle = 3.0f32 * 10000f64.powf(-0.125) as f32;
    assert_eq!(cosines[3 * 8 + 1], f64::from(angle).cos() as f32);
}

#[test]
fn what_stands_between_rope_and_cache_stays_outside() {
    let quantizer = "%k_new = fake_quant %k_rope {q = u4<group:8, f32, zero>, rule = dynamic}";
    let module = decoder(QuantSpec::sym(4, Grain::Row), quantizer);
    let weights = Bytes::of(&module);
    let ort = Read::of(&module, &weights, Form::Ort);
    let fused = ort.only("GroupQueryAttention");
    assert!(attribute(fused, "do_rotary").is_none());
    assert_eq!(fused.input.len(), 7);
    assert!(ort.model.graph.input.iter().any(|i| i.name == "position_ids"));
    assert_eq!((ort.count("Round"), ort.count("Cos")), (2, 1));
}

#[test]
fn the_same_bytes_again() {
    let module = decoder(QuantSpec::asym(3, Grain::Group(16)), "");
    let weights = Bytes::of(&module);
    for form in [Form::Qdq, Form::Ort] {
        let [a, b] = [(); 2].map(|()| Read::of(&module, &weights, form));
        assert!(a.file == b.file && a.data == b.data);
    }
}

#[test]
fn refusals_say_what_and_where() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |module: &Module, weights: &dyn WeightSource| {
        let form = Form::Qdq;
        write(verify(module).unwrap(), weights, dir.path(), &Options { form }).unwrap_err().to_string()
    };
    let spec = QuantSpec::asym(4, Grain::Row);
    let good = decoder(spec, "");
    let mut short = Bytes::of(&good);
    let cut = short.0.get_mut("q.codes").unwrap();
    cut.bytes = cut.bytes[1..].to_vec().into();
    let e = refused(&good, &short);
    assert!(e.contains("`q.codes`") && e.contains("767 bytes"), "{e}");
    let wide = decoder(spec, "%wide = cast %k_rope {to = f64}\n  %k_new = cast %wide {to = f32}");
    let e = refused(&wide, &Bytes::of(&wide));
    assert!(e.contains("Q0501") && e.contains("@layer0") && e.contains("f64"), "{e}");
    let mut parts = good.clone();
    parts.funcs.pop();
    let e = refused(&parts, &Bytes::of(&parts));
    assert!(e.contains("no @main"), "{e}");
    // Each function calls the one before twice.
    let mut text =
        qrmc_ir::print(&good).replace("call @head %1", "call @f40 %1").replace("func @main", "MAIN");
    let (before, main) = text.split_once("MAIN").unwrap();
    let head = "(%x: f32[B, S, 48]) -> (f32[B, S, 8])";
    let twice = |n: usize| {
        format!("%0 = call @f{} %x\n  %1 = call @f{} %x\n  %2 = add %0, %1\n  return %2", n - 1, n - 1)
    };
    let last = format!("func @f0{head} {{\n  %0 = call @head %x\n  return %0\n}}\n");
    let chain: String = (1..=40).map(|n| format!("func @f{n}{head} {{\n  {}\n}}\n", twice(n))).collect();
    text = format!("{before}{last}{chain}func @main{main}");
    let deep = parse(&text).unwrap();
    let e = refused(&deep, &Bytes::of(&deep));
    assert!(e.contains("deeper than 8"), "{e}");
    let mut facts = good.clone();
    facts.facts.head_dim = 8;
    let e = refused(&facts, &Bytes::of(&facts));
    assert!(e.contains("1 heads of 8") && e.contains("@main"), "{e}");
}

#[test]
fn codes_of_rows_are_multiplied_as_whole_numbers() {
    for spec in
        [QuantSpec::sym(8, Grain::Row), QuantSpec::asym(5, Grain::Row), QuantSpec::sym(6, Grain::Tensor)]
    {
        let quantizer = "%a = fake_quant %attn_in {q = u8<token, f32, zero>, rule = dynamic}\n  %q_proj";
        let text = qrmc_ir::print(&decoder(spec, ""))
            .replace("%q_proj = matmul.t %attn_in", &format!("{quantizer} = matmul.t %a"));
        let module = parse(&text).unwrap();
        let weights = Bytes::of(&module);
        let r = Read::of(&module, &weights, Form::Ort);
        let n = r.only("MatMulInteger");
        // The stored bytes, row by row; the operator reads their transpose.
        let t = r.nodes().iter().find(|t| t.output[0] == n.input[1]).unwrap();
        assert_eq!(t.op_type, "Transpose");
        let (_, codes) = r.tensor(&t.input[0]);
        let (zt, zeros) = r.tensor(&n.input[3]);
        let zero = |i: usize| i32::from(zeros[if zt.dims.is_empty() { 0 } else { i / 48 }]);
        let want = stored(&weights, spec);
        let have: Vec<i32> = codes.iter().enumerate().map(|(i, &c)| i32::from(c) - zero(i)).collect();
        assert_eq!(have, want.iter().map(|(c, z, _)| c - z).collect::<Vec<_>>(), "{spec}");
        let (_, sums) = r.tensor("q.codes.sums");
        let sums: Vec<i32> = sums.as_chunks::<4>().0.iter().map(|b| i32::from_le_bytes(*b)).collect();
        assert_eq!(sums, have.chunks(48).map(|row| row.iter().sum()).collect::<Vec<i32>>());
        // The product with the codes of tokens, its floats, and the attention's norm of the other matrices.
        assert_eq!((r.count("MatMulNBits"), r.count("DequantizeLinear")), (0, 0));
    }
}
