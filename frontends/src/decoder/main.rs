//! The function that calls those of a decoder in order.

use qrmc_ir::{Builder, Diag, Func, Module, Op};

use super::{past, positions, stream, tokens};

/// `@main(ids, pos, k_past0, v_past0, ..) -> (logits, k_all0, v_all0, ..)`, of the functions that are there: hidden states
/// `x` in the place of `ids` without `@embed`, and `y` in the place of `logits` without `@head`.
pub(crate) fn main(module: &Module) -> Result<Func, Diag> {
    let mut b = Builder::new(module, "main");
    let (embed, head) = (module.find_func("embed"), module.find_func("head"));
    let mut x = match embed {
        Some(_) => b.param(Some("ids"), tokens()),
        None => b.param(Some("x"), stream(module)),
    };
    let pos = b.param(Some("pos"), positions());
    if let Some(embed) = embed {
        x = b.op1(Op::Call(embed), &[x])?;
    }
    let mut caches = Vec::new();
    let mut pasts = Vec::new();
    for i in 0..module.layers().len() {
        let k = b.param(Some(&format!("k_past{i}")), past(module));
        let v = b.param(Some(&format!("v_past{i}")), past(module));
        pasts.push((k, v));
    }
    for (layer, (k, v)) in module.layers().into_iter().zip(pasts) {
        let outs = b.op(Op::Call(layer), &[x, pos, k, v])?;
        x = outs[0];
        caches.extend([outs[1], outs[2]]);
    }
    match head {
        Some(head) => {
            x = b.op1(Op::Call(head), &[x])?;
            b.name(x, "logits");
        }
        None => b.name(x, "y"),
    }
    caches.insert(0, x);
    Ok(b.finish(&caches))
}
