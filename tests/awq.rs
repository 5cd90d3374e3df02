//! AWQ's searches against an independent re-computation in double precision (tests/scripts/awq_reference.py).

use qrmc_ir::{Engine, Op, WeightSource, extract};
use qrmc_passes::Calibration;
use qrmc_runtime::engine::CpuEngine;
use serde_json::Value;

use crate::passes::compile;
use crate::support::{TINY, data};

fn reference() -> Value {
    serde_json::from_slice(&std::fs::read(data("awq/layer1.json")).unwrap()).unwrap()
}

fn calibration(v: &Value) -> Calibration {
    let window = |w: &Value| w.as_array().unwrap().iter().map(|t| t.as_i64().unwrap() as i32).collect();
    let windows = v["token_ids"].as_array().unwrap().iter().map(window).collect();
    Calibration { windows, description: "the reference's".into() }
}

fn triples(v: &Value) -> Vec<(usize, usize, u32)> {
    let n = |x: &Value| x.as_u64().unwrap();
    v.as_array().unwrap().iter().map(|t| (n(&t[0]) as usize, n(&t[1]) as usize, n(&t[2]) as u32)).collect()
}

#[test]
fn scales_and_clips_are_the_references() {
    let reference = reference();
    let engine = CpuEngine::new(2).unwrap();
    for run in reference["runs"].as_array().unwrap() {
        let bits = run["bits"].as_u64().unwrap();
        let text = format!("scale{{w={bits}}},place-transforms,annotate{{w={bits},rule=awq}},clip-search");
        let (unit, _, losses) = compile(TINY, &text, &calibration(&reference));
        for pair in run["pairs"].as_array().unwrap() {
            let (id, edge) = match pair["id"].as_str().unwrap() {
                "a" => ("a", "attn_in"),
                "c" => ("c", "mlp_in"),
                _ => ("d", "down_in"),
            };
            let have = unit.weights.read(&format!("layer1.{edge}.scale")).unwrap();
            let want: Vec<f64> =
                pair["scale"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
            for (h, w) in have.as_f32().unwrap().iter().zip(&want) {
                assert!((f64::from(*h) - w).abs() <= 1e-4 * w, "W{bits} {id}: scale {h}, reference {w}");
            }
            let loss = losses.0.iter().find(|(p, l)| p == "scale" && l.layer == 1 && l.what == edge).unwrap();
            let wants: Vec<f64> =
                pair["losses"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
            let best = wants[pair["best"].as_u64().unwrap() as usize];
            assert!((loss.1.after - best).abs() <= 5e-4 * best, "W{bits} {id}: {} {best}", loss.1.after);
            assert!(
                (loss.1.before - wants[0]).abs() <= 3e-3 * wants[0],
                "W{bits} {id}: {} {}",
                loss.1.before,
                wants[0]
            );
        }
        let f = unit.module.func(unit.module.layers()[1]);
        for clip in run["clips"].as_array().unwrap() {
            let linear = clip["linear"].as_str().unwrap();
            let bounds = unit.weights.read(&format!("layer1.{linear}.bound")).unwrap();
            let id = unit.module.find_weight(&format!("layer1.{linear}.bound")).unwrap();
            let node =
                f.nodes.iter().find(|n| matches!(n.op, Op::Clip(_)) && f.as_weight(n.ins[1]) == Some(id));
            let weight = extract(&unit.module, f, "w", &[], &[node.unwrap().ins[0]]).unwrap();
            let w = engine.run(&unit.module, &weight, &unit.weights, &[]).unwrap().remove(0);
            let extents: Vec<f32> = w
                .as_f32()
                .unwrap()
                .chunks(128)
                .map(|g| g.iter().fold(0.0f32, |m, x| m.max(x.abs())))
                .collect();
            let groups = w.shape()[1] / 128;
            let allowed: Vec<_> =
                triples(&clip["near_ties"]).into_iter().chain(triples(&clip["zero_ties"])).collect();
            let (mut same, mut total) = (0, 0);
            for (row, digits) in clip["best"].as_array().unwrap().iter().enumerate() {
                for (group, digit) in digits.as_str().unwrap().chars().enumerate() {
                    let i = row * groups + group;
                    let keep = bounds.as_f32().unwrap()[i] / extents[i];
                    let index = ((1.0 - keep) * 20.0).round() as u32;
                    let want = digit.to_digit(10).unwrap();
                    let right = index == want || allowed.contains(&(row, group, index));
                    assert!(right, "W{bits} {linear} [{row}, {group}]: bound {index}, reference {want}");
                    same += usize::from(index == want);
                    total += 1;
                }
            }
            assert!(
                same * 100 >= total * 85,
                "W{bits} {linear}: {same} of {total} bounds are the reference's"
            );
        }
    }
}
