//! The methods as transforms: what they keep, what stays online, and that a lost half is found.

use insta::assert_snapshot;
use qrmc_ir::{BinaryOp, Func, Module, Op, ValueId, print_func, rewrite};
use qrmc_passes::{Unit, compare_logits, compare_sourced, seeded_tokens};
use qrmc_runtime::engine::CpuEngine;

use crate::passes::{compile, compile_raw, pipeline, windows};
use crate::support::{FIXTURES, data, import};

/// Transform pipelines, and the numbers of ranks that they are made for.
const ROTATE: &str = "rotate";
const SMOOTH: &str = "smooth";
const AFFINE: &str = "affine{epochs=1,batch=2}";

#[test]
fn every_transform_keeps_the_function_at_every_number_of_ranks() {
    for name in FIXTURES {
        let facts = import(&format!("fixtures/{name}")).module.facts;
        for tp in [1, 2, 4].into_iter().filter(|tp| facts.heads.is_multiple_of(*tp)) {
            for text in [
                format!("rotate{{tp={tp}}}"),
                format!("affine{{epochs=1,batch=2,tp={tp}}}"),
                format!("affine{{epochs=1,batch=2,tp={tp},form=svd}}"),
                format!("rotate{{tp={tp}}},smooth{{alpha=0.6}}"),
                format!("affine{{epochs=1,batch=2,kv=16,a=16,tp={tp}}}"),
                format!("affine{{epochs=1,batch=2,kv=16,a_sym=true,edges=pairs,clips=one,tp={tp}}}"),
                format!("affine{{epochs=1,batch=2,wide=[o_proj,layer1],clips=one,form=svd,tp={tp}}}"),
                "rotate{residual=false,heads=false,down=false},part-bias".to_owned(),
            ] {
                let (_, reports, _) = compile(&format!("fixtures/{name}"), &text, &windows(256, 4, 32));
                for r in &reports {
                    let gap = r.gap.unwrap();
                    assert!(gap.relative < 1e-4, "{name} {}: {gap:?}", r.pass);
                }
            }
        }
    }
}

/// What a function does while it runs that an imported layer does not: transforms and diagonals.
fn online(f: &Func) -> Vec<String> {
    let derived = f.weight_derived();
    let mut out = Vec::new();
    for n in f.nodes.iter().filter(|n| !derived[n.outs[0].0 as usize]) {
        let width = f.ty(n.outs[0]).shape.last().unwrap();
        out.push(match &n.op {
            Op::Hadamard { block, .. } => format!("hadamard {width} in blocks of {block}"),
            Op::ModeMul { inner } => format!("mode_mul {width} by {} over {inner}", f.ty(n.ins[1]).shape),
            Op::Binary(BinaryOp::Mul | BinaryOp::Div) if derived[n.ins[1].0 as usize] => {
                format!("diagonal {width}")
            }
            _ => continue,
        });
    }
    out.sort();
    out
}

fn layer(unit: &Unit, at: usize) -> &Func {
    unit.module.func(unit.module.layers()[at])
}

// methods.md §7.4: everything else is folded.
#[test]
fn what_stays_online_is_the_published_list() {
    let model = "fixtures/qwen2-bias-tied";
    let calibration = windows(256, 2, 32);
    for (text, want) in [
        (
            "rotate",
            vec![
                "hadamard 160 in blocks of 160",
                "hadamard 32 in blocks of 16",
                "hadamard 64 in blocks of 16",
            ],
        ),
        (
            "rotate{tp=2}",
            vec![
                "hadamard 160 in blocks of 80",
                "hadamard 32 in blocks of 16",
                "hadamard 64 in blocks of 16",
            ],
        ),
        ("smooth", vec![]),
        ("scale{group=8}", vec![]),
        (
            AFFINE,
            vec![
                // L ⊗ R of the feed-forward block's end, of both norms, P_o, P_k on keys and its answer on queries.
                "mode_mul 160 by [10, 10] over 16",
                "mode_mul 160 by [16, 16] over 1",
                "mode_mul 32 by [16, 16] over 1",
                "mode_mul 64 by [16, 16] over 1",
                "mode_mul 64 by [4, 4] over 16",
                "mode_mul 64 by [8, 8] over 1",
                "mode_mul 64 by [8, 8] over 1",
                "mode_mul 64 by [8, 8] over 8",
                "mode_mul 64 by [8, 8] over 8",
            ],
        ),
        (
            // P_v is folded without a transform of the cache.
            "affine{epochs=1,batch=2,kv=16}",
            vec![
                "mode_mul 160 by [10, 10] over 16",
                "mode_mul 160 by [16, 16] over 1",
                "mode_mul 64 by [4, 4] over 16",
                "mode_mul 64 by [8, 8] over 1",
                "mode_mul 64 by [8, 8] over 1",
                "mode_mul 64 by [8, 8] over 8",
                "mode_mul 64 by [8, 8] over 8",
            ],
        ),
        (
            "affine{epochs=1,batch=2,edges=pairs,wide=up_proj}",
            vec![
                "mode_mul 160 by [10, 10] over 16",
                "mode_mul 160 by [16, 16] over 1",
                "mode_mul 64 by [8, 8] over 1",
                "mode_mul 64 by [8, 8] over 8",
            ],
        ),
        (
            "affine{epochs=1,batch=2,edges=norms}",
            vec![
                "mode_mul 64 by [8, 8] over 1",
                "mode_mul 64 by [8, 8] over 1",
                "mode_mul 64 by [8, 8] over 8",
                "mode_mul 64 by [8, 8] over 8",
            ],
        ),
        (
            "affine{epochs=1,batch=2,tp=2}",
            vec![
                "mode_mul 160 by [2, 10, 10] over 1",
                "mode_mul 160 by [2, 8, 8] over 10",
                "mode_mul 32 by [16, 16] over 1",
                "mode_mul 64 by [16, 16] over 1",
                "mode_mul 64 by [2, 2, 2] over 16",
                "mode_mul 64 by [8, 8] over 1",
                "mode_mul 64 by [8, 8] over 1",
                "mode_mul 64 by [8, 8] over 8",
                "mode_mul 64 by [8, 8] over 8",
            ],
        ),
    ] {
        let (unit, ..) = compile(model, text, &calibration);
        for at in 0..2 {
            let text = print_func(&unit.module, layer(&unit, at));
            assert_eq!(online(layer(&unit, at)), want, "{text}");
        }
        for f in ["embed", "head"] {
            let f = unit.module.func(unit.module.find_func(f).unwrap());
            assert_eq!(online(f), Vec::<String>::new(), "{}", print_func(&unit.module, f));
        }
    }
}

/// The functions with one node left out, for each node that is a half of a transform.
fn halves(module: &Module, at: usize) -> Vec<(String, Func)> {
    let f = &module.funcs[at];
    let made = |v: ValueId| {
        f.as_weight(v).is_some_and(|w| {
            let name = &module.weight(w).name;
            name.ends_with(".scale") || name.ends_with(".diag")
        })
    };
    let mut out = Vec::new();
    for n in &f.nodes {
        let half = match n.op {
            Op::Hadamard { .. } | Op::ModeMul { .. } => true,
            Op::Binary(BinaryOp::Mul | BinaryOp::Div) => made(n.ins[1]),
            _ => false,
        };
        if half {
            let outs = n.outs.clone();
            let broken = rewrite(module, f, |_, node, ins| Ok((node.outs == outs).then(|| vec![ins[0]])));
            out.push((format!("@{} {} of {}", f.name, f.show(n.outs[0]), n.op.text().0), broken.unwrap()));
        }
    }
    out
}

#[test]
fn every_lost_half_is_found() {
    let name = "fixtures/qwen2-bias-tied";
    let (engine, ids) = (CpuEngine::new(2).unwrap(), seeded_tokens(3, 32, 256));
    let source = import(name).module;
    let calibration = windows(256, 2, 32);
    for text in [ROTATE, SMOOTH, AFFINE, "rotate,smooth{alpha=0.6}", "rotate{residual=false},part-bias"] {
        for raw in [true, false] {
            let (unit, ..) =
                if raw { compile_raw(name, text, &calibration) } else { compile(name, text, &calibration) };
            let mut seen = 0;
            for at in 0..unit.module.funcs.len() {
                for (what, broken) in halves(&unit.module, at) {
                    let mut module = unit.module.clone();
                    module.funcs[at] = broken;
                    let gap = compare_logits(&engine, &source, &module, &unit.weights, &ids)
                        .unwrap_or_else(|e| panic!("{text}: without {what}: {e}"));
                    assert!(gap.relative > 1e-4, "{text}: {what} is not missed: {gap:?}");
                    seen += 1;
                }
            }
            assert!(seen >= 4, "{text}: {seen} halves");
        }
    }
}

#[test]
fn golden_one_layer_of_each_method() {
    let calibration = windows(256, 2, 32);
    for (name, text) in [
        ("rotate", "rotate"),
        ("smooth", "smooth"),
        ("affine", AFFINE),
        ("part_bias", "rotate{residual=false,heads=false,down=false},part-bias"),
    ] {
        for (stage, raw) in [("inserted", true), ("placed", false)] {
            let model = "fixtures/qwen2-bias-tied";
            let (unit, ..) =
                if raw { compile_raw(model, text, &calibration) } else { compile(model, text, &calibration) };
            assert_snapshot!(format!("{name}_{stage}"), print_func(&unit.module, layer(&unit, 0)));
        }
    }
    for (name, text) in [
        ("annotated", "rotate,annotate{w=4,a=4,kv=4,group=row,sym=true,a_clip=0.9,tp=2}"),
        ("affine_annotated", "affine{epochs=1,batch=2,tp=2},annotate{w=4,a=4,kv=4,group=row,sym=true,tp=2}"),
        ("static_keys", "kvquant{bits=4}"),
        ("quarot_kv_aware", "quarot-kv{bits=3,bias=aware}"),
        ("skip", "annotate{w=4,a=4,kv=4,group=8,skip=[o_proj,layer0.up_proj]}"),
        ("wide", "annotate{w=4,a=4,group=8,a_clip=0.9,scale=bf16,tp=2,wide=[o_proj,layer0.k_proj]}"),
    ] {
        let (unit, ..) = compile("fixtures/qwen2-bias-tied", text, &calibration);
        assert_snapshot!(format!("method_{name}"), print_func(&unit.module, layer(&unit, 0)));
    }
    let (unit, ..) = compile("fixtures/qwen2-bias-tied", "rotate", &calibration);
    let ends: String = ["embed", "head"]
        .iter()
        .map(|f| print_func(&unit.module, unit.module.func(unit.module.find_func(f).unwrap())))
        .collect();
    assert_snapshot!("rotate_tied_ends", ends);
}

/// Weights of 8 bits alone make a module one that `rtn` rounds, and a wide layer has nothing else.
#[test]
fn a_wide_layer_has_eight_bits_everywhere() {
    let (unit, ..) = compile("fixtures/qwen2-bias-tied", "annotate{w=16,wide=last},rtn", &windows(256, 1, 8));
    let quantizers = |at: usize| {
        let f = layer(&unit, at);
        let spec = |n: &qrmc_ir::Node| match n.op {
            Op::FakeQuant(spec, _) => Some(spec.to_string()),
            Op::DCast => Some(f.ty(n.ins[0]).elem.to_string()),
            _ => None,
        };
        let mut all: Vec<String> = f.nodes.iter().filter_map(spec).collect();
        all.sort();
        all
    };
    assert_eq!(quantizers(0), Vec::<String>::new());
    let want = [vec!["i8<row, f32>"; 7], vec!["i8<token, f32>"; 4]].concat();
    assert_eq!(quantizers(1), want);
}

#[test]
fn skipped_layers_stay_as_they_are() {
    let calibration = windows(256, 2, 32);
    let source = import("fixtures/qwen2-bias-tied").module;
    for text in [
        "rtn{a=4,kv=4,group=8,skip=last}",
        "flatquant{epochs=1,batch=2,skip=last}",
        "flatquant{epochs=1,batch=2,edges=pairs,wide=o_proj,skip=last}",
        "smooth{skip=1},annotate{group=8,skip=layer1}",
        "kvquant{skip=last}",
        "quarot-kv{skip=[1]}",
    ] {
        let (unit, ..) = compile("fixtures/qwen2-bias-tied", text, &calibration);
        let same = |at: usize| {
            let id = source.layers()[at];
            print_func(&source, source.func(id)) == print_func(&unit.module, layer(&unit, at))
        };
        assert!(same(1) && !same(0), "{text}");
    }
}

#[test]
fn placing_the_transforms_of_a_deep_model_takes_seconds() {
    // 32 times the work of one layer of the largest skeleton there is.
    let calibration = windows(256, 2, 32);
    for text in [ROTATE, AFFINE] {
        let (unit, ..) = compile_raw("fixtures/llama-gqa-rope3", text, &calibration);
        let start = std::time::Instant::now();
        for _ in 0..16 {
            let mut again = unit.clone();
            qrmc_passes::place_transforms(&mut again).unwrap();
        }
        let seconds = start.elapsed().as_secs_f64();
        assert!(seconds < 10.0, "{text}: 32 layers in {seconds:.1} s");
    }
}

#[test]
fn what_is_written_is_what_was_compiled() {
    let engine = CpuEngine::new(2).unwrap();
    let ids = seeded_tokens(11, 24, 256);
    for name in ["fixtures/qwen2-bias-tied", "fixtures/llama-mha-tied", "fixtures/qwen3-qknorm"] {
        for text in [
            "rotate,rtn{bits=8,group=row,a=8}",
            "quarot-kv{bits=4,bias=aware}",
            "flatquant{w=8,a=8,kv=8,epochs=1,batch=2,tp=2}",
            "flatquant{w=8,a=8,kv=8,epochs=1,batch=2,fold=false}",
            "flatquant{epochs=1,batch=2,form=svd,skip=last}",
            "smooth,annotate{w=8,a=8,group=row,sym=true},gptq",
        ] {
            let (unit, ..) = compile(name, text, &windows(256, 2, 32));
            let plan = qrmc_lowering::materialize::plan(qrmc_ir::verify(&unit.module).unwrap()).unwrap();
            let mut stored = crate::support::Stored::default();
            plan.run(&engine, &unit.weights, &mut |t, bytes| {
                stored.put(&t.name, t.ty.clone(), bytes);
                Ok(())
            })
            .unwrap();
            let compiled = (&unit.module, &unit.weights as &dyn qrmc_ir::WeightSource);
            let gap = compare_sourced(&engine, compiled, (&plan.module, &stored), &ids).unwrap();
            assert!(gap.relative < 1e-5, "{name} {text}: {gap:?}");
        }
    }
}

/// Both ends of a tied embedding go their own ways, visibly: what they were is still one weight of the source.
#[test]
fn a_tied_embedding_is_parted() {
    let (unit, ..) = compile("fixtures/qwen2-bias-tied", "rotate", &windows(256, 1, 8));
    let plan = qrmc_lowering::materialize::plan(qrmc_ir::verify(&unit.module).unwrap()).unwrap();
    let names: Vec<String> = plan.tensors().iter().map(|t| t.name.clone()).collect();
    let parted = ["model.embed_tokens.weight.embed", "model.embed_tokens.weight.head"];
    assert!(parted.iter().all(|p| names.iter().any(|n| n == p)), "{names:?}");
}

/// methods.md §7.3: `a² - n` is no square for twice an odd number.
#[test]
fn a_width_without_factors_is_refused_by_name() {
    let text = std::fs::read_to_string(data("fixtures/llama-gqa-rope3/config.json")).unwrap();
    let module = |hidden: u64, intermediate: u64| {
        let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
        config["hidden_size"] = hidden.into();
        config["intermediate_size"] = intermediate.into();
        qrmc_frontends::outline(std::path::Path::new("outline"), &config).unwrap()
    };
    for (hidden, intermediate, pass, seen) in [
        (66, 192, "affine", "the 66 channels of attn_in make no Kronecker pair"),
        (64, 190, "affine", "the 190 channels of down_in make no Kronecker pair"),
        (64, 180, "affine", ""),
        (64, 180, "affine{tp=2}", "the 90 channels of down_in make no Kronecker pair"),
        (66, 192, "affine{wide=[q_proj,gate_proj]}", ""),
        (64, 190, "affine{wide=down_proj}", ""),
        (64, 190, "affine{edges=norms}", ""),
        (64, 192, "affine{edges=norms,wide=[v_proj,up_proj]}", "no edge is left to transform"),
        (64, 192, "affine{wide=r_proj}", "`wide`: `r_proj` matches no layer"),
    ] {
        let said =
            qrmc_passes::legal(&pipeline(pass), &module(hidden, intermediate)).map_err(|e| e.to_string());
        match said {
            Ok(()) => assert_eq!(seen, "", "{pass} on {hidden}, {intermediate}"),
            Err(e) => assert!(!seen.is_empty() && e.contains(seen), "{pass}: {e}"),
        }
    }
}
