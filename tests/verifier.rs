//! Every fault has a code and points at its line.

use qrmc_ir::{Diag, Module, Op, parse, verify};

/// Parses and verifies; gives code and line of what is wrong.
fn fault(body: &str) -> (String, Option<usize>, Diag) {
    let text = format!("qir 1\nweight @w : bf16[8, 16]\nweight @g : f32[16]\n{body}");
    let d = match parse(&text) {
        Err(d) => d,
        Ok(m) => verify(&m).unwrap_err().remove(0),
    };
    (d.code.to_owned(), d.place.line, d)
}

#[test]
fn faults_have_codes_and_lines() {
    let f = |nodes: &str| format!("func @f(%x: f32[B, S, 16]) -> (f32[B, S, 16]) {{\n{nodes}\n}}");
    for (body, code, line) in [
        (f("  return %nothing"), "Q0101", 5),
        (f("  %y = silu %x, %x\n  return %y"), "Q0102", 5),
        (f("  %y = matmul %x, @w\n  return %y"), "Q0103", 5),
        (f("  %y = matmul.t %x, @w\n  return %y"), "Q0104", 6),
        (f("  %x = silu %x\n  return %x"), "Q0105", 5),
        (f("  %y = rms_norm %x, @nothing {eps = 1e-6}\n  return %y"), "Q0107", 5),
        (f("  %y = fake_quant %x {q = u9<token, f32, zero>, rule = minmax}\n  return %y"), "Q0201", 5),
        (f("  %w = fake_quant @w {q = u4<group:5, f32, zero>, rule = minmax}\n  return %x"), "Q0202", 5),
        (f("  %c = qcast @w, @g, @g {q = u4<row, f32, zero>}\n  return %x"), "Q0203", 5),
        (f("  %w = fake_quant @w {q = u4<row, f32>, rule = minmax}\n  return %x"), "Q0204", 5),
        (
            f(
                "  %s, %z = qparams @w {q = u4<row, f32, zero>, rule = awq}\n  %c = qcast @w, %s, %z {q = u4<row, f32, zero>}\n  %y = matmul.t %x, %c\n  return %x",
            ),
            "Q0205",
            7,
        ),
        (f("  %y = fake_quant %x {q = u4<token, f32, zero>, rule = mse}\n  return %y"), "Q0206", 5),
        (f("  %y = call @g %x\n  return %y"), "Q0302", 5),
        ("weight @w : f32[1]".into(), "Q0303", 4),
        (f("  %y = nonsense %x\n  return %y"), "Q0003", 5),
        (f("  %y = silu %x {eps = 1}\n  return %y"), "Q0003", 5),
        (f("  %y = = %x\n  return %y"), "Q0001", 5),
    ] {
        let (have, at, d) = fault(&body);
        assert_eq!((have.as_str(), at), (code, Some(line)), "{body}\n{d}");
    }
}

#[test]
fn every_fault_is_collected() {
    let text = "qir 1\nweight @w : f32[8, 16]\nfunc @f(%x: f32[B, S, 16]) -> (f32[B, S, 8]) {\n  %a = silu %x\n  %y = matmul.t %a, @w\n  return %y\n}\n";
    let mut m: Module = parse(text).unwrap();
    // What the parser would not let through: two operations that do not fit their operands.
    let f = &mut m.funcs[0];
    f.nodes[0].op = Op::Transpose(vec![0, 0, 0]);
    f.nodes[2].op = Op::MatMul { trans_b: false };
    let faults = verify(&m).unwrap_err();
    assert_eq!(faults.len(), 2, "{faults:?}");
    assert!(
        faults.iter().all(|d| d.place.line.is_some() && d.place.func.as_deref() == Some("f")),
        "{faults:?}"
    );
}

#[test]
fn a_group_that_does_not_divide_says_which_do() {
    let (code, _, d) = fault(
        "func @f(%x: f32[B, S, 16]) -> (f32[B, S, 16]) {\n  %w = fake_quant @w {q = u4<group:12, f32, zero>, rule = awq}\n  return %x\n}",
    );
    assert_eq!(code, "Q0202");
    assert!(d.message.contains("12") && d.message.contains("16"), "{d}");
    assert_eq!(d.hint.as_deref(), Some("groups that do: 16, 8"));
}
